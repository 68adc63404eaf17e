"""Pictures of one run or of many.

    python plot.py runs/digits/mlae-vit_nano-seed0-...       # all that this run can have, into it
    python plot.py runs/digits/* --out pictures              # several, into a folder
    python plot.py runs/digits/* --out curves.png            # one file: the curves alone
    python plot.py A B --only experts --out experts.png      # one file of another kind
    python plot.py --sweep mask-prob runs                    # accuracy over a setting of a suite
    python plot.py --method-picture method.png               # what masking does, as in README

curves.png: loss, training accuracy and the experts' similarity over the epochs. experts.png: their
similarity in each layer, lambda and importance. masks.png: what is masked. attention.png: what the
class token looks at, before and after. confusion.png: which classes are taken for which.

Runs that differ in nothing but the seed are one line with a band; of these, the pictures of what
lies inside a model show the first. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

import data
from configs import read_config
from figures import FILE_ENDINGS, LOOKS, PAGE, check_picture, draw_method, new_figure, save
from files import RunError, check_shape, read_log
from flags import DEVICES, Parser, printable
from inside import NoPicture, Run
from pictures import draw_attention, draw_confusion, draw_experts, draw_masks
from runs import collect, one_line, pick_device
from splits import Missing
from sweeps import draw_sweep, read_sweep
from table import label

MODELS = {  # the pictures of what lies inside models: what of inside.Run they show, and how
    "experts": ("experts", draw_experts),
    "masks": ("masks", draw_masks),
    "attention": ("attention", draw_attention),
    "confusion": ("confusion", draw_confusion),
}
PICTURES = ["curves", *MODELS]
IDENTITY = {"identity": {"method": str, "seed": range(2**31)}}


def group(folders: list[Path]) -> dict[str, list[Path]]:
    """{configuration: the folders of its seeds} of runs; RunError for what is not a run."""
    found: dict[str, tuple[dict, list[Path]]] = {}  # settings -> all arguments, folders
    for folder in folders:
        config = read_config(folder)
        check_shape(config, IDENTITY, str(folder / "config.json"))
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
    parser = Parser(description=__doc__, prog="plot.py")
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
    flag("--method-picture", type=Path, metavar="FILE", help="draw what masking does")
    flag("--data-dir", help="where the data are now (default: where they were in training)")
    flag("--checkpoint", help="where the backbone's file is now (default: where it was)")
    flag("--device", choices=DEVICES, default="auto", help="default: auto, the fastest here")
    args = parser.parse_args(argv)
    with one_line("plot.py"):
        if args.method_picture:
            draw_method(args.method_picture)
            return
        if not args.runs:
            raise RunError("name the folder of a run, or several")
        args.device = pick_device(args.device)
        if not args.sweep:
            draw_all(args)
            return
        setting = args.sweep.lstrip("-").replace("-", "_")
        results = collect(*args.runs)
        if not results:
            raise RunError(f"--sweep: there is no finished run in {' '.join(map(str, args.runs))}")
        sweeps = read_sweep(results, setting)
        (file,) = places(args, [f"sweep-{setting}"]).values()
        save(draw_sweep(sweeps, setting), file)
        print(file)


if __name__ == "__main__":
    main()
