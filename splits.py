"""Which image is of which split: VTAB-1k's official cut, and how a folder of photos is split.

TensorFlow Datasets (TFDS) keeps every split of a data set sorted by the md5 of the split's name
followed by the example's key. VTAB-1k's 800 training, 200 validation and test images are slices
of that order (Zhai et al. 2019, arXiv 1910.04867). So names are enough to find them:

    tfds_order(["Forest_Forest_1.jpg", ...], "train")[:800]       # EuroSAT's train800

splits.json has the sha256 of every slice's keys, joined by newlines, what outside lists confirm,
and where originals are; splits.npz has labels, and the split of each image of SUN397.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision import datasets

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


def nfc(name: str) -> str:
    """A file's name as every system writes it: a Mac takes the dots off its letters (NFD)."""
    return unicodedata.normalize("NFC", name)


def printable(text: str) -> str:
    """The text in one line, with escapes for what a terminal would act on."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def sha256(values: Iterable) -> str:
    """The sha256 of values joined by newlines, in hex."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()


def find(root: Path, pattern: str, depth: int = 4) -> Path | None:
    """The first match of a pattern in a folder and the levels below it, `depth` in all."""
    levels = (sorted(root.glob("*/" * level + pattern)) for level in range(depth))
    return next((found[0] for found in levels if found), None)


def within(name: str, where: str | Path) -> str:
    """The relative path `name`, if it stays in its folder; else DataError."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name} leads out of the task's folder")
    return name


# --- order and slices -----------------------------------------------------------------------------
def tfds_order(keys: Iterable, split: str) -> list:
    """The keys (str or int) in the order in which TFDS stores the split "train", "validation" or
    "test": by md5(split + str(key)) in UTF-8, as a big-endian integer, that is by its bytes."""

    def place(key) -> bytes:
        return hashlib.md5(f"{split}{key}".encode(), usedforsecurity=False).digest()

    return sorted(keys, key=place)


class Cut(NamedTuple):
    """How a task is cut from its originals: for each part a split of TFDS, start and stop in it, in
    TFDS's order or, if not `ordered`, in that of the original lists."""

    val: tuple[str, int, int]
    test: tuple[str, int, int]
    train: tuple[str, int, int] = ("train", 0, 800)
    ordered: bool = True

    def sizes(self) -> tuple[int, int, int]:
        """Images of train, val and test."""
        return tuple(stop - start for _, start, stop in (self.train, self.val, self.test))

    def rows(self, role: str, keys: Sequence) -> list[int]:
        """The row numbers of the slice "train", "val" or "test", given its split's keys."""
        split, start, stop = getattr(self, role)
        row_of = {key: row for row, key in enumerate(keys)}
        order = tfds_order(keys, split) if self.ordered else keys
        return [row_of[key] for key in order[start:stop]]


CUTS = {  # val and test; train is the first 800 of TFDS's "train" where nothing else is said
    "cifar": Cut(("train", 45000, 45200), ("test", 0, 10000)),
    "caltech101": Cut(("train", 2754, 2954), ("test", 0, 6084)),
    "dtd": Cut(("validation", 0, 200), ("test", 0, 1880)),
    "oxford_flowers102": Cut(("validation", 0, 200), ("test", 0, 6149)),
    "oxford_iiit_pet": Cut(("train", 2944, 3144), ("test", 0, 3669)),
    "svhn": Cut(("train", 65931, 66131), ("test", 0, 26032)),
    "sun397": Cut(("validation", 0, 200), ("test", 0, 21750)),
    "patch_camelyon": Cut(("validation", 0, 200), ("test", 0, 32768)),
    "eurosat": Cut(("train", 16200, 16400), ("train", 21600, 27000)),
    "resisc45": Cut(("train", 18900, 19100), ("train", 25200, 31500)),
    "diabetic_retinopathy": Cut(("validation", 0, 200), ("test", 0, 42670)),
    "clevr_count": Cut(("train", 63000, 63200), ("validation", 0, 15000)),
    "clevr_dist": Cut(("train", 63000, 63200), ("validation", 0, 15000)),
    "dmlab": Cut(("validation", 0, 200), ("test", 0, 22735)),
    "kitti": Cut(("validation", 0, 200), ("test", 0, 711)),
    "dsprites_loc": Cut(("train", 589824, 590024), ("train", 663552, 737280)),
    "dsprites_ori": Cut(("train", 589824, 590024), ("train", 663552, 737280)),
    "smallnorb_azi": Cut(("test", 0, 200), ("test", 12150, 24300)),
    "smallnorb_ele": Cut(("test", 0, 200), ("test", 12150, 24300)),
    "oxford_flowers": Cut(("validation", 0, 1020), ("test", 0, 6149), ("train", 0, 1020), False),
    "digits": Cut(("train", 800, 1000), ("train", 1000, 1797), ordered=False),
    "fashion_mnist": Cut(("train", 50000, 60000), ("test", 0, 10000), ("train", 0, 50000), False),
}


