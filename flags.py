"""Every flag of a run. It imports no torch, so that --help and typing errors answer at once.

    train_parser().parse_args(["--dataset", "dtd"])

The flags of a method are None here: `baselines.METHODS` has its defaults, `data.TASKS` those of a
task, and `train.settle` fills both in.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

AMP = ["auto", "bf16", "fp16", "off"]
DEVICES = ["auto", "cpu", "cuda", "mps"]
NORMS = ["imagenet", "none", "model"]
TABLE_FORMATS = ["markdown", "csv", "json", "latex"]
PLACE = ("device", "workers", "out", "data_dir", "resume", "overwrite")  # not what a run is
SOURCES = ["auto", "original", "prepared"]
AUGMENT = ["none", "crop", "flip", "auto"]


def printable(text: str) -> str:
    """The text in one line, with escapes for what a terminal would act on."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command in one line on stderr, with exit code 2."""

    def __init__(self, **kwargs) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=raw, allow_abbrev=False, **kwargs)
        # without a network the hub writes a line for every retry
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def error(self, message: str) -> None:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, the first
            print(f"{self.prog}: error: {printable(message)}", file=sys.stderr)
        sys.exit(2)


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
FRACTION = number(float, 0, 1, "in [0, 1)")
POSITIVE = number(float, math.ulp(0.0), math.inf, "above 0")
SIZE = number(float, 0, math.inf, "0 or more")
SHARE = number(float, math.ulp(0.0), 1, "in (0, 1)")


def augmentation(text: str) -> str | None:
    """A flag's type: a key of views.VIEWS, or None for auto."""
    if text not in AUGMENT:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(AUGMENT)}, not {text}")
    return None if text == "auto" else text


def by_target(text: str) -> float | dict[str, float]:
    """A flag's type: a probability, or target=probability, several of these joined by commas."""
    if not set("=,") & set(text):
        return FRACTION(text)
    pairs = {}
    for word in text.split(","):
        target, _, p = word.partition("=")
        if not re.fullmatch(r"\w+(\.\w+)*=.+", word) or target in pairs:
            expected = "expected one number, or target=number once for each target"
            raise argparse.ArgumentTypeError(f"{expected}, not {text}")
        pairs[target] = FRACTION(p)
    return dict(sorted(pairs.items()))


by_target.__name__ = "float"  # for argparse's "invalid float value"


class OneSetting(argparse.Action):
    """The words after a flag are one setting: a number, or the targets with a number each."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setting, *others = values
        for value in others:
            both = isinstance(setting, dict) and isinstance(value, dict)
            if not both or setting.keys() & value.keys():
                expected = "expected one number, or target=number once for each target"
                raise argparse.ArgumentError(self, f"{expected}; suite.py takes several settings")
            setting = dict(sorted((setting | value).items()))
        setattr(namespace, self.dest, setting)


def shown(value: object) -> str:
    """The value of a flag in one word, as suite.py takes it."""
    if isinstance(value, dict):
        value = [f"{key}={number:g}" for key, number in value.items()]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def amount(text: str) -> int:
    """A flag's type: a whole number, or one like 0.3M or 50K."""
    factor = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 1)
    count = float(text if factor == 1 else text[:-1]) * factor
    if not 0.5 < count < 2**63:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return round(count)


