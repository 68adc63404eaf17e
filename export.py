"""A trained model for other programs: timm, ONNX, torch.export and PEFT.

    export_peft(model, "adapter")                       # for peft.PeftModel.from_pretrained
    export("onnx", Path("model.onnx"), model, ...)      # written, loaded back and compared

`FORMATS` has a row for each: what it needs, how it is written and how it is loaded back. An export
is there when its logits are the run's, or not at all. Beside it a JSON file says how to prepare
images and which line of Python loads it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from methods import METHODS, adapters
from mlae import MLAELinear
from model import (
    NANO,
    ModelError,
    architecture,
    create_backbone,
    few,
    first_line,
    heads,
    merge,
)
from runs import RunError, check_new, new_file, write_json

AGREE = 1e-4  # largest difference of a logit, over the largest logit if that is above 1
PREPARATION = "preprocessing.json"  # in PEFT's folder; else the file's name with .json


@dataclass(frozen=True)
class Base:
    """The plain timm model that a run started from: arguments of `model.create_backbone`."""

    name: str
    classes: int
    img_size: int
    checkpoint: str | None = None
    pretrained: bool = True

    def create(self) -> nn.Module:
        """The model with its weights and a new head."""
        options = {"pretrained": self.pretrained, "checkpoint": self.checkpoint}
        return create_backbone(self.name, self.classes, img_size=self.img_size, **options)

    @cached_property
    def call(self) -> tuple[str, dict]:
        """Name and keywords with which `timm.create_model` makes a model of the same parts."""
        if self.name == "vit_nano":
            keywords = {"num_classes": self.classes} | NANO | {"img_size": self.img_size}
            return "vit_tiny_patch16_224", keywords
        keywords = {"num_classes": self.classes, "img_size": self.img_size}
        try:
            timm.create_model(self.name, **keywords)
        except TypeError:  # a convolutional network takes images of any size
            del keywords["img_size"]
        return self.name, keywords

    def line(self) -> str:
        """A line of Python that makes the model with its pre-trained weights."""
        name, keywords = self.call
        if self.pretrained and not self.checkpoint and name == self.name:
            return f"base = timm.create_model({_arguments(name, pretrained=True, **keywords)})"
        options = {"pretrained": self.pretrained, "checkpoint": self.checkpoint}
        words = _arguments(self.name, self.classes, **options, img_size=self.img_size)
        return f"base = model.create_backbone({words})  # of this repository"


def _arguments(*values, **keywords) -> str:
    words = [repr(value) for value in values]
    return ", ".join(words + [f"{key}={value!r}" for key, value in keywords.items()])


def write_timm(model: nn.Module, path: Path, x: Tensor) -> None:
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    path.write_bytes(save(state, {"format": "pt"}))


def read_timm(path: Path, base: Base) -> Callable:
    name, keywords = base.call
    return timm.create_model(name, checkpoint_path=str(path), **keywords).eval()


def line_timm(path: Path, base: Base) -> str:
    name, keywords = base.call
    words = _arguments(name, checkpoint_path=str(path), **keywords)
    return f"model = timm.create_model({words}).eval()"


def write_onnx(model: nn.Module, path: Path, x: Tensor) -> None:
    torch.onnx.export(
        model,
        (x,),
        path,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


def read_onnx(path: Path, base: Base) -> Callable:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def line_onnx(path: Path, base: Base) -> str:
    return f"session = onnxruntime.InferenceSession({str(path)!r})"


def write_torch(model: nn.Module, path: Path, x: Tensor) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def read_torch(path: Path, base: Base) -> Callable:
    return torch.export.load(path).module()


def line_torch(path: Path, base: Base) -> str:
    return f"model = torch.export.load({str(path)!r}).module()"


def write_peft(model: nn.Module, path: Path, x: Tensor) -> None:
    export_peft(model, path)


def read_peft(path: Path, base: Base) -> Callable:
    import peft

    return peft.PeftModel.from_pretrained(base.create(), str(path)).eval()


def line_peft(path: Path, base: Base) -> str:
    line = f"model = peft.PeftModel.from_pretrained(base, {str(path)!r}).eval()"
    return f"{base.line()}\n{line}"


@dataclass(frozen=True)
class Format:
    """A row of FORMATS.

    Attributes:
        ending: of the file's name; "" for a folder.
        merges: "always" (into a plain timm model), "if it can", "never".
        packages: what it needs beside timm and torch.
        write: (model, path, images (B, 3, S, S)) -> None.
        read: (path, base) -> what turns images into logits, from what was written alone.
        line: (path, base) -> a line of Python that loads it.
    """

    ending: str
    merges: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Path, Tensor], None]
    read: Callable[[Path, Base], Callable]
    line: Callable[[Path, Base], str]


ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "timm": Format(".safetensors", "always", (), write_timm, read_timm, line_timm),
    "onnx": Format(".onnx", "if it can", ONNX, write_onnx, read_onnx, line_onnx),
    "torch": Format(".pt2", "if it can", (), write_torch, read_torch, line_torch),
    "peft": Format("", "never", ("peft",), write_peft, read_peft, line_peft),
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
        check_new(_beside(path), flag)
    missing = [name for name in row.packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise RunError(f"{flag} needs packages that are not here: pip install {names}")


def export(
    kind: str,
    path: Path,
    model: nn.Module,
    base: Base,
    x: Tensor,
    about: dict,
) -> float:
    """Write a trained model in eval mode as a new file or folder; load that back and compare.

    Args:
        kind: a key of FORMATS.
        base: what the model started from.
        x: normalised images (B, 3, S, S) to compare logits on, all together and the first alone.
        about: JSON values, as of `preparation`, written beside.

    Returns the largest difference of a logit. Raises ModelError for a method or model that cannot
    be exported so, RunError if it cannot be written or its logits differ; nothing is then left.
    """
    check_place(kind, path)
    row, flag = FORMATS[kind], f"--export {kind}"
    can_merge = METHODS[model.method].mergeable
    if row.merges == "always" or (row.merges == "if it can" and can_merge):
        written = merge(model).eval()
    else:
        written = model
    with torch.no_grad():
        logits = model(x)
    about = about | {"python": row.line(path, base).splitlines()}
    with new_file(path, flag) as draft:
        try:
            with quiet():
                row.write(written, draft, x)
                again = row.read(draft, base)
        except (ModelError, OSError):
            raise
        except Exception as error:  # whatever an exporter cannot do, in its words
            raise ModelError(f"{flag}: {architecture(model)}: {first_line(error)}") from error
        with torch.no_grad():
            difference = (again(x) - logits).abs().max().item()
            alone = (again(x[:1]) - logits[:1]).abs().max().item()
        difference = max(difference, alone)
        if not difference <= AGREE * max(1.0, logits.abs().max().item()):
            raise RunError(f"{flag}: loaded back, its logits differ by {difference:.1e}: not kept")
        if row.ending:
            write_json(_beside(path), about)
        else:
            write_json(draft / PREPARATION, about)
    return difference


def preparation(view: object, mean: tuple, std: tuple) -> dict:
    """How images become an input of the model, as JSON values; `view` are images of the run."""
    side = [view.img_size, view.img_size]
    return {
        "resize": view.short or side,  # the short side, or both
        "crop": side,  # from the centre
        "interpolation": "bicubic",
        "scale": "pixels / 255",
        "mean": list(mean),
        "std": list(std),
    }


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextmanager
def quiet():
    """Without what exporters print and warn of: the comparison decides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nothing,
            redirect_stdout(nothing),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def export_peft(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a model's experts and head as PEFT's LoRA: `peft.PeftModel.from_pretrained` loads the
    folder onto the plain timm model, with the pre-trained weights, and gives the same logits.

    lambda and fixed masks are folded into A, so that alpha is the rank; B of q, k or v alone gets
    rows of zeros; a layer without experts is left out. `directory` is made if need be. Raises
    ModelError, nothing written, for a method whose update is not of low rank, or that trains
    more than layers and head.
    """
    state, ranks, adapted = {}, {}, adapters(model)
    for name, layer in adapted.items():
        if type(layer) is not MLAELinear:
            kind = type(layer).__name__
            raise ModelError(f"PEFT's LoRA cannot hold a {kind} ({name}): no product of A and B")
        if layer.rank:
            ranks[name] = layer.rank
            factor = (layer.lora_lambda * layer.expert_mask)[:, None]  # (rank, 1)
            state[f"{name}.lora_A.weight"] = layer.lora_A * factor  # (rank, in)
            state[f"{name}.lora_B.weight"] = layer.full_B()  # (out, rank)
    if not ranks:
        raise ModelError("PEFT's LoRA needs an adapted layer: this model has none")
    head = heads(model)
    own = tuple(f"{name}." for name in (*adapted, *head))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name in trained if not name.startswith(own)]
    if others:
        raise ModelError(f"PEFT's LoRA has no place for what trained beside: {few(others)}")
    for name, module in head.items():
        for key, value in module.state_dict().items():
            state[f"{name}.{key}"] = value
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
    tensors = {}
    for key, value in state.items():
        tensors[f"base_model.model.{key}"] = value.detach().cpu().contiguous().clone()
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
