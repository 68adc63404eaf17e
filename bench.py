"""Measure speed and memory of the methods. They take turns in every round.

    python bench.py --model vit_tiny_patch16_224 --batch-size 16            # 20 rounds here
    python bench.py --methods mlae mlae+compile mlae+bf16                   # what an option costs

A step is train.py's, on uint8 images that are on the device. Beside train.py's methods there are
    floor          head and blocks.0.norm1.bias alone train: gradients still pass every block
    two-branch     MLAE as it is defined, not folded into one product
    peft, loralib  LoRA by these packages, if they are installed
    eval plain     scoring by timm's model (eval mlae: with adapters; eval merged: after merging)
Ratios are taken within a round; median and quartiles are printed. Memory is the peak of a process
of its own (CUDA: allocated), with all methods' libraries. GFLOP counts products, recomputed ones
too. Weights are random. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module, metadata
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model as models
import runs
from methods import MAIN, METHODS, Method, adapters
from model import ModelError
from runs import COUNT, RunError
from train import capture, parameter_groups

CLASSES = 100
HOOKLESS = Method(trains="as a peer does")  # its hooks do nothing
PEERS = [name for name in ("peft", "loralib") if find_spec(name)]
SCORING = ["eval plain", f"eval {MAIN}", "eval merged"]
KNOWN = ["floor", *METHODS, "two-branch", *PEERS, *SCORING]
OTHERS = ("floor", "floor+graph", MAIN, "peft", "peft+graph", "eval plain")  # ratios are over these
# method+option is one more method, so that it takes its turn too
OPTIONS = {"compile": {"compile": True}, "bf16": {"amp": "bf16"}, "fp16": {"amp": "fp16"}}
OPTIONS |= {"grad-checkpoint": {"grad_checkpoint": True}, "accumulate4": {"accumulate": 4}}
OPTIONS |= {"graph": {"graph": True}}  # a step as one CUDA graph, as train.py's
# dense bf16 or fp16, as NVIDIA states
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


def build(method: str, args: argparse.Namespace) -> nn.Module:
    """The model of a method on the CPU, with what it trains marked so; else ModelError."""
    size = {"pretrained": False, "img_size": args.img_size}
    if method in METHODS or method in ("two-branch", f"eval {MAIN}", "eval merged"):
        own = {"rank": args.rank, "mask_prob": args.mask_prob, "targets": args.targets}
        own["method"] = method if method in METHODS else MAIN
        net = models.create(args.model, CLASSES, **size, **own)
        for layer in adapters(net).values() if method == "two-branch" else ():
            layer.forward = layer.two_branch
        return models.merge(net) if method == "eval merged" else net
    net = models.create_backbone(args.model, CLASSES, **size)
    models.freeze(net)
    if method == "floor":
        bias = dict(net.named_parameters()).get("blocks.0.norm1.bias")
        if bias is None:
            raise ModelError(f"--methods floor: {args.model} has no blocks.0.norm1.bias to train")
        bias.requires_grad_(True)
    if method not in PEERS:
        return net
    head = [parameter for parameter in net.parameters() if parameter.requires_grad]
    layers = models.find_layers(net, args.targets)
    if any(rows is not None for rows in layers.values()):
        raise ModelError(f"--methods {method}: it adapts whole layers, so --targets attn.qkv")
    library, rank = import_module(method), args.rank
    if method == "peft":
        config = library.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        net = library.get_peft_model(net, config)
        for parameter in head:
            parameter.requires_grad_(True)
        return net
    for name in layers:
        old = net.get_submodule(name)
        lora = library.Linear(old.in_features, old.out_features, rank, rank, merge_weights=False)
        lora.weight, lora.bias = old.weight, old.bias
        net.set_submodule(name, lora)
    return net


def with_options(method: str, args: argparse.Namespace) -> tuple[str, argparse.Namespace]:
    """The base method, and its own arguments: for mlae+bf16 those with --amp bf16."""
    method, *options = method.split("+")
    args = argparse.Namespace(**vars(args))
    for option in options:
        vars(args).update(OPTIONS[option])
    return method, args


def stepper(method: str, args: argparse.Namespace, images: Tensor):
    """A training step of a method, or for "eval <method>" the scoring of one batch."""
    method, args = with_options(method, args)
    scoring, device = method.startswith("eval "), images.device
    net = build(method, args).to(device).train(not scoring)
    if args.grad_checkpoint:
        models.recompute_blocks(net)
    if args.compile:  # as train.py's torch.compile, but at ease with the counter's hooks
        net.compile(dynamic=True)
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], device)
    amp = runs.resolve_amp(args.amp, device)
    if amp == "bf16" and method not in PEERS:  # peers as people run them
        models.round_frozen(net)

    def score() -> None:
        batch = torch.randint(0, len(images), (args.batch_size,), device=device)
        with torch.inference_mode(), runs.autocast(device, amp):
            net(normalize(images[batch]))

    if scoring:
        return score
    optimizer = torch.optim.AdamW(parameter_groups(net, 1e-4), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    row = METHODS.get(method, HOOKLESS)
    replay, calls = None, 0

    def accumulate_gradients(x: Tensor, y: Tensor, size: int | Tensor) -> None:
        for part, labels in zip(x.chunk(args.accumulate), y.chunk(args.accumulate), strict=True):
            with runs.autocast(device, amp):
                logits = net(normalize(part))  # (B / accumulate, classes)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / size
            loss = loss + row.penalty(net) * (len(part) / len(x))
            scaler.scale(loss).backward()

    def step() -> None:
        nonlocal replay, calls
        batch = torch.randint(0, len(images), (args.batch_size,), device=device)
        work = images[batch], batch % CLASSES, len(batch)
        if args.graph and calls == 1:  # the first call counts the FLOP
            optimizer.zero_grad()
            replay = capture(accumulate_gradients, net, args.img_size, args.batch_size)
        if replay:
            replay(*work)
        else:
            optimizer.zero_grad()
            accumulate_gradients(*work)
        calls += 1
        row.before_step(net, 0.5)
        scaler.step(optimizer)
        scaler.update()

    if args.grad_checkpoint:
        step()
        models.check_gradients(net)
    return step


def create_images(args: argparse.Namespace) -> Tensor:
    """Random images (N, 3, S, S) in uint8, on the device."""
    shape = args.images, 3, args.img_size, args.img_size
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(runs.pick_device(args.device))


def measure(args: argparse.Namespace, peaks: dict) -> list[dict]:
    """One row a method: median seconds, images/s, ratios to OTHERS (quartiles), GFLOP, MFU."""
    torch._dynamo.config.cache_size_limit = 64  # above it methods, one code for all, run uncompiled
    images = create_images(args)
    device = images.device
    steps = {name: stepper(name, args, images) for name in args.methods}
    flops, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        counter = FlopCounterMode(display=False)
        with torch.compiler.set_stance("force_eager"), counter:
            step()
        flops[name] = counter.get_total_flops()
        for _ in range(args.warmup):
            step()
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    synchronize = waits.get(device.type, lambda: None)
    for _ in tqdm(range(args.rounds), "rounds", disable=None):
        for name in random.sample(list(steps), len(steps)):
            synchronize()
            start = time.perf_counter()
            for _ in range(args.steps):
                steps[name]()
            synchronize()
            times[name].append((time.perf_counter() - start) / args.steps)
    gpu = runs.provenance(device)["device"]
    peak = max((most for name, most in PEAK_TFLOPS.items() if name in gpu), default=None)
    rows = []
    for name, seconds in times.items():
        row = {"method": name, "seconds": float(np.median(seconds))}
        row["images_per_s"] = args.batch_size / row["seconds"]
        for other in OTHERS:
            if other in times and name.startswith("eval") == other.startswith("eval"):
                ratios = np.divide(seconds, times[other])  # within a round
                row[f"over {other}"] = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        row |= {"memory_mb": peaks.get(name), "gflops": flops[name] / 1e9, "mfu": None}
        _, own = with_options(name, args)
        if peak and runs.resolve_amp(own.amp, device) != "off" and not own.grad_checkpoint:
            row["mfu"] = flops[name] / row["seconds"] / (peak * 1e12)
        rows.append(row)
    return rows


def memory(method: str, args: argparse.Namespace) -> int | None:
    """Peak MiB of a process that makes three steps of one method; None, saying why, if it fails."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(peak_of, method, args).result()
        except Exception as error:  # whatever stops a process, a lack of memory for example
            print(f"{method}: no memory measured: {type(error).__name__}: {error}")
            return None


