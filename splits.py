"""The official VTAB-1k splits, rebuilt from the original images without TensorFlow.

TensorFlow Datasets keeps every split of a data set sorted by the md5 of the split's name followed by the example's
key, and VTAB-1k's 800 training, 200 validation and test images are slices of that order (Zhai et al. 2019, arXiv
1910.04867). So the file names, or the row numbers, of the originals are enough to find them:

    tfds_order(["Forest_Forest_1.jpg", ...], "train")[:800]       # EuroSAT's train800

Originals lie in <root> as torchvision's classes leave them, which also download eight of them; dSprites, small NORB,
CLEVR and KITTI are put there by hand. `ORIGINALS` says for each task where the slices start and how that was verified.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.util
import json
import os
import socket
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # how Pillow says that a file is no image
ARCHIVES = {".gz", ".tgz", ".zip", ".tar"}
FAILURES = (
    OSError,
    RuntimeError,
    EOFError,
    http.client.HTTPException,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


class DataError(ValueError):
    """Data that are missing or wrong; the message names the file and the remedy."""


class Missing(DataError):
    """Originals that are not there and cannot be fetched now."""


def tfds_order(keys: Iterable, split: str) -> list:
    """The keys (str or int) in the order in which TensorFlow Datasets stores the split of that name.

    The order is by md5(split + str(key)) in UTF-8, read as a big-endian integer, that is by its 16 bytes. The name is
    TFDS's own: "train", "validation" or "test".
    """
    return sorted(
        keys, key=lambda key: hashlib.md5(f"{split}{key}".encode(), usedforsecurity=False).digest()
    )


# One reader for each data set: {split: (keys, labels, take)}, where take(rows) gives those rows' images, as a list of
# paths or as an array (N, H, W) or (N, H, W, 3) of uint8.
Splits = dict[str, tuple[Iterable, np.ndarray, Callable[[list[int]], "list[Path] | np.ndarray"]]]


def _files(folder: Path, keys: list[str], labels: Iterable[int]) -> tuple:
    return keys, np.asarray(labels), lambda rows: [folder / keys[row] for row in rows]


def _rows(images: np.ndarray, labels: Iterable[int]) -> tuple:
    return range(len(images)), np.asarray(labels), lambda rows: images[rows]


def _cifar(root: Path) -> Splits:
    parts = {name: datasets.CIFAR100(root, train=name == "train") for name in ("train", "test")}
    return {name: _rows(part.data, part.targets) for name, part in parts.items()}


def _svhn(root: Path) -> Splits:
    parts = {name: datasets.SVHN(root, name) for name in ("train", "test")}
    return {
        name: _rows(part.data.transpose(0, 2, 3, 1), part.labels) for name, part in parts.items()
    }


def _caltech101(root: Path) -> Splits:
    folder = root / "caltech101" / "101_ObjectCategories"
    names = sorted((path.name for path in folder.iterdir() if path.is_dir()), key=str.lower)
    rng, keys = np.random.RandomState(1234), {"train": [], "test": []}
    for name in names:
        files = {path.name for path in (folder / name).iterdir()}
        if name == "BACKGROUND_Google":
            files.add("tmp")  # no image, but one of the published draw's 30
        files = sorted(files)
        chosen = set(rng.choice(files, 30, replace=False).tolist()) if len(files) >= 30 else set()
        for file in files:
            if file.endswith(".jpg"):
                keys["train" if file in chosen else "test"].append(f"{name}/{file}")
    return {
        split: _files(folder, ks, [names.index(key.split("/")[0]) for key in ks])
        for split, ks in keys.items()
    }


def _dtd(root: Path) -> Splits:
    folder, parts = root / "dtd" / "dtd", {}
    classes = sorted(path.name for path in (folder / "images").iterdir() if path.is_dir())
    for split, listing in (
        ("train", "train1.txt"),
        ("validation", "val1.txt"),
        ("test", "test1.txt"),
    ):
        keys, labels = [], []
        for where, line in lines(folder / "labels" / listing):
            keys.append(inside(line, where))
            if line.split("/")[0] not in classes:
                raise DataError(
                    f"{where}: there is no class {line.split('/')[0]} in {folder / 'images'}"
                )
            labels.append(classes.index(line.split("/")[0]))
        parts[split] = _files(folder / "images", keys, labels)
    return parts


def _flowers(root: Path) -> Splits:
    from scipy.io import loadmat

    folder, parts = root / "flowers-102", {}
    ids, labels = (
        loadmat(folder / "setid.mat"),
        loadmat(folder / "imagelabels.mat")["labels"].ravel().astype(int) - 1,
    )
    for split, name in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        numbers = ids[name].ravel().astype(int)
        if numbers.min() < 1 or numbers.max() > len(labels):
            raise DataError(f"{folder / 'setid.mat'}: {name} names images outside 1..{len(labels)}")
        parts[split] = _files(
            folder / "jpg", [f"image_{i:05d}.jpg" for i in numbers], labels[numbers - 1]
        )
    return parts


def _pets(root: Path) -> Splits:
    folder, parts = root / "oxford-iiit-pet", {}
    for split, listing in (("train", "trainval.txt"), ("test", "test.txt")):
        keys, labels = [], []
        for where, line in lines(folder / "annotations" / listing):
            try:
                name, label, _, _ = line.split()
                labels.append(int(label) - 1)
            except ValueError:
                raise DataError(
                    f"{where}: expected '<name> <class> <species> <breed>', found {line!r}"
                ) from None
            keys.append(inside(f"{name}.jpg", where))
        parts[split] = _files(folder / "images", keys, labels)
    return parts


def _eurosat(root: Path) -> Splits:
    folder = root / "eurosat" / "2750"
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    paths = [path for name in classes for path in sorted((folder / name).glob("*.jpg"))]
    labels = np.array([classes.index(path.parent.name) for path in paths])
    keys = [f"{path.parent.name}_{path.name}" for path in paths]
    return {"train": (keys, labels, lambda rows: [paths[row] for row in rows])}


PCAM = {
    "train": "train",
    "validation": "valid",
    "test": "test",
}  # the keys have these, the order those


def _pcam(root: Path) -> Splits:
    import h5py

    def part(name: str) -> tuple:
        images, targets = (
            root / "pcam" / f"camelyonpatch_level_2_split_{name}_{kind}.h5" for kind in "xy"
        )
        with h5py.File(targets) as file:
            labels = file["y"][:].ravel().astype(int)

        def take(rows: list[int]) -> np.ndarray:
            ascending, back = np.unique(rows, return_inverse=True)  # h5py reads ascending rows only
            with h5py.File(images) as file:
                return file["x"][ascending][back]

        return [f"{name}_{i}" for i in range(len(labels))], labels, take

    return {split: part(name) for split, name in PCAM.items()}


def _dsprites(root: Path, label: Callable[[np.ndarray], np.ndarray]) -> Splits:
    with np.load(find(root, "dsprites_ndarray_*64x64.npz")) as file:
        images, latents = file["imgs"], file["latents_classes"]  # (N, 64, 64) of 0 and 1, (N, 6)
    return {
        "train": (range(len(images)), label(latents), lambda rows: images[rows] * np.uint8(255))
    }


def _smallnorb(root: Path, label: Callable[[np.ndarray], np.ndarray]) -> Splits:
    def matrix(part: str, kind: str) -> np.ndarray:
        path = find(root, f"smallnorb-*-{part}-{kind}.mat*")
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # int32: magic number of the type, number of dimensions, at least three sizes; then the values
        magic, ndim = np.frombuffer(raw, "<i4", 2)
        kinds = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
        if magic not in kinds or not 1 <= ndim <= 8:
            raise DataError(f"{path} is not a matrix file of small NORB: get it again")
        shape = np.frombuffer(raw, "<i4", ndim, offset=8)
        return np.frombuffer(
            raw, kinds[magic], int(np.prod(shape)), offset=8 + 4 * max(3, ndim)
        ).reshape(shape)

    parts = {}
    for split, part in (("train", "training"), ("test", "testing")):
        parts[split] = _rows(
            matrix(part, "dat")[:, 0], label(matrix(part, "info"))
        )  # the first of two cameras
    return parts


def _clevr(root: Path, label: Callable[[list[dict]], int]) -> Splits:
    folder, parts = find(root, "CLEVR_v1.0"), {}
    for split, name in (("train", "train"), ("validation", "val")):
        scenes = json.loads((folder / "scenes" / f"CLEVR_{name}_scenes.json").read_text())["scenes"]
        labels = {inside(s["image_filename"], folder): label(s["objects"]) for s in scenes}
        parts[split] = _files(
            folder / "images" / name, sorted(labels), [labels[key] for key in sorted(labels)]
        )
    return parts


def _edges(edges: list[float], value: float) -> int:
    """The largest i with edges[i] < value, in float32 as in VTAB's code."""
    return int(np.searchsorted(np.float32(edges), np.float32(value), side="left")) - 1


