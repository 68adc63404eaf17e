"""What surrounds a run: device and precision, its folder, identity and files.

    folder = run_folder(args.out, identity(args, defaults))
    metrics = finished(folder, args)        # the result, if the same run has ended before

A run is what its settings make it. Its identity holds those that differ from the defaults, without
machine and place; the folder's name and the tables of `suite.py` come from this one list.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import photos
from baselines import METHODS
from files import ModelError, RunError, read_json, sha256
from flags import PLACE, printable, shown
from processes import launched, let_the_first_speak, world_size
from splits import DataError
from tasks import TASKS

try:
    import resource
except ImportError:  # Windows
    resource = None

ALWAYS = ("dataset", "method", "model", "epochs", "seed")  # in every identity, default or not
SHORT = {"mask_prob": "p", "rank": "r", "lr": "lr"}  # shown in the folder's name if not default

GOES_ON = {  # how an interrupted script goes on
    "train.py": ": the same command with --resume goes on",
    "suite.py": ": the same command goes on",
}
OUT_OF_MEMORY = "out of memory: --grad-checkpoint needs less, or --accumulate 4, or --batch-size 32"
NO_MEMORY = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")
# what the files of a run must hold, for those that read them
CONFIG = {"arguments": {"method": str}, "identity": {"method": str}}
METRICS = {"dataset": str, "model": str, "data": str, "official": bool, "seed": range(2**31)}
RESULT = {"official": bool, "digest": str, "run": str, "images": range(1, 2**31)}


class Diverged(RunError):
    """Training ended in a loss that is not finite."""


ERRORS = (DataError, ModelError, RunError)  # what a user can mend; bugs keep their traceback


class Terminated(KeyboardInterrupt):
    """SIGTERM came: from a queue whose time is over, or a machine that shuts down."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, and so what is open is tidied up.

    Ranks but the first have nothing to tidy up: Ctrl-C and SIGTERM end them at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = launched()[0] == 0

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise Terminated

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop if first else signal.SIG_DFL)}
    if not first:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says: torch has a class for it on CUDA alone."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)


