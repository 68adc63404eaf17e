"""A trained model for other programs: timm, ONNX, torch.export and PEFT.

    export_peft(model, "adapter")                          # for peft.PeftModel.from_pretrained
    export("onnx", Path("model.onnx"), model, config, x)   # written, loaded back and compared

An export is there when its logits are the run's, or not at all. Beside it a JSON file says how to
prepare images and which line of Python loads it.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from data import Images, create_normalizer, mean_and_std
from methods import METHODS, adapters
from mlae import MLAELinear
from model import NANO, ModelError, architecture, create_backbone, few, first_line, heads, merge
from runs import RunError, write_atomically, write_json

AGREE = 1e-4  # largest difference of a logit, over the largest logit if that is above 1


def check_new(path: Path, flag: str, ending: str = "") -> None:
    """Raise RunError, naming the flag, unless a file or folder `path` can be made: its name has
    this ending, it is not there yet, and its folder is."""
    if not path.name.lower().endswith(ending):
        raise RunError(f"{flag} {path}: the name must end in {ending}")
    if os.path.lexists(path):
        raise RunError(f"{flag} {path}: it exists already; remove it or take another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RunError(f"{flag} {path}: cannot write to {path.parent}")


class FromPixels(nn.Module):
    """A model that takes images (B, 3, S, S) in uint8 and normalises them itself."""

    def __init__(self, model: nn.Module, mean: tuple, std: tuple) -> None:
        super().__init__()
        self.model = merge(model) if METHODS[model.method].mergeable else model
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images.float() - self.mean) / self.std)


# to_*(model, path, images (B, 3, S, S) uint8, run) writes a file or folder and loads it back from
# there alone: it returns what turns images into logits, normalised ones if the format has `floats`,
# and the Python that loads it from <path>.


def to_timm(model: nn.Module, path: Path, x: Tensor, run: argparse.Namespace) -> tuple:
    state = {key: value.contiguous() for key, value in merge(model).state_dict().items()}
    path.write_bytes(save(state, {"format": "pt"}))
    mean, std = mean_and_std(run, model)
    crop = {"crop_pct": 0.875, "crop_mode": "center"}
    if run.augment != "crop":
        crop = {"crop_pct": 1.0, "crop_mode": "squash"}
    view = {"input_size": (3, run.img_size, run.img_size), "interpolation": "bicubic"}
    view |= {"mean": tuple(mean), "std": tuple(std)} | crop  # what resolve_model_data_config says
    name, keywords = timm_call(run.model, model.num_classes, run.img_size)
    keywords |= {"pretrained_cfg_overlay": view}
    again = timm.create_model(name, checkpoint_path=str(path), **keywords).eval()
    words = f"{name!r}, checkpoint_path=<path>, {as_words(keywords)}"
    return again, f"model = timm.create_model({words}).eval()"


def to_onnx(model: nn.Module, path: Path, x: Tensor, run: argparse.Namespace) -> tuple:
    import onnx
    import onnxruntime

    program = FromPixels(model, *mean_and_std(run, model))
    names = {"input_names": ["images"], "output_names": ["logits"]}
    names["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(program, (x,), path, dynamo=True, external_data=False, verbose=False, **names)
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def again(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return again, "session = onnxruntime.InferenceSession(<path>)"


def to_torch(model: nn.Module, path: Path, x: Tensor, run: argparse.Namespace) -> tuple:
    batch, program = torch.export.Dim("batch"), FromPixels(model, *mean_and_std(run, model))
    torch.export.save(torch.export.export(program, (x,), dynamic_shapes=({0: batch},)), path)
    return torch.export.load(path).module(), "model = torch.export.load(<path>).module()"


def to_peft(model: nn.Module, path: Path, x: Tensor, run: argparse.Namespace) -> tuple:
    import peft

    export_peft(model, path)
    classes = model.num_classes
    own = {"pretrained": not run.no_pretrained, "checkpoint": run.checkpoint}
    own |= {"img_size": run.img_size}
    again = peft.PeftModel.from_pretrained(create_backbone(run.model, classes, **own), str(path))
    name, keywords = timm_call(run.model, classes, run.img_size)
    base = f"timm.create_model({name!r}, pretrained=True, {as_words(keywords)})"
    if run.no_pretrained or run.checkpoint or name != run.model:
        words = f"{run.model!r}, {classes}, {as_words(own)}"
        base = f"model.create_backbone({words})  # of this repository"
    python = f"base = {base}\nmodel = peft.PeftModel.from_pretrained(base, <path>).eval()"
    return again.eval(), python


def timm_call(name: str, classes: int, img_size: int) -> tuple[str, dict]:
    """Name and keywords with which `timm.create_model` makes the plain model of a run."""
    keywords = {"num_classes": classes, "img_size": img_size}
    if name == "vit_nano":
        return "vit_tiny_patch16_224", keywords | NANO | {"img_size": img_size}
    try:
        timm.create_model(name, **keywords)
    except TypeError:  # a convolutional network takes images of any size
        del keywords["img_size"]
    return name, keywords


def as_words(keywords: dict) -> str:
    """Keywords as a call in Python has them."""
    return ", ".join(f"{key}={value!r}" for key, value in keywords.items())


class Format(NamedTuple):
    """A row of FORMATS."""

    write: Callable  # one of the functions above
    ending: str  # of the file's name; "" for a folder
    floats: bool  # whether it takes normalised images, not uint8
    packages: tuple[str, ...] = ()  # that it needs beside timm and torch


FORMATS = {
    "timm": Format(to_timm, ".safetensors", True),
    "onnx": Format(to_onnx, ".onnx", False, ("onnx", "onnxscript", "onnxruntime")),
    "torch": Format(to_torch, ".pt2", False),
    "peft": Format(to_peft, "", True, ("peft",)),
}


def check_place(kind: str, path: Path) -> None:
    """Raise RunError for an unknown format, a path that cannot be written or has another ending,
    or a package that is not installed."""
    flag = f"--export {kind}"
    if kind not in FORMATS:
        raise RunError(f"{flag}: the formats are {', '.join(FORMATS)}")
    row = FORMATS[kind]
    check_new(path, flag, row.ending)
    if row.ending:
        check_new(path.with_name(f"{path.name}.json"), flag)
    missing = [name for name in row.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"{flag} needs packages that are not here: pip install {' '.join(missing)}")


def export(
    kind: str, path: Path, model: nn.Module, config: dict, images: Tensor
) -> tuple[float, str]:
    """Write a run's model as a new file or folder, load that back and compare.

    `kind` is a key of FORMATS, model and config are `eval.load_run`'s. Logits are compared on
    images (B, 3, S, S) uint8, all together and the first alone. Returns the largest difference of a
    logit and the Python that loads the file. Raises ModelError for what cannot be exported so,
    RunError if it cannot be written or its logits differ; nothing is then left.
    """
    check_place(kind, path)
    row, run, flag = FORMATS[kind], config["arguments"], f"--export {kind}"
    normalised = create_normalizer(run, model)(images)  # (B, 3, S, S) float32
    with torch.no_grad():
        logits = model(normalised)  # (B, classes)
    x = normalised if row.floats else images
    with write_atomically(path, flag) as draft:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # exporters say much; the comparison decides
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again, python = row.write(model, draft, images, run)
        except (ModelError, OSError):
            raise
        except Exception as error:  # whatever an exporter cannot do, in its words
            raise ModelError(f"{flag}: {architecture(model)}: {first_line(error)}") from error
        finally:
            logging.disable(before)
        with torch.no_grad():
            apart = torch.cat([again(x) - logits, again(x[:1]) - logits[:1]])  # (B + 1, classes)
        difference = apart.abs().max().item()
        if not difference <= AGREE * max(1.0, logits.abs().max().item()):
            raise RunError(f"{flag}: loaded back, its logits differ by {difference:.1e}: not kept")
        about = preparation(model, config, row.floats)
        about["python"] = python.replace("<path>", repr(path.name)).splitlines()
        beside = path.with_name(f"{path.name}.json")
        write_json(beside if row.ending else draft / "preprocessing.json", about)
    return difference, python.replace("<path>", repr(str(path)))


def preparation(model: nn.Module, config: dict, floats: bool) -> dict:
    """How a file becomes an input, as JSON values, in order; docs/export.md has it in Python."""
    run = config["arguments"]
    side, (mean, std) = [run.img_size, run.img_size], mean_and_std(run, model)
    short = Images([], [], run.img_size, augment=run.augment).short
    dtype = "float32" if floats else "uint8"
    return {
        "library": "Pillow",
        "exif_orientation": config["source"] == "folder",  # whether photos are turned upright
        "16_bits": "values // 257, after EXIF, before RGB",
        "mode": "RGB, alpha dropped",
        "resize": short or side,  # the short side, or both
        "long_side": "int(resize * long / short)" if short else None,
        "interpolation": "bicubic",
        "antialias": True,
        "crop": side,
        "crop_from": "round((width - crop) / 2), round((height - crop) / 2)" if short else None,
        "mean": list(mean),
        "std": list(std),
        "class_names": config["class_names"],
        "input": {"name": "images", "shape": ["N", 3, *side], "dtype": dtype, "channels": "RGB"},
        "output": {"name": "logits", "shape": ["N", model.num_classes], "dtype": "float32"},
        "normalise": "(pixels / 255 - mean) / std" if floats else "inside the program",
        "weights": config["weights"],
    }


@torch.no_grad()
def export_peft(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a model's experts and head as PEFT's LoRA: `peft.PeftModel.from_pretrained` loads the
    folder onto the plain timm model, with the pre-trained weights, and gives the same logits.

    lambda and fixed masks are folded into A, so that alpha is the rank; B of q, k or v alone gets
    rows of zeros; a layer without experts is left out. `directory` is made if need be. Raises
    ModelError, nothing written, for a method whose update is not of low rank, or that trains
    more than layers and head.
    """
    state, ranks, adapted, head = {}, {}, adapters(model), heads(model)
    for name, layer in adapted.items():
        if not isinstance(layer, MLAELinear):
            what = f"a {type(layer).__name__} ({name})"
            raise ModelError(f"PEFT's LoRA cannot hold {what}: no product of A and B")
        if layer.rank:
            ranks[name] = layer.rank
            factor = (layer.lora_lambda * layer.expert_mask)[:, None]  # (rank, 1)
            state[f"{name}.lora_A.weight"] = layer.lora_A * factor  # (rank, in)
            state[f"{name}.lora_B.weight"] = layer.full_B()  # (out, rank)
    if not ranks:
        raise ModelError("PEFT's LoRA needs an adapted layer: this model has none")
    own = tuple(f"{name}." for name in (*adapted, *head))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name in trained if not name.startswith(own)]
    if others:
        raise ModelError(f"PEFT's LoRA has no place for what trained beside: {few(others)}")
    for name, module in head.items():
        state |= module.state_dict(prefix=f"{name}.")
    rank = max(ranks.values())
    fewer = {name: own_rank for name, own_rank in ranks.items() if own_rank != rank}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": architecture(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": fewer,
        "alpha_pattern": fewer,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(ranks),
        "modules_to_save": list(head) or None,
    }
    tensors = {f"base_model.model.{key}": value.cpu().contiguous() for key, value in state.items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
