"""The official VTAB-1k cut, from the originals' names or row numbers, without TensorFlow.

TensorFlow Datasets (TFDS) keeps every split of a data set sorted by the md5 of the split's name
followed by the example's key. VTAB-1k's 800 training, 200 validation and test images are slices
of that order (Zhai et al. 2019, arXiv 1910.04867). So names are enough to find them:

    tfds_order(["Forest_Forest_1.jpg", ...], "train")[:800]       # EuroSAT's train800

`CUTS` says for each task where the slices start. At the end stand the few things that every reader
of image lists needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# how Pillow says that a file is no image
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class DataError(ValueError):
    """Data that are missing or wrong; the message names the file and the remedy."""


class Missing(DataError):
    """Originals that are not there and cannot be fetched now."""


def tfds_order(keys: Iterable, split: str) -> list:
    """The keys (str or int) in the order in which TFDS stores the split of that name.

    The order is by md5(split + str(key)) in UTF-8, read as a big-endian integer, that is by its
    16 bytes. The name is TFDS's own: "train", "validation" or "test".
    """

    def place(key) -> bytes:
        return hashlib.md5(f"{split}{key}".encode(), usedforsecurity=False).digest()

    return sorted(keys, key=place)


class Slice(NamedTuple):
    """`count` images of a split of TFDS, from number `start` on."""

    split: str
    start: int
    count: int


@dataclass(frozen=True)
class Cut:
    """How a task is cut from its originals: the images of each split of TFDS, and three slices.

    `ordered`: the slices are of TFDS's order; otherwise of the order of the original lists.
    """

    counts: dict[str, int]
    train: Slice
    val: Slice
    test: Slice
    ordered: bool = True

    def sizes(self) -> tuple[int, int, int]:
        """Images of train, val and test."""
        return self.train.count, self.val.count, self.test.count

    def rows(self, role: str, keys: Sequence) -> list[int]:
        """The row numbers of the slice "train", "val" or "test", given its split's keys."""
        wanted: Slice = getattr(self, role)
        stop = wanted.start + wanted.count
        if not self.ordered:
            return list(range(wanted.start, stop))
        row_of = {key: row for row, key in enumerate(keys)}
        order = tfds_order(keys, wanted.split)
        return [row_of[key] for key in order[wanted.start : stop]]


def _vtab(counts: dict[str, int], val: tuple[str, int], test: tuple[str, int, int]) -> Cut:
    return Cut(counts, Slice("train", 0, 800), Slice(*val, 200), Slice(*test))


_CLEVR = _vtab(
    {"train": 70_000, "validation": 15_000}, ("train", 63_000), ("validation", 0, 15_000)
)
_DSPRITES = _vtab({"train": 737_280}, ("train", 589_824), ("train", 663_552, 73_728))
_NORB = _vtab({"train": 24_300, "test": 24_300}, ("test", 0), ("test", 12_150, 12_150))
_FLOWERS = {"train": 1020, "validation": 1020, "test": 6149}
CUTS: dict[str, Cut] = {
    "cifar": _vtab({"train": 50_000, "test": 10_000}, ("train", 45_000), ("test", 0, 10_000)),
    "caltech101": _vtab({"train": 3060, "test": 6084}, ("train", 2754), ("test", 0, 6084)),
    "dtd": _vtab(
        {"train": 1880, "validation": 1880, "test": 1880}, ("validation", 0), ("test", 0, 1880)
    ),
    "oxford_flowers102": _vtab(_FLOWERS, ("validation", 0), ("test", 0, 6149)),
    "oxford_iiit_pet": _vtab({"train": 3680, "test": 3669}, ("train", 2944), ("test", 0, 3669)),
    "svhn": _vtab({"train": 73_257, "test": 26_032}, ("train", 65_931), ("test", 0, 26_032)),
    "patch_camelyon": _vtab(
        {"train": 262_144, "validation": 32_768, "test": 32_768},
        ("validation", 0),
        ("test", 0, 32_768),
    ),
    "eurosat": _vtab({"train": 27_000}, ("train", 16_200), ("train", 21_600, 5400)),
    "clevr_count": _CLEVR,
    "clevr_dist": _CLEVR,
    "kitti": _vtab(
        {"train": 6347, "validation": 423, "test": 711}, ("validation", 0), ("test", 0, 711)
    ),
    "dsprites_loc": _DSPRITES,
    "dsprites_ori": _DSPRITES,
    "smallnorb_azi": _NORB,
    "smallnorb_ele": _NORB,
    # not of VTAB-1k: in the order of their own lists
    "oxford_flowers": Cut(
        _FLOWERS,
        Slice("train", 0, 1020),
        Slice("validation", 0, 1020),
        Slice("test", 0, 6149),
        ordered=False,
    ),
    "digits": Cut(
        {"train": 1797},
        Slice("train", 0, 800),
        Slice("train", 800, 200),
        Slice("train", 1000, 797),
        ordered=False,
    ),
    "fashion_mnist": Cut(
        {"train": 60_000, "test": 10_000},
        Slice("train", 0, 50_000),
        Slice("train", 50_000, 10_000),
        Slice("test", 0, 10_000),
        ordered=False,
    ),
}


