"""The table of tasks: what each is, where its images come from, how it is trained on.

    TASKS["dtd"].sizes                              # (800, 200, 1880): train, val and test
    task = TASKS["dtd"]
    task.read(task, Path("data"), ["train", "val"], "auto", download=True).images["train"]

Images come from the originals, cut and proven by splits.py; from a prepared folder; or from FGVC's
lists. Originals lie in <root> as torchvision leaves them; what it does not know, up to 3 folders
deeper.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, features
from torchvision import datasets

import splits
from splits import CONSTANTS, CUTS, Content, DataError, Missing, find, regular, within

# what Pillow may open; it would start other programs for some (Ghostscript for EPS)
READABLE = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]
ENDINGS = ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm".split()
HEIC = [".heic", ".heif", ".hif"]
if features.check("avif"):
    READABLE.append("AVIF")
    ENDINGS.append(".avif")
with suppress(ImportError):  # an option, for photos of phones
    from pillow_heif import register_heif_opener

    register_heif_opener()
    READABLE.append("HEIF")
    ENDINGS += HEIC
ROLE_NUMBER = {"train": 0, "val": 1, "test": 2}  # of a role in a task's sizes
Item = Path | bytes | np.ndarray  # a file, an encoded image, or pixels (H, W) or (H, W, 3) of uint8


# --- files and images -----------------------------------------------------------------------------
def open_image(item: Item) -> Image.Image:
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    file = io.BytesIO(item) if isinstance(item, bytes) else regular(item)
    return Image.open(file, formats=READABLE)


def image_format(item: Item, task: str) -> str:
    """The format of an image's file, by its header; DataError, naming the task, without one."""
    if isinstance(item, np.ndarray):
        return "raw"
    try:
        with open_image(item) as image:
            return image.format
    except Exception as error:  # whatever a damaged file makes Pillow raise
        wrong = f"{name_of(item)} is not a readable image ({type(error).__name__})"
        raise DataError(f"{task}: {wrong}; get it again") from None


def name_of(item: Item) -> str:
    return str(item) if isinstance(item, Path) else "in its file"


def lines(listing: Path) -> list[tuple[str, str]]:
    """("<file>, line <n>", line) of each line that is not blank; DataError without a file."""
    try:
        text = regular(listing).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no list {listing} ({error}): unpack the archive again") from None
    numbered = enumerate(map(str.strip, text.splitlines()), 1)
    return [(f"{listing}, line {number}", line) for number, line in numbered if line]


# --- where a task's images come from --------------------------------------------------------------
@dataclass(frozen=True)
class Original:
    """Where original images are, and how they are read."""

    read: Callable[[Path, str], Content]  # of root and split: a reader of splits.py
    place: tuple[str, ...]  # what must be in <root>
    get: str  # where from
    fetch: tuple[Callable, ...] = ()  # torchvision's classes, which download
    needs: str = ""  # a package
    note: str = ""  # what a result should say of them


@dataclass
class Found:
    """What a reader found. `title` and `notes` are for people."""

    source: str
    title: str
    images: dict[str, Sequence] = field(default_factory=dict)  # by role: paths, bytes or an array
    labels: dict[str, Sequence[int]] = field(default_factory=dict)  # by role
    digests: dict[str, str] = field(default_factory=dict)  # sha256 of a slice's keys or labels
    agrees: bool = True  # all that can be compared, with the official split
    refused: Sequence[tuple[str, str]] = ()  # path and reason of images that were left out
    notes: list[str] = field(default_factory=list)


