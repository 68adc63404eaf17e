"""The table of tasks: what each is, where its images are from, how it is trained on.

TASKS["dtd"].sizes                              # (800, 200, 1880): train, val and test
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets

import originals
from sources import Found, Original, read_embedded, read_fgvc, read_vtab
from splits import CONSTANTS, CUTS


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
