"""Score a finished run again, from its own files, or put all finished runs into one table.

    python eval.py runs/digits/mlae-vit_nano-seed0-...      # as it was trained, and merged into a plain timm model
    python eval.py runs --format markdown                   # every task and seed, both means, the published rows

Of one run it rebuilds the model of `config.json` with the weights of `adapter.safetensors`, scores it on the run's
images (the test set; val200 after `--val`) and says whether the merged model agrees. Exit code 0 if it does, 1 if not.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import logging
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import model as models

try:
    import resource
except ImportError:  # Windows
    resource = None

AMP = ["auto", "bf16", "fp16", "off"]


class Parser(argparse.ArgumentParser):
    """Reports a wrong command in one line on stderr, with exit code 2."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        logging.getLogger("huggingface_hub").setLevel(
            logging.ERROR
        )  # a missing network: no line for every retry

    def error(self, message: str) -> None:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def number(kind: type, low: float, high: float, what: str):
    """A flag's type: an int or float in [low, high)."""

    def parse(text: str):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"must be {what}, not {text}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


COUNT, WHOLE = number(int, 1, 2**31, "1 or more"), number(int, 0, 2**31, f"from 0 to {2**31 - 1}")
FRACTION, POSITIVE = (
    number(float, 0, 1, "in [0, 1)"),
    number(float, math.ulp(0.0), math.inf, "above 0"),
)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else Apple's MPS, else the CPU. ModelError for one that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise models.ModelError(f"--device {name}: there is none here; use --device auto or cpu")
    return torch.device(name)


def provenance(model: nn.Module, checkpoint: str | None, pretrained: bool) -> dict[str, str]:
    """Which pre-trained weights a model has: timm's full tag, or the local file's name and its sha256."""
    if models.architecture(model) == "vit_nano" and pretrained:
        checkpoint = checkpoint or models.NANO_FILE
    if checkpoint:
        return {
            "tag": f"{models.architecture(model)}:{Path(checkpoint).name}",
            "sha256": sha256(checkpoint),
        }
    tag = model.pretrained_cfg.get("tag") if pretrained else "random"
    return {"tag": f"{models.architecture(model)}.{tag}" if tag else models.architecture(model)}


def git_hash() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a clone


