"""Pictures of one run or of many.

    python plot.py runs/digits/mlae-vit_nano-seed0-...      # its loss and accuracy over the epochs
    python plot.py runs/digits/* --out curves.png           # several: mean and range over seeds

Runs that differ in nothing but the seed are one line with a band. `bench.py --plot` draws its
sweeps with `draw_sweeps`.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from pathlib import Path

from files import RunError, read_json, read_log, whole
from runs import Parser, one_line

FORMATS = (".png", ".pdf", ".svg")
LOOKS = ["o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:", "h-"]  # told apart in grey too
CONFIG = {"identity": {"method": str, "dataset": str}}  # what config.json must hold


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
    is_free = path.is_file() or not path.exists()
    if path.suffix not in FORMATS or not is_free or not path.absolute().parent.is_dir():
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
    with whole(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=80)


def read_curves(folders: list[Path]) -> dict[str, list[tuple]]:
    """{configuration: [(loss, training top-1) over the epochs, a pair for each seed]} of runs.

    Raises RunError for what is not a run.
    """
    curves: dict[str, list[tuple]] = {}
    for folder in folders:
        try:
            own = read_json(folder / "config.json", CONFIG)["identity"]
            rows = read_log(folder / "log.csv")
        except RunError as error:
            raise RunError(f"{folder} is not a run of train.py: {error}") from None
        loss = [row["loss"] for row in rows]
        top1 = [row["train_top1"] for row in rows]
        words = [own["method"], own["dataset"]]
        for name, value in own.items():
            if name not in ("seed", "method", "dataset", "model", "epochs"):
                words.append(f"{name}={value}")
        seeds = curves.setdefault(" ".join(words), [])
        if seeds and len(rows) != len(seeds[0][0]):
            raise RunError(f"{folder} has {len(rows)} epochs, the run of another seed has not")
        seeds.append((loss, top1))
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
    with whole(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="the file (default: curves.png in the first run)")
    args = parser.parse_args(argv)
    with one_line(parser):
        path = args.out or args.runs[0] / "curves.png"
        check_file(path)
        draw_curves(read_curves(args.runs), path)
        print(path)


if __name__ == "__main__":
    main()
