"""The data: 24 tasks as one table (VTAB-1k's 19, FGVC's 5), the embedded demo, and batches.

    train, test = load("dtd", "data", img_size=224)     # the 1000 training images and the test images
    train, val = load("dtd", "data", split="train")     # 800 to train on, 200 to choose with
    images, labels = train.tensors(device)              # (N, 3, S, S) uint8, (N,): decoded once, then read from a cache
    for images, labels in test.batches(64): ...         # decoded as they come, by worker processes

A VTAB-1k task comes from its original images, cut by `splits.py`, or from a prepared folder,
`<root>/vtab-1k/<task>/{train800,val200,train800val200,test}.txt`, one line an image: its path in the folder and its
label from 0. Images are resized straight to S x S (bicubic) and not augmented, as VTAB-1k prescribes. An FGVC set is
`<root>/fgvc/<set>/{train,val,test}.json` as VPT publishes them, `{"path": class}`: random resized crops and flips in
training, the centre crop in testing.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF
from tqdm import tqdm

from splits import (
    ORIGINALS,
    UNREADABLE,
    DataError,
    Missing,
    image_format,
    inside,
    lines,
    official,
    originals,
    tfds_order,
)

__all__ = [
    "NORMALIZE",
    "TASKS",
    "DataError",
    "Images",
    "Task",
    "find_task",
    "load",
    "normalizer",
    "tfds_order",
]

DEMO = Path(__file__).resolve().parent / "demo" / "digits.npz"
ARCHIVE = "1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p"  # all 19 tasks, on Google Drive
SUITES = {"vtab": "vtab-1k", "fgvc": "fgvc"}  # all tasks of a benchmark
SOURCES = ("auto", "original", "prepared")
LISTS = {
    "train": "train800",
    "val": "val200",
    "test": "test",
}  # of the prepared folder; train + val: train800val200
BICUBIC = TF.InterpolationMode.BICUBIC
NORMALIZE = {  # channel mean and std
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Task:
    """A row of the table. `sizes`: images of train, val and test; `origin`: where the original images are from;
    `verified`: how our split was checked: a "published list" is the same; the "rule only" (TFDS's order and VTAB's
    slices, applied to the originals); "not rebuilt": as the prepared folder has it."""

    name: str
    benchmark: str
    group: str
    classes: int
    sizes: tuple[int, int, int]
    origin: str
    aliases: tuple[str, ...] = ()
    verified: str = ""

    @property
    def recipe(self) -> dict:
        common = {
            "model": "vit_base_patch16_224.orig_in21k",
            "epochs": 100,
            "lr": 1e-3,
            "drop_path": 0.1,
        }
        return {
            "demo": {"model": "vit_nano", "epochs": 20, "lr": 8e-3, "drop_path": 0.0},
            "pretraining": {"model": "vit_nano", "epochs": 12, "lr": 1e-3, "drop_path": 0.1},
        }.get(self.benchmark, common)


# fmt: off
VTAB = {
    "natural": [
        ("cifar", 100, 10000, "cifar100", "cifar_100"),
        ("caltech101", 102, 6085, "caltech", "caltech_101"),
        ("dtd", 47, 1880, "describable_textures"),
        ("oxford_flowers102", 102, 6149, "flowers102", "vtab_flowers"),
        ("oxford_iiit_pet", 37, 3669, "pets", "pet", "oxford_pet", "oxford_pets"),
        ("svhn", 10, 26032, "svhn_cropped"),
        ("sun397", 397, 21750, "sun", "sun_397")],
    "specialized": [
        ("patch_camelyon", 2, 32768, "camelyon", "pcam"),
        ("eurosat", 10, 5400, "euro_sat"),
        ("resisc45", 45, 6300, "resisc"),
        ("diabetic_retinopathy", 5, 42670, "retinopathy")],
    "structured": [
        ("clevr_count", 8, 15000, "clevr_count_all"),
        ("clevr_dist", 6, 15000, "clevr_closest", "clevr_distance"),
        ("dmlab", 6, 22735),
        ("kitti", 4, 711, "kitti_dist", "kitti_distance"),
        ("dsprites_loc", 16, 73728, "dsprites_location", "dsprites_position"),
        ("dsprites_ori", 16, 73728, "dsprites_orientation"),
        ("smallnorb_azi", 18, 12150, "smallnorb_azimuth"),
        ("smallnorb_ele", 9, 12150, "smallnorb_elevation")],
}
FGVC = [
    ("cub", "birds", 200, (5394, 600, 5794), "CUB-200-2011", ("cub200", "cub_200_2011")),
    ("nabirds", "birds", 555, (21536, 2393, 24633), "NABirds", ()),
    ("oxford_flowers", "flowers", 102, (1020, 1020, 6149), "Oxford Flowers 102", ("fgvc_flowers", "oxfordflower")),
    ("stanford_dogs", "dogs", 120, (10800, 1200, 8580), "Stanford Dogs", ("dogs",)),
    ("stanford_cars", "cars", 196, (7329, 815, 8041), "Stanford Cars", ("cars",)),
]
# fmt: on
TASKS: dict[str, Task] = {
    name: Task(name, "vtab-1k", group, classes, (800, 200, test), origin, tuple(aliases), verified)
    for group, rows in VTAB.items()
    for name, classes, test, *aliases in rows
    for origin, verified in [
        (ORIGINALS[name].get, ORIGINALS[name].verified)
        if name in ORIGINALS
        else ("prepared folder only", "not rebuilt")
    ]
}
TASKS |= {name: Task(name, "fgvc", *row, "published list") for name, *row in FGVC}
TASKS |= {
    "digits": Task(
        "digits", "demo", "demo", 10, (800, 200, 797), "embedded UCI handwritten digits"
    ),
    "fashion_mnist": Task(
        "fashion_mnist",
        "pretraining",
        "demo",
        10,
        (50000, 10000, 10000),
        "Fashion-MNIST",
        ("fashion",),
    ),
}


def tasks_of(benchmark: str | None) -> list[Task]:
    """The tasks of a benchmark, in the table's order."""
    return [task for task in TASKS.values() if task.benchmark == benchmark]


