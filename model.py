"""A timm model with adapters in it: create, inject, save, load, merge.

    model = create("vit_base_patch16_224.orig_in21k", 47, rank=8, mask_prob=0.5)
    save_adapter(model, "adapter.safetensors", {})   # the experts and the head alone: 1.3 MB
    plain = merge(model)                             # a plain timm model again

Linear layers are swapped by their path; no forward of timm is patched or copied. How a method
adapts a model stands in its row of `methods.METHODS`.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from methods import MAIN, METHODS, Method, adapters

# The demo's backbone: timm's ViT-Ti made smaller (16 tokens, 0.7 M parameters)
NANO = {"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 3}
NANO_CFG = {"architecture": "vit_nano", "tag": "fashion_mnist", "input_size": (3, 28, 28)}
NANO_CFG |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
NANO_FILE = Path(__file__).resolve().parent / "demo" / "vit_nano.safetensors"

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # one may replace another

# Timm's modules in whose fused qkv layer q, k and v alternate by head, or q is missing
INTERLEAVED = ("csatv2", "efficientformer", "gcvit", "levit", "maxxvit", "tiny_vit")


class ModelError(ValueError):
    """A model, target or file that cannot be used; the message says what there is instead."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class's name if it has none."""
    if "weights_only" in str(error):  # torch and timm go on to say how to run what is in it
        return "it holds more than tensors: objects that could run code"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- create ---------------------------------------------------------------------------------------
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
    """A timm model with a new head, in which only what `method`, a key of METHODS, trains requires
    a gradient.

    `pretrained`, `checkpoint`, `img_size` and `drop_path` are as for `create_backbone`, `targets`
    as for `inject` (None: the method's own). `settings` are rank, mask_prob, masking, pattern,
    schedule, coef_init and so on: a method takes those in its row and ignores those of others.
    Raises ModelError for what cannot be made, TypeError for a setting that no method has.
    """
    row = find_method(method)
    words = {"pretrained": pretrained, "checkpoint": checkpoint, "img_size": img_size}
    model = create_backbone(name, num_classes, drop_path=drop_path, **words)
    inject(model, targets or row.targets, method=method, **settings)
    return model


