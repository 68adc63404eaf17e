"""The original data sets: one short reader each, and how to get them.

A reader opens one split of TFDS at a time. Originals lie in <root> as torchvision's classes leave
them, which also download nine of them; dSprites, small NORB, CLEVR and KITTI are put there by hand.

    official("dtd", Path("data"), ["train", "val"])         # VTAB-1k's slices
"""

from __future__ import annotations

import gzip
import http.client
import importlib.util
import json
import os
import pickle
import socket
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

import splits
from splits import CUTS, Content, DataError, Missing, files, find, folders, inside, lines, rows

DEMO = Path(__file__).resolve().parent / "demo" / "digits.npz"
# how a download says that it failed
FAILURES = (OSError, RuntimeError, EOFError, http.client.HTTPException)
FAILURES += (tarfile.TarError, zipfile.BadZipFile, zlib.error)


def _cifar(root: Path, split: str) -> Content:
    listed = datasets.CIFAR100.train_list if split == "train" else datasets.CIFAR100.test_list
    [[name, md5]] = listed
    path = root / "cifar-100-python" / name
    if not check_integrity(path, md5):  # a pickle can run code: only the publisher's is opened
        raise ValueError(f"{path.name} has another md5 than the published one")
    with open(path, "rb") as file:
        content = pickle.load(file, encoding="latin1")
    images = content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return rows(images, content["fine_labels"])


def _svhn(root: Path, split: str) -> Content:
    content = datasets.SVHN(root, split)
    return rows(content.data.transpose(0, 2, 3, 1), content.labels)


def _caltech101(root: Path, split: str) -> Content:
    folder = root / "caltech101" / "101_ObjectCategories"
    listing = {}
    for name in folders(folder):
        listing[name] = {path.name for path in (folder / name).iterdir()}
    classes = sorted(listing, key=str.lower)
    keys = splits.draw_caltech101(listing, split)
    return files(folder, keys, [classes.index(key.split("/")[0]) for key in keys])


def _dtd(root: Path, split: str) -> Content:
    folder = root / "dtd" / "dtd"
    name = {"train": "train1", "validation": "val1", "test": "test1"}[split]
    classes = folders(folder / "images")
    keys, labels = [], []
    for where, line in lines(folder / "labels" / f"{name}.txt"):
        label = line.split("/")[0]
        keys.append(inside(line, where))
        if label not in classes:
            raise DataError(f"{where}: there is no class {label} in {folder / 'images'}")
        labels.append(classes.index(label))
    return files(folder / "images", keys, labels)


def _flowers(root: Path, split: str) -> Content:
    from scipy.io import loadmat

    folder = root / "flowers-102"
    name = {"train": "trnid", "validation": "valid", "test": "tstid"}[split]
    numbers = loadmat(folder / "setid.mat")[name].ravel().astype(int)
    labels = loadmat(folder / "imagelabels.mat")["labels"].ravel().astype(int) - 1
    if numbers.min() < 1 or numbers.max() > len(labels):
        raise DataError(f"{folder / 'setid.mat'}: {name} names images outside 1..{len(labels)}")
    keys = [f"image_{number:05d}.jpg" for number in numbers]
    return files(folder / "jpg", keys, labels[numbers - 1])


def _pets(root: Path, split: str) -> Content:
    folder = root / "oxford-iiit-pet"
    name = {"train": "trainval", "test": "test"}[split]
    keys, labels = [], []
    for where, line in lines(folder / "annotations" / f"{name}.txt"):
        fields = line.split()
        if len(fields) != 4 or not fields[1].isdecimal():
            raise DataError(f"{where}: expected '<name> <class> <species> <breed>', found {line!r}")
        keys.append(inside(f"{fields[0]}.jpg", where))
        labels.append(int(fields[1]) - 1)
    return files(folder / "images", keys, labels)


def _eurosat(root: Path, split: str) -> Content:
    folder = root / "eurosat" / "2750"
    paths = sorted(folder.glob("*/*.jpg"))
    classes = folders(folder)
    labels = [classes.index(path.parent.name) for path in paths]
    keys = [f"{path.parent.name}_{path.name}" for path in paths]
    return Content(keys, np.array(labels), lambda numbers: [paths[n] for n in numbers])


def _pcam(root: Path, split: str) -> Content:
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


def _dsprites(root: Path, split: str, label: Callable[[np.ndarray], np.ndarray]) -> Content:
    with np.load(find(root, "dsprites_ndarray_*64x64.npz")) as file:
        images = file["imgs"]  # (N, 64, 64) of 0 and 1
        labels = label(file["latents_classes"])  # of (N, 6)
    return Content(range(len(images)), labels, lambda rows: images[rows] * np.uint8(255))


