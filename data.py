"""The data: 24 tasks as one table (VTAB-1k's 19, FGVC's 5), the embedded demo, and their readers.

    train, test = load("dtd", "data", img_size=224)     # the 1000 training images, the test images
    train, val = load("dtd", "data", split="train")     # 800 to train on, 200 to choose with

A VTAB-1k task comes from its original images (originals.py, splits.py) or from a prepared folder,
`<root>/vtab-1k/<task>/{train800,val200,train800val200,test}.txt`, one line an image: its path in
the folder and its label from 0. Images are resized straight to S x S (bicubic) and not augmented.
An FGVC set is `<root>/fgvc/<set>/{train,val,test}.json` as VPT publishes them, `{"path": class}`:
random resized crops and flips in training, the centre crop in testing. images.py reads them.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import originals
from images import NORMALIZE, Images, normalizer
from originals import ORIGINALS
from splits import CUTS, DataError, Missing, image_format, inside, lines, tfds_order

__all__ = ["NORMALIZE", "TASKS", "DataError", "Images", "Missing", "Task", "load", "normalizer"]
__all__ += ["find_task", "tasks_of", "tfds_order"]

ARCHIVE = "1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p"  # all 19 tasks, on Google Drive
SUITES = {"vtab": "vtab-1k", "fgvc": "fgvc"}  # all tasks of a benchmark
SOURCES = ("auto", "original", "prepared")
ROLES = ("train", "val", "test")
LISTS = {  # of the prepared folder
    ("train",): "train800.txt",
    ("val",): "val200.txt",
    ("train", "val"): "train800val200.txt",
    ("test",): "test.txt",
}


@dataclass(frozen=True)
class Found:
    """What a reader found: images (paths or an array) and labels of each selection asked for."""

    source: str
    description: str
    images: list[Sequence]
    labels: list[Sequence[int]]


@dataclass(frozen=True)
class Task:
    """A row of the table. `sizes`: images of train, val and test; `origin`: where the original
    images are from; `verified`: how our split was checked; `read(task, root, selections, source,
    download)`: its reader; `augment`: "none" or "crop"; `recipe`: train.py's flags if left out."""

    name: str
    benchmark: str
    group: str
    classes: int
    sizes: tuple[int, int, int]
    origin: str
    aliases: tuple[str, ...]
    verified: str
    read: Callable[..., Found]
    augment: str
    recipe: dict

    def count(self, roles: Sequence[str]) -> int:
        """Images that the roles, some of "train", "val" and "test", have together."""
        return sum(self.sizes[ROLES.index(role)] for role in roles)


Selections = list[tuple[str, ...]]


