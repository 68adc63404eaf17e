"""How fast, in how much memory, against whom: every method takes its turn in every round.

    python bench.py --model vit_tiny_patch16_224 --batch-size 16            # 20 rounds here
    python bench.py --methods mlae mlae+compile mlae+bf16                   # what an option costs

A step is train.py's, on uint8 images that are on the device. Beside train.py's methods: floor (the
frozen backbone, head and blocks.0.norm1.bias trained: the forward and the gradient of activations
through every block), two-branch (MLAE not folded), peft and loralib (their LoRA), and scoring with
eval plain (timm's model), eval mlae, eval merged. Ratios are medians within a round, with
quartiles; memory is a process's own peak (CUDA: allocated), with all methods' libraries; GFLOP
counts products, recomputed ones too. Weights are random. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module, metadata
from importlib.util import find_spec
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model as models
import runs
from methods import MAIN, METHODS, Method, adapters
from model import ModelError, create_backbone, first_line, input_size, parameter_groups
from runs import AMP, COUNT, DEVICES, FRACTION, WHOLE, RunError, new_parser
from suite import as_markdown

CLASSES = 100
PEERS = ("peft", "loralib")
SCORING = ("eval plain", f"eval {MAIN}", "eval merged")
KNOWN = [*METHODS, "floor", "two-branch", *PEERS, *SCORING]
DEFAULT = ["floor", *METHODS, "two-branch", *PEERS, *SCORING]
OTHERS = ("floor", MAIN, "peft", "eval plain")  # what ratios are over
# method+option is one more method, so that it takes its turn too
OPTIONS = {"compile": {"compile": True}, "bf16": {"amp": "bf16"}, "fp16": {"amp": "fp16"}}
OPTIONS |= {"grad-checkpoint": {"grad_checkpoint": True}, "accumulate4": {"accumulate": 4}}
# dense bf16 or fp16, as NVIDIA states
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


def build(method: str, args: argparse.Namespace) -> nn.Module:
    """The model of a method on the CPU, with what it trains marked so; else ModelError."""
    size = {"pretrained": False, "img_size": args.img_size}
    own = {"rank": args.rank, "mask_prob": args.mask_prob, "targets": args.targets}
    if method in METHODS:
        return models.create(args.model, CLASSES, method=method, **size, **own)
    if method in ("two-branch", f"eval {MAIN}", "eval merged"):
        net = models.create(args.model, CLASSES, method=MAIN, **size, **own)
        for layer in adapters(net).values():
            if method == "two-branch":
                layer.forward = layer.two_branch
        return models.merge(net) if method == "eval merged" else net
    net = create_backbone(args.model, CLASSES, **size)
    models.freeze(net)
    if method == "floor":
        first = dict(net.named_parameters()).get("blocks.0.norm1.bias")
        if first is None:
            raise ModelError(f"--methods floor: {args.model} has no blocks.0.norm1.bias to train")
        first.requires_grad_(True)
    if method not in PEERS:
        return net
    layers = models.find_layers(net, args.targets)
    if any(rows is not None for rows in layers.values()):
        raise ModelError(f"--methods {method}: it adapts whole layers, so --targets attn.qkv")
    library = import_module(method)
    if method == "peft":
        head = [p for p in net.parameters() if p.requires_grad]
        config = library.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(layers))
        net = library.get_peft_model(net, config)
        for parameter in head:
            parameter.requires_grad_(True)
        return net
    for name in layers:
        old = net.get_submodule(name)
        sizes = old.in_features, old.out_features, args.rank, args.rank
        lora = library.Linear(*sizes, merge_weights=False)
        lora.weight = old.weight
        lora.bias = old.bias
        net.set_submodule(name, lora)
    return net


def with_options(method: str, args: argparse.Namespace):
    """The base method, and its own arguments: for mlae+bf16 those with --amp bf16."""
    method, *options = method.split("+")
    args = argparse.Namespace(**vars(args))
    for option in options:
        vars(args).update(OPTIONS[option])
    return method, args


def stepper(method: str, args, device, images: Tensor):
    """A training step of a method, or for "eval <method>" the scoring of one batch."""
    method, args = with_options(method, args)
    scoring = method.startswith("eval ")
    net = build(method, args).to(device).train(not scoring)
    if args.grad_checkpoint:
        models.recompute_blocks(net)
    if args.compile:  # as train.py's torch.compile, but at ease with the counter's hooks
        net.compile(dynamic=True)
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], device)
    amp = runs.resolve_amp(args.amp, device)

    def draw():
        return torch.randint(0, len(images), (args.batch_size,), device=device)

    def score():
        with torch.inference_mode(), runs.autocast(device, amp):
            net(normalize(images[draw()]))

    if scoring:
        return score
    optimizer = torch.optim.AdamW(parameter_groups(net, 1e-4), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    row = METHODS.get(method, Method(trains=method))  # whose hooks do nothing

    def step():
        batch = draw()
        x, y = images[batch], batch % CLASSES
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(args.accumulate), y.chunk(args.accumulate), strict=True):
            with runs.autocast(device, amp):
                logits = net(normalize(part))  # (B / accumulate, classes)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / len(x)
            loss = loss + row.penalty(net) * (len(part) / len(x))
            scaler.scale(loss).backward()
        row.before_step(net, 0.5)
        scaler.step(optimizer)
        scaler.update()

    if args.grad_checkpoint:
        step()
        models.check_gradients(net)
    return step


def measure(args: argparse.Namespace, device: torch.device, peaks: dict) -> list[dict]:
    """One row a method: median seconds, images/s, ratios to OTHERS (quartiles), GFLOP, MFU."""
    torch._dynamo.config.cache_size_limit = 64  # above it methods, one code for all, run uncompiled
    shape = args.images, 3, args.img_size, args.img_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    steps = {name: stepper(name, args, device, images) for name in args.methods}
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    synchronize = waits.get(device.type, lambda: None)
    flops, times = {}, {}
    for name, step in steps.items():
        counter = FlopCounterMode(display=False)
        with torch.compiler.set_stance("force_eager"), counter:
            step()
        flops[name] = counter.get_total_flops()
        times[name] = []
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
    gpu = runs.provenance(device)["device"]
    peak = max([PEAK_TFLOPS[name] for name in PEAK_TFLOPS if name in gpu], default=None)
    rows = []
    for name, seconds in times.items():
        row = {"method": name, "seconds": statistics.median(seconds)}
        row["images_per_s"] = args.batch_size / row["seconds"]
        for other in OTHERS:
            if other in times and name.startswith("eval") == other.startswith("eval"):
                row[f"over {other}"] = ratios(seconds, times[other])
        row["memory_mb"] = peaks.get(name)
        row["gflops"] = flops[name] / 1e9
        row["mfu"] = None
        _, own = with_options(name, args)
        if peak and runs.resolve_amp(own.amp, device) != "off" and not own.grad_checkpoint:
            row["mfu"] = flops[name] / row["seconds"] / (peak * 1e12)
        rows.append(row)
    return rows


def ratios(seconds: list, others: list) -> list:
    """Quartiles of the ratios within a round."""
    each = [a / b for a, b in zip(seconds, others, strict=True)]
    if len(each) == 1:
        return each * 3
    return statistics.quantiles(each, n=4, method="inclusive")


def memory(method: str, args: argparse.Namespace) -> int | None:
    """Peak MiB of a process that makes three steps of one method; None, saying why, if it fails."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(peak_of, method, args).result()
        except Exception as error:  # whatever stops a process, a lack of memory for example
            print(f"{method}: no memory measured: {type(error).__name__}: {error}")
            return None


