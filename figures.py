"""Figures: how every picture is made and written, and the two that need no run.

    figure, axes = new_figure(1, 2, (3.5, 2.5))      # inches of one plot; matplotlib, or one line
    save(figure, Path("curves.svg"))

Colours are told apart by the colour blind, and lines in grey too. `bench.py --plot` draws its
sweeps with `draw_sweeps`; README's picture of the method is `draw_method`.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
from itertools import cycle
from pathlib import Path

from torch import Tensor

from files import RunError, whole

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
    with whole(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=dpi)
    start().close(figure)


def draw_sweeps(sweeps: list[tuple], path: Path) -> None:
    """A column of plots for each of bench.py's sweeps: time of a step, and peak memory.

    sweeps: [(flag, [(value, rows of one measurement), ...]), ...]. Time is over the floor's if that
    was measured; where no memory was measured there is no such plot. Raises RunError for a bad
    file, before anything is drawn.
    """
    check_picture(path)
    measured = []
    for _, points in sweeps:
        for _, rows in points:
            measured += rows
    with_memory = any(row["memory_mb"] for row in measured)
    over_floor = any("over floor" in row for row in measured)
    figure, axes = new_figure(1 + with_memory, len(sweeps), (3.2, 2.75))
    for column, (name, points) in enumerate(sweeps):
        labels = []
        lines = {}
        for value, rows in points:
            labels.append(value.replace(",", "\n").replace("_", "\n"))
            for row in rows:
                if not row["method"].startswith("eval "):
                    lines.setdefault(row["method"], []).append(row)
        for look, (method, rows) in zip(cycle(LOOKS), lines.items(), strict=False):
            times = [row["seconds"] for row in rows]
            if over_floor:
                times = [row["over floor"][1] for row in rows]
            # see-through, so that a line on top of another hides nothing; whole at the border
            looks = {"alpha": 0.7, "clip_on": False}
            looks["markersize"] = 5
            words = method
            if method == "floor":
                words = "floor: frozen backbone, head trained"
            axes[0, column].plot(labels, times, look, label=words, **looks)
            memory = [row["memory_mb"] for row in rows]
            if all(memory):
                axes[1, column].plot(labels, memory, look, **looks)
        axes[0, column].set(ylabel="time over floor" if over_floor else "seconds a step")
        if with_memory:
            axes[1, column].set(ylabel="peak memory, MiB")
        axes[-1, column].set(xlabel=f"--{name}")
    for axis in axes.flat:
        axis.margins(0.1)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside upper center", ncols=3)
    save(figure, path, dpi=80)


def draw_method(path: Path) -> None:
    """What masking does: a frozen weight and six experts at two steps, in scoring and merged."""
    check_picture(path)
    figure, axes = new_figure(1, 1, (7.2, 3.7))
    axis = axes[0, 0]
    axis.set(xlim=(-2.6, 9.4), ylim=(-5.6, 1.6))
    axis.set_aspect("equal")
    axis.axis("off")
    lines = {  # the words before a line, and which experts act
        "a training step": "101100",
        "the next step": "011010",
        "scoring": "111111",
    }
    notes = ["what is kept is scaled by 1 / (1 - p)", "another mask", "all experts, as they are"]
    y = 0.0
    for (words, mask), note in zip(lines.items(), notes, strict=True):
        middle = y + 0.5
        write(axis, -2.5, middle, words, align="left")
        weight = (0, y, 1, 1)
        draw_box(axis, weight, "0.6", "W")
        for i, kept in enumerate(mask):
            x = 1.3 * (i + 1)
            write(axis, x - 0.17, middle, "+")
            name = "λ" + "₁₂₃₄₅₆"[i]
            draw_expert(axis, x, y, name, kept == "1")
        write(axis, 9.15, y - 0.2, note, align="right")
        y -= 1.75
    write(axis, 0.5, 1.3, "frozen")
    write(axis, 5.0, 1.3, "rank-1 experts  λᵢ bᵢ aᵢ")
    y -= 0.1
    middle = y + 0.5
    write(axis, -2.5, middle, "merged", align="left")
    merged = (0, y, 1, 1)
    draw_box(axis, merged, "C0", "W'")
    words = "one plain linear layer: W' = W + Σ λᵢ bᵢ aᵢ, at no extra cost"
    write(axis, 1.25, middle, words, align="left")
    save(figure, path, dpi=120)


def write(axis, x: float, y: float, words: str, align: str = "center") -> None:
    """Words at a place, in the middle of the line."""
    axis.text(x, y, words, ha=align, va="center", fontsize=8.5)


def draw_box(axis, box: tuple, color: str, words: str = "", **looks) -> None:
    """A rectangle (x, y, width, height) with words in it."""
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    looks = {"facecolor": color, "edgecolor": color, "alpha": 0.5} | looks
    axis.add_patch(Rectangle((x, y), width, height, **looks))
    write(axis, x + width / 2, y + height / 2, words)


def draw_expert(axis, x: float, y: float, name: str, kept: bool) -> None:
    """An expert as the product of a column b and a row a, crossed out if it is masked."""
    color = "C1" if kept else "0.75"
    column, row = (x, y, 0.14, 0.8), (x + 0.2, y + 0.86, 0.8, 0.14)
    draw_box(axis, column, color, alpha=1)
    draw_box(axis, row, color, alpha=1)
    product = (x + 0.2, y, 0.8, 0.8)
    if kept:
        draw_box(axis, product, color, name)
    else:
        draw_box(axis, product, color, "×", facecolor="none", linestyle=":")