def find_task(name: str) -> Task:
    """The table's row for a task name or alias; DataError with the nearest name if there is none."""
    suite = {"vtab_1k": "vtab", "vtab1k": "vtab"}.get(name.lower().replace("-", "_"), name.lower())
    if suite in SUITES:
        raise DataError(f"{name} is a suite of tasks: python suite.py --dataset {suite}")
    names = {alias: task for task in TASKS.values() for alias in (task.name, *task.aliases)}
    key = name.lower().replace("-", "_")
    if key not in names:
        known = {alias: task.name for alias, task in names.items()} | {
            suite: suite for suite in SUITES
        }
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {known[near[0]]!r}?"
            if near
            else f"there are {', '.join([*SUITES, *TASKS])}"
        )
        raise DataError(f"unknown dataset {name!r}: {hint}")
    return names[key]


class Images:
    """One split of a task. Item i is (image (3, S, S) uint8, label int), the same at every reading.

    Attributes: `items` (paths, or an array (N, H, W) or (N, H, W, 3) of uint8), `labels` (N,) int64, `about` (source,
    encoding, counts), `source` ("original", "prepared", "lists", "embedded"), `benchmark` (whose official split it is;
    "not <benchmark>" for a subset). `crop`: the test view is the centre crop of a resized image, as in FGVC, instead of
    the whole image. `cache`: the file for `tensors` and `hold`; `checked`: that of `check`.
    """

    def __init__(
        self,
        items,
        labels,
        img_size,
        about="",
        *,
        source="",
        benchmark="",
        crop=False,
        cache=None,
        checked=None,
    ) -> None:
        self.items, self.img_size, self.about, self.source, self.benchmark = (
            items,
            img_size,
            about,
            source,
            benchmark,
        )
        self.official = not benchmark.startswith("not ")
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)
        self.short = (
            round(img_size / 0.875) if crop else None
        )  # the resized image's short side, 256 for 224
        self.cache, self.checked, self.pixels = cache, checked, None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return TF.pil_to_tensor(self._view(self._open(i), None)), int(self.labels[i])

    def _open(self, i: int) -> Image.Image:
        item = self.items[i]
        if self.pixels is not None:
            height, width = self.shapes[i].tolist()
            start = self.starts[i].item()
            item = self.pixels[start : start + height * width * 3].view(height, width, 3).numpy()
        try:
            return (Image.open(item) if isinstance(item, Path) else Image.fromarray(item)).convert(
                "RGB"
            )
        except UNREADABLE as error:
            raise DataError(f"cannot read image {item}: {error}; get the file again") from error

    def _view(self, image: Image.Image, seed: str | None) -> Image.Image:
        """The image at S x S: augmented by random numbers of `seed`, or as in testing."""
        size = [self.img_size, self.img_size]
        if self.short and (self.pixels is None or seed is None):
            image = TF.resize(image, self.short, BICUBIC)
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(zlib.crc32(seed.encode()))  # the CPU's alone
                box = RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            image = TF.resized_crop(image, *box, size, BICUBIC)
            return TF.hflip(image) if flip else image
        if self.short:
            return TF.center_crop(image, size)
        return image if image.size == tuple(size) else TF.resize(image, size, BICUBIC)

    def _batch(self, indexes: list[int], seed: str | None) -> tuple[Tensor, Tensor]:
        views = [self._view(self._open(i), seed and f"{seed} {i}") for i in indexes]
        return torch.stack([TF.pil_to_tensor(view) for view in views]), self.labels[indexes]

    def batches(
        self,
        batch_size: int,
        workers: int = 4,
        order: Iterable[int] | None = None,
        seed: str | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as (B, 3, S, S) uint8 with labels (B,), in the given order or their own, decoded by `workers`
        processes (0: by this one). With a seed, images are augmented: random resized crop and flip, the same for the
        same seed and index whatever the workers."""
        order = range(len(self)) if order is None else order
        yield from self._load(order, batch_size, workers, partial(self._batch, seed=seed))

    def _load(self, order, batch_size: int, workers: int, collate: Callable) -> Iterator:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        workers = (
            min(workers, cores) if len(order) * self.img_size**2 > 5e6 else 0
        )  # done before a process starts
        if multiprocessing.get_start_method() != "fork" and (
            self.pixels is not None or self._in_memory()
        ):
            workers = 0  # each process would be sent all pixels
        try:
            own = torch.Generator()  # else starting an epoch draws from the run's random numbers
            yield from DataLoader(
                order, batch_size, num_workers=workers, collate_fn=collate, generator=own
            )
        except DataError as error:  # from a worker: its traceback, whose last line is the message
            raise DataError(
                str(error).strip().splitlines()[-1].removeprefix("splits.DataError: ")
            ) from None

    def tensors(
        self, device: torch.device | str = "cpu", workers: int = 4
    ) -> tuple[Tensor, Tensor]:
        """The whole split on `device`: (N, 3, S, S) uint8 and (N,) int64; decoded once, then read from the cache."""

        def decode() -> dict[str, Tensor]:
            images = torch.empty(len(self), 3, self.img_size, self.img_size, dtype=torch.uint8)
            for part, (batch, _) in zip(
                images.split(50), self._bar(self.batches(50, workers)), strict=True
            ):
                part.copy_(batch)
            return {"images": images}

        return self._cached(decode)["images"].to(device), self.labels.to(device)

    def hold(self, workers: int = 4, limit: int | None = None) -> bool:
        """Keep the split in memory as uint8, each image at the short side of the test view, aspect ratio kept, so that
        an epoch decodes nothing. Says how much that takes; does nothing above `limit` bytes (default: half of the
        machine's memory). True if it is held."""
        sizes = [
            Image.open(item).size if isinstance(item, Path) else item.shape[1::-1]
            for item in self.items
        ]
        shapes = torch.tensor(  # torchvision's rounding
            [
                (self.short, self.short * w // h) if w > h else (self.short * h // w, self.short)
                for w, h in sizes
            ]
        )
        need = int(shapes.prod(1).sum()) * 3
        if limit is None:
            limit = (
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
                if hasattr(os, "sysconf")
                else 4 << 30
            )
        size = f"{len(self)} images at {self.short} pixels take {need / 2**30:.2f} GiB"
        if need > limit:
            print(
                f"{size} of memory, over the limit of {limit / 2**30:.2f}: streamed from the files"
            )
            return False
        print(f"{size} of memory, and as much on disk in {self.cache}")

        def decode() -> dict[str, Tensor]:
            pixels, start = torch.empty(need, dtype=torch.uint8), 0
            for batch in self._bar(self._load(range(len(self)), 50, workers, self._flat)):
                pixels[start : start + len(batch)] = batch
                start += len(batch)
            return {"pixels": pixels}

        self.shapes, self.starts = shapes, shapes.prod(1).cumsum(0) * 3 - shapes.prod(1) * 3
        self.pixels = self._cached(decode)["pixels"]
        return True

    def prepare(self, device: torch.device | str, workers: int = 4) -> None:
        """Decode once what training reads many times: onto the device, or held in memory."""
        if self.short:
            self.hold(workers)
        else:
            self.ready = self.tensors(device, workers)

    def epoch(self, order: Tensor, batch_size: int, workers: int, seed: str) -> Iterator:
        """The images of one epoch in that order, (B, 3, S, S) uint8 and labels (B,)."""
        if self.short:
            yield from self.batches(batch_size, workers, order.tolist(), seed)
            return
        images, labels = self.ready
        for batch in order.to(images.device).split(batch_size):
            yield images[batch], labels[batch]

    def digest(self) -> str:
        return self.fingerprint()

    def _bar(self, batches: Iterable, doing: str = "decoding") -> Iterable:
        return tqdm(
            batches,
            f"{doing} {len(self)} images",
            math.ceil(len(self) / 50),
            unit="batch",
            disable=None,
        )

    def _flat(self, indexes: list[int]) -> Tensor:
        """Images in short-side size, (H, W, 3) each, all in one row."""
        views = [TF.resize(self._open(i), self.short, BICUBIC) for i in indexes]
        return torch.from_numpy(np.concatenate([np.asarray(view).ravel() for view in views]))

    def _in_memory(self) -> bool:
        return isinstance(self.items, np.ndarray)

    def fingerprint(self) -> str:
        """A digest of size, labels and images, these by name, length and time of change, or by value if in memory."""
        digest = hashlib.sha256(f"{self.img_size} {self.short}".encode())
        digest.update(self.labels.numpy())
        if self._in_memory():
            digest.update(np.ascontiguousarray(self.items))
        else:
            for path in self.items:
                stat = path.stat()
                digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def check(self, workers: int = 4) -> None:
        """Decode every file once, before a training is spent on them; DataError for the first that is damaged. That
        they are whole is remembered beside the cache."""
        mark = self.checked
        if self._in_memory() or (
            mark and mark.is_file() and mark.read_text() == self.fingerprint()
        ):
            return
        for _ in self._bar(self._load(range(len(self)), 50, workers, self._try), "checking"):
            pass
        if mark:
            with contextlib.suppress(OSError):
                mark.parent.mkdir(exist_ok=True)
                mark.write_text(self.fingerprint())

    def _try(self, indexes: list[int]) -> None:
        for i in indexes:
            self._open(i)

    def _cached(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, from the cache file if that is whole and of these very images, else made and written."""
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
        part = self.cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.cache.parent.mkdir(exist_ok=True)
            save_file(tensors, part, {"key": key, "crc32": _crc32(tensors)})
            os.replace(part, self.cache)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            print(f"decoded images are not kept: cannot write {self.cache} ({error})")
        return tensors


def _crc32(tensors: dict[str, Tensor]) -> str:
    return " ".join(f"{zlib.crc32(tensors[name].numpy()):08x}" for name in sorted(tensors))


def load(
    name: str,
    root: str | os.PathLike = "data",
    *,
    split: str = "trainval",
    img_size: int = 224,
    source: str = "auto",
    download: bool = True,
) -> tuple[Images, Images]:
    """(train, test) of a task: split "trainval" gives train + val and test, "train" gives train and val.

    Images are img_size x img_size RGB. `source` is for VTAB-1k: "original" (downloaded if need be and `download`),
    "prepared", or "auto", the originals unless they cannot be had. Raises DataError, naming the file and the remedy,
    for an unknown task, data that are not there, and data that are damaged or have wrong counts or labels. A test list
    shorter than the official one is read; `about` then calls it a subset and `benchmark` says "not <benchmark>".
    """
    task, root = find_task(name), Path(root)
    if split not in ("trainval", "train") or source not in SOURCES:
        raise ValueError(
            f"split is trainval or train and source one of {SOURCES}, not {split!r}, {source!r}"
        )
    halves = [["train"], ["val"]] if split == "train" else [["train", "val"], ["test"]]
    read = {"vtab-1k": _vtab_1k, "fgvc": _fgvc}.get(task.benchmark, _arrays)
    origin, about, found = read(task, root, halves, source, download)
    names = [str(path) for items, _ in found if isinstance(items, list) for path in items]
    notes, declared = [], root / task.benchmark / task.name / "SUBSET"
    for parts, (_, labels) in zip(halves, found, strict=True):
        count, role = _count(task, parts), parts[0]
        if not 0 < len(labels) <= count:
            raise DataError(
                f"{task.name}: {len(labels)} {role} images, where {task.benchmark} has {count}"
            )
        if not 0 <= min(labels) <= max(labels) < task.classes:
            raise DataError(
                f"{task.name}: {role} labels {min(labels)} to {max(labels)}, not in 0..{task.classes - 1}"
            )
        notes.append(
            f"{len(labels)} {role}"
            if len(labels) == count
            else f"{len(labels)} of {count} {role} (subset)"
        )
    about, official = f"{about}, {' / '.join(notes)}", "subset" not in " ".join(notes)
    if len(set(names)) < len(names):
        about, official = f"{about}; {len(names) - len(set(names))} images are repeated", False
    if origin == "prepared" and declared.exists():
        about, official = f"{about}; SUBSET: {' '.join(declared.read_text().split())}", False
    same = {
        "about": about,
        "source": origin,
        "benchmark": task.benchmark if official else f"not {task.benchmark}",
    }
    same["crop"] = task.benchmark == "fgvc"
    keep, stem = task.benchmark in SUITES.values(), f"{task.name}-{origin}-{split}-{img_size}"
    cache, checked = (
        root / "cache" / f"{stem}.{end}" if keep else None for end in ("safetensors", "ok")
    )
    (train, train_labels), (test, test_labels) = found
    train = Images(train, train_labels, img_size, cache=cache, **same)
    return train, Images(test, test_labels, img_size, checked=checked, **same)


def _count(task: Task, parts: list[str]) -> int:
    return sum(size for part, size in zip(LISTS, task.sizes, strict=True) if part in parts)


# Readers: (task, root, parts of train and of test, source, download) -> source, what it is, [(items, labels) of both]
Found = tuple[str, str, list[tuple["list[Path] | np.ndarray", Iterable[int]]]]


def _vtab_1k(task: Task, root: Path, halves: list[list[str]], source: str, download: bool) -> Found:
    folder = root / "vtab-1k" / task.name
    archive = f"unpack a prepared archive (Google Drive {ARCHIVE}) to {folder}"
    if source == "original" and task.name not in ORIGINALS:
        raise DataError(
            f"--source original: {task.name} has a prepared folder only; use --source prepared"
        )
    if source != "prepared" and task.name in ORIGINALS:
        try:
            found = official(task.name, root, halves, task.sizes, download)
            return "original", f"originals, {_encoding(task, found)}", found
        except Missing as error:
            if source == "original" or not folder.is_dir():
                raise Missing(f"{error}; or {archive}") from None
            print(f"{error}; reading the prepared folder {folder} instead")
    if not folder.is_dir():
        raise Missing(f"{task.name}: no folder {folder}: {archive} or point --data-dir elsewhere")
    found, formats = [], set()
    for parts in halves:
        listing, count = (
            folder / f"{''.join(LISTS[part] for part in parts)}.txt",
            _count(task, parts),
        )
        paths, labels = [], []
        for where, line in lines(listing):
            try:
                name, label = line.rsplit(None, 1)
                labels.append(int(label))
            except ValueError:
                raise DataError(f"{where}: expected '<image> <label>', found {line!r}") from None
            if not 0 <= labels[-1] < task.classes:
                raise DataError(f"{where}: label {label} is outside 0..{task.classes - 1}")
            paths.append(folder / inside(name, where))
            formats.add(image_format(paths[-1], where))
        if not 0 < len(paths) <= count or (len(paths) < count and parts != ["test"]):
            raise DataError(f"{listing} has {len(paths)} images, VTAB-1k's {task.name} has {count}")
        found.append((paths, labels))
    return "prepared", f"prepared folder, {'+'.join(sorted(formats))} images", found


def _encoding(task: Task, found: list[tuple]) -> str:
    """The file formats of originals, every header read."""
    if isinstance(found[0][0], np.ndarray):
        return "raw images"
    where = f"{task.name}: the originals are not whole"
    return (
        "+".join(sorted({image_format(path, where) for paths, _ in found for path in paths}))
        + " images"
    )


def _fgvc(task: Task, root: Path, halves: list[list[str]], source: str, download: bool) -> Found:
    """VPT's layout: train.json, val.json, test.json; class ids of all three, sorted, become 0..C-1."""
    names = (task.name, *task.aliases)
    folders = [
        path for path in (root / "fgvc").glob("*/") if path.name.lower().replace("-", "_") in names
    ]
    by_hand = (
        f"put the images of {task.origin} into {root / 'fgvc' / task.name} and, beside them, train.json, val.json and "
        f"test.json, which VPT's repository links to (github.com/KMnP/vpt)"
    )
    if not folders and task.name == "oxford_flowers" and source != "prepared":
        try:
            splits = originals("oxford_flowers102", root, download)
        except Missing as error:
            raise Missing(f"{error}; or {by_hand}") from None
        cut = {
            part: splits[name]
            for part, name in (("train", "train"), ("val", "validation"), ("test", "test"))
        }
        lists = {
            part: (take(range(len(keys))), labels.tolist())
            for part, (keys, labels, take) in cut.items()
        }
        found = [
            tuple(sum((lists[part][i] for part in parts), []) for i in (0, 1)) for parts in halves
        ]
        return "original", f"originals, {_encoding(task, found)}", found
    if not folders:
        raise Missing(f"{task.name}: no folder {root / 'fgvc' / task.name}: {by_hand}")
    folder, lists, formats = folders[0], {}, set()
    for part in LISTS:
        listing = folder / f"{part}.json"
        try:
            lists[part] = json.loads(listing.read_text(encoding="utf-8-sig"))
            if not lists[part] or not all(type(label) is int for label in lists[part].values()):
                raise ValueError("a class is no integer, or the list is empty")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{listing} is no list like {{'<image>': <class>}} ({error}): get it again"
            ) from None
    ids = sorted({label for labels in lists.values() for label in labels.values()})
    if len(ids) > task.classes:
        raise DataError(
            f"{folder}: the lists have {len(ids)} classes, {task.name} has {task.classes}"
        )
    found = []
    for parts in halves:
        items = [(f"{folder / part}.json", *item) for part in parts for item in lists[part].items()]
        paths = []
        for where, name, _ in items:
            places = [folder / sub / inside(name, where) for sub in ("images", "Images", "")]
            paths.append(next((path for path in places if path.exists()), places[-1]))
            formats.add(image_format(paths[-1], where))
        found.append((paths, [ids.index(label) for _, _, label in items]))
    return "lists", f"lists of VPT, {'+'.join(sorted(formats))} images", found


def _arrays(task: Task, root: Path, halves: list[list[str]], source: str, download: bool) -> Found:
    if task.name == "digits":
        with np.load(DEMO) as file:
            images, labels = file["images"], file["labels"]
    else:
        try:
            parts = [
                torchvision.datasets.FashionMNIST(root, train, download=download)
                for train in (True, False)
            ]
        except (RuntimeError, OSError) as error:
            raise Missing(
                f"no Fashion-MNIST in {root} and none to download ({str(error).splitlines()[0]}): put its four "
                f"unpacked files, train-images-idx3-ubyte and so on, into {root / 'FashionMNIST' / 'raw'}"
            ) from error
        images, labels = (
            np.concatenate([getattr(p, name) for p in parts]) for name in ("data", "targets")
        )
    cut = _count(task, halves[0])
    stop = cut + _count(task, halves[1])
    return (
        "embedded",
        task.origin,
        [(images[part], labels[part]) for part in (slice(cut), slice(cut, stop))],
    )


def normalizer(mean: tuple, std: tuple, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function from (B, 3, S, S) uint8 to new float32 images (x / 255 - mean) / std, one value per RGB channel."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (mean, std))
    return lambda images: (
        (images.to(device).float() - mean) / std
    )  # to the device as bytes, a quarter of the way
