"""The data: 24 tasks as one table (VTAB-1k's 19, FGVC's 5), the embedded demo, and batches.

    train, test = load("dtd", "data", img_size=224)     # the 1000 training images and the test images
    train, val = load("dtd", "data", split="train")     # 800 to train on, 200 to choose with
    images, labels = train.tensors(device)              # (N, 3, S, S) uint8, (N,): decoded and resized once
    for images, labels in test.batches(256): ...        # decoded as they come; a test set may not fit into memory

A VTAB-1k task is read from its prepared folder, `<root>/vtab-1k/<task>/{train800,val200,train800val200,test}.txt`, one
line an image: its path relative to the folder and its label from 0. Images are resized straight to S x S (bicubic, no
crop) and not augmented, as VTAB-1k prescribes.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

DEMO = Path(__file__).resolve().parent / "demo" / "digits.npz"
NORMALIZE = {  # channel mean and std
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)  # Pillow's ways of saying that a file is no image


class DataError(ValueError):
    """Data that are missing or wrong; the message names the file and the remedy."""


@dataclass(frozen=True)
class Task:
    """A row of the table: `sizes` are the images of train, val and test; `origin` is where the original images are."""

    name: str
    benchmark: str
    group: str
    classes: int
    sizes: tuple[int, int, int]
    origin: str
    aliases: tuple[str, ...] = ()


def _vtab(group: str, rows: list[tuple]) -> list[Task]:
    return [Task(name, "vtab-1k", group, classes, (800, 200, test), *rest) for name, classes, test, *rest in rows]


TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        *_vtab(
            "natural",
            [
                ("cifar", 100, 10000, "torchvision CIFAR100", ("cifar100", "cifar_100")),
                ("caltech101", 102, 6085, "torchvision Caltech101", ("caltech", "caltech_101")),
                ("dtd", 47, 1880, "torchvision DTD", ("describable_textures",)),
                ("oxford_flowers102", 102, 6149, "torchvision Flowers102", ("flowers102", "vtab_flowers")),
                (
                    "oxford_iiit_pet",
                    37,
                    3669,
                    "torchvision OxfordIIITPet",
                    ("pets", "pet", "oxford_pet", "oxford_pets"),
                ),
                ("svhn", 10, 26032, "torchvision SVHN", ("svhn_cropped",)),
                ("sun397", 397, 21750, "prepared folder only", ("sun", "sun_397")),
            ],
        ),
        *_vtab(
            "specialized",
            [
                ("patch_camelyon", 2, 32768, "torchvision PCAM", ("camelyon", "pcam")),
                ("eurosat", 10, 5400, "torchvision EuroSAT", ("euro_sat",)),
                ("resisc45", 45, 6300, "prepared folder only", ("resisc",)),
                ("diabetic_retinopathy", 5, 42670, "prepared folder only", ("retinopathy",)),
            ],
        ),
        *_vtab(
            "structured",
            [
                ("clevr_count", 8, 15000, "prepared folder only", ("clevr_count_all",)),
                ("clevr_dist", 6, 15000, "prepared folder only", ("clevr_closest", "clevr_distance")),
                ("dmlab", 6, 22735, "prepared folder only"),
                ("kitti", 4, 711, "prepared folder only", ("kitti_dist", "kitti_distance")),
                ("dsprites_loc", 16, 73728, "dSprites npz", ("dsprites_location", "dsprites_position")),
                ("dsprites_ori", 16, 73728, "dSprites npz", ("dsprites_orientation",)),
                ("smallnorb_azi", 18, 12150, "small NORB mat files", ("smallnorb_azimuth",)),
                ("smallnorb_ele", 9, 12150, "small NORB mat files", ("smallnorb_elevation",)),
            ],
        ),
        Task("cub", "fgvc", "birds", 200, (5394, 600, 5794), "CUB-200-2011", ("cub200", "cub_200_2011")),
        Task("nabirds", "fgvc", "birds", 555, (21536, 2393, 24633), "NABirds"),
        Task("oxford_flowers", "fgvc", "flowers", 102, (1020, 1020, 6149), "torchvision Flowers102", ("fgvc_flowers",)),
        Task("stanford_dogs", "fgvc", "dogs", 120, (10800, 1200, 8580), "Stanford Dogs", ("dogs",)),
        Task("stanford_cars", "fgvc", "cars", 196, (7329, 815, 8041), "Stanford Cars", ("cars",)),
        Task("digits", "demo", "demo", 10, (800, 200, 797), "embedded UCI handwritten digits"),
        Task(
            "fashion_mnist", "pretraining", "demo", 10, (50000, 10000, 10000), "torchvision FashionMNIST", ("fashion",)
        ),
    ]
}


def find_task(name: str) -> Task:
    """The table's row for a task name or alias; DataError with the nearest name if there is none."""
    names = {alias: task for task in TASKS.values() for alias in (task.name, *task.aliases)}
    key = name.lower().replace("-", "_")
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"did you mean {names[near[0]].name!r}?" if near else f"the tasks are {', '.join(TASKS)}"
        raise DataError(f"unknown dataset {name!r}: {hint}")
    return names[key]