# --- splits that TFDS makes -----------------------------------------------------------------------
FOLDERS = {  # one folder a class: the rule of keys, and the images that are drawn for training
    "caltech101": ("{folder}/{file}", 30),
    "eurosat": ("{folder}_{file}", None),
    "resisc45": ("{folder}_{file}", None),
}


def from_folders(name: str, files: dict[str, set[str]], split: str) -> tuple[dict, list[int]]:
    """{key: path} and labels of a split of a task of FOLDERS, given the files of each directory.
    Labels are by the directories' names, upper and lower case alike. TFDS's draw of Caltech101
    depends on their order: the official one, 3060 and 6084 images, has upper before lower case."""
    rule, count = FOLDERS[name]
    rng = np.random.RandomState(1234)
    classes = sorted(files, key=str.lower)
    paths, labels = {}, []
    for folder in sorted(files):
        # tmp is no image, but it was listed when the official draw was made
        extra = {"tmp"} if folder == "BACKGROUND_Google" else set()
        listed = sorted(files[folder] | extra)
        training = set(rng.choice(listed, count, replace=False).tolist() if count else listed)
        for file in listed:
            if file.endswith(".jpg") and (file in training) == (split == "train"):
                paths[rule.format(folder=folder, file=file)] = f"{folder}/{file}"
                labels.append(classes.index(folder))
    return paths, labels


def sun397_split(keys: Iterable[str], split: str) -> tuple[list[str], list[int]]:
    """The keys `/a/abbey/sun_x.jpg` that TFDS's lists give to a split, and their labels; DataError
    if the classes of all splits have not as many images as the official ones."""
    keys = sorted(set(keys) - {SUN397_UNUSED}, key=lambda key: key.rpartition("/"))
    folders = [key.rpartition("/")[0] for key in keys]
    _, labels, counts = np.unique(folders, return_inverse=True, return_counts=True)
    official = _packed("sun397 counts")
    if not np.array_equal(counts, official):
        found = f"{len(keys)} images in {len(counts)} classes"
        wanted = f"the official {official.sum()} in {len(official)}"
        raise DataError(f"sun397: {found} are not {wanted}: get SUN397 again")
    packed = _packed("sun397 splits")  # four images a byte
    members = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).ravel()[: len(keys)]
    rows = np.flatnonzero(members == ("train", "validation", "test").index(split))
    return [keys[row] for row in rows], labels[rows].tolist()


# --- folders of one's own that do not say how they are split --------------------------------------
@dataclass(frozen=True)
class FolderSplit:
    """The share of each class's images for the test, that of its training images for --val, the
    seed of both; and whether bad images are left out."""

    test_share: float = 0.2
    val_share: float = 0.2
    seed: int = 0
    skip_bad: bool = False

    def draw(self, folder: Path, files: Sequence[Path], share: float) -> set[Path]:
        """A share of the files of a class: one or more, but never the last. It is drawn by their
        names below the folder, so that new images move few others."""

        def place(file: Path) -> bytes:
            name = nfc(file.relative_to(folder).as_posix())
            return hashlib.sha256(os.fsencode(f"{self.seed} {name}")).digest()

        count = min(max(1, round(share * len(files))), len(files) - 1)
        return set(sorted(files, key=place)[:count])