def create_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model of a run with these arguments, before the first step, on the CPU."""
    names = "method", "checkpoint", "img_size", "drop_path", "targets"
    own = {name: getattr(args, name) for name in (*names, *METHODS[args.method].settings)}
    return create(args.model, classes, pretrained=not args.no_pretrained, **own)


def find_method(name: str) -> Method:
    """The row of METHODS of that name; ModelError, listing them all, if there is none."""
    if name not in METHODS:
        raise ModelError(f"--method must be one of {', '.join(METHODS)}, not {name!r}")
    return METHODS[name]


def input_size(name: str) -> int:
    """Side in pixels of the square images that a timm model takes by default. Raises ModelError for
    a name or tag that timm does not know, with the nearest ones."""
    if name == "vit_nano":
        return NANO["img_size"]
    if name.startswith(("hf-hub:", "hf_hub:")) or timm.is_model(name):
        with suppress(RuntimeError):  # the architecture is known, the tag is not
            cfg = timm.get_pretrained_cfg(name)
            return cfg.input_size[-1] if cfg else 224
    stem = name.split(".")[0]
    near = timm.list_pretrained(f"{stem}.*") or difflib.get_close_matches(stem, timm.list_models())
    raise ModelError(f"--model: timm has no {name!r}; the nearest are: {', '.join(near) or 'none'}")


def create_backbone(
    name: str, num_classes: int, *, pretrained=True, checkpoint=None, img_size=None, drop_path=0.0
) -> nn.Module:
    """A timm model of that name and tag, or `vit_nano`, the demo's backbone, with a new head; every
    parameter requires a gradient.

    `checkpoint` is a local `.safetensors`, `.pth` (weights only) or Google `.npz` file; without
    one timm downloads the weights if `pretrained`. Position grids are resampled to `img_size`
    pixels. Raises ModelError for what cannot be made.
    """
    input_size(name)  # raises for a name that timm does not know
    timm_name, arguments = name, {"num_classes": num_classes}  # timm passes over what is None
    if name == "vit_nano":
        timm_name = "vit_tiny_patch16_224"
        arguments |= NANO | {"pretrained_cfg_overlay": NANO_CFG}
        img_size = img_size or NANO["img_size"]
        checkpoint = checkpoint or (NANO_FILE if pretrained else None)
    arguments |= {"img_size": img_size, "drop_path_rate": drop_path or None}
    download = pretrained and not checkpoint
    if download:  # behind a silent network the hub tries for a minute
        print(f"{name}: downloading its weights, unless they are here already", flush=True)
    try:
        try:
            model = timm.create_model(timm_name, pretrained=download, **arguments)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            del arguments["img_size"]  # a convolutional network takes images of any size
            model = timm.create_model(timm_name, pretrained=download, **arguments)
    except Exception as error:  # whatever timm and the hub raise for a size or a failed download
        reason = f"timm cannot make it ({img_size=}, {drop_path=}): {first_line(error)}"
        if isinstance(error, LocalEntryNotFoundError):  # the hub's words blame the connection
            reason = "its weights are not on this machine and could not be downloaded"
        hint = "; name a file of weights with --checkpoint" if download else ""
        hint += ", or in eval.py use --download" if hint and hub.HF_HUB_OFFLINE else ""
        raise ModelError(f"--model {name}: {reason.rstrip('.')}{hint}") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    side = timm.layers.to_2tuple(patch)[0]
    if img_size and img_size % side:
        raise ModelError(f"--img-size {img_size}: take a multiple of {name}'s patch size, {side}")
    if checkpoint:
        load_checkpoint(model, checkpoint)
    return model


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a local file's backbone, not its head, into a timm model. Timm's own filter renames the
    keys and resamples position grids and patch embeddings. Raises ModelError if a tensor is
    missing, left over or of another shape."""
    path, name = Path(path), architecture(model)
    if not path.is_file():
        raise ModelError(f"--checkpoint: there is no file {path}")
    try:
        if path.suffix == ".npz":
            model.load_pretrained(str(path))
            return
        with open(path, "rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise ValueError("it is a pointer of Git LFS, not the weights: git lfs pull")
        state = timm.models.load_state_dict(path, use_ema=False, weights_only=True)
        for wrapper in ("teacher", "student"):  # Meta's
            state = state.get(wrapper, state)
        for prefix in ("module.", "_orig_mod.", "backbone."):
            if all(key.startswith((prefix, "head", "dino_head", "ibot_head")) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        registers = {"reg_token", "register_tokens"} & state.keys()
        if registers and getattr(model, "reg_token", None) is None:
            raise ValueError(f"it has register tokens, {name} has none: take a model with them")
        family = sys.modules[type(model).__module__]
        if hasattr(family, "checkpoint_filter_fn"):
            state = family.checkpoint_filter_fn(state, model)
    except Exception as error:  # readers and filters raise many classes of error for another file
        raise ModelError(f"cannot load checkpoint {path}: {first_line(error)}") from error
    head = tuple(f"{name}." for name in heads(model))
    state = {key: value for key, value in state.items() if not key.startswith(head)}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(head)}
    load_strictly(model, state, own, f"checkpoint {path}")


# --- inject ---------------------------------------------------------------------------------------
def inject(
    model: nn.Module, targets: Sequence[str] = ("attn.qkv",), *, method=MAIN, head=None, **settings
) -> list[str]:
    """Replace linear layers of `model` by the method's, in place; freeze what does not train.
    Returns the paths of the replaced layers.

    `targets` are ends of module paths: "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"; "attn.q",
    "attn.k" and "attn.v" mean those rows of a fused "attn.qkv". Head and patch embedding are never
    targets. `head` names the classifier, or several, which train too, () none, if timm's
    `get_classifier` is not there to say. `settings` are as for `create`: `masking` is "stochastic"
    (a new mask every step), "fixed" (drawn here, once, from torch's generator) or "mixed" (both);
    `pattern` spreads the masking probability over the layers in order, see `mlae.mask_rates`.

    Raises ModelError, the model untouched, for a target that matches nothing (listing what there
    is), a head that is not known, a weight that two layers share, a model injected already, a bad
    setting; and, after the swap, for a layer whose parent reads its weight instead of calling it.
    """
    row, name = find_method(method), architecture(model)
    if adapters(model):
        raise ModelError(f"the model is injected already: {few(list(adapters(model)))}")
    if head is not None:
        paths = [head] if isinstance(head, str) else list(head)
        for path in set(paths) - dict(model.named_modules()).keys():
            raise ModelError(f"head {path!r} is not in {name}")
        model.head_paths = paths
    elif not heads(model):
        raise ModelError(f"{name} does not tell its classifier: name it, as in head='fc'")
    chosen = find_layers(model, targets) if row.layer else {}
    own = row.complete(settings)
    for path in chosen:  # before memory is taken
        rank, most = own.get("rank", 1), min(model.get_submodule(path).weight.shape)
        if rank > most:
            raise ModelError(f"--rank {rank}: {path} of {name} allows at most {most}")
    layers = {}
    try:
        thawed = row.unfrozen(model)
        plan = row.layer_settings(list(chosen), own)
        for (path, rows), keywords in zip(chosen.items(), plan, strict=True):
            keywords = keywords | ({"rows": rows} if rows else {})
            layers[path] = row.layer.from_linear(model.get_submodule(path), **keywords)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        flag = f"--{name.replace('_', '-')}" if name in own else name
        raise ModelError(f"{flag} {rest}") from error
    model.method, model.method_settings = method, own
    model.adapted = len(chosen), len(linear_layers(model))  # of how many linear layers
    freeze(model)
    for path, layer in layers.items():
        for parameter in row.frozen(own):
            getattr(layer, parameter).requires_grad_(False)
        model.set_submodule(path, layer)
    for path in thawed:
        model.get_parameter(path).requires_grad_(True)
    if not layers or not hasattr(model, "pretrained_cfg"):
        return list(layers)

    # --- does a forward pass call them? BEiT's and Swin v2's attention read qkv.weight instead ---
    called, patch_embed = set(), getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or model.pretrained_cfg["input_size"][-2:]
    with ExitStack() as hooks, eval_mode(model), torch.no_grad():
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_hook(lambda layer, *_: called.add(layer)))
        try:
            model(next(model.parameters()).new_zeros(1, 3, *size))  # a black image
        except (RuntimeError, AssertionError):  # made for another size, or not for RGB
            called.update(layers.values())
    silent = [path for path, layer in layers.items() if layer not in called]
    if silent:
        raise ModelError(f"{name} reads {few(silent)} without a call: choose other --targets")
    return list(layers)


