"""The data: 24 tasks (VTAB-1k's 19, FGVC's 5), the embedded demo, or a folder of one's own images.

    train, test = load("dtd", "data", img_size=224)     # the 1000 training images, the test images
    train, val = load("dtd", "data", split="train")     # 800 to train on, 200 to choose with
    train, test = load("path/to/photos")                # one's own: a folder for each class
    for x, y in train.epoch(order, 64, seed="0 0"): ... # (B, 3, S, S) uint8, (B,)

    python data.py --data-dir data                      # the table, what is there, and its proof

VTAB-1k's images are resized straight to S x S (bicubic) and not augmented; FGVC's and one's own are
trained on in random crops and flips, and scored by the centre.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import multiprocessing
import os
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import tasks
from model import few
from splits import DataError, FolderSplit, Missing, nfc, printable, tfds_order  # noqa: F401
from tasks import COMMON, ENDINGS, HEIC, ROLE_NUMBER, TASKS, Found, Task, open_image

BICUBIC, FLIP = v2.InterpolationMode.BICUBIC, v2.RandomHorizontalFlip()
AUGMENT = {  # how training images are varied: a transform to S x S
    "none": lambda size: v2.Identity(),
    "flip": lambda size: FLIP,
    "crop": lambda size: v2.Compose([v2.RandomResizedCrop(size, interpolation=BICUBIC), FLIP]),
}
NORMALIZE = {  # channel mean and std
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
STRIPE = 50  # a side over the other above which an image is no photo
MAX_SAMPLE_VALUE = 281  # a tag of TIFF
FEW_PIXELS = 5e6  # are decoded before a worker process has started


class Images(Dataset):
    """A selection of a task's images, such as its 1000 training images. Item i is (image (3, S, S)
    uint8, label int) in the test view; in training the view is drawn by the epoch's seed and i."""

    source = description = role = ""  # original, prepared, lists, embedded or folder; train, ...
    official = False  # as far as can be proven the benchmark's own split (of a folder: all of it)
    refused: Sequence[tuple[str, str]] = ()  # path and reason of images that were left out
    left_out = property(lambda self: len(self.refused))
    folder: str | None = None  # of one's own images
    class_names: Sequence[str] | None = None
    digests: dict[str, str] = {}  # sha256 of the keys, or labels, of each slice
    prepared: Tensor | None = None  # (N, 3, S, S) uint8 on the device

    def __init__(self, items, labels, img_size: int, *, augment="none", upright=False) -> None:
        self.items = self.files = items  # `items` become arrays in memory, `files` stay
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)
        self.img_size, self.augment = img_size, augment
        self.transform = AUGMENT[augment](img_size)
        self.short = round(img_size / 0.875) if augment == "crop" else None  # side before a crop
        self.upright = upright  # whether EXIF's orientation counts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int, seed: str | None = None) -> tuple[Tensor, int]:
        image = self._resized(i)
        if seed is not None:
            image = with_numbers_of(f"{seed} {i}", self.transform, image)
        elif self.short:
            image = TF.center_crop(image, [self.img_size])
        return TF.pil_to_tensor(image), int(self.labels[i])

    def _resized(self, i: int) -> Image.Image:
        """Image i in RGB, at S x S, or before a crop with its short side at `short`."""
        item = self.items[i]
        try:
            image = open_image(item)
            image = (as_photo(image) if self.upright else image).convert("RGB")
        except Exception as error:  # whatever a damaged file makes Pillow raise
            raise DataError(f"cannot read image {tasks.name_of(item)}: {error}") from error
        return TF.resize(image, [self.short] if self.short else [self.img_size] * 2, BICUBIC)

    def prepare(self, device: torch.device | str = "cpu", workers: int = 4) -> None:
        """Decode all images once, at S x S onto `device`, or before a crop into the CPU's memory.
        If that takes more than half of the free memory, every epoch reads the files instead."""
        if self.prepared is not None or self.items is not self.files:
            return
        place, area = device, self.img_size**2
        if self.short:  # most photos are 3 : 2 or squarer
            place, area = "cpu", int(1.5 * self.short**2)
        need = 3 * len(self) * area
        fits = need <= free_memory(place) // 2
        where = f"on {place}" if fits else "more than half of what is free: read from the files"
        print(f"{len(self)} images take {need / 2**20:.0f} MiB of memory, {where}")
        if not fits:
            return
        with ThreadPoolExecutor(min(workers, CORES) or 1) as pool:
            images = pool.map(self._resized, range(len(self)))
            images = tqdm(images, "decoding", len(self), disable=None)
            if self.short:
                self.items = [np.array(image) for image in images]
                return
            pixels = torch.empty(len(self), 3, self.img_size, self.img_size, dtype=torch.uint8)
            for i, image in enumerate(images):
                pixels[i] = TF.pil_to_tensor(image)
        self.prepared = pixels.to(device)

    def epoch(self, order: Tensor, batch_size: int, workers: int = 4, seed: str = "0") -> Iterator:
        """Training batches, (B, 3, S, S) uint8 and labels (B,), in the order (N,) given; augmented
        images are the same for the same seed and index whatever the workers."""
        if self.prepared is None:
            yield from self.batches(batch_size, workers, order.tolist(), seed)
            return
        labels = self.labels.to(self.prepared.device)
        for rows in order.to(self.prepared.device).split(batch_size):
            batch = self.prepared[rows]  # (B, 3, S, S), a copy
            if self.augment == "flip":
                for image, i in zip(batch, rows.tolist(), strict=True):
                    image.copy_(with_numbers_of(f"{seed} {i}", self.transform, image))
            yield batch, labels[rows]

    def batches(self, batch_size: int, workers: int = 4, order=None, seed=None) -> Iterator:
        """The test view in order, (B, 3, S, S) uint8 and labels (B,), decoded by `workers`
        processes (0: by this one)."""

        def read(rows: Sequence[int]) -> list[Tensor] | DataError:
            try:
                return default_collate([self.__getitem__(i, seed) for i in rows])
            except DataError as error:  # raised in a worker, it would arrive as a traceback
                return error

        order = range(len(self)) if order is None else order
        rows = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        is_much = len(order) * self.img_size**2 >= FEW_PIXELS
        can_fork = is_much and "fork" in multiprocessing.get_all_start_methods()
        workers = min(workers, CORES) if can_fork else 0
        # with a generator of its own, else an epoch draws from the run's numbers
        options = {"num_workers": workers, "generator": torch.Generator()}
        options["multiprocessing_context"] = "fork" if workers else None
        done = 0
        try:
            for batch in DataLoader(rows, batch_size=None, collate_fn=read, **options):
                if isinstance(batch, DataError):
                    raise batch
                yield batch
                done += batch_size
        except RuntimeError as error:
            if not workers or "worker" not in str(error):
                raise
            why = "perhaps for lack of shared memory (Docker: --shm-size 2g)"
            print(f"note: a --workers process died, {why}; going on with none", file=sys.stderr)
            yield from self.batches(batch_size, 0, order[done:], seed)

    def rows(self) -> list[tuple[str, str]]:
        """(path in its folder, class) of each image of a folder of one's own."""
        paths = [path.relative_to(self.folder).as_posix() for path in self.files]
        return [(path, self.class_names[i]) for path, i in zip(paths, self.labels, strict=True)]

    def digest(self) -> str:
        """A digest of labels and images in order, these by value, or by `contents` of their files:
        the same wherever and whenever they are read, and at every image size."""
        digest = hashlib.sha256(self.labels.numpy())
        for item in self.files:
            if isinstance(item, Path):
                item = contents(item)
            digest.update(item if isinstance(item, bytes) else item.tobytes())
        return digest.hexdigest()


