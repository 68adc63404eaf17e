"""A run's config.json, read with distrust: it may come from a stranger, or from another version.

config = read_config(Path("runs/digits/mlae-..."))
config["arguments"].lr          # the flags of train.py, as the run had them
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch

import data
import photos
from baselines import METHODS
from files import RunError, check_shape, read_json
from flags import AMP, NORMS, train_parser

LARGEST = 4096  # side of an image in pixels
# what config.json must hold, and by the type of its default, a setting of the method
CONFIG = {
    "arguments": {
        "dataset": str | os.PathLike,  # a folder's name need not be printable
        "data_dir": str | os.PathLike,  # need not be printable
        "source": str,
        "img_size": range(1, LARGEST + 1),
        "normalize": str,
        "model": str,
        "checkpoint": str | None,
        "no_pretrained": bool,
        "method": str,
        "targets": list,
        "drop_path": (0, math.nextafter(1, 0)),
        "seed": range(2**31),
        "val": bool,
    },
    "weights": {"tag": str},
    "amp": str,
    "source": str,
}
SETTINGS = {int: range(1, 2**31), float: (0, torch.finfo(torch.float32).max), str: str, bool: bool}


def read_config(folder: Path) -> dict:
    """A run's config.json, its arguments as a Namespace.

    Raises RunError if there is none, a value cannot be right, or today's code does not know its
    task, method or another word.
    """
    path = folder / "config.json"
    try:
        config = read_json(path, CONFIG)
    except RunError as error:
        raise RunError(f"{folder} is not a run of train.py: {error}") from None
    given, names = config["arguments"], config.setdefault("class_names", None)
    row = METHODS.get(given["method"])
    usual = vars(train_parser().parse_args([])) | (row.settings if row else {})
    for name, value in usual.items():
        given.setdefault(name, value)  # a run from before there was such a flag
    check_shape(names, list | None, f"{path}: class_names")
    for name in names or []:
        check_shape(name, str, f"{path}: class_names")
    check_shape(given, photos.FLAGS, f"{path}: arguments")
    task = data.TASKS.get(given["dataset"])
    if names and task and len(names) != task.classes:
        raise RunError(f"{path}: class_names: {len(names)} of the {task.classes} of {task.name}")
    is_own = names and os.path.isabs(given["dataset"])  # its folder need not be here
    words = {
        "dataset": (given["dataset"], [given["dataset"]] if is_own else data.TASKS),
        "augment": (given["augment"], [None, *data.VIEWS]),
        "method": (given["method"], METHODS),
        "normalize": (given["normalize"], NORMS),
        "source": (given["source"], data.SOURCES),
        "amp": (config["amp"], AMP[1:]),
    }
    for name, (word, known) in words.items():
        if word not in known:
            raise RunError(f"{path}: {name} {word} is unknown here")
    if not given["augment"]:
        recipe = photos.RECIPE if is_own else data.TASKS[given["dataset"]].recipe
        given["augment"] = recipe["augment"]
    for name, value in row.settings.items():
        shape = SETTINGS.get(type(value), object)
        if name in row.by_target and isinstance(given[name], dict):
            shape = dict.fromkeys(given[name], shape)
        check_shape(given, {name: shape}, f"{path}: arguments")
    for target in given["targets"]:
        check_shape(target, str, f"{path}: arguments: targets")
    config["arguments"] = argparse.Namespace(**given)
    return config


def look_in(config: dict, data_dir: str | None) -> None:
    """Have a run's arguments find its data where they are now, and read what was read then."""
    run = config["arguments"]
    if os.path.isabs(run.dataset):  # a folder of one's own, which may have moved
        run.dataset = os.path.abspath(data_dir or run.dataset)
    run.data_dir = data_dir or run.data_dir
    if config["source"] in data.SOURCES:
        run.source = config["source"]  # whatever else is there now
