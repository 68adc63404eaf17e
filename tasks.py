"""The table of tasks: what each is, where its images come from, how it is trained on.

    TASKS["dtd"].sizes                              # (800, 200, 1880): train, val and test
    read(TASKS["dtd"], Path("data"), ["train", "val"], "auto", download=True).images["train"]

Images come from the originals, cut and proven by splits.py; from a prepared folder; or from FGVC's
lists. Originals lie in <root> as torchvision leaves them; what it does not know, up to 3 folders
deeper.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import mmap
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

import splits
from splits import (
    CONSTANTS,
    CUTS,
    DataError,
    Missing,
    check_files,
    draw_kitti,
    from_folders,
    regular,
    sun397_split,
)

# what Pillow may open; it would start other programs for some (Ghostscript for EPS)
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
ARCHIVE = "1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p"  # all 19 tasks, on Google Drive
ROLE_NUMBER = {"train": 0, "val": 1, "test": 2}  # of a role in a task's sizes
Item = Path | bytes | np.ndarray  # a file, an encoded image, or pixels (H, W) or (H, W, 3) of uint8


# --- files and images -----------------------------------------------------------------------------


def open_image(item: Item) -> Image.Image:
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    file = io.BytesIO(item) if isinstance(item, bytes) else regular(item)
    return Image.open(file, formats=READABLE)


def image_format(item: Item, where: str) -> str:
    """The file format of an image, by its header; DataError, naming `where`, without one."""
    try:
        with open_image(item) as image:
            return image.format
    except Exception as error:  # whatever a damaged file makes Pillow raise
        absent = isinstance(error, FileNotFoundError)
        reason = "does not exist" if absent else f"is not a readable image ({type(error).__name__})"
        raise DataError(f"{where}: {name_of(item)} {reason}; unpack the archive again") from None


def name_of(item: Item) -> str:
    return str(item) if isinstance(item, Path) else "in its file"


def find(root: Path, pattern: str, depth: int = 4) -> Path | None:
    """The first match of a pattern in a folder and the levels below it, `depth` in all."""
    for level in range(depth):
        matches = root.glob("*/" * level + pattern)
        found = sorted(path for path in matches if path.is_file() or path.is_dir())
        if found:
            return found[0]
    return None


def lines(listing: Path) -> list[tuple[str, str]]:
    """("<file>, line <n>", line) of each line that is not blank; DataError without a file."""
    try:
        text = regular(listing).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "the folder is damaged, unpack it again"
        raise DataError(f"no list {listing} ({error}): {remedy}") from None
    numbered = enumerate(map(str.strip, text.splitlines()), 1)
    return [(f"{listing}, line {number}", line) for number, line in numbered if line]


def within(name: str, where: str | Path) -> str:
    """The relative path `name`, if it stays in its folder; else DataError."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name} leads out of the task's folder")
    return name


# --- readers: one split of TFDS of an original data set -------------------------------------------


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
    return replace(in_file, images=lambda rows: images[rows] * np.uint8(255))


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


# --- where a task's images come from --------------------------------------------------------------


@dataclass(frozen=True)
class Original:
    """Where original images are: `read(root, split)`, one of py; `place`: what must be in
    <root>; `get`: where from; `fetch`: torchvision's classes, which download; `needs`: packages;
    `note`: what a result should say of them."""

    read: Callable[[Path, str], Content]
    place: tuple[str, ...]
    get: str
    fetch: tuple[Callable, ...] = ()
    needs: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Found:
    """What a reader found, by role: `images` (paths, encoded images or an array) and `labels`; the
    names of its file `formats`; `digests`, sha256 of a slice's keys or labels in order; whether all
    that can be compared `agrees` with the official split; the number of unreadable images that were
    `left_out`; `title` and `notes` for people."""

    source: str
    title: str
    images: dict[str, Sequence] = field(default_factory=dict)
    labels: dict[str, Sequence[int]] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    digests: dict[str, str] = field(default_factory=dict)
    agrees: bool = True
    left_out: int = 0
    notes: list[str] = field(default_factory=list)


