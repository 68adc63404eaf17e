"""How fast, in how much memory, against whom. Every method takes its turn in every round, so that noise hits all alike.

    python bench.py --model vit_tiny_patch16_224 --batch-size 16                     # 20 rounds on this machine
    python bench.py --targets attn.qkv attn.proj mlp.fc1 mlp.fc2 --rank 16 --amp bf16
    python bench.py --methods mlae mlae+compile mlae+bf16 mlae+grad-checkpoint       # what an option costs or saves
    python bench.py --sweep rank 1 8 64 --methods floor mlae peft --plot rank.png    # cost as the work grows

A step is train.py's: pick a batch of uint8 images, normalise, forward, backward, AdamW. The methods:

    floor       the frozen backbone with its head and the first block's norm1.bias trained: the forward and the gradient
                with respect to activations through every block (the first one's too, which adapters of qkv can skip)
    mlae        MLAELinear, folded into one product
    two-branch  the same experts and masks beside the frozen layer
    peft        LoRA of Hugging Face PEFT
    loralib     LoRA of microsoft/LoRA
    full        full fine-tuning

Weights are random; they do not change the time. Times are medians over rounds; ratios are medians of the ratios within
a round, with their quartiles. Memory is the peak of a process of its own: allocated on CUDA, else resident, the
libraries of all methods included. GFLOP counts products, recomputed ones too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model as models
from eval import (
    AMP,
    COUNT,
    FRACTION,
    WHOLE,
    Parser,
    autocast,
    peak_memory_mb,
    pick_device,
    resolve_amp,
)

PEERS = ("peft", "loralib")
METHODS = ("floor", "mlae", "two-branch", "peft", "loralib", "full")
EVALUATIONS = ("plain", "mlae", "merged")
OTHERS = ("floor", "mlae", "peft", "eval plain")  # what ratios are over
OPTIONS = {  # method+option is one more method, so that it takes its turn too
    "compile": {"compile": True},
    "bf16": {"amp": "bf16"},
    "fp16": {"amp": "fp16"},
    "grad-checkpoint": {"grad_checkpoint": True},
    "accumulate4": {"accumulate": 4},
}
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
}  # dense bf16 or fp16, as NVIDIA states


class TwoBranch(nn.Module):
    """MLAE as its equation has it: the frozen layer and the experts beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer  # an MLAELinear: its parameters and its masks

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        h = F.linear(x, layer.lora_A)  # (..., r)
        return F.linear(x, layer.weight, layer.bias) + F.linear(
            h * layer.coefficients(), layer._full_B()
        )


def build(method: str, args: argparse.Namespace) -> nn.Module:
    """The model of one method on the CPU, with what it trains marked so; ModelError where there is no such model."""
    create = {
        "name": args.model,
        "num_classes": 100,
        "pretrained": False,
        "img_size": args.img_size,
    }
    create |= {"rank": args.rank, "targets": args.targets, "mask_prob": args.mask_prob}
    if method in ("mlae", "merged", "two-branch"):
        net = models.create(**create, method="mlae")
        for name, layer in models.experts(net).items() if method == "two-branch" else ():
            net.set_submodule(name, TwoBranch(layer))
        return models.merge(net) if method == "merged" else net
    net = models.create(**create, method="full" if method == "full" else "linear")
    if method == "floor":
        first = dict(net.named_parameters()).get("blocks.0.norm1.bias")
        if first is None:
            raise models.ModelError(
                f"--methods floor: {args.model} has no blocks.0.norm1.bias to train"
            )
        first.requires_grad_(True)
    elif method in PEERS:
        layers = models.find_layers(net, args.targets)
        if any(rows is not None for rows in layers.values()):
            raise models.ModelError(
                f"--methods {method}: it adapts whole layers, so --targets attn.qkv"
            )
        if method == "peft":
            import peft

            config = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(layers))
            head = [p for p in net.parameters() if p.requires_grad]
            net = peft.get_peft_model(net, config)
            for parameter in head:
                parameter.requires_grad_(True)
        else:
            import loralib

            for name in layers:
                old = net.get_submodule(name)
                lora = loralib.Linear(
                    old.in_features, old.out_features, args.rank, args.rank, merge_weights=False
                )
                lora.weight, lora.bias = old.weight, old.bias
                net.set_submodule(name, lora)
    return net


