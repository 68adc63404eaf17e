"""A folder of one's own images, as a task: its classes, its split, and what in it cannot be read.

    photos/train/<class>/*  photos/test/<class>/*   # with val/ too: what --val scores
    photos/train/<class>/*  photos/val/<class>/*    # val/ is the test then
    photos/<class>/*                                # a share of each class is drawn for the test

A class is a folder's name, at any depth below it lie its images. Other files are left alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from files import few, whole
from flags import printable
from folders import (
    SYSTEM,
    Side,
    check_classes,
    class_folders,
    is_image,
    places,
    sides,
    unreadable,
)
from images import Images, image_format
from sources import Found
from splits import DataError
from tasks import COMMON, Task

BENCHMARK = "own"
FOLDER = "folder"  # in a run's identity: the digest of its folder
# The common recipe, but 30 epochs: masked experts on a frozen backbone need few, and a folder can
# have 200 times VTAB-1k's images. Crops: photos of one's own are of any shape.
RECIPE = COMMON | {"epochs": 30, "augment": "crop"}


@dataclass(frozen=True)
class Cut:
    """How a folder is split that does not say: the share of each class's images for the test, that
    of its training images for --val, the seed of both; and whether bad images are left out."""

    test_share: float = 0.2
    val_share: float = 0.2
    seed: int = 0
    skip_bad: bool = False


DEFAULT = Cut()
# what a run's config.json may have of it
FLAGS = {"test_share": (0, 1), "val_share": (0, 1)}
FLAGS |= {"split_seed": range(2**31), "skip_bad_images": bool}


def cut_of(args: argparse.Namespace) -> Cut:
    """The cut that a run's flags ask for."""
    return Cut(args.test_share, args.val_share, args.split_seed, args.skip_bad_images)


def task_of(name: str, cut: Cut = DEFAULT) -> Task:
    """The row of a folder; DataError if it is none, or has not two classes to tell apart."""
    folder = Path(os.path.abspath(name))
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is not there"
        raise DataError(f"--dataset {name} {what}: name a folder with a folder for each class")
    classes = tuple(map(printable, class_folders(places(folder)["train"])))
    if len(classes) < 2:
        found = f"one class only, {classes[0]}" if classes else "no folder for a class"
        raise DataError(f"{folder} has {found}: it needs <class>/* or train/<class>/*, two or more")
    row = printable(folder.name), BENCHMARK, BENCHMARK, len(classes), None, str(folder), (), ""
    reader = partial(read, cut=cut)
    return Task(*row, reader, RECIPE, None, class_names=classes, upright=True, folder=str(folder))


def identify(own: dict, dataset: str, out: str | os.PathLike) -> dict:
    """A run's identity with its folder's name, and a digest of its files' names and sizes, so that
    it may lie anywhere; of a task in the table without the flags that are for folders.

    Raises DataError if the runs would lie among the images.
    """
    if not os.path.isabs(dataset):
        unread = own.keys() & FLAGS.keys()
        for name in sorted(unread):
            flag = name.replace("_", "-")
            print(f"note: --{flag} is for folders of images; it is ignored", file=sys.stderr)
        return {name: value for name, value in own.items() if name not in unread}
    folder, digest = Path(dataset), hashlib.sha256()
    if Path(out).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"--out {out} lies among the images of {folder}: name another folder")
    parts, _ = sides(folder)
    for split, side in parts.items():
        for path in side.files:
            size = path.stat().st_size if path.exists() else 0
            name = path.relative_to(folder).as_posix()
            digest.update(os.fsencode(f"{split} {name} {size}\n"))
    return own | {"dataset": printable(folder.name), FOLDER: digest.hexdigest()}


def draw(side: Side, folder: Path, share: float, seed: int) -> tuple[Side, Side]:
    """(kept, drawn): a share of each class is drawn, at least one image, but never its last.

    The seed orders files by a digest of their names: new images move few others.
    """
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(side.labels):
        by_class.setdefault(label, []).append(row)

    def order(row: int) -> bytes:
        name = side.files[row].relative_to(folder).as_posix()
        return hashlib.sha256(os.fsencode(f"{seed} {name}")).digest()

    drawn = set()
    for rows in by_class.values():
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        drawn.update(sorted(rows, key=order)[:count])
    kept = set(range(len(side.files))) - drawn
    return side.rows(sorted(kept)), side.rows(sorted(drawn))