def read(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """By the task's own reader; DataError for files that the system does not let it read."""
    try:
        return task.read(task, root, roles, source, download)
    except OSError as error:  # no permission, a name that is too long, a folder in a file's place
        reason = error.strerror or error
        raise DataError(f"{task.name}: cannot read {error.filename}: {reason}") from error


def read_originals(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """The originals, cut by splits.py; DataError if the slices are not the official ones."""
    found, contents = Found("original", "originals"), {}
    found.notes += [task.original.note] if task.original.note else []
    cut = CUTS[task.name]
    for role in roles:
        split = getattr(cut, role).split
        if split not in contents:
            contents[split] = whole_split(task, root, split, download)
        content = contents[split]
        rows = cut.rows(role, content.keys)
        keys = [content.keys[row] for row in rows]
        labels = content.labels[rows]
        if cut.ordered:
            found.digests[splits.ROLES[role]] = splits.prove_keys(task.name, role, keys)
        if not 0 <= labels.min() <= labels.max() < task.classes:
            raise DataError(f"{task.name}: the originals have labels outside 0..{task.classes - 1}")
        proof = splits.prove_labels(task.name, role, labels)
        if proof.agrees is False or not splits.prove_histogram(task.name, role, labels):
            which = (
                f"that of {keys[proof.line - 1]} first"
                if proof.line
                else "by their count in each class"
            )
            raise DataError(
                f"{task.name}: labels of {splits.ROLES[role]} are not the official ones, {which}: "
                f"get the originals again ({task.original.get})"
            )
        found.labels[role] = labels
        found.images[role] = content.images(rows)
        if isinstance(found.images[role], np.ndarray):
            found.formats.add("raw")
            continue
        where = f"{task.name}: the originals are not whole"
        for image in found.images[role]:
            found.formats.add(image_format(image, where))
    return found


def whole_split(task, root: Path, split: str, download: bool = True) -> Content:
    """One split of a task's originals, whole; downloaded first if need be and possible.

    Raises Missing where the originals cannot be had, DataError where they are damaged.
    """
    original = task.original
    get(task.name, original, root, download)
    where = f"{task.name}: the originals"
    if original.place:
        where = f"{where} at {find(root, original.place[0])}"
    again = f"get them again ({original.get})"
    try:
        content = original.read(root, split)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise DataError(f"{where} are damaged ({_reason(error)}): {again}") from error
    count, distinct = CUTS[task.name].counts[split], len(set(content.keys))
    if not len(content.keys) == len(content.labels) == distinct == count:
        images = f"{distinct} {split} images and {len(content.labels)} labels, not {count}"
        raise DataError(f"{where} have {images}: remove them and {again}")
    return content


def _reason(error: Exception) -> str:
    """The first sentence of an error, or its name."""
    first = str(error).strip().split(". ")[0].splitlines()
    return first[0] if first else type(error).__name__


def get(name: str, original: Original, root: Path, download: bool) -> None:
    """Download originals if they are not there; Missing if that is not possible."""
    for package in original.needs:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{name}: reading the originals needs {package}: pip install {package}")
    depth = 1 if original.fetch else 4
    missing = [place for place in original.place if find(root, place, depth) is None]
    if not missing:
        return
    by_hand = f"no {root / missing[0]}: get it by hand from {original.get}"
    if not (original.fetch and download):
        raise Missing(f"{name}: {by_hand}")
    try:
        _fetch(name, original, root)
    except DataError:
        raise
    except Exception as error:  # whatever a broken download raises
        reason = _reason(error)
        raise Missing(f"{name}: the download failed ({reason}) and there is {by_hand}") from error


def _fetch(name: str, original: Original, root: Path) -> None:
    """Download into a new folder and move what is complete: what lies in <root> is whole."""
    top = root / original.place[0].split("/")[0]
    if top.is_dir():
        remedy = f"remove it, or complete it by hand from {original.get}"
        raise DataError(f"{name}: {top} is not complete: {remedy}")
    new = not root.exists()
    print(f"{name}: downloading {original.get} into {root}", flush=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as folder:
            for dataset in original.fetch:
                dataset(Path(folder), download=True)  # checks the archive's published md5
            for path in Path(folder).iterdir():
                os.replace(path, root / path.name)
    finally:
        socket.setdefaulttimeout(patience)
        if new and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def read_embedded(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """As read_originals; there is no other source, and people know it by its origin."""
    found = read_originals(task, root, roles, source, download)
    found.source, found.title = "embedded", task.origin
    found.formats.clear()
    return found


def join(images: list[Sequence]) -> Sequence:
    """Arrays or lists of images, one behind the other."""
    if isinstance(images[0], np.ndarray):
        return np.concatenate(images)
    return sum(images, [])


def read_vtab(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """The originals, or where they cannot be had, or at wish, the prepared folder."""
    folder = root / "vtab-1k" / task.name
    archive = f"unpack a prepared archive (Google Drive {ARCHIVE}) to {folder}"
    if source != "prepared":
        try:
            return read_originals(task, root, roles, source, download)
        except Missing as error:
            if source == "original":
                raise
            if not folder.is_dir():
                raise Missing(f"{error}; or {archive}") from None
            print(f"{error}; reading the prepared folder {folder} instead")
    if not folder.is_dir():
        raise Missing(f"{task.name}: no folder {folder}: {archive} or point --data-dir elsewhere")
    return read_prepared(task, folder, roles)


def read_prepared(task, folder: Path, roles: Iterable[str]) -> Found:
    """The folder that PEFT repositories pass around, compared with the official labels."""
    found = Found("prepared", "prepared folder")
    lists = {"train800.txt": ["train"], "val200.txt": ["val"]}
    if "test" in roles:
        lists = {"train800val200.txt": ["train", "val"], "test.txt": ["test"]}
    agreements = {_same_labels(folder)}
    if agreements == {False}:
        found.notes.append("train800val200.txt has other labels than train800.txt and val200.txt")
        found.agrees = False
    for name, in_list in lists.items():
        paths, labels = _prepared_list(task, folder / name, found.formats)
        count = sum(task.sizes[ROLE_NUMBER[role]] for role in in_list)
        is_other = in_list == ["test"] and len(paths) == splits.OTHER_DRAWS.get(task.name)
        if is_other:
            found.notes.append(f"{len(paths)} test images are another draw than the official one")
            found.agrees = False
        elif not paths or len(paths) > count or (len(paths) < count and in_list != ["test"]):
            raise DataError(
                f"{folder / name} has {len(paths)} images, VTAB-1k's {task.name} has {count}: "
                "unpack the archive again"
            )
        first = 0
        for role in in_list:
            stop = first + task.sizes[ROLE_NUMBER[role]] if len(in_list) > 1 else None
            found.images[role] = paths[first:stop]
            found.labels[role] = labels[first:stop]
            slice_name = splits.ROLES[role]
            found.digests[f"{slice_name} labels"] = splits.sha256(labels[first:stop])
            proof = splits.prove_labels(task.name, role, labels[first:stop])
            agreements.add(proof.agrees)
            if proof.agrees is False:
                line = f" at line {first + proof.line} of {name}" if proof.line else ""
                found.notes.append(f"labels of {slice_name} differ from the official split{line}")
                found.agrees = False
            first = stop
    if found.agrees:
        is_proven = agreements == {True}
        found.notes.append("official order confirmed" if is_proven else "order not proven")
    return found


def _same_labels(folder: Path) -> bool:
    """Whether the list of 1000 has the labels of the two that it joins, where all are there."""
    labels = {}
    for name in ("train800", "val200", "train800val200"):
        listing = folder / f"{name}.txt"
        if not listing.exists():
            return True
        labels[name] = [line.split()[-1] for _, line in lines(listing)]
    return labels["train800"] + labels["val200"] == labels["train800val200"]


def _prepared_list(task, listing: Path, formats: set[str]) -> tuple[list[Path], list[int]]:
    """Paths and labels of a list; adds the images' formats."""
    paths, labels = [], []
    for where, line in lines(listing):
        try:
            name, label = line.rsplit(None, 1)
            label = int(label)
        except ValueError:
            raise DataError(f"{where}: expected '<image> <label>', found {line!r}") from None
        if not 0 <= label < task.classes:
            raise DataError(f"{where}: label {label} is outside 0..{task.classes - 1}")
        path = listing.parent / within(name, where)
        formats.add(image_format(path, where))
        paths.append(path)
        labels.append(label)
    return paths, labels


def read_fgvc(task, root: Path, roles: Sequence[str], source: str, download: bool) -> Found:
    """VPT's layout: train.json, val.json, test.json; ids of all three, sorted, become 0..C-1."""
    folder = None
    for path in sorted((root / "fgvc").glob("*/")):
        if path.name.lower().replace("-", "_") in (task.name, *task.aliases):
            folder = folder or path
    by_hand = (
        f"put the images of {task.origin} into {root / 'fgvc' / task.name} and, beside them, "
        "train.json, val.json and test.json, which VPT's repository links to (github.com/KMnP/vpt)"
    )
    if folder is None and source != "prepared" and task.original:
        try:
            return read_originals(task, root, roles, source, download)
        except Missing as error:
            raise Missing(f"{error}; or {by_hand}") from None
    if folder is None:
        raise Missing(f"{task.name}: no folder {root / 'fgvc' / task.name}: {by_hand}")
    lists = {role: _fgvc_list(task, folder, role) for role in roles}
    ids = set().union(*(listed.values() for listed in lists.values()))
    if len(ids) < task.classes and "test" not in lists:  # else training alone knows all classes
        ids |= set(_fgvc_list(task, folder, "test").values())
    if len(ids) > task.classes:
        raise DataError(
            f"{folder}: the lists have {len(ids)} classes, {task.name} has {task.classes}"
        )
    class_of = {name: number for number, name in enumerate(sorted(ids))}
    found = Found("lists", "lists of VPT")
    for role, listed in lists.items():
        where = f"{folder / role}.json"
        found.labels[role] = [class_of[label] for label in listed.values()]
        found.images[role] = []
        for name in listed:
            places = [folder / sub / within(name, where) for sub in ("images", "Images", "")]
            there = [path for path in places if path.exists()] or places[-1:]
            found.formats.add(image_format(there[0], where))
            found.images[role].append(there[0])
    return found


def _fgvc_list(task, folder: Path, role: str) -> dict[str, int]:
    listing = folder / f"{role}.json"
    try:
        listed = json.loads(regular(listing).read_text(encoding="utf-8-sig"))
        if not listed or not all(type(label) is int for label in listed.values()):
            raise ValueError("a class is no integer, or the list is empty")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{listing} is no list like {{'<image>': <class>}} ({error}): get it again"
        ) from None
    count = task.sizes[ROLE_NUMBER[role]]
    if len(listed) > count:
        raise DataError(f"{listing} has {len(listed)} images, {task.name} has {count}")
    return listed


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A row of the table. `sizes`: images of train, val and test, None if it has what is there;
    `origin`: where the original images are from; `verified`: what outside lists agree with our
    split; `read(task, root, roles, source, download)`: its reader; `recipe`: train.py's flags if
    left out; `original`: its original data set, where we can read that; `sources`: the sources that
    it can be read from; `class_names`: None where unknown; `upright`: whether its images are turned
    as their EXIF data say; `folder`: where they are, if it is a folder of one's own."""

    name: str
    benchmark: str
    group: str
    classes: int
    sizes: tuple[int, int, int] | None
    origin: str
    aliases: tuple[str, ...]
    verified: str
    read: Callable[..., Found]
    recipe: dict
    original: Original | None
    sources: tuple[str, ...] = ("auto",)
    class_names: tuple[str, ...] | None = None
    upright: bool = False
    folder: str | None = None

    @property
    def argument(self) -> str:
        """What --dataset calls it."""
        return self.folder or self.name


def _edges(edges: list[float], value: float) -> int:
    """The largest i with edges[i] < value, in float32 as in VTAB's code."""
    return int(np.searchsorted(np.float32(edges), np.float32(value), side="left")) - 1


def clevr_count(objects: list[dict]) -> int:
    """The class 0..7 of the number of objects."""
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


# What a task's flags are if left out. vtab-1k and fgvc: the field's common recipe (AdapterPlus) on
# the MLAE paper's backbone, but no drop-path: theirs, 0.1, costs 10 to 12 points of val200 in 5
# epochs and 6 in 10, though none in 20 without masks (results/length). The rate is for 100 epochs;
# in 10 the best was 4e-3 with masks, 4e-3 or 8e-3 without (results/real). The demo's was chosen on
# val200 (results/masking).
COMMON = {"model": "vit_base_patch16_224.orig_in21k", "epochs": 100, "lr": 1e-3, "drop_path": 0.0}
COMMON |= {"augment": "none"}
FGVC = COMMON | {"augment": "crop"}
DEMO = {"model": "vit_nano", "epochs": 20, "lr": 8e-3, "drop_path": 0.0, "augment": "none"}
PRETRAINING = DEMO | {"epochs": 12, "lr": 1e-3, "drop_path": 0.1}


def _vtab(group, name, classes, aliases, reader, place, get, *fetch, needs="", note="") -> Task:
    """A row of VTAB-1k; names in `aliases`, `place` and `needs` have spaces between."""
    original = Original(reader, tuple(place.split()), get, fetch, tuple(needs.split()), note)
    sizes, verified = CUTS[name].sizes(), CONSTANTS["evidence"][name]
    names = tuple(aliases.split())
    row = name, "vtab-1k", group, classes, sizes, get, names, verified, read_vtab
    return Task(*row, COMMON, original, ("original", "prepared"))


def _fgvc(group, name, classes, sizes, origin, aliases="", original=None) -> Task:
    verified = "originals" if original else "counts only"
    row = name, "fgvc", group, classes, sizes, origin, tuple(aliases.split()), verified, read_fgvc
    return Task(*row, FGVC, original)


def _demo(name, benchmark, recipe, origin, aliases, original) -> Task:
    row = name, benchmark, "demo", 10, CUTS[name].sizes(), origin, aliases, "", read_embedded
    return Task(*row, recipe, original)


def digits(root: Path, split: str) -> Content:
    with np.load(Path(__file__).resolve().parent / "demo" / "digits.npz") as file:
        return in_memory(file["images"], file["labels"])


def fashion_mnist(root: Path, split: str) -> Content:
    content = datasets.FashionMNIST(root, train=split == "train")
    return in_memory(content.data.numpy(), content.targets)


# fmt: off
_folders = class_folders
_PCAM = "pcam/camelyonpatch_level_2_split_"
_CLEVR = "CLEVR_v1.0", "https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip (19 GB)"
_DSPRITES = ("dsprites_ndarray_*64x64.npz",
             "https://github.com/google-deepmind/dsprites-dataset (the .npz file)")
_NORB = ("smallnorb-*-training-dat.mat* smallnorb-*-training-info.mat* "
         "smallnorb-*-testing-dat.mat* smallnorb-*-testing-info.mat*",
         "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/ (dat and info, training and testing)")
_FLOWERS = ("flowers-102/jpg flowers-102/setid.mat flowers-102/imagelabels.mat",
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (345 MB: 102flowers.tgz, "
            "setid.mat, imagelabels.mat)", datasets.Flowers102)
TABLE = [
    _vtab("natural", "cifar", 100, "cifar100 cifar_100", cifar, "cifar-100-python",
          "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (169 MB)", datasets.CIFAR100),
    _vtab("natural", "caltech101", 102, "caltech caltech_101",
          partial(_folders, name="caltech101", place="caltech101/101_ObjectCategories"),
          "caltech101/101_ObjectCategories",
          "https://data.caltech.edu/records/mzrjq-6wc02 (137 MB: 101_ObjectCategories.tar.gz)",
          datasets.Caltech101),
    _vtab("natural", "dtd", 47, "describable_textures", dtd, "dtd/dtd",
          "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz (625 MB)",
          datasets.DTD),
    _vtab("natural", "oxford_flowers102", 102, "flowers102 vtab_flowers", flowers,
          *_FLOWERS, needs="scipy"),
    _vtab("natural", "oxford_iiit_pet", 37, "pets pet oxford_pet oxford_pets", pets,
          "oxford-iiit-pet/images oxford-iiit-pet/annotations",
          "https://www.robots.ox.ac.uk/~vgg/data/pets/ (811 MB: images.tar.gz, annotations.tar.gz)",
          datasets.OxfordIIITPet),
    _vtab("natural", "svhn", 10, "svhn_cropped", svhn, "train_32x32.mat test_32x32.mat",
          "http://ufldl.stanford.edu/housenumbers/ (246 MB: train_32x32.mat, test_32x32.mat)",
          partial(datasets.SVHN, split="train"), partial(datasets.SVHN, split="test"),
          needs="scipy"),
    _vtab("natural", "sun397", 397, "sun sun_397", sun397, "SUN397",
          "https://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz (37 GB)",
          note="at full size, which TFDS shrinks to 120,000 pixels"),
    _vtab("specialized", "patch_camelyon", 2, "camelyon pcam", pcam,
          f"{_PCAM}train_x.h5 {_PCAM}train_y.h5 {_PCAM}valid_x.h5 {_PCAM}valid_y.h5 "
          f"{_PCAM}test_x.h5 {_PCAM}test_y.h5",
          "https://zenodo.org/record/2546921 (8 GB: six .h5.gz files, to be unpacked)",
          *[partial(datasets.PCAM, split=split) for split in ("train", "val", "test")],
          needs="h5py"),
    _vtab("specialized", "eurosat", 10, "euro_sat",
          partial(_folders, name="eurosat", place="eurosat/2750"), "eurosat/2750",
          "https://huggingface.co/datasets/torchgeo/eurosat (94 MB: EuroSAT.zip)",
          datasets.EuroSAT),
    _vtab("specialized", "resisc45", 45, "resisc",
          partial(_folders, name="resisc45", place="NWPU-RESISC45"), "NWPU-RESISC45",
          "https://1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs (NWPU-RESISC45.rar)"),
    _vtab("specialized", "diabetic_retinopathy", 5, "retinopathy", retinopathy,
          "trainLabels.csv retinopathy_solution.csv",
          "https://www.kaggle.com/c/diabetic-retinopathy-detection (trainLabels.csv, images, to be "
          "preprocessed, in train/ and test/) and https://storage.googleapis.com/"
          "kaggle-forum-message-attachments/90528/2877/retinopathy_solution.csv"),
    _vtab("structured", "clevr_count", 8, "clevr_count_all",
          partial(clevr, label=clevr_count), *_CLEVR),
    _vtab("structured", "clevr_dist", 6, "clevr_closest clevr_distance",
          partial(clevr, label=clevr_distance), *_CLEVR),
    _vtab("structured", "dmlab", 6, "", dmlab,
          "dmlab-train.tfrecord* dmlab-validation.tfrecord* dmlab-test.tfrecord*",
          "https://storage.googleapis.com/dmlab-vtab/dmlab.tar.gz (3 GB)"),
    _vtab("structured", "kitti", 4, "kitti_dist kitti_distance",
          partial(kitti, label=kitti_distance),
          "training/image_2 training/label_2 mapping/train_rand.txt mapping/train_mapping.txt",
          "https://www.cvlibs.net/datasets/kitti/eval_object.php (left colour images, labels, "
          "devkit: 13 GB)"),
    _vtab("structured", "dsprites_loc", 16, "dsprites_location dsprites_position",
          partial(dsprites, label=lambda found: found[:, 4] // 2), *_DSPRITES),
    _vtab("structured", "dsprites_ori", 16, "dsprites_orientation",
          partial(dsprites, label=lambda found: found[:, 3] * 2 // 5), *_DSPRITES),
    _vtab("structured", "smallnorb_azi", 18, "smallnorb_azimuth",
          partial(smallnorb, label=lambda infos: infos[:, 2] // 2), *_NORB),
    _vtab("structured", "smallnorb_ele", 9, "smallnorb_elevation",
          partial(smallnorb, label=lambda infos: infos[:, 1]), *_NORB),
    _fgvc("birds", "cub", 200, (5394, 600, 5794), "CUB-200-2011", "cub200 cub_200_2011"),
    _fgvc("birds", "nabirds", 555, (21536, 2393, 24633), "NABirds"),
    _fgvc("flowers", "oxford_flowers", 102, (1020, 1020, 6149), "Oxford Flowers 102",
          "fgvc_flowers oxfordflower",
          Original(flowers, tuple(_FLOWERS[0].split()), _FLOWERS[1], _FLOWERS[2:],
                   ("scipy",))),
    _fgvc("dogs", "stanford_dogs", 120, (10800, 1200, 8580), "Stanford Dogs", "dogs"),
    _fgvc("cars", "stanford_cars", 196, (7329, 815, 8041), "Stanford Cars", "cars"),
    _demo("digits", "demo", DEMO, "embedded UCI handwritten digits", (),
          Original(digits, (), "this repository")),
    _demo("fashion_mnist", "pretraining", PRETRAINING, "Fashion-MNIST", ("fashion",),
          Original(fashion_mnist, ("FashionMNIST/raw/train-images-idx3-ubyte",),
                   "https://github.com/zalandoresearch/fashion-mnist (30 MB: four files, unpacked)",
                   (datasets.FashionMNIST,))),
]
# fmt: on
TASKS: dict[str, Task] = {task.name: task for task in TABLE}