def freeze(model: nn.Module) -> None:
    """Leave only the head trainable."""
    model.requires_grad_(False)
    for head in heads(model).values():
        head.requires_grad_(True)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers that can be adapted, by path: neither head nor patch embedding."""
    head = tuple(f"{name}." for name in heads(model))
    linears = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    barred = [name for name in linears if f"{name}.".startswith(head) or "patch_embed" in name]
    return {name: layer for name, layer in linears.items() if name not in barred}


def find_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, list[int] | None]:
    """Path -> output rows (None: all) of the linear layers whose path ends in one of the targets.
    "attn.q", "attn.k" and "attn.v" also mean those rows of a fused "attn.qkv", and CaiT has both.
    Raises ModelError for a target without a layer, listing the ends that there are, for rows that
    are not to be told apart, and for a tied weight."""
    linears, name = linear_layers(model), architecture(model)
    chosen: dict[str, set[int]] = {}

    def ending_in(words: str) -> list[str]:
        return [path for path in linears if f".{path}".endswith(f".{words}")]

    for target in targets:
        stem, _, letter = target.rpartition(".")
        whole = ending_in(target)
        fused = ending_in(f"{stem}.qkv".lstrip(".")) if letter in ("q", "k", "v") else []
        for path in whole:
            chosen.setdefault(path, set()).update(range(linears[path].out_features))
        for path in fused:
            parent = type(model.get_submodule(path.rpartition(".")[0]))
            third, rest = divmod(linears[path].out_features, 3)
            if rest or parent.__module__.rpartition(".")[2] in INTERLEAVED:
                what = f"{path} of {name} has no {letter} rows of its own"
                raise ModelError(f"target {letter!r}: {what}")
            start = "qkv".index(letter) * third
            chosen.setdefault(path, set()).update(range(start, start + third))
        if not whole + fused:
            ends = Counter()
            for path in linears:
                words = [word for word in path.split(".") if not word.isdigit()]
                ends[".".join(words[-2:])] += 1
            listing = ", ".join(f"{end} ({count})" for end, count in ends.items()) or "none"
            what = f"target {target!r} matches no linear layer of {name}"
            raise ModelError(f"{what}; there are: {listing}")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    rows = {}
    for path in filter(chosen.get, linears):  # in the order of the model
        if owners[id(linears[path].weight)] > 1:
            raise ModelError(f"the weight of {path} is tied to another layer's: adapt neither")
        whole = len(chosen[path]) == linears[path].out_features
        rows[path] = None if whole else sorted(chosen[path])
    return rows


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier by path: timm's (two in a distilled DeiT), or what `model.head_paths` says."""
    if hasattr(model, "head_paths"):
        return {name: model.get_submodule(name) for name in model.head_paths}
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else ()
    wanted = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    return {name: module for name, module in model.named_modules() if module in wanted}


