"""The original data sets: one short reader each.

A reader reads one split of TFDS and opens no other's files where the original keeps them apart.
Originals lie in <root> as torchvision leaves them; what it does not know, up to 3 folders deeper.

    dtd(Path("data"), "train").keys                # those of TFDS's whole training split
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import mmap
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from files import regular
from images import find, lines, open_image, within
from splits import DataError, check_files, draw_kitti, from_folders, sun397_split


@dataclass(frozen=True)
class Content:
    """A split of an original: `keys` (N), `labels` (N,), and images(rows), those rows' images as a
    list of paths or of encoded images (bytes), or as an array (len(rows), H, W) or
    (len(rows), H, W, 3) of uint8."""

    keys: Sequence
    labels: np.ndarray
    images: Callable[[list[int]], Sequence]


def in_files(
    folder: Path, keys: list[str], labels: Iterable[int], names: list[str] | None = None
) -> Content:
    """Images in files below a folder, which have the names of the keys, or others."""
    names = names or keys

    def images(rows: list[int]) -> list[Path]:
        return [folder / names[row] for row in rows]

    return Content(keys, np.asarray(labels), images)


def in_memory(images: np.ndarray, labels: Iterable[int]) -> Content:
    """Images in an array, whose keys are their numbers."""
    return Content(range(len(images)), np.asarray(labels), lambda rows: images[rows])


def cifar(root: Path, split: str) -> Content:
    listed = datasets.CIFAR100.train_list if split == "train" else datasets.CIFAR100.test_list
    [[name, md5]] = listed
    path = regular(root / "cifar-100-python" / name)
    if not check_integrity(path, md5):  # a pickle can run code: only the publisher's is opened
        raise ValueError(f"{path.name} has another md5 than the published one")
    with open(path, "rb") as file:
        content = pickle.load(file, encoding="latin1")
    images = content["data"].reshape(-1, 3, 32, 32)
    images = images.transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
    return in_memory(images, content["fine_labels"])


def svhn(root: Path, split: str) -> Content:
    content = datasets.SVHN(root, split)
    images = content.data.transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
    return in_memory(images, content.labels)


def dtd(root: Path, split: str) -> Content:
    folder = root / "dtd" / "dtd"
    name = {"train": "train1", "validation": "val1", "test": "test1"}[split]
    classes = sorted(path.name for path in (folder / "images").iterdir() if path.is_dir())
    keys, labels = [], []
    for where, line in lines(folder / "labels" / f"{name}.txt"):
        label = line.split("/")[0]
        keys.append(within(line, where))
        if label not in classes:
            raise DataError(f"{where}: there is no class {label} in {folder / 'images'}")
        labels.append(classes.index(label))
    return in_files(folder / "images", keys, labels)


def flowers(root: Path, split: str) -> Content:
    from scipy.io import loadmat

    folder = root / "flowers-102"
    name = {"train": "trnid", "validation": "valid", "test": "tstid"}[split]
    numbers = loadmat(folder / "setid.mat")[name]
    numbers = numbers.ravel().astype(int)
    labels = loadmat(folder / "imagelabels.mat")["labels"]
    labels = labels.ravel().astype(int) - 1
    if numbers.min() < 1 or numbers.max() > len(labels):
        setid = folder / "setid.mat"
        raise DataError(f"{setid}: {name} names images outside 1..{len(labels)}")
    keys = [f"image_{number:05d}.jpg" for number in numbers]
    return in_files(folder / "jpg", keys, labels[numbers - 1])


def pets(root: Path, split: str) -> Content:
    folder = root / "oxford-iiit-pet"
    name = {"train": "trainval", "test": "test"}[split]
    keys, labels = [], []
    for where, line in lines(folder / "annotations" / f"{name}.txt"):
        fields = line.split()
        if len(fields) != 4 or not fields[1].isdecimal():
            raise DataError(f"{where}: expected '<name> <class> <species> <breed>', found {line!r}")
        keys.append(within(f"{fields[0]}.jpg", where))
        labels.append(int(fields[1]) - 1)
    return in_files(folder / "images", keys, labels)


def class_folders(root: Path, split: str, name: str, place: str) -> Content:
    folder = find(root, place)
    files = {}
    for path in folder.iterdir():
        if path.is_dir():
            files[path.name] = {image.name for image in path.iterdir()}
    check_files(name, files)
    names, labels = from_folders(name, files, split)
    return in_files(folder, list(names), labels, ["/".join(name) for name in names.values()])


def sun397(root: Path, split: str) -> Content:
    folder = find(root, "SUN397")
    found = []
    for path in folder.rglob("sun_*.jpg"):
        found.append(f"/{path.relative_to(folder).as_posix()}")
    keys, labels = sun397_split(found, split)
    return in_files(folder, keys, labels, [key[1:] for key in keys])


def pcam(root: Path, split: str) -> Content:
    import h5py

    name = {"train": "train", "validation": "valid", "test": "test"}[split]
    stem = f"camelyonpatch_level_2_split_{name}"
    with h5py.File(root / "pcam" / f"{stem}_y.h5") as file:
        labels = file["y"][:].ravel().astype(int)

    def images(rows: list[int]) -> np.ndarray:
        ascending, back = np.unique(rows, return_inverse=True)  # h5py reads ascending rows only
        with h5py.File(root / "pcam" / f"{stem}_x.h5") as file:
            return file["x"][ascending][back]

    return Content([f"{name}_{i}" for i in range(len(labels))], labels, images)


def dsprites(root: Path, split: str, label: Callable) -> Content:
    path = find(root, "dsprites_ndarray_*64x64.npz")
    with np.load(path) as file:
        images = file["imgs"]  # (N, 64, 64) of 0 and 1
        labels = label(file["latents_classes"])  # of (N, 6)
    in_file = in_memory(images, labels)
    return dataclasses.replace(in_file, images=lambda rows: images[rows] * np.uint8(255))


def smallnorb(root: Path, split: str, label: Callable) -> Content:
    name = {"train": "training", "test": "testing"}[split]
    images = _matrix(find(root, f"smallnorb-*-{name}-dat.mat*"))  # (N, 2 cameras, 96, 96)
    infos = _matrix(find(root, f"smallnorb-*-{name}-info.mat*"))
    return in_memory(images[:, 0], label(infos))


def _matrix(path: Path) -> np.ndarray:
    """A matrix file of small NORB: int32 magic number, number of dimensions, sizes; then values."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    magic, ndim = np.frombuffer(raw, "<i4", 2)
    kinds = {0x1E3D4C55: "u1", 0x1E3D4C54: "<i4"}
    if magic not in kinds or not 1 <= ndim <= 8:
        raise DataError(f"{path} is not a matrix file of small NORB: get it again")
    shape = np.frombuffer(raw, "<i4", ndim, offset=8)
    start = 8 + 4 * max(3, ndim)  # at least three sizes are written
    values = np.frombuffer(raw, kinds[magic], np.prod(shape), offset=start)
    return values.reshape(shape)