def _smallnorb(root: Path, split: str, label: Callable[[np.ndarray], np.ndarray]) -> Content:
    name = {"train": "training", "test": "testing"}[split]
    images = _matrix(find(root, f"smallnorb-*-{name}-dat.mat*"))  # (N, 2 cameras, 96, 96)
    infos = _matrix(find(root, f"smallnorb-*-{name}-info.mat*"))
    return rows(images[:, 0], label(infos))


def _matrix(path: Path) -> np.ndarray:
    """A matrix file of small NORB: int32 magic number, number of dimensions, sizes; then values."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    magic, ndim = np.frombuffer(raw, "<i4", 2)
    kinds = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
    if magic not in kinds or not 1 <= ndim <= 8:
        raise DataError(f"{path} is not a matrix file of small NORB: get it again")
    shape = np.frombuffer(raw, "<i4", ndim, offset=8)
    start = 8 + 4 * max(3, ndim)  # at least three sizes are written
    count = int(np.prod(shape))
    return np.frombuffer(raw, kinds[magic], count, offset=start).reshape(shape)


def _clevr(root: Path, split: str, label: Callable[[list[dict]], int]) -> Content:
    folder = find(root, "CLEVR_v1.0")
    name = {"train": "train", "validation": "val"}[split]
    listing = json.loads((folder / "scenes" / f"CLEVR_{name}_scenes.json").read_text())
    scenes = sorted(listing["scenes"], key=lambda scene: scene["image_filename"])
    keys = [inside(scene["image_filename"], folder) for scene in scenes]
    labels = [label(scene["objects"]) for scene in scenes]
    return files(folder / "images" / name, keys, labels)


def _kitti(root: Path, split: str) -> Content:
    folder = find(root, "training/label_2")
    devkit = find(root, "mapping/train_rand.txt").parent
    numbers = (devkit / "train_rand.txt").read_text().split(",")
    frames = (devkit / "train_mapping.txt").read_text().splitlines()
    videos = [frames[int(number) - 1].split()[1] for number in numbers]
    keys = splits.draw_kitti(dict(enumerate(videos)), split)
    texts = [(folder / f"{key[:6]}.txt").read_text() for key in keys]
    labels = list(map(splits.kitti_distance, texts))
    return files(folder.parent / "image_2", keys, labels)


def _fashion_mnist(root: Path, split: str) -> Content:
    content = datasets.FashionMNIST(root, train=split == "train")
    return rows(content.data.numpy(), content.targets)


def _digits(root: Path, split: str) -> Content:
    with np.load(DEMO) as file:
        return rows(file["images"], file["labels"])


@dataclass(frozen=True)
class Original:
    """Where a task's original images are: `read(root, split)`; `place`: what must be in <root>;
    `get`: where from; `fetch`: torchvision's classes, which download; `needs`: packages to read."""

    read: Callable[[Path, str], Content]
    place: tuple[str, ...]
    get: str
    fetch: tuple[Callable, ...] = ()
    needs: tuple[str, ...] = ()


_PCAM = ("train_x", "train_y", "valid_x", "valid_y", "test_x", "test_y")
_NORB_FILES = ("training-dat", "training-info", "testing-dat", "testing-info")
# fmt: off
_DSPRITES = (("dsprites_ndarray_*64x64.npz",),
             "https://github.com/google-deepmind/dsprites-dataset (the .npz file)")
_NORB = (tuple(f"smallnorb-*-{name}.mat*" for name in _NORB_FILES),
         "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/ (dat and info, training and testing)")
_CLEVR = (("CLEVR_v1.0",), "https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip (19 GB)")
_FLOWERS = (
    ("flowers-102/jpg", "flowers-102/setid.mat", "flowers-102/imagelabels.mat"),
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (345 MB: images, setid, imagelabels)",
    (datasets.Flowers102,), ("scipy",))
