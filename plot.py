"""Pictures of one run or of many.

    python plot.py runs/digits/mlae-vit_nano-seed0-...       # all that this run can have, into it
    python plot.py runs/digits/* --out pictures              # several, into a folder
    python plot.py runs/digits/* --out curves.png            # one file: the curves alone
    python plot.py A B --only experts --out experts.png      # one file of another kind
    python plot.py --sweep mask-prob runs                    # accuracy over a setting of a suite

curves.png: loss, training accuracy and the experts' similarity over the epochs. experts.png: their
similarity in each layer, lambda and importance. masks.png: what is masked. attention.png: what the
class token looks at, before and after. confusion.png: which classes are taken for which.

Runs that differ in nothing but the seed are one line with a band; of these, the pictures of what
lies inside a model show the first. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import Missing, create_normalizer
from eval import (
    class_names,
    confusion,
    importance,
    load_run,
    offline,
    predict,
    scored_images,
)
from methods import METHODS, adapters
from mlae import MLAELinear, expert_similarity
from model import architecture, create_backbone, eval_mode
from runs import (
    DEVICES,
    Result,
    RunError,
    new_parser,
    one_line,
    pick_device,
    point_to,
    read_config,
    read_log,
    shown,
    write_atomically,
)
from splits import printable
from suite import interval, label, natural, read_runs

# --- figures --------------------------------------------------------------------------------------
# Colours are told apart by the colour blind, and lines in grey too.

FILE_ENDINGS = (".png", ".pdf", ".svg")
LOOKS = ["o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:", "h-"]  # told apart in grey too
SHADES = "cividis"  # from dark to light, for the colour blind and in grey
SIZES = {  # points, for a page
    "font.size": 8,
    "figure.titlesize": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
}
MOST = 12  # layers of which each has its words
PAGE = 7.2  # inches: the width of a page's text


def start():
    """matplotlib.pyplot, set up; RunError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("drawing needs matplotlib: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use("tableau-colorblind10")
    pyplot.rcParams.update(SIZES)
    pyplot.rcParams["text.parse_math"] = False  # a class may be called $5
    return pyplot


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    """(figure, axes (rows, columns)) of plots of that size in inches; RunError without
    matplotlib."""
    width, height = size
    figure, axes = start().subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def tile(count: int, size: tuple[float, float]):
    """(figure, `count` axes), at most two in a row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, axes = new_figure(rows, columns, size)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def fold(words: str, width: int = 20) -> str:
    """Words in lines of about so many characters."""
    return textwrap.fill(words, width, break_long_words=False)


def heat(axis, values: Tensor, highest: float):
    """A map of values (rows, columns) from 0 to the highest; hatched where there is none (nan)."""
    axis.grid(False)
    axis.patch.set(facecolor="white", hatch="/////", edgecolor="0.7")
    highest = highest or 1.0
    shown = axis.imshow(values.numpy(), vmin=0, vmax=highest, cmap=SHADES, aspect="auto")
    axis.tick_params(length=2)
    axis.xaxis.get_major_locator().set_params(integer=True)
    return shown


def add_bar(figure, shown, axes, words: str) -> None:
    """A colour bar for a map, with what the colours mean."""
    slim = 6 * figure.get_figheight()
    bar = figure.colorbar(shown, ax=axes, aspect=slim)
    bar.set_label(words)


def label_layers(axis, names: list[str]) -> None:
    """The layers' names along a vertical axis: all, or as many as there is room for."""
    step = math.ceil(len(names) / MOST)
    places = range(0, len(names), step)
    axis.set_yticks(places, names[::step])


def check_picture(path: Path) -> None:
    """Raise RunError for a file that cannot be drawn into, or without matplotlib."""
    start()
    is_free = path.is_file() or not path.exists()
    if path.suffix not in FILE_ENDINGS or not is_free or not path.absolute().parent.is_dir():
        raise RunError(f"{path}: expected a {', '.join(FILE_ENDINGS)} file in a folder that exists")


def save(figure, path: Path, dpi: int = 150) -> None:
    """Write a figure whole or not at all; RunError if it cannot be."""
    with write_atomically(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=dpi)
    start().close(figure)


# --- what lies inside a trained model ---------------------------------------------------------------

SHOWN = 6  # test images whose attention is drawn


class NoPicture(RunError):
    """A run that cannot have such a picture."""


@dataclass
class Run:
    """A run that pictures look into: what is asked for is read once. Nothing is fetched.

    `name` says in a few words which it is; `data_dir` and `checkpoint`: where these are now.
    """

    folder: Path
    name: str
    device: str | torch.device = "cpu"
    data_dir: str | None = None
    checkpoint: str | None = None

    @cached_property
    def trained(self) -> tuple[nn.Module, dict]:
        """The model on the device, and config.json."""
        with offline():
            model, config = load_run(self.folder, self.checkpoint)
        return model.to(self.device), config

    @cached_property
    def images(self) -> data.Images:
        """What the run was scored on: the test images, or val200."""
        _, config = self.trained
        point_to(config, self.data_dir)
        return scored_images(self.folder, config)

    @cached_property
    def answers(self) -> tuple[Tensor, Tensor]:
        """The class that the model gives each image (N,), and the right one (N,)."""
        model, config = self.trained
        normalize = create_normalizer(config["arguments"], model)
        logits, labels = predict(model, WithBar(self.images), normalize, config["amp"])
        return logits.argmax(1), labels

    @cached_property
    def confusion(self) -> Tensor:
        """How many images of each class (rows) the model takes for each (columns)."""
        return confusion(*self.answers, len(self.classes))

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes, or their numbers."""
        model, config = self.trained
        return class_names(config, model.num_classes)

    @cached_property
    def experts(self) -> dict[str, MLAELinear]:
        """The layers whose experts have a lambda of their own, by a short name as in 0.qkv."""
        model, _ = self.trained
        found = {}
        for path, layer in adapters(model).items():
            words = path.split(".")
            numbers = [word for word in words if word.isdigit()]
            if hasattr(layer, "lora_lambda"):
                found[".".join([*numbers, words[-1]])] = layer
        if not found:
            raise NoPicture(f"{self.name} has no experts with a lambda")
        if len({layer.rank for layer in found.values()}) > 1:
            raise NoPicture(f"{self.name} was pruned to layers of different ranks")
        return found

    @cached_property
    def masks(self) -> tuple[Tensor, Tensor]:
        """The fixed masks (layers, rank), and the share of the experts that a step keeps (layers,
        epochs) as each epoch ends."""
        model, config = self.trained
        args = config["arguments"]
        layers = self.experts.values()
        fixed = torch.stack([layer.expert_mask for layer in layers]).cpu()
        rates = []
        for epoch in range(args.epochs):
            METHODS[args.method].before_step(model, (epoch + 1) / args.epochs)
            rates.append([1 - layer.mask_prob for layer in layers])
        rates = torch.tensor(rates).T
        if (fixed == 1).all() and (rates == 1).all():
            raise NoPicture(f"{self.name} masks no expert")
        return fixed, rates

    @cached_property
    def attention(self) -> Attention:
        """What the class token looks at before and after, in the first images of some classes."""
        model, config = self.trained
        args = config["arguments"]
        if args.no_pretrained:
            raise NoPicture(f"{self.name} had no pre-trained backbone to compare with")
        with offline():
            base = create_backbone(
                args.model,
                model.num_classes,
                checkpoint=args.checkpoint,
                img_size=args.img_size,
            ).to(self.device)
        right = self.images.labels.tolist()
        labels = sorted(set(right))[:SHOWN]
        images = torch.stack([self.images[right.index(label)][0] for label in labels])
        x = create_normalizer(args, model)(images)
        before, _ = class_attention(base, x)
        after, logits = class_attention(model, x)
        if torch.equal(before, after):
            raise NoPicture(f"{self.name} leaves the backbone's attention as it is")
        names = [self.classes[label] for label in labels]
        answers = [self.classes[answer] for answer in logits.argmax(1)]
        maps = patch_map(model, before), patch_map(model, after)
        return Attention(images, names, *maps, answers)


@dataclass
class Attention:
    """Images (N, 3, S, S) and their classes' names; the shares of the class token's attention that
    the patches have before and after adaptation (N, side, side), and the classes it says after."""

    images: Tensor
    names: list[str]
    before: Tensor
    after: Tensor
    answers: list[str]


@dataclass
class WithBar:
    """Images whose batches move a bar, if they take longer than two seconds."""

    images: data.Images

    def batches(self, size: int, workers: int) -> Iterator:
        total = math.ceil(len(self.images) / size)
        batches = self.images.batches(size, workers)
        return tqdm(batches, "test images", total, leave=False, disable=None, delay=2)


def similarity(layer: MLAELinear) -> Tensor:
    """|cosine| of every two experts (rank, rank), on the CPU; nan on the diagonal and for experts
    that are masked for good."""
    cosines = expert_similarity(layer).abs()
    acts = layer.expert_mask != 0
    both = acts[:, None] & acts
    return cosines.where(both, torch.nan).fill_diagonal_(torch.nan).cpu()


@torch.no_grad()
def magnitudes(layer: MLAELinear) -> tuple[Tensor, Tensor]:
    """|lambda| and the importance |lambda| |a| |b| of each expert (rank,), on the CPU; nan for
    those that are masked for good."""
    acts = layer.expert_mask != 0
    size = layer.lora_lambda.abs().where(acts, torch.nan)
    return size.cpu(), importance(layer).where(acts, torch.nan).cpu()


@torch.no_grad()
def class_attention(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the class token of the last block attends to, the mean over heads (B, tokens), each row
    with sum 1; and the logits (B, classes). x: (B, 3, S, S), normalized.

    Raises NoPicture for a model without a class token, or whose attention is not timm's.
    """
    if getattr(model, "cls_token", None) is None:
        raise NoPicture(f"{architecture(model)} has no class token")
    blocks = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not blocks or not hasattr(blocks[-1], "attn_drop"):
        raise NoPicture(f"the attention of {architecture(model)} cannot be seen from outside")
    last = blocks[-1]
    seen = []
    hook = last.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    fused = last.fused_attn
    last.fused_attn = False  # torch's fused kernel never has it whole
    try:
        with eval_mode(model):
            logits = model(x)
    finally:
        hook.remove()
        last.fused_attn = fused
    return seen[0][:, :, 0].mean(1), logits  # of (B, heads, queries, tokens)


def patch_map(model: nn.Module, attention: Tensor) -> Tensor:
    """Attention (B, tokens) as a map of the image's patches (B, side, side)."""
    patches = attention[:, getattr(model, "num_prefix_tokens", 1) :]
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side)).float().cpu()