class Images:
    """One split of a task. Item i is (image (3, S, S) uint8, label int), the same at every reading.

    Attributes: `labels` (N,) int64, `source` (paths, or an array (N, H, W) of uint8), `about` (where it comes from).
    """

    def __init__(self, source: list[Path] | np.ndarray, labels, img_size: int, about: str) -> None:
        self.source, self.img_size, self.about = source, img_size, about
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        item = self.source[i]
        try:
            image = (Image.open(item) if isinstance(item, Path) else Image.fromarray(item)).convert("RGB")
        except (*UNREADABLE, SyntaxError) as error:
            raise DataError(f"cannot read image {item}: {error}; get the file again") from error
        if image.size != (self.img_size, self.img_size):
            image = image.resize((self.img_size, self.img_size), Image.Resampling.BICUBIC)
        return pil_to_tensor(image), int(self.labels[i])

    def batches(self, batch_size: int, workers: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as (B, 3, S, S) uint8 and (B,), read by threads one batch ahead."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            ahead = None
            for start in range(0, len(self) + batch_size, batch_size):
                current, ahead = ahead, pool.map(self.__getitem__, range(start, min(start + batch_size, len(self))))
                if current is not None:
                    images, labels = zip(*current, strict=True)
                    yield torch.stack(images), torch.tensor(labels)

    def tensors(self, device: torch.device | str = "cpu", workers: int = 4) -> tuple[Tensor, Tensor]:
        """The whole split on `device`: (N, 3, S, S) uint8 and (N,) int64."""
        images = torch.empty(len(self), 3, self.img_size, self.img_size, dtype=torch.uint8)
        for start, (batch, _) in zip(range(0, len(self), 256), self.batches(256, workers), strict=True):
            images[start : start + len(batch)] = batch
        return images.to(device), self.labels.to(device)


def load(
    name: str,
    root: str | os.PathLike = "data",
    *,
    split: str = "trainval",
    img_size: int = 224,
    download: bool = True,
) -> tuple[Images, Images]:
    """(train, test) of a task: split "trainval" gives train + val and test, "train" gives train and val.

    Images are img_size x img_size RGB. Raises DataError, naming the file and the remedy, for an unknown task, a
    missing folder, and lists that are damaged or have the wrong number of lines. A test list shorter than the official
    one is read, and `about` calls it a subset.
    """
    task = find_task(name)
    if split not in ("trainval", "train"):
        raise ValueError(f"split must be 'trainval' or 'train', not {split!r}")
    if task.benchmark == "vtab-1k":
        return _prepared(task, Path(root) / "vtab-1k" / task.name, split, img_size)
    if task.name == "digits":
        with np.load(DEMO) as file:
            images, labels = file["images"], file["labels"]
    elif task.name == "fashion_mnist":
        images, labels = _fashion_mnist(root, download)
    else:
        raise DataError(f"{task.name} ({task.benchmark}) cannot be loaded yet; the tasks of vtab-1k and digits can")
    train, val, test = task.sizes
    cut, stop = (train, train + val) if split == "train" else (train + val, train + val + test)
    about = f"{task.origin}, {cut} train / {stop - cut} {'val' if split == 'train' else 'test'}"
    return tuple(Images(images[part], labels[part], img_size, about) for part in (slice(cut), slice(cut, stop)))


def _fashion_mnist(root: str | os.PathLike, download: bool) -> tuple[np.ndarray, np.ndarray]:
    try:
        parts = [torchvision.datasets.FashionMNIST(root, train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"no Fashion-MNIST in {root} and none to download ({str(error).splitlines()[0]}): put its four unpacked "
            f"files, train-images-idx3-ubyte and so on, into {Path(root) / 'FashionMNIST' / 'raw'}"
        ) from error
    return np.concatenate([p.data for p in parts]), np.concatenate([p.targets for p in parts])


def _prepared(task: Task, folder: Path, split: str, img_size: int) -> tuple[Images, Images]:
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}: unpack a prepared VTAB-1k archive so that {folder / 'train800.txt'} exists "
            f"(Google Drive 1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p has all 19 tasks), or point --data-dir elsewhere"
        )
    train, val, test = task.sizes
    if split == "train":
        wanted = {"train800.txt": train, "val200.txt": val}
    else:
        wanted = {"train800val200.txt": train + val, "test.txt": test}
    found, formats = [], set()
    for listing, count in wanted.items():
        paths, labels = _read_list(folder / listing, task.classes, formats)
        if not 0 < len(paths) <= count or (len(paths) < count and listing != "test.txt"):
            raise DataError(f"{folder / listing} has {len(paths)} images, VTAB-1k's {task.name} has {count}")
        found.append((paths, labels))
    (train_paths, _), (test_paths, _) = found
    sizes = f"{len(train_paths)} train / {len(test_paths)} {'val' if split == 'train' else 'test'}"
    if len(test_paths) < count:
        sizes = f"{len(train_paths)} train / {len(test_paths)} of {count} test (subset)"
    if (folder / "SUBSET").exists():
        sizes += f"; SUBSET: {' '.join((folder / 'SUBSET').read_text().split())}"
    about = f"prepared folder, {'+'.join(sorted(formats))} images, {sizes}"
    return tuple(Images(paths, labels, img_size, about) for paths, labels in found)


def _read_list(listing: Path, classes: int, formats: set[str]) -> tuple[list[Path], list[int]]:
    """Paths and labels of one list, each line checked; adds the images' file formats to `formats`."""
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no list {listing} ({error}): the prepared folder is damaged, unpack it again") from None
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        try:
            name, label = line.rsplit(None, 1)
            label = int(label)
        except ValueError:
            raise DataError(f"{where}: expected '<image> <label>', found {line!r}") from None
        if not 0 <= label < classes:
            raise DataError(f"{where}: label {label} is outside 0..{classes - 1}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{where}: {name} leads out of the task's folder")
        path = listing.parent / name
        try:
            with Image.open(path) as image:  # reads the header only
                formats.add(image.format)
        except UNREADABLE as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "does not exist" if missing else f"is not a readable image ({type(error).__name__})"
            raise DataError(f"{where}: {path} {reason}; unpack the archive again") from None
        paths.append(path)
        labels.append(label)
    return paths, labels


def normalizer(mean: tuple, std: tuple, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function from (B, 3, S, S) uint8 to new float32 images (x / 255 - mean) / std, one value per RGB channel."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (mean, std))
    return lambda images: (images.to(device, torch.float32) - mean) / std
