"""What a run is: its flags, settings, folder and files, its lock, ranks and errors.

    args = settle(train_parser().parse_args(["--dataset", "dtd"]))
    folder = run_folder(args.out, identity(args, usual(args)))
    metrics = finished(folder, args)        # the result, if the same run has ended before

A run is what its settings make it. Its identity holds those that differ from the defaults, without
machine and place; the folder's name and the tables of suite.py come from this one list.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor

import data
import model as models
from methods import MAIN, MASKINGS, METHODS, SCHEDULES
from mlae import PATTERNS
from splits import printable, regular

FOLDER = Path(__file__).resolve().parent
AMP = ["auto", "bf16", "fp16", "off"]
DEVICES = ["auto", "cpu", "cuda", "mps"]
LARGEST = 4096  # side of an image in pixels
PLACE = ("device", "graph", "workers", "out", "data_dir", "resume", "overwrite")  # where, not what
ALWAYS = ("dataset", "method", "model", "epochs", "seed")  # in every identity, default or not
SHORT = {"mask_prob": "p", "rank": "r", "lr": "lr"}  # shown in the folder's name if not default
PADDING = -100  # the label of an image that only fills up a rank's part of a batch
GOES_ON = {"train.py": " with --resume", "suite.py": ""}  # the same command goes on
BY_DIGEST = {*PLACE, *data.FOLDER_FLAGS, "checkpoint", "dataset"}  # the identity has these or none
RENAMED = {"mask_pattern": "pattern", "mask_schedule": "schedule"}  # flag -> setting
OUT_OF_MEMORY = "out of memory: --grad-checkpoint needs less, or --accumulate 4, or --batch-size 32"
NO_MEMORY = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")


# --- errors ---------------------------------------------------------------------------------------
class RunError(ValueError):
    """A flag, device or file of a run that cannot be used; the message is one line."""


class Busy(RunError):
    """Another process is at it."""


class Diverged(RunError):
    """Training ended in a loss that is not finite."""


class OtherImages(RunError):
    """A stopped run had other training images."""


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says: torch has a class for it on CUDA alone."""
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextmanager
def one_line(script: str) -> Iterator[None]:
    """What a user can mend ends in a line and exit code 2, Ctrl-C and SIGTERM in a hint and 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no text
    # SIGTERM: a queue's time is over. Ranks but the first have nothing to tidy up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if launched()[0] else signal.default_int_handler)
    try:
        yield
        if sys.stdout:  # it may have been closed
            sys.stdout.flush()
        return
    except (data.DataError, models.ModelError, RunError) as error:  # a bug keeps its traceback
        message = str(error)
    except BrokenPipeError:  # the reader of the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try again, aloud, as it exits
        sys.exit(1)
    except OSError as error:  # no bug but the system's answer: a full disk, no permission
        message = f"{error.filename or 'standard output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        message = OUT_OF_MEMORY
        if script in ("eval.py", "plot.py"):  # which have none of these flags
            message = "out of memory: close other programs, or try --device cpu"
    except KeyboardInterrupt:
        hint = f": the same command{GOES_ON[script]} goes on" if script in GOES_ON else ""
        print(f"interrupted{hint}", file=sys.stderr)
        sys.exit(130)
    if launched()[0]:
        time.sleep(10)  # all ranks meet the same error: torchrun ends them after the first one's
    new_parser(script).error(message)


# --- flags ----------------------------------------------------------------------------------------
def new_parser(prog: str, manual: str | None = None) -> argparse.ArgumentParser:
    """A parser whose errors are one line, with the manual at the top of its --help."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else a line for every retry
    parser = argparse.ArgumentParser(prog, f"{prog} [flags]", manual, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def refuse(message: str) -> None:
        if launched()[0] == 0:
            print(f"{prog}: error: {printable(message)}", file=sys.stderr)
        sys.exit(2)

    parser.error = refuse
    return parser


def number(kind: type, low: float, high: float, expected: str) -> Callable:
    """A flag's type: an int or float in [low, high)."""

    def parse(text: str):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


COUNT = number(int, 1, 2**31, "1 or more")
WHOLE = number(int, 0, 2**31, f"from 0 to {2**31 - 1}")
SIDE = number(int, 1, LARGEST + 1, f"from 1 to {LARGEST}")
FRACTION = number(float, 0, 1, "0 or more and below 1")
ONE_SETTING = "give one number, or target=number once for each target"
SHARE = number(float, math.ulp(0.0), 1, "between 0 and 1")
POSITIVE = number(float, math.ulp(0.0), 3.4e38, "above 0 and below 3.4e38")
SIZE = number(float, 0, 3.4e38, "0 or more and below 3.4e38")


def amount(text: str) -> int:
    """A flag's type: a whole number, or one like 0.3M or 50K."""
    factor = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 1)
    return COUNT(str(round(float(text if factor == 1 else text[:-1]) * factor)))