# --- pictures of it ---------------------------------------------------------------------------------

ROW = 6  # maps of similarity beside each other
NAMED = 15  # classes of a confusion matrix; of more, the most confused


def draw_experts(runs: list[Run]):
    """For each run the |cosine| of every two experts of each layer, with the mean over pairs;
    |lambda|; and the experts' importance |lambda| |a| |b|, as layers x experts.

    Every run has the same colours for the same values.
    """
    cosines, sizes, weights = [], [], []  # of each run
    heights = []
    for run in runs:
        layers = run.experts.values()
        heights.append(math.ceil(len(layers) / ROW))
        cosines.append(list(map(similarity, layers)))
        both = list(map(magnitudes, layers))
        sizes.append(torch.stack([size for size, _ in both]))  # (layers, rank)
        weights.append(torch.stack([weight for _, weight in both]))
    tops = [
        highest(sum(cosines, [])),
        highest(sizes),
        highest(weights),
    ]
    height = 0.5 + 1.4 * sum(heights)
    figure = start().figure(figsize=(PAGE, height), layout="constrained")
    heights.append(0.4)
    *parts, foot = figure.subfigures(len(heights), 1, height_ratios=heights)
    for number, (part, run) in enumerate(zip(parts, runs, strict=True)):
        maps = cosines[number], sizes[number], weights[number]
        shown = draw_run(part, run, maps, tops)
    place = foot.add_axes((0.1, 0.7, 0.4, 0.25))
    bar = figure.colorbar(shown, cax=place, orientation="horizontal")
    bar.set_label("|cosine| of two experts (above each map the mean of all pairs)")
    return figure