def draw_caltech101(files: dict[str, set[str]], split: str) -> list[str]:
    """Keys `<Dir>/<file>` of a split, given each directory's files: TFDS draws 30 for training."""
    rng = np.random.RandomState(1234)
    keys = []
    for name in sorted(files):  # capitals first
        found = set(files[name])
        if name == "BACKGROUND_Google":
            found.add("tmp")  # no image, but one of the published draw's 30
        found = sorted(found)
        drawn = set()
        if len(found) >= 30:
            drawn = set(rng.choice(found, 30, replace=False).tolist())
        for file in found:
            is_of_split = (file in drawn) == (split == "train")
            if is_of_split and file.endswith(".jpg"):
                keys.append(f"{name}/{file}")
    return keys


def draw_kitti(videos: dict[int, str], split: str) -> list[str]:
    """Keys of a split, given each image's video: TFDS draws a tenth of the videos for testing, then
    as many for validation."""
    rng = np.random.RandomState(123)
    rest = sorted(set(videos.values()))
    count = max(1, len(rest) // 10)
    drawn = {}
    for name in ("test", "validation"):
        drawn[name] = set(rng.choice(rest, count, replace=False).tolist())
        rest = sorted(set(rest) - drawn[name])
    drawn["train"] = set(rest)
    return [f"{image:06d}.png" for image, video in videos.items() if video in drawn[split]]


def _edges(edges: list[float], value: float) -> int:
    """The largest i with edges[i] < value, in float32 as in VTAB's code."""
    return int(np.searchsorted(np.float32(edges), np.float32(value), side="left")) - 1


def clevr_count(objects: list[dict]) -> int:
    """The class 0..7 of the number of objects, 3 to 10."""
    return len(objects) - 3


def clevr_distance(objects: list[dict]) -> int:
    """The class 0..5 of the distance of the object nearest to the camera."""
    nearest = min(item["pixel_coords"][2] for item in objects)
    return _edges([0, 8, 8.5, 9, 9.5, 10, 100], nearest)


def kitti_distance(label_file: str) -> int:
    """The class 0..3 of the nearest car, van or truck: to 8 m, to 20 m, farther, none."""
    nearest = 1000.0
    for line in label_file.splitlines():
        fields = line.split()
        if fields[0] in ("Car", "Van", "Truck"):
            nearest = min(nearest, float(fields[13]))
    return _edges([-100, 8, 20, 999], nearest)


@dataclass(frozen=True)
class Content:
    """A split of an original: `keys` (N), `labels` (N,), and images(rows), those rows' images as a
    list of paths or as an array (len(rows), H, W) or (len(rows), H, W, 3) of uint8."""

    keys: Sequence
    labels: np.ndarray
    images: Callable[[list[int]], list[Path] | np.ndarray]


def files(folder: Path, keys: list[str], labels: Iterable[int]) -> Content:
    return Content(keys, np.asarray(labels), lambda numbers: [folder / keys[n] for n in numbers])


def rows(images: np.ndarray, labels: Iterable[int]) -> Content:
    return Content(range(len(images)), np.asarray(labels), lambda numbers: images[numbers])


def folders(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder: the classes of most data sets."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def find(root: Path, pattern: str, depth: int = 4) -> Path | None:
    """The first match of a pattern in a folder and the levels below it, `depth` in all."""
    for level in range(depth):
        found = sorted(root.glob("*/" * level + pattern))
        if found:
            return found[0]
    return None


def lines(listing: Path) -> list[tuple[str, str]]:
    """("<file>, line <n>", line) of each line that is not blank; DataError without a file."""
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"no list {listing} ({error}): the folder is damaged, unpack it again"
        ) from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            found.append((f"{listing}, line {number}", line.strip()))
    return found


def inside(name: str, where: str | Path) -> str:
    """The relative path `name`, if it stays in its folder; else DataError."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name} leads out of the task's folder")
    return name


def image_format(path: Path, where: str) -> str:
    """The file format of an image, by its header; DataError, naming `where`, without one."""
    try:
        with Image.open(path) as image:
            return image.format
    except FileNotFoundError:
        raise DataError(f"{where}: {path} does not exist; unpack the archive again") from None
    except UNREADABLE as error:
        raise DataError(
            f"{where}: {path} is not a readable image ({type(error).__name__}); "
            "unpack the archive again"
        ) from None
