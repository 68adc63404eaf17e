"""Pictures of what lies inside trained models: experts, masks, attention and mistakes.

    runs = [Run(Path("runs/digits/mlae-..."), "mlae")]
    save(draw_experts(runs), Path("experts.png"))

Each takes one run or several, shows them beside or above each other, and returns a figure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from figures import MOST, PAGE, add_bar, fold, heat, label_layers, new_figure, start, tile
from inside import NoPicture, Run, magnitudes, similarity

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
