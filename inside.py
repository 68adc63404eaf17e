"""What lies inside trained models: pictures of experts, masks, attention and mistakes.

    runs = [Run(Path("runs/digits/mlae-..."), "mlae")]
    save(draw_experts(runs), Path("experts.png"))

Each takes one run or several, which it shows beside or above each other, and returns a figure. It
raises NoPicture, saying why, if a run cannot have such a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import figures
from backbone import architecture, eval_mode
from baselines import METHODS
from eval import create_model, create_normalizer, load_data, load_run, offline, predict
from figures import PAGE, add_bar, fold, heat, label_layers, new_figure, start, tile
from files import RunError, check_shape
from mlae import MLAELinear, expert_similarity
from model import adapters

SHOWN = 6  # test images whose attention is drawn, and maps of similarity in a row
NAMED = 15  # classes of a confusion matrix; of more, the most confused


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
        args = config["arguments"]
        args.data_dir = self.data_dir or args.data_dir
        if config["source"] in data.SOURCES:
            args.source = config["source"]
        _, images = load_data(args, download=False)
        return images

    @cached_property
    def answers(self) -> tuple[Tensor, Tensor]:
        """The class that the model gives each image (N,), and the right one (N,)."""
        model, config = self.trained
        normalize = create_normalizer(config["arguments"], model, self.device)
        logits, labels = predict(model, WithBar(self.images), normalize, config["amp"])
        return logits.argmax(1), labels

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes, or their numbers."""
        _, config = self.trained
        count = data.TASKS[config["arguments"].dataset].classes
        names = config.get("class_names", list(map(str, range(count))))
        check_shape(names, list, f"{self.folder / 'config.json'}: class_names")
        if len(names) != count or not all(isinstance(name, str) for name in names):
            raise RunError(f"{self.folder}: class_names are not the names of {count} classes")
        return names

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
            base = create_model(args).to(self.device)
        right = self.images.labels.tolist()
        labels = sorted(set(right))[:SHOWN]
        images = torch.stack([self.images[right.index(label)][0] for label in labels])
        x = create_normalizer(args, model, self.device)(images)
        before, _ = class_attention(base, x)
        after, logits = class_attention(model, x)
        if torch.equal(before, after):
            raise NoPicture(f"{self.name} leaves the backbone's attention as it is")
        names = [self.classes[label] for label in labels]
        answers = [self.classes[answer] for answer in logits.argmax(1)]
        return Attention(images, names, patch_map(model, before), patch_map(model, after), answers)


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
    """|cosine| of every two experts (rank, rank); nan on the diagonal and for experts masked for
    good."""
    cosines = expert_similarity(layer).abs()
    acts = layer.expert_mask != 0
    return cosines.where(acts[:, None] & acts, torch.nan).fill_diagonal_(torch.nan)


@torch.no_grad()
def importance(layer: MLAELinear) -> tuple[Tensor, Tensor]:
    """|lambda| and |lambda| |a| |b| of each expert (rank,); nan for those masked for good."""
    size = layer.lora_lambda.abs().where(layer.expert_mask != 0, torch.nan)
    lengths = layer.lora_A.norm(dim=1) * layer.lora_B.norm(dim=0)
    return size, size * lengths


def draw_experts(runs: list[Run]):
    """For each run the |cosine| of every two experts of each layer, with the mean over pairs;
    |lambda|; and the experts' importance |lambda| |a| |b|, as layers x experts.

    Every run has the same colours for the same values.
    """
    cosines, sizes, weights, lines = [], [], [], []
    for run in runs:
        layers = run.experts.values()
        cosines.append([similarity(layer).cpu() for layer in layers])
        both = [importance(layer) for layer in layers]
        sizes.append(torch.stack([size for size, _ in both]).cpu())  # (layers, rank)
        weights.append(torch.stack([weight for _, weight in both]).cpu())
        lines.append(math.ceil(len(layers) / SHOWN))
    tops = []  # the highest value of each kind of map
    for maps in (sum(cosines, []), sizes, weights):
        tops.append(max(one.nan_to_num(0.0).max().item() for one in maps))
    figure = start().figure(figsize=(PAGE, 0.5 + 1.4 * sum(lines)), layout="constrained")
    heights = [*lines, 0.4]
    *parts, foot = figure.subfigures(len(heights), 1, height_ratios=heights)
    for part, run, *values in zip(parts, runs, cosines, sizes, weights, strict=True):
        shown = draw_run(part, run, values, tops)
    bar = figure.colorbar(shown, cax=foot.add_axes((0.1, 0.7, 0.4, 0.25)), orientation="horizontal")
    bar.ax.tick_params(labelsize=7)
    bar.set_label("|cosine| of two experts (above each map the mean of all pairs)", fontsize=7)
    return figure