def clevr(root: Path, split: str, label: Callable) -> Content:
    folder = find(root, "CLEVR_v1.0")
    name = {"train": "train", "validation": "val"}[split]
    listing = folder / "scenes" / f"CLEVR_{name}_scenes.json"
    labels = {}
    for scene in json.loads(regular(listing).read_text())["scenes"]:
        key = within(scene["image_filename"], listing)
        labels[key] = label(scene["objects"])
    keys = sorted(labels)
    return in_files(folder / "images" / name, keys, [labels[key] for key in keys])


def kitti(root: Path, split: str, label: Callable) -> Content:
    folder = find(root, "training/label_2")
    devkit = find(root, "mapping/train_rand.txt").parent
    numbers = (devkit / "train_rand.txt").read_text().split(",")
    frames = (devkit / "train_mapping.txt").read_text().splitlines()
    videos = {}
    for image, number in enumerate(numbers):
        videos[image] = frames[int(number) - 1].split()[1]
    keys = draw_kitti(videos, split)
    labels = []
    for key in keys:
        listing = folder / f"{key[:6]}.txt"
        text = regular(listing).read_text()
        labels.append(label(text))
    return in_files(folder.parent / "image_2", keys, labels)


def retinopathy(root: Path, split: str) -> Content:
    folder = find(root, "trainLabels.csv").parent
    usage = {"train": None, "validation": "Public", "test": "Private"}[split]
    listing = "retinopathy_solution.csv" if usage else "trainLabels.csv"
    keys, labels = [], []
    with open(folder / listing, newline="") as file:
        for row in csv.DictReader(file):
            if row.get("Usage") == usage:
                keys.append(within(row["image"], folder / listing))
                labels.append(int(row["level"]))

    def images(rows: list[int]) -> list[Path]:
        paths = [folder / ("test" if usage else "train") / f"{keys[row]}.jpeg" for row in rows]
        for path in paths:
            image = open_image(path)
            width, height = image.size
            image.close()
            if width != 540 or height > 540:
                raise DataError(
                    f"{path} is {width} x {height}, not preprocessed as in TFDS's btgraham-300: "
                    "scale all eyes to a radius of 300, take the local mean off, crop to 90 % "
                    "(so 540 wide), save as JPEG of quality 72; or use --source prepared"
                )
        return paths

    return Content(keys, np.array(labels), images)


