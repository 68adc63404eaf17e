"""Pictures of one run or of many.

    python plot.py runs/digits/mlae-vit_nano-seed0-...       # every picture of it, into its folder
    python plot.py A B --only experts --out experts.png      # one file; without --only: the curves
    python plot.py --sweep mask-prob runs                    # accuracy over a setting of a suite
    python plot.py --sweep lr results/real.csv --out docs    # the same from a table of runs

curves: loss, training accuracy and the experts' similarity over the epochs. experts: their
similarity in each layer, lambda and importance. masks: what is masked. attention: what the class
token looks at, before and after training. confusion: which classes are taken for which. Runs that
differ in the seed alone are one line with a band in curves; other pictures show the first of them.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import re
import sys
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill

import pandas
import scipy.stats
import torch
from matplotlib import pyplot
from timm.utils import AttentionExtract
from torch import Tensor, nn

import data
import eval as scoring
import runs
from methods import METHODS, adapters
from mlae import expert_similarity
from model import architecture, create_backbone
from runs import RunError
from splits import Missing, printable
from suite import label, natural, read_runs

FORMATS = ["png", "pdf", "svg"]
LOOKS = ["o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:", "h-"]  # told apart in grey too
PAGE = 7.2  # inches: the width of a page's text
STYLE = {"font.size": 8, "figure.titlesize": 8, "axes.titlesize": 8, "legend.fontsize": 7}
STYLE |= {"xtick.labelsize": 7, "ytick.labelsize": 7, "legend.title_fontsize": 7}
STYLE |= {"figure.constrained_layout.use": True, "text.parse_math": False}  # a class may be $5
# the first that is installed and has a letter draws it
STYLE["font.family"] = ["DejaVu Sans", "Noto Sans CJK SC", "Arial Unicode MS", "PingFang SC"]
MOST = 15  # classes of a confusion matrix; of more, the most confused
NO_SETTINGS = ("seed", "val", "dataset", "checkpoint")  # do not tell the lines of a sweep apart
LOGARITHMIC = ("lr", "rank", "batch_size", "weight_decay", "lambda_lr")  # settings for a log axis

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # one is not installed
warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a class's name: a box is drawn
pyplot.switch_backend("Agg")
pyplot.style.use(["tableau-colorblind10", STYLE])


def tile(count: int, size: tuple[float, float], columns: int = 2):
    """(figure, `count` axes), each of that size in inches, at most so many in a row."""
    rows, columns = math.ceil(count / columns), min(count, columns)
    inches = size[0] * columns, size[1] * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=inches, squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def heat(axis, values: Tensor, highest: float = 1.0):
    """A map of values (rows, columns) from 0 to the highest; hatched where there is none (nan)."""
    axis.patch.set(facecolor="white", hatch="/////", edgecolor="0.7")
    axis.tick_params(length=2)
    axis.xaxis.get_major_locator().set_params(integer=True)
    looks = {"cmap": "cividis", "vmin": 0, "vmax": highest or 1.0}  # for the colour blind, in grey
    return axis.imshow(values.numpy(), aspect="auto", **looks)


# --- what a run shows -----------------------------------------------------------------------------
class NoPicture(RunError):
    """A run that cannot have such a picture."""


@dataclass
class Run:
    """A configuration, and what each of PICTURES shows of it. Of the folders, one for each seed,
    the first is looked into; `data_dir` and `checkpoint` say where these are now."""

    name: str
    folders: list[Path]
    device: str | torch.device = "cpu"
    data_dir: str | None = None
    checkpoint: str | None = None

    @cached_property
    def trained(self) -> tuple[nn.Module, dict]:
        """The model on the device, and config.json."""
        with scoring.offline():
            model, config = scoring.load_run(self.folders[0], self.checkpoint)
        scoring.point_to(config, self.data_dir)
        return model.to(self.device), config

    @cached_property
    def images(self) -> data.Images:
        """What the run was scored on: the test images, or val200."""
        config = self.trained[1]
        own = Path(config["arguments"].dataset)  # a folder of one's own, or the name of a task
        if own.is_absolute() and not own.is_dir():
            raise RunError(f"there is no folder {own}: --data-dir says where the images are now")
        return scoring.scored_images(self.folders[0], config)

    def layers(self) -> tuple[list[str], list[nn.Module]]:
        """The layers whose experts have a lambda of their own; their names are short, as 0.qkv."""
        every = adapters(self.trained[0]).items()
        layers = {path: layer for path, layer in every if hasattr(layer, "lora_lambda")}
        if not layers:
            raise NoPicture(f"{self.name} has no experts with a lambda")
        if len({layer.rank for layer in layers.values()}) > 1:
            raise NoPicture(f"{self.name} was pruned to layers of different ranks")
        names = [re.sub(r"[^\W\d]\w*\.", "", path) for path in layers]  # of parents the numbers
        return names, list(layers.values())

    def curves(self) -> pandas.DataFrame:
        """The logs of all seeds, one below the other; RunError for a damaged log."""
        files = [folder / "log.csv" for folder in self.folders]
        for file in files:
            if not file.exists():
                raise NoPicture(f"there is no file {file}")
        logs = [pandas.DataFrame(runs.read_log(file)) for file in files]
        if len({len(log) for log in logs}) > 1:
            raise RunError(f"the seeds of {self.name} have different numbers of epochs")
        return pandas.concat(logs, keys=range(len(logs)))

    @torch.no_grad()
    def experts(self) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """The names of the layers, the |cosine| of every two experts (layers, rank, rank), |lambda|
        and importance (layers, rank), on the CPU. nan where an expert is masked for good."""
        names, layers = self.layers()
        masked = torch.stack([layer.expert_mask == 0 for layer in layers])
        cosines = torch.stack([expert_similarity(layer).abs() for layer in layers])
        cosines = cosines.masked_fill(masked[:, None] | masked[..., None], torch.nan)
        cosines.diagonal(dim1=1, dim2=2).fill_(torch.nan)
        sizes = torch.stack([layer.lora_lambda.abs() for layer in layers])
        importances = torch.stack([scoring.importance(layer) for layer in layers])
        tables = [table.masked_fill(masked, torch.nan).cpu() for table in (sizes, importances)]
        return names, cosines.cpu(), *tables

    def masks(self) -> tuple[list[str], Tensor, Tensor]:
        """The names of the layers, the fixed masks (layers, rank), and the share of the experts
        that a step keeps (layers, epochs) as each epoch ends."""
        names, layers = self.layers()
        model, config = self.trained
        args = config["arguments"]
        fixed = torch.stack([layer.expert_mask for layer in layers]).cpu()
        rates = torch.ones(len(layers), args.epochs)
        for epoch in range(args.epochs):
            METHODS[args.method].before_step(model, (epoch + 1) / args.epochs)
            rates[:, epoch] -= torch.tensor([layer.mask_prob for layer in layers])
        if fixed.all() and (rates == 1).all():
            raise NoPicture(f"{self.name} masks no expert")
        return names, fixed, rates

    @torch.no_grad()
    def attention(self) -> tuple[Tensor, list[str], Tensor, Tensor, list[str]]:
        """The first image of some classes (N, 3, S, S), the names of these, `class_attention` to
        their patches before and after (N, side, side), and the classes that the model says."""
        model, config = self.trained
        args = config["arguments"]
        if args.no_pretrained:
            raise NoPicture(f"{self.name} had no pre-trained backbone to compare with")
        options = {"checkpoint": args.checkpoint, "img_size": args.img_size}
        with scoring.offline():
            base = create_backbone(args.model, model.num_classes, **options).to(self.device)
        right = self.images.labels.tolist()
        labels = sorted(set(right))[:6]
        images = torch.stack([self.images[right.index(label)][0] for label in labels])
        x = data.create_normalizer(args, model)(images)
        before, after = class_attention(base, x), class_attention(model, x)
        if torch.equal(before, after):
            raise NoPicture(f"{self.name} leaves the backbone's attention as it is")
        names = scoring.class_names(config, model.num_classes)
        answers = [names[label] for label in model(x).argmax(1)]
        return images, [names[label] for label in labels], before, after, answers

    def confusion(self) -> tuple[list[str], Tensor]:
        """The names of the classes, and how many images of each (rows) are taken for which."""
        model, config = self.trained
        normalize = data.create_normalizer(config["arguments"], model)
        logits, labels = scoring.predict(model, self.images, normalize, config["amp"])
        classes = scoring.class_names(config, model.num_classes)
        return classes, scoring.confusion(logits.argmax(1), labels, len(classes))


def group(folders: list[Path], *places) -> list[Run]:
    """A Run for each configuration; RunError for what is not a run."""
    members, arguments = {}, {}  # of each configuration; the folders by their seeds
    for folder in folders:
        config = scoring.read_config(folder)
        seed = config["identity"].pop("seed")
        key = json.dumps(config["identity"], sort_keys=True)
        members.setdefault(key, {})[seed] = folder
        extra = {name: config["identity"].get(name) for name in ("pruned", data.FOLDER)}
        arguments[key] = vars(config["arguments"]) | extra
    rivals, found = list(map(json.loads, members)), []
    for (key, seeds), given in zip(members.items(), rivals, strict=True):
        name = label(arguments[key], given, rivals)
        found.append(Run(name, [seeds[seed] for seed in sorted(seeds)], *places))
    return found


@torch.no_grad()
def class_attention(model: nn.Module, x: Tensor) -> Tensor:
    """How the class token of the last block shares its attention out to the patches, the mean over
    heads (B, side, side), on the CPU. x: (B, 3, S, S), normalised. NoPicture if timm cannot say."""
    if getattr(model, "cls_token", None) is None:
        raise NoPicture(f"{architecture(model)} has no class token")
    model = copy.deepcopy(model)  # the hooks stay on the copy
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch's fused kernel never has the attention whole
    try:
        *_, last = AttentionExtract(model, method="hook")(x).values()  # (B, heads, tokens, tokens)
    except (RuntimeError, ValueError):
        raise NoPicture(f"{architecture(model)} does not show its attention") from None
    patches = last[:, :, 0, getattr(model, "num_prefix_tokens", 1) :].mean(1)
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side)).float().cpu()


# --- pictures of {name of a run: what it shows} ---------------------------------------------------
def draw_curves(found: dict[str, pandas.DataFrame]):
    """Training loss and top-1, and the experts' similarity if it was logged, over the epochs: the
    mean of each configuration and its range over seeds."""
    panels = {"loss": "training loss", "train_top1": "training top-1 (%)"}
    if any("similarity" in log for log in found.values()):
        panels["similarity"] = "mean |cosine| of experts"
    columns = 1 if max(map(len, found)) > 45 else 2  # of the legend
    size = PAGE / len(panels), 2.5 + 0.17 * len(found) / columns
    figure, axes = tile(len(panels), size, columns=3)
    title = None
    for number, (name, log) in enumerate(found.items()):
        seeds, look = log.index.levshape[0], LOOKS[number % len(LOOKS)]
        if seeds > 1:
            name, title = f"{name} ({seeds} seeds)", "mean and range over seeds"
        by_epoch = log.reindex(columns=["epoch", *panels]).groupby("epoch")
        looks = {"markersize": 3, "linewidth": 1.2, "markevery": max(1, len(by_epoch) // 10)}
        for axis, column in zip(axes, panels, strict=True):
            epochs = by_epoch[column].agg(["mean", "min", "max"])  # nan if it was not logged
            axis.plot(epochs.index, epochs["mean"], look, label=name, **looks)
            axis.fill_between(epochs.index, epochs["min"], epochs["max"], alpha=0.2)
            axis.set(xlabel="epoch", ylabel=panels[column])
            axis.grid(True, alpha=0.3)
    figure.legend(handles=axes[0].lines, title=title, loc="outside lower center", ncols=columns)
    return figure


def draw_experts(found: dict[str, tuple]):
    """For each run the |cosine| of every two experts of each layer, with the mean over pairs;
    |lambda|; and importance |lambda| |a| |b|, as layers x experts. Runs have the same colours."""
    heights = [math.ceil(len(names) / 6) for names, *_ in found.values()]  # six maps in a row
    figure = pyplot.figure(figsize=(PAGE, 0.5 + 1.4 * sum(heights)))
    *parts, foot = figure.subfigures(len(found) + 1, 1, height_ratios=[*heights, 0.4])
    _, *kinds = zip(*found.values(), strict=True)
    tops = [torch.cat([values.flatten() for values in maps]).nan_to_num().max() for maps in kinds]
    for part, height, name in zip(parts, heights, found, strict=True):
        layers, cosines, sizes, importances = found[name]
        part.suptitle(fill(name, 90), fontweight="bold")
        grid = part.add_gridspec(height, 8, width_ratios=[1] * 6 + [2, 2])
        for number, (layer, cosine) in enumerate(zip(layers, cosines, strict=True)):
            axis = part.add_subplot(grid[divmod(number, 6)])
            image = heat(axis, cosine, tops[0])
            axis.set(xticks=[], yticks=[], box_aspect=1)
            mean = "one expert" if cosine.isnan().all() else f"{cosine.nanmean():.3f}"
            axis.set_title(f"{layer}\n{mean}", fontsize=7)
        tables = ("|λ|, layers × experts", sizes), ("importance |λ| |a| |b|", importances)
        for column, (title, table) in enumerate(tables, 1):
            axis = part.add_subplot(grid[:, 5 + column])
            part.colorbar(heat(axis, table, tops[column]), ax=axis)
            axis.set_title(title, fontsize=7)
            names = layers if column == 1 else []
            axis.set_yticks(range(len(names)), names, fontsize=6)
    bar = foot.add_axes((0.1, 0.7, 0.4, 0.25))
    bar = figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.set_label("|cosine| of two experts (above each map the mean of all pairs)")
    return figure


def draw_masks(found: dict[str, tuple]):
    """For each run the fixed masks, layers x experts; the keep rate of each layer, over the epochs
    if it changes; or both."""
    panels = []
    for name, (layers, fixed, rates) in found.items():
        if not fixed.all():
            words = f"kept {fixed.sum(1).mean():.1f} of {fixed.shape[1]} a layer"
            fixed[fixed == 0] = torch.nan
            panels.append((name, layers, fixed, f"expert (hatched: masked; {words})"))
        if (rates != rates[:, :1]).any():
            panels.append((name, layers, rates, "epoch"))
        elif (rates < 1).any():
            panels.append((name, layers, rates[:, :1], "share of the experts that a step keeps"))
    figure, axes = tile(len(panels), (PAGE / 2, 2.7))
    for axis, (name, layers, values, words) in zip(axes, panels, strict=True):
        count, columns = values.shape
        if columns > 1:
            image = heat(axis, values)
        else:
            bars = axis.barh(range(count), values[:, 0].tolist(), height=0.7)
            axis.bar_label(bars, fmt="%.2f", padding=3)
            axis.set(xlim=(0, 1.15), ylim=(count - 0.5, -0.5))
        if words == "epoch":
            image.set_extent((0.5, columns + 0.5, count - 0.5, -0.5))  # epochs count from 1
            aspect = 6 * figure.get_figheight()
            figure.colorbar(image, ax=[axis], aspect=aspect, label="share of the experts kept")
        step = math.ceil(count / 12)  # as many names as there is room for
        axis.set_yticks(range(0, count, step), layers[::step])
        axis.set(title=fill(name, 50), xlabel=words, ylabel="layer")
    return figure


def draw_attention(found: dict[str, tuple]):
    """A column for each test image: the image; the attention to its patches in the backbone before
    it was adapted; and in each run that has the images and the backbone of the first."""
    images, names, before, *_ = next(iter(found.values()))
    lines = {"before": (before, [""] * len(names))}
    for name, (its_images, _, its_before, after, answers) in found.items():
        if its_images.equal(images) and its_before.equal(before):
            lines[name] = after, [f"says {answer}" for answer in answers]
        else:
            words = f"{name} has other images or another backbone: name it alone"
            print(printable(f"left out of attention: {words}"), file=sys.stderr)
    top = max(shares.max().item() for shares, _ in lines.values())
    columns = len(names)
    figure, axes = tile(columns * (1 + len(lines)), (PAGE / columns, 1.15), columns)
    for axis, pixels, name in zip(axes, images, names, strict=False):
        axis.imshow(pixels.permute(1, 2, 0).numpy())  # (S, S, 3)
        axis.set_title(fill(name, 20), fontsize=7)
    for line, (shares, words) in enumerate(lines.values(), 1):
        for axis, share, answer in zip(axes[line * columns :], shares, words, strict=False):
            image = heat(axis, share, top)
            axis.set_aspect("equal")
            axis.set_xlabel(fill(answer, 20), fontsize=7)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[::columns], ["image", *lines], strict=True):
        axis.set_ylabel(fill(name, 20), fontsize=7)
    bar = figure.colorbar(image, ax=axes[columns:], aspect=6 * figure.get_figheight())
    bar.set_label("share of the class token's attention")
    return figure


def draw_confusion(found: dict[str, tuple]):
    """Counts of right class against the model's, coloured by the share of the right class's
    images; of many classes, those with most mistakes."""
    figure, axes = tile(len(found), (4.6, 4.4) if len(found) == 1 else (PAGE / 2, 3.6))
    for axis, (name, (classes, counts)) in zip(axes, found.items(), strict=True):
        right, images = counts.diag(), counts.sum(1)
        mistakes = counts.sum(0) + images - 2 * right  # (classes,)
        worst = mistakes.argsort(descending=True, stable=True)[:MOST].sort().values
        title = fill(f"{name}: {100 * right.sum() / images.sum():.2f} % of {images.sum()}", 44)
        if len(worst) < len(classes):
            title += f"\nthe {len(worst)} most confused of {len(classes)} classes"
        shares = (counts / images.clamp_min(1)[:, None])[worst][:, worst]
        counts = counts[worst][:, worst]
        image = heat(axis, shares)
        for row, column in counts.nonzero().tolist():
            looks = {"color": "black" if shares[row, column] > 0.5 else "white", "fontsize": 6}
            axis.text(column, row, counts[row, column].item(), ha="center", va="center", **looks)
        names = [classes[number] for number in worst]
        names = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(len(names)), names)
        axis.set(box_aspect=1, xlabel="the model says", ylabel="right", title=title)
    bar = figure.colorbar(image, ax=axes, aspect=6 * figure.get_figheight())
    bar.set_label("share of the right class's images")
    return figure


PICTURES = {"curves": draw_curves, "experts": draw_experts, "masks": draw_masks}
PICTURES |= {"attention": draw_attention, "confusion": draw_confusion}


# --- accuracy over a setting ----------------------------------------------------------------------
def read_sweep(found: pandas.DataFrame, setting: str) -> dict[tuple, pandas.DataFrame]:
    """{(task, split): its rows of suite.read_runs, with their `line` and `value` of the setting}.
    A line is a configuration without the setting, and without what goes with it, as a learning rate
    chosen for each value; None is the value if its method has no such setting. RunError if nowhere
    a line has two values."""
    if setting == "method":
        raise RunError("--sweep method: each method is a line already; name one of its settings")
    sweeps = {}
    for panel, members in found.groupby(["task", "split"]):
        rows, values, rivals = members.to_dict("records"), pandas.DataFrame(), []
        names = dict.fromkeys([setting, *itertools.chain(*members["identity"])])
        for name in names:
            values[name] = [repr(value_of(row, name)) for row in rows]
        # what tells lines apart: the method, the model, and what the rest does not decide
        apart = [name for name in names if name not in (setting, *NO_SETTINGS)]
        for name in apart.copy():
            rest = [other for other in apart if other != name]
            choices = values.groupby([setting, *rest])[name].nunique()
            if choices.max() == 1 and name not in ("method", "model"):
                apart = rest
        for own in members["identity"]:
            rivals.append({name: own[name] for name in apart if name in own})
        lines = [label(row, own, rivals) for row, own in zip(rows, rivals, strict=True)]
        own = [value_of(row, setting) for row in rows]
        members = members.assign(line=lines, value=own, top1=members["top1"].astype(float))
        members = members.drop_duplicates(["line", "value", "seed"], keep="last")
        if (members.groupby("line")["value"].nunique(dropna=False) > 1).any():
            sweeps[panel] = members
    if not sweeps:
        names = sorted(set().union(*found["identity"]).difference(NO_SETTINGS))
        problem = "no run was repeated with another value; their settings"
        raise RunError(f"--sweep {setting}: {problem}: {', '.join(names)}")
    return sweeps


def value_of(run: dict, setting: str):
    """The value of a setting, a list as text; None if the run's method has none."""
    value = run.get(setting)
    if value is None:  # the run is older than the setting
        value = METHODS[run["method"]].settings.get(setting)
    return runs.shown(value) if isinstance(value, list | dict) else value


