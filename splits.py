"""The official VTAB-1k cut, from the originals' names or row numbers, without TensorFlow.

TensorFlow Datasets (TFDS) keeps every split of a data set sorted by the md5 of the split's name
followed by the example's key. VTAB-1k's 800 training, 200 validation and test images are slices
of that order (Zhai et al. 2019, arXiv 1910.04867). So names are enough to find them:

    tfds_order(["Forest_Forest_1.jpg", ...], "train")[:800]       # EuroSAT's train800

`VTAB` says where a task's slices start. splits.json has the sha256 of every slice's keys, joined by
newlines, and what outside lists confirm; splits.npz has what is long: the split of each image of
SUN397, labels, and one byte a key to find errors by.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).resolve().parent
CONSTANTS = json.loads((FOLDER / "splits.json").read_text())
ROLES = {"train": "train800", "val": "val200", "test": "test"}  # and their names in VTAB-1k
SUN397_UNUSED = "/c/church/outdoor/sun_bhenjvsvrtumjuri.jpg"  # TFDS cannot decode it
OTHER_DRAWS = {"caltech101": 6085}  # test images of a draw that is in circulation too


class DataError(ValueError):
    """Data that are missing or wrong; the message names the file and the remedy."""


class Missing(DataError):
    """Originals that are not there and cannot be fetched now."""


def regular(path: Path) -> Path:
    """The path; OSError for a pipe, device or folder there: opening a pipe can wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    return path


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def printable(text: str) -> str:
    """The text in one line, with escapes for what a terminal would act on."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def tfds_order(keys: Iterable, split: str) -> list:
    """The keys (str or int) in the order in which TFDS stores the split of that name.

    The order is by md5(split + str(key)) in UTF-8, read as a big-endian integer, that is by its
    16 bytes. The name is TFDS's own: "train", "validation" or "test".
    """

    def place(key) -> bytes:
        return hashlib.md5(f"{split}{key}".encode(), usedforsecurity=False).digest()

    return sorted(keys, key=place)


class Slice(NamedTuple):
    """The images start .. stop - 1 of a split of TFDS."""

    split: str
    start: int
    stop: int

    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """How a task is cut from its originals: the images of each split of TFDS, and three slices.

    `ordered`: the slices are of TFDS's order; otherwise of the order of the original lists.
    """

    counts: dict[str, int]
    train: Slice
    val: Slice
    test: Slice
    ordered: bool

    def sizes(self) -> tuple[int, int, int]:
        """Images of train, val and test."""
        return self.train.count(), self.val.count(), self.test.count()

    def rows(self, role: str, keys: Sequence) -> list[int]:
        """The row numbers of the slice "train", "val" or "test", given its split's keys."""
        wanted: Slice = getattr(self, role)
        if not self.ordered:
            return list(range(wanted.start, wanted.stop))
        row_of = {key: row for row, key in enumerate(keys)}
        order = tfds_order(keys, wanted.split)
        return [row_of[key] for key in order[wanted.start : wanted.stop]]


VTAB = {  # val200 and test, as slices of TFDS's splits; train800 is train[:800] of all
    "cifar": ("train[45000:45200]", "test[:10000]"),
    "caltech101": ("train[2754:2954]", "test[:6084]"),
    "dtd": ("validation[:200]", "test[:1880]"),
    "oxford_flowers102": ("validation[:200]", "test[:6149]"),
    "oxford_iiit_pet": ("train[2944:3144]", "test[:3669]"),
    "svhn": ("train[65931:66131]", "test[:26032]"),
    "sun397": ("validation[:200]", "test[:21750]"),
    "patch_camelyon": ("validation[:200]", "test[:32768]"),
    "eurosat": ("train[16200:16400]", "train[21600:27000]"),
    "resisc45": ("train[18900:19100]", "train[25200:31500]"),
    "diabetic_retinopathy": ("validation[:200]", "test[:42670]"),
    "clevr_count": ("train[63000:63200]", "validation[:15000]"),
    "clevr_dist": ("train[63000:63200]", "validation[:15000]"),
    "dmlab": ("validation[:200]", "test[:22735]"),
    "kitti": ("validation[:200]", "test[:711]"),
    "dsprites_loc": ("train[589824:590024]", "train[663552:737280]"),
    "dsprites_ori": ("train[589824:590024]", "train[663552:737280]"),
    "smallnorb_azi": ("test[:200]", "test[12150:24300]"),
    "smallnorb_ele": ("test[:200]", "test[12150:24300]"),
}
OTHERS = {  # train, val and test, in the order of the original lists
    "oxford_flowers": ("train[:1020]", "validation[:1020]", "test[:6149]"),
    "digits": ("train[:800]", "train[800:1000]", "train[1000:1797]"),
    "fashion_mnist": ("train[:50000]", "train[50000:60000]", "test[:10000]"),
}


