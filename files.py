"""Files, read with distrust, as they may come from strangers, and written whole or not at all.

    state = read_checkpoint(Path("vit.pth"))        # dense tensors by name
    check_values(state, own, "vit.pth")             # each can take the place of the model's own
    config = read_json(folder / "config.json", {"amp": str, "weights": {"tag": str}})

No file runs code, is waited for (a pipe), or takes far more memory than its own size.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import reprlib
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # one may replace another
NUMBER = (-sys.float_info.max, sys.float_info.max)  # any that is finite


class ModelError(ValueError):
    """A model, target or file that cannot be used; the message says what there is instead."""


class RunError(ValueError):
    """A flag, device or file of a run that cannot be used; the message is one line."""


def regular(path: Path) -> Path:
    """The path; OSError for a pipe, device or folder there: opening a pipe can wait for ever."""
    try:
        mode = path.stat().st_mode  # asked once: another process may be removing the file
    except OSError:
        return path
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is not a regular file")
    return path


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


def read_json(path: Path, shape: dict) -> dict:
    """A JSON file of a run; RunError, naming the file and the key, if it has not this shape."""
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {first_line(error)}") from None
    check_shape(content, shape, str(path))
    return content


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's log.csv, at least one; RunError, naming the file, if it is none."""
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            head, *lines = csv.reader(file)
            rows = [dict(zip(head, map(float, line), strict=True)) for line in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"cannot read {path}: {first_line(error)}") from None
    if not rows:
        raise RunError(f"{path} has no epoch")
    for row in rows:
        check_shape(row, {"loss": NUMBER, "train_top1": NUMBER}, str(path))
    return rows


def check_shape(value: object, shape: object, where: str) -> None:
    """Raise RunError, naming `where` and the key, for a value from a file that has not the shape.

    A shape is a type, or a union of types; a range of integers; the lowest and the highest of
    finite numbers; or {key: shape}, where a file may have further keys. Text must be printable: it
    will be shown.
    """
    if isinstance(shape, dict):
        right, wanted = isinstance(value, dict), "a dict"
    elif isinstance(shape, range):
        right, wanted = type(value) is int and value in shape, f"from {shape[0]} to {shape[-1]}"
    elif isinstance(shape, tuple):
        low, high = shape
        right = type(value) in (int, float) and low <= value <= high
        wanted = f"a number from {low:g} to {high:g}"
    else:
        right = isinstance(value, shape) and (shape is not str or value.isprintable())
        wanted = getattr(shape, "__name__", str(shape))
    if not right:
        raise RunError(f"{where} is {reprlib.repr(value)}, not {wanted}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in value:
                raise RunError(f"{where} has no {key!r}")
            check_shape(value[key], inner, f"{where}: {key}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft to write to. It takes the place of `path` when it is written and on the disk, or goes
    if it cannot be: RunError then, and what was there before is still there."""
    draft = path.with_name(f"{path.name}.tmp")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # as of torch.save
        if not isinstance(cause, OSError):
            raise
        raise RunError(f"--out: cannot write {path}: {cause.strerror or cause}") from error
    finally:
        with suppress(OSError):
            draft.unlink()


def check_new(path: Path, flag: str, ending: str = "") -> None:
    """Raise RunError, naming the flag, unless a file or folder `path` can be made: its name has
    this ending, it is not there yet, and its folder is."""
    if not path.name.lower().endswith(ending):
        raise RunError(f"{flag} {path}: the name must end in {ending}")
    if os.path.lexists(path):
        raise RunError(f"{flag} {path}: it exists already; remove it or take another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RunError(f"{flag} {path}: cannot write to {path.parent}")


@contextmanager
def new(path: Path, flag: str) -> Iterator[Path]:
    """A draft, of the same name in a folder of its own, of a file or folder that is not there yet.

    It goes to its place when it is written, or vanishes if it cannot be: RunError then.
    """
    check_new(path, flag)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".draft-") as folder:
            draft = Path(folder, path.name)
            yield draft
            os.rename(draft, path)
    except OSError as error:
        raise RunError(f"{flag} {path}: cannot write it: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder, where the system can open folders."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, value: dict) -> None:
    """Write a file whole or not at all."""
    text = json.dumps(value, indent=2)
    with whole(path) as draft:
        draft.write_text(text)


def write_log(path: Path, rows: list[dict]) -> None:
    """Write the log anew, a row per epoch, numbers to seven digits."""
    with whole(path) as draft, open(draft, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([f"{value:.7g}" for value in row.values()])


def check_moments(optimizer: torch.optim.AdamW) -> None:
    """Raise ValueError unless each parameter has the finite moments that AdamW needs."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state[parameter]
            step, *means = moments["step"], moments["exp_avg"], moments["exp_avg_sq"]
            shapes = {mean.shape for mean in means}
            if len(moments) != 3 or step.ndim or shapes != {parameter.shape}:
                raise ValueError("the moments are not the parameters'")
            if not all(value.isfinite().all() for value in (step, *means)):
                raise ValueError("a moment is not finite")