def highest(maps: list[Tensor]) -> float:
    """The highest value of several maps, some of whose values may be nan."""
    found = []
    for values in maps:
        numbers = values[values.isfinite()]
        found += numbers.tolist()
    return max(found, default=0.0)


def draw_run(part, run: Run, maps: tuple, tops: list[float]):
    """One run of `draw_experts`: maps of similarity in rows, of which it returns one; then lambda
    and importance."""
    cosines, *others = maps
    names = list(run.experts)
    part.suptitle(fold(run.name, 90), fontweight="bold")
    rows = math.ceil(len(cosines) / ROW)
    widths = [1] * ROW + [2, 2]
    grid = part.add_gridspec(rows, len(widths), width_ratios=widths)
    for number, cosine in enumerate(cosines):
        row, column = divmod(number, ROW)
        axis = part.add_subplot(grid[row, column])
        similar = heat(axis, cosine, tops[0])
        axis.set(xticks=[], yticks=[], box_aspect=1)
        mean = "one expert"
        if cosine.isfinite().any():
            mean = f"{cosine.nanmean():.3f}"
        axis.set_title(f"{names[number]}\n{mean}", fontsize=7)
    words = ["|λ|, layers × experts", "importance |λ| |a| |b|"]
    for number, values in enumerate(others):
        axis = part.add_subplot(grid[:, ROW + number])
        shown = heat(axis, values, tops[1 + number])
        axis.set_title(words[number], fontsize=7)
        axis.set_yticks([])
        if number == 0:
            axis.set_yticks(range(len(names)), names, fontsize=6)
        part.colorbar(shown, ax=axis)
    return similar


