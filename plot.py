"""Pictures of one run or of many.

    python plot.py runs/digits/mlae-vit_nano-seed0-...      # its loss and accuracy over the epochs
    python plot.py runs/digits/* --out curves.png           # several: mean and range over seeds
    python plot.py runs/digits/* --experts experts.png      # a line of heat maps for each run
    python plot.py --method-picture method.png              # what masking does, as in README

Runs that differ in nothing but the seed are one line with a band. `bench.py --plot` draws its
sweeps with `draw_sweeps`.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from pathlib import Path

import torch

from baselines import mlae_layers
from eval import load_run
from files import RunError, read_json, read_log, whole
from flags import Parser
from mlae import MLAELinear, expert_similarity
from runs import one_line

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
    was measured; where no memory was measured there is no such plot. Raises RunError for a bad
    file, before anything is drawn.
    """
    check_file(path)
    with_memory = has_memory(sweeps)
    figure, axes = new_figure(1 + with_memory, max(1, len(sweeps)), (3.2, 2.75))
    if not sweeps:  # only asked whether it could be done
        return
    for column, (name, points) in enumerate(sweeps):
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
    with whole(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=80)


def has_memory(sweeps: list[tuple]) -> bool:
    """Whether the memory of any step was measured."""
    for _, points in sweeps:
        for _, rows in points:
            if any(row["memory_mb"] for row in rows):
                return True
    return False


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


def draw_experts(folders: list[Path], path: Path) -> None:
    """A line for each run: the |cosine| of every two experts in each layer, with the mean over
    pairs; |lambda|; and the experts' importance |lambda| |a| |b|, as layers x experts.

    Raises RunError for a run without experts.
    """
    all_layers = []
    for folder in folders:
        model, _ = load_run(folder)
        layers = [layer for layer in mlae_layers(model) if hasattr(layer, "lora_lambda")]
        if not layers:
            raise RunError(f"{folder}: its method has no experts with a lambda")
        all_layers.append(layers)
    columns = 2 + max(map(len, all_layers))
    figure, axes = new_figure(len(folders), columns, (1.45, 1.6))
    for axis in axes.flat:
        axis.axis("off")
    for line, layers, folder in zip(axes, all_layers, folders, strict=True):
        for number, layer in enumerate(layers):
            draw_similarity(line[number], layer, number + 1)
        coefficients = []
        importance = []
        for layer in layers:
            size = layer.lora_lambda.detach().abs()  # (rank,)
            length = layer.lora_A.norm(dim=1) * layer.lora_B.norm(dim=0)
            coefficients.append(size)
            importance.append(size * length.detach())
        maps = {"|λ|": coefficients, "importance": importance}
        for axis, (name, values) in zip(line[-2:], maps.items(), strict=True):
            shown = axis.imshow(torch.stack(values).numpy(), vmin=0, cmap="cividis")
            axis.set_title(name, fontsize=8)
            bar = figure.colorbar(shown, ax=axis, shrink=0.8)
            bar.ax.tick_params(labelsize=6)
        name = line[0].text(-0.5, -2.2, folder.name, fontsize=8)
        name.set_in_layout(False)  # it would widen the first column
    with whole(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=110)


def draw_similarity(axis, layer: MLAELinear, number: int) -> None:
    """The |cosine| of every two experts of a layer, and their mean."""
    cosines = expert_similarity(layer).abs()  # (rank, rank)
    pairs = layer.rank * (layer.rank - 1)
    others = cosines.sum() - cosines.trace()
    mean = others.item() / max(1, pairs)
    axis.imshow(cosines.numpy(), vmin=0, vmax=1, cmap="cividis")
    title = f"layer {number}: {mean:.2f}"
    room = "\n\n"  # for the name of the run
    axis.set_title(room + title, fontsize=8)


def draw_method(path: Path) -> None:
    """What masking does: a frozen weight and six experts at two steps, in scoring and merged."""
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
    notes = ["kept: times 1 / (1 - p)", "another mask", "all experts, as they are"]
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
    words = "one plain linear layer: W' = W + Σ λᵢ bᵢ aᵢ, nothing left to pay"
    write(axis, 1.25, middle, words, align="left")
    with whole(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=120)


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


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument(
        "--method-picture", type=Path, metavar="FILE", help="draw what masking does"
    )
    help_of_experts = "draw the experts' similarity, lambda and importance, a line for each run"
    parser.add_argument("--experts", type=Path, metavar="FILE", help=help_of_experts)
    parser.add_argument("--out", type=Path, help="the file (default: curves.png in the first run)")
    args = parser.parse_args(argv)
    with one_line("plot.py"):
        if args.method_picture:
            check_file(args.method_picture)
            draw_method(args.method_picture)
            return
        if not args.runs:
            raise RunError("name the folder of a run, or several")
        if args.experts:
            check_file(args.experts)
            draw_experts(args.runs, args.experts)
            return
        path = args.out or args.runs[0] / "curves.png"
        check_file(path)
        draw_curves(read_curves(args.runs), path)
        print(path)


if __name__ == "__main__":
    main()