# --- proofs ---------------------------------------------------------------------------------------
@cache
def _packed(name: str) -> np.ndarray | None:
    with np.load(FOLDER / "splits.npz") as file:
        return file.get(name)


def prove_keys(name: str, role: str, keys: Sequence) -> str:
    """The sha256 of a slice's keys in order; DataError if it is known to be another one."""
    digest = sha256(keys)
    if CONSTANTS["keys"].get(name, {}).get(ROLES[role], digest) != digest:
        wrong = f"{name}: {ROLES[role]} is not the official one, names of its {len(keys)} images"
        raise DataError(f"{wrong} or their order differ: get the originals and their lists again")
    return digest


class Proof(NamedTuple):
    agrees: bool | None  # None: the official labels are not known
    line: int | None = None  # from 1, of the first label that does not


def prove_labels(name: str, role: str, labels: Sequence[int]) -> Proof:
    """Compare labels of a slice, or of its beginning, with the official ones in TFDS's order."""
    _, start, stop = getattr(CUTS[name], role)
    digests = CONSTANTS["labels"].get(name, {}).get(ROLES[role])
    if digests:  # of TFDS's order, and of that in which it reads several files side by side
        return Proof(sha256(labels) in digests if len(labels) == stop - start else None)
    packed = _packed(f"{name} labels")  # of train800, val200 and, where known, test
    first = {"train": 0, "val": 800, "test": 1000}[role]
    if packed is None or first == len(packed):
        return Proof(None)
    for line, (found, wanted) in enumerate(zip(labels, packed[first:], strict=False), 1):
        if found != wanted:
            return Proof(False, line)
    return Proof(True)


# --- readers: one split of TFDS of an original data set -------------------------------------------
@dataclass(frozen=True)
class Content:
    """A split of an original: `keys` (N), `labels` (N,), and images(rows), those rows' images as a
    list of paths or of encoded images (bytes), or as an array (len(rows), H, W) or
    (len(rows), H, W, 3) of uint8."""

    keys: Sequence
    labels: np.ndarray
    images: Callable[[list[int]], Sequence]


def in_files(folder: Path, names: Iterable, labels: Iterable[int], keys=None) -> Content:
    """Images in files below a folder; their keys are their paths from there, or others."""
    names = [(folder / name).relative_to(folder).as_posix() for name in names]
    names = [within(name, folder) for name in names]
    return Content(keys or names, np.array(labels), lambda rows: [folder / names[i] for i in rows])


def in_memory(images: np.ndarray, labels: Iterable[int]) -> Content:
    """Images in an array, whose keys are their numbers."""
    return Content(range(len(images)), np.array(labels), lambda rows: images[rows])


def digits(root: Path, split: str) -> Content:
    with np.load(FOLDER / "demo" / "digits.npz") as file:
        return in_memory(file["images"], file["labels"])


def fashion_mnist(root: Path, split: str) -> Content:
    content = datasets.FashionMNIST(root, train=split == "train")
    return in_memory(content.data.numpy(), content.targets)


def cifar(root: Path, split: str) -> Content:
    # checks the md5 first: a pickle can run code, only the publisher's is opened
    content = datasets.CIFAR100(root, train=split == "train")
    return in_memory(content.data, content.targets)  # (N, 32, 32, 3)


def svhn(root: Path, split: str) -> Content:
    content = datasets.SVHN(root, split)
    return in_memory(content.data.transpose(0, 2, 3, 1), content.labels)  # (N, 32, 32, 3)


def dtd(root: Path, split: str) -> Content:
    content = datasets.DTD(root, {"validation": "val"}.get(split, split), partition=1)
    return in_files(root / "dtd/dtd/images", content._image_files, content._labels)


def flowers(root: Path, split: str) -> Content:
    content = datasets.Flowers102(root, {"validation": "val"}.get(split, split))
    return in_files(root / "flowers-102/jpg", content._image_files, content._labels)


