"""A timm model with experts in it: create, inject, save, load, merge.

    model = create("vit_base_patch16_224.orig_in21k", 47, rank=8, mask_prob=0.5)   # train the head and the experts
    save_adapter(model, "adapter.safetensors", {})                                 # they alone: 1.3 MB
    plain = merge(model)                                                           # a plain timm model again

Linear layers are swapped by their path; no forward of timm is patched or copied.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from mlae import MLAELinear, fixed_masks, mask_rates

METHODS = ("mlae", "lora", "linear", "full")
MASKINGS = ("stochastic", "fixed", "mixed")

# Timm's modules whose fused qkv layer is not q, k and v one after the other (they alternate by head, or lack q).
INTERLEAVED = ("csatv2", "efficientformer", "gcvit", "levit", "maxxvit", "tiny_vit")

# The demo's backbone: timm's ViT-Ti made smaller, 16 tokens, 0.7 M parameters, pre-trained on Fashion-MNIST.
NANO = {"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 3}
NANO_CFG = {
    "architecture": "vit_nano",
    "tag": "fashion_mnist",
    "input_size": (3, 28, 28),
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}
NANO_FILE = Path(__file__).resolve().parent / "demo" / "vit_nano.safetensors"


class ModelError(ValueError):
    """A model, target or file that cannot be used; the message says what there is instead."""


def input_size(name: str) -> int:
    """Side in pixels of the square images that a timm model takes by default; ModelError for an unknown name."""
    if name == "vit_nano":
        return NANO["img_size"]
    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise ModelError(
            f"timm has no model {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the architecture is known, the tag is not
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise ModelError(f"timm has no weights {name!r}; there are: {tags}") from None
    return cfg.input_size[-1] if cfg else 224


def create(
    name: str,
    num_classes: int,
    *,
    method: str = "mlae",
    pretrained: bool = True,
    checkpoint: str | os.PathLike | None = None,
    img_size: int | None = None,
    drop_path: float = 0.0,
    rank: int = 8,
    mask_prob: float = 0.5,
    masking: str = "stochastic",
    pattern: str = "random",
    targets: Sequence[str] = ("attn.qkv",),
    coef_init: float = 1.0,
) -> nn.Module:
    """A timm model with a new head for `num_classes`, in which only what `method` trains requires a gradient.

    Args:
        name: a timm model with its tag, `vit_base_patch16_224.orig_in21k`, or `vit_nano`, the demo's backbone.
        method: "mlae"; "lora" (the same layer with p = 0 and lambda frozen at `coef_init` = alpha / r); "linear" (the
            head alone); "full" (everything).
        pretrained, checkpoint: the weights of a local `.safetensors`, `.pth` (weights only) or Google `.npz` file if
            given, else timm's download; position grids are resampled to `img_size`.
        rank, mask_prob, masking, pattern, targets, coef_init: as for `inject`.

    Raises ModelError for what cannot be made.
    """
    if method not in METHODS:
        raise ModelError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    input_size(name)  # raises for a name that timm does not know
    source, arguments = name, {"num_classes": num_classes}
    if name == "vit_nano":
        source, arguments = (
            "vit_tiny_patch16_224",
            {**arguments, **NANO, "pretrained_cfg_overlay": NANO_CFG},
        )
        checkpoint = checkpoint or (NANO_FILE if pretrained else None)
    arguments |= {"img_size": img_size} if img_size else {}
    arguments |= {"drop_path_rate": drop_path} if drop_path else {}
    try:
        try:
            model = timm.create_model(source, pretrained=pretrained and not checkpoint, **arguments)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            del arguments["img_size"]  # a convolutional network takes images of any size
            model = timm.create_model(source, pretrained=pretrained and not checkpoint, **arguments)
    except (
        Exception
    ) as error:  # whatever timm and the hub raise for a size, an argument or a download that fails
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        reason += (
            "; without a network, give the weights with --checkpoint"
            if pretrained and not checkpoint
            else ""
        )
        raise ModelError(
            f"timm cannot make {name} ({img_size=}, {drop_path=}): {reason}"
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    if (img_size or 0) % patch:
        raise ModelError(
            f"img_size {img_size} is not a multiple of {name}'s patch size {patch}: pixels would be lost"
        )
    if checkpoint:
        load_checkpoint(model, checkpoint)
    if method == "full":
        return model
    freeze(model)
    if method == "mlae":
        inject(
            model,
            targets,
            rank=rank,
            mask_prob=mask_prob,
            masking=masking,
            pattern=pattern,
            coef_init=coef_init,
        )
    elif method == "lora":
        inject(model, targets, rank=rank, mask_prob=0.0, coef_init=coef_init)
        for layer in experts(model).values():
            layer.lora_lambda.requires_grad_(False)
    return model


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier's modules by path: one, or two in a distilled DeiT; none in a model that timm did not make."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else ()
    wanted = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return {
        name: module
        for name, module in model.named_modules()
        if any(module is head for head in wanted)
    }


def experts(model: nn.Module) -> dict[str, MLAELinear]:
    """The injected layers by path, in the order of `model.named_modules()`."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MLAELinear)
    }