def sha256(path: str | Path) -> str:
    """Hex digest of a checkpoint file; ModelError if there is none."""
    if not Path(path).is_file():
        raise models.ModelError(f"no checkpoint file {path}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def resolve_amp(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a CUDA device that computes in it, else off."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return name if name != "auto" else "bf16" if native else "off"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision: products in bf16 or fp16, the rest in float32; "off" is float32 throughout."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "off")


def peak_memory_mb(device: torch.device) -> int | None:
    """Highest memory use in MiB: allocated on a CUDA device, else of the whole process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, KiB on Linux


def predict(
    model: nn.Module,
    images: data.Images,
    normalize: Callable[[Tensor], Tensor],
    amp: str = "off",
    workers: int = 4,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in float32 and labels (N,), on the CPU, in eval mode; every module's mode is restored."""
    device = next(model.parameters()).device
    logits, labels = [], []
    with models.eval_mode(model), torch.inference_mode(), autocast(device, amp):
        for batch, batch_labels in images.batches(256, workers):
            logits.append(model(normalize(batch)).float())  # (B, classes)
            labels.append(batch_labels)
    return torch.cat(logits).cpu(), torch.cat(labels)


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 accuracy in percent and mean cross-entropy in nats."""
    correct = (logits.argmax(1) == labels).sum().item()
    return {
        "top1": round(100 * correct / len(labels), 2),
        "loss": round(F.cross_entropy(logits, labels).item(), 6),
    }


def evaluate(
    model: nn.Module, images: data.Images, normalize: Callable, **kwargs
) -> dict[str, float]:
    """`score` of `predict`."""
    return score(*predict(model, images, normalize, **kwargs))


# ViT-B/16 pre-trained on ImageNet-21k: mean of VTAB-1k's groups, mean of its tasks, mean of FGVC's, and how
PUBLISHED = [
    (
        "MLAE (Wang et al. 2024)",
        78.8,
        None,
        90.9,
        "settings searched per task; on what, epoch and seeds not published",
    ),
    ("LoRA, r = 8 (from NOAH)", 74.60, 72.25, None, "best epoch on the test set"),
    (
        "GLoRA",
        77.97,
        75.77,
        None,
        "500 epochs and a search per task; on test or on val200, its code has both",
    ),
    ("PACE", 79.01, 76.93, 91.5, "settings searched per task on val200, 300 epochs, 3 seeds"),
    (
        "full fine-tuning (from VPT)",
        68.96,
        65.57,
        88.54,
        "lr and weight decay searched per task on val200, 100 epochs",
    ),
]
PROTOCOL = "here: the last epoch's weights, scored once; mean ± standard deviation over seeds (their number)"
NOT_SETTINGS = {"dataset", "seed", "seeds", "val", "data_dir", "source", "checkpoint"}
NOT_SETTINGS |= {"device", "workers", "out", "resume"}


def finished(metrics_file: Path) -> dict | None:
    """The result of a finished run; None if there is none that can be read."""
    try:
        metrics = json.loads(metrics_file.read_text())
        return metrics if {"benchmark", "data"} <= set(metrics) else None
    except (OSError, ValueError, TypeError):
        return None


def collect(*folders: str | os.PathLike) -> list[dict]:
    """The finished runs in folders, oldest first: {"arguments": ..., "metrics": ...}; damaged ones are named and left
    out."""
    runs, files = [], [path for folder in folders for path in Path(folder).rglob("metrics.json")]
    for file in sorted(files, key=lambda path: path.stat().st_mtime):
        try:
            config, metrics = (
                json.loads(f.read_text()) for f in (file.with_name("config.json"), file)
            )
            arguments = config["arguments"]
            top1 = float(metrics["val_top1" if arguments["val"] else "test_top1"])
            task = data.TASKS[metrics["dataset"]]
            if (
                not {"benchmark", "seed", "data", "model"} <= set(metrics)
                or "method" not in arguments
            ):
                raise ValueError("it lacks what a result holds")
            runs.append({"arguments": arguments, "metrics": metrics, "task": task, "top1": top1})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(
                f"{file.parent} is damaged and left out: remove it or run it again ({error})",
                file=sys.stderr,
            )
    return runs


def records(runs: list[dict]) -> list[dict]:
    """One row for each task and configuration, and for each mean of tasks: top-1 in percent over the seeds.

    Runs are of one configuration if their arguments are the same but for task, seed and machine; of two runs of one
    seed the later counts. A mean is over tasks whose data are the benchmark's own; `of` says how many it should have.
    """
    tables: dict[tuple, dict] = {}
    for run in runs:
        metrics, arguments = run["metrics"], run["arguments"]
        settings = {key: value for key, value in arguments.items() if key not in NOT_SETTINGS}
        settings["model"] = metrics["model"]  # with its weights
        split = "val" if arguments["val"] else "test"
        place = (run["task"].benchmark, split, json.dumps(settings, sort_keys=True))
        tables.setdefault(place, {}).setdefault(run["task"].name, {})[metrics["seed"]] = metrics
    rows = []
    for (benchmark, split, settings), found in tables.items():
        rivals = [
            json.loads(other) for name, part, other in tables if (name, part) == (benchmark, split)
        ]
        ours = json.loads(settings)
        told = [
            key
            for key in ours
            if key != "method" and any(other.get(key) != ours[key] for other in rivals)
        ]
        label = " ".join([ours["method"], *(f"{key}={ours[key]}" for key in told)])
        same = {"benchmark": benchmark, "split": split, "configuration": label}
        tasks = [task for task in data.TASKS.values() if task.benchmark == benchmark]
        official = {}
        for task in tasks:
            runs_of = found.get(task.name, {})
            scores = {seed: metrics[f"{split}_top1"] for seed, metrics in runs_of.items()}
            about = sorted({metrics["data"] for metrics in runs_of.values()})
            whole = bool(scores) and all(
                metrics["benchmark"] == benchmark for metrics in runs_of.values()
            )
            if whole:
                official[task.name] = scores
            if scores or benchmark in ("vtab-1k", "fgvc"):
                row = {
                    "group": task.group,
                    "task": task.name,
                    "official": whole,
                    "data": "; ".join(about),
                }
                rows.append(
                    same | row | _over_seeds([scores]) | {"tasks": len(scores) and 1, "of": 1}
                )
        if benchmark in ("vtab-1k", "fgvc"):
            groups = {
                group: [t.name for t in tasks if t.group == group]
                for group in dict.fromkeys(t.group for t in tasks)
            }
            means = (
                {group: [names] for group, names in groups.items()}
                if benchmark == "vtab-1k"
                else {}
            )
            means |= {"mean of groups": list(groups.values())} if benchmark == "vtab-1k" else {}
            for name, parts in (means | {"mean of tasks": [[task.name for task in tasks]]}).items():
                there = [[official[task] for task in part if task in official] for part in parts]
                count, of = sum(map(len, there)), sum(map(len, parts))
                alike = len({tuple(sorted(scores)) for group in there for scores in group}) == 1
                row = {"group": "mean", "task": name, "official": count == of and alike, "data": ""}
                row |= _over_seeds(*there) if all(there) else _over_seeds([{}])
                rows.append(same | row | {"tasks": count, "of": of})
    return rows


def _over_seeds(*groups: list[dict[int, float]]) -> dict:
    """Mean over groups of the mean over tasks: its mean and sample standard deviation over seeds, if all tasks have the
    same; else the mean of the tasks' means, without a deviation."""
    tasks = [scores for group in groups for scores in group]
    seeds = sorted(tasks[0])
    if not all(tasks):
        return {"top1": None, "std": None, "seeds": 0}
    if any(sorted(scores) != seeds for scores in tasks):
        groups, seeds = (
            [[{0: statistics.mean(scores.values())} for scores in group] for group in groups],
            [0],
        )
    values = [
        statistics.mean(statistics.mean(scores[seed] for scores in group) for group in groups)
        for seed in seeds
    ]
    std = round(statistics.stdev(values), 2) if len(values) > 1 else None
    return {"top1": round(statistics.mean(values), 2), "std": std, "seeds": min(map(len, tasks))}


def tabulate(runs: list[dict], form: str = "markdown") -> str:
    """The table of `runs` as markdown, csv, json or latex, with the published rows and how they were obtained."""
    rows = records(runs)
    published = [
        dict(zip(("method", "groups", "tasks", "fgvc", "protocol"), row, strict=True))
        for row in PUBLISHED
    ]
    if form == "json":
        return json.dumps({"runs": rows, "published": published}, indent=1)
    if form == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for row in published:
            for benchmark, task, key in (
                ("vtab-1k", "mean of groups", "groups"),
                ("vtab-1k", "mean of tasks", "tasks"),
                ("fgvc", "mean of tasks", "fgvc"),
            ):
                if row[key]:
                    name = f"published: {row['method']}"
                    same = {
                        "benchmark": benchmark,
                        "split": "test",
                        "configuration": name,
                        "group": "mean",
                    }
                    writer.writerow(
                        same | {"task": task, "top1": row[key], "data": row["protocol"]}
                    )
        return file.getvalue().rstrip()
    draw, parts = {"markdown": _markdown, "latex": _latex}[form], []
    for benchmark, split in dict.fromkeys((row["benchmark"], row["split"]) for row in rows):
        here = [row for row in rows if (row["benchmark"], row["split"]) == (benchmark, split)]
        names = list(dict.fromkeys(row["configuration"] for row in here))
        lines = [[f"{benchmark}, {split} top-1 (%)", *names, "data"]]
        for task in dict.fromkeys(row["task"] for row in here):
            cells = [row for row in here if row["task"] == task]
            shown = {row["configuration"]: _cell(row) for row in cells}
            about = "; ".join(dict.fromkeys(row["data"] for row in cells if row["data"]))
            lines.append([task, *(shown.get(name, "-") for name in names), about])
        for row in here:
            if row["task"] == "mean of tasks" and not row["official"]:
                there = f"{row['tasks']} of {row['of']} tasks with official data"
                there += ", of unequal seeds" if row["tasks"] == row["of"] else ""
                parts.append(f"PARTIAL, no {benchmark} result: {row['configuration']} has {there}.")
        parts.append(draw(lines))
        if any("*" in cell for line in lines for cell in line):
            parts.append(
                f"* not a result on {benchmark}: the data are a subset or not the official ones; in no mean."
            )
    parts.append(PROTOCOL)
    if not any(row["benchmark"] in ("vtab-1k", "fgvc") for row in rows):
        return "\n\n".join(parts)
    lines = [["published, ViT-B/16 IN-21k", "vtab-1k groups", "vtab-1k tasks", "fgvc", "protocol"]]
    lines += [[str(value) if value else "-" for value in row.values()] for row in published]
    return "\n\n".join([*parts, draw(lines)])


def summarize(results: list[dict], name: str) -> dict:
    """One line for several runs of the task or suite `name`: what they share, lists of the rest, top-1 over seeds.

    For a suite top-1 is the mean over VTAB-1k's groups or over FGVC's sets, and null while it is partial.
    """
    top1 = next(key for key in results[0] if key.endswith("_top1"))
    rows = {row["task"]: row for row in records(collect(*(result["run"] for result in results)))}
    row = rows[{"vtab": "mean of groups", "fgvc": "mean of tasks"}.get(name, name)]
    seeds = sorted({result["seed"] for result in results})
    whole = row["seeds"] == len(seeds) and (row["official"] or name not in data.SUITES)
    summary = {
        key: value for key, value in results[0].items() if all(r.get(key) == value for r in results)
    }
    lists = {
        key: [result[key] for result in results]
        for key in ("trainable_parameters", "head_parameters", "run")
    }
    return (
        {key: values for key, values in lists.items() if key not in summary}
        | summary
        | {
            "dataset": name,
            "seed": seeds,
            top1: row["top1"] if whole else None,
            f"{top1}_std": row["std"] if whole else None,
            "train_seconds": round(sum(result["train_seconds"] for result in results), 1),
            "peak_memory_mb": max(result["peak_memory_mb"] or 0 for result in results),
        }
    )


def _cell(row: dict) -> str:
    if row["top1"] is None:
        return "-"
    text = (
        f"{row['top1']:.2f}"
        + (f" ± {row['std']:.2f}" if row["std"] is not None else "")
        + f" ({row['seeds']})"
    )
    if row["group"] == "mean":
        return text if row["official"] else f"{text} [{row['tasks']} of {row['of']} tasks]"
    return text if row["official"] else f"{text} *"


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def _latex(lines: list[list[str]]) -> str:
    escapes = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "±": r"$\pm$", "#": r"\#"})
    text = [" & ".join(cell.translate(escapes) for cell in line) + r" \\" for line in lines]
    head = rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 2)}l}}"
    return "\n".join([head, r"\hline", text[0], r"\hline", *text[1:], r"\hline", r"\end{tabular}"])