def by_target(text: str) -> float | dict[str, float]:
    """A flag's type: a probability, or target=probability, several of these joined by commas."""
    if not set("=,") & set(text):
        return FRACTION(text)
    pairs = sorted(word.partition("=") for word in text.split(","))
    setting = {target: FRACTION(p) for target, _, p in pairs}
    if len(setting) < len(pairs) or not all(re.fullmatch(r"\w+(\.\w+)*", one) for one in setting):
        raise argparse.ArgumentTypeError(f"{ONE_SETTING}, not {text}")
    return setting


by_target.__name__ = "float"  # for argparse's "invalid float value"


class OneSetting(argparse.Action):
    """The words after a flag are one setting: a number, or the targets with a number each."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setting, *others = values
        for value in others:
            if (
                not isinstance(setting, dict)
                or not isinstance(value, dict)
                or setting.keys() & value
            ):
                message = f"{ONE_SETTING}; suite.py takes several settings"
                raise argparse.ArgumentError(self, message)
            setting = dict(sorted((setting | value).items()))
        setattr(namespace, self.dest, setting)


def shown(value: object) -> str:
    """The value of a flag in one word, as suite.py takes it."""
    if isinstance(value, dict):
        value = [f"{key}={number:g}" for key, number in value.items()]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def add_flags(group: Callable[[str], Callable]) -> None:
    """Every flag of a run; group(title) returns what adds a flag under that title. What the rows of
    a method and a task say is None here, for `settle` to fill in."""

    def titled(title: str) -> Callable:
        add = group(title)

        def flag(name: str, words: str, **options) -> None:
            dest = options.get("dest", name[2:].replace("-", "_"))
            owners: dict = {}  # default -> methods
            for method, row in METHODS.items():
                if dest in row.settings:
                    owners.setdefault(shown(row.settings[dest]), []).append(method)
            usual, *others = owners or [options.get("default")]
            defaults = [str(usual), *(f"{', '.join(owners[value])}: {value}" for value in others)]
            words += "" if usual is None else f" (default: {'; '.join(defaults)})"
            add(name, help=words, **options)

        return flag

    on = {"action": "store_true"}
    flag = titled("data")
    flag("--dataset", "a task, or a folder of your own images", default="digits")
    flag("--data-dir", "folder of the data sets", type=os.path.abspath, default="data")
    words = "which copy of VTAB-1k to read; auto: the originals, else the prepared folder"
    flag("--source", words, choices=data.SOURCES, default="auto")
    flag("--img-size", "side in pixels (default: the model's own)", type=SIDE)
    norms = {"choices": ["imagenet", "none", "model"], "default": "imagenet"}
    flag("--normalize", "mean and std to normalise with; most published results: imagenet", **norms)
    crops = {"choices": [*data.AUGMENT, "auto"], "default": "auto"}
    flag("--augment", "vary training images; auto: crop for FGVC and your own, else none", **crops)
    flag = titled("your own images")
    share = {"type": SHARE, "default": 0.2}
    flag("--test-share", "share of each class for testing, if there is no test/ or val/", **share)
    flag("--val-share", "share of training images for --val, unless val/ and test/ exist", **share)
    flag("--split-seed", "seed of the draw of these shares", type=WHOLE, default=0)
    flag("--skip-bad-images", "leave out unreadable images (default: stop and name them)", **on)
    flag = titled("model")
    flag("--model", "timm model, by name and tag (default: the paper's ViT-B/16; digits: vit_nano)")
    flag("--checkpoint", "pre-trained weights: .safetensors, .pth or .npz", type=os.path.abspath)
    flag("--no-pretrained", "start from random weights", **on)
    flag = titled("method")
    words = "; ".join(f"{name}: {row.trains}" for name, row in METHODS.items())
    flag("--method", words, default=MAIN)
    words = "layers to adapt, by the ends of their names (default: the method's, mostly attn.qkv)"
    flag("--targets", words, nargs="+", metavar="PATH")
    flag("--rank", "experts per layer", type=COUNT)
    words = "choose the rank that trains about N parameters without the head, for example 0.3M"
    flag("--budget", words, type=amount, metavar="N")
    flag("--coef-init", "start of lambda; lora, rmlora: fixed scale, alpha / rank", type=POSITIVE)
    flag = titled("masking")
    words = "masking probability p, or one for each target: attn.qkv=0.5,mlp.fc1=0.3"
    flag("--mask-prob", words, nargs="+", type=by_target, action=OneSetting, metavar="P")
    words = "stochastic: a new mask at each step; fixed: one mask for the whole run; mixed: both"
    flag("--masking", words, choices=list(MASKINGS))
    words = "how p changes from the first layer to the last; random: it does not"
    flag("--mask-pattern", words, dest="pattern", choices=list(PATTERNS))
    flag("--mask-schedule", "how p changes in training", dest="schedule", choices=list(SCHEDULES))
    flag("--freeze-lambda", "do not train lambda", **on | {"default": None})
    flag("--lambda-lr", "learning rate of lambda: FACTOR x --lr", type=POSITIVE, metavar="FACTOR")
    flag = titled("other methods")
    flag("--lora-dropout", "lora: dropout on the adapter's input, as PEFT has it", type=FRACTION)
    flag("--penalty-weight", "rmlora: weight of the orthogonality penalty", type=SIZE)
    flag("--active-ranks", "rmlora: how many ranks of a layer learn at each step", type=COUNT)
    words = "rmlora: at a step A and B learn the same ranks (1) or ranks drawn separately (2)"
    flag("--variant", words, type=int, choices=[1, 2])
    flag("--num-experts", "mor: experts that share one LoRA", type=COUNT)
    flag("--sparsity", "snell, snella: share of the update that is zero at the end", type=FRACTION)
    flag("--start-sparsity", "snella: that share at the start", type=FRACTION)
    flag("--gate", "snell, snella: gate of the authors' code or paper", choices=["code", "paper"])
    flag = titled("optimisation")
    flag("--epochs", "passes over the images (default: 100; digits: 20; your own: 30)", type=COUNT)
    flag("--batch-size", "images per step; the last batch may be smaller", type=COUNT, default=64)
    flag("--lr", "highest learning rate of AdamW (default: 1e-3; digits: 8e-3)", type=POSITIVE)
    flag("--weight-decay", "weight decay of matrices, not of vectors", type=FRACTION, default=1e-4)
    words = "epochs in which the rate rises to --lr; then a cosine to 0 (default: a tenth of all)"
    flag("--warmup-epochs", words, type=float)
    flag("--drop-path", "highest chance to skip a block in training (default: 0)", type=FRACTION)
    flag("--label-smoothing", "share of each label spread over classes", type=FRACTION, default=0.0)
    flag = titled("run")
    flag("--seed", "seed of all random numbers of the run", type=WHOLE, default=0)
    flag("--val", "to choose settings: train on train (VTAB-1k: 800), score val, not test", **on)
    flag("--amp", "mixed precision; auto: bf16 on CUDA", choices=AMP, default="auto")
    flag("--compile", "use torch.compile; compiling takes longer than the whole demo", **on)
    words = "auto: run forward and backward as one CUDA graph where possible, which is faster"
    flag("--graph", words, choices=["auto", "off"], default="auto")
    flag("--grad-checkpoint", "recompute blocks in the backward pass: less memory, more time", **on)
    split = {"type": COUNT, "default": 1, "metavar": "N"}
    flag("--accumulate", "split each batch into N parts; each draws its own mask", **split)
    flag("--device", "auto: CUDA, else MPS, else the CPU", choices=DEVICES, default="auto")
    flag("--workers", "processes that decode images; 0: the main one does", type=WHOLE, default=4)
    flag("--out", "folder of all runs", type=os.path.normpath, default="runs")
    flag("--resume", "go on after the last whole epoch of this run", **on)
    flag("--overwrite", "train from the start, even if there is a finished or a stopped run", **on)


def train_parser(manual: str | None = None) -> argparse.ArgumentParser:
    """The parser of train.py, with its manual at the top of --help."""
    parser = new_parser("train.py", manual)
    add_flags(lambda title: parser.add_argument_group(title).add_argument)
    return parser


# --- settings -------------------------------------------------------------------------------------
def fill_in(args: argparse.Namespace, *defaults: dict) -> None:
    """Give the arguments that are None or auto their defaults, in place."""
    for row in defaults:
        for name, value in row.items():
            if getattr(args, name, None) in (None, "auto"):
                setattr(args, name, value)


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of one run: those left out take what suits task, method and model. Raises
    DataError, ModelError or RunError for values that do not go together."""
    task, row = data.find_task(args.dataset), models.find_method(args.method)
    args = argparse.Namespace(**vars(args))
    args.dataset = task.argument
    if args.budget and args.rank:
        raise RunError("--budget chooses the rank: leave --rank out")
    fill_in(args, task.recipe, row.settings, {"targets": list(row.targets)})
    for name in sorted(row.foreign()):
        if getattr(args, name, None) is not None:
            setattr(args, name, None)
            print(f"note: {args.method} has no {name}; it is ignored", file=sys.stderr)
    args.img_size = args.img_size or models.input_size(args.model)
    if args.budget:
        args.rank, args.budget = models.rank_within(args), None  # the rank is what the run is
    fill_in(args, {"warmup_epochs": args.epochs / 10})
    if not 0 <= args.warmup_epochs < args.epochs:
        raise RunError(f"--warmup-epochs {args.warmup_epochs:g}: give 0 or more, below --epochs")
    return args