def pets(root: Path, split: str) -> Content:
    content = datasets.OxfordIIITPet(root, {"train": "trainval"}.get(split, split))
    return in_files(root / "oxford-iiit-pet/images", content._images, content._labels)


def class_folders(root: Path, split: str, name: str, place: str) -> Content:
    folder = find(root, place)
    files = {}
    for path in folder.iterdir():
        if path.is_dir():
            files[path.name] = {image.name for image in path.iterdir()}
    paths, labels = from_folders(name, files, split)
    return in_files(folder, paths.values(), labels, [*paths])


def sun397(root: Path, split: str) -> Content:
    folder = find(root, "SUN397")
    found = [f"/{path.relative_to(folder).as_posix()}" for path in folder.rglob("sun_*.jpg")]
    keys, labels = sun397_split(found, split)
    return in_files(folder, [key[1:] for key in keys], labels, keys)


def pcam(root: Path, split: str) -> Content:
    import h5py

    name = {"validation": "valid"}.get(split, split)
    stem = root / "pcam" / f"camelyonpatch_level_2_split_{name}"
    with h5py.File(f"{stem}_y.h5") as file:
        labels = file["y"][:].ravel().astype(int)

    def images(rows: list[int]) -> np.ndarray:
        ascending, back = np.unique(rows, return_inverse=True)  # h5py reads ascending rows only
        with h5py.File(f"{stem}_x.h5") as file:
            return file["x"][ascending][back]

    return Content([f"{name}_{i}" for i in range(len(labels))], labels, images)


def dsprites(root: Path, split: str, label: Callable) -> Content:
    with np.load(find(root, "dsprites_ndarray_*64x64.npz")) as file:
        images = file["imgs"]  # (N, 64, 64) of 0 and 1
        labels = label(file["latents_classes"])  # of (N, 6)
    return Content(range(len(images)), labels, lambda rows: images[rows] * np.uint8(255))


def smallnorb(root: Path, split: str, label: Callable) -> Content:
    name = {"train": "training", "test": "testing"}[split]

    def values(kind: str, dtype: str) -> np.ndarray:
        path = find(root, f"smallnorb-*-{name}-{kind}.mat*")
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        # int32: a magic number, the number of dimensions, the sizes, at least three; then values
        ndim = int.from_bytes(raw[4:8], "little")
        shape = np.frombuffer(raw, "<i4", ndim, offset=8)
        return np.frombuffer(raw, dtype, np.prod(shape), 8 + 4 * max(3, ndim)).reshape(shape)

    images = values("dat", "u1")  # (N, 2 cameras, 96, 96)
    return in_memory(images[:, 0], label(values("info", "<i4")))  # of (N, 4)


def clevr(root: Path, split: str, label: Callable) -> Content:
    folder = find(root, "CLEVR_v1.0")
    name = {"train": "train", "validation": "val"}[split]
    listing = regular(folder / "scenes" / f"CLEVR_{name}_scenes.json")
    scenes = json.loads(listing.read_text())["scenes"]
    labels = {scene["image_filename"]: label(scene["objects"]) for scene in scenes}
    keys = sorted(labels)
    return in_files(folder / "images" / name, keys, [labels[key] for key in keys])


def clevr_distance(objects: list[dict]) -> int:
    """The class 0..5 of the distance of the object nearest to the camera, in float32 as VTAB's."""
    nearest = np.float32(min(item["pixel_coords"][2] for item in objects))
    return np.digitize(nearest, [0, 8, 8.5, 9, 9.5, 10, 100], right=True) - 1