def clevr_distance(objects: list[dict]) -> int:
    """The class 0..5 of the distance of the object nearest to the camera."""
    return _edges([0, 8, 8.5, 9, 9.5, 10, 100], min(o["pixel_coords"][2] for o in objects))


def kitti_distance(label_file: str) -> int:
    """The class 0..3 of the distance of the nearest car, van or truck: to 8 m, to 20 m, farther, none."""
    fields = [line.split() for line in label_file.splitlines()]
    return _edges(
        [-100, 8, 20, 999],
        min([1000.0, *(float(f[13]) for f in fields if f[0] in ("Car", "Van", "Truck"))]),
    )


def _kitti(root: Path) -> Splits:
    labels, devkit = find(root, "training/label_2"), find(root, "mapping/train_rand.txt").parent
    place = [int(number) - 1 for number in (devkit / "train_rand.txt").read_text().split(",")]
    frames = (devkit / "train_mapping.txt").read_text().splitlines()
    videos = {image: frames[line].split()[1] for image, line in enumerate(place)}
    rng, rest, split_of = np.random.RandomState(123), sorted(set(videos.values())), {}
    count = max(1, len(rest) // 10)
    for split in ("test", "validation"):
        chosen = rng.choice(rest, count, replace=False).tolist()
        split_of |= dict.fromkeys(chosen, split)
        rest = sorted(set(rest) - set(chosen))
    keys = {split: [] for split in ("train", "validation", "test")}
    for image, video in videos.items():
        keys[split_of.get(video, "train")].append(f"{image:06d}.png")
    classes = {
        key: kitti_distance((labels / f"{key[:6]}.txt").read_text())
        for ks in keys.values()
        for key in ks
    }
    return {
        split: _files(labels.parent / "image_2", ks, [classes[key] for key in ks])
        for split, ks in keys.items()
    }


@dataclass(frozen=True)
class Original:
    """Where a task's slices start in TFDS's order, and where its original images are.

    `counts`: images of each TFDS split; `val`, `test`: (split, first index) of those slices (train800 is train[:800]);
    `place`: what must be in <root>; `get`: where from; `fetch`: torchvision's classes, which download; `needs`:
    packages for reading; `verified`: whether a published list has the same order, or we have TFDS's rule only.
    """

    read: Callable[[Path], Splits]
    counts: dict[str, int]
    val: tuple[str, int]
    test: tuple[str, int]
    place: tuple[str, ...]
    get: str
    fetch: tuple[Callable, ...] = ()
    needs: tuple[str, ...] = ()
    verified: str = "rule only"


LIST, TRAIN, VALIDATION, TEST = "published list", ("train", 0), ("validation", 0), ("test", 0)
# fmt: off
_DSPRITES = ({"train": 737_280}, ("train", 589_824), ("train", 663_552), ("dsprites_ndarray_*64x64.npz",),
             "https://github.com/google-deepmind/dsprites-dataset (the .npz file)")
_NORB = ({"train": 24_300, "test": 24_300}, TEST, ("test", 12_150),
         tuple(f"smallnorb-*-{part}-{kind}.mat*" for part in ("training", "testing") for kind in ("dat", "info")),
         "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/ (dat and info, training and testing)")
_CLEVR = ({"train": 70_000, "validation": 15_000}, ("train", 63_000), VALIDATION, ("CLEVR_v1.0",),
          "https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip (19 GB)")
ORIGINALS: dict[str, Original] = {
    "cifar": Original(
        _cifar, {"train": 50_000, "test": 10_000}, ("train", 45_000), TEST, ("cifar-100-python",),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (169 MB)", (datasets.CIFAR100,), verified=LIST),
    "caltech101": Original(
        _caltech101, {"train": 3059, "test": 6085}, ("train", 2753), TEST, ("caltech101/101_ObjectCategories",),
        "https://data.caltech.edu/records/mzrjq-6wc02 (137 MB, 101_ObjectCategories.tar.gz in it)",
        (datasets.Caltech101,), verified=LIST),
    "dtd": Original(
        _dtd, {"train": 1880, "validation": 1880, "test": 1880}, VALIDATION, TEST, ("dtd/dtd",),
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz (625 MB)", (datasets.DTD,)),
    "oxford_flowers102": Original(
        _flowers, {"train": 1020, "validation": 1020, "test": 6149}, VALIDATION, TEST,
        ("flowers-102/jpg", "flowers-102/setid.mat", "flowers-102/imagelabels.mat"),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (345 MB: 102flowers.tgz, setid.mat, imagelabels.mat)",
        (datasets.Flowers102,), ("scipy",)),
    "oxford_iiit_pet": Original(
        _pets, {"train": 3680, "test": 3669}, ("train", 2944), TEST,
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
        "https://www.robots.ox.ac.uk/~vgg/data/pets/ (811 MB: images.tar.gz, annotations.tar.gz)",
        (datasets.OxfordIIITPet,)),
    "svhn": Original(
        _svhn, {"train": 73_257, "test": 26_032}, ("train", 65_931), TEST, ("train_32x32.mat", "test_32x32.mat"),
        "http://ufldl.stanford.edu/housenumbers/ (246 MB: train_32x32.mat, test_32x32.mat)",
        tuple(partial(datasets.SVHN, split=split) for split in ("train", "test")), ("scipy",)),
    "patch_camelyon": Original(
        _pcam, {"train": 262_144, "validation": 32_768, "test": 32_768}, VALIDATION, TEST,
        tuple(f"pcam/camelyonpatch_level_2_split_{part}_{kind}.h5" for part in PCAM.values() for kind in "xy"),
        "https://zenodo.org/record/2546921 (8 GB: six .h5.gz files, to be unpacked)",
        tuple(partial(datasets.PCAM, split=split) for split in ("train", "val", "test")), ("h5py",)),
    "eurosat": Original(
        _eurosat, {"train": 27_000}, ("train", 16_200), ("train", 21_600), ("eurosat/2750",),
        "https://huggingface.co/datasets/torchgeo/eurosat (94 MB: EuroSAT.zip)", (datasets.EuroSAT,), verified=LIST),
    "clevr_count": Original(partial(_clevr, label=lambda objects: len(objects) - 3), *_CLEVR),
    "clevr_dist": Original(partial(_clevr, label=clevr_distance), *_CLEVR),
    "kitti": Original(
        _kitti, {"train": 6347, "validation": 423, "test": 711}, VALIDATION, TEST,
        ("training/image_2", "training/label_2", "mapping/train_rand.txt", "mapping/train_mapping.txt"),
        "https://www.cvlibs.net/datasets/kitti/eval_object.php (left colour images, labels, devkit: 13 GB)"),
    "dsprites_loc": Original(partial(_dsprites, label=lambda latents: latents[:, 4] // 2), *_DSPRITES),
    "dsprites_ori": Original(partial(_dsprites, label=lambda latents: latents[:, 3] * 2 // 5), *_DSPRITES),
    "smallnorb_azi": Original(partial(_smallnorb, label=lambda info: info[:, 2] // 2), *_NORB),
    "smallnorb_ele": Original(partial(_smallnorb, label=lambda info: info[:, 1]), *_NORB),
}
# fmt: on


def originals(name: str, root: Path, download: bool = True) -> Splits:
    """Every split of a task's original data set, complete; downloaded first if need be and possible.

    Raises Missing where the originals cannot be had, DataError where they are damaged.
    """
    original = ORIGINALS[name]
    for package in original.needs:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{name}: reading the originals needs {package}: pip install {package}")
    depth = 1 if original.fetch else 4
    gone = next((place for place in original.place if find(root, place, depth) is None), None)
    if gone:
        by_hand = f"no {root / gone}: get it by hand from {original.get}"
        if not (original.fetch and download):
            raise Missing(f"{name}: {by_hand}")
        try:
            _fetch(name, original, root)
        except DataError:
            raise
        except FAILURES as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise Missing(
                f"{name}: the download failed ({reason[0]}) and there is {by_hand}"
            ) from error
    where = f"{name}: the originals at {find(root, original.place[0])}"
    try:
        parts = original.read(root)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = str(error).split(". ")[0].splitlines() or [type(error).__name__]
        raise DataError(
            f"{where} are damaged ({reason[0]}): get them again ({original.get})"
        ) from error
    for split, count in original.counts.items():
        keys, labels, _ = parts[split]
        if not len(keys) == len(set(keys)) == len(labels) == count:
            found = f"{len(set(keys))} {split} images and {len(labels)} labels, not {count}"
            raise DataError(
                f"{where} have {found}: remove them and get them again ({original.get})"
            )
    return parts


def official(
    name: str,
    root: Path,
    halves: Iterable[Iterable[str]],
    sizes: tuple[int, int, int],
    download: bool = True,
) -> list[tuple[list[Path] | np.ndarray, np.ndarray]]:
    """(images, labels) for each list of parts ("train", "val", "test"; `sizes` are theirs): the VTAB-1k slices."""
    original, splits = ORIGINALS[name], originals(name, root, download)
    starts = {"train": TRAIN, "val": original.val, "test": original.test}
    rows = {split: {key: i for i, key in enumerate(keys)} for split, (keys, _, _) in splits.items()}
    orders = {split: tfds_order(keys, split) for split, (keys, _, _) in splits.items()}
    found = []
    for parts in halves:
        images, labels = [], []
        for part, size in zip(starts, sizes, strict=True):
            if part in parts:
                split, start = starts[part]
                chosen = [rows[split][key] for key in orders[split][start : start + size]]
                images.append(splits[split][2](chosen))
                labels.append(splits[split][1][chosen])
        images = np.concatenate(images) if isinstance(images[0], np.ndarray) else sum(images, [])
        found.append((images, np.concatenate(labels)))
    return found


def _fetch(name: str, original: Original, root: Path) -> None:
    """Download into a folder of its own and move what is complete: what lies in <root> has been unpacked to the end."""
    staging, top = root / f".{name}.partial", root / original.place[0].split("/")[0]
    if top.is_dir():
        raise DataError(
            f"{name}: {top} is not complete: remove it, or complete it by hand from {original.get}"
        )
    _sweep(staging)
    new = not root.exists()
    print(f"{name}: downloading {original.get} into {root}", flush=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte
    try:
        staging.mkdir(parents=True, exist_ok=True)
        for dataset in original.fetch:
            dataset(staging, download=True)  # checks the archive's published md5
        for path in staging.iterdir():
            os.replace(path, root / path.name)
    finally:
        socket.setdefaulttimeout(patience)
        _sweep(staging)
        if new and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def _sweep(staging: Path) -> None:
    """Remove a download's half-unpacked folders; its archives stay, and torchvision takes up those that are whole."""
    for path in sorted(staging.rglob("*"), reverse=True):
        if not path.is_dir() and path.suffix not in ARCHIVES:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if staging.is_dir() and not any(staging.iterdir()):
        staging.rmdir()


def find(root: Path, pattern: str, depth: int = 4) -> Path | None:
    """The first match of a pattern in a folder and the levels below it, `depth` in all."""
    return next(
        (path for level in range(depth) for path in sorted(root.glob("*/" * level + pattern))), None
    )


def lines(listing: Path) -> list[tuple[str, str]]:
    """("<file>, line <n>", line) of each line of a list that is not blank; DataError if there is no such list."""
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"no list {listing} ({error}): the folder is damaged, unpack it again"
        ) from None
    return [
        (f"{listing}, line {n}", line.strip())
        for n, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def inside(name: str, where: str | Path) -> str:
    """The relative path `name`, if it stays in its folder; else DataError."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name} leads out of the task's folder")
    return name


def image_format(path: Path, where: str) -> str:
    """The file format of an image, by its header; DataError, naming the place in the list, if it is unreadable."""
    try:
        with Image.open(path) as image:
            return image.format
    except UNREADABLE as error:
        missing = isinstance(error, FileNotFoundError)
        reason = (
            "does not exist" if missing else f"is not a readable image ({type(error).__name__})"
        )
        raise DataError(f"{where}: {path} {reason}; unpack the archive again") from None