def usual(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a run on the same task with the same method, model and number of epochs."""
    fixed = ("dataset", "method", "model", "epochs")
    return settle(train_parser().parse_args([f"--{name}={getattr(args, name)}" for name in fixed]))


def identity(args: argparse.Namespace, defaults: argparse.Namespace) -> dict:
    """What makes a run this run: the settings that differ from the defaults, and `ALWAYS`; of a
    local checkpoint and of a folder of images the digest, not the path."""
    own = {}
    for name, value in vars(args).items():
        if name not in PLACE and (name in ALWAYS or value != getattr(defaults, name)):
            own[name] = value
    if args.checkpoint:
        own["checkpoint"] = models.sha256(args.checkpoint)
    return data.identify(own, args.dataset, args.out)


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


# --- device ---------------------------------------------------------------------------------------
def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else Apple's MPS, else the CPU; RunError if absent."""
    mps = torch.backends.mps.is_available() and world_size() == 1  # ranks cannot talk there
    present = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
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
    status = Path("/proc/self/status")  # getrusage would count that of the parent process too
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) >> 10 if found else None


def code_digest() -> str:
    """What tells the code that makes a run from other code: each result belongs to its code."""
    names = "mlae methods model splits tasks data runs train".split()
    texts = [(FOLDER / f"{name}.py").read_bytes() for name in names]
    return hashlib.sha256(b"\n".join(texts)).hexdigest()[:12]