def settings(method: str, args: argparse.Namespace) -> tuple[str, argparse.Namespace]:
    """The base method, and the arguments with a method's own options: for mlae+bf16 those with --amp bf16."""
    method, *options = method.split("+")
    args = argparse.Namespace(**vars(args))
    for option in options:
        vars(args).update(OPTIONS[option])
    return method, args


def stepper(
    method: str, args: argparse.Namespace, device: torch.device, images: Tensor
) -> Callable[[], None]:
    """One training step of a method as train.py makes it, or for "eval <method>" the scoring of one batch."""
    method, args = settings(method, args)
    scoring = method.startswith("eval ")
    net = build(method.removeprefix("eval "), args).to(device).train(not scoring)
    if args.grad_checkpoint:
        models.recompute_blocks(net)
    if args.compile:
        net.compile(
            dynamic=True
        )  # as train.py's torch.compile, but at ease with the counter's hooks
    normalize, precision = (
        data.normalizer(*data.NORMALIZE["imagenet"], device),
        resolve_amp(args.amp, device),
    )
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = None if scoring else torch.optim.AdamW(trained, lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step() -> None:
        batch = torch.randint(0, len(images), (args.batch_size,), device=device)
        if scoring:
            with torch.inference_mode(), autocast(device, precision):
                net(normalize(images[batch]))
            return
        optimizer.zero_grad()
        for part in batch.chunk(args.accumulate):
            with autocast(device, precision):
                logits = net(normalize(images[part]))  # (B, classes)
            scaler.scale(
                F.cross_entropy(logits.float(), part % 100) * len(part) / len(batch)
            ).backward()
        if args.grad_checkpoint and any(p.grad is None for p in trained):
            raise models.ModelError(
                "--grad-checkpoint: this timm loses gradients; pip install -U timm"
            )
        scaler.step(optimizer)
        scaler.update()

    return step


def made_up(args: argparse.Namespace, device: torch.device) -> Tensor:
    """Training images (N, 3, S, S) uint8 on the device."""
    return torch.randint(
        0, 256, (args.images, 3, args.img_size, args.img_size), dtype=torch.uint8
    ).to(device)


def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """One row a method: median seconds, images/s, ratios to OTHERS (quartiles), memory, GFLOP, MFU."""
    torch.compiler.reset()  # else the compiled models of an earlier point count towards the limit
    torch._dynamo.config.cache_size_limit = (
        64  # above it the methods, one code for all, would run without compilation
    )
    images = made_up(args, device)
    steps = {name: stepper(name, args, device, images) for name in args.methods}
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        device.type, lambda: None
    )
    flops, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops()
        for _ in range(args.warmup):
            step()
    for _ in tqdm(range(args.rounds), "rounds", disable=None):
        for name in random.sample(list(steps), len(steps)):
            synchronize()
            start = time.perf_counter()
            for _ in range(args.steps):
                steps[name]()
            synchronize()
            times[name].append((time.perf_counter() - start) / args.steps)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    rows = []
    for name, seconds in times.items():
        row = {"method": name, "seconds": statistics.median(seconds)}
        row["images_per_s"] = args.batch_size / row["seconds"]
        for other in OTHERS:
            if other in times and name.startswith("eval") == other.startswith("eval"):
                ratios = [a / b for a, b in zip(seconds, times[other], strict=True)]
                inner = (
                    statistics.quantiles(ratios, n=4, method="inclusive")
                    if len(ratios) > 1
                    else ratios * 3
                )
                row[f"over {other}"] = inner
        row |= {"memory_mb": args.peaks.get(name), "gflops": flops[name] / 1e9, "mfu": None}
        own = settings(name, args)[1]
        if (
            peak and resolve_amp(own.amp, device) != "off" and not own.grad_checkpoint
        ):  # recomputing is no use
            row["mfu"] = flops[name] / row["seconds"] / (peak * 1e12)
        rows.append(row)
    return rows