def read(task, root: Path, roles: Sequence[str], source: str, download: bool, cut: Cut) -> Found:
    """The images of the roles, as the folder or the cut has them, none of them unreadable.

    Raises DataError for them, or for a role without images.
    """
    if source != "auto":
        raise DataError(f"--source {source} is for VTAB-1k, {task.folder} is a folder of images")
    folder, scored = Path(task.folder), roles[-1]
    found = Found("folder", "own images")
    parts = split(task, folder, scored, cut, found)
    parts = {role: parts[role] for role in roles}
    parts = readable(folder, parts, cut, found)
    train, test = parts["train"], parts[scored]
    check_classes(folder, task.class_names, train, "has no readable training images")
    if not test.files:
        remedy = "add images, or put all of them into <class>/* to have a share drawn"
        raise DataError(f"{folder} has no readable {scored} images: {remedy}")
    known = train.files
    if scored == "test":
        known = known + parts["val"].files
    twice = repeated(known, test.files)
    if twice:
        found.notes.append(f"{twice} {scored} images are training images too")
        print(f"warning: {found.notes[-1]}, the same bytes in two files", file=sys.stderr)
    for role, side in parts.items():
        found.images[role] = side.files
        found.labels[role] = np.array(side.labels, np.int64)
        for path in side.files:
            found.formats.add(image_format(path, str(folder)))
    return found


def split(task, folder: Path, scored: str, cut: Cut, found: Found) -> dict[str, Side]:
    """The images by role, as the folder has them; what is scored is drawn if it has none."""
    parts, others = sides(folder)
    tell_others(others)
    is_split = folder / "train" in places(folder).values()
    if "test" not in parts and is_split:
        parts["test"] = parts.pop("val", Side([], []))
    shares = {"test": cut.test_share}
    if scored == "val":
        shares["val"] = cut.val_share
    for role, share in shares.items():
        if role in parts:
            continue
        parts["train"], parts[role] = draw(parts["train"], folder, share, cut.seed)
        found.notes.append(f"{role}: {share:g} of each class, split seed {cut.seed}")
        tell_single(task, parts["train"], parts[role])
    parts.setdefault("val", Side([], []))
    return parts


def readable(folder: Path, parts: dict[str, Side], cut: Cut, found: Found) -> dict[str, Side]:
    """The images that can be read; DataError if that is not all of them, and not as asked for."""
    files = []
    for side in parts.values():
        files += side.files
    bad = unreadable(files)
    if not bad:
        return parts
    names = [path.relative_to(folder).as_posix() for path in bad]
    reason = next(iter(bad.values()))
    what = f"{len(bad)} files of {folder} are no readable images: {few(names)} ({reason})"
    if not cut.skip_bad:
        raise DataError(f"{what}; mend or remove them, or leave them out: --skip-bad-images")
    print(f"left out: {printable(what)}", file=sys.stderr)
    found.notes.append(f"{len(bad)} unreadable images left out")
    found.left_out = len(bad)
    found.agrees = False
    left = {}
    for role, side in parts.items():
        rows = [row for row, path in enumerate(side.files) if path not in bad]
        left[role] = side.rows(rows)
    return left


def tell_others(others: Iterable[Path]) -> None:
    """Say which files were not taken for images: one may miss them."""
    loose = sum(map(is_image, others))
    strangers = [path for path in others if not is_image(path)]
    strangers = [path for path in strangers if path.name.lower() not in SYSTEM]
    kinds = Counter(path.suffix.lower() or path.name for path in strangers)
    if kinds:
        text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        print(f"note: files that are not read as images: {printable(text)}", file=sys.stderr)
    if loose:
        print(f"note: {loose} images lie in no class's folder and are not read", file=sys.stderr)


def tell_single(task, train: Side, drawn: Side) -> None:
    """Say which classes have too few images for both sides."""
    single = sorted(set(train.labels) - set(drawn.labels))
    if single:
        names = few([task.class_names[label] for label in single])
        print(f"note: a single image, which is trained on: class {names}", file=sys.stderr)


def repeated(training: Sequence[Path], scored: Sequence[Path]) -> int:
    """How many scored files have the bytes of a training file; reads those of equal length."""

    def content(path: Path) -> bytes:
        return hashlib.sha256(path.read_bytes()).digest()

    sizes = set(map(os.path.getsize, training)) & set(map(os.path.getsize, scored))
    seen = {content(path) for path in training if os.path.getsize(path) in sizes}
    again = [path for path in scored if os.path.getsize(path) in sizes]
    return sum(content(path) in seen for path in again)


def write_lists(run: Path, *selections: Images) -> None:
    """<role>.csv in a run's folder, path and class of each image, if they are of one's folder."""
    for images in selections:
        if images.folder is None:
            continue
        with (
            whole(run / f"{images.role}.csv") as draft,
            open(draft, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for path, label in zip(images.files, images.labels.tolist(), strict=True):
                writer.writerow(
                    [path.relative_to(images.folder).as_posix(), images.class_names[label]]
                )