def draw_masks(runs: list[Run]):
    """For each run the fixed masks, layers x experts; the keep rate of each layer, over the epochs
    if it changes; or both."""
    panels = []
    for run in runs:
        fixed, rates = run.masks
        if (fixed == 0).any():
            panels.append((run, draw_fixed, fixed))
        if (rates < 1).any():
            changes = (rates != rates[:, :1]).any()
            panels.append((run, draw_schedule if changes else draw_rates, rates))
    size = PAGE / 2, 2.7
    figure, axes = tile(len(panels), size)
    for axis, (run, draw, values) in zip(axes, panels, strict=True):
        draw(axis, values)
        label_layers(axis, list(run.experts))
        axis.set_title(fold(run.name, 50))
        axis.set_ylabel("layer")
    return figure


def draw_fixed(axis, masks: Tensor) -> None:
    """Fixed masks (layers, rank): dark is kept, white is masked for good."""
    layers, rank = masks.shape
    white = (1 - masks).numpy()
    looks = {"cmap": "gray", "edgecolors": "0.6"}
    looks |= {"vmin": -0.3, "vmax": 1}  # dark grey, not black
    axis.grid(False)
    places = range(rank), range(layers)
    axis.pcolormesh(*places, white, shading="nearest", **looks)
    axis.invert_yaxis()
    axis.xaxis.get_major_locator().set_params(integer=True)
    count = masks.sum(1).mean()
    axis.set_xlabel(f"expert (dark: kept for good, {count:.1f} of {rank} a layer)")


def draw_rates(axis, rates: Tensor) -> None:
    """The keep rate of each layer, which does not change."""
    last = rates[:, -1].tolist()
    axis.barh(range(len(last)), last, height=0.7)
    shown = last if len(last) <= MOST else []
    for layer, rate in enumerate(shown):
        axis.text(rate + 0.02, layer, f"{rate:.2f}", va="center")
    axis.set(xlim=(0, 1.15))
    axis.invert_yaxis()
    axis.set_xlabel("share of the experts that a step keeps")


def draw_schedule(axis, rates: Tensor) -> None:
    """The keep rates (layers, epochs) of a schedule."""
    layers, epochs = rates.shape
    shown = heat(axis, rates, 1.0)
    ends = 0.5, epochs + 0.5, layers - 0.5, -0.5  # left, right, bottom, top
    shown.set_extent(ends)
    axis.set_xlabel("epoch")
    add_bar(axis.figure, shown, axis, "share of the experts kept")


def draw_attention(runs: list[Run]):
    """A column for each test image: the image; the share of the class token's attention that each
    patch has in the backbone before it was adapted; and the same in each run.

    Raises NoPicture for runs with other images or another backbone than the first.
    """
    first = runs[0].attention
    lines = {"before": (first.before, None)}
    for run in runs:
        found = run.attention
        same_images = found.images.equal(first.images)
        if not same_images or not found.before.equal(first.before):
            raise NoPicture(f"{run.name} has other images or another backbone: name one run")
        lines[run.name] = found.after, found.answers
    maps = [shares for shares, _ in lines.values()]
    top = highest(maps)
    columns = len(first.names)
    size = PAGE / columns, 1.15
    figure, axes = new_figure(1 + len(lines), columns, size)
    for axis, name in zip(axes[:, 0], ["image", *lines], strict=True):
        words = fold(name)
        axis.set_ylabel(words, fontsize=7)
    for column, axis in enumerate(axes[0]):
        pixels = first.images[column].permute(1, 2, 0)  # (S, S, 3)
        axis.imshow(pixels.numpy())
        axis.set_title(fold(first.names[column]), fontsize=7)
    for line, found in zip(axes[1:], lines.values(), strict=True):
        shares, answers = found
        for column, axis in enumerate(line):
            shown = heat(axis, shares[column], top)
            axis.set_aspect("equal")
            if answers:
                words = fold(f"says {answers[column]}")
                axis.set_xlabel(words, fontsize=7)
    for axis in axes.flat:
        axis.grid(False)
        axis.set(xticks=[], yticks=[])
    add_bar(figure, shown, axes[1:], "share of the class token's attention")
    return figure


