"""What a run needs beside other processes, and to outlive its own: a lock, ranks, its state.

    with claim(folder):                     # Busy if another process runs in the folder
        save_state(folder / "state.pt", ...)    # after every epoch, for --resume

    torchrun --nproc-per-node 2 train.py    # two ranks share every batch of one run

Ranks draw the same masks, as they start from the same seed and draw equally often. The first rank
alone prints, scores and writes.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from files import (
    NUMBER,
    RunError,
    check_dense,
    check_file,
    check_moments,
    check_shape,
    first_line,
    regular,
    whole,
)
from model import adapter_state, load_strictly

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# what a run's state must hold
PROGRESS = {"epoch": range(1, 2**31), "rows": list, "seconds": NUMBER}
STATE = {"weights": dict, "optimizer": {"state": dict}, "scaler": dict, "digest": str}
STATE |= {"rng": {"cpu": torch.Tensor, "cuda": list}, "progress": PROGRESS}

PADDING = -100  # the label of an image that only fills up a rank's part of a batch


# --- processes that share a folder ----------------------------------------------------------------


class Busy(RunError):
    """Another process is at it."""


def take_lock(path: Path) -> object:
    """Make and lock a file; its lock ends with this process, however that ends. Returns the open
    file; raises Busy if another process has the lock, OSError if there can be no such file."""
    for _ in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(regular(path), "a+")  # noqa: SIM115
        except (FileExistsError, FileNotFoundError) as error:
            gone = error  # its folder was removed, empty, by the one before; or cannot be
            continue
        gone = None
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked child has no part in it
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            held = error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
            if held:
                file.close()
                break
            warning = f"no locks in {path.parent}: start no second process on it"
            print(f"note: {warning}", file=sys.stderr)
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the one before has removed it after this one had opened it
    if gone:
        raise gone
    raise Busy(f"{path.parent}: {holder(path)} is at it; wait for it, or take another --out")


def holder(path: Path) -> str:
    """Who has locked a file, as it says itself."""
    with suppress(OSError, ValueError):
        return path.read_text().strip() or "another process"
    return "another process"


@contextmanager
def lock(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file inside. If another process does, wait so many seconds for it, then Busy."""
    end = time.monotonic() + patience
    while True:
        try:
            file = take_lock(path)
            break
        except Busy:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        file.close()


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Inside, no other process runs in the folder: Busy if one does, RunError if it cannot be made.
    A folder that was made for it goes again if nothing came into it."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as held:
        held.callback(remove_empty, made)  # after the lock
        try:
            if process_rank() == 0:
                held.enter_context(lock(folder / "lock"))
        except OSError as error:
            raise RunError(f"--out: cannot write {folder}: {error.strerror or error}") from error
        yield


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


# --- processes that share a run -------------------------------------------------------------------


def launched() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun tells its processes; (0, 1) without it."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)), ranks) if ranks > 1 else (0, 1)


def process_rank() -> int:
    """This process's number among those that share the run."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """How many processes share the run; 1 outside `joined`."""
    joined_up = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if joined_up else 1


@contextmanager
def joined(device: str, batch_size: int) -> Iterator[None]:
    """Inside, the processes that torchrun has started are the ranks of one run. Nothing changes
    without torchrun.

    `device` is a name in flags.DEVICES. Ranks but the first print nothing. Raises RunError if the
    batch or the GPUs do not suffice for all, or if another rank has ended before this one.
    """
    number, count = launched()
    if count == 1:
        yield
        return
    if batch_size % count:
        raise RunError(f"--batch-size {batch_size} is not a multiple of the {count} processes")
    backend = "gloo"
    if torch.cuda.is_available() and device in ("auto", "cuda"):
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise RunError(f"--nproc-per-node: this machine has {gpus} GPUs")
        torch.cuda.set_device(local)  # from here on "cuda" is this one
        backend = "nccl" if dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # the first may score for long
    try:
        with ExitStack() as silence:
            if number:
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            yield
            dist.barrier()
    except RuntimeError as error:
        words = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in words and "NCCL" not in words:
            raise
        if number:
            sys.exit(1)  # without a word: whoever ended first has said why
        reason = "another process of this run has ended; it says why"
        raise RunError(f"{reason}. Then the same command with --resume goes on") from error
    dist.destroy_process_group()


def let_the_first_speak() -> None:
    """All ranks meet the same error in the settings: torchrun ends the others after the first."""
    if launched()[0]:
        time.sleep(10)


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank goes through this before the others, as what it downloads is theirs too."""
    if process_rank():
        dist.barrier()
    yield
    if world_size() > 1 and process_rank() == 0:
        dist.barrier()


