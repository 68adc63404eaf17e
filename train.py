"""Train one method on one task, score it once, and print one line of JSON.

    python train.py                                       # the demo: digits, no network, no GPU
    python train.py --dataset dtd --mask-prob 0.5         # a VTAB-1k task, ViT-B/16: one GPU
    python train.py --dataset dtd --val --mask-prob 0.7   # choose settings: train 800, score val200

Several tasks, seeds or settings: suite.py takes the same flags. On a CPU take a small model at a
small size: `--model vit_small_patch14_dinov2 --img-size 98 --epochs 10`.

A run leaves config.json, log.csv, adapter.safetensors and metrics.json in runs/<dataset>/<name>/.
The last weights are scored, once, at the end; no epoch is chosen. `python eval.py RUN` scores a
run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

from flags import train_parser

if __name__ == "__main__":
    train_parser(__doc__).parse_args()  # --help and typing errors need not wait for torch

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from backbone import (
    count_parameters,
    input_size,
    parameter_groups,
    recompute_blocks,
    train_mode,
    weights_of,
)
from baselines import METHODS
from budget import rank_within
from eval import create_model, create_normalizer, evaluate, load_data
from files import RunError, whole, write_json, write_log
from model import adapter_state, check_gradients, find_method, save_adapter
from photos import write_lists
from processes import (
    PADDING,
    agreed,
    claim,
    epoch_of,
    first_rank_first,
    joined,
    process_rank,
    restore,
    save_state,
    share,
    total,
    world_size,
)
from runs import (
    Diverged,
    autocast,
    check_unfinished,
    clear_folder,
    finished,
    identity,
    one_line,
    peak_memory_mb,
    pick_device,
    provenance,
    report,
    resolve_amp,
    run_folder,
    warn_of_failure,
    warn_of_unread_folder,
)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear from peak / warmup at step 0 to peak, then half a cosine towards 0 at step `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_step(
    net,
    optimizer,
    x,
    y,
    *,
    model,
    size,
    normalize,
    scaler,
    amp,
    accumulate,
    label_smoothing,
    method,
    progress,
):
    """One step of the optimizer on images x (B, 3, S, S) uint8 and labels y (B,).

    They are this rank's part of a batch of `size` images. Each of `accumulate` parts of it draws
    its own masks. `method`, a row of METHODS, brings its hooks on `model`, which `net` may be
    compiled or shared from; progress is the share of the training that is done after this step.
    Returns the loss summed over x and the number of right answers.
    """
    loss_sum = correct = 0
    optimizer.zero_grad()
    for images, labels in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
        with autocast(x.device, amp):
            logits = net(normalize(images))  # (B / accumulate, classes)
        loss = F.cross_entropy(
            logits.float(),
            labels,
            reduction="sum",
            ignore_index=PADDING,
            label_smoothing=label_smoothing,
        )
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(1) == labels).sum()
        loss = loss / size * world_size()  # whose gradients' mean is taken
        loss = loss + method.penalty(model) * (len(images) / len(x))
        scaler.scale(loss).backward()
    method.before_step(model, progress)
    scaler.step(optimizer)
    scaler.update()
    return loss_sum, correct


def run(args: argparse.Namespace) -> dict:
    """One run, from settled arguments to files; returns what `metrics.json` holds.

    Raises Busy if another process is at it.
    """
    # its folder: the same settings and the same checkpoint give the same folder
    own = identity(args, usual(args)) | METHODS[args.method].signature()
    folder = run_folder(args.out, own)
    before = agreed(finished(folder, args))
    if before and before["official"]:
        return report(before)
    with claim(folder):
        before = before or agreed(finished(folder, args))  # another process, a moment ago
        return train_and_score(args, folder, own, before)


def train_and_score(args: argparse.Namespace, folder: Path, own: dict, before: dict | None) -> dict:
    """A run in a folder that is claimed; `before` is its result, right if of the same images."""
    method = METHODS[args.method]
    check_unfinished(folder, args)

    # seed and device
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    amp = resolve_amp(args.amp, device)

    # data
    with first_rank_first():  # what it downloads is there for all
        train, test = load_data(args)
    if before and before["digest"] == test.digest():  # a subset may have grown since
        return report(before)
    warn_of_unread_folder(args, train.source)
    with first_rank_first():
        train.prepare(device, args.workers)

    # model
    model = create_model(args).to(device)
    if args.grad_checkpoint:
        recompute_blocks(model)
    normalize = create_normalizer(args, model)
    weights = weights_of(model, args.checkpoint, not args.no_pretrained)
    counts = count_parameters(model)

    # optimizer
    factor = partial(method.lr_factor, settings=model.method_settings)
    groups = parameter_groups(model, args.weight_decay, factor)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)  # one call for all tensors
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    steps_per_epoch = math.ceil(len(train) / args.batch_size)  # no image is dropped
    steps = args.epochs * steps_per_epoch
    warmup = round(args.warmup_epochs * steps_per_epoch)

    # from here on the run writes
    config = {"arguments": vars(args), "identity": own, "source": train.source, "amp": amp}
    config |= {"weights": weights, "data": test.description, "class_names": train.class_names}
    config |= provenance(device)
    if process_rank() == 0:
        clear_folder(folder, keep_state=args.resume or not args.overwrite)
        write_lists(folder, train, test)
        write_json(folder / "config.json", config)
    print(f"{args.method} on {own['dataset']}, {weights['tag']}, {device}: {train.description}")
    print("{} of {} linear layers adapted; ".format(*model.adapted), end="")
    print("{trainable:,} of {total:,} parameters train, {head:,} in the head".format(**counts))

    # training
    digest = train.fingerprint()
    state = folder / "state.pt"
    done = restore(state, model, optimizer, scaler, digest)
    first = step = done["epoch"] * steps_per_epoch
    train_mode(model)
    method.before_step(model, step / steps)
    net = model
    if args.compile:
        torch.compiler.reset()  # else earlier models count towards its limit of recompilations
        net = torch.compile(model, dynamic=True)  # one graph for every p and batch size
    net = share(net)
    bar = tqdm(total=steps, initial=step, unit="step", disable=None)
    while done["epoch"] < args.epochs:
        epoch, start = done["epoch"], time.perf_counter()
        generator = torch.Generator().manual_seed(args.seed * 10_007 + epoch)
        order = torch.randperm(len(train), generator=generator)
        loss_sum = correct = seen = 0
        bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
        seed = f"{args.seed} {epoch}"
        for x, y, size in epoch_of(train, order, args.batch_size, args.workers, seed):
            lr = learning_rate(step, steps, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            step += 1
            loss, right = train_step(
                net,
                optimizer,
                x.to(device),
                y.to(device),
                model=model,
                size=size,
                normalize=normalize,
                scaler=scaler,
                amp=amp,
                accumulate=args.accumulate,
                label_smoothing=args.label_smoothing,
                method=method,
                progress=step / steps,
            )
            if step == first + 1:
                check_gradients(model)
            loss_sum, correct, seen = loss_sum + loss, correct + right, seen + len(x)
            if bar.update():  # it shows something new: time to ask the device
                top1 = f"{100 * correct.item() / seen:.1f} %"
                bar.set_postfix(loss=f"{loss_sum.item() / seen:.3f}", top1=top1, refresh=False)
        row = {"epoch": epoch + 1, "lr": lr, **method.log(model)}
        row["loss"] = total(loss_sum).item() / len(train)
        row["train_top1"] = 100 * total(correct).item() / len(train)
        row["seconds"] = done["seconds"] + time.perf_counter() - start
        if not math.isfinite(row["loss"]):
            raise Diverged(
                f"the loss is {row['loss']} in epoch {epoch + 1}: lower --lr {args.lr:g}"
            )
        done = {"epoch": epoch + 1, "rows": [*done["rows"], row], "seconds": row["seconds"]}
        if process_rank() == 0:
            write_log(folder / "log.csv", done["rows"])
            save_state(state, adapter_state(model), optimizer, scaler, digest, done)
        if bar.disable:  # no terminal
            line = "epoch {epoch:.0f}: loss {loss:.3f}, training top-1 {train_top1:.1f} %"
            print(line.format(**row), f"after {row['seconds']:.0f} s", flush=True)
    bar.close()
    if process_rank():
        return {}  # the first rank does the rest
    warn_of_failure(done["rows"][-1]["train_top1"], train.labels)
    with whole(folder / "adapter.safetensors") as draft:
        save_adapter(model, draft, config)

    # the one evaluation, with the last weights
    scores = evaluate(model, test, normalize, amp=amp, workers=args.workers)
    split = "val" if args.val else "test"
    metrics = {
        "dataset": own["dataset"],
        "method": args.method,
        "model": weights["tag"],
        "seed": args.seed,
        **{f"{split}_{name}": value for name, value in scores.items()},
        "data": test.description,
        "official": train.official and test.official,
        "digest": test.digest(),
        "digests": test.digests,
        "trainable_parameters": counts["trainable"],
        "head_parameters": counts["head"],
        "train_seconds": round(done["seconds"], 1),
        "images": len(test),
        "left_out": test.left_out,
        "peak_memory_mb": peak_memory_mb(device),
        "run": str(folder),
    }
    write_json(folder / "metrics.json", metrics)
    state.unlink(missing_ok=True)  # another process may have seen the result
    return report(metrics)


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of one run: those left out take what suits task, method and model.

    Raises DataError, ModelError or RunError for values that do not go together.
    """
    task, method = data.find_task(args.dataset), find_method(args.method)
    args = argparse.Namespace(**vars(args))
    args.dataset = task.argument
    for name, value in task.recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.budget and args.rank:
        raise RunError("--budget chooses the rank: leave --rank out")
    method.complete(args)
    args.img_size = args.img_size or input_size(args.model)
    if args.budget:
        args.rank, args.budget = rank_within(args), None  # the rank is what the run is
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    if not 0 <= args.warmup_epochs < args.epochs:
        raise RunError(
            f"--warmup-epochs {args.warmup_epochs:g} must be from 0 to below --epochs {args.epochs}"
        )
    return args


def usual(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a run on the same task with the same method, model and number of epochs."""
    fixed = ("dataset", "method", "model", "epochs")
    return settle(train_parser().parse_args([f"--{name}={getattr(args, name)}" for name in fixed]))


def main(argv: list[str] | None = None) -> None:
    args = train_parser(__doc__).parse_args(argv)
    with one_line("train.py"), joined(args.device, args.batch_size):
        print(json.dumps(run(settle(args))))


if __name__ == "__main__":
    main()