def provenance(device: torch.device) -> dict:
    """Device, number of processes, versions, git commit (None outside a clone), code's digest."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    command, commit = ["git", "-C", str(FOLDER), "rev-parse", "HEAD"], None
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    machine = {"device": name, "processes": world_size(), "versions": versions}
    return machine | {"git": commit, "code": code_digest()}


# --- files ----------------------------------------------------------------------------------------
@contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Whatever a damaged file makes its reader raise is a RunError that names the file."""
    try:
        yield
    except Exception as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else models.first_line(error)
        raise RunError(f"cannot read {path}: {remedy}{reason}") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; RunError for anything else."""
    with reading(path):
        content = json.loads(regular(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    return content


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's log.csv, at least one; RunError if it is none."""
    rows = []
    with reading(path), open(regular(path), newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file, strict=True):
            rows.append({name: float(value) for name, value in line.items()})
        if not rows or not all(math.isfinite(row["loss"] + row["train_top1"]) for row in rows):
            raise ValueError("it has no epoch, or values that are not finite")
    return rows


@contextmanager
def write_atomically(path: Path, flag: str = "--out") -> Iterator[Path]:
    """A draft of a file or folder. It takes the place of `path` when it is written and on the disk,
    or goes if it cannot be: RunError then, and what was there before is still there."""
    try:
        # in a folder of its own, under no name that a stranger's run could have linked elsewhere
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".draft-") as folder:
            draft = Path(folder, path.name)
            yield draft
            if draft.is_file():
                with open(draft, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # as of torch.save
        if not isinstance(cause, OSError):
            raise
        raise RunError(f"{flag}: cannot write {path}: {cause.strerror or cause}") from error


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(value, indent=2)
    with write_atomically(path) as draft:
        draft.write_text(text)


def write_csv(path: Path, head: list, rows: list) -> None:
    """Write a table whole or not at all."""
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with write_atomically(path) as draft, open(draft, "w", **text) as file:
        csv.writer(file).writerows([head, *rows])


@contextmanager
def lock(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file inside, for no longer than this process lives. A folder that was made for it
    goes again if nothing came into it. Raises Busy if another process holds it for more than
    `patience` seconds, RunError if there can be no such file."""
    made, held = [folder for folder in path.parents if not folder.exists()], FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():  # taking it would empty the file that a stranger's run points to
            raise RunError(f"{path} is a link: remove it")
        held.acquire(timeout=patience)
    except Timeout:
        message = "another process is at it; wait for it, or choose another --out"
        raise Busy(f"{path.parent}: {message}") from None
    except OSError as error:
        raise RunError(f"--out: cannot write {path.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()  # whoever has opened it already sees that it is gone, and tries again
        held.release()
        with suppress(OSError):  # not empty
            for folder in made:  # the innermost first
                folder.rmdir()


def claim(folder: Path):
    """Inside, no other process runs in the folder; raises as `lock` does."""
    return lock(folder / "lock") if process_rank() == 0 else nullcontext()


# --- processes that share a run -------------------------------------------------------------------
# Ranks draw the same masks, as they start from the same seed and draw equally often. The first rank
# alone prints, scores and writes.
def launched() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun tells its processes; (0, 1) without it."""
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    return (int(os.environ["RANK"]), ranks) if ranks > 1 else (0, 1)


def world_size() -> int:
    """How many processes share the run; 1 outside `joined`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number among those that share the run."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def joined(device: str, batch_size: int) -> Iterator[None]:
    """Inside, the processes that torchrun has started are the ranks of one run, of which the first
    alone prints. Nothing changes without torchrun. RunError if the batch cannot be shared."""
    number, count = launched()
    if count == 1:
        yield
        return
    if batch_size % count:
        raise RunError(f"--batch-size {batch_size}: take a multiple of {count}, the processes")
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # from here on "cuda" is it
    # the first may score for long
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    with open(os.devnull, "w") as nowhere:
        out, err = (nowhere, nowhere) if number else (sys.stdout, sys.stderr)
        with redirect_stdout(out), redirect_stderr(err):
            yield
            dist.barrier()
    dist.destroy_process_group()


def broadcast(value: object) -> object:
    """The first rank's value, on all ranks."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over the ranks of a tensor, which is changed in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def rank_batches(images, order: Tensor, batch_size: int, workers: int, seed: str) -> Iterator:
    """The batches of `images.epoch`, or this rank's part of each, x (B / ranks, 3, S, S) and labels
    (B / ranks,), and how many images all ranks have. So that ranks draw equally often, an image
    with the label PADDING fills up what a last part lacks."""
    rank, ranks, left = process_rank(), world_size(), len(order)
    filled = torch.cat([order, order[:1].expand(-len(order) % ranks)])  # (N + lacking,)
    for x, y in images.epoch(filled[rank::ranks], batch_size // ranks, workers, seed):
        size = min(batch_size, left)
        left -= size
        y[len(range(rank, size, ranks)) :] = PADDING
        yield x, y, size