def as_photo(image: Image.Image) -> Image.Image:
    """A photo as its EXIF orientation says, in 8 bits. ValueError for a stripe, which would take
    much memory before its centre is cut out, and for pixels whose range no file says."""
    has_16_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
    if max(image.size) > STRIPE * min(image.size):
        raise ValueError(f"a stripe of {image.width} x {image.height} pixels")
    if image.mode in ("I", "F") and not has_16_bits:
        raise ValueError("pixels of 32 bits: save it with 8 or 16")
    tags = getattr(image, "tag_v2", {})  # of a TIFF, which says if it uses fewer of its 16 bits
    image = ImageOps.exif_transpose(image)
    if has_16_bits:  # Pillow would cut off at 255
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        (largest,) = tags.get(MAX_SAMPLE_VALUE, (2**bits - 1,))
        white = 2 ** max(8, int(largest).bit_length()) - 1
        pixels = np.asarray(image).astype(np.uint32) * 255 // white
        image = Image.fromarray(pixels.clip(max=255).astype(np.uint8))
    return image


def contents(path: Path) -> bytes:
    """What tells a file from others: its length, its first and its last 4 KiB."""
    with open(path, "rb") as file:
        head = file.read(4096)
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 4096))
        return b"%d " % length + head + file.read()


def with_numbers_of(key: str, transform: Callable, image):
    """transform(image) with the random numbers of the key; torch's own are untouched."""
    with torch.random.fork_rng(devices=[]):
        # the CPU's generator alone: torch.manual_seed() would reseed the GPU's too
        torch.default_generator.manual_seed(zlib.crc32(key.encode()))
        return transform(image)