def memory(method: str, args: argparse.Namespace) -> int | None:
    """Peak MiB of a process that makes three steps of one method and nothing else; None, saying why, if it fails."""
    given = json.dumps(vars(args) | {"method": method})
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", given], capture_output=True, text=True
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    print(f"{method}: no memory measured: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return None


def memory_of(text: str) -> None:
    """What `memory` starts: prints the peak as JSON."""
    for name in PEERS:  # in every process, else theirs would be larger by their libraries
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    args = argparse.Namespace(**json.loads(text))
    device = pick_device(args.device)
    step = stepper(args.method, args, device, made_up(args, device))
    for _ in range(3):
        step()
    print(json.dumps(peak_memory_mb(device)))


def show(rows: list[dict]) -> None:
    """The table of one measurement."""
    others = [other for other in OTHERS if any(f"over {other}" in row for row in rows)]
    head = [
        "method",
        "ms/step",
        "images/s",
        *(f"over {other}" for other in others),
        "memory MiB",
        "GFLOP",
        "MFU %",
    ]
    lines = [head]
    for row in rows:
        line = [row["method"], f"{1e3 * row['seconds']:.1f}", f"{row['images_per_s']:.1f}"]
        for other in others:
            quartiles = row.get(f"over {other}")
            line.append("{1:.3f} ({0:.3f}-{2:.3f})".format(*quartiles) if quartiles else "-")
        mfu = f"{100 * row['mfu']:.1f}" if row["mfu"] else "-"
        lines.append([*line, str(row["memory_mb"] or "-"), f"{row['gflops']:.0f}", mfu])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def plot(sweeps: list[tuple[str, list[tuple]]], path: str) -> None:
    """A column of plots for each sweep: time of a step (over the floor's, if that was measured) and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(sweeps), figsize=(3.2 * len(sweeps), 5.5), squeeze=False, layout="constrained"
    )
    for (name, results), (upper, lower) in zip(sweeps, axes.T, strict=True):
        results = [
            (value, [row for row in rows if not row["method"].startswith("eval ")])
            for value, rows in results
        ]
        floor = all("over floor" in row for _, rows in results for row in rows)
        labels = [value.replace(",", "\n").replace("_", "\n") for value, _ in results]
        for method in dict.fromkeys(row["method"] for _, rows in results for row in rows):
            line = [next(row for row in rows if row["method"] == method) for _, rows in results]
            upper.plot(
                labels,
                [row["over floor"][1] if floor else row["seconds"] for row in line],
                "o-",
                label=method,
            )
            lower.plot(labels, [row["memory_mb"] or 0 for row in line], "o-")
        upper.set(ylabel="time over floor" if floor else "seconds a step")
        upper.sharey(axes[0, 0])
        lower.set(xlabel=f"--{name}", ylabel="peak memory, MiB", ylim=(0, None))
        for axis in (upper, lower):
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    if sys.argv[1:2] == ["--memory-of"]:
        return memory_of(sys.argv[2])
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    choices = [*METHODS, *(f"eval {name}" for name in EVALUATIONS)]
    flag(
        "--model", default="vit_tiny_patch16_224", help="timm name (default: vit_tiny_patch16_224)"
    )
    flag("--img-size", type=COUNT, help="side in pixels (default: the model's own)")
    flag("--batch-size", type=COUNT, default=16, help="default: 16, what two CPU cores bear")
    flag(
        "--targets",
        nargs="+",
        default=["attn.qkv"],
        metavar="PATH",
        help="adapted layers (default: attn.qkv)",
    )
    flag("--rank", type=COUNT, default=8, help="default: 8")
    flag("--mask-prob", type=FRACTION, default=0.5, help="default: 0.5")
    flag("--amp", choices=AMP, default="auto", help="as in train.py (default: auto)")
    flag("--compile", action="store_true", help="torch.compile every method")
    flag("--grad-checkpoint", action="store_true", help="recompute each block in the backward pass")
    flag("--accumulate", type=COUNT, default=1, help="split a batch into parts (default: 1)")
    flag(
        "--images",
        type=COUNT,
        default=1000,
        help="training images held in memory (default: 1000, as VTAB-1k)",
    )
    flag(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(choices)}; with +{', +'.join(OPTIONS)} if wanted",
    )
    flag(
        "--rounds",
        type=COUNT,
        default=20,
        help="rounds in which every method takes its turn (default: 20)",
    )
    flag("--steps", type=COUNT, help="steps a turn (default: 1, on CUDA 10)")
    flag("--warmup", type=WHOLE, default=2, help="steps before the rounds (default: 2)")
    flag(
        "--no-memory",
        action="store_true",
        help="leave out the memory, which takes a process a method",
    )
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    flag(
        "--sweep",
        nargs="+",
        action="append",
        metavar=("FLAG", "VALUE"),
        help="of a flag, as in: rank 1 8 64",
    )
    flag("--plot", help="draw the sweeps, of which there may be several, into this file")
    args = parser.parse_args()
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    for method in args.methods or ():
        name, *options = method.split("+")
        if name not in choices or not set(options) <= set(OPTIONS):
            parser.error(
                f"--methods {method!r}: there are {', '.join(choices)}, each with +{', +'.join(OPTIONS)}"
            )
        if name in missing:
            parser.error(f"--methods {name}: pip install {name}")
        if name.startswith("eval ") and {"accumulate4", "grad-checkpoint"} & set(options):
            parser.error(f"--methods {method!r}: scoring has no backward pass")
    if missing and not args.methods:
        print(f"not installed, so left out: {', '.join(missing)}")
    args.methods = args.methods or [name for name in choices if name not in missing]
    if args.plot:
        if not args.sweep:
            parser.error("--plot draws a --sweep: name a flag and its values")
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot: pip install matplotlib")
        if (
            Path(args.plot).suffix not in (".png", ".pdf", ".svg")
            or not Path(args.plot).absolute().parent.is_dir()
        ):
            parser.error(
                f"--plot {args.plot}: expected a .png, .pdf or .svg file in a folder that exists"
            )
    sweeps = []  # (flag, [(value, its arguments; once measured, its rows)])
    try:
        device = pick_device(args.device)
        for name, *values in args.sweep or [["rounds", str(args.rounds)]]:
            name = name.lstrip("-").replace("_", "-")
            if not values or name in ("methods", "device", "sweep", "plot"):
                parser.error(
                    f"--sweep {name}: expected a flag of this script that changes a step, and its values"
                )
            points = [
                parser.parse_args([*sys.argv[1:], f"--{name}", *value.split(",")])
                for value in values
            ]
            sweeps.append((name, list(zip(values, points, strict=True))))
        for (
            _,
            points,
        ) in sweeps:  # memory first: a child's peak is never below what its parent's was
            for _, point in points:
                point.methods, point.img_size = (
                    args.methods,
                    point.img_size or models.input_size(point.model),
                )
                point.steps = point.steps or (10 if device.type == "cuda" else 1)
                point.peaks = {} if args.no_memory else {m: memory(m, point) for m in args.methods}
        for name, points in sweeps:
            for i, (value, point) in enumerate(points):
                if args.sweep:
                    print(f"\n--{name} {value}", flush=True)
                points[i] = value, measure(point, device)
                show(points[i][1])
    except (data.DataError, models.ModelError, ValueError, torch.OutOfMemoryError) as error:
        parser.error(str(error).splitlines()[0])
    machine = {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{device}, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "amp": resolve_amp(args.amp, device),
        "versions": {
            name: version(name)
            for name in ("torch", "timm", *PEERS)
            if importlib.util.find_spec(name)
        },
    }
    print(json.dumps({"arguments": vars(args), "machine": machine, "sweeps": sweeps}))
    if args.plot:
        plot(sweeps, args.plot)


if __name__ == "__main__":
    main()