def complain(script: str, message: str) -> None:
    """One line on stderr, and the end."""
    print(f"{script}: error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def discard_output() -> None:
    """Let go what standard output does not take: Python would try again, aloud, as it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def one_line(script: str) -> Iterator[None]:
    """What a user can mend ends in one line and exit code 2, Ctrl-C in a hint and 130, SIGTERM in
    the same hint and 143.

    A reader of the output that has gone away (`| head`) ends it without a word.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no text
    try:
        with stoppable():
            yield
        sys.stdout.flush()
    except ERRORS as error:
        let_the_first_speak()
        complain(script, str(error))
    except BrokenPipeError:
        discard_output()
        sys.exit(141)  # as a program that SIGPIPE ends
    except OSError as error:  # no bug but the system's answer: a full disk, no permission
        discard_output()
        complain(script, f"{error.filename or 'standard output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        complain(script, OUT_OF_MEMORY if script in GOES_ON else "out of memory")
    except KeyboardInterrupt as stop:
        print(f"interrupted{GOES_ON.get(script, '')}", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else Apple's MPS, else the CPU.

    Raises RunError for a device that is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and world_size() == 1,  # ranks cannot talk there
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in present if present[kind])
    if not present[name]:
        raise RunError(f"--device {name}: there is none here; use --device auto or cpu")
    return torch.device(name)


def resolve_amp(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a CUDA device that computes in it, else off."""
    if name != "auto":
        return name
    cuda = device.type == "cuda"
    return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "off"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision: products in bf16 or fp16, the rest in float32; "off": float32 throughout."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "off")


def peak_memory_mb(device: torch.device) -> int | None:
    """Highest memory use in MiB: allocated on CUDA, else of the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the memory of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(found[1]) >> 10 if found else None
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, else KiB


def provenance(device: torch.device) -> dict:
    """The machine and the code of a run: device, number of processes that share the run, versions,
    git commit (None outside a clone)."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm"):
        versions[package] = importlib.import_module(package).__version__
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    try:
        commit = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"device": name, "processes": world_size(), "versions": versions, "git": commit}


def identity(args: argparse.Namespace, defaults: argparse.Namespace) -> dict:
    """What makes a run this run: the settings that differ from the defaults, and `ALWAYS`.

    A local checkpoint counts by its digest, not by its path, and so does a folder of images.
    """
    usual = vars(defaults)
    own = {}
    for name, value in vars(args).items():
        if name not in PLACE and (name in ALWAYS or value != usual[name]):
            own[name] = value
    if args.checkpoint:
        own["checkpoint"] = sha256(args.checkpoint)
    return photos.identify(own, args.dataset, args.out)


def run_folder(out: str | os.PathLike, own: dict) -> Path:
    """<out>/<dataset>/<method>-<model>-<settings>-seed<n>-<digest of the identity>."""
    words = [own["method"], own["model"].replace("/", "_").replace(":", "_")]
    for name, short in SHORT.items():
        if name in own:
            value = own[name]
            words.append(short + (shown(value) if isinstance(value, dict) else f"{value:g}"))
    words.append(f"seed{own['seed']}")
    if own.get("val"):
        words.append("val")
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    return Path(out, own["dataset"], "-".join([*words, digest[:6]]))


def finished(folder: Path, args: argparse.Namespace) -> dict | None:
    """The metrics of a run that has ended; None if there is none that can be read, or it is to be
    overwritten.

    Raises RunError if the folder holds a run of other arguments: the defaults have changed since.
    """
    if vars(args).get("overwrite"):
        return None
    try:
        scored = "val_top1" if vars(args).get("val") else "test_top1"
        metrics = read_json(folder / "metrics.json", RESULT | {scored: (0, 100)})
        then = read_json(folder / "config.json", {"arguments": dict})["arguments"]
    except RunError:  # none yet, damaged, or an older version's
        return None
    for name, value in vars(args).items():
        skipped = (*PLACE, *photos.FLAGS, "checkpoint", "dataset")  # identity has them
        if name not in skipped and name in then and then[name] != value:
            flag = name.replace("_", "-")
            raise RunError(
                f"{folder} was run with --{flag} {then[name]}, the default of its time; "
                f"now it is {value}: take another --out, or --overwrite"
            )
    with suppress(OSError):  # it may have been killed before it did so
        (folder / "state.pt").unlink(missing_ok=True)
    print(f"finished before (--overwrite runs it again): {folder}")
    return metrics | {"run": str(folder)}  # it may have been moved


def check_unfinished(folder: Path, args: argparse.Namespace) -> None:
    """Raise RunError if an interrupted run is in the folder and neither flag says what to do.

    `resume` may be None too, as suite.py has it: go on if there is something to go on from.
    """
    interrupted = (folder / "state.pt").exists()
    if interrupted and args.resume is False and not args.overwrite:
        raise RunError(f"{folder} was interrupted: --resume goes on, --overwrite starts anew")
    if args.resume and not interrupted:
        print(f"nothing to resume in {folder}: starting anew")


def clear_folder(folder: Path, keep_state: bool) -> None:
    """Remove an earlier result from the folder of a run that starts; RunError if that cannot be."""
    try:
        (folder / "metrics.json").unlink(missing_ok=True)
        if not keep_state:
            (folder / "state.pt").unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"--out: cannot write {folder}: {error.strerror}") from error


def report(metrics: dict) -> dict:
    """Print a line for people; returns what it was given."""
    split = "test" if "test_top1" in metrics else "val"
    top1 = metrics[f"{split}_top1"]
    print(f"{split} top-1 {top1:.2f} % ({metrics['images']} images), run {metrics['run']}")
    return metrics


def warn_of_unread_folder(args: argparse.Namespace, source: str) -> None:
    """Say so if --data-dir was given for images that are in this repository."""
    if source == "embedded" and args.data_dir != os.path.abspath("data"):
        hint = f"--dataset {args.dataset} is in this repository, --data-dir is not read"
        print(f"note: {hint}; name what to train on with --dataset", file=sys.stderr)


def warn_of_failure(top1: float, labels: torch.Tensor) -> None:
    """Say so if the top-1 accuracy (%) on the training images is hardly that of a constant."""
    guess = 100 * labels.bincount().max() / len(labels)
    if top1 < guess + 5:
        hint = f"training top-1 is {top1:.1f} %, the largest class alone gives {guess:.1f} %"
        print(f"warning: hardly anything was learned ({hint}): change --lr", file=sys.stderr)


@dataclass(frozen=True)
class Result:
    """A finished run: all its arguments, its identity, metrics, the split scored, top-1 (%)."""

    arguments: dict
    identity: dict
    metrics: dict
    split: str
    top1: float


def collect(*folders: str | Path) -> list[Result]:
    """The finished runs in folders, oldest first.

    Those that are damaged, or whose task or method is not known here, are named and left out.
    """
    files = []
    for folder in folders:
        files += Path(folder).rglob("metrics.json")
    results = []
    for file in sorted(files, key=lambda path: path.lstat().st_mtime):
        try:
            config = read_json(file.with_name("config.json"), CONFIG)
            arguments, own = config["arguments"], config["identity"]
            split = "val" if own.get("val") else "test"
            metrics = read_json(file, METRICS | {f"{split}_top1": (0, 100)})
        except RunError as error:
            reason = f"{file.parent} is damaged and left out: {error}"
            print(printable(reason), file=sys.stderr)
            continue
        top1 = float(metrics[f"{split}_top1"])
        is_task = metrics["dataset"] in TASKS or photos.FOLDER in own
        known = is_task and own["method"] in METHODS
        if known:
            results.append(Result(arguments, own, metrics, split, top1))
        else:
            name = f"{own['method']} on {metrics['dataset']}"
            print(f"{file.parent} is left out: {name} is unknown here", file=sys.stderr)
    return results