def freeze(model: nn.Module) -> None:
    """Leave only the head trainable."""
    model.requires_grad_(False)
    for head in heads(model).values():
        head.requires_grad_(True)


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a local file's backbone, not its head, into a timm model; ModelError if a tensor is missing or left over.

    Timm's own filter of the model's family renames the keys and resamples position grids and patch embeddings.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint file {path}")
    try:
        if path.suffix == ".npz":
            model.load_pretrained(str(path))
            return
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, "cpu", weights_only=True)
        )
        for wrapper in ("state_dict", "model"):
            state = state.get(wrapper, state)
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = adapt(state, model) if adapt else state
    except Exception as error:  # readers and filters raise many classes of error for a file that is not this model's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load checkpoint {path}: {reason}") from error
    new = tuple(f"{name}." for name in heads(model))
    state = {key: value for key, value in state.items() if not key.startswith(new)}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(new)}
    _load_strictly(model, state, own, f"checkpoint {path}")


def _load_strictly(
    model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor], file: str
) -> None:
    """Load `state` if it has exactly the keys and shapes of `own`, a part of the model's state; else ModelError."""
    for what, keys in {
        "has unknown": [key for key in state if key not in own],
        "lacks": [key for key in own if key not in state],
        "has other shapes (rank, classes, size) in": [
            k for k in own if k in state and state[k].shape != own[k].shape
        ],
    }.items():
        if keys:
            raise ModelError(
                f"{file} does not fit {architecture(model)} as it was made: it {what} {_few(keys)}"
            )
    model.load_state_dict(state, strict=False)


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def inject(
    model: nn.Module,
    targets: Sequence[str] = ("attn.qkv",),
    *,
    rank: int = 8,
    mask_prob: float = 0.5,
    masking: str = "stochastic",
    pattern: str = "random",
    **kwargs,
) -> list[str]:
    """Replace linear layers of `model` by MLAELinear, in place, and freeze all but the experts and the head.

    Args:
        targets: ends of module paths: "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"; "attn.q", "attn.k" and "attn.v"
            mean those rows of a fused "attn.qkv". The head and the patch embedding are never targets.
        rank, mask_prob, kwargs: as for MLAELinear.
        masking: "stochastic" (a new mask every step), "fixed" (drawn here, once, from torch's generator) or "mixed"
            (both, each with `mask_prob`).
        pattern: how the masking probability is spread over the layers in their order, see `mlae.mask_rates`.

    Returns the paths of the replaced layers. Raises ModelError, the model untouched, for a target that matches nothing
    (listing what there is), a weight that two layers share, a model injected already, a bad rank, p or pattern; and,
    after the swap, for a layer whose parent reads its weight instead of calling it.
    """
    if masking not in MASKINGS:
        raise ModelError(f"masking must be one of {', '.join(MASKINGS)}, not {masking!r}")
    chosen = find_layers(model, targets)
    rates, masks = [0.0] * len(chosen), [None] * len(chosen)
    try:
        if masking in ("stochastic", "mixed"):
            rates = mask_rates(pattern, len(chosen), mask_prob).tolist()
        if masking in ("fixed", "mixed"):
            masks = fixed_masks(pattern, len(chosen), rank, mask_prob)
        layers = {}
        for (name, rows), rate, mask in zip(chosen.items(), rates, masks, strict=True):
            per_layer = {"mask_prob": rate, "expert_mask": mask, "rows": rows}
            layers[name] = MLAELinear.from_linear(
                model.get_submodule(name), rank=rank, **per_layer, **kwargs
            )
    except ValueError as error:
        raise ModelError(str(error)) from error
    freeze(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    if hasattr(model, "pretrained_cfg"):
        _check_called(model, layers)
    return list(layers)


def find_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, list[int] | None]:
    """Path -> output rows (None for all) of the nn.Linear layers that `targets` name; raises as `inject` does."""
    if experts(model):
        raise ModelError(f"the model is injected already: {_few(list(experts(model)))}")
    barred = tuple(f"{name}." for name in heads(model))
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and not f"{name}.".startswith(barred)
        and "patch_embed" not in name
    }
    chosen: dict[str, set[int]] = {}
    for target in targets:
        hits = {
            name: range(m.out_features)
            for name, m in linears.items()
            if f".{name}".endswith(f".{target}")
        }
        stem, _, part = f".{target}".rpartition(".")
        if not hits and part in ("q", "k", "v"):  # a third of a fused layer
            fused = {name: m for name, m in linears.items() if f".{name}".endswith(f"{stem}.qkv")}
            for name, module in fused.items():
                n, parent = module.out_features // 3, model.get_submodule(name.rpartition(".")[0])
                if (
                    type(parent).__module__.rpartition(".")[2] in INTERLEAVED
                    or module.out_features % 3
                ):
                    raise ModelError(
                        f"target {target!r}: {name} of {architecture(model)} has no {part} rows of its own"
                    )
                hits[name] = range("qkv".index(part) * n, ("qkv".index(part) + 1) * n)
        if not hits:
            ends = Counter(
                ".".join([p for p in name.split(".") if not p.isdigit()][-2:]) for name in linears
            )
            there = ", ".join(f"{end} ({count})" for end, count in ends.items()) or "none"
            raise ModelError(
                f"target {target!r} matches no linear layer of {architecture(model)}; there are: {there}"
            )
        for name, rows in hits.items():
            chosen.setdefault(name, set()).update(rows)
    owners = Counter(
        id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    for name in chosen:
        if owners[id(linears[name].weight)] > 1:
            raise ModelError(
                f"the weight of {name} is tied to another layer's; experts on it would change only one"
            )
    rows = {
        name: None if len(r) == linears[name].out_features else sorted(r)
        for name, r in chosen.items()
    }
    return {name: rows[name] for name in linears if name in rows}


def _check_called(model: nn.Module, layers: dict[str, MLAELinear]) -> None:
    """ModelError if a forward does not call a layer: BEiT's and Swin v2's attention use `self.qkv.weight` instead."""
    called = set()
    hooks = [
        layer.register_forward_hook(lambda layer, *_: called.add(layer))
        for layer in layers.values()
    ]
    weight = next(iter(layers.values())).weight
    size = (
        getattr(getattr(model, "patch_embed", None), "img_size", None)
        or model.pretrained_cfg["input_size"][-2:]
    )
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype))
    except (RuntimeError, AssertionError):
        return  # built for another size or number of channels than its configuration says: no way to look
    finally:
        for hook in hooks:
            hook.remove()
    silent = [name for name, layer in layers.items() if layer not in called]
    if silent:
        raise ModelError(
            f"{architecture(model)} reads the weight of {_few(silent)} without calling the layer"
        )