def draw_sweep(sweeps: dict[tuple, pandas.DataFrame], setting: str):
    """Top-1 over the setting, a plot for each task and split: the mean of the seeds and its 95 %
    interval, and for methods without the setting a level line."""
    most = max(members["line"].nunique() for members in sweeps.values())
    width = 5.0 if len(sweeps) == 1 else PAGE / 2
    figure, axes = tile(len(sweeps), (width, 2.8 + 0.17 * most))
    for axis, ((task, split), members) in zip(axes, sweeps.items(), strict=True):
        values = members["value"].dropna().unique().tolist()
        numeric = all(isinstance(value, int | float) for value in values)
        values.sort(key=None if numeric else str)
        places = values if numeric else list(range(len(values)))
        if numeric and setting in LOGARITHMIC and values[0] > 0:
            places = list(map(math.log, values))
        axis.set_xticks(places, map("{:g}".format if numeric else str, values))
        scores = members.groupby(["line", "value"], dropna=False)["top1"]
        points = scores.agg(["mean", "sem", "size"]).reset_index("value")
        points["half"] = points["sem"] * scipy.stats.t.ppf(0.975, points["size"] - 1)
        points = points.fillna({"half": 0})  # of one seed
        lines = sorted(points.groupby("line"), key=lambda line: natural(line[0]))
        for number, (name, own) in enumerate(lines):
            fewest, n = own["size"].min(), own["size"].max()
            words = fill(f"{name} (n = {n if fewest == n else f'{fewest} to {n}'})", 60)
            # beside each other: bars would hide bars
            shift = min(0.012, 0.04 / len(lines)) * (number - (len(lines) - 1) / 2)
            shift *= places[-1] - places[0]
            level, own = own[own["value"].isna()], own[own["value"].notna()]
            x = [places[values.index(value)] + shift for value in own["value"]]
            looks = {"fmt": LOOKS[number % len(LOOKS)], "markersize": 4, "capsize": 2.5}
            line, *_ = axis.errorbar(x, own["mean"], own["half"], label=words, **looks)
            for mean, room in zip(level["mean"], level["half"], strict=True):
                axis.axhline(mean, color=line.get_color(), linestyle=line.get_linestyle())
                axis.axhspan(mean - room, mean + room, color=line.get_color(), alpha=0.15)
        bars = ", mean and 95 % interval" if points["half"].any() else ""
        axis.set(title=task, xlabel=setting, ylabel=f"{split} top-1 (%){bars}")
        # wide intervals of few seeds leave the plot
        means, half = points["mean"], points["half"]
        room = max(1.0, means.max() - means.min())
        bottom = max(0, means.min() - room, (means - half).min())
        top = min(100, means.max() + room, (means + half).max())
        axis.set_ylim(bottom - 0.05 * room, top + 0.05 * room)
        axis.grid(True, alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure


# --- the command ----------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = runs.new_parser("plot.py", __doc__)
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, help="folders of runs; for --sweep also csv files of runs")
    words = f"which pictures: {', '.join(PICTURES)} (default: all)"
    flag("--only", nargs="+", choices=PICTURES, metavar="KIND", help=words)
    flag("--out", type=Path, help="folder, or file of one picture (default: that of the first run)")
    flag("--format", choices=FORMATS, help="format (default: png, or the ending of --out)")
    flag("--sweep", metavar="SETTING", help="draw accuracy over it, for example mask-prob or lr")
    flag("--data-dir", help="where the data are now (default: where they were in training)")
    flag("--checkpoint", help="where the backbone's file is now (default: where it was)")
    flag("--device", choices=runs.DEVICES, default="auto", help="default: auto, the fastest here")
    args = parser.parse_args(argv)
    with runs.one_line("plot.py"):
        # --- what to draw ---
        is_file = args.out and args.out.suffix[1:] in FORMATS and not args.out.is_dir()
        if args.sweep:
            setting = args.sweep.lstrip("-").replace("-", "_")
            setting = runs.RENAMED.get(setting, setting)
            table, members = read_runs(*args.runs), []
            if table.empty:
                raise RunError(f"--sweep: no finished run in {' '.join(map(str, args.runs))}")
            sweeps, kinds = read_sweep(table, setting), [f"sweep-{setting}"]
        else:
            device = runs.pick_device(args.device)
            members = group(args.runs, device, args.data_dir, args.checkpoint)
            kinds = args.only or (["curves"] if is_file else list(PICTURES))

        # --- where to ---
        place = args.out or args.runs[0]
        if not is_file:
            place = place if args.out or place.is_dir() else place.parent  # of a table of runs
            place.mkdir(parents=True, exist_ok=True)
        elif len(kinds) > 1 or args.format not in (None, place.suffix[1:]):
            raise RunError(f"--out {place}: a file is one picture: use --only, leave --format out")

        for kind in kinds:
            found = {}  # what each run shows
            for run in members:
                try:
                    found[run.name] = getattr(run, kind)()
                except (NoPicture, Missing) as error:
                    if args.only:
                        raise
                    print(printable(f"left out of {kind}: {error}"), file=sys.stderr)
            if not found and not args.sweep:
                continue
            figure = draw_sweep(sweeps, setting) if args.sweep else PICTURES[kind](found)
            file = place if is_file else place / f"{kind}.{args.format or 'png'}"
            with runs.write_atomically(file) as draft:
                figure.savefig(draft, format=file.suffix[1:], dpi=150)
            pyplot.close(figure)
            print(file)


if __name__ == "__main__":
    main()