def draw_run(part, run: Run, values: list, tops: list[float]):
    """One run of `draw_experts`: maps of similarity in rows, of which it returns one; then lambda
    and importance."""
    cosines, *others = values
    part.suptitle(fold(run.name, 90), fontsize=8, fontweight="bold")
    rows, widths = math.ceil(len(cosines) / SHOWN), [1] * SHOWN + [2, 2]
    grid = part.add_gridspec(rows, SHOWN + 2, width_ratios=widths)
    for number, (name, cosine) in enumerate(zip(run.experts, cosines, strict=True)):
        axis = part.add_subplot(grid[number // SHOWN, number % SHOWN])
        similar = heat(axis, cosine, tops[0])
        axis.set(xticks=[], yticks=[], box_aspect=1)
        mean = f"{cosine.nanmean():.3f}" if cosine.isfinite().any() else "one expert"
        axis.set_title(f"{name}\n{mean}", fontsize=7)
    words = ["|λ|, layers × experts", "importance |λ| |a| |b|"]
    for column, (word, value, top) in enumerate(zip(words, others, tops[1:], strict=True)):
        axis = part.add_subplot(grid[:, SHOWN + column])
        shown = heat(axis, value, top)
        axis.set_title(word, fontsize=7)
        axis.set_yticks([])
        if column == 0:
            axis.set_yticks(range(len(cosines)), list(run.experts), fontsize=6)
        part.colorbar(shown, ax=axis).ax.tick_params(labelsize=7)
    return similar


def draw_masks(runs: list[Run]):
    """For each run the fixed masks, layers x experts; the keep rate of each layer, over the epochs
    if it changes; or both."""
    panels = []
    for run in runs:
        fixed, rates = run.masks
        if (fixed == 0).any():
            panels.append((run, figures.draw_fixed, fixed))
        if (rates < 1).any():
            changes = (rates != rates[:, :1]).any()
            panels.append((run, figures.draw_schedule if changes else figures.draw_rates, rates))
    figure, axes = tile(len(panels), 2, (PAGE / 2, 2.7))
    for axis, (run, draw, values) in zip(axes, panels, strict=True):
        draw(axis, values)
        label_layers(axis, list(run.experts))
        axis.set_title(fold(run.name, 50), fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
    return figure


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
    last, seen = blocks[-1], []
    hook = last.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fused, last.fused_attn = last.fused_attn, False  # torch's fused kernel never has it whole
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
    return patches.unflatten(1, (math.isqrt(patches.shape[1]), -1)).float().cpu()


def draw_attention(runs: list[Run]):
    """A column for each test image: the image; the share of the class token's attention that each
    patch has in the backbone before it was adapted; and the same in each run."""
    first = runs[0].attention
    lines = {"before": (first.before, None)}
    for run in runs:
        found = run.attention
        if not torch.equal(found.images, first.images) or not found.before.equal(first.before):
            raise NoPicture(f"{run.name} has other images or another backbone: name one run")
        lines[run.name] = found.after, found.answers
    top = max(shares.max().item() for shares, _ in lines.values())
    size = PAGE / len(first.names), 1.15
    figure, axes = new_figure(1 + len(lines), len(first.names), size)
    for axis, name in zip(axes[:, 0], ["image", *lines], strict=True):
        axis.set_ylabel(fold(name), fontsize=7)
    for axis, image, name in zip(axes[0], first.images, first.names, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(fold(name), fontsize=7)
    for line, (shares, answers) in zip(axes[1:], lines.values(), strict=True):
        for column, axis in enumerate(line):
            shown = heat(axis, shares[column], top)
            axis.set_aspect("equal")
            if answers:
                axis.set_xlabel(fold(f"says {answers[column]}"), fontsize=7)
    for axis in axes.flat:
        axis.grid(False)
        axis.set(xticks=[], yticks=[])
    add_bar(figure, shown, axes[1:], "share of the class token's attention")
    return figure


def confusion(run: Run) -> Tensor:
    """How many images of each class (rows) the model takes for each (columns)."""
    answers, labels = run.answers
    count = len(run.classes)
    return torch.bincount(labels * count + answers, minlength=count**2).view(count, count)


def draw_confusion(runs: list[Run]):
    """Counts of right class against the model's, coloured by the share of the right class's
    images; of many classes, those with most mistakes."""
    figure, axes = tile(len(runs), 2, (PAGE / 2, 3.6))
    if len(runs) == 1:
        figure.set_size_inches(4.6, 4.4)
    for axis, run in zip(axes, runs, strict=True):
        counts = confusion(run)
        wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diag()  # (classes,)
        chosen = wrong.argsort(descending=True, stable=True)[:NAMED].sort().values
        names = [run.classes[i] for i in chosen]
        share = counts / counts.sum(1, keepdim=True).clamp_min(1)
        shown = figures.draw_counts(
            axis, counts[chosen][:, chosen], share[chosen][:, chosen], names
        )
        top1 = 100 * counts.diag().sum() / counts.sum()
        words = fold(f"{run.name}: {top1:.2f} % of {counts.sum()}", 44)
        if len(names) < len(counts):
            words += f"\nthe {len(names)} most confused of {len(counts)} classes"
        axis.set_title(words, fontsize=8)
    add_bar(figure, shown, axes, "share of the right class's images")
    return figure
