"""The data: 24 tasks as one table (VTAB-1k's 19, FGVC's 5), and the embedded demo.

    train, test = load("dtd", "data", img_size=224)     # the 1000 training images, the test images
    train, val = load("dtd", "data", split="train")     # 800 to train on, 200 to choose with

    python data.py --data-dir data                      # the table, what is there, and its proof

A VTAB-1k task comes from its original images (originals.py, splits.py) or from a prepared folder,
`<root>/vtab-1k/<task>/{train800,val200,train800val200,test}.txt`, one line an image: its path in
the folder and its label from 0. Images are resized straight to S x S (bicubic) and not augmented.
An FGVC set is `<root>/fgvc/<set>/{train,val,test}.json` as VPT publishes them, `{"path": class}`:
random resized crops and flips in training, the centre crop in testing.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flags import data_parser

if __name__ == "__main__":
    data_parser().parse_args()  # --help and typing errors need not wait for torch

import numpy as np
from torchvision import datasets

import originals
from images import NORMALIZE, Images, lines, normalizer  # noqa: F401
from runs import one_line
from sources import NUMBER, Found, Original, join, read, read_embedded, read_fgvc, read_vtab
from splits import CONSTANTS, CUTS, DataError, Missing, tfds_order  # noqa: F401

SUITES = {"vtab": "vtab-1k", "fgvc": "fgvc"}  # all tasks of a benchmark
SOURCES = ("auto", "original", "prepared")


@dataclass(frozen=True)
class Task:
    """A row of the table. `sizes`: images of train, val and test; `origin`: where the original
    images are from; `verified`: what outside lists agree with our split; `read(task, root, roles,
    source, download)`: its reader; `augment` ("none" or "crop"): how it is trained on; `recipe`:
    train.py's flags if left out; `original`: its original data set, where we can read that;
    `sources`: the sources that it can be read from."""

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
    recipe: dict
    original: Original | None
    sources: tuple[str, ...] = ("auto",)


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
# the MLAE paper's backbone. The demo's learning rate was chosen on val200.
COMMON = {"model": "vit_base_patch16_224.orig_in21k", "epochs": 100, "lr": 1e-3, "drop_path": 0.1}
DEMO = {"model": "vit_nano", "epochs": 20, "lr": 8e-3, "drop_path": 0.0}
PRETRAINING = {"model": "vit_nano", "epochs": 12, "lr": 1e-3, "drop_path": 0.1}


def _vtab(group, name, classes, aliases, reader, place, get, *fetch, needs="", note="") -> Task:
    """A row of VTAB-1k; names in `aliases`, `place` and `needs` have spaces between."""
    original = Original(reader, tuple(place.split()), get, fetch, tuple(needs.split()), note)
    sizes, verified = CUTS[name].sizes(), CONSTANTS["evidence"][name]
    names = tuple(aliases.split())
    row = name, "vtab-1k", group, classes, sizes, get, names, verified, read_vtab
    return Task(*row, "none", COMMON, original, ("original", "prepared"))


def _fgvc(group, name, classes, sizes, origin, aliases="", original=None) -> Task:
    verified = "originals" if original else "counts only"
    row = name, "fgvc", group, classes, sizes, origin, tuple(aliases.split()), verified, read_fgvc
    return Task(*row, "crop", COMMON, original)


def _demo(name, benchmark, recipe, origin, aliases, original) -> Task:
    row = name, benchmark, "demo", 10, CUTS[name].sizes(), origin, aliases, "", read_embedded
    return Task(*row, "none", recipe, original)


def digits(root: Path, split: str) -> originals.Content:
    with np.load(Path(__file__).resolve().parent / "demo" / "digits.npz") as file:
        return originals.in_memory(file["images"], file["labels"])


def fashion_mnist(root: Path, split: str) -> originals.Content:
    content = datasets.FashionMNIST(root, train=split == "train")
    return originals.in_memory(content.data.numpy(), content.targets)


# fmt: off
_folders = originals.class_folders
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
    _vtab("natural", "cifar", 100, "cifar100 cifar_100", originals.cifar, "cifar-100-python",
          "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (169 MB)", datasets.CIFAR100),
    _vtab("natural", "caltech101", 102, "caltech caltech_101",
          partial(_folders, name="caltech101", place="caltech101/101_ObjectCategories"),
          "caltech101/101_ObjectCategories",
          "https://data.caltech.edu/records/mzrjq-6wc02 (137 MB: 101_ObjectCategories.tar.gz)",
          datasets.Caltech101),
    _vtab("natural", "dtd", 47, "describable_textures", originals.dtd, "dtd/dtd",
          "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz (625 MB)",
          datasets.DTD),
    _vtab("natural", "oxford_flowers102", 102, "flowers102 vtab_flowers", originals.flowers,
          *_FLOWERS, needs="scipy"),
    _vtab("natural", "oxford_iiit_pet", 37, "pets pet oxford_pet oxford_pets", originals.pets,
          "oxford-iiit-pet/images oxford-iiit-pet/annotations",
          "https://www.robots.ox.ac.uk/~vgg/data/pets/ (811 MB: images.tar.gz, annotations.tar.gz)",
          datasets.OxfordIIITPet),
    _vtab("natural", "svhn", 10, "svhn_cropped", originals.svhn, "train_32x32.mat test_32x32.mat",
          "http://ufldl.stanford.edu/housenumbers/ (246 MB: train_32x32.mat, test_32x32.mat)",
          partial(datasets.SVHN, split="train"), partial(datasets.SVHN, split="test"),
          needs="scipy"),
    _vtab("natural", "sun397", 397, "sun sun_397", originals.sun397, "SUN397",
          "https://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz (37 GB)",
          note="at full size, which TFDS shrinks to 120,000 pixels"),
    _vtab("specialized", "patch_camelyon", 2, "camelyon pcam", originals.pcam,
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
    _vtab("specialized", "diabetic_retinopathy", 5, "retinopathy", originals.retinopathy,
          "trainLabels.csv retinopathy_solution.csv",
          "https://www.kaggle.com/c/diabetic-retinopathy-detection (trainLabels.csv, images, to be "
          "preprocessed, in train/ and test/) and https://storage.googleapis.com/"
          "kaggle-forum-message-attachments/90528/2877/retinopathy_solution.csv"),
    _vtab("structured", "clevr_count", 8, "clevr_count_all",
          partial(originals.clevr, label=clevr_count), *_CLEVR),
    _vtab("structured", "clevr_dist", 6, "clevr_closest clevr_distance",
          partial(originals.clevr, label=clevr_distance), *_CLEVR),
    _vtab("structured", "dmlab", 6, "", originals.dmlab,
          "dmlab-train.tfrecord* dmlab-validation.tfrecord* dmlab-test.tfrecord*",
          "https://storage.googleapis.com/dmlab-vtab/dmlab.tar.gz (3 GB)"),
    _vtab("structured", "kitti", 4, "kitti_dist kitti_distance",
          partial(originals.kitti, label=kitti_distance),
          "training/image_2 training/label_2 mapping/train_rand.txt mapping/train_mapping.txt",
          "https://www.cvlibs.net/datasets/kitti/eval_object.php (left colour images, labels, "
          "devkit: 13 GB)"),
    _vtab("structured", "dsprites_loc", 16, "dsprites_location dsprites_position",
          partial(originals.dsprites, label=lambda found: found[:, 4] // 2), *_DSPRITES),
    _vtab("structured", "dsprites_ori", 16, "dsprites_orientation",
          partial(originals.dsprites, label=lambda found: found[:, 3] * 2 // 5), *_DSPRITES),
    _vtab("structured", "smallnorb_azi", 18, "smallnorb_azimuth",
          partial(originals.smallnorb, label=lambda infos: infos[:, 2] // 2), *_NORB),
    _vtab("structured", "smallnorb_ele", 9, "smallnorb_elevation",
          partial(originals.smallnorb, label=lambda infos: infos[:, 1]), *_NORB),
    _fgvc("birds", "cub", 200, (5394, 600, 5794), "CUB-200-2011", "cub200 cub_200_2011"),
    _fgvc("birds", "nabirds", 555, (21536, 2393, 24633), "NABirds"),
    _fgvc("flowers", "oxford_flowers", 102, (1020, 1020, 6149), "Oxford Flowers 102",
          "fgvc_flowers oxfordflower",
          Original(originals.flowers, tuple(_FLOWERS[0].split()), _FLOWERS[1], _FLOWERS[2:],
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


def tasks_of(benchmark: str | None) -> list[Task]:
    """The tasks of a benchmark, in the table's order."""
    return [task for task in TASKS.values() if task.benchmark == benchmark]


