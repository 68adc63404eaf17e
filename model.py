"""A timm model with adapters in it: create, inject, save, load, merge.

    model = create("vit_base_patch16_224.orig_in21k", 47, rank=8, mask_prob=0.5)
    save_adapter(model, "adapter.safetensors", {})   # the experts and the head alone: 1.3 MB
    plain = merge(model)                             # a plain timm model again

Linear layers are swapped by their path; no forward of timm is patched or copied. How a method
adapts a model stands in its row of `baselines.METHODS`.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from backbone import (
    ModelError,
    architecture,
    check_settings,
    create_backbone,
    few,
    heads,
    linear_layers,
    load_strictly,
    match,
    uncalled,
)
from baselines import MAIN, METHODS, Method, adapters
from export import export_peft  # noqa: F401
from files import read_adapter


def create(
    name: str,
    num_classes: int,
    *,
    method: str = MAIN,
    pretrained: bool = True,
    checkpoint: str | os.PathLike | None = None,
    img_size: int | None = None,
    drop_path: float = 0.0,
    targets: Sequence[str] | None = None,
    **settings,
) -> nn.Module:
    """A timm model with a new head, in which only what `method` trains requires a gradient.

    Args:
        name: a timm model with its tag, or `vit_nano`, the demo's backbone.
        method: a key of METHODS.
        pretrained, checkpoint, img_size, drop_path: as for `backbone.create_backbone`.
        targets: the layers to adapt, as for `inject`; None: the method's own.
        settings: rank, mask_prob, masking, pattern, schedule, coef_init and so on. A method takes
            those in its row and ignores what belongs to other methods.

    Raises ModelError for what cannot be made, TypeError for a setting that no method has.
    """
    row = find_method(method)
    model = create_backbone(
        name,
        num_classes,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=img_size,
        drop_path=drop_path,
    )
    inject(model, targets or row.targets, method=method, **settings)
    return model


def find_method(name: str) -> Method:
    """The row of METHODS of that name; ModelError, listing them all, if there is none."""
    if name not in METHODS:
        raise ModelError(f"--method must be one of {', '.join(METHODS)}, not {name!r}")
    return METHODS[name]


def inject(
    model: nn.Module,
    targets: Sequence[str] = ("attn.qkv",),
    *,
    method: str = MAIN,
    head: str | Sequence[str] | None = None,
    **settings,
) -> list[str]:
    """Replace linear layers of `model` by the method's, in place; freeze what does not train.

    Args:
        targets: ends of module paths: "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"; "attn.q",
            "attn.k" and "attn.v" mean those rows of a fused "attn.qkv". The head and the patch
            embedding are never targets.
        head: the path of the classifier, or several, which train too; () for none. None asks
            timm's `get_classifier`, which other libraries' models do not have.
        settings: as for `create`. `masking` is "stochastic" (a new mask every step), "fixed" (drawn
            here, once, from torch's generator) or "mixed" (both); `pattern` spreads the masking
            probability over the layers in their order, see `mlae.mask_rates`.

    Returns the paths of the replaced layers. Raises ModelError, the model untouched, for a target
    that matches nothing (listing what there is), a head that is not known, a weight that two layers
    share, a model injected already, a bad setting; and, after the swap, for a layer whose parent
    reads its weight instead of calling it.
    """
    row = find_method(method)
    if adapters(model):
        raise ModelError(f"the model is injected already: {few(list(adapters(model)))}")
    find_head(model, head)
    chosen = find_layers(model, targets) if row.layer else {}
    own = row.own(settings)
    check_settings(model, chosen, own)
    layers = {}
    try:
        thawed = row.thawed(model)
        plan = row.plan(list(chosen), own)
        for (name, rows), keywords in zip(chosen.items(), plan, strict=True):
            if rows is not None:
                keywords = keywords | {"rows": rows}
            layers[name] = row.layer.from_linear(model.get_submodule(name), **keywords)
    except ValueError as error:
        raise ModelError(str(error)) from error
    linears = len(linear_layers(model))
    freeze(model)
    for name, layer in layers.items():
        for parameter in row.fixed(own):
            getattr(layer, parameter).requires_grad_(False)
        model.set_submodule(name, layer)
    for name in thawed:
        model.get_parameter(name).requires_grad_(True)
    model.method, model.method_settings = method, own
    model.adapted = len(chosen), linears  # of how many linear layers
    silent = uncalled(model, layers)
    if silent:
        raise ModelError(f"{architecture(model)} reads the weight of {few(silent)} without a call")
    return list(layers)


def find_head(model: nn.Module, head: str | Sequence[str] | None) -> None:
    """Note the classifier's paths in the model; ModelError if they are not there, or not known."""
    if head is None:
        if not heads(model):
            name = architecture(model)
            raise ModelError(f"{name} does not tell its classifier: name it, as in head='fc'")
        return
    paths = [head] if isinstance(head, str) else list(head)
    known = dict(model.named_modules())
    for path in paths:
        if path not in known:
            raise ModelError(f"head {path!r} is not in {architecture(model)}")
    model.head_paths = paths


def freeze(model: nn.Module) -> None:
    """Leave only the head trainable."""
    model.requires_grad_(False)
    for head in heads(model).values():
        head.requires_grad_(True)


def find_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, list[int] | None]:
    """Path -> output rows (None: all) of the linear layers that `targets` name; see `inject`."""
    linears = linear_layers(model)
    chosen: dict[str, set[int]] = {}
    for target in targets:
        for name, rows in match(model, target).items():
            chosen.setdefault(name, set()).update(rows)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = {}
    for name, linear in linears.items():
        if name in chosen and owners[id(linear.weight)] > 1:
            raise ModelError(f"the weight of {name} is tied to another layer's: adapt neither")
        if name in chosen:
            whole = len(chosen[name]) == linear.out_features
            found[name] = None if whole else sorted(chosen[name])
    return found