def architecture(model: nn.Module) -> str:
    """Timm's name of the architecture, or the class's name."""
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__


# --- train ----------------------------------------------------------------------------------------
def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: total (base included), trainable (head included), and the head's."""
    every = list(model.parameters())
    trainable = [parameter for parameter in every if parameter.requires_grad]
    head = {p for module in heads(model).values() for p in module.parameters()}
    parts = {"total": every, "trainable": trainable, "head": head}
    return {name: sum(p.numel() for p in part) for name, part in parts.items()}


def train_mode(model: nn.Module) -> None:
    """Training mode, but the running statistics of a frozen batch norm stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
            module.eval()


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


def round_frozen(model: nn.Module) -> None:
    """Hold the matrices of frozen plain linear layers in bf16: for a model that runs under bf16
    autocast, which would round them so at every step."""
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def recompute_blocks(model: nn.Module) -> None:
    """Keep no activations inside the blocks, compute them again in the backward pass; ModelError if
    timm cannot do that for this model."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ModelError(f"--grad-checkpoint: timm has none for {architecture(model)}") from None


def check_gradients(model: nn.Module) -> None:
    """Raise ModelError if, after a backward pass, a parameter that trains has no gradient. A whole
    model may have parameters that it does not use; an adapter or a head may not."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    silent = [name for name, parameter in trained.items() if parameter.grad is None]
    if silent and len(trained) < len(list(model.parameters())):
        remedy = "with --grad-checkpoint, this timm loses gradients; pip install -U timm"
        raise ModelError(f"no gradient reaches {few(silent)}: it is not used, or, {remedy}")


def adapter_size(method: str, sizes: dict[str, tuple[int, int]], **settings) -> int:
    """How many parameters a method trains in layers {path: (in_features, out_features)}."""
    row, count = METHODS[method], 0
    own = row.complete(settings)
    plan = row.layer_settings(list(sizes), own)
    for (inputs, outputs), keywords in zip(sizes.values(), plan, strict=True):
        layer = row.layer(inputs, outputs, device="meta", **keywords)
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and name not in row.frozen(own):
                count += parameter.numel()
    return count


def nearest_rank(method: str, sizes: dict[str, tuple], budget: int, **settings) -> int:
    """The rank at which `adapter_size` comes nearest to a number of parameters. Raises ModelError
    for a method that has no rank, or no layers."""
    if "rank" not in METHODS[method].settings or not sizes:
        raise ModelError(f"--budget: {method} has no rank to choose")
    off = {}  # rank -> how far it is from the budget
    for rank in range(1, min(map(min, sizes.values())) + 1):
        try:
            off[rank] = adapter_size(method, sizes, **settings, rank=rank) - budget
        except ValueError as error:
            if rank % 2 == 0:  # a kernel refuses odd ranks; another setting is wrong
                raise ModelError(f"--budget: {error}") from error
        if off.get(rank, -1) >= 0:
            return min(off, key=lambda rank: abs(off[rank]))
    raise ModelError(f"--budget {budget:,}: full rank has fewer parameters; give a smaller number")


def rank_within(args: argparse.Namespace) -> int:
    """The rank at which a run's adapters come nearest to args.budget parameters, head not counted;
    ModelError for a method without a rank."""
    plain = create_backbone(args.model, 1, pretrained=False, img_size=args.img_size)
    sizes = {}
    for name, rows in find_layers(plain, args.targets).items():
        linear = plain.get_submodule(name)
        sizes[name] = linear.in_features, len(rows) if rows else linear.out_features
    names = METHODS[args.method].settings.keys() - {"rank"}
    settings = {name: getattr(args, name) for name in names}
    rank = nearest_rank(args.method, sizes, args.budget, **settings)
    count = adapter_size(args.method, sizes, rank=rank, **settings)
    print(f"--budget {args.budget:,}: rank {rank} is nearest, with {count:,} parameters")
    return rank


# --- files ----------------------------------------------------------------------------------------
def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a checkpoint file; ModelError if there is none."""
    if not Path(path).is_file():
        raise ModelError(f"--checkpoint: there is no file {path}")
    now = os.stat(path)
    return digest_of(os.path.abspath(path), now.st_ino, now.st_size, now.st_mtime_ns)