def peak_of(method: str, args):
    for name in PEERS:  # in every process, else theirs would be larger by their libraries
        if find_spec(name):
            import_module(name)
    device = runs.pick_device(args.device)
    shape = args.images, 3, args.img_size, args.img_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    step = stepper(method, args, device, images)
    for _ in range(3):
        step()
    return runs.peak_memory_mb(device)


def show(rows: list[dict]) -> None:
    """The table of one measurement."""
    present = set().union(*rows)
    others = [other for other in OTHERS if f"over {other}" in present]
    head = ["method", "ms/step", "images/s", *(f"over {other}" for other in others)]
    lines = [[*head, "memory MiB", "GFLOP", "MFU %"]]
    for row in rows:
        line = [row["method"], f"{1e3 * row['seconds']:.1f}", f"{row['images_per_s']:.1f}"]
        for other in others:
            if f"over {other}" in row:
                ratio = row[f"over {other}"]
                line.append("{1:.3f} ({0:.3f}-{2:.3f})".format(*ratio))
            else:
                line.append("-")
        mfu = f"{100 * row['mfu']:.1f}" if row["mfu"] else "-"
        lines.append([*line, str(row["memory_mb"] or "-"), f"{row['gflops']:.0f}", mfu])
    print(as_markdown(lines))