def draw_confusion(runs: list[Run]):
    """Counts of right class against the model's, coloured by the share of the right class's
    images; of many classes, those with most mistakes."""
    size = PAGE / 2, 3.6
    if len(runs) == 1:
        size = 4.6, 4.4
    figure, axes = tile(len(runs), size)
    for axis, run in zip(axes, runs, strict=True):
        counts = run.confusion
        right = counts.diag()
        mistakes = counts.sum(0) + counts.sum(1)  # (classes,), and twice the right ones
        worst = (mistakes - 2 * right).argsort(descending=True, stable=True)
        chosen = worst[:NAMED].sort().values
        names = [run.classes[i] for i in chosen]
        shown = draw_counts(axis, counts, chosen, names)
        top1 = 100 * right.sum() / counts.sum()
        words = fold(f"{run.name}: {top1:.2f} % of {counts.sum()}", 44)
        if len(names) < len(counts):
            words += f"\nthe {len(names)} most confused of {len(counts)} classes"
        axis.set_title(words)
    add_bar(figure, shown, axes, "share of the right class's images")
    return figure


def draw_counts(axis, counts: Tensor, chosen: Tensor, names: list[str]):
    """The rows and columns `chosen` of a confusion matrix, coloured by the share of the row."""
    images = counts.sum(1, keepdim=True)
    share = counts / images.clamp_min(1)
    share = share[chosen][:, chosen]
    shown = heat(axis, share, 1.0)
    counts = counts[chosen][:, chosen].tolist()
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            color = "black" if share[row, column] > 0.5 else "white"
            looks = {"ha": "center", "va": "center", "color": color}
            if count:
                axis.text(column, row, count, fontsize=6, **looks)
    axis.set_box_aspect(1)
    places = range(len(names))
    longest = max(map(len, names))
    axis.set_xticks(places, names, rotation=90 if longest > 2 else 0)
    axis.set_yticks(places, names)
    axis.set(xlabel="the model says", ylabel="right")
    return shown


# --- accuracy over a setting -----------------------------------------------------------------------

NO_SETTINGS = ("seed", "val", "dataset", "checkpoint")
LINES = ("method", "model")  # always told apart
LOGARITHMIC = ("lr", "rank", "batch_size", "weight_decay", "lambda_lr")  # settings for a log axis


def read_sweep(results: list[Result], setting: str) -> dict[tuple, dict]:
    """{(dataset, split): {line: {value of the setting: {seed: top-1}}}} of finished runs.

    A line is a configuration without the setting, and without what goes with it, as a learning rate
    chosen for each value. Runs whose method has no such setting have the value None. Raises
    RunError if nowhere a line has two values.
    """
    panels: dict[tuple, list] = {}
    for result in results:
        _, task = data.place_in_table(result.metrics["dataset"], result.identity)
        key = task, result.split
        panels.setdefault(key, []).append(result)
    sweeps = {}
    for panel, members in sorted(panels.items()):  # not by which ran first
        others = apart(members, setting)
        rivals = [settings_of(result, others) for result in members]
        lines: dict[str, dict] = {}
        for result in members:
            given = settings_of(result, others)
            name = label(result.arguments, given, rivals)
            points = lines.setdefault(name, {})
            scores = points.setdefault(value_of(result, setting), {})
            scores[result.metrics["seed"]] = result.top1
        if any(len(points) > 1 for points in lines.values()):
            names = sorted(lines, key=natural)
            sweeps[panel] = {name: lines[name] for name in names}
    if not sweeps:
        names = set()
        for result in results:
            names.update(result.identity)
        listing = ", ".join(sorted(names.difference(NO_SETTINGS, LINES)))
        raise RunError(
            f"--sweep {setting}: no run was repeated with another value; their settings: {listing}"
        )
    return sweeps


def value_of(result: Result, setting: str):
    """The value of a setting, a list as text; None if the run's method has none."""
    row = METHODS[result.arguments["method"]]
    value = result.arguments.get(setting, row.settings.get(setting))
    return shown(value) if isinstance(value, list | dict) else value


