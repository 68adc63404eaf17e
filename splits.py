"""The official VTAB-1k cut, from the originals' names or row numbers, without TensorFlow.

TensorFlow Datasets (TFDS) keeps every split of a data set sorted by the md5 of the split's name
followed by the example's key. VTAB-1k's 800 training, 200 validation and test images are slices
of that order (Zhai et al. 2019, arXiv 1910.04867). So names are enough to find them:

    tfds_order(["Forest_Forest_1.jpg", ...], "train")[:800]       # EuroSAT's train800

`VTAB` says where a task's slices start. splits.json has the sha256 of every slice's keys, joined by
newlines, and what outside lists confirm; splits.npz has what is long: labels, and the split of each
image of SUN397.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
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
        split, start, stop = getattr(self, role)
        if not self.ordered:
            return list(range(start, stop))
        row_of = {key: row for row, key in enumerate(keys)}
        return [row_of[key] for key in tfds_order(keys, split)[start:stop]]


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


# --- splits that TFDS makes -----------------------------------------------------------------------
FOLDERS = {  # one folder a class: rules of keys and files, images that are drawn for training
    "caltech101": ("{folder}/{file}", "image_{i:04}.jpg", 30),
    "eurosat": ("{folder}_{file}", "{folder}_{i}.jpg", None),
    "resisc45": ("{folder}_{file}", "{folder}_{i:03}.jpg", None),
}


def from_folders(name: str, files: dict[str, set[str]], split: str) -> tuple[dict, list[int]]:
    """{key: path} and labels of a split of a task of FOLDERS, given the files of each directory.

    Labels are by the directories' names, upper and lower case alike. TFDS's draw of Caltech101
    depends on their order: the official one, 3060 and 6084 images, has upper before lower case.
    """
    rule, _, count = FOLDERS[name]
    rng = np.random.RandomState(1234)
    classes = sorted(files, key=str.lower)
    paths, labels = {}, []
    for folder in sorted(files):
        # tmp is no image, but it was listed when the official draw was made
        extra = {"tmp"} if folder == "BACKGROUND_Google" else set()
        listed = sorted(files[folder] | extra)
        training = rng.choice(listed, count, replace=False).tolist() if count else listed
        training = set(training)
        for file in listed:
            if file.endswith(".jpg") and (file in training) == (split == "train"):
                paths[rule.format(folder=folder, file=file)] = f"{folder}/{file}"
                labels.append(classes.index(folder))
    return paths, labels


@cache
def _official_files(name: str) -> dict[str, set[str]]:
    files = {}
    _, rule, _ = FOLDERS[name]
    for folder, count in CONSTANTS["classes"][name].items():
        files[folder] = {rule.format(folder=folder, i=i) for i in range(1, count + 1)}
    return files


def sun397_split(keys: Iterable[str], split: str) -> tuple[list[str], list[int]]:
    """The keys `/a/abbey/sun_x.jpg` that TFDS's lists give to a split, and their labels.

    DataError, naming the class, if the keys of all splits are not as many as the official ones.
    """
    keys = sorted(set(keys) - {SUN397_UNUSED}, key=lambda key: key.rpartition("/"))
    folders = [key.rpartition("/")[0] for key in keys]
    classes, labels, counts = np.unique(folders, return_inverse=True, return_counts=True)
    official = _packed("sun397 counts")
    if len(classes) != len(official):
        raise DataError(f"sun397: {len(classes)} classes, not {len(official)}: get SUN397 again")
    for name, count, wanted in zip(classes, counts, official, strict=True):
        if count != wanted:
            raise DataError(f"sun397: {name} has {count} images, not {wanted}: get SUN397 again")
    packed = _packed("sun397 splits")  # four images a byte
    members = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).ravel()[: len(keys)]
    rows = np.flatnonzero(members == ("train", "validation", "test").index(split))
    return [keys[row] for row in rows], labels[rows].tolist()


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
        return (packed[:800] if role == "train" else packed[800:]).tolist()
    if name not in FOLDERS:
        return None
    split = getattr(CUTS[name], role).split
    keys, labels = from_folders(name, _official_files(name), split)
    return [labels[row] for row in CUTS[name].rows(role, list(keys))]


# --- readers: one split of TFDS of an original data set -------------------------------------------
@dataclass(frozen=True)
class Content:
    """A split of an original: `keys` (N), `labels` (N,), and images(rows), those rows' images as a
    list of paths or of encoded images (bytes), or as an array (len(rows), H, W) or
    (len(rows), H, W, 3) of uint8."""

    keys: Sequence
    labels: np.ndarray
    images: Callable[[list[int]], Sequence]


def in_files(folder: Path, names: Iterable[str], labels: Iterable[int], keys=None) -> Content:
    """Images in files below a folder; their keys are these names, or others."""
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
    return _below(root / "dtd/dtd/images", content._image_files, content._labels)


def flowers(root: Path, split: str) -> Content:
    content = datasets.Flowers102(root, {"validation": "val"}.get(split, split))
    return _below(root / "flowers-102/jpg", content._image_files, content._labels)


def pets(root: Path, split: str) -> Content:
    content = datasets.OxfordIIITPet(root, {"train": "trainval"}.get(split, split))
    return _below(root / "oxford-iiit-pet/images", content._images, content._labels)


def _below(folder: Path, paths: list[Path], labels: list[int]) -> Content:
    """Images whose keys are their paths from the folder."""
    return in_files(folder, [path.relative_to(folder).as_posix() for path in paths], labels)


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
    arrays = []
    for kind in ("dat", "info"):
        path = find(root, f"smallnorb-*-{name}-{kind}.mat*")
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        # int32: a magic number, the number of dimensions, the sizes, at least three; then values
        magic, ndim = np.frombuffer(raw, "<i4", 2)
        dtype = {0x1E3D4C55: "u1", 0x1E3D4C54: "<i4"}[magic]
        shape = np.frombuffer(raw, "<i4", ndim, offset=8)
        values = np.frombuffer(raw, dtype, np.prod(shape), offset=8 + 4 * max(3, ndim))
        arrays.append(values.reshape(shape))
    images, infos = arrays  # (N, 2 cameras, 96, 96) and (N, 4)
    return in_memory(images[:, 0], label(infos))


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
        drawn[name] = set(rng.choice(rest, count, replace=False).tolist())
        rest = sorted(set(rest) - drawn[name])
    drawn["train"] = set(rest)
    keys, labels = [], []
    for image, video in enumerate(videos):
        if video not in drawn[split]:
            continue
        distances = [1000.0]
        for line in regular(folder / f"{image:06d}.txt").read_text().splitlines():
            fields = line.split()
            if fields[0] in ("Car", "Van", "Truck"):
                distances.append(float(fields[13]))
        keys.append(f"{image:06d}.png")
        # to 8 m, to 20 m, farther, none
        labels.append(np.digitize(np.float32(min(distances)), [-100, 8, 20, 999], right=True) - 1)
    return in_files(folder.parent / "image_2", keys, labels)


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
                how = "scale all eyes to a radius of 300, take the local mean off, crop to 90 % (so"
                how += " 540 wide), save as JPEG of quality 72; or use --source prepared"
                raise DataError(f"{what}: {how}")
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
