"""Folders of images as people keep them: their classes, their files, and what cannot be read.

    parts, others = sides(Path("photos"))           # {"train": Side, "test": Side}, other files
    unreadable(parts["train"].files)                # {path: why} of those that do not decode

Hidden files and folders are not there for us. Nothing is ever written into a folder of images.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageOps
from tqdm import tqdm

from files import few
from flags import printable
from images import cores, open_image
from splits import DataError

ENDINGS = ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm".split()
SYSTEM = ("thumbs.db", "desktop.ini")  # what Windows leaves in a folder
SPLITS = ("train", "val", "test")
LIKE_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def places(folder: Path) -> dict[str, Path]:
    """The folders of classes: of "train", "val" and "test"; of "train" alone if it is not split.

    A folder train/ that has no folders is a class of that name.
    """
    known = {}
    if entries(folder / "train", folders=True):
        known = {split: folder / split for split in SPLITS if (folder / split).is_dir()}
    for path in entries(folder, folders=True):
        is_split = path.name.lower() in LIKE_SPLITS and entries(path, folders=True)
        if is_split and path not in known.values():
            there_are = "there is no train/" if not known else "it is not read"
            remedy = "call the parts of a split train, val and test"
            raise DataError(f"{path} looks like a part of a split, but {there_are}: {remedy}")
    return known or {"train": folder}


def entries(folder: Path, folders: bool) -> list[Path]:
    """What is in a folder, in order, without what is hidden: its folders, or all else."""
    if not folder.is_dir():
        return []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    paths = [folder / name for name in names if not name.startswith(".")]
    return [path for path in paths if os.path.isdir(path) == folders]


def class_folders(place: Path) -> dict[str, Path]:
    return {path.name: path for path in entries(place, folders=True)}


def node(folder: Path) -> tuple[int, int]:
    """What a folder is, by whatever name."""
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def files_below(folder: Path, above: frozenset = frozenset()) -> list[Path]:
    """All files below a folder, in order; a link back to a folder above is not followed."""
    above |= {node(folder)}
    files = entries(folder, folders=False)
    for inner in entries(folder, folders=True):
        if node(inner) not in above:
            files += files_below(inner, above)
    return files


def is_image(path: Path) -> bool:
    """By its name: what it holds is seen later."""
    return path.suffix.lower() in ENDINGS


@dataclass
class Side:
    """The images of a part of the split: their files, and the number of each one's class."""

    files: list[Path]
    labels: list[int]

    def rows(self, rows: Iterable[int]) -> Side:
        rows = list(rows)
        return Side([self.files[row] for row in rows], [self.labels[row] for row in rows])


def sides(folder: Path) -> tuple[dict[str, Side], list[Path]]:
    """The images by split as the folder has it, and the other files.

    Raises DataError for a class without training images, or one that is not trained on.
    """
    known, found, others = places(folder), {}, []
    classes = list(class_folders(known["train"]))
    above = frozenset(map(node, known.values()))
    for split, place in known.items():
        side = Side([], [])
        others += entries(place, folders=False)
        unknown = class_folders(place).keys() - set(classes)
        if unknown:
            names = few(sorted(map(printable, unknown)))
            raise DataError(f"{place} has classes that {known['train']} has not: {names}")
        for name, path in class_folders(place).items():
            files = files_below(path, above)
            images = list(filter(is_image, files))
            others += [file for file in files if not is_image(file)]
            side.files += images
            side.labels += [classes.index(name)] * len(images)
        found[split] = side
    check_classes(folder, classes, found["train"], "has no images")
    return found, others


def check_classes(folder: Path, classes: Sequence[str], train: Side, problem: str) -> None:
    """Raise DataError if a class has no training image."""
    without = set(range(len(classes))) - set(train.labels)
    empty = [printable(classes[i]) for i in sorted(without)]
    if len(empty) == len(classes):
        raise DataError(f"{folder} {problem}: put {', '.join(ENDINGS[:6])}, ... files into it")
    if empty:
        remedy = "put some into it, or remove it"
        raise DataError(f"{folder}: class folder {few(empty)} {problem}: {remedy}")


def unreadable(files: Sequence[Path]) -> dict[Path, str]:
    """The files that do not decode, and why. Each is decoded once, JPEGs at an eighth."""
    with ThreadPoolExecutor(cores()) as pool:
        stamps = pool.map(stamp, files)
        reasons = pool.map(defect, files, stamps)
        reasons = list(tqdm(reasons, f"checking {len(files)} images", len(files), disable=None))
    return {path: why for path, why in zip(files, reasons, strict=True) if why}


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(2**20)
def defect(path: Path, when: tuple | None) -> str:
    """Why an image cannot be read, or nothing; a suite need not ask twice for a file as it was."""
    try:
        with open_image(path) as image:
            image.draft("RGB", (64, 64))
            image.load()
            ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a damaged file makes Pillow raise
        return type(error).__name__
    return ""