def settings_of(result: Result, names: list[str]) -> dict:
    """Those of these settings that a run's identity has."""
    own = result.identity
    return {name: own[name] for name in names if name in own}


def apart(results: list[Result], setting: str) -> list[str]:
    """The settings that tell lines of a sweep apart: neither `setting`, nor what is decided by it
    and the others."""
    names = {}  # in order, each once
    for result in results:
        names.update(dict.fromkeys(result.identity))
    kept = [name for name in names if name not in NO_SETTINGS]
    kept = [name for name in kept if name != setting]
    for name in list(kept):
        rest = [other for other in kept if other != name]
        if name not in LINES and decided(results, name, [setting, *rest]):
            kept = rest
    return kept


def decided(results: list[Result], name: str, others: list[str]) -> bool:
    """Whether runs that agree in all other settings agree in this one."""
    found: dict[str, set] = {}
    for result in results:
        agreed = [value_of(result, other) for other in others]
        values = found.setdefault(json.dumps(agreed), set())
        values.add(json.dumps(value_of(result, name)))
    return all(len(values) == 1 for values in found.values())


@dataclass
class Ruler:
    """Where the values of a setting are on an axis: numbers as they are, words one by one."""

    values: list
    logarithmic: bool = False

    @property
    def numeric(self) -> bool:
        return all(isinstance(value, int | float) for value in self.values)

    def place(self, value, shift: float = 0.0) -> float:
        """The place of a value, moved by that share of the axis."""
        places = self.values if self.numeric else range(len(self.values))
        low, high = places[0], places[-1]
        here = places[self.values.index(value)]
        if self.logarithmic:
            return here * (high / low) ** shift
        return here + shift * (high - low)


def ruler(lines: dict[str, dict], setting: str) -> Ruler:
    """The ruler of all values in these lines."""
    values = set()
    for points in lines.values():
        values.update(points)
    made = Ruler(list(values - {None}))
    made.values.sort(key=None if made.numeric else str)
    made.logarithmic = made.numeric and setting in LOGARITHMIC and min(made.values, default=0) > 0
    return made


def draw_sweep(sweeps: dict[tuple, dict], setting: str):
    """Top-1 over the setting, a plot for each data set and split: the mean of the seeds and its
    95 % interval, and for methods without the setting a level line."""
    most = max(map(len, sweeps.values()))  # lines of a plot
    width = 5.0 if len(sweeps) == 1 else PAGE / 2
    height = 2.8 + 0.17 * most
    figure, axes = tile(len(sweeps), (width, height))
    for axis, panel in zip(axes, sweeps, strict=True):
        dataset, split = panel
        lines = sweeps[panel]
        along = ruler(lines, setting)
        ends = []
        step = min(0.012, 0.04 / len(lines))  # of the axis; else bars hide each other
        for number, (name, points) in enumerate(lines.items()):
            look = LOOKS[number % len(LOOKS)]
            shift = step * (number - (len(lines) - 1) / 2)
            ends += draw_line(axis, name, points, look, along, shift)
        if along.logarithmic:
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_ylim(*limits(ends))
        places = list(map(along.place, along.values))
        names = map("{:g}".format if along.numeric else str, along.values)
        axis.set_xticks(places, list(names))
        axis.set_title(dataset)
        axis.set_xlabel(setting)
        words = f"{split} top-1 (%)"
        if any(low is not None for _, low, _ in ends):
            words += ", mean and 95 % interval"
        axis.set_ylabel(words)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure


def draw_line(axis, name: str, points: dict, look: str, along: Ruler, shift: float) -> list:
    """A line of {value: {seed: top-1}}, level for the value None; returns (mean, low, high) of
    each value."""
    ends = {}
    for value, scores in points.items():
        ends[value] = interval(list(scores.values()))
    counts = list(map(len, points.values()))
    fewest, n = min(counts), max(counts)
    if fewest < n:
        n = f"{fewest} to {n}"
    words = fold(f"{name} (n = {n})", 60)
    (line,) = axis.plot([], [], look, label=words, markersize=4)
    color, style = line.get_color(), line.get_linestyle()
    if None in points:
        mean, low, high = ends[None]
        axis.axhline(mean, color=color, linestyle=style)
        if low is not None:
            axis.axhspan(low, high, color=color, alpha=0.15)
    values = [value for value in along.values if value in points]
    if not values:
        line.set_marker("None")
    else:
        places, means, halves = [], [], []
        for value in values:
            mean, _, high = ends[value]
            places.append(along.place(value, shift))
            means.append(mean)
            halves.append(0.0 if high is None else high - mean)
        looks = {"fmt": look, "color": color, "markersize": 4}
        axis.errorbar(places, means, halves, capsize=2.5, **looks)
    return list(ends.values())