@lru_cache  # a suite asks at every run
def digest_of(path: str, *version: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run has to keep: adapters and head; everything if the whole model trains."""
    state = model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) == len(list(model.parameters())):
        return state
    own = tuple(f"{name}." for name in (*adapters(model), *heads(model)))
    kept = {key for key in state if key.startswith(own) and not key.endswith((".weight", ".bias"))}
    return {key: value for key, value in state.items() if key in trained or key in kept}


def save_adapter(model: nn.Module, path: str | os.PathLike, config: dict) -> None:
    """Write `adapter_state` as safetensors; `config`, plain JSON values, goes into its header."""
    state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(model).items()}
    metadata = {"format": "pt", "architecture": architecture(model), "config": json.dumps(config)}
    Path(path).write_bytes(save(state, metadata))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> dict:
    """Load an adapter into a model that `create` made with the same arguments; returns the file's
    config. Raises ModelError, the model untouched, if the file cannot be read, is for another
    architecture, or does not fit (`load_strictly`): another rank or number of classes, say."""
    if not Path(path).is_file():
        raise ModelError(f"there is no adapter file {path}")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            header = file.metadata() or {}
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ModelError(f"cannot load adapter {path}: {first_line(error)}") from error
    made_for = header.get("architecture")
    if made_for != architecture(model):
        raise ModelError(f"adapter {path} is for {made_for}, not for {architecture(model)}")
    load_strictly(model, state, adapter_state(model), f"adapter {path}")
    return json.loads(header.get("config", "{}"))


def load_strictly(model: nn.Module, state: dict, own: dict, file: str) -> None:
    """Load `state` if its keys and shapes are exactly those of `own`, a part of the model's state.
    Raises ModelError, the model untouched, if they are not, or a value is not finite; `file` says
    what was being read."""
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = {
        "has unknown": [key for key in state if key not in own],
        "lacks": [key for key in own if key not in state],
        "has other shapes (rank, classes, size) in": shapes,
    }
    for problem, keys in problems.items():
        if keys:
            what = f"does not fit {architecture(model)} as it was made"
            raise ModelError(f"{file} {what}: it {problem} {few(keys)}")
    for key, value in state.items():
        wanted = own[key].dtype
        if value.dtype != wanted and not {value.dtype, wanted} <= FLOATS:
            raise ModelError(f"{file}: {key} is of {value.dtype}, not {wanted}")
        if not value.to(wanted).isfinite().all():
            raise ModelError(f"{file}: {key} has values that are not finite")
        if key.endswith(".rows"):
            outputs = model.get_submodule(key.removesuffix(".rows")).out_features
            if not len(value) == len({*value.tolist()} & {*range(outputs)}):
                raise ModelError(f"{file}: {key} are not different rows from 0 to {outputs - 1}")
    model.load_state_dict(state, strict=False)  # the rest of the model keeps its values


def weights_of(model: nn.Module, checkpoint: str | os.PathLike | None, pretrained: bool) -> dict:
    """Which weights a model was made with: {"tag": ...}, and {"sha256": ...} of a local file. The
    tag is timm's full one, `<architecture>.<tag>`, or names the file; "random" if none."""
    name = architecture(model)
    if name == "vit_nano" and pretrained and not checkpoint:
        checkpoint = NANO_FILE
    if checkpoint:
        return {"tag": f"{name}:{Path(checkpoint).name}", "sha256": sha256(checkpoint)}
    tag = model.pretrained_cfg.get("tag") if pretrained else "random"
    return {"tag": f"{name}.{tag}" if tag else name}


def merge(model: nn.Module) -> nn.Module:
    """A copy of the model with every adapter merged into a plain nn.Linear; `model` is left alone.
    The result has timm's own keys, loads strictly into the plain timm model and costs what it
    costs. Raises ModelError for a method whose update depends on the input."""
    method = getattr(model, "method", None)
    if method in METHODS and not METHODS[method].mergeable:
        raise ModelError(f"{method} cannot be merged: its update depends on the input")
    plain = copy.deepcopy(model)
    for name, layer in adapters(plain).items():
        plain.set_submodule(name, layer.to_linear())
    return plain