def agreed(value: object) -> object:
    """The first rank's value, on all ranks."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def total(value: Tensor) -> Tensor:
    """The sum over the ranks of a tensor, which is changed in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def share(model: nn.Module) -> nn.Module:
    """The model to call: if there are several ranks, one whose gradients are their means."""
    if world_size() == 1:
        return model
    # all steps use the same parameters
    return DistributedDataParallel(model, static_graph=True)


def epoch_of(images, order: Tensor, batch_size: int, workers: int, seed: str) -> Iterator:
    """The batches of `images.epoch`, or this rank's part of each, x (B / ranks, 3, S, S) and labels
    (B / ranks,), and how many images all ranks have in this batch.

    The parts of all ranks are of one size, so that they draw equally often. What the last batch
    lacks for that is filled up with an image whose label is PADDING.
    """
    lacking = -len(order) % world_size()
    filled = torch.cat([order, order[:1].expand(lacking)])  # (N + lacking,)
    left = len(order)
    own = filled[process_rank() :: world_size()]
    for x, y in images.epoch(own, batch_size // world_size(), workers, seed):
        size = min(batch_size, left)
        left -= size
        y[len(range(process_rank(), size, world_size())) :] = PADDING
        yield x, y, size


# --- a run that goes on ---------------------------------------------------------------------------


def save_state(path: Path, weights: dict, optimizer, scaler, digest: str, progress: dict) -> None:
    """All that `restore` needs to go on as if nothing had happened; whole or not at all.

    `weights` are the tensors that train, `digest` is the training images', `progress` what
    `restore` returns.
    """
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    state = {
        "weights": weights,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        "digest": digest,
        "progress": progress,
    }
    with whole(path) as draft, open(draft, "wb") as file:
        torch.save(state, file)


def restore(path: Path, model: torch.nn.Module, optimizer, scaler, digest: str) -> dict:
    """Load what `save_state` wrote, if it is there, and return the progress.

    {"epoch": epochs done, "rows": of the log, "seconds": of training}, all nothing if there is no
    state or its training images are not these. Raises RunError for a file that cannot be read.
    """
    nothing = {"epoch": 0, "rows": [], "seconds": 0.0}
    exists = agreed(path.exists())
    if exists and not path.exists():
        raise RunError(f"--out: every machine must see the same folder; here is no {path}")
    if not exists:
        return nothing
    try:
        check_file(path, "state")
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_shape(state, STATE, "it")
        progress, moments, rng = state["progress"], state["optimizer"]["state"], state["rng"]
        for row in progress["rows"]:
            check_shape(row, dict.fromkeys(row, NUMBER), "it: rows")
        if len(progress["rows"]) != progress["epoch"]:
            raise RunError("it has not a row for each epoch")
        if agreed(state["digest"] != digest):
            print(f"the training images are not those of {path}: starting anew")
            return nothing
        check_dense(state["weights"], "it")
        load_strictly(model, state["weights"], adapter_state(model), "it")
        groups = optimizer.state_dict()["param_groups"]  # as the run's settings make them
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        check_moments(optimizer)
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(rng["cpu"])
        if rng["cuda"]:
            torch.cuda.set_rng_state(rng["cuda"][0])
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = f"remove it to start anew ({first_line(error)})"
        raise RunError(f"cannot read {path}: {reason}") from error
    print(f"resumed after epoch {progress['epoch']} of {path.parent}")
    return progress
