"""Timm's side: model names, the demo's ViT, local checkpoints and the head of any timm model.

backbone = create_backbone("vit_base_patch16_224.orig_in21k", 47)
heads(backbone)  # {"head": Linear(768, 47)}
"""

from __future__ import annotations

import difflib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from files import ModelError, check_file, check_values, few, first_line, read_checkpoint, sha256

# The demo's backbone: timm's ViT-Ti made smaller (16 tokens, 0.7 M parameters)
NANO = {"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 3}
NANO_CFG = {"architecture": "vit_nano", "tag": "fashion_mnist", "input_size": (3, 28, 28)}
NANO_CFG |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
NANO_FILE = Path(__file__).resolve().parent / "demo" / "vit_nano.safetensors"

# Timm's modules in whose fused qkv layer q, k and v alternate by head, or q is missing
INTERLEAVED = ("csatv2", "efficientformer", "gcvit", "levit", "maxxvit", "tiny_vit")


def input_size(name: str) -> int:
    """Side in pixels of the square images that a timm model takes by default.

    Raises ModelError for a name that timm does not know, with the nearest ones.
    """
    if name == "vit_nano":
        return NANO["img_size"]
    architecture_name = name.split(".")[0]
    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(name):
        near = difflib.get_close_matches(architecture_name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"timm has no model {name!r}{hint}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the architecture is known, the tag is not
        tags = ", ".join(timm.list_pretrained(f"{architecture_name}.*")) or "none"
        raise ModelError(f"timm has no weights {name!r}; there are: {tags}") from None
    return cfg.input_size[-1] if cfg else 224


def create_backbone(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = True,
    checkpoint: str | os.PathLike | None = None,
    img_size: int | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """A timm model, or `vit_nano`, with a new head; every parameter requires a gradient.

    `checkpoint` is a local `.safetensors`, `.pth` (weights only) or Google `.npz` file; without
    one timm downloads the weights if `pretrained`. Position grids are resampled to `img_size`
    pixels. Raises ModelError for what cannot be made.
    """
    input_size(name)  # raises for a name that timm does not know
    timm_name = name
    arguments = {"num_classes": num_classes}
    if name == "vit_nano":
        timm_name = "vit_tiny_patch16_224"
        arguments |= NANO | {"pretrained_cfg_overlay": NANO_CFG}
        checkpoint = checkpoint or (NANO_FILE if pretrained else None)
    if img_size:
        arguments["img_size"] = img_size
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    download = pretrained and not checkpoint
    if download:  # behind a silent network the hub tries for a minute
        print(f"{name}: downloading its weights, unless they are here already", flush=True)
    try:
        model = _create_of_any_size(timm_name, download, arguments)
    except Exception as error:  # whatever timm and the hub raise for a size or a failed download
        reason = first_line(error).rstrip(".")
        if download:
            reason += "; without a network, give the weights with --checkpoint"
        made = f"{name} ({img_size=}, {drop_path=})"
        raise ModelError(f"timm cannot make {made}: {reason}") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    side = patch if isinstance(patch, int) else patch[0]
    if img_size and img_size % side:
        raise ModelError(f"img_size {img_size} is not a multiple of {name}'s patch size {side}")
    if checkpoint:
        load_checkpoint(model, checkpoint)
    return model


def _create_of_any_size(name: str, download: bool, arguments: dict) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=download, **arguments)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
    # a convolutional network takes images of any size, and no such argument
    others = {key: value for key, value in arguments.items() if key != "img_size"}
    return timm.create_model(name, pretrained=download, **others)


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a local file's backbone, not its head, into a timm model.

    Timm's own filter renames the keys and resamples position grids and patch embeddings.
    Raises ModelError if a tensor is missing, left over or of another shape.
    """
    path = Path(path)
    file = f"checkpoint {path}"
    check_file(path, "checkpoint")
    state = {} if path.suffix == ".npz" else read_checkpoint(path)
    try:
        if path.suffix == ".npz":
            model.load_pretrained(str(path))
            return
        family = sys.modules[type(model).__module__]
        if hasattr(family, "checkpoint_filter_fn"):
            state = family.checkpoint_filter_fn(state, model)
    except Exception as error:  # readers and filters raise many classes of error for another file
        raise ModelError(f"cannot load checkpoint {path}: {first_line(error)}") from error
    head = tuple(f"{name}." for name in heads(model))
    state = {key: value for key, value in state.items() if not key.startswith(head)}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(head)}
    load_strictly(model, state, own, file)


def load_strictly(
    model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor], file: str
) -> None:
    """Load `state` if its keys and shapes are exactly those of `own`, a part of the model's state.

    Raises ModelError, the model untouched, if they are not, or a value is not finite; `file` says
    what was being read.
    """
    shared = [key for key in own if key in state]
    problems = {
        "has unknown": [key for key in state if key not in own],
        "lacks": [key for key in own if key not in state],
        "has other shapes (rank, classes, size) in": [
            key for key in shared if state[key].shape != own[key].shape
        ],
    }
    for problem, keys in problems.items():
        if keys:
            name = architecture(model)
            raise ModelError(f"{file} does not fit {name} as it was made: it {problem} {few(keys)}")
    check_values(state, own, file)
    for key in own:
        rows = state[key]
        if key.endswith(".rows"):
            outputs = model.get_submodule(key.removesuffix(".rows")).out_features
            if rows.min() < 0 or rows.max() >= outputs or len(rows.unique()) < len(rows):
                raise ModelError(f"{file}: {key} are not different rows from 0 to {outputs - 1}")
    model.load_state_dict(state, strict=False)  # the rest of the model keeps its values


def check_settings(model: nn.Module, names: Iterable[str], settings: dict) -> None:
    """Raise ModelError, before memory is taken, for a rank above a layer's own, or a factor that
    float32 cannot hold."""
    rank, factor = settings.get("rank", 1), settings.get("coef_init", 1.0)
    for name in names:
        layer = model.get_submodule(name)
        most = min(layer.in_features, layer.out_features)
        if isinstance(rank, int) and rank > most:
            raise ModelError(f"--rank {rank}: {name} of {architecture(model)} has at most {most}")
    if not abs(factor) <= torch.finfo(torch.float32).max:
        raise ModelError(f"--coef-init {factor}: float32 cannot hold it")


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier by path: timm's (two in a distilled DeiT), or what `model.head_paths` says."""
    if hasattr(model, "head_paths"):
        return {name: model.get_submodule(name) for name in model.head_paths}
    if not hasattr(model, "get_classifier"):
        return {}
    classifier = model.get_classifier()
    wanted = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    return {name: module for name, module in model.named_modules() if module in wanted}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: total (base included), trainable (head included), and the head's."""
    counts = {"total": 0, "trainable": 0, "head": 0}
    for parameter in model.parameters():
        counts["total"] += parameter.numel()
        counts["trainable"] += parameter.numel() if parameter.requires_grad else 0
    for head in heads(model).values():
        counts["head"] += sum(parameter.numel() for parameter in head.parameters())
    return counts


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers that can be adapted, by path: neither head nor patch embedding."""
    head = tuple(f"{name}." for name in heads(model))
    found = {}
    for name, module in model.named_modules():
        barred = f"{name}.".startswith(head) or "patch_embed" in name
        if type(module) is nn.Linear and not barred:
            found[name] = module
    return found


def match(model: nn.Module, target: str) -> dict[str, range]:
    """Path -> output rows of the linear layers whose path ends in `target`.

    "attn.q", "attn.k" and "attn.v" also mean those rows of a fused "attn.qkv", and CaiT has both.
    Raises ModelError, listing the ends that there are, if nothing matches.
    """
    linears = linear_layers(model)
    matches = {}
    for name, linear in linears.items():
        if f".{name}".endswith(f".{target}"):
            matches[name] = range(linear.out_features)
    stem, _, letter = target.rpartition(".")
    if letter in ("q", "k", "v"):
        fused = f"{stem}.qkv" if stem else "qkv"
        for name in linears:
            if f".{name}".endswith(f".{fused}"):
                matches[name] = _rows_of(model, name, letter)
    if matches:
        return matches
    ends = Counter()
    for name in linears:
        words = [word for word in name.split(".") if not word.isdigit()]
        ends[".".join(words[-2:])] += 1
    listing = ", ".join(f"{end} ({count})" for end, count in ends.items()) or "none"
    name = architecture(model)
    raise ModelError(f"target {target!r} matches no linear layer of {name}; there are: {listing}")


def _rows_of(model: nn.Module, fused: str, letter: str) -> range:
    """The rows of q, k or v in a fused layer of that path."""
    parent = model.get_submodule(fused.rpartition(".")[0])
    family = type(parent).__module__.rpartition(".")[2]
    third, rest = divmod(model.get_submodule(fused).out_features, 3)
    if family in INTERLEAVED or rest:
        name = architecture(model)
        raise ModelError(f"target {letter!r}: {fused} of {name} has no {letter} rows of its own")
    start = "qkv".index(letter) * third
    return range(start, start + third)


def uncalled(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """The paths of those layers that a forward pass of a timm model does not call.

    BEiT's and Swin v2's attention use `self.qkv.weight` instead. Empty if the model is not timm's,
    or is built for another size or number of channels than it says: there is no way to look.
    """
    if not layers or not hasattr(model, "pretrained_cfg"):
        return []
    called = set()
    hooks = []
    for layer in layers.values():
        hooks.append(layer.register_forward_hook(lambda layer, *_: called.add(layer)))
    try:
        with eval_mode(model), torch.no_grad():
            model(_probe(model))
    except (RuntimeError, AssertionError):
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, layer in layers.items() if layer not in called]


def _probe(model: nn.Module) -> Tensor:
    """One black image (1, 3, S, S) of the size that a timm model was built for."""
    patch_embed = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or model.pretrained_cfg["input_size"][-2:]
    return next(model.parameters()).new_zeros(1, 3, *size)


def architecture(model: nn.Module) -> str:
    """Timm's name of the architecture, or the class's name."""
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__


def weights_of(
    model: nn.Module, checkpoint: str | os.PathLike | None, pretrained: bool
) -> dict[str, str]:
    """Which weights a model was made with: {"tag": ...}, and {"sha256": ...} of a local file.

    The tag is timm's full one, `<architecture>.<tag>`, or names the file; "random" if none.
    """
    name = architecture(model)
    if name == "vit_nano" and pretrained and not checkpoint:
        checkpoint = NANO_FILE
    if checkpoint:
        return {"tag": f"{name}:{Path(checkpoint).name}", "sha256": sha256(checkpoint)}
    tag = model.pretrained_cfg.get("tag") if pretrained else "random"
    return {"tag": f"{name}.{tag}" if tag else name}


def parameter_groups(
    model: nn.Module, weight_decay: float, factor: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """What trains: matrices with weight decay; vectors, and what timm exempts, without. `factor`
    is a parameter's learning rate over that of the rest."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: dict[tuple, list] = {(weight_decay, 1.0): [], (0.0, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in exempt
            key = weight_decay if decays else 0.0, factor(name)
            groups.setdefault(key, []).append(parameter)
    made = []
    for (decay, rate), params in groups.items():
        made.append({"params": params, "weight_decay": decay, "factor": rate})
    return made


def train_mode(model: nn.Module) -> None:
    """Training mode, but the running statistics of a frozen batch norm stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
            module.eval()


def recompute_blocks(model: nn.Module) -> None:
    """Keep no activations inside the blocks, compute them again in the backward pass.

    Raises ModelError if timm cannot do that for this model.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ModelError(f"--grad-checkpoint: {architecture(model)} cannot do that") from None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode is back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