def dmlab(root: Path, split: str) -> Content:
    records = []
    folder = find(root, f"dmlab-{split}.tfrecord*").parent
    for path in sorted(folder.glob(f"dmlab-{split}.tfrecord*")):
        records += tf_records(path)
    examples = [tf_example(record[:-4]) for record in records]
    keys, labels = [], []
    for example in examples:
        keys.append(bytes(example["filename"]).decode())
        labels.append(example["label"])

    def images(rows: list[int]) -> list[bytes]:
        check_crc([records[row] for row in rows], folder)
        return [bytes(examples[row]["image"]) for row in rows]

    return Content(keys, np.array(labels), images)


def tf_records(path: Path) -> list[memoryview]:
    """The records of a TFRecord file, each with its crc behind it; checks those of the lengths."""
    with open(regular(path), "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(mapped)
    lengths, records = [], []
    start = 0
    while start < len(view):
        length = int.from_bytes(view[start : start + 8], "little")
        stop = start + 16 + length
        lengths.append(view[start : start + 12])
        records.append(view[start + 12 : stop])
        start = stop
    if start > len(view):
        raise DataError(f"{path} ends within a record: get it again")
    check_crc(lengths, path)
    return records


def check_crc(blocks: list[memoryview], path: Path) -> None:
    """DataError unless each block ends in the masked CRC-32C of the bytes before."""
    for first in range(0, len(blocks), 1000):
        some = blocks[first : first + 1000]
        stored = [int.from_bytes(block[-4:], "little") for block in some]
        crc = crc32c([block[:-4] for block in some])
        masked = (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)
        if masked.tolist() != stored:
            raise DataError(f"{path} has a record with a wrong checksum: get it again")


def crc32c(blocks: list[memoryview]) -> np.ndarray:
    """The CRC-32C of each block (at least 4 bytes), (N,) uint32: Python has no fast one."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        carried = np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
        table = table >> 1 ^ carried
    width = max(len(block) for block in blocks)
    padded = np.zeros((width, len(blocks)), np.uint8)
    for i, block in enumerate(blocks):
        content = padded[width - len(block) :, i]
        content[:] = np.frombuffer(block, np.uint8)
        # zeros before the block change nothing, as here the crc begins at 0; the right one begins
        # at ~0, which is the same as inverting the first four bytes
        content[:4] ^= 255
    crc = np.zeros(len(blocks), np.uint32)
    for byte in padded:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return ~crc


def tf_example(record: memoryview) -> dict:
    """{feature: its first value} of a serialised tf.train.Example, bytes or integer."""
    example = {}
    features = dict(_fields(record))[1]
    for _, entry in _fields(features):
        pair = dict(_fields(entry))  # 1: the name, 2: the feature
        [(kind, values)] = _fields(pair[2])  # 1: a list of bytes, 3: of integers
        value = dict(_fields(values))[1]
        if kind == 3 and isinstance(value, memoryview):
            value, _ = _varint(value, 0)  # packed
        example[bytes(pair[1]).decode()] = value
    return example


def _fields(message: memoryview) -> list[tuple]:
    """(number, value) of the fields of a protocol buffer: integers, and what has a length."""
    found = []
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        value, place = _varint(message, place)
        if tag & 7 == 2:
            start = place
            place += value
            value = message[start:place]
        found.append((tag >> 3, value))
    return found


def _varint(message: memoryview, place: int) -> tuple:
    """An integer of seven bits a byte, the lowest first, and the place behind it."""
    value, shift = 0, 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place