def bench_parser() -> argparse.ArgumentParser:
    parser = new_parser("bench.py", __doc__)
    flag = parser.add_argument
    flag("--model", default="vit_tiny_patch16_224", help="timm name (default: the ViT-Ti/16)")
    flag("--img-size", type=COUNT, help="side in pixels (default: the model's own)")
    flag("--batch-size", type=COUNT, default=16, help="default: 16, what two CPU cores bear")
    flag("--targets", nargs="+", default=["attn.qkv"], metavar="PATH", help="adapted layers")
    flag("--rank", type=COUNT, default=8, help="default: 8")
    flag("--mask-prob", type=FRACTION, default=0.5, help="default: 0.5")
    flag("--amp", choices=AMP, default="auto", help="as in train.py (default: auto)")
    flag("--compile", action="store_true", help="torch.compile every method")
    flag("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass")
    flag("--accumulate", type=COUNT, default=1, help="split a batch into N parts (default: 1)")
    flag("--images", type=COUNT, default=1000, help="images held in memory (default: 1000)")
    flag("--methods", nargs="+", metavar="METHOD", help=f"with +{', +'.join(OPTIONS)} if wanted")
    flag("--rounds", type=COUNT, default=20, help="every method's turns (default: 20)")
    flag("--steps", type=COUNT, help="steps a turn (default: 1, on CUDA 10)")
    flag("--warmup", type=WHOLE, default=2, help="steps before the rounds (default: 2)")
    flag("--no-memory", action="store_true", help="leave out the memory, a process a method")
    flag("--device", choices=DEVICES, default="auto", help="default: auto")
    return parser


def check_methods(methods: list[str]) -> None:
    """Raise RunError for a method or option that is not there, or not installed."""
    for method in methods:
        name, *options = method.split("+")
        if name not in KNOWN or not set(options) <= set(OPTIONS):
            extra = f"each with +{', +'.join(OPTIONS)}"
            raise RunError(f"--methods {method!r}: there are {', '.join(KNOWN)}, {extra}")
        if name in PEERS and find_spec(name) is None:
            raise RunError(f"--methods {name}: pip install {name}")
        if name.startswith("eval ") and {"accumulate4", "grad-checkpoint"} & set(options):
            raise RunError(f"--methods {method!r}: scoring has no backward pass")


def main(argv: list[str] | None = None) -> None:
    args = bench_parser().parse_args(argv)
    with runs.one_line("bench.py"):
        check_methods(args.methods or [])
        absent = [name for name in PEERS if find_spec(name) is None]
        if absent and not args.methods:
            print(f"not installed, so left out: {', '.join(absent)}")
        args.methods = args.methods or [name for name in DEFAULT if name not in absent]
        device = runs.pick_device(args.device)
        args.img_size = args.img_size or input_size(args.model)
        args.steps = args.steps or (10 if device.type == "cuda" else 1)
        peaks = {}
        try:
            for method in args.methods:
                if not args.no_memory:
                    peaks[method] = memory(method, args)
            rows = measure(args, device, peaks)
        except (ValueError, torch.OutOfMemoryError) as error:
            raise RunError(first_line(error)) from error
        show(rows)
        machine = runs.provenance(device) | {"amp": runs.resolve_amp(args.amp, device)}
        peers = {name: metadata.version(name) for name in PEERS if name not in absent}
        machine |= {"threads": torch.get_num_threads(), "peers": peers}
        print(json.dumps({"arguments": vars(args), "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
