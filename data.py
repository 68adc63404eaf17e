"""The data: 24 tasks (VTAB-1k's 19, FGVC's 5), the embedded demo, or a folder of one's own images.

    train, test = load("dtd", "data", img_size=224)     # the 1000 training images, the test images
    train, val = load("dtd", "data", split="train")     # 800 to train on, 200 to choose with
    train, test = load("path/to/photos")                # one's own: photos.py

    python data.py --data-dir data                      # the table, what is there, and its proof

A VTAB-1k task comes from its original images (originals.py, splits.py) or from a prepared folder,
`<root>/vtab-1k/<task>/{train800,val200,train800val200,test}.txt`, one line an image: its path in
the folder and its label from 0. Images are resized straight to S x S (bicubic) and not augmented.
An FGVC set is `<root>/fgvc/<set>/{train,val,test}.json` as VPT publishes them, `{"path": class}`:
random resized crops and flips in training, the centre crop in testing.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from flags import data_parser

if __name__ == "__main__":
    data_parser().parse_args()  # --help and typing errors need not wait for torch

import numpy as np

import photos
from images import Images, lines
from photos import FOLDER
from runs import one_line
from sources import ROLE_NUMBER, join, read
from splits import DataError, Missing, tfds_order  # noqa: F401
from tasks import TASKS, Task
from views import NORMALIZE, VIEWS, normalizer  # noqa: F401

SUITES = {"vtab": "vtab-1k", "fgvc": "fgvc"}  # all tasks of a benchmark
BENCHMARKS = [*dict.fromkeys(task.benchmark for task in TASKS.values()), photos.BENCHMARK]
SOURCES = ("auto", "original", "prepared")


def tasks_of(benchmark: str | None) -> list[Task]:
    """The tasks of a benchmark, in the table's order."""
    return [task for task in TASKS.values() if task.benchmark == benchmark]


def find_task(name: str, cut: photos.Cut = photos.DEFAULT) -> Task:
    """The table's row for a task name or alias; for a folder of images, a row of its own.

    A task's exact name comes before a folder of that name: write ./digits for the folder. Raises
    DataError for another name, with the nearest one, and for a suite's, with what to do.
    """
    names = {}
    for task in TASKS.values():
        for alias in (task.name, *task.aliases):
            names[alias] = task
    if name not in names and (os.sep in name or os.path.exists(name)):
        return photos.task_of(name, cut)
    key = name.lower().replace("-", "_")
    if key in names:
        return names[key]
    suite = {"vtab_1k": "vtab", "vtab1k": "vtab"}.get(key, key)
    if suite in SUITES:
        count = len(tasks_of(SUITES[suite]))
        raise DataError(f"{name} is a suite of {count} tasks: python suite.py --dataset {suite}")
    near = difflib.get_close_matches(key, [*names, *SUITES], n=1, cutoff=0.5)
    hint = f"there is no such folder, and the tasks are {', '.join([*SUITES, *TASKS])}"
    if near:
        right = near[0] if near[0] in SUITES else names[near[0]].name
        hint = f"did you mean {right!r}?"
    raise DataError(f"unknown dataset {name!r}: {hint}")


def place_in_table(name: str, identity: dict) -> tuple[str, str]:
    """(benchmark, task) of a finished run; folders of one name differ by their digests."""
    if FOLDER in identity:
        return photos.BENCHMARK, f"{name} {identity[FOLDER][:6]}"
    return TASKS[name].benchmark, name


def groups_of(benchmark: str, found: Iterable[str]) -> dict[str, str]:
    """{task: group} of a benchmark's tasks, in the table's order, or of the folders found."""
    groups = {task.name: task.group for task in tasks_of(benchmark)}
    return groups or dict.fromkeys(found, benchmark)