def recompute_blocks(model: nn.Module) -> None:
    """Keep no activations inside the blocks, compute them again in the backward pass; ModelError if timm cannot."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ModelError(
            f"--grad-checkpoint: {architecture(model)} cannot recompute its blocks"
        ) from None


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


def architecture(model: nn.Module) -> str:
    """Timm's name of the architecture, or the class's name."""
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: total (base included), trainable (head included), and the head's."""
    return {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head_parameters": sum(
            p.numel() for head in heads(model).values() for p in head.parameters()
        ),
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run has to keep: experts, fixed masks and head; everything if the whole model trains."""
    state = model.state_dict()
    if all(parameter.requires_grad for parameter in model.parameters()):
        return state
    base = {f"{name}.{kind}" for name in experts(model) for kind in ("weight", "bias")}
    kept = tuple(f"{name}." for name in (*experts(model), *heads(model)))
    return {key: value for key, value in state.items() if key.startswith(kept) and key not in base}


def save_adapter(model: nn.Module, path: str | os.PathLike, config: dict) -> None:
    """Write `adapter_state` as safetensors; `config` (what JSON can hold) goes into the header."""
    state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(model).items()}
    metadata = {"format": "pt", "architecture": architecture(model), "config": json.dumps(config)}
    save_file(state, path, metadata=metadata)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> dict:
    """Load an adapter into a model that `create` made with the same arguments, and return the file's config.

    Raises ModelError, the model untouched, if the file is for another architecture, has unknown keys, lacks some, or
    has tensors of another shape (another rank or number of classes).
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, state = (
                file.metadata() or {},
                {key: file.get_tensor(key) for key in file.keys()},
            )  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"cannot read adapter {path}: {error}") from error
    if metadata.get("architecture") != architecture(model):
        raise ModelError(
            f"adapter {path} is for {metadata.get('architecture')}, not for {architecture(model)}"
        )
    _load_strictly(model, state, adapter_state(model), f"adapter {path}")
    return json.loads(metadata.get("config", "{}"))


def merge(model: nn.Module) -> nn.Module:
    """A copy of the model with every MLAELinear merged into a plain nn.Linear; `model` is left as it is.

    The result has timm's own keys, loads strictly into the plain timm model and costs what it costs.
    """
    plain = copy.deepcopy(model)
    for name, layer in experts(plain).items():
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.to_linear())
    return plain