def limits(ends: list[tuple]) -> tuple[float, float]:
    """The ends of the axis for these (mean, low, high): wide intervals of few seeds leave it."""
    means, lows, highs = [], [], []
    for mean, low, high in ends:
        means.append(mean)
        lows.append(mean if low is None else low)
        highs.append(mean if high is None else high)
    room = max(1.0, max(means) - min(means))
    bottom = max(0, min(lows), min(means) - room)
    top = min(100, max(highs), max(means) + room)
    margin = 0.05 * room
    return bottom - margin, top + margin


# --- the command line ------------------------------------------------------------------------------

MODELS = {  # the pictures of what lies inside models: what of inside.Run they show, and how
    "experts": ("experts", draw_experts),
    "masks": ("masks", draw_masks),
    "attention": ("attention", draw_attention),
    "confusion": ("confusion", draw_confusion),
}
PICTURES = ["curves", *MODELS]


def group(folders: list[Path]) -> dict[str, list[Path]]:
    """{configuration: the folders of its seeds} of runs; RunError for what is not a run."""
    found: dict[str, tuple[dict, list[Path]]] = {}  # settings -> all arguments, folders
    for folder in folders:
        config = read_config(folder)
        settings = dict(config["identity"])
        seed = settings.pop("seed")
        key = json.dumps(settings, sort_keys=True)
        _, members = found.setdefault(key, (vars(config["arguments"]), {}))
        members[seed] = folder
    rivals = [json.loads(key) for key in found]
    groups: dict[str, list[Path]] = {}
    for key, (arguments, members) in found.items():
        settings = json.loads(key)
        extra = {name: settings.get(name) for name in ("pruned", data.FOLDER)}
        name = label(arguments | extra, settings, rivals)
        groups[name] = [members[seed] for seed in sorted(members)]
    return groups


def read_curves(groups: dict[str, list[Path]]) -> dict[str, list[list[dict]]]:
    """{configuration: [the log's rows of each seed]}; RunError for a damaged log."""
    curves = {}
    for name, folders in groups.items():
        missing = [folder for folder in folders if not os.path.lexists(folder / "log.csv")]
        if missing:
            leave_out("curves", NoPicture(f"{missing[0]} has no log.csv"))
            continue
        logs = [read_log(folder / "log.csv") for folder in folders]
        for folder, rows in zip(folders, logs, strict=True):
            if len(rows) != len(logs[0]):
                raise RunError(f"{folder} has {len(rows)} epochs, another seed's run has not")
        curves[name] = logs
    if not curves:
        raise NoPicture("there is no run that has a log")
    return curves