def _cut(name: str, texts: Sequence[str], ordered: bool) -> Cut:
    slices = []
    for text in texts:
        split, start, stop = re.fullmatch(r"(\w+)\[(\d*):(\d+)\]", text).groups()
        slices.append(Slice(split, int(start or 0), int(stop)))
    return Cut(CONSTANTS["counts"][name], *slices, ordered)


CUTS = {name: _cut(name, ("train[:800]", *texts), True) for name, texts in VTAB.items()}
CUTS |= {name: _cut(name, texts, False) for name, texts in OTHERS.items()}


def draw_caltech101(files: dict[str, set[str]], split: str) -> dict[str, tuple[str, str]]:
    """{key: (directory, file)} of a split, given each directory's files.

    TFDS draws 30 a directory for training. Its draw depends on the order of directories; the
    official one, 3060 and 6084 images, has upper case before lower case.
    """
    rng = np.random.RandomState(1234)
    keys = {}
    for folder in sorted(files):
        found = set(files[folder])
        if folder == "BACKGROUND_Google":
            found.add("tmp")  # no image, but listed when the official draw was made
        found = sorted(found)
        drawn = set()
        if len(found) >= 30:
            drawn = set(rng.choice(found, 30, replace=False).tolist())
        for file in found:
            is_of_split = (file in drawn) == (split == "train")
            if is_of_split and file.endswith(".jpg"):
                keys[f"{folder}/{file}"] = folder, file
    return keys


def all_files(files: dict[str, set[str]], split: str) -> dict[str, tuple[str, str]]:
    """{key: (directory, file)} of all images: the key of EuroSAT and Resisc45 is `<Dir>_<file>`."""
    keys = {}
    for folder in files:
        for file in files[folder]:
            if file.endswith(".jpg"):
                keys[f"{folder}_{file}"] = folder, file
    return keys


# originals of one folder a class: how keys are made of files, and the rule of the files' names
FOLDERS = {
    "caltech101": (draw_caltech101, "image_{i:04}.jpg"),
    "eurosat": (all_files, "{folder}_{i}.jpg"),
    "resisc45": (all_files, "{folder}_{i:03}.jpg"),
}


def from_folders(name: str, files: dict[str, set[str]], split: str) -> tuple[dict, list[int]]:
    """{key: (directory, file)} and labels of a split of a task of FOLDERS, given the files of each
    directory. Labels are by the directories' names, upper and lower case alike."""
    draw, _ = FOLDERS[name]
    classes = sorted(files, key=str.lower)
    keys = draw(files, split)
    return keys, [classes.index(folder) for folder, _ in keys.values()]


@cache
def _official_files(name: str) -> dict[str, set[str]]:
    _, rule = FOLDERS[name]
    files = {}
    for folder, count in CONSTANTS["classes"][name].items():
        files[folder] = {rule.format(folder=folder, i=i) for i in range(1, count + 1)}
    return files


def check_files(name: str, files: dict[str, set[str]]) -> None:
    """DataError, naming them, if images of a task of FOLDERS are missing or are not its own."""
    found, official = set(), set()
    for folder in files:
        found |= {f"{folder}/{file}" for file in files[folder] if file.endswith(".jpg")}
    for folder, names in _official_files(name).items():
        official |= {f"{folder}/{file}" for file in names}
    if found == official:
        return
    changes = []
    for role, slice_name in ROLES.items():
        wanted = getattr(CUTS[name], role)
        slices = []
        for listing in (files, _official_files(name)):
            keys = list(from_folders(name, listing, wanted.split)[0])
            slices.append({keys[row] for row in CUTS[name].rows(role, keys)})
        changes.append(f"{len(slices[1] - slices[0])} of {slice_name}")
    raise DataError(
        f"{name}: {_some(official - found)} missing, {_some(found - official)} too many, which "
        f"changes {', '.join(changes)}: get the originals again"
    )


def _some(names: set[str]) -> str:
    """How many names, and the first three."""
    shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "none"


@cache
def _packed(name: str) -> np.ndarray | None:
    with np.load(FOLDER / "splits.npz") as file:
        return file.get(name)