def add_flags(group: Callable[[str], Callable]) -> None:
    """Every flag of a run; group(title) returns what adds a flag under that title."""
    flag = group("data")
    help_of_datasets = "a task's name, or a folder of your own images (default: digits)"
    flag("--dataset", default="digits", help=help_of_datasets)
    flag("--data-dir", type=os.path.abspath, default="data", help="where data lie (default: data)")
    help_of_source = "original, prepared, or auto (originals if available; default)"
    flag("--source", choices=SOURCES, default="auto", help=help_of_source)
    flag("--img-size", type=COUNT, help="side in pixels (default: the model's own)")
    help_of_norms = "mean and std of the inputs (default: imagenet, as in most published numbers)"
    flag("--normalize", choices=NORMS, default="imagenet", help=help_of_norms)
    help_of_augment = "none, crop, flip or auto (none; FGVC and own images: crop; default: auto)"
    flag("--augment", type=augmentation, help=help_of_augment)

    flag = group("your own images")
    help_of_test = "of each class, where there is no test/ and no val/ (default: 0.2)"
    flag("--test-share", type=SHARE, default=0.2, help=help_of_test)
    help_of_val = "of each class's training images, scored with --val (default: 0.2)"
    flag("--val-share", type=SHARE, default=0.2, help=help_of_val)
    flag("--split-seed", type=WHOLE, default=0, help="draws these shares (default: 0)")
    help_of_bad = "leave out what cannot be read (default: stop and name it)"
    flag("--skip-bad-images", action="store_true", help=help_of_bad)

    flag = group("model")
    flag("--model", help="timm name with its tag (default: the paper's ViT-B/16; digits: vit_nano)")
    flag("--checkpoint", type=os.path.abspath, help="local .safetensors, .pth or .npz")
    flag("--no-pretrained", action="store_true", help="start from random weights")

    flag = group("method")
    names = "mlae, lora, rmlora, mor, snell, snella, bitfit, layernorm, linear or full"
    flag("--method", default="mlae", help=f"{names} (default: mlae)")
    help_of_targets = "layers to adapt, by name suffix (default: attn.qkv, the paper's)"
    flag("--targets", nargs="+", metavar="PATH", help=help_of_targets)
    help_of_ranks = "experts per layer (default: 8, 0.30 M parameters on ViT-B; snell, snella: 32)"
    flag("--rank", type=COUNT, help=help_of_ranks)
    help_of_budgets = "take the rank that trains about so many parameters, as in 0.3M"
    flag("--budget", type=amount, metavar="N", help=help_of_budgets)
    help_of_factors = "first lambda; of lora and rmlora alpha / rank (default: 1; rmlora: 4)"
    flag("--coef-init", type=POSITIVE, help=help_of_factors)

    flag = group("masking")
    help_of_p = "masking probability p (default: 0.5, the paper's), or one for each target, as in "
    help_of_p += "attn.qkv=0.5 mlp.fc1=0.3; in suite.py commas join what is one setting"
    one_or_more = {"nargs": "+", "type": by_target, "action": OneSetting}
    flag("--mask-prob", **one_or_more, metavar="P", help=help_of_p)
    help_of_masking = "stochastic, fixed or mixed (default: stochastic, the paper's best)"
    flag("--masking", help=help_of_masking)
    help_of_patterns = "p over depth: random, incremental, decremental, hourglass or protruding"
    flag("--mask-pattern", dest="pattern", help=f"{help_of_patterns} (default: random)")
    help_of_schedules = "p over training: constant, increase, decrease, cosine or off-at-end"
    flag("--mask-schedule", dest="schedule", help=f"{help_of_schedules} (default: constant)")
    help_of_lambda = "lambda stays as it starts, as in lora (default: False, it is learned)"
    flag("--freeze-lambda", action="store_true", default=None, help=help_of_lambda)
    help_of_rates = "learning rate of lambda over that of the rest (default: 1)"
    flag("--lambda-lr", type=POSITIVE, metavar="FACTOR", help=help_of_rates)

    flag = group("rmlora")
    flag("--penalty-weight", type=SIZE, help="weight of the orthogonality penalty (default: 0.1)")
    help_of_active = "ranks of a layer that learn at a step (default: 4; all if there are no more)"
    flag("--active-ranks", type=COUNT, help=help_of_active)
    help_of_variants = "1: the same ranks of A and B learn; 2: drawn apart (default: 2)"
    flag("--variant", type=int, choices=[1, 2], help=help_of_variants)

    flag = group("mor")
    flag("--num-experts", type=COUNT, help="experts that share one LoRA (default: 8)")

    flag = group("snell, snella")
    help_of_sparsity = "share of an update that is dropped; snella: in the end, over all layers"
    flag("--sparsity", type=FRACTION, help=f"{help_of_sparsity} (default: 0.9; snella: 0.8)")
    flag("--start-sparsity", type=FRACTION, help="snella: dropped at the start (default: 0.01)")
    help_of_gates = "code: as the authors run it, paper: as they print it (default: code)"
    flag("--gate", choices=["code", "paper"], help=help_of_gates)

    flag = group("optimisation")
    flag(
        "--epochs",
        type=COUNT,
        help="passes over the images (default: 100, as common; digits 20, own 30)",
    )
    flag("--batch-size", type=COUNT, default=64, help="default: 64, as published; none is dropped")
    flag("--lr", type=POSITIVE, help="AdamW's peak (default: 1e-3, as common; digits: 8e-3)")
    flag("--weight-decay", type=FRACTION, default=1e-4, help="of matrices (default: 1e-4)")
    flag("--warmup-epochs", type=float, help="linear, then cosine to 0 (default: a tenth of all)")
    flag("--drop-path", type=FRACTION, help="stochastic depth (default: 0; often 0.1)")
    flag("--label-smoothing", type=FRACTION, default=0.0, help="default: 0, none")

    flag = group("run")
    flag("--seed", type=WHOLE, default=0, help="random seed (default: 0)")
    flag("--val", action="store_true", help="to choose settings: train on 800, score val200")
    flag("--amp", choices=AMP, default="auto", help="mixed precision (default: bf16 on CUDA)")
    flag("--compile", action="store_true", help="torch.compile (takes longer than the demo)")
    flag("--grad-checkpoint", action="store_true", help="recompute blocks: less memory, more time")
    help_of_parts = "split each batch into N parts (less memory); each draws its own mask"
    flag("--accumulate", type=COUNT, default=1, metavar="N", help=f"{help_of_parts} (default: 1)")
    flag("--device", choices=DEVICES, default="auto", help="default: auto, the fastest here")
    flag("--workers", type=WHOLE, default=4, help="image-decoding processes (0: the main process)")
    help_of_out = "where run folders go (default: runs)"
    flag("--out", type=os.path.normpath, default="runs", help=help_of_out)
    flag("--resume", action="store_true", help="go on after the last whole epoch of this run")
    flag("--overwrite", action="store_true", help="start this run anew, whatever it has left")