def main() -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", type=Path, help="a run's folder, or one that holds runs, for the table"
    )
    parser.add_argument(
        "--format",
        choices=["markdown", "csv", "json", "latex"],
        default="markdown",
        help="of the table",
    )
    parser.add_argument(
        "--data-dir", help="where the data are now (default: where they were in training)"
    )
    parser.add_argument(
        "--checkpoint", help="where the backbone's file is now (default: where it was in training)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="default: the fastest",
    )
    parser.add_argument(
        "--workers",
        type=WHOLE,
        default=4,
        help="processes that decode images (default: 4; 0: none)",
    )
    args = parser.parse_args()
    try:
        if args.run.is_dir() and not (args.run / "config.json").exists():
            runs = collect(args.run)
            if not runs:
                raise models.ModelError(f"there is no finished run in {args.run}")
            print(tabulate(runs, args.format))
            return
        agree = check(args)
    except (data.DataError, models.ModelError) as error:
        parser.error(str(error))
    sys.exit(0 if agree else 1)


def check(args: argparse.Namespace) -> bool:
    """Print the scores of a run unmerged and merged; whether the two agree."""
    try:
        config = json.loads((args.run / "config.json").read_text())
        arguments, weights = config["arguments"], config["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise models.ModelError(f"{args.run} is not a run of train.py: {error}") from None
    device = pick_device(args.device)
    if args.data_dir:
        config["load"]["root"] = args.data_dir
    if args.checkpoint:
        config["create"]["checkpoint"] = args.checkpoint
    _, images = data.load(**config["load"])
    model = models.create(**config["create"])
    there = provenance(model, config["create"]["checkpoint"], config["create"]["pretrained"])
    key = "sha256" if "sha256" in weights else "tag"  # a file may have another name now
    if there.get(key) != weights[key]:
        raise models.ModelError(
            f"{args.run} was trained on {weights['tag']}, not on {there['tag']} ({key} differs)"
        )
    models.load_adapter(model, args.run / "adapter.safetensors")
    model.to(device)
    normalize = data.normalizer(config["mean"], config["std"], device)

    counts, method, dataset = (
        models.count_parameters(model),
        arguments["method"],
        arguments["dataset"],
    )
    print(f"{method} on {dataset}, {weights['tag']}, seed {arguments['seed']}: {images.about}")
    print(
        f"parameters: {counts['trainable_parameters']:,} trained, of them {counts['head_parameters']:,} in the head"
    )
    if (args.run / "metrics.json").exists():
        metrics, split = (
            json.loads((args.run / "metrics.json").read_text()),
            "val" if arguments["val"] else "test",
        )
        print(
            f"reported  top-1 {metrics[f'{split}_top1']:.2f} %   loss {metrics[f'{split}_loss']:.6f}"
        )
    logits = []
    for name, net in (("unmerged", model), ("merged", models.merge(model))):
        output, labels = predict(net, images, normalize, config["amp"], args.workers)
        scores = score(output, labels)
        print(f"{name:9} top-1 {scores['top1']:.2f} %   loss {scores['loss']:.6f}")
        logits.append(output)
    difference = (logits[0] - logits[1]).abs().max().item()
    agree = difference <= 1e-4
    print(
        f"largest difference of a logit {difference:.1e}: {'they agree' if agree else 'they do not agree'}"
    )
    return agree


if __name__ == "__main__":
    main()