def check_gradients(model: nn.Module) -> None:
    """Raise ModelError if, after a backward pass, a parameter that trains has no gradient.

    A whole model may have parameters that it does not use; an adapter or a head may not.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    silent = [name for name, parameter in trained.items() if parameter.grad is None]
    if silent and len(trained) < len(list(model.parameters())):
        raise ModelError(
            f"no gradient reaches {few(silent)}: the model does not use it, or, with "
            f"--grad-checkpoint, this timm loses gradients; pip install -U timm"
        )


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run has to keep: adapters and head; everything if the whole model trains."""
    state = model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) == len(list(model.parameters())):
        return state
    own = tuple(f"{name}." for name in (*adapters(model), *heads(model)))
    kept = {}
    for key, value in state.items():
        frozen_base = key.endswith((".weight", ".bias"))
        if key in trained or (key.startswith(own) and not frozen_base):
            kept[key] = value
    return kept


def save_adapter(model: nn.Module, path: str | os.PathLike, config: dict) -> None:
    """Write `adapter_state` as safetensors; `config`, plain JSON values, goes into its header."""
    state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(model).items()}
    metadata = {"format": "pt", "architecture": architecture(model), "config": json.dumps(config)}
    Path(path).write_bytes(save(state, metadata))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> dict:
    """Load an adapter into a model that `create` made with the same arguments.

    Returns the file's config. Raises ModelError, the model untouched, if the file is for another
    architecture, has unknown keys, lacks some, or has tensors of another shape (another rank or
    number of classes).
    """
    state, made_for, config = read_adapter(path)
    if made_for != architecture(model):
        raise ModelError(f"adapter {path} is for {made_for}, not for {architecture(model)}")
    load_strictly(model, state, adapter_state(model), f"adapter {path}")
    return config


def merge(model: nn.Module) -> nn.Module:
    """A copy of the model with every adapter merged into a plain nn.Linear; `model` is left alone.

    The result has timm's own keys, loads strictly into the plain timm model and costs what it
    costs. Raises ModelError for a method whose update depends on the input.
    """
    method = getattr(model, "method", None)
    if method in METHODS and not METHODS[method].mergeable:
        raise ModelError(f"{method} cannot be merged: its update depends on the input")
    plain = copy.deepcopy(model)
    for name, layer in adapters(plain).items():
        plain.set_submodule(name, layer.to_linear())
    return plain