def train_parser(manual: str | None = None) -> Parser:
    """The parser of train.py, with its manual at the top of --help."""
    parser = Parser(description=manual, prog="train.py", usage="train.py [flags]")
    add_flags(lambda title: parser.add_argument_group(title).add_argument)
    return parser


def suite_parser(manual: str | None = None) -> Parser:
    """The parser of suite.py: train.py's flags, with several values where that makes sense."""
    parser = Parser(description=manual, prog="suite.py", usage="suite.py [flags]")

    def group(title: str) -> Callable:
        add = parser.add_argument_group(title).add_argument

        def flag(name: str, **options) -> None:
            if name == "--resume":  # a suite always goes on
                return
            if name[2:].replace("-", "_") in PLACE or options.get("action") == "store_true":
                add(name, **options)
            elif "nargs" not in options:
                add(name, nargs="+", **options)
            else:  # several words already: commas inside a value
                options = {"type": lambda text: text.split(",")} | options
                add(name, **options | {"action": "store"})

        return flag

    add_flags(group)
    flag = parser.add_argument_group("choosing").add_argument
    flag(
        "--choose", nargs="+", metavar="FLAG", help="choose these on val200 (--table: were chosen)"
    )
    help_of_seeds = "seeds of the search on val200 (default: 0)"
    flag("--search-seed", nargs="+", type=WHOLE, default=[0], metavar="SEED", help=help_of_seeds)
    flag = parser.add_argument_group("table").add_argument
    flag("--table", metavar="FOLDER", type=Path, help="print the runs in a folder, run nothing")
    help_of_pairs = "in that table the paired difference to this, as in: lora, or mask-prob=0"
    flag("--against", metavar="WORDS", help=help_of_pairs)
    flag(
        "--format",
        choices=TABLE_FORMATS,
        default="markdown",
        help="of the table (default: markdown)",
    )
    return parser


def data_parser() -> Parser:
    """The parser of data.py."""
    parser = Parser(
        prog="data.py",
        usage="data.py [flags]",
        description="The table of tasks: classes, training, validation and test images, what "
        "agrees with our official split,\nand what is there, proven. Downloads and trains nothing.",
    )
    flag = parser.add_argument
    flag("--data-dir", default="data", help="the folder of all data sets (default: data)")
    help_of_tasks = "tasks, vtab, fgvc (default: both)"
    flag("--dataset", nargs="+", default=["vtab", "fgvc"], help=help_of_tasks)
    return parser


def experts(text: str) -> int | float:
    """A flag's type: a number of experts, or a share of all between 0 and 1."""
    value = float(text)
    if text.isdecimal() and value >= 1:
        return int(text)
    if not 0 < value < 1:
        expected = "a whole number from 1, or a share between 0 and 1"
        raise argparse.ArgumentTypeError(f"must be {expected}, not {text}")
    return value


def parse_eval(manual: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of eval.py; exit code 2 for those that do not go together."""
    parser = Parser(description=manual, prog="eval.py")
    flag = parser.add_argument
    flag("run", type=Path, help="a run's folder")
    flag("--data-dir", help="where the data are now (default: where they were in training)")
    flag("--checkpoint", help="where the backbone's file is now (default: where it was)")
    flag("--download", action="store_true", help="fetch data and weights that are not here")
    flag("--device", choices=DEVICES, default="auto", help="default: auto, the fastest here")
    flag("--workers", type=WHOLE, default=4, help="image-decoding processes (0: the main process)")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--predict", type=Path, metavar="IMAGE|FOLDER", help="classes of images of your own")
    help_of_formats = "write the model for other programs: timm, onnx, torch or peft"
    one("--export", nargs=2, metavar=("FORMAT", "PATH"), help=help_of_formats)
    help_of_pruning = "keep K experts a layer, or a share of all; several: only print the table"
    one("--prune", nargs="+", type=experts, metavar="K", help=help_of_pruning)
    flag("--predictions", type=Path, metavar="FILE.csv", help="class and probability per image")
    flag("--features", type=Path, metavar="FILE.npz", help="what the head is given, per image")
    flag("--top-k", type=COUNT, metavar="N", help="classes per image of --predict (default: 5)")
    flag("--out", type=Path, metavar="FOLDER", help="of --prune (default: RUN-pruneK)")
    args = parser.parse_args(argv)
    if args.top_k and not args.predict:
        parser.error("--top-k goes with --predict")
    if args.out and len(args.prune or []) != 1:
        parser.error("--out goes with --prune and one K")
    if (args.export or args.prune) and (args.predictions or args.features):
        parser.error("--predictions and --features go with scoring or --predict, not with these")
    return args
