"""The data: 24 tasks as one table (VTAB-1k's 19, FGVC's 5), the embedded demo, and batches.

    train, test = load("dtd", "data", img_size=224)     # the 1000 training images, the test images
    train, val = load("dtd", "data", split="train")     # 800 to train on, 200 to choose with
    train.prepare(device)                               # decoded once, then read from a cache
    for images, labels in train.epoch(order, 64, seed="0 0"): ...   # (B, 3, S, S) uint8, (B,)
    for images, labels in test.batches(64): ...         # decoded as they come, by workers

A VTAB-1k task comes from its original images (originals.py, splits.py) or from a prepared folder,
`<root>/vtab-1k/<task>/{train800,val200,train800val200,test}.txt`, one line an image: its path in
the folder and its label from 0. Images are resized straight to S x S (bicubic) and not augmented.
An FGVC set is `<root>/fgvc/<set>/{train,val,test}.json` as VPT publishes them, `{"path": class}`:
random resized crops and flips in training, the centre crop in testing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import math
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF
from tqdm import tqdm

import originals
from originals import ORIGINALS, UNREADABLE, image_format, inside, lines
from splits import CUTS, DataError, Missing, tfds_order  # noqa: F401

ARCHIVE = "1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p"  # all 19 tasks, on Google Drive
SUITES = {"vtab": "vtab-1k", "fgvc": "fgvc"}  # all tasks of a benchmark
SOURCES = ("auto", "original", "prepared")
ROLES = ("train", "val", "test")
LISTS = {  # of the prepared folder
    ("train",): "train800.txt",
    ("val",): "val200.txt",
    ("train", "val"): "train800val200.txt",
    ("test",): "test.txt",
}
FEW = 5e6  # pixels that are decoded before a worker process has started
BICUBIC = TF.InterpolationMode.BICUBIC
NORMALIZE = {  # channel mean and std
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class Images(Dataset):
    """One selection of a task's images, such as its 1000 training images.

    Item i is (image (3, S, S) uint8, label int), the same at every reading: the test view, or with
    `seed` set, a random crop and flip that depend on the seed and i alone.

    Attributes: `items` (paths, or arrays (H, W) or (H, W, 3) of uint8), `labels` (N,) int64,
    `augment` ("none": the whole image at S x S; "crop": the centre crop, and random ones in
    `epoch`), `source` ("original", "prepared", "lists", "embedded"), `official` (whether this is
    the benchmark's own split, whole), `about` (the same for people), `cache` (a file or None).
    """

    def __init__(
        self,
        items: Sequence,
        labels: Iterable[int],
        img_size: int,
        *,
        augment: str = "none",
        source: str = "",
        official: bool = False,
        about: str = "",
        cache: Path | None = None,
    ) -> None:
        self.items = self.files = items  # `items` become arrays in memory, `files` stay
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)
        self.img_size = img_size
        self.augment = augment
        self.source = source
        self.official = official
        self.about = about
        self.cache = cache
        # the resized image's short side before the crop: 256 for 224
        self.short = round(img_size / 0.875) if augment == "crop" else None
        self.seed = None
        self.prepared = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self._scaled(i)
        size = [self.img_size, self.img_size]
        if self.seed is not None:
            with torch.random.fork_rng(devices=[]):
                # the CPU's generator alone: manual_seed() would reseed the GPU's too
                torch.default_generator.manual_seed(zlib.crc32(f"{self.seed} {i}".encode()))
                box = RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            image = TF.resized_crop(image, *box, size, BICUBIC)
            image = TF.hflip(image) if flip else image
        elif self.augment == "crop":
            image = TF.center_crop(image, size)
        return TF.pil_to_tensor(image), int(self.labels[i])

    def __getitems__(self, indexes: list[int]) -> list[tuple[Tensor, int]] | DataError:
        """Items, or the error: an exception raised in a worker would arrive as a traceback."""
        try:
            return [self[i] for i in indexes]
        except DataError as error:
            return error

    def _scaled(self, i: int) -> Image.Image:
        """Image i in RGB, at S x S, or before a crop with its short side at the crop's measure."""
        item = self.items[i]
        try:
            image = Image.open(item) if isinstance(item, Path) else Image.fromarray(item)
            image = image.convert("RGB")
        except UNREADABLE as error:
            raise DataError(f"cannot read image {item}: {error}; get the file again") from error
        return TF.resize(image, self.short or [self.img_size, self.img_size], BICUBIC)

    def prepare(self, device: torch.device | str = "cpu", workers: int = 4) -> None:
        """Decode once what every epoch needs: all images on `device`, or if they are augmented, in
        memory before the crop, as far as they fit."""
        if self.augment == "crop":
            self.hold(workers)
        else:
            self.prepared = self.tensors(device, workers)

    def epoch(
        self, order: Tensor, batch_size: int, workers: int = 4, seed: str = "0"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches, (B, 3, S, S) uint8 and labels (B,), in the order (N,) given; augmented
        images are the same for the same seed and index whatever the workers."""
        if self.prepared is not None:
            images, labels = self.prepared
            for rows in order.to(images.device).split(batch_size):
                yield images[rows], labels[rows]
            return
        view = copy.copy(self)
        view.seed = seed if self.augment == "crop" else None
        yield from view._load(order.tolist(), batch_size, workers)

    def batches(self, batch_size: int, workers: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """The test view in order, (B, 3, S, S) uint8 and labels (B,), decoded by `workers`
        processes (0: by this one)."""
        yield from self._load(range(len(self)), batch_size, workers)

    def _load(self, order: Sequence[int], batch_size: int, workers: int) -> Iterator:
        in_memory = self.items is not self.files or isinstance(self.files, np.ndarray)
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        if in_memory and not can_fork:
            workers = 0  # each process would be sent all pixels
        if len(order) * self.img_size**2 < FEW:
            workers = 0
        workers = min(workers, _cores())
        batches = DataLoader(
            self,
            batch_size,
            sampler=order,
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context="fork" if workers and can_fork else None,
            generator=torch.Generator(),  # else an epoch draws from the run's random numbers
        )
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def tensors(
        self, device: torch.device | str = "cpu", workers: int = 4
    ) -> tuple[Tensor, Tensor]:
        """The test view of all images on `device`, (N, 3, S, S) uint8, and labels (N,) int64;
        decoded once, then read from the cache."""

        def decode() -> dict[str, Tensor]:
            images = torch.empty(len(self), 3, self.img_size, self.img_size, dtype=torch.uint8)
            start = 0
            for batch, _ in self._bar(self.batches(50, workers), math.ceil(len(self) / 50)):
                images[start : start + len(batch)] = batch
                start += len(batch)
            return {"images": images}

        return self._cached(decode)["images"].to(device), self.labels.to(device)

    def hold(self, workers: int = 4, limit: int | None = None) -> bool:
        """Keep the images in memory, (H, W, 3) uint8 with the short side that the test view has
        before its crop, so that an epoch decodes nothing. Says how much that takes; does nothing
        above `limit` bytes (default: half of the machine's memory). True if they are held."""
        need = 0
        for item in self.files:
            width, height = _size(item)
            long_side = int(self.short * max(width, height) / min(width, height))
            need += 3 * self.short * long_side
        limit = _memory() // 2 if limit is None else limit
        takes = f"{len(self)} images at {self.short} pixels take {need / 2**30:.2f} GiB"
        if need > limit:
            print(f"{takes} of memory, over the limit of {limit / 2**30:.2f}: read from the files")
            return False
        print(f"{takes} of memory, and as much on disk in {self.cache}")

        def decode() -> dict[str, Tensor]:
            with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes side by side
                images = pool.map(self._scaled, range(len(self)))
                arrays = [np.array(image) for image in self._bar(images, len(self))]
            return {str(i): torch.from_numpy(array) for i, array in enumerate(arrays)}

        held = self._cached(decode)
        self.items = [held[str(i)].numpy() for i in range(len(self))]
        return True

    def _bar(self, items: Iterable, total: int) -> Iterable:
        return tqdm(items, f"decoding {len(self)} images", total, disable=None)

    def fingerprint(self) -> str:
        """A digest of size, labels and files with their times of change: for what is kept on this
        machine, the cache and a run's state."""
        stats = [path.stat() for path in self._paths()]
        files = [
            f"{path} {stat.st_size} {stat.st_mtime_ns}\n"
            for path, stat in zip(self._paths(), stats, strict=True)
        ]
        return self._sha256(f"{self.img_size} {self.short}", files)

    def digest(self) -> str:
        """A digest of labels and images, these by value, or by name and length of their files:
        the same wherever and whenever they are read, and at every image size."""
        paths = self._paths()
        top = os.path.commonpath([path.parent for path in paths]) if paths else ""
        files = [f"{path.relative_to(top).as_posix()} {path.stat().st_size}\n" for path in paths]
        return self._sha256("", files)

    def _paths(self) -> Sequence[Path]:
        return () if isinstance(self.files, np.ndarray) else self.files

    def _sha256(self, head: str, files: list[str]) -> str:
        digest = hashlib.sha256(head.encode())
        digest.update(self.labels.numpy())
        if isinstance(self.files, np.ndarray):
            digest.update(np.ascontiguousarray(self.files))
        for line in files:
            digest.update(line.encode())
        return digest.hexdigest()

    def _cached(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, from the cache file if that is whole and of these very images, else
        made and written."""
        if self.cache is None:
            return make()
        key = self.fingerprint()
        try:
            with safe_open(self.cache, "pt") as file:
                if file.metadata()["key"] == key:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    if file.metadata()["crc32"] == _crc32(tensors):
                        return tensors
        except (OSError, SafetensorError, KeyError, TypeError):
            pass  # none yet, or damaged
        tensors = make()
        unfinished = self.cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.cache.parent.mkdir(exist_ok=True)
            save_file(tensors, unfinished, {"key": key, "crc32": _crc32(tensors)})
            os.replace(unfinished, self.cache)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            print(f"decoded images are not kept: cannot write {self.cache} ({error})")
        return tensors


def _collate(items: list[tuple[Tensor, int]] | DataError) -> list[Tensor] | DataError:
    return items if isinstance(items, DataError) else default_collate(items)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    """The machine's memory in bytes, where it tells."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 << 30


def _size(item: Path | np.ndarray) -> tuple[int, int]:
    """Width and height of an image, by its file's header."""
    if isinstance(item, Path):
        with Image.open(item) as image:
            return image.size
    return item.shape[1], item.shape[0]


def _crc32(tensors: dict[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy(), crc)
    return f"{crc:08x}"


@dataclass(frozen=True)
class Found:
    """What a reader found: images (paths or an array) and labels of each selection asked for."""

    source: str
    about: str
    images: list[Sequence]
    labels: list[Sequence[int]]


@dataclass(frozen=True)
class Task:
    """A row of the table. `sizes`: images of train, val and test; `origin`: where the original
    images are from; `verified`: how our split was checked; `read(task, root, selections, source,
    download)`: its reader; `augment`: how it is trained on; `recipe`: train.py's name for that."""

    name: str
    benchmark: str
    group: str
    classes: int
    sizes: tuple[int, int, int]
    origin: str
    aliases: tuple[str, ...]
    verified: str
    read: Callable[..., Found]
    augment: str
    recipe: str

    def count(self, roles: Sequence[str]) -> int:
        """Images that the roles, some of "train", "val" and "test", have together."""
        return sum(self.sizes[ROLES.index(role)] for role in roles)


Selections = list[tuple[str, ...]]


def read_originals(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """The originals, cut by splits.py."""
    roles = [role for selection in selections for role in selection]
    slices = originals.official(task.name, root, roles, download)
    images, labels, formats = [], [], set()
    for selection in selections:
        found = [slices[role] for role in selection]
        labels.append(np.concatenate([labels_of_it for _, labels_of_it in found]))
        if isinstance(found[0][0], np.ndarray):
            images.append(np.concatenate([array for array, _ in found]))
            formats.add("raw")
        else:
            images.append(sum([paths for paths, _ in found], []))
            where = f"{task.name}: the originals are not whole"
            formats |= {image_format(path, where) for path in images[-1]}
        if not 0 <= labels[-1].min() <= labels[-1].max() < task.classes:
            raise DataError(f"{task.name}: the originals have labels outside 0..{task.classes - 1}")
    return Found("original", f"originals, {'+'.join(sorted(formats))} images", images, labels)


def read_embedded(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """As read_originals; there is no other source, and people know it by the task's origin."""
    found = read_originals(task, root, selections, source, download)
    return dataclasses.replace(found, source="embedded", about=task.origin)


def read_vtab(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """The originals, or where they cannot be had, or at wish, the prepared folder."""
    folder = root / "vtab-1k" / task.name
    archive = f"unpack a prepared archive (Google Drive {ARCHIVE}) to {folder}"
    if source == "original" and task.name not in ORIGINALS:
        raise DataError(
            f"--source original: {task.name} has a prepared folder only; use --source prepared"
        )
    if source != "prepared" and task.name in ORIGINALS:
        try:
            return read_originals(task, root, selections, source, download)
        except Missing as error:
            if source == "original" or not folder.is_dir():
                raise Missing(f"{error}; or {archive}") from None
            print(f"{error}; reading the prepared folder {folder} instead")
    if not folder.is_dir():
        raise Missing(f"{task.name}: no folder {folder}: {archive} or point --data-dir elsewhere")
    images, labels, formats = [], [], set()
    for selection in selections:
        paths, classes = [], []
        for where, line in lines(folder / LISTS[selection]):
            path, label, encoding = _prepared_line(task, folder, where, line)
            paths.append(path)
            classes.append(label)
            formats.add(encoding)
        count = task.count(selection)
        is_short = len(paths) < count and selection != ("test",)
        if is_short or not 0 < len(paths) <= count:
            raise DataError(
                f"{folder / LISTS[selection]} has {len(paths)} images, "
                f"VTAB-1k's {task.name} has {count}"
            )
        images.append(paths)
        labels.append(classes)
    about = f"prepared folder, {'+'.join(sorted(formats))} images"
    return Found("prepared", about, images, labels)


def _prepared_line(task: Task, folder: Path, where: str, line: str) -> tuple[Path, int, str]:
    """The image's path, its label and its file format."""
    try:
        name, label = line.rsplit(None, 1)
        label = int(label)
    except ValueError:
        raise DataError(f"{where}: expected '<image> <label>', found {line!r}") from None
    if not 0 <= label < task.classes:
        raise DataError(f"{where}: label {label} is outside 0..{task.classes - 1}")
    path = folder / inside(name, where)
    return path, label, image_format(path, where)


def read_fgvc(task: Task, root: Path, selections: Selections, source, download) -> Found:
    """VPT's layout: train.json, val.json, test.json; class ids of all three, sorted, become 0..C-1."""
    folder = None
    for path in sorted((root / "fgvc").glob("*/")):
        if path.name.lower().replace("-", "_") in (task.name, *task.aliases):
            folder = folder or path
    by_hand = (
        f"put the images of {task.origin} into {root / 'fgvc' / task.name} and, beside them, "
        "train.json, val.json and test.json, which VPT's repository links to (github.com/KMnP/vpt)"
    )
    if folder is None and source != "prepared" and task.name in ORIGINALS:
        try:
            return read_originals(task, root, selections, source, download)
        except Missing as error:
            raise Missing(f"{error}; or {by_hand}") from None
    if folder is None:
        raise Missing(f"{task.name}: no folder {root / 'fgvc' / task.name}: {by_hand}")
    roles = [role for selection in selections for role in selection]
    lists = {role: _fgvc_list(task, folder, role) for role in roles}
    ids = set().union(*(listed.values() for listed in lists.values()))
    if len(ids) < task.classes and "test" not in lists:  # else training alone knows all classes
        ids |= set(_fgvc_list(task, folder, "test").values())
    if len(ids) > task.classes:
        raise DataError(
            f"{folder}: the lists have {len(ids)} classes, {task.name} has {task.classes}"
        )
    class_of = {name: number for number, name in enumerate(sorted(ids))}
    images, labels, formats = [], [], set()
    for selection in selections:
        paths, classes = [], []
        for role in selection:
            for name, label in lists[role].items():
                where = f"{folder / role}.json"
                places = [folder / sub / inside(name, where) for sub in ("images", "Images", "")]
                found = [path for path in places if path.exists()] or places[-1:]
                formats.add(image_format(found[0], where))
                paths.append(found[0])
                classes.append(class_of[label])
        images.append(paths)
        labels.append(classes)
    return Found("lists", f"lists of VPT, {'+'.join(sorted(formats))} images", images, labels)


def _fgvc_list(task: Task, folder: Path, role: str) -> dict[str, int]:
    listing = folder / f"{role}.json"
    try:
        listed = json.loads(listing.read_text(encoding="utf-8-sig"))
        if not listed or not all(type(label) is int for label in listed.values()):
            raise ValueError("a class is no integer, or the list is empty")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{listing} is no list like {{'<image>': <class>}} ({error}): get it again"
        ) from None
    if len(listed) > task.count([role]):
        raise DataError(f"{listing} has {len(listed)} images, {task.name} has {task.count([role])}")
    return listed


def _vtab(group: str, name: str, classes: int, test: int, *aliases: str) -> Task:
    origin, verified = "prepared folder only", "not rebuilt"
    if name in ORIGINALS:
        origin, verified = ORIGINALS[name].get, "rule only"
    if name in ("cifar", "caltech101", "eurosat"):
        verified = "published list"
    return Task(
        name=name,
        benchmark="vtab-1k",
        group=group,
        classes=classes,
        sizes=(800, 200, test),
        origin=origin,
        aliases=aliases,
        verified=verified,
        read=read_vtab,
        augment="none",
        recipe="vtab-1k",
    )


def _fgvc(group: str, name: str, classes: int, sizes: tuple, origin: str, *aliases: str) -> Task:
    return Task(
        name=name,
        benchmark="fgvc",
        group=group,
        classes=classes,
        sizes=sizes,
        origin=origin,
        aliases=aliases,
        verified="published list",
        read=read_fgvc,
        augment="crop",
        recipe="fgvc",
    )


def _demo(name: str, benchmark: str, origin: str, *aliases: str) -> Task:
    return Task(
        name=name,
        benchmark=benchmark,
        group="demo",
        classes=10,
        sizes=CUTS[name].sizes(),
        origin=origin,
        aliases=aliases,
        verified="",
        read=read_embedded,
        augment="none",
        recipe=benchmark,
    )


_ROWS = [
    _vtab("natural", "cifar", 100, 10000, "cifar100", "cifar_100"),
    _vtab("natural", "caltech101", 102, 6085, "caltech", "caltech_101"),
    _vtab("natural", "dtd", 47, 1880, "describable_textures"),
    _vtab("natural", "oxford_flowers102", 102, 6149, "flowers102", "vtab_flowers"),
    _vtab("natural", "oxford_iiit_pet", 37, 3669, "pets", "pet", "oxford_pet", "oxford_pets"),
    _vtab("natural", "svhn", 10, 26032, "svhn_cropped"),
    _vtab("natural", "sun397", 397, 21750, "sun", "sun_397"),
    _vtab("specialized", "patch_camelyon", 2, 32768, "camelyon", "pcam"),
    _vtab("specialized", "eurosat", 10, 5400, "euro_sat"),
    _vtab("specialized", "resisc45", 45, 6300, "resisc"),
    _vtab("specialized", "diabetic_retinopathy", 5, 42670, "retinopathy"),
    _vtab("structured", "clevr_count", 8, 15000, "clevr_count_all"),
    _vtab("structured", "clevr_dist", 6, 15000, "clevr_closest", "clevr_distance"),
    _vtab("structured", "dmlab", 6, 22735),
    _vtab("structured", "kitti", 4, 711, "kitti_dist", "kitti_distance"),
    _vtab("structured", "dsprites_loc", 16, 73728, "dsprites_location", "dsprites_position"),
    _vtab("structured", "dsprites_ori", 16, 73728, "dsprites_orientation"),
    _vtab("structured", "smallnorb_azi", 18, 12150, "smallnorb_azimuth"),
    _vtab("structured", "smallnorb_ele", 9, 12150, "smallnorb_elevation"),
    _fgvc("birds", "cub", 200, (5394, 600, 5794), "CUB-200-2011", "cub200", "cub_200_2011"),
    _fgvc("birds", "nabirds", 555, (21536, 2393, 24633), "NABirds"),
    _fgvc(
        *("flowers", "oxford_flowers", 102, (1020, 1020, 6149), "Oxford Flowers 102"),
        *("fgvc_flowers", "oxfordflower"),
    ),
    _fgvc("dogs", "stanford_dogs", 120, (10800, 1200, 8580), "Stanford Dogs", "dogs"),
    _fgvc("cars", "stanford_cars", 196, (7329, 815, 8041), "Stanford Cars", "cars"),
    _demo("digits", "demo", "embedded UCI handwritten digits"),
    _demo("fashion_mnist", "pretraining", "Fashion-MNIST", "fashion"),
]
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def find_task(name: str) -> Task:
    """The table's row for a task name or alias; DataError with the nearest name if there is none."""
    names = {}
    for task in TASKS.values():
        for alias in (task.name, *task.aliases):
            names[alias] = task
    key = name.lower().replace("-", "_")
    if key in names:
        return names[key]
    near = difflib.get_close_matches(key, [*names, *SUITES], n=1, cutoff=0.5)
    hint = f"there are {', '.join([*SUITES, *TASKS])}"
    if near:
        right = near[0] if near[0] in SUITES else names[near[0]].name
        hint = f"did you mean {right!r}?"
    raise DataError(f"unknown dataset {name!r}: {hint}")


def load(
    name: str,
    root: str | os.PathLike = "data",
    *,
    split: str = "trainval",
    img_size: int = 224,
    source: str = "auto",
    download: bool = True,
) -> tuple[Images, Images]:
    """(train, test) of a task: "trainval" gives train + val and test, "train" gives train and val.

    Images are img_size x img_size RGB. `source` is for VTAB-1k: "original" (downloaded if need be
    and `download`), "prepared", or "auto", the originals unless they cannot be had. Raises
    DataError, naming the file and the remedy, for an unknown task, data that are not there, and
    data that are damaged or have wrong counts or labels. A test list shorter than the official one
    is read, and is not `official`.
    """
    task, root = find_task(name), Path(root)
    if split not in ("trainval", "train") or source not in SOURCES:
        raise ValueError(
            f"split is trainval or train and source one of {SOURCES}, not {split!r}, {source!r}"
        )
    selections = [("train", "val"), ("test",)] if split == "trainval" else [("train",), ("val",)]
    found = task.read(task, root, selections, source, download)
    official, notes, paths = True, [], []
    for selection, images, labels in zip(selections, found.images, found.labels, strict=True):
        count, role = task.count(selection), selection[0]
        if len(labels) == count:
            notes.append(f"{len(labels)} {role}")
        else:
            notes.append(f"{len(labels)} of {count} {role} (subset)")
            official = False
        if not isinstance(images, np.ndarray):
            paths += images
    about = f"{found.about}, {' / '.join(notes)}"
    repeated = len(paths) - len(set(paths))
    if repeated:
        about, official = f"{about}; {repeated} images are repeated", False
    declared = root / task.benchmark / task.name / "SUBSET"
    if found.source == "prepared" and declared.exists():
        about, official = f"{about}; SUBSET: {' '.join(declared.read_text().split())}", False
    cache = None
    if task.benchmark in SUITES.values():
        cache = root / "cache" / f"{task.name}-{found.source}-{split}-{img_size}.safetensors"
    make = partial(
        Images,
        img_size=img_size,
        augment=task.augment,
        source=found.source,
        official=official,
        about=about,
    )
    train = make(found.images[0], found.labels[0], cache=cache)
    return train, make(found.images[1], found.labels[1])


def normalizer(mean: tuple, std: tuple, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function from (B, 3, S, S) uint8 to new float32 images (x / 255 - mean) / std, one value
    per RGB channel."""
    mean = torch.tensor(mean, device=device).view(3, 1, 1) * 255
    std = torch.tensor(std, device=device).view(3, 1, 1) * 255
    # to the device as bytes, a quarter of the way
    return lambda images: (images.to(device).float() - mean) / std