ORIGINALS: dict[str, Original] = {
    "cifar": Original(
        _cifar, ("cifar-100-python",),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (169 MB)", (datasets.CIFAR100,)),
    "caltech101": Original(
        _caltech101, ("caltech101/101_ObjectCategories",),
        "https://data.caltech.edu/records/mzrjq-6wc02 (137 MB, 101_ObjectCategories.tar.gz in it)",
        (datasets.Caltech101,)),
    "dtd": Original(
        _dtd, ("dtd/dtd",),
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz (625 MB)",
        (datasets.DTD,)),
    "oxford_flowers102": Original(_flowers, *_FLOWERS),
    "oxford_flowers": Original(_flowers, *_FLOWERS),
    "oxford_iiit_pet": Original(
        _pets, ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
        "https://www.robots.ox.ac.uk/~vgg/data/pets/ (811 MB: images.tar.gz, annotations.tar.gz)",
        (datasets.OxfordIIITPet,)),
    "svhn": Original(
        _svhn, ("train_32x32.mat", "test_32x32.mat"),
        "http://ufldl.stanford.edu/housenumbers/ (246 MB: train_32x32.mat, test_32x32.mat)",
        (partial(datasets.SVHN, split="train"), partial(datasets.SVHN, split="test")), ("scipy",)),
    "patch_camelyon": Original(
        _pcam, tuple(f"pcam/camelyonpatch_level_2_split_{name}.h5" for name in _PCAM),
        "https://zenodo.org/record/2546921 (8 GB: six .h5.gz files, to be unpacked)",
        tuple(partial(datasets.PCAM, split=split) for split in ("train", "val", "test")),
        ("h5py",)),
    "eurosat": Original(
        _eurosat, ("eurosat/2750",),
        "https://huggingface.co/datasets/torchgeo/eurosat (94 MB)", (datasets.EuroSAT,)),
    "clevr_count": Original(partial(_clevr, label=splits.clevr_count), *_CLEVR),
    "clevr_dist": Original(partial(_clevr, label=splits.clevr_distance), *_CLEVR),
    "kitti": Original(
        _kitti, ("training/image_2", "training/label_2", "mapping/train_rand.txt",
                 "mapping/train_mapping.txt"),
        "https://www.cvlibs.net/datasets/kitti/eval_object.php (13 GB: images, labels, devkit)"),
    "dsprites_loc": Original(partial(_dsprites, label=lambda c: c[:, 4] // 2), *_DSPRITES),
    "dsprites_ori": Original(partial(_dsprites, label=lambda c: c[:, 3] * 2 // 5), *_DSPRITES),
    "smallnorb_azi": Original(partial(_smallnorb, label=lambda infos: infos[:, 2] // 2), *_NORB),
    "smallnorb_ele": Original(partial(_smallnorb, label=lambda infos: infos[:, 1]), *_NORB),
    "fashion_mnist": Original(
        _fashion_mnist, ("FashionMNIST/raw/train-images-idx3-ubyte",),
        "https://github.com/zalandoresearch/fashion-mnist (30 MB: four files, to be unpacked)",
        (datasets.FashionMNIST,)),
    "digits": Original(_digits, (), "this repository"),
}
# fmt: on


def read(name: str, root: Path, split: str, download: bool = True) -> Content:
    """One split of a task's original data set, whole; downloaded first if need be and possible.

    Raises Missing where the originals cannot be had, DataError where they are damaged.
    """
    original = ORIGINALS[name]
    _get(name, original, root, download)
    place = find(root, original.place[0]) if original.place else DEMO
    where = f"{name}: the originals at {place}"
    try:
        content = original.read(root, split)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = f"damaged ({_reason(error)}): get them again ({original.get})"
        raise DataError(f"{where} are {reason}") from error
    count = CUTS[name].counts[split]
    distinct, labels = len(set(content.keys)), len(content.labels)
    if not len(content.keys) == distinct == labels == count:
        raise DataError(
            f"{where} have {distinct} {split} images and {labels} labels, not {count}: "
            f"remove them and get them again ({original.get})"
        )
    return content


def official(name: str, root: Path, roles: Iterable[str], download: bool = True) -> dict:
    """{role: (images, labels)} of the task's slices "train", "val" and "test"."""
    cut, contents, found = CUTS[name], {}, {}
    for role in roles:
        split = getattr(cut, role).split
        if split not in contents:
            contents[split] = read(name, root, split, download)
        content = contents[split]
        numbers = cut.rows(role, content.keys)
        found[role] = content.images(numbers), content.labels[numbers]
    return found


def _reason(error):
    """The first sentence of an error, or its name."""
    return (str(error).strip() or type(error).__name__).split(". ")[0].splitlines()[0]


def _get(name: str, original: Original, root: Path, download: bool):
    """Download the originals if they are not there; Missing if that is not possible."""
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
    except FAILURES as error:
        reason = _reason(error)
        raise Missing(f"{name}: the download failed ({reason}) and there is {by_hand}") from error


def _fetch(name: str, original: Original, root: Path):
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