def normalizer(mean: tuple, std: tuple, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function from (B, 3, S, S) uint8 to new float32 images (x / 255 - mean) / std."""
    mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
    std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
    return lambda images: (images.to(device).float() - mean) / std  # sent as bytes


def mean_and_std(args: argparse.Namespace, model: nn.Module) -> tuple[tuple, tuple]:
    """Of the inputs, a value per channel, as the run asks for."""
    own = model.pretrained_cfg
    return (own["mean"], own["std"]) if args.normalize == "model" else NORMALIZE[args.normalize]


def create_normalizer(args: argparse.Namespace, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """(B, 3, S, S) uint8 -> float32 on the model's device, by the run's mean and std."""
    return normalizer(*mean_and_std(args, model), next(model.parameters()).device)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a device has to spare; of a CPU that does not tell (not Linux), 8 GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    return (int(free[1]) << 10 if free else 8 << 30) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# --- folders of one's own images ------------------------------------------------------------------
#     photos/train/<class>/*  photos/test/<class>/*   # with val/ too: what --val scores
#     photos/train/<class>/*  photos/val/<class>/*    # val/ is the test then
#     photos/<class>/*                                # splits.py draws some of a class for the test
# A class is a folder's name; its images lie at any depth below it. Hidden files are ignored, other
# files are left alone, and nothing is ever written into the folder.

OWN = "own"  # the benchmark of folders
FOLDER = "folder"  # in a run's identity: the digest of its folder
FOLDER_FLAGS = ("test_share", "val_share", "split_seed", "skip_bad_images")
# The common recipe, but 30 epochs: masked experts on a frozen backbone need few, and a folder can
# have 200 times VTAB-1k's images. Crops: photos of one's own are of any shape.
FOLDER_RECIPE = COMMON | {"epochs": 30, "augment": "crop"}
SPLITS = ("train", "val", "test")
LIKE_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
Part = dict[int, list[Path]]  # of a split: the images of each class, by its number


def entries(folder: Path, folders: bool) -> list[Path]:
    """What is in a folder, in order, without what is hidden: its folders, or all else."""
    names = sorted(os.listdir(folder), key=nfc) if folder.is_dir() else []
    paths = [folder / name for name in names if not name.startswith(".")]
    return [path for path in paths if os.path.isdir(path) == folders]


def files_below(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """All files below a folder, in order; a link back to a folder above is not followed."""
    above |= {folder.resolve()}  # torchvision's make_dataset would go round and round
    files = entries(folder, folders=False)
    for inner in entries(folder, folders=True):
        if inner.resolve() not in above:
            files += files_below(inner, above)
    return files


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders "train", "val" and "test"; of "train" alone, the folder itself, if it has no
    split. A folder train/ without folders in it is a class of that name."""
    inner = {path.name: path for path in entries(folder, folders=True)}
    like = {name for name in inner if name.lower() in LIKE_SPLITS and entries(inner[name], True)}
    if like and ("train" not in like or like - set(SPLITS)):
        what = f"{folder} has {few(sorted(like))}"
        raise DataError(f"{what}: call the parts of a split train, val and test")
    return {part: inner[part] for part in SPLITS if part in inner} if like else {"train": folder}


def find_parts(folder: Path) -> tuple[dict[str, Part], list[Path]]:
    """The images of each part of the split that the folder has, and the other files."""
    folders, parts, others = split_folders(folder), {}, []
    classes = [nfc(path.name) for path in entries(folders["train"], folders=True)]
    above = frozenset(path.resolve() for path in folders.values())
    for name, place in folders.items():
        parts[name] = defaultdict(list)
        others += entries(place, folders=False)
        for path in entries(place, folders=True):
            if nfc(path.name) not in classes:
                raise DataError(f"{path}: {folders['train']} has no such class: rename it")
            for file in files_below(path, above):
                if file.suffix.lower() in ENDINGS:  # what it holds is seen later
                    parts[name][classes.index(nfc(path.name))].append(file)
                else:
                    others.append(file)
    return parts, others


def note_passed_over(files: Sequence[Path], names: str) -> None:
    """Name the files that are not read as images: one may miss them."""
    heic = any(path.suffix.lower() in HEIC for path in files) and HEIC[0] not in ENDINGS
    remedy = " (for HEIC: pip install pillow-heif)" if heic else ""
    words = f"note: {len(files)} files are not read as images{remedy}: {names}"
    print(printable(words), file=sys.stderr)


def read_folder(task, root, roles, source: str, download, how: FolderSplit) -> Found:
    """As every reader of tasks.py: the images of the roles, the last of which is to be scored.
    Raises DataError for unreadable images, and for a class or a role without any."""
    if source != "auto":
        raise DataError(f"--source {source} is for VTAB-1k, not for {task.folder}: leave it out")
    folder, scored = Path(task.folder), roles[-1]
    found = Found("folder", "own images")

    def names(paths: Iterable[Path]) -> str:
        return printable(few([path.relative_to(folder).as_posix() for path in paths]))

    # --- which image is of which part ---
    parts, others = find_parts(folder)
    if others:
        note_passed_over(others, names(others))
    if "test" not in parts and split_folders(folder)["train"] != folder:
        parts["test"] = parts.pop("val", {})
    for role, share in (("test", how.test_share), ("val", how.val_share)):
        if role in parts or role not in (scored, "test"):
            continue
        parts[role], whole, single = {}, parts["train"], []
        for label, files in whole.items():
            drawn = how.draw(folder, files, share)
            parts[role][label] = [file for file in files if file in drawn]
            whole[label] = [file for file in files if file not in drawn]
            single += [] if drawn else [task.class_names[label]]
        found.notes.append(f"{role}: {share:g} of each class, split seed {how.seed}")
        if single:
            words = f"note: the single image of class {few(single)} is used for training"
            print(words, file=sys.stderr)
    parts = {role: parts.get(role, {}) for role in roles}

    # --- what cannot be read, what is missing, what is there twice ---
    bad = unreadable([path for part in parts.values() for path in chain(*part.values())])
    if bad:
        reasons = few([f"{names([path])} ({why})" for path, why in bad.items()])
        what = f"{len(bad)} files of {folder} cannot be read: {reasons}"
        if not how.skip_bad:
            raise DataError(f"{what}; repair or remove them, or use --skip-bad-images")
        print(f"left out: {printable(what)}", file=sys.stderr)
        found.notes.append(f"{len(bad)} unreadable images left out")
        found.refused = [(names([path]), why) for path, why in bad.items()]
        found.agrees = False
    class_of: dict[bytes, int] = {}  # digest of a training image -> its class
    twice = torn = 0
    for role, part in parts.items():
        found.images[role], found.labels[role] = [], []
        for label, files in part.items():
            for path in files:
                if path in bad:
                    continue
                digest = hashlib.sha256(path.read_bytes()).digest()
                if role == scored:
                    twice += digest in class_of
                else:
                    torn += class_of.setdefault(digest, label) != label
                found.images[role].append(path)
                found.labels[role].append(label)
    trained = set(found.labels["train"])
    empty = [name for label, name in enumerate(task.class_names) if label not in trained]
    if empty or not found.images[scored]:
        what = f"training images of class {few(empty)}" if empty else f"readable {scored} images"
        raise DataError(f"{folder} has no {what}: add some, or put all images into <class>/*")
    if torn:
        print(f"warning: {torn} training images are in another class too", file=sys.stderr)
    if twice:
        found.notes.append(f"{twice} {scored} images are training images too")
        print(f"warning: {found.notes[-1]}, the same bytes in two files", file=sys.stderr)
    return found


def unreadable(files: Sequence[Path]) -> dict[Path, str]:
    """The files that do not decode, and why. Each is decoded once, JPEGs at an eighth."""

    def defect(path: Path) -> str:
        try:
            with open_image(path) as image:
                image.draft("RGB", (64, 64))
                as_photo(image)
        except Image.DecompressionBombError:
            return f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller"
        except UnidentifiedImageError:
            return "no image, or a damaged one"
        except Exception as error:  # whatever a damaged file makes Pillow raise
            return str(error) if type(error) is ValueError else type(error).__name__
        return ""

    with ThreadPoolExecutor(CORES) as pool:
        reasons = tqdm(pool.map(defect, files), "checking images", len(files), disable=None)
        return {path: why for path, why in zip(files, reasons, strict=True) if why}


def identify(own: dict, dataset: str, out: str | os.PathLike) -> dict:
    """A run's identity with its folder's name, and a digest of its files' names and contents, so
    that it may lie anywhere; of a task in the table without the flags that are for folders."""
    if not os.path.isabs(dataset):
        unread = own.keys() & set(FOLDER_FLAGS)
        for name in sorted(unread):
            flag = "--" + name.replace("_", "-")
            print(f"note: {flag} is for folders of images; it is ignored", file=sys.stderr)
        return {name: value for name, value in own.items() if name not in unread}
    folder, digest = Path(dataset), hashlib.sha256()
    if Path(out).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"--out {out} lies among the images of {folder}: name another folder")
    for name, part in find_parts(folder)[0].items():
        for path in chain(*part.values()):
            where = nfc(path.relative_to(folder).as_posix())
            digest.update(os.fsencode(f"{name} {where}\n"))
            digest.update(contents(path) if path.is_file() else b"")
    return own | {"dataset": printable(nfc(folder.name)), FOLDER: digest.hexdigest()}


