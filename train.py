"""Train one method on one task, score it once, and print one line of JSON.

    python train.py                                       # the demo: digits, no network, no GPU
    python train.py --dataset dtd --mask-prob 0.5         # a VTAB-1k task, ViT-B/16: one GPU
    python train.py --dataset dtd --val --mask-prob 0.7   # choose settings: train 800, score val200
    torchrun --nproc-per-node 2 train.py --dataset dtd    # two GPUs share every batch

Several tasks, seeds or settings: suite.py takes the same flags. On a CPU take a small model at a
small size: `--model vit_small_patch14_dinov2 --img-size 98 --epochs 10`.

A run leaves its files in runs/<dataset>/<name>/ (docs/running.md).
The last weights are scored, once, at the end; no epoch is chosen. `python eval.py RUN` scores a
run again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as models
import runs
from data import NORMALIZE, DataError, create_normalizer, find_task, load_data
from eval import predict, score
from methods import METHODS, Method
from mlae import hold_mask_prob
from runs import PADDING, Diverged, RunError, broadcast, process_rank, settle, world_size
from splits import regular


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear from peak / warmup at step 0 to peak, then half a cosine towards 0 at step `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float, lambda_lr: float = 1.0) -> list[dict]:
    """What trains: matrices with weight decay; vectors, and what timm exempts, without. `factor` is
    a group's learning rate over that of the rest, `lambda_lr` for lambda."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: dict[tuple, list] = {(weight_decay, 1.0): [], (0.0, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in exempt
            factor = lambda_lr if name.endswith("lora_lambda") else 1.0
            groups.setdefault((weight_decay if decays else 0.0, factor), []).append(parameter)
    made = []
    for (decay, factor), params in groups.items():
        made.append({"params": params, "weight_decay": decay, "factor": factor})
    return made


def finished(folder: Path, args: argparse.Namespace) -> dict | None:
    """The metrics of a run that has ended; None if there is none that can be read, or it is to be
    overwritten. RunError if the folder holds a run of other arguments, as defaults have changed, or
    of other code; a suite, which goes on, says so and takes it."""
    try:
        metrics = runs.read_json(folder / "metrics.json")
        config = runs.read_json(folder / "config.json")
    except RunError:  # none yet, or damaged
        return None
    then = config.get("arguments")
    scored = "val_top1" if args.val else "test_top1"
    lacking = {"official", "digest", "images", scored} - metrics.keys()
    if lacking or not isinstance(then, dict) or args.overwrite:
        return None
    for name in sorted(vars(args).keys() & then.keys() - runs.BY_DIGEST):
        value = getattr(args, name)
        if then[name] != value:
            flag = f"--{name.replace('_', '-')}"
            was = f"{folder} was run with {flag} {then[name]}, the default of its time"
            raise RunError(f"{was}; now it is {value}: take another --out, or --overwrite")
    if config.get("code") != runs.code_digest():
        other = f"{folder} was made by other code than today's"
        if args.resume is not None:
            raise RunError(f"{other}: --overwrite runs it again, another --out keeps it")
        print(f"note: {other}", file=sys.stderr)
    with suppress(OSError):  # it may have been killed before it did so
        (folder / "state.pt").unlink(missing_ok=True)
    print(f"finished before (--overwrite runs it again): {folder}")
    return metrics | {"run": str(folder)}  # it may have been moved


def capture(step: Callable, model: nn.Module, img_size: int, batch_size: int) -> Callable:
    """`step(x, y, size)` as one CUDA graph, for batches of up to `batch_size` images.

    An adapted layer costs some 20 small kernels, and Python takes longer to launch them than the
    GPU to run them. A graph launches all kernels of a step at once. It replays what was captured,
    from the same memory: a batch is copied to where the first one was; gradients stay where they
    are, and are written anew; random numbers go on as if nothing had been captured.
    """
    device = next(model.parameters()).device
    x = torch.zeros(batch_size, 3, img_size, img_size, dtype=torch.uint8, device=device)
    y = torch.zeros(batch_size, dtype=torch.long, device=device)
    size = torch.tensor(float(batch_size), device=device)
    hold_mask_prob(model)
    numbers = torch.cuda.get_rng_state(device)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):  # what libraries set up at first use must not be captured
                step(x, y, size)
                model.zero_grad()  # no trace: neither gradients nor weights nor random numbers
        now = torch.cuda.current_stream()
        now.wait_stream(side)
        with torch.cuda.stream(now), torch.cuda.graph(graph):  # back on `now`, also after an error
            step(x, y, size)
    except RuntimeError:  # else the random numbers would wait for the end of this capture
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    finally:
        torch.cuda.set_rng_state(numbers, device)

    def replay(batch: Tensor, labels: Tensor, count: int) -> None:
        x[: len(batch)].copy_(batch)
        y.fill_(PADDING)  # what a last, short batch lacks is ignored
        y[: len(labels)].copy_(labels)
        size.fill_(count)
        graph.replay()

    return replay