def draw_curves(curves: dict[str, list[list[dict]]]):
    """Training loss and top-1, and the experts' similarity if it was logged, over the epochs: the
    mean of each configuration and its range over seeds."""
    panels = {"loss": "training loss", "train_top1": "training top-1 (%)"}
    logged = set()
    for logs in curves.values():
        logged.update(logs[0][0])
    if "similarity" in logged:
        panels["similarity"] = "mean |cosine| of experts"
    wordy = max(map(len, curves)) > 45
    height = 2.5 + 0.17 * len(curves) / (1 if wordy else 2)
    figure, axes = new_figure(1, len(panels), (PAGE / len(panels), height))
    for look, (name, logs) in zip(itertools.cycle(LOOKS), curves.items(), strict=False):
        epochs = range(1, len(logs[0]) + 1)
        words = f"{name} ({len(logs)} seeds)" if len(logs) > 1 else name
        looks = {"markersize": 3, "linewidth": 1.2, "markevery": max(1, len(epochs) // 10)}
        for axis, column in zip(axes[0], panels, strict=True):
            if any(column not in rows[0] for rows in logs):
                axis.plot([], [], look)  # the next line keeps its colour
                continue
            by_epoch = []
            for rows in zip(*logs, strict=True):  # of one epoch, a row for each seed
                by_epoch.append([row[column] for row in rows])
            mean = list(map(statistics.mean, by_epoch))
            axis.plot(epochs, mean, look, label=words, **looks)
            low, high = list(map(min, by_epoch)), list(map(max, by_epoch))
            axis.fill_between(epochs, low, high, alpha=0.2)
    for axis, words in zip(axes[0], panels.values(), strict=True):
        axis.set_xlabel("epoch")
        axis.set_ylabel(words)
    handles, names = axes[0, 0].get_legend_handles_labels()
    several = any(len(logs) > 1 for logs in curves.values())
    title = "mean and range over seeds" if several else None
    place = {"loc": "outside lower center", "ncols": 1 if wordy else 2}
    figure.legend(handles, names, title=title, **place)
    return figure


def places(args: argparse.Namespace, kinds: list[str]) -> dict[str, Path]:
    """{kind of picture: its file}, checked; RunError for a file that cannot be drawn into."""
    folder, suffix = args.out or args.runs[0], args.format or "png"
    if folder.suffix in FILE_ENDINGS and not folder.is_dir():
        if len(kinds) > 1:
            raise RunError(f"--out {folder}: one file for {', '.join(kinds)}; name a folder")
        if args.format and folder.suffix != f".{args.format}":
            raise RunError(f"--out {folder}: another format than --format {args.format}")
        files = {kinds[0]: folder}
    else:
        if args.out:
            folder.mkdir(parents=True, exist_ok=True)
        files = {kind: folder / f"{kind}.{suffix}" for kind in kinds}
    for file in files.values():
        check_picture(file)
    return files


def draw_all(args: argparse.Namespace) -> None:
    """Draw what args.only names, or else all that these runs can have; print the files."""
    is_file = args.out and args.out.suffix in FILE_ENDINGS and not args.out.is_dir()
    kinds = args.only or (PICTURES[:1] if is_file else PICTURES)
    groups = group(args.runs)
    files = places(args, kinds)
    where = {"device": args.device, "data_dir": args.data_dir, "checkpoint": args.checkpoint}
    runs = [Run(folders[0], name, **where) for name, folders in groups.items()]
    for kind in kinds:
        try:
            if kind == "curves":
                figure = draw_curves(read_curves(groups))
            else:
                figure = draw_models(kind, runs, strict=bool(args.only))
        except NoPicture as error:
            if args.only:
                raise
            leave_out(kind, error)
            continue
        save(figure, files[kind])
        print(files[kind])


def draw_models(kind: str, runs: list[Run], strict: bool):
    """A picture of what lies inside those models that can have it; NoPicture if none can, and, if
    `strict`, if one cannot."""
    shown, draw = MODELS[kind]
    able = []
    for run in tqdm(runs, kind, leave=False, disable=None, delay=2):
        try:
            getattr(run, shown)
            able.append(run)
        except (NoPicture, Missing) as error:
            if strict:
                raise
            leave_out(kind, error)
    if not able:
        raise NoPicture("there is no run that can have it")
    return draw(able)


def leave_out(kind: str, error: Exception) -> None:
    print(printable(f"left out of {kind}: {error}"), file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser("plot.py", __doc__)
    flag = parser.add_argument
    flag("runs", nargs="*", type=Path, help="folders of runs")
    flag("--only", nargs="+", choices=PICTURES, metavar="KIND", help=f"of {', '.join(PICTURES)}")
    flag("--out", type=Path, help="a folder, or the file of one picture (default: the first run)")
    flag(
        "--format",
        choices=[name[1:] for name in FILE_ENDINGS],
        help="default: png, or that of --out",
    )
    help_of_sweep = "accuracy over a setting, as in mask-prob or lr, of the runs in these folders"
    flag("--sweep", metavar="SETTING", help=help_of_sweep)
    flag("--data-dir", help="where the data are now (default: where they were in training)")
    flag("--checkpoint", help="where the backbone's file is now (default: where it was)")
    flag("--device", choices=DEVICES, default="auto", help="default: auto, the fastest here")
    args = parser.parse_args(argv)
    with one_line("plot.py"):
        if not args.runs:
            raise RunError("name the folder of a run, or several")
        args.device = pick_device(args.device)
        if not args.sweep:
            draw_all(args)
            return
        setting = args.sweep.lstrip("-").replace("-", "_")
        results = read_runs(*args.runs)
        if not results:
            raise RunError(f"--sweep: there is no finished run in {' '.join(map(str, args.runs))}")
        sweeps = read_sweep(results, setting)
        (file,) = places(args, [f"sweep-{setting}"]).values()
        save(draw_sweep(sweeps, setting), file)
        print(file)


if __name__ == "__main__":
    main()