def read_originals(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """The originals, cut by splits.py."""
    roles = list(itertools.chain(*selections))
    slices = originals.official(task.name, root, roles, download)
    images, labels, formats = [], [], set()
    for selection in selections:
        found = [slices[role] for role in selection]
        labels.append(np.concatenate([labels_of_it for _, labels_of_it in found]))
        if isinstance(found[0][0], np.ndarray):
            images.append(np.concatenate([array for array, _ in found]))
            formats.add("raw")
        else:
            images.append(sum([paths for paths, _ in found], []))
            where = f"{task.name}: the originals are not whole"
            formats |= {image_format(path, where) for path in images[-1]}
        if not 0 <= labels[-1].min() <= labels[-1].max() < task.classes:
            raise DataError(f"{task.name}: the originals have labels outside 0..{task.classes - 1}")
    return Found("original", f"originals, {'+'.join(sorted(formats))} images", images, labels)


def read_embedded(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """As read_originals; there is no other source, and people know it by the task's origin."""
    found = read_originals(task, root, selections, source, download)
    return dataclasses.replace(found, source="embedded", description=task.origin)


def read_vtab(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """The originals, or where they cannot be had, or at wish, the prepared folder."""
    folder = root / "vtab-1k" / task.name
    archive = f"unpack a prepared archive (Google Drive {ARCHIVE}) to {folder}"
    if source == "original" and task.name not in ORIGINALS:
        raise DataError(f"--source original: {task.name} has a prepared folder only")
    if source != "prepared" and task.name in ORIGINALS:
        try:
            return read_originals(task, root, selections, source, download)
        except Missing as error:
            if source == "original" or not folder.is_dir():
                raise Missing(f"{error}; or {archive}") from None
            print(f"{error}; reading the prepared folder {folder} instead")
    if not folder.is_dir():
        raise Missing(f"{task.name}: no folder {folder}: {archive} or point --data-dir elsewhere")
    images, labels, formats = [], [], set()
    for selection in selections:
        paths, classes = [], []
        for where, line in lines(folder / LISTS[selection]):
            path, label, encoding = _prepared_line(task, folder, where, line)
            paths.append(path)
            classes.append(label)
            formats.add(encoding)
        count = task.count(selection)
        is_short = len(paths) < count and selection != ("test",)
        if is_short or not 0 < len(paths) <= count:
            counts = f"{len(paths)} images, VTAB-1k's {task.name} has {count}"
            raise DataError(f"{folder / LISTS[selection]} has {counts}")
        images.append(paths)
        labels.append(classes)
    description = f"prepared folder, {'+'.join(sorted(formats))} images"
    return Found("prepared", description, images, labels)


def _prepared_line(task: Task, folder: Path, where: str, line: str) -> tuple[Path, int, str]:
    """The image's path, its label and its file format."""
    try:
        name, label = line.rsplit(None, 1)
        label = int(label)
    except ValueError:
        raise DataError(f"{where}: expected '<image> <label>', found {line!r}") from None
    if not 0 <= label < task.classes:
        raise DataError(f"{where}: label {label} is outside 0..{task.classes - 1}")
    path = folder / inside(name, where)
    return path, label, image_format(path, where)


def read_fgvc(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """VPT's layout: train.json, val.json, test.json; their class ids, sorted, become 0..C-1."""
    folder = None
    for path in sorted((root / "fgvc").glob("*/")):
        if path.name.lower().replace("-", "_") in (task.name, *task.aliases):
            folder = folder or path
    by_hand = (
        f"put the images of {task.origin} into {root / 'fgvc' / task.name} and, beside them, "
        "train.json, val.json and test.json, which VPT's repository links to (github.com/KMnP/vpt)"
    )
    if folder is None and source != "prepared" and task.name in ORIGINALS:
        try:
            return read_originals(task, root, selections, source, download)
        except Missing as error:
            raise Missing(f"{error}; or {by_hand}") from None
    if folder is None:
        raise Missing(f"{task.name}: no folder {root / 'fgvc' / task.name}: {by_hand}")
    roles = list(itertools.chain(*selections))
    lists = {role: _fgvc_list(task, folder, role) for role in roles}
    ids = set().union(*(listed.values() for listed in lists.values()))
    if len(ids) < task.classes and "test" not in lists:  # else training alone knows all classes
        ids |= set(_fgvc_list(task, folder, "test").values())
    if len(ids) > task.classes:
        counts = f"{len(ids)} classes, {task.name} has {task.classes}"
        raise DataError(f"{folder}: the lists have {counts}")
    class_of = {name: number for number, name in enumerate(sorted(ids))}
    images, labels, formats = [], [], set()
    for selection in selections:
        paths, classes = [], []
        for role in selection:
            for name, label in lists[role].items():
                where = f"{folder / role}.json"
                places = [folder / sub / inside(name, where) for sub in ("images", "Images", "")]
                found = [path for path in places if path.exists()] or places[-1:]
                formats.add(image_format(found[0], where))
                paths.append(found[0])
                classes.append(class_of[label])
        images.append(paths)
        labels.append(classes)
    return Found("lists", f"lists of VPT, {'+'.join(sorted(formats))} images", images, labels)


def _fgvc_list(task: Task, folder: Path, role: str) -> dict[str, int]:
    listing = folder / f"{role}.json"
    try:
        listed = json.loads(listing.read_text(encoding="utf-8-sig"))
        if not listed or not all(type(label) is int for label in listed.values()):
            raise ValueError("a class is no integer, or the list is empty")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{listing} is no list like {{'<image>': <class>}} ({error}): get it again"
        ) from None
    if len(listed) > task.count([role]):
        raise DataError(f"{listing} has {len(listed)} images, {task.name} has {task.count([role])}")
    return listed


# What a task's flags are if left out. vtab-1k and fgvc: the field's common recipe (AdapterPlus) on
# the MLAE paper's backbone. The demo's learning rate was chosen on val200.
COMMON = {"model": "vit_base_patch16_224.orig_in21k", "epochs": 100, "lr": 1e-3, "drop_path": 0.1}
DEMO = {"model": "vit_nano", "epochs": 20, "lr": 8e-3, "drop_path": 0.0}
PRETRAINING = {"model": "vit_nano", "epochs": 12, "lr": 1e-3, "drop_path": 0.1}


def _vtab(group: str, name: str, classes: int, test: int, *aliases: str) -> Task:
    origin, verified = "prepared folder only", "not rebuilt"
    if name in ORIGINALS:
        origin, verified = ORIGINALS[name].get, "rule only"
    if name in ("cifar", "caltech101", "eurosat"):
        verified = "published list"
    what = name, "vtab-1k", group, classes, (800, 200, test), origin, aliases, verified
    return Task(*what, read=read_vtab, augment="none", recipe=COMMON)


def _fgvc(group: str, name: str, classes: int, sizes: tuple, origin: str, *aliases: str) -> Task:
    what = name, "fgvc", group, classes, sizes, origin, aliases, "published list"
    return Task(*what, read=read_fgvc, augment="crop", recipe=COMMON)


def _embedded(name: str, benchmark: str, recipe: dict, origin: str, *aliases: str) -> Task:
    what = name, benchmark, "demo", 10, CUTS[name].sizes(), origin, aliases, ""
    return Task(*what, read=read_embedded, augment="none", recipe=recipe)


_ROWS = [
    _vtab("natural", "cifar", 100, 10000, "cifar100", "cifar_100"),
    _vtab("natural", "caltech101", 102, 6084, "caltech", "caltech_101"),
    _vtab("natural", "dtd", 47, 1880, "describable_textures"),
    _vtab("natural", "oxford_flowers102", 102, 6149, "flowers102", "vtab_flowers"),
    _vtab("natural", "oxford_iiit_pet", 37, 3669, "pets", "pet", "oxford_pet", "oxford_pets"),
    _vtab("natural", "svhn", 10, 26032, "svhn_cropped"),
    _vtab("natural", "sun397", 397, 21750, "sun", "sun_397"),
    _vtab("specialized", "patch_camelyon", 2, 32768, "camelyon", "pcam"),
    _vtab("specialized", "eurosat", 10, 5400, "euro_sat"),
    _vtab("specialized", "resisc45", 45, 6300, "resisc"),
    _vtab("specialized", "diabetic_retinopathy", 5, 42670, "retinopathy"),
    _vtab("structured", "clevr_count", 8, 15000, "clevr_count_all"),
    _vtab("structured", "clevr_dist", 6, 15000, "clevr_closest", "clevr_distance"),
    _vtab("structured", "dmlab", 6, 22735),
    _vtab("structured", "kitti", 4, 711, "kitti_dist", "kitti_distance"),
    _vtab("structured", "dsprites_loc", 16, 73728, "dsprites_location", "dsprites_position"),
    _vtab("structured", "dsprites_ori", 16, 73728, "dsprites_orientation"),
    _vtab("structured", "smallnorb_azi", 18, 12150, "smallnorb_azimuth"),
    _vtab("structured", "smallnorb_ele", 9, 12150, "smallnorb_elevation"),
    _fgvc("birds", "cub", 200, (5394, 600, 5794), "CUB-200-2011", "cub200", "cub_200_2011"),
    _fgvc("birds", "nabirds", 555, (21536, 2393, 24633), "NABirds"),
    _fgvc(
        *("flowers", "oxford_flowers", 102, (1020, 1020, 6149), "Oxford Flowers 102"),
        *("fgvc_flowers", "oxfordflower"),
    ),
    _fgvc("dogs", "stanford_dogs", 120, (10800, 1200, 8580), "Stanford Dogs", "dogs"),
    _fgvc("cars", "stanford_cars", 196, (7329, 815, 8041), "Stanford Cars", "cars"),
    _embedded("digits", "demo", DEMO, "embedded UCI handwritten digits"),
    _embedded("fashion_mnist", "pretraining", PRETRAINING, "Fashion-MNIST", "fashion"),
]
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def tasks_of(benchmark: str | None) -> list[Task]:
    """The tasks of a benchmark, in the table's order."""
    return [task for task in TASKS.values() if task.benchmark == benchmark]


def find_task(name: str) -> Task:
    """The table's row for a task name or alias.

    Raises DataError for another name, with the nearest one, and for a suite's, with what to do.
    """
    names = {}
    for task in TASKS.values():
        for alias in (task.name, *task.aliases):
            names[alias] = task
    key = name.lower().replace("-", "_")
    if key in names:
        return names[key]
    suite = {"vtab_1k": "vtab", "vtab1k": "vtab"}.get(key, key)
    if suite in SUITES:
        count = len(tasks_of(SUITES[suite]))
        raise DataError(f"{name} is a suite of {count} tasks: python suite.py --dataset {suite}")
    near = difflib.get_close_matches(key, [*names, *SUITES], n=1, cutoff=0.5)
    hint = f"there are {', '.join([*SUITES, *TASKS])}"
    if near:
        right = near[0] if near[0] in SUITES else names[near[0]].name
        hint = f"did you mean {right!r}?"
    raise DataError(f"unknown dataset {name!r}: {hint}")


def load(
    name: str,
    root: str | os.PathLike = "data",
    *,
    split: str = "trainval",
    img_size: int = 224,
    source: str = "auto",
    download: bool = True,
) -> tuple[Images, Images]:
    """(train, test) of a task: "trainval" gives train + val and test, "train" gives train and val.

    Images are img_size x img_size RGB. `source` is for VTAB-1k: "original" (downloaded if need be
    and `download`), "prepared", or "auto", the originals unless they cannot be had. Raises
    DataError, naming the file and the remedy, for an unknown task, data that are not there, and
    data that are damaged or have wrong counts or labels. A test list shorter than the official one
    is read, and is not `official`.
    """
    task, root = find_task(name), Path(root)
    if split not in ("trainval", "train") or source not in SOURCES:
        raise ValueError(f"split must not be {split!r}, or source not {source!r}")
    selections = [("train", "val"), ("test",)] if split == "trainval" else [("train",), ("val",)]
    found = task.read(task, root, selections, source, download)
    official, notes, paths = True, [], []
    for selection, images, labels in zip(selections, found.images, found.labels, strict=True):
        count, role = task.count(selection), selection[0]
        if len(labels) == count:
            notes.append(f"{len(labels)} {role}")
        else:
            notes.append(f"{len(labels)} of {count} {role} (subset)")
            official = False
        if not isinstance(images, np.ndarray):
            paths += images
    description = f"{found.description}, {' / '.join(notes)}"
    repeated = len(paths) - len(set(paths))
    if repeated:
        description, official = f"{description}; {repeated} images are repeated", False
    declared = root / task.benchmark / task.name / "SUBSET"
    if found.source == "prepared" and declared.exists():
        why = " ".join(declared.read_text().split())
        description, official = f"{description}; SUBSET: {why}", False
    cache = None
    if task.benchmark in SUITES.values():
        cache = root / "cache" / f"{task.name}-{found.source}-{split}-{img_size}.safetensors"
    shared = {"img_size": img_size, "augment": task.augment, "source": found.source}
    shared |= {"official": official, "description": description}
    train = Images(found.images[0], found.labels[0], cache=cache, **shared)
    return train, Images(found.images[1], found.labels[1], **shared)
