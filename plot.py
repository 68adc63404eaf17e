"""Pictures of one run or of many.

    python plot.py runs/digits/mlae-vit_nano-seed0-...      # its loss and accuracy over the epochs
    python plot.py runs/digits/* --out curves.png           # several: mean and range over seeds
    python plot.py --method-picture method.png              # what masking does, as in README

Runs that differ in nothing but the seed are one line with a band. `bench.py --plot` draws its
sweeps with `draw_sweeps`.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import statistics
from pathlib import Path

from flags import Parser
from runs import RunError, one_line

FORMATS = (".png", ".pdf", ".svg")
LOOKS = ["o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:", "h-"]  # told apart in grey too


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    """(figure, axes (rows, columns)); RunError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("drawing needs matplotlib: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use("tableau-colorblind10")
    width, height = size
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    return figure, axes


def check_file(path: Path) -> None:
    """Raise RunError for a file that cannot be drawn into."""
    if path.suffix not in FORMATS or not path.absolute().parent.is_dir():
        raise RunError(f"{path}: expected a {', '.join(FORMATS)} file in a folder that exists")


def draw_sweeps(sweeps: list[tuple], path: Path) -> None:
    """A column of plots for each of bench.py's sweeps: time of a step, and peak memory.

    sweeps: [(flag, [(value, rows of one measurement), ...]), ...]. Time is over the floor's if that
    was measured. Raises RunError for a bad file, before anything is drawn.
    """
    check_file(path)
    figure, axes = new_figure(2, max(1, len(sweeps)), (3.2, 2.75))
    if not sweeps:  # only asked whether it could be done
        return
    for column, (name, points) in enumerate(sweeps):
        upper = axes[0, column]
        lower = axes[1, column]
        labels = []
        lines = {}
        for value, rows in points:
            labels.append(value.replace(",", "\n").replace("_", "\n"))
            for row in rows:
                if not row["method"].startswith("eval "):
                    lines.setdefault(row["method"], []).append(row)
        over_floor = "over floor" in rows[0]
        for look, (method, rows) in zip(LOOKS, lines.items(), strict=False):
            times = [row["seconds"] for row in rows]
            if over_floor:
                times = [row["over floor"][1] for row in rows]
            memory = [row["memory_mb"] for row in rows]
            upper.plot(labels, times, look, label=method)
            if all(memory):
                lower.plot(labels, memory, look)
        upper.set(ylabel="time over floor" if over_floor else "seconds a step")
        upper.margins(0.08)
        lower.set(xlabel=f"--{name}", ylabel="peak memory, MiB")
        lower.margins(0.08)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def read_curves(folders: list[Path]) -> dict[str, list[tuple]]:
    """{configuration: [(loss, training top-1) over the epochs, a pair for each seed]} of runs.

    Raises RunError for what is not a run.
    """
    curves: dict[str, list[tuple]] = {}
    for folder in folders:
        try:
            own = json.loads((folder / "config.json").read_text())["identity"]
            with open(folder / "log.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            loss = [float(row["loss"]) for row in rows]
            top1 = [float(row["train_top1"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder} is not a run of train.py: {error}") from None
        words = [own["method"], own["dataset"]]
        for name, value in own.items():
            if name not in ("seed", "method", "dataset", "model", "epochs"):
                words.append(f"{name}={value}")
        curves.setdefault(" ".join(words), []).append((loss, top1))
    return curves


def draw_curves(curves: dict[str, list[tuple]], path: Path) -> None:
    """Training loss and top-1 over the epochs: the mean of each configuration and its range."""
    figure, axes = new_figure(1, 2, (4, 3))
    for look, (name, runs) in zip(itertools.cycle(LOOKS), curves.items(), strict=False):
        epochs = range(1, len(runs[0][0]) + 1)
        for axis, series in zip(axes[0], zip(*runs, strict=True), strict=True):
            by_epoch = list(zip(*series, strict=True))
            mean = [statistics.mean(values) for values in by_epoch]
            low = [min(values) for values in by_epoch]
            high = [max(values) for values in by_epoch]
            axis.plot(epochs, mean, look, markersize=3, label=f"{name} (n = {len(runs)})")
            axis.fill_between(epochs, low, high, alpha=0.2)
    axes[0, 0].set(xlabel="epoch", ylabel="training loss")
    axes[0, 1].set(xlabel="epoch", ylabel="training top-1 (%)")
    axes[0, 1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_method(path: Path) -> None:
    """What masking does: a frozen weight and six experts at two steps, in scoring and merged."""
    figure, axes = new_figure(1, 1, (7.2, 3.7))
    axis = axes[0, 0]
    axis.set(xlim=(-2.6, 9.4), ylim=(-5.6, 1.6), aspect="equal")
    axis.axis("off")
    rows = [
        ("a training step", [1, 0, 1, 1, 0, 0], "kept: times 1 / (1 - p)"),
        ("the next step", [0, 1, 1, 0, 1, 0], "another mask"),
        ("scoring", [1] * 6, "all experts, as they are"),
    ]
    for line, (name, mask, note) in enumerate(rows):
        y = -1.75 * line
        axis.text(-2.5, y + 0.5, name, va="center", fontsize=9)
        draw_matrix(axis, 0, y, "0.6", "W")
        for i, kept in enumerate(mask):
            x = 1.3 * (i + 1)
            axis.text(x - 0.17, y + 0.5, "+", ha="center", va="center", fontsize=9)
            draw_expert(axis, x, y, i + 1, kept)
        axis.text(9.15, y - 0.28, note, ha="right", fontsize=8, color="0.3")
    draw_matrix(axis, 0, -5.5, "C0", "W'", height=0.9)
    axis.text(-2.5, -5.05, "merged", va="center", fontsize=9)
    words = "one plain linear layer: W' = W + Σ λᵢ bᵢ aᵢ, nothing left to pay"
    axis.text(1.25, -5.05, words, va="center", fontsize=9)
    axis.text(0.5, 1.2, "frozen", ha="center", fontsize=8)
    axis.text(5.0, 1.2, "rank-1 experts  λᵢ bᵢ aᵢ", ha="center", fontsize=8)
    figure.savefig(path, dpi=120)


def draw_matrix(axis, x: float, y: float, color: str, name: str, height: float = 1) -> None:
    """A square with a name in it."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), 1, height, color=color, alpha=0.5))
    axis.text(x + 0.5, y + height / 2, name, ha="center", va="center", fontsize=10)


def draw_expert(axis, x: float, y: float, number: int, kept: int) -> None:
    """An expert as the outer product of a column b and a row a, crossed out if it is masked."""
    from matplotlib.patches import Rectangle

    strong, weak = ("C1", 0.25) if kept else ("0.75", 0.0)
    axis.add_patch(Rectangle((x, y), 0.14, 0.8, color=strong))  # b
    axis.add_patch(Rectangle((x + 0.2, y + 0.86), 0.8, 0.14, color=strong))  # a
    edge = {"edgecolor": strong, "linestyle": "-" if kept else ":"}
    axis.add_patch(Rectangle((x + 0.2, y), 0.8, 0.8, facecolor=(1, 0.5, 0, weak), **edge))
    text = f"λ{'₁₂₃₄₅₆'[number - 1]}" if kept else "×"
    color = "black" if kept else "0.5"
    axis.text(x + 0.6, y + 0.4, text, ha="center", va="center", fontsize=9, color=color)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument(
        "--method-picture", type=Path, metavar="FILE", help="draw what masking does"
    )
    parser.add_argument("--out", type=Path, help="the file (default: curves.png in the first run)")
    args = parser.parse_args(argv)
    with one_line("plot.py"):
        if args.method_picture:
            check_file(args.method_picture)
            draw_method(args.method_picture)
            return
        if not args.runs:
            raise RunError("name the folder of a run, or several")
        path = args.out or args.runs[0] / "curves.png"
        check_file(path)
        draw_curves(read_curves(args.runs), path)
        print(path)


if __name__ == "__main__":
    main()