def peak_of(method: str, args: argparse.Namespace) -> int | None:
    for name in PEERS:  # in every process, else theirs would be larger by their libraries
        import_module(name)
    images = create_images(args)
    step = stepper(method, args, images)
    for _ in range(3):
        step()
    return runs.peak_memory_mb(images.device)


def main(argv: list[str] | None = None) -> None:
    parser = runs.new_parser("bench.py", __doc__)
    flag = parser.add_argument
    flag("--model", default="vit_tiny_patch16_224", help="model (default: vit_tiny_patch16_224)")
    flag("--img-size", type=COUNT, help="side in pixels (default: the model's own)")
    flag("--batch-size", type=COUNT, default=16, help="images per step (default: 16)")
    words = "layers to adapt (default: attn.qkv)"
    flag("--targets", nargs="+", default=["attn.qkv"], metavar="PATH", help=words)
    flag("--rank", type=COUNT, default=8, help="experts per layer (default: 8)")
    flag("--mask-prob", type=runs.FRACTION, default=0.5, help="masking probability (default: 0.5)")
    flag("--amp", choices=runs.AMP, default="auto", help="as in train.py (default: auto)")
    flag("--compile", action="store_true", help="use torch.compile for every method")
    flag("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass")
    flag("--accumulate", type=COUNT, default=1, help="split a batch into N parts (default: 1)")
    flag("--images", type=COUNT, default=1000, help="images held in memory (default: 1000)")
    words = f"what to measure (default: everything), with options: mlae+{', +'.join(OPTIONS)}"
    flag("--methods", nargs="+", metavar="METHOD", help=words)
    flag("--rounds", type=COUNT, default=20, help="number of rounds (default: 20)")
    flag("--steps", type=COUNT, help="steps of a method in each round (default: 1; on CUDA: 10)")
    flag("--warmup", type=runs.WHOLE, default=2, help="steps before the rounds (default: 2)")
    flag("--no-memory", action="store_true", help="do not measure memory (a process per method)")
    flag("--device", choices=runs.DEVICES, default="auto", help="default: auto")
    args = parser.parse_args(argv, argparse.Namespace(graph=False))
    with runs.one_line("bench.py"):
        device = runs.pick_device(args.device)
        on_cuda = device.type == "cuda"
        if not args.methods:
            args.methods = [*KNOWN]
            for name in KNOWN[: -len(SCORING)] if on_cuda else ():
                if METHODS.get(name, HOOKLESS).capturable:
                    args.methods.append(f"{name}+graph")
        for method in args.methods:
            name, *options = method.split("+")
            if name not in KNOWN or not set(options) <= set(OPTIONS):
                extra = f"each with +{', '.join(OPTIONS)}; peft and loralib if they are installed"
                raise RunError(f"--methods {method!r}: there are {', '.join(KNOWN)}, {extra}")
            if name in SCORING and set(options) - {"compile", "bf16", "fp16"}:
                raise RunError(f"--methods {method!r}: scoring has no backward pass")
            if "graph" in options and not on_cuda:
                raise RunError(f"--methods {method!r}: a graph needs a CUDA GPU")
        args.img_size = args.img_size or models.input_size(args.model)
        args.steps = args.steps or (10 if on_cuda else 1)
        measured = () if args.no_memory else args.methods
        try:
            rows = measure(args, {method: memory(method, args) for method in measured})
        except (ValueError, torch.OutOfMemoryError) as error:
            raise RunError(models.first_line(error)) from error
        lines = []
        for row in rows:
            mfu = None if row["mfu"] is None else f"{100 * row['mfu']:.1f}"
            line = {"method": row["method"], "ms/step": f"{1e3 * row['seconds']:.1f}"}
            line |= {"images/s": f"{row['images_per_s']:.1f}", "memory MiB": row["memory_mb"]}
            line |= {"GFLOP": f"{row['gflops']:.3g}", "MFU %": mfu}
            for name in filter(row.get, [f"over {other}" for other in OTHERS]):
                line[name] = "{1:.3f} ({0:.3f}-{2:.3f})".format(*row[name])
            lines.append(line)
        table = pandas.DataFrame(lines, dtype=object).dropna(axis="columns", how="all")
        print(table.fillna("-").to_markdown(index=False, tablefmt="github", disable_numparse=True))
        machine = runs.provenance(device) | {"amp": runs.resolve_amp(args.amp, device)}
        peers = {name: metadata.version(name) for name in PEERS}
        machine |= {"threads": torch.get_num_threads(), "peers": peers}
        print(json.dumps({"arguments": vars(args), "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