def kitti(root: Path, split: str) -> Content:
    folder = find(root, "training/label_2")
    devkit = find(root, "mapping/train_rand.txt").parent
    numbers = (devkit / "train_rand.txt").read_text().split(",")
    frames = (devkit / "train_mapping.txt").read_text().splitlines()
    videos = [frames[int(number) - 1].split()[1] for number in numbers]  # of each image
    # TFDS draws a tenth of the videos for testing, then as many for validation
    rng = np.random.RandomState(123)
    drawn, rest = {}, sorted(set(videos))
    count = max(1, len(rest) // 10)
    for name in ("test", "validation"):
        drawn[name] = rng.choice(rest, count, replace=False).tolist()
        rest = sorted(set(rest) - set(drawn[name]))
    drawn["train"] = rest
    images = [image for image, video in enumerate(videos) if video in drawn[split]]
    labels = []
    for image in images:
        distances = [1000.0]
        for line in regular(folder / f"{image:06d}.txt").read_text().splitlines():
            fields = line.split()
            if fields[0] in ("Car", "Van", "Truck"):
                distances.append(float(fields[13]))
        # to 8 m, to 20 m, farther, none
        labels.append(np.digitize(np.float32(min(distances)), [-100, 8, 20, 999], right=True) - 1)
    return in_files(folder.parent / "image_2", [f"{image:06d}.png" for image in images], labels)


def retinopathy(root: Path, split: str) -> Content:
    folder = find(root, "trainLabels.csv").parent
    usage = {"train": None, "validation": "Public", "test": "Private"}[split]
    part, listing = ("test", "retinopathy_solution.csv") if usage else ("train", "trainLabels.csv")
    with open(regular(folder / listing), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("Usage") == usage]
    keys, labels = [row["image"] for row in rows], [int(row["level"]) for row in rows]
    content = in_files(folder / part, [f"{key}.jpeg" for key in keys], labels, keys)

    def images(rows: list[int]) -> list[Path]:
        paths = content.images(rows)
        for path in paths:
            width, height = Image.open(regular(path), formats=["JPEG"]).size
            if width != 540 or height > 540:
                what = f"{path} is {width} x {height}, not preprocessed as in TFDS's btgraham-300"
                raise DataError(f"{what}: see docs/data.md, or use --source prepared")
        return paths

    return Content(keys, content.labels, images)


def dmlab(root: Path, split: str) -> Content:
    folder = find(root, f"dmlab-{split}.tfrecord*").parent
    examples = []
    for path in sorted(folder.glob(f"dmlab-{split}.tfrecord*")):
        file, start = memoryview(np.memmap(regular(path), mode="r")), 0
        while start < len(file):  # 8 bytes of length, a crc of 4, the record, a crc of 4
            stop = start + 16 + int.from_bytes(file[start : start + 8], "little")
            if stop > len(file):
                raise ValueError(f"{path.name} ends within a record")
            examples.append(_example(file[start + 12 : stop - 4]))
            start = stop
    keys = [bytes(example["filename"]).decode() for example in examples]
    labels = np.array([example["label"] for example in examples])
    return Content(keys, labels, lambda rows: [bytes(examples[row]["image"]) for row in rows])


def _example(record: memoryview) -> dict:
    """{feature: its first value} of a serialised tf.train.Example, bytes or integer."""
    example = {}
    for _, entry in _fields(dict(_fields(record))[1]):
        pair = dict(_fields(entry))  # 1: the name, 2: the feature
        [(kind, values)] = _fields(pair[2])  # 1: a list of bytes, 3: of integers
        value = dict(_fields(values))[1]
        if kind == 3 and isinstance(value, memoryview):
            [value] = value  # packed; a label, below 128, is one byte
        example[bytes(pair[1]).decode()] = value
    return example


def _fields(message: memoryview) -> list[tuple]:
    """(number, value) of the fields of a protocol buffer: integers, and what has a length."""
    found, place = [], 0

    def integer() -> int:  # seven bits a byte, the lowest first
        nonlocal place
        value = shift = 0
        while message[place] > 127:
            value |= (message[place] & 127) << shift
            shift, place = shift + 7, place + 1
        place += 1
        return value | message[place - 1] << shift

    while place < len(message):
        tag, value = integer(), integer()
        if tag & 7 == 2:
            start, place = place, place + value
            value = message[start:place]
        found.append((tag >> 3, value))
    return found