# --- tasks ----------------------------------------------------------------------------------------
SUITES = {"vtab": "vtab-1k", "fgvc": "fgvc"}  # all tasks of a benchmark
SOURCES = ("auto", "original", "prepared")


def tasks_of(benchmark: str | None) -> list[Task]:
    """The tasks of a benchmark, in the table's order."""
    return [task for task in TASKS.values() if task.benchmark == benchmark]


def find_task(name: str, folder_split: FolderSplit | None = None) -> Task:
    """The table's row for a task name or alias; for a folder of images, a row of its own.

    A task's exact name comes before a folder of that name: write ./digits for the folder.
    DataError for what is neither, or a folder without two classes to tell apart."""
    names = {alias: task for task in TASKS.values() for alias in (task.name, *task.aliases)}
    key = name.lower().replace("-", "_")
    is_path = name not in names and (os.sep in name or os.path.exists(name))
    if not is_path and key in names:
        return names[key]
    if not is_path:
        if key in SUITES:
            raise DataError(f"{name} is a suite of tasks: python suite.py --dataset {key}")
        near = difflib.get_close_matches(key, [*names, *SUITES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"the tasks are {', '.join(TASKS)}"
        raise DataError(f"--dataset {name}: there is no task or folder of this name; {hint}")
    folder = Path(os.path.abspath(name))
    if not folder.is_dir():
        raise DataError(f"--dataset {name}: there is no such folder of images")
    places = entries(split_folders(folder)["train"], folders=True)
    classes = tuple(printable(nfc(path.name)) for path in places)
    if len(classes) < 2:
        need = "put images into two or more, <class>/* or train/<class>/*"
        raise DataError(f"--dataset {folder}: it has {len(classes)} class folders; {need}")
    row = printable(nfc(folder.name)), OWN, OWN, len(classes), None, str(folder), (), ""
    reader, own = partial(read_folder, how=folder_split or FolderSplit()), {"folder": str(folder)}
    return Task(*row, reader, FOLDER_RECIPE, None, class_names=classes, upright=True, **own)


def load(
    name: str, root: str | os.PathLike = "data", *,
    split: str = "trainval", img_size: int = 224, source: str = "auto", download: bool = True,
    augment: str | None = None, folder_split: FolderSplit | None = None,
) -> tuple[Images, Images]:  # fmt: skip
    """(train, test) of a task: "trainval" gives train + val and test, "train" gives train and val.

    `source` is for VTAB-1k: "original" (downloaded if need be and `download`), "prepared", or
    "auto", the originals unless they cannot be had. `augment` is a key of AUGMENT (default: as is
    usual for the task). Raises DataError, naming the file and the remedy, for what is unknown, not
    there or damaged. A prepared test list that is too short, or has other labels, is read, but not
    `official`."""
    task, root = find_task(name, folder_split), Path(root)
    if split not in ("trainval", "train") or source not in SOURCES:
        raise ValueError(f"split must not be {split!r}, or source not {source!r}")
    parts_of = {"train": ["train"], "val": ["val"]}
    if split == "trainval":
        parts_of = {"train": ["train", "val"], "test": ["test"]}
    try:
        found = task.read(task, root, sum(parts_of.values(), []), source, download)
    except OSError as error:  # no permission, a name that is too long, a folder in a file's place
        reason = error.strerror or error
        raise DataError(f"{task.name}: cannot read {error.filename}: {reason}") from error
    both, counts, paths, formats, is_whole = [], [], [], set(), True
    options = {"augment": augment or task.recipe["augment"], "upright": task.upright}
    for role, parts in parts_of.items():
        items = [found.images[part] for part in parts]
        items = np.concatenate(items) if isinstance(items[0], np.ndarray) else sum(items, [])
        labels = np.concatenate([found.labels[part] for part in parts])
        images = Images(items, labels, img_size, **options)
        images.role, images.source, images.digests = role, found.source, found.digests
        images.class_names, images.folder = task.class_names, task.folder
        images.refused = found.refused
        both.append(images)
        paths += [item for item in items if isinstance(item, Path)]
        formats |= {tasks.image_format(item, task.name) for item in items}
        count = size = len(images)
        if task.sizes:
            size = sum(task.sizes[ROLE_NUMBER[part]] for part in parts)
        is_whole = is_whole and count == size
        counts.append(f"{count} of {size} {role} (subset)" if count < size else f"{count} {role}")
    title = f"{found.title} ({'; '.join(found.notes)})" if found.notes else found.title
    if found.source != "embedded":
        title += f", {'+'.join(sorted(formats))} images"
    notes = [f"{title}, {' / '.join(counts)}"]
    repeated = len(paths) - len(set(paths))
    if repeated:
        notes.append(f"{repeated} images are repeated")
    declared = root / task.benchmark / task.name / "SUBSET"
    if found.source == "prepared" and declared.exists():
        notes.append(f"SUBSET: {' '.join(line for _, line in tasks.lines(declared))}")
    for images in both:
        images.official = found.agrees and is_whole and len(notes) == 1
        images.description = "; ".join(notes)
    return tuple(both)


def load_data(args: argparse.Namespace, download: bool = True) -> tuple[Images, Images]:
    """The images that a run with these arguments trains on, and those that it is scored on."""
    options = {"source": args.source, "download": download, "augment": args.augment}
    options["split"] = "train" if args.val else "trainval"
    how = FolderSplit(args.test_share, args.val_share, args.split_seed, args.skip_bad_images)
    return load(args.dataset, args.data_dir, img_size=args.img_size, folder_split=how, **options)


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 1 if something is damaged, 2 for wrong arguments."""
    words = "Print all tasks, which data are there, and the proof that they are the official ones."
    parser = argparse.ArgumentParser("data.py", argparse.SUPPRESS, words, allow_abbrev=False)
    parser.add_argument("--data-dir", help="folder of the data sets (default: data)")
    words = "tasks, or vtab or fgvc for all of a benchmark (default: vtab fgvc)"
    parser.add_argument("--dataset", nargs="+", default=["vtab", "fgvc"], help=words)
    args = parser.parse_args(argv)
    root, rows, is_whole = Path(args.data_dir or "data"), [], True
    try:
        if args.data_dir and not root.is_dir():
            raise DataError(f"--data-dir: there is no folder {root}")
        for name in args.dataset:
            rows += tasks_of(SUITES.get(name)) or [find_task(name)]
    except DataError as error:
        parser.error(printable(str(error)))
    print(f"{'task':18}classes  train   val   test  what agrees with our official split")
    for task in rows:
        train, val, test = task.sizes or "---"
        print(f"{task.name:21}{task.classes:4}{train:7}{val:6}{test:7}  {task.verified}")
        missing = []
        for source in task.sources:
            try:
                _, images = load(task.argument, root, source=source, download=False)
            except Missing as error:
                missing.append(error)
            except DataError as error:
                print(f"    DAMAGED: {error}")
                is_whole = False
            else:
                is_official = "official" if images.official else "NOT OFFICIAL"
                print(f"    {is_official}: {images.description}")
                for name, digest in images.digests.items():
                    print(f"        {name:16} sha256 {digest}")
        if len(missing) == len(task.sources):
            print(f"    not there: {str(missing[0]).removeprefix(f'{task.name}: ')}")
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