def read_originals(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """The originals, cut by splits.py; DataError if the slices are not the official ones."""
    found, contents, cut = Found("original", "originals"), {}, CUTS[task.name]
    found.notes += [task.original.note] if task.original.note else []
    for role in roles:
        split, name = getattr(cut, role)[0], splits.ROLES[role]
        if split not in contents:
            contents[split] = whole_split(task, root, split, download)
        content = contents[split]
        rows = cut.rows(role, content.keys)
        keys, labels = [content.keys[i] for i in rows], content.labels[rows]
        if cut.ordered:
            found.digests[name] = splits.prove_keys(task.name, role, keys)
        agrees, line = splits.prove_labels(task.name, role, labels)
        if agrees is False:
            which = f", that of {keys[line - 1]} first" if line else ""
            wrong = f"{task.name}: labels of {name} are not the official ones{which}"
            raise DataError(f"{wrong}: get the originals again ({task.original.get})")
        found.labels[role], found.images[role] = labels, content.images(rows)
    return found


def whole_split(task, root: Path, split: str, download: bool = True) -> Content:
    """One split of a task's originals, whole; downloaded first if need be and possible. Raises
    Missing where the originals cannot be had, DataError where they are damaged."""
    original, name, package = task.original, task.name, task.original.needs
    if package and importlib.util.find_spec(package) is None:
        raise Missing(f"{name}: reading the originals needs {package}: pip install {package}")
    depth = 1 if original.fetch else 4
    missing = [place for place in original.place if find(root, place, depth) is None]
    if missing:
        first = "train.py downloads it, or " if original.fetch and not download else ""
        by_hand = f"no {root / missing[0]}: {first}get it by hand from {original.get}"
        if not (original.fetch and download):
            raise Missing(f"{name}: {by_hand}")
        top = root / original.place[0].split("/")[0]
        if top.is_dir():
            remedy = f"remove it, or complete it by hand from {original.get}"
            raise DataError(f"{name}: {top} is not complete: {remedy}")
        try:
            _fetch(name, original, root)
        except Exception as error:  # whatever a broken download raises
            reason = f"the download failed ({reason_of(error)})"
            raise Missing(f"{name}: {reason} and there is {by_hand}") from error
    place = f" at {find(root, original.place[0])}" if original.place else ""
    where, again = f"{name}: the originals{place}", f"get them again ({original.get})"
    try:
        content = original.read(root, split)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise DataError(f"{where} are damaged ({reason_of(error)}): {again}") from error
    count, distinct = CONSTANTS["counts"][name][split], len(set(content.keys))
    if not len(content.keys) == len(content.labels) == distinct == count:
        images = f"{distinct} {split} images and {len(content.labels)} labels, not {count}"
        raise DataError(f"{where} have {images}: remove them and {again}")
    return content


def reason_of(error: Exception) -> str:
    """The first sentence of an error, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def _fetch(name: str, original: Original, root: Path) -> None:
    """Download into a new folder and move what is complete: what lies in <root> is whole."""
    print(f"{name}: downloading {original.get} into {root}", flush=True)
    socket.setdefaulttimeout(30)  # seconds without a byte; torchvision would wait for ever
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as folder:
            for dataset in original.fetch:
                dataset(Path(folder), download=True)  # checks the archive's published md5
            for path in Path(folder).iterdir():
                os.replace(path, root / path.name)
    finally:
        with suppress(OSError):  # not empty
            root.rmdir()


def read_embedded(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """As read_originals; there is no other source, and people know it by its origin."""
    found = read_originals(task, root, roles, source, download)
    found.source, found.title = "embedded", task.origin
    return found


def read_vtab(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """The originals, or where they cannot be had, or at wish, the prepared folder."""
    folder = root / "vtab-1k" / task.name
    archive = "a prepared archive (Google Drive 1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p)"
    if source != "prepared":
        try:
            return read_originals(task, root, roles, source, download)
        except Missing as error:
            if source == "original":
                raise
            if not folder.is_dir():
                raise Missing(f"{error}; or unpack {archive} to {folder}") from None
            print(f"{error}; reading the prepared folder {folder} instead")
    if not folder.is_dir():
        remedy = f"unpack {archive} to {folder} or point --data-dir elsewhere"
        raise Missing(f"{task.name}: no folder {folder}: {remedy}")
    return read_prepared(task, folder, roles)


def read_prepared(task, folder: Path, roles: Iterable[str]) -> Found:
    """The folder that PEFT repositories pass around, compared with the official labels."""
    found, agreements = Found("prepared", "prepared folder"), set()
    lists = {"train800.txt": ["train"], "val200.txt": ["val"]}
    if "test" in roles:
        lists = {"train800val200.txt": ["train", "val"], "test.txt": ["test"]}
    for name, in_list in lists.items():
        paths, labels = [], []
        for where, line in lines(folder / name):
            *path, label = line.rsplit(None, 1)
            if not path or not label.isdecimal() or int(label) >= task.classes:
                wanted = f"'<image> <label>' with a label in 0..{task.classes - 1}"
                raise DataError(f"{where}: expected {wanted}, found {line!r}")
            labels.append(int(label))
            paths.append(folder / within(path[0], where))
        sizes = [task.sizes[ROLE_NUMBER[role]] for role in in_list]
        if in_list == ["test"] and len(paths) == splits.OTHER_DRAWS.get(task.name):
            found.notes.append(f"{len(paths)} test images are another draw than the official one")
            sizes = [len(paths)]
        least = 1 if in_list == ["test"] else sum(sizes)
        if not least <= len(paths) <= sum(sizes):
            wrong = f"{folder / name} has {len(paths)} images, VTAB-1k's {task.name} has"
            raise DataError(f"{wrong} {sum(sizes)}: unpack the archive again")
        start = 0
        for role, size in zip(in_list, sizes, strict=True):
            part, slice_name = labels[start : start + size], splits.ROLES[role]
            found.images[role], found.labels[role] = paths[start : start + size], part
            found.digests[f"{slice_name} labels"] = splits.sha256(part)
            agrees, line = splits.prove_labels(task.name, role, part)
            agreements.add(agrees)
            if agrees is False:
                place = f" at line {start + line} of {name}" if line else ""
                found.notes.append(f"labels of {slice_name} differ from the official split{place}")
            start += size
    found.agrees = not found.notes
    if found.agrees:
        proven = agreements == {True}
        found.notes.append("official order confirmed" if proven else "order not proven")
    return found


def read_fgvc(task, root: Path, roles: Sequence[str], source: str, download: bool) -> Found:
    """VPT's layout: train.json, val.json, test.json; ids of all three, sorted, become 0..C-1."""
    names = (task.name, *task.aliases)
    places = sorted((root / "fgvc").glob("*/"))
    folders = [path for path in places if path.name.lower().replace("-", "_") in names]
    if not folders:
        place = root / "fgvc" / task.name
        missing = f"{task.name}: no folder {place}:"
        if source != "prepared" and task.original:
            try:
                return read_originals(task, root, roles, source, download)
            except Missing as error:
                missing = f"{error}; or"
        raise Missing(
            f"{missing} put the images of {task.origin} into {place} and, beside them, train.json, "
            "val.json and test.json, which VPT's repository links to (github.com/KMnP/vpt)"
        )
    folder, lists, ids = folders[0], {}, set()
    for role in (*roles, "test"):
        if role in lists or (role not in roles and len(ids) >= task.classes):
            continue  # the test list is read for its classes, if training lacks some
        listing = folder / f"{role}.json"
        try:
            listed = json.loads(regular(listing).read_text(encoding="utf-8-sig"))
            if not listed or not all(type(label) is int for label in listed.values()):
                raise ValueError("a class is no integer, or the list is empty")
        except Exception as error:  # whatever a damaged file raises
            wrong = f"{listing} is no list like {{'<image>': <class>}} ({error})"
            raise DataError(f"{wrong}: get it again") from None
        count = task.sizes[ROLE_NUMBER[role]]
        if len(listed) > count:
            raise DataError(f"{listing} has {len(listed)} images, {task.name} has {count}")
        lists[role] = listed
        ids |= set(listed.values())
    if len(ids) > task.classes:
        raise DataError(f"{folder}: its lists have {len(ids)} classes, not {task.classes}")
    class_of = {name: number for number, name in enumerate(sorted(ids))}
    found = Found("lists", "lists of VPT")
    for role in roles:
        where = f"{folder / role}.json"
        found.labels[role] = [class_of[label] for label in lists[role].values()]
        found.images[role] = []
        for name in lists[role]:
            places = [folder / sub / within(name, where) for sub in ("images", "Images", "")]
            path = next((place for place in places if place.exists()), places[-1])
            found.images[role].append(path)
    return found


# --- the table ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """A row of the table."""

    name: str
    benchmark: str
    group: str
    classes: int
    sizes: tuple[int, int, int] | None  # images of train, val and test; None: what is there
    origin: str  # where the original images are from
    aliases: tuple[str, ...]
    verified: str  # what outside lists agree with our split
    read: Callable[..., Found]  # of (task, root, roles, source, download)
    recipe: dict  # train.py's flags if left out
    original: Original | None  # where we can read the original data set
    sources: tuple[str, ...] = ("auto",)
    class_names: tuple[str, ...] | None = None  # where known
    upright: bool = False  # whether images are turned as their EXIF data say
    folder: str | None = None  # of one's own images

    @property
    def argument(self) -> str:
        """What --dataset calls it."""
        return self.folder or self.name


# What a task's flags are if left out. vtab-1k and fgvc: the field's common recipe (AdapterPlus) on
# the MLAE paper's backbone, but no drop-path: theirs, 0.1, costs 10 to 12 points of val200 in 5
# epochs and 6 in 10, though none in 20 without masks (results/length). The rate is for 100 epochs;
# in 10 the best was 4e-3 with masks, 4e-3 or 8e-3 without (results/real). The demo's was chosen on
# val200 (results/masking).
BASE = "vit_base_patch16_224.orig_in21k"
COMMON = {"model": BASE, "epochs": 100, "lr": 1e-3, "drop_path": 0.0, "augment": "none"}
FGVC = COMMON | {"augment": "crop"}
DEMO = {"model": "vit_nano", "epochs": 20, "lr": 8e-3, "drop_path": 0.0, "augment": "none"}
PRETRAINING = DEMO | {"epochs": 12, "lr": 1e-3, "drop_path": 0.1}


def _original(name, reader, place, *fetch, **others) -> Original:
    """Where the originals of a task are; names in `place` have spaces between."""
    return Original(reader, tuple(place.split()), CONSTANTS["origins"][name], fetch, **others)


def _vtab(group, name, classes, aliases, *original, **others) -> Task:
    """A row of VTAB-1k; names in `aliases` have spaces between."""
    row = name, "vtab-1k", group, classes, CUTS[name].sizes(), CONSTANTS["origins"][name]
    row = *row, tuple(aliases.split()), CONSTANTS["evidence"][name], read_vtab, COMMON
    return Task(*row, _original(name, *original, **others), ("original", "prepared"))


def _fgvc(group, name, classes, sizes, origin, aliases="", original=None) -> Task:
    row = name, "fgvc", group, classes, sizes, origin, tuple(aliases.split())
    return Task(*row, "originals" if original else "counts only", read_fgvc, FGVC, original)


# fmt: off
_FLOWERS = (splits.flowers, "flowers-102/jpg flowers-102/setid.mat flowers-102/imagelabels.mat",
            datasets.Flowers102)
_PCAM = "pcam/camelyonpatch_level_2_split_"
_DSPRITES = "dsprites_ndarray_*64x64.npz"
_NORB = ("smallnorb-*-training-dat.mat* smallnorb-*-training-info.mat* "
         "smallnorb-*-testing-dat.mat* smallnorb-*-testing-info.mat*")
TABLE = [
    _vtab("natural", "cifar", 100, "cifar100 cifar_100", splits.cifar, "cifar-100-python",
          datasets.CIFAR100),
    _vtab("natural", "caltech101", 102, "caltech caltech_101",
          partial(splits.class_folders, name="caltech101", place="caltech101/101_ObjectCategories"),
          "caltech101/101_ObjectCategories", datasets.Caltech101),
    _vtab("natural", "dtd", 47, "describable_textures", splits.dtd, "dtd/dtd", datasets.DTD),
    _vtab("natural", "oxford_flowers102", 102, "flowers102 vtab_flowers", *_FLOWERS,
          needs="scipy"),
    _vtab("natural", "oxford_iiit_pet", 37, "pets pet oxford_pet oxford_pets", splits.pets,
          "oxford-iiit-pet/images oxford-iiit-pet/annotations", datasets.OxfordIIITPet),
    _vtab("natural", "svhn", 10, "svhn_cropped", splits.svhn, "train_32x32.mat test_32x32.mat",
          partial(datasets.SVHN, split="train"), partial(datasets.SVHN, split="test"),
          needs="scipy"),
    _vtab("natural", "sun397", 397, "sun sun_397", splits.sun397, "SUN397",
          note="at full size, which TFDS shrinks to 120,000 pixels"),
    _vtab("specialized", "patch_camelyon", 2, "camelyon pcam", splits.pcam,
          f"{_PCAM}train_x.h5 {_PCAM}train_y.h5 {_PCAM}valid_x.h5 {_PCAM}valid_y.h5 "
          f"{_PCAM}test_x.h5 {_PCAM}test_y.h5",
          *[partial(datasets.PCAM, split=split) for split in ("train", "val", "test")],
          needs="h5py"),
    _vtab("specialized", "eurosat", 10, "euro_sat",
          partial(splits.class_folders, name="eurosat", place="eurosat/2750"), "eurosat/2750",
          datasets.EuroSAT),
    _vtab("specialized", "resisc45", 45, "resisc",
          partial(splits.class_folders, name="resisc45", place="NWPU-RESISC45"), "NWPU-RESISC45"),
    _vtab("specialized", "diabetic_retinopathy", 5, "retinopathy", splits.retinopathy,
          "trainLabels.csv retinopathy_solution.csv"),
    _vtab("structured", "clevr_count", 8, "clevr_count_all",
          partial(splits.clevr, label=lambda objects: len(objects) - 3), "CLEVR_v1.0"),
    _vtab("structured", "clevr_dist", 6, "clevr_closest clevr_distance",
          partial(splits.clevr, label=splits.clevr_distance), "CLEVR_v1.0"),
    _vtab("structured", "dmlab", 6, "", splits.dmlab,
          "dmlab-train.tfrecord* dmlab-validation.tfrecord* dmlab-test.tfrecord*"),
    _vtab("structured", "kitti", 4, "kitti_dist kitti_distance", splits.kitti,
          "training/image_2 training/label_2 mapping/train_rand.txt mapping/train_mapping.txt"),
    _vtab("structured", "dsprites_loc", 16, "dsprites_location dsprites_position",
          partial(splits.dsprites, label=lambda found: found[:, 4] // 2), _DSPRITES),
    _vtab("structured", "dsprites_ori", 16, "dsprites_orientation",
          partial(splits.dsprites, label=lambda found: found[:, 3] * 2 // 5), _DSPRITES),
    _vtab("structured", "smallnorb_azi", 18, "smallnorb_azimuth",
          partial(splits.smallnorb, label=lambda infos: infos[:, 2] // 2), _NORB),
    _vtab("structured", "smallnorb_ele", 9, "smallnorb_elevation",
          partial(splits.smallnorb, label=lambda infos: infos[:, 1]), _NORB),
    _fgvc("birds", "cub", 200, (5394, 600, 5794), "CUB-200-2011", "cub200 cub_200_2011"),
    _fgvc("birds", "nabirds", 555, (21536, 2393, 24633), "NABirds"),
    _fgvc("flowers", "oxford_flowers", 102, (1020, 1020, 6149), "Oxford Flowers 102",
          "fgvc_flowers oxfordflower", _original("oxford_flowers", *_FLOWERS, needs="scipy")),
    _fgvc("dogs", "stanford_dogs", 120, (10800, 1200, 8580), "Stanford Dogs", "dogs"),
    _fgvc("cars", "stanford_cars", 196, (7329, 815, 8041), "Stanford Cars", "cars"),
    Task("digits", "demo", "demo", 10, CUTS["digits"].sizes(), "embedded UCI handwritten digits",
         (), "", read_embedded, DEMO, _original("digits", splits.digits, "")),
    Task("fashion_mnist", "pretraining", "demo", 10, CUTS["fashion_mnist"].sizes(),
         "Fashion-MNIST", ("fashion",), "", read_embedded, PRETRAINING,
         _original("fashion_mnist", splits.fashion_mnist,
                   "FashionMNIST/raw/train-images-idx3-ubyte", datasets.FashionMNIST)),
]
# fmt: on
TASKS: dict[str, Task] = {task.name: task for task in TABLE}
