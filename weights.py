"""Files of weights, checkpoints and adapters, read with distrust: they come from strangers.

    state = read_checkpoint(Path("vit.pth"))     # dense tensors by name
    check_values(state, own, "vit.pth")          # each can take the place of the model's own

No file runs code, waits on a pipe, or takes more memory than its own size.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # one may replace another


class ModelError(ValueError):
    """A model, target or file that cannot be used; the message says what there is instead."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a checkpoint file; ModelError if there is none."""
    check_file(path, "checkpoint")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_file(path: str | os.PathLike, kind: str) -> None:
    """Raise ModelError for no regular file, or an archive that unpacks to far more than it is."""
    if not Path(path).is_file():
        raise ModelError(f"no {kind} file {path}")
    try:
        unpacked = 0
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot load {kind} {path}: {first_line(error)}") from error
    if unpacked > 10 * os.path.getsize(path):  # weights do not shrink to a tenth
        raise ModelError(f"{kind} {path} would unpack to {unpacked >> 20} MiB")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """{name: tensor on the CPU} of a .safetensors file or of one of `torch.save`, where a training
    script may have wrapped them; ModelError for a file that cannot be read."""
    check_file(path, "checkpoint")
    try:
        if path.suffix == ".safetensors":
            state, _ = _read_safetensors(path)
        else:
            state = torch.load(path, "cpu", weights_only=True)
        for wrapper in ("state_dict", "model"):
            state = state.get(wrapper, state)
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ModelError(f"cannot load checkpoint {path}: {first_line(error)}") from error
    check_dense(state, f"checkpoint {path}")
    return state


def read_adapter(path: str | os.PathLike) -> tuple[dict[str, Tensor], str | None, dict]:
    """The tensors of an adapter's file, the architecture that it is for, and its config; ModelError
    for a file that cannot be read."""
    check_file(path, "adapter")
    try:
        state, header = _read_safetensors(path)
        config = json.loads(header.get("config", "{}"))
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ModelError(f"cannot read adapter {path}: {first_line(error)}") from error
    return state, header.get("architecture"), config


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the header; checks itself that the sizes in the header are the file's."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def check_dense(state: object, file: str) -> None:
    """Raise ModelError unless `state` is {name: tensor}, and none is sparse, without data, or
    declared larger than its data."""
    if not isinstance(state, dict):
        raise ModelError(f"{file} holds no tensors by name but a {type(state).__name__}")
    for name, value in state.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not dense or value.nbytes > value.untyped_storage().nbytes():
            raise ModelError(f"{file}: {name} is no dense tensor")


def check_values(state: dict[str, Tensor], own: dict[str, Tensor], file: str) -> None:
    """Raise ModelError unless each of a model's `own` tensors can take the value in `state`, which
    has the same names and shapes: of such a type, and finite in it."""
    for name, tensor in own.items():
        value = state[name]
        if value.dtype != tensor.dtype and not {value.dtype, tensor.dtype} <= FLOATS:
            raise ModelError(f"{file}: {name} is of {value.dtype}, not {tensor.dtype}")
        if not value.to(tensor.dtype).isfinite().all():
            raise ModelError(f"{file}: {name} has values that are not finite")