def sha256(values: Iterable) -> str:
    """The sha256 of values joined by newlines, in hex."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()


def _numbered_keys(name: str, role: str) -> list[str]:
    """The keys of a slice in order, of a task whose keys are numbered."""
    wanted = getattr(CUTS[name], role)
    rule = CONSTANTS["numbered"][name][wanted.split]
    keys = [rule.format(i) for i in range(CUTS[name].counts[wanted.split])]
    return tfds_order(keys, wanted.split)[wanted.start : wanted.stop]


def prove_keys(name: str, role: str, keys: Sequence) -> str:
    """The sha256 of a slice's keys in order; DataError if it is known to be another one."""
    digest = sha256(keys)
    official = CONSTANTS["keys"].get(name, {}).get(ROLES[role], digest)
    if digest == official:
        return digest
    wrong = "keys"
    if name in CONSTANTS["numbered"]:
        strange = set(keys) - set(_numbered_keys(name, role))
        wrong = f"of {len(keys)} keys {_some(strange)}"
    codes = _packed(f"{name} codes")  # a byte a key: train800, then val200
    if codes is not None and role != "test":
        codes = codes[:800] if role == "train" else codes[800:]
        found = [zlib.crc32(str(key).encode()) & 255 for key in keys]
        matcher = SequenceMatcher(None, codes.tolist(), found, autojunk=False)
        strange = set(keys)
        for block in matcher.get_matching_blocks():
            strange -= set(keys[block.b : block.b + block.size])
        wrong = f"of {len(keys)} keys {_some(strange)}"
    raise DataError(
        f"{name}: {ROLES[role]} is not the official one, {wrong} differ from TFDS's list: "
        "get the originals and their lists again"
    )


class Proof(NamedTuple):
    """Whether labels agree with the official ones (None: these are not known), and the number,
    from 1, of the first that does not."""

    agrees: bool | None
    line: int | None = None


def prove_labels(name: str, role: str, labels: Sequence[int]) -> Proof:
    """Compare labels of a slice, or of its beginning, with the official ones in TFDS's order."""
    digests = CONSTANTS["labels"].get(name, {}).get(ROLES[role])
    if digests:  # of TFDS's order, and of that in which it reads several files side by side
        whole = len(labels) == getattr(CUTS[name], role).count()
        return Proof(sha256(labels) in digests if whole else None)
    official = _official_labels(name, role)
    if official is None:
        return Proof(None)
    for line, (found, wanted) in enumerate(zip(labels, official, strict=False), 1):
        if found != wanted:
            return Proof(False, line)
    return Proof(True)


def prove_histogram(name: str, role: str, labels: Sequence[int]) -> bool:
    """Whether each class has as many images in a slice as it should, as far as that is known."""
    official = CONSTANTS["histograms"].get(name, {}).get(ROLES[role])
    return official is None or np.bincount(labels, minlength=len(official)).tolist() == official


@cache
def _official_labels(name: str, role: str) -> list[int] | None:
    packed = _packed(f"{name} labels")  # train800, then val200
    if packed is not None and role != "test":
        return packed[:800].tolist() if role == "train" else packed[800:].tolist()
    if name not in FOLDERS:
        return None
    split = getattr(CUTS[name], role).split
    keys, labels = from_folders(name, _official_files(name), split)
    return [labels[row] for row in CUTS[name].rows(role, list(keys))]


def sun397_split(keys: Iterable[str], split: str) -> tuple[list[str], list[int]]:
    """The keys `/a/abbey/sun_x.jpg` that TFDS's lists give to a split, and their labels.

    DataError, naming the class, if the keys of all splits are not the official ones.
    """
    classes = {}
    for key in sorted(set(keys) - {SUN397_UNUSED}):
        classes.setdefault(key.rpartition("/")[0], []).append(key)
    counts, codes = _packed("sun397 counts"), _packed("sun397 codes")
    if len(classes) != len(counts):
        raise DataError(f"sun397: {len(classes)} classes, not {len(counts)}: get SUN397 again")
    for name, count, code in zip(sorted(classes), counts, codes, strict=True):
        if len(classes[name]) != count:
            raise DataError(
                f"sun397: {name} has {len(classes[name])} images, not {count}: get SUN397 again"
            )
        if zlib.crc32("\n".join(classes[name]).encode()) & 0xFFFF != code:
            raise DataError(f"sun397: an image of {name} has another name: get SUN397 again")
    packed = _packed("sun397 splits")
    members = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).ravel()
    wanted = ("train", "validation", "test").index(split)
    found, labels, row = [], [], 0
    for label, name in enumerate(sorted(classes)):
        for key in classes[name]:
            if members[row] == wanted:
                found.append(key)
                labels.append(label)
            row += 1
    return found, labels


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