def can_be_captured(model: nn.Module, method: Method, args: argparse.Namespace, amp: str) -> bool:
    """Whether a step can be a CUDA graph: not with what asks the GPU, or changes a shape, as the
    scaler of fp16 and SNELLA; with random numbers that are drawn again; or among several ranks."""
    on_cuda = next(model.parameters()).device.type == "cuda" and world_size() == 1
    moves = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    again = args.grad_checkpoint or amp == "fp16" or moves  # warm-up would move batch statistics
    return on_cuda and method.capturable and not again


def save_state(path: Path, weights: dict, optimizer, scaler, digest: str, progress: dict) -> None:
    """All that `restore` needs to go on as if nothing had happened; whole or not at all. `weights`
    are the tensors that train, `digest` is the training images', `progress` what it returns."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    state = {"weights": weights, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    state["rng"] = {"cpu": torch.get_rng_state(), "cuda": cuda}
    state |= {"digest": digest, "progress": progress, "code": runs.code_digest()}
    with runs.write_atomically(path) as draft, open(draft, "wb") as file:
        torch.save(state, file)


def restore(path: Path, model: nn.Module, optimizer, scaler, digest: str) -> dict:
    """Load what `save_state` wrote, if it is there, and return the progress, {"epoch": epochs done,
    "rows": of the log, "seconds": of training}; all nothing if there is no state. Raises
    OtherImages if its training images are not these, RunError for a file that cannot be read."""
    nothing = {"epoch": 0, "rows": [], "seconds": 0.0}
    if not broadcast(path.exists()):
        return nothing
    with runs.reading(path, "remove it to start anew; "):
        state = torch.load(regular(path), map_location="cpu", weights_only=True)
        progress, moments, rng = state["progress"], state["optimizer"]["state"], state["rng"]
        is_other = broadcast(state["digest"] != digest)
    if is_other:
        stopped = f"{path.parent} was stopped after epoch {progress['epoch']}"
        remedy = "put them back, or start anew with --overwrite"
        raise runs.OtherImages(f"{stopped} on other training images: {remedy}")
    with runs.reading(path, "remove it to start anew; "):
        models.load_strictly(model, state["weights"], models.adapter_state(model), "it")
        groups = optimizer.state_dict()["param_groups"]  # as the run's settings make them
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, own in optimizer.state.items():
            for mean in (own["exp_avg"], own["exp_avg_sq"]):
                if mean.shape != parameter.shape or not mean.isfinite().all():
                    raise ValueError("its moments are not the parameters', or not finite")
        losses = [row["loss"] + row["train_top1"] for row in progress["rows"]]
        if len(losses) != progress["epoch"] or not (moments and losses):
            raise ValueError("it has no moments, or not a row for each epoch")
        if not math.isfinite(sum(losses) + progress["seconds"]):
            raise ValueError("its numbers are not finite")
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(rng["cpu"])
        if rng["cuda"]:
            torch.cuda.set_rng_state(rng["cuda"][0])
    if state.get("code") != runs.code_digest():
        print(f"note: {path.parent} goes on with other code than it began with", file=sys.stderr)
    print(f"resumed after epoch {progress['epoch']} of {path.parent}")
    return progress


def run(args: argparse.Namespace, load: Callable = load_data) -> dict:
    """One run, from settled arguments to files; returns what `metrics.json` holds. `load` gives
    (training images, scored images) of the arguments. Raises Busy if another process is at it."""
    # the same settings and the same checkpoint give the same folder
    own = runs.identity(args, runs.usual(args)) | METHODS[args.method].signature()
    folder = runs.run_folder(args.out, own)
    with runs.claim(folder):
        for draft in folder.glob(".draft-*") if process_rank() == 0 else ():
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        metrics = train_and_score(args, folder, own, broadcast(finished(folder, args)), load)
    if process_rank() == 0:
        split = "test" if "test_top1" in metrics else "val"
        scored = f"{metrics[f'{split}_top1']:.2f} % ({metrics['images']} images)"
        print(f"{split} top-1 {scored}, run {metrics['run']}")
    return metrics


def train_and_score(args, folder: Path, own: dict, before: dict | None, load: Callable) -> dict:
    """A run in a folder that is claimed; `before` is its result, right if of the same images."""
    method, state = METHODS[args.method], folder / "state.pt"
    if state.exists() and args.resume is False and not args.overwrite:  # None: go on if possible
        raise RunError(f"{folder} was interrupted: --resume goes on, --overwrite starts anew")
    if args.resume and not state.exists():
        print(f"nothing to resume in {folder}: starting anew")

    # --- seed and device ---
    torch.manual_seed(args.seed)
    device = runs.pick_device(args.device)
    amp = runs.resolve_amp(args.amp, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # a suite has had other runs in this process

    # --- data ---
    failed = None
    try:
        if process_rank() == 0:
            train, test = load(args)
    except DataError as error:
        if before is None:
            raise
        failed = str(error)
    failed = broadcast(failed)  # the first rank has downloaded what all need
    if failed is not None:
        print(f"note: the result is not compared with its images: {failed}", file=sys.stderr)
        return before
    if process_rank():
        train, test = load(args)
    if before and before["digest"] == test.digest():
        return before
    if before:
        print(f"note: {folder} was scored on other images: it is run again", file=sys.stderr)
    if train.source == "embedded" and args.data_dir != str(Path("data").absolute()):
        hint = "--data-dir is not read; name what to train on with --dataset"
        print(f"note: --dataset {args.dataset} is in this repository, {hint}", file=sys.stderr)
    train.prepare(device, args.workers)

    # --- model ---
    model = models.create_model(args, find_task(args.dataset).classes).to(device)
    if args.grad_checkpoint:
        models.recompute_blocks(model)
    if amp == "bf16":
        models.round_frozen(model)
    normalize = create_normalizer(args, model)
    cfg = getattr(model, "pretrained_cfg", {})
    was = tuple(cfg.get("mean", ())), tuple(cfg.get("std", ()))
    if args.normalize != "model" and not args.no_pretrained and was != NORMALIZE[args.normalize]:
        hint = f"with mean {was[0]} and std {was[1]}: --normalize model takes these"
        print(f"note: these weights were trained {hint}", file=sys.stderr)
    weights = models.weights_of(model, args.checkpoint, not args.no_pretrained)
    counts = models.count_parameters(model)

    # --- optimizer and schedule ---
    lambda_lr = model.method_settings.get("lambda_lr", 1.0)
    groups = parameter_groups(model, args.weight_decay, lambda_lr)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)  # one call for all tensors
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    steps_per_epoch = math.ceil(len(train) / args.batch_size)  # no image is dropped
    steps = args.epochs * steps_per_epoch
    warmup = round(args.warmup_epochs * steps_per_epoch)

    # --- what a stopped run has done, before anything of it is written over ---
    if args.overwrite and not args.resume and process_rank() == 0:
        state.unlink(missing_ok=True)
    digest = train.digest()
    done = restore(state, model, optimizer, scaler, digest)

    # --- the folder: from here on the run writes ---
    config = {"arguments": vars(args), "identity": own, "source": train.source, "amp": amp}
    config |= {"weights": weights, "data": test.description, "class_names": train.class_names}
    config |= runs.provenance(device)
    if process_rank() == 0:
        (folder / "metrics.json").unlink(missing_ok=True)
        for images in (train, test) if train.folder else ():  # which photo is of which part
            runs.write_csv(folder / f"{images.role}.csv", ["path", "label"], images.rows())
        if train.refused:
            runs.write_csv(folder / "refused.csv", ["path", "reason"], train.refused)
        runs.write_json(folder / "config.json", config)
    print(f"{args.method} on {own['dataset']}, {weights['tag']}, {device}: {train.description}")
    print("{} of {} linear layers adapted; ".format(*model.adapted), end="")
    print("{trainable:,} of {total:,} parameters train, {head:,} in the head".format(**counts))

    # --- training ---
    first = step = done["epoch"] * steps_per_epoch
    models.train_mode(model)
    method.before_step(model, step / steps)
    net = model
    if args.compile:
        torch.compiler.reset()  # else earlier models count towards its limit of recompilations
        net = torch.compile(model, dynamic=True)  # one graph for every p and batch size
    if world_size() > 1:  # gradients are means over the ranks; all steps use the same parameters
        net = DistributedDataParallel(net, static_graph=True)
    loss_sum = torch.zeros((), device=device)  # over an epoch, as `correct`
    correct = torch.zeros((), dtype=torch.long, device=device)

    def accumulate_gradients(x: Tensor, y: Tensor, size: int | Tensor) -> None:
        """Of a batch (B, 3, S, S) uint8 and (B,), or of this rank's part of `size` images."""
        # each part draws its own masks
        for images, labels in zip(x.chunk(args.accumulate), y.chunk(args.accumulate), strict=True):
            with runs.autocast(device, amp):
                logits = net(normalize(images))  # (B / accumulate, classes)
            options = {"ignore_index": PADDING, "label_smoothing": args.label_smoothing}
            loss = F.cross_entropy(logits.float(), labels, reduction="sum", **options)
            loss_sum.add_(loss.detach())
            correct.add_((logits.detach().argmax(1) == labels).sum())
            loss = loss / size * world_size()  # whose gradients' mean is taken
            loss = loss + method.penalty(model) * (len(images) / len(x))
            scaler.scale(loss).backward()

    replay = None
    if args.graph == "auto" and can_be_captured(model, method, args, amp):
        try:
            largest = min(args.batch_size, len(train))
            replay = capture(accumulate_gradients, model, args.img_size, largest)
        except RuntimeError as error:  # as it was not to be: out of memory, or a kernel that waits
            optimizer.zero_grad()
            print(f"note: no CUDA graph, which is slower: {models.first_line(error)}")
    bar = tqdm(total=steps, initial=step, unit="step", disable=None)
    for epoch in range(done["epoch"], args.epochs):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(args.seed * 10_007 + epoch)
        order = torch.randperm(len(train), generator=generator)
        loss_sum.zero_()
        correct.zero_()
        seen = 0
        bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
        seed = f"{args.seed} {epoch}"
        for x, y, size in runs.rank_batches(train, order, args.batch_size, args.workers, seed):
            x, y = x.to(device), y.to(device)
            lr = learning_rate(step, steps, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            if replay:
                replay(x, y, size)
            else:
                optimizer.zero_grad()
                accumulate_gradients(x, y, size)
            step += 1
            method.before_step(model, step / steps)
            scaler.step(optimizer)
            scaler.update()
            if step == first + 1:
                models.check_gradients(model)
            seen += len(x)
            if bar.update():  # it shows something new: time to ask the device
                top1 = f"{100 * correct.item() / seen:.1f} %"
                bar.set_postfix(loss=f"{loss_sum.item() / seen:.3f}", top1=top1, refresh=False)
        row = {"epoch": epoch + 1, "lr": lr, **method.after_epoch(model)}
        row["loss"] = runs.all_reduce_sum(loss_sum).item() / len(train)
        row["train_top1"] = 100 * runs.all_reduce_sum(correct).item() / len(train)
        row["seconds"] = done["seconds"] + time.perf_counter() - start
        if not math.isfinite(row["loss"]):
            where = f"the loss is {row['loss']} in epoch {epoch + 1}"
            raise Diverged(f"{where}: lower --lr {args.lr:g}")
        done = {"epoch": epoch + 1, "rows": [*done["rows"], row], "seconds": row["seconds"]}
        if process_rank() == 0:
            lines = [map("{:.7g}".format, row.values()) for row in done["rows"]]
            runs.write_csv(folder / "log.csv", list(row), lines)
            save_state(state, models.adapter_state(model), optimizer, scaler, digest, done)
        if bar.disable:  # no terminal
            line = "epoch {epoch:.0f}: loss {loss:.3f}, training top-1 {train_top1:.1f} %"
            print(line.format(**row), f"after {row['seconds']:.0f} s", flush=True)
    bar.close()
    if process_rank():
        return {}  # the first rank does the rest
    top1 = done["rows"][-1]["train_top1"]
    guess = 100 * train.labels.bincount().max() / len(train)
    if top1 < guess + 5:
        hint = f"training top-1 is {top1:.1f} %, the largest class alone gives {guess:.1f} %"
        remedy = "more --epochs, or another --lr" if args.epochs < 5 else "change --lr"
        print(f"warning: hardly anything was learned ({hint}): {remedy}", file=sys.stderr)
    with runs.write_atomically(folder / "adapter.safetensors") as draft:
        models.save_adapter(model, draft, config)

    # --- the one evaluation, with the last weights ---
    replay = None  # a graph's memory is free again
    logits, labels = predict(model, test, normalize, amp=amp, workers=args.workers)
    scores, is_right = score(logits, labels), logits.argmax(1) == labels
    with runs.write_atomically(folder / "correct.npy") as draft, open(draft, "wb") as file:
        np.save(file, np.packbits(is_right.numpy()))  # a bit an image, in their order
    split = "val" if args.val else "test"
    metrics = {"dataset": own["dataset"], "method": args.method, "model": weights["tag"]}
    metrics |= {"seed": args.seed} | {f"{split}_{name}": value for name, value in scores.items()}
    metrics |= {"data": test.description, "official": train.official and test.official}
    metrics |= {"digest": test.digest(), "digests": test.digests}
    metrics |= {"trainable_parameters": counts["trainable"], "head_parameters": counts["head"]}
    metrics |= {"train_seconds": round(done["seconds"], 1), "images": len(test)}
    metrics |= {"left_out": test.left_out, "peak_memory_mb": runs.peak_memory_mb(device)}
    metrics["run"] = str(folder)
    runs.write_json(folder / "metrics.json", metrics)
    state.unlink(missing_ok=True)  # another process may have seen the result
    return metrics


def main(argv: list[str] | None = None) -> None:
    args = runs.train_parser(__doc__).parse_args(argv)
    with runs.one_line("train.py"), runs.joined(args.device, args.batch_size):
        print(json.dumps(run(settle(args))))


if __name__ == "__main__":
    main()