def find_task(name: str) -> Task:
    """The table's row for a task name or alias.

    Raises DataError for another name, with the nearest one, and for a suite's, with what to do.
    """
    names = {}
    for task in TASKS.values():
        for alias in (task.name, *task.aliases):
            names[alias] = task
    key = name.lower().replace("-", "_")
    if key in names:
        return names[key]
    suite = {"vtab_1k": "vtab", "vtab1k": "vtab"}.get(key, key)
    if suite in SUITES:
        count = len(tasks_of(SUITES[suite]))
        raise DataError(f"{name} is a suite of {count} tasks: python suite.py --dataset {suite}")
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
    data that are damaged or have wrong counts or keys. A prepared list that is too short or has
    other labels is read, but not `official`.
    """
    task, root = find_task(name), Path(root)
    if split not in ("trainval", "train") or source not in SOURCES:
        raise ValueError(f"split must not be {split!r}, or source not {source!r}")
    selections = {"train": ["train"], "val": ["val"]}
    if split == "trainval":
        selections = {"train": ["train", "val"], "test": ["test"]}
    found = read(task, root, sum(selections.values(), []), source, download)
    official, counts, paths = found.agrees, [], []
    for use, roles in selections.items():
        count = sum(len(found.labels[role]) for role in roles)
        size = sum(task.sizes[NUMBER[role]] for role in roles)
        official = official and count == size
        counts.append(f"{count} of {size} {use} (subset)" if count < size else f"{count} {use}")
        for role in roles:
            paths += [image for image in found.images[role] if isinstance(image, Path)]
    proof = f" ({'; '.join(found.notes)})" if found.notes else ""
    formats = f", {'+'.join(sorted(found.formats))} images" if found.formats else ""
    notes = [f"{found.title}{proof}{formats}, {' / '.join(counts)}"]
    repeated = len(paths) - len(set(paths))
    if repeated:
        notes.append(f"{repeated} images are repeated")
    declared = root / task.benchmark / task.name / "SUBSET"
    is_declared = found.source == "prepared" and declared.exists()
    if is_declared:
        notes.append(f"SUBSET: {' '.join(line for _, line in lines(declared))}")
    both = []
    for roles in selections.values():
        images = join([found.images[role] for role in roles])
        labels = np.concatenate([found.labels[role] for role in roles])
        both.append(Images(images, labels, img_size, augment=task.augment))
        both[-1].source = found.source
        both[-1].official = official and not repeated and not is_declared
        both[-1].digests = found.digests
        both[-1].description = "; ".join(notes)
    if task.benchmark in SUITES.values():
        cache = f"{task.name}-{found.source}-{split}-{img_size}.safetensors"
        both[0].cache = root / "cache" / cache
    return tuple(both)


def report(task: Task, root: Path) -> bool:
    """Print a task's row, what of it is in <root>, and its proof; False if something is damaged."""
    train, val, test = task.sizes
    print(f"{task.name:21}{task.classes:4}{train:7}{val:6}{test:7}  {task.verified}")
    missing, is_whole = [], True
    for source in task.sources:
        try:
            _, images = load(task.name, root, source=source, download=False)
        except Missing as error:
            missing.append(error)
            continue
        except DataError as error:
            print(f"    DAMAGED: {error}")
            is_whole = False
            continue
        print(f"    {'official' if images.official else 'NOT OFFICIAL'}: {images.description}")
        for name, digest in images.digests.items():
            print(f"        {name:16} sha256 {digest}")
    if len(missing) == len(task.sources):
        print(f"    not there: {missing[0]}")
    return is_whole


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 1 if something is damaged, 2 for wrong arguments."""
    args = data_parser().parse_args(argv)
    with one_line("data.py"):
        if not Path(args.data_dir).is_dir():
            raise DataError(f"--data-dir: there is no folder {args.data_dir}")
        tasks = []
        for name in args.dataset:
            tasks += tasks_of(SUITES.get(name)) or [find_task(name)]
        print(f"{'task':18}classes  train   val   test  what agrees with our official split")
        are_whole = [report(task, Path(args.data_dir)) for task in tasks]
    sys.exit(0 if all(are_whole) else 1)


if __name__ == "__main__":
    main()