def load(
    name: str,
    root: str | os.PathLike = "data",
    *,
    split: str = "trainval",
    img_size: int = 224,
    source: str = "auto",
    download: bool = True,
    augment: str | None = None,
    cut: photos.Cut = photos.DEFAULT,
) -> tuple[Images, Images]:
    """(train, test) of a task: "trainval" gives train + val and test, "train" gives train and val.

    Images are img_size x img_size RGB. `source` is for VTAB-1k: "original" (downloaded if need be
    and `download`), "prepared", or "auto", the originals unless they cannot be had. `augment` is a
    key of VIEWS (default: as the task is usually trained on); `cut` is for one's own images. Raises
    DataError, naming the file and the remedy, for an unknown task, data that are not there, and
    data that are damaged or have wrong counts or keys. A prepared test list that is too short, or
    a list with other labels, is read, but not `official`.
    """
    task, root = find_task(name, cut), Path(root)
    if split not in ("trainval", "train") or source not in SOURCES:
        raise ValueError(f"split must not be {split!r}, or source not {source!r}")
    selections = {"train": ["train"], "val": ["val"]}
    if split == "trainval":
        selections = {"train": ["train", "val"], "test": ["test"]}
    found = read(task, root, sum(selections.values(), []), source, download)
    official, counts, paths = found.agrees, [], []
    for use, roles in selections.items():
        count = sum(len(found.labels[role]) for role in roles)
        size = sum(task.sizes[ROLE_NUMBER[role]] for role in roles) if task.sizes else count
        official = official and count == size
        counts.append(f"{count} of {size} {use} (subset)" if count < size else f"{count} {use}")
        for role in roles:
            paths += [image for image in found.images[role] if isinstance(image, Path)]
    proof = f" ({'; '.join(found.notes)})" if found.notes else ""
    formats = f", {'+'.join(sorted(found.formats))} images" if found.formats else ""
    notes = [f"{found.title}{proof}{formats}, {' / '.join(counts)}"]
    repeated = len(paths) - len(set(paths))
    if repeated:
        notes.append(f"{repeated} images are repeated")
    declared = root / task.benchmark / task.name / "SUBSET"
    is_declared = found.source == "prepared" and declared.exists()
    if is_declared:
        notes.append(f"SUBSET: {' '.join(line for _, line in lines(declared))}")
    both = []
    for use, roles in selections.items():
        images = join([found.images[role] for role in roles])
        labels = np.concatenate([found.labels[role] for role in roles])
        view = augment or task.recipe["augment"]
        both.append(Images(images, labels, img_size, augment=view, upright=task.upright))
        both[-1].role = use
        both[-1].class_names = task.class_names
        both[-1].folder = task.folder
        both[-1].left_out = found.left_out
        both[-1].source = found.source
        both[-1].official = official and not repeated and not is_declared
        both[-1].digests = found.digests
        both[-1].description = "; ".join(notes)
    if task.benchmark in SUITES.values():
        cache = f"{task.name}-{found.source}-{split}-{img_size}.safetensors"
        both[0].cache = root / "cache" / cache
    return tuple(both)


def report(task: Task, root: Path) -> bool:
    """Print a task's row, what of it is in <root>, and its proof; False if something is damaged."""
    train, val, test = task.sizes or "---"
    print(f"{task.name:21}{task.classes:4}{train:7}{val:6}{test:7}  {task.verified}")
    missing, is_whole = [], True
    for source in task.sources:
        try:
            _, images = load(task.argument, root, source=source, download=False)
        except Missing as error:
            missing.append(error)
            continue
        except DataError as error:
            print(f"    DAMAGED: {error}")
            is_whole = False
            continue
        print(f"    {'official' if images.official else 'NOT OFFICIAL'}: {images.description}")
        for name, digest in images.digests.items():
            print(f"        {name:16} sha256 {digest}")
    if len(missing) == len(task.sources):
        print(f"    not there: {missing[0]}")
    return is_whole


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 1 if something is damaged, 2 for wrong arguments."""
    parser = data_parser()
    args = parser.parse_args(argv)
    with one_line("data.py"):
        is_given = args.data_dir != parser.get_default("data_dir")
        if is_given and not Path(args.data_dir).is_dir():
            raise DataError(f"--data-dir: there is no folder {args.data_dir}")
        tasks = []
        for name in args.dataset:
            tasks += tasks_of(SUITES.get(name)) or [find_task(name)]
        print(f"{'task':18}classes  train   val   test  what agrees with our official split")
        are_whole = [report(task, Path(args.data_dir)) for task in tasks]
    sys.exit(0 if all(are_whole) else 1)


if __name__ == "__main__":
    main()
