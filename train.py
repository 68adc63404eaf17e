"""Train MLAE (or LoRA, a linear probe, full fine-tuning) on a task, score it once, and print one line of JSON.

    python train.py                                            # the embedded demo: digits, no network, no GPU
    python train.py --dataset dtd --mask-prob 0.5              # a VTAB-1k task, ViT-B/16: one GPU
    python train.py --dataset dtd --val --mask-prob 0.7        # choose settings: train on 800, score val200
    python train.py --dataset vtab --seeds 0 1 2               # all 19 tasks (fgvc: 5), what is finished is skipped

On a CPU take a small model at a small size, for example `--model vit_small_patch14_dinov2 --img-size 98 --epochs 10`.
Everything a run leaves is in runs/<dataset>/<name>/: config.json, log.csv, adapter.safetensors, metrics.json. The last
weights are scored, once, at the end; no epoch is chosen. `python eval.py RUN` scores a run again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import data
import eval as evaluation
import model as models
from eval import AMP, COUNT, FRACTION, POSITIVE, WHOLE, Parser, autocast, evaluate, pick_device
from mlae import PATTERNS, mask_rates, set_mask_prob

# Flags left out take these. vtab-1k and fgvc: the field's common recipe (AdapterPlus) on the MLAE paper's backbone.
RECIPE = {"model": "vit_base_patch16_224.orig_in21k", "epochs": 100, "lr": 1e-3, "drop_path": 0.1}
PRESETS = {
    "vtab-1k": RECIPE,
    "fgvc": RECIPE,
    "demo": {"model": "vit_nano", "epochs": 20, "lr": 8e-3, "drop_path": 0.0},
    "pretraining": {"model": "vit_nano", "epochs": 12, "lr": 1e-3, "drop_path": 0.1},
}
LIBRARIES = (torch, torchvision, timm)
SCHEDULES = {
    "constant": lambda progress: 1.0,
    "increase": lambda progress: progress,
    "decrease": lambda progress: 1.0 - progress,
}


class Diverged(models.ModelError):
    """Training ended in a loss that is not finite."""


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear from peak / warmup at step 0 to peak, then half a cosine towards 0 at step `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def run(args: argparse.Namespace) -> dict:
    """One run, from arguments to files; returns what `metrics.json` holds."""
    # the run's folder: the same arguments, and the same checkpoint, give the same folder
    scratch = args.checkpoint == "none"
    local = args.checkpoint and not scratch
    settings = vars(args) | {
        "checkpoint": evaluation.sha256(args.checkpoint) if local else None,
        "scratch": scratch,
    }
    for name in ("device", "workers", "out", "resume", "seeds"):
        del settings[name]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    short = args.model.replace("/", "_").replace(":", "_")
    folder = Path(
        args.out, args.dataset, f"{args.method}-{short}-seed{args.seed}{'-val' * args.val}-{digest}"
    )
    metrics_file, state_file = folder / "metrics.json", folder / "state.pt"
    metrics = evaluation.finished(metrics_file) if args.resume else None
    if metrics and not metrics["benchmark"].startswith("not "):  # a subset may have become whole
        print(f"finished: {folder} (remove it to run it again)")
        return metrics

    # seed and device
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    amp = evaluation.resolve_amp(args.amp, device)

    # data
    load = {
        "name": args.dataset,
        "root": os.path.abspath(args.data_dir),
        "img_size": args.img_size,
        "source": args.source,
    }
    load["split"] = "train" if args.val else "trainval"
    train, test = data.load(**load)
    if train.source in data.SOURCES:
        load["source"] = train.source  # what eval.py is to read, whatever is there by then
    if metrics and metrics["data"] == test.about:
        print(f"finished: {folder} (remove it to run it again)")
        return metrics
    test.check(args.workers)

    # model
    same = (
        "method",
        "img_size",
        "drop_path",
        "rank",
        "mask_prob",
        "masking",
        "targets",
        "coef_init",
    )
    create = {name: getattr(args, name) for name in same} | {
        "name": args.model,
        "num_classes": data.TASKS[args.dataset].classes,
        "pretrained": not scratch,
        "checkpoint": os.path.abspath(args.checkpoint) if local else None,
        "pattern": args.mask_pattern,
    }
    model = models.create(**create).to(device)
    cfg, counts = model.pretrained_cfg, models.count_parameters(model)
    mean, std = data.NORMALIZE.get(args.normalize) or (cfg["mean"], cfg["std"])
    normalize = data.normalizer(mean, std, device)
    num_layers = len(models.experts(model))
    if args.grad_checkpoint:
        models.recompute_blocks(model)
    augment = data.TASKS[args.dataset].benchmark == "fgvc"
    if augment:
        train.hold(args.workers)
    else:
        images, labels = train.tensors(device, args.workers)  # (N, 3, S, S) uint8, (N,)

    # optimizer: no weight decay for vectors (lambda, biases, norms) and for what timm exempts (position embeddings)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = [{"params": [], "weight_decay": decay} for decay in (args.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim < 2 or name in exempt]["params"].append(parameter)
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, fused=True
    )  # one call for all tensors, on every device
    scaler = torch.amp.GradScaler(
        device.type, enabled=amp == "fp16"
    )  # keeps small gradients above fp16's smallest
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    steps, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)

    # from here on the run writes
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise models.ModelError(f"--out: cannot make {folder}: {error.strerror}") from error
    metrics_file.unlink(missing_ok=True)
    config = {
        "arguments": vars(args),
        "load": load,
        "create": create,
        "mean": mean,
        "std": std,
        "amp": amp,
        "weights": evaluation.provenance(model, create["checkpoint"], create["pretrained"]),
        "data": test.about,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in LIBRARIES},
        "git": evaluation.git_hash(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    head, trained = counts["head_parameters"], counts["trainable_parameters"]
    print(
        f"{args.method} on {args.dataset}: {train.about}; {config['weights']['tag']}, {args.img_size} px, {device}"
    )
    print(
        f"{trained - head:,} + {head:,} (head) of {counts['total_parameters']:,} parameters train:",
        end=" ",
    )
    print(
        ", ".join(
            f"{sum(p.numel() for p in g['params']):,} with decay {g['weight_decay']:g}"
            for g in groups
        )
    )

    # training
    if args.compile:
        torch.compiler.reset()  # else the models of earlier runs count towards its limit of recompilations
    net = (
        torch.compile(model, dynamic=True) if args.compile else model
    )  # one graph for every p and batch size
    epoch, rows, seconds, fingerprint = 0, [], 0.0, train.fingerprint()
    if args.resume and state_file.exists():
        epoch, rows, seconds = restore(state_file, model, optimizer, scaler, fingerprint) or (
            0,
            [],
            0.0,
        )
        print(f"resumed after epoch {epoch} of {folder}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bar = tqdm(total=steps, initial=epoch * steps_per_epoch, unit="step", disable=None)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and args.method != "full":
            module.eval()  # its running statistics belong to the frozen base
    for epoch in range(epoch, args.epochs):  # noqa: B020
        start = time.perf_counter()
        p = 0.0
        if args.method == "mlae" and args.masking != "fixed":
            p = args.mask_prob * SCHEDULES[args.mask_schedule](epoch / max(1, args.epochs - 1))
            set_mask_prob(model, mask_rates(args.mask_pattern, num_layers, p).tolist())
        order = torch.randperm(
            len(train), generator=torch.Generator().manual_seed(args.seed * 10_007 + epoch)
        )
        if augment:
            batches = train.batches(
                args.batch_size, args.workers, order.tolist(), f"{args.seed} {epoch}"
            )
        else:
            batches = (
                (images[batch], labels[batch]) for batch in order.to(device).split(args.batch_size)
            )
        loss_sum = correct = torch.zeros((), device=device)
        for i, (x, y) in enumerate(batches):  # (B, 3, S, S) uint8, (B,)
            lr = learning_rate(epoch * steps_per_epoch + i, steps, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            for part, wanted in zip(
                x.chunk(args.accumulate), y.to(device).chunk(args.accumulate), strict=True
            ):
                with autocast(device, amp):
                    logits = net(normalize(part))  # (B / accumulate, classes)
                loss = F.cross_entropy(logits.float(), wanted, label_smoothing=args.label_smoothing)
                scaler.scale(loss * (len(part) / len(x))).backward()
                loss_sum = loss_sum + loss.detach() * len(part)
                correct = correct + (logits.detach().argmax(1) == wanted).sum()
            if args.grad_checkpoint and any(
                p.grad is None for group in groups for p in group["params"]
            ):
                raise models.ModelError(
                    f"--grad-checkpoint: timm {timm.__version__} loses gradients; pip install -U timm"
                )
            scaler.step(optimizer)
            scaler.update()
            if (
                bar.update()
            ):  # it shows something new, some ten times a second at most: time to ask the device
                bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.1e}", refresh=False)
        mean_loss, train_top1 = loss_sum.item() / len(train), 100 * correct.item() / len(train)
        if not math.isfinite(mean_loss):
            raise Diverged(
                f"the loss is {mean_loss} in epoch {epoch + 1}: --lr {args.lr:g} is too high"
            )
        seconds += time.perf_counter() - start
        rows.append(
            [epoch + 1, lr, p, round(mean_loss, 6), round(train_top1, 2), round(seconds, 2)]
        )
        with open(folder / "log.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [["epoch", "lr", "mask_prob", "loss", "train_top1", "seconds"], *rows]
            )
        save_state(state_file, model, optimizer, scaler, fingerprint, epoch + 1, rows, seconds)
    bar.close()
    models.save_adapter(model, folder / "adapter.safetensors", config)

    # the one evaluation, with the last weights
    scores = evaluate(model, test, normalize, amp=amp, workers=args.workers)
    split = "val" if args.val else "test"
    metrics = {
        "dataset": args.dataset,
        "method": args.method,
        "model": config["weights"]["tag"],
        "seed": args.seed,
        f"{split}_top1": scores["top1"],
        f"{split}_loss": scores["loss"],
        "data": test.about,
        "benchmark": test.benchmark,
        "trainable_parameters": counts["trainable_parameters"],
        "head_parameters": counts["head_parameters"],
        "train_seconds": round(seconds, 1),
        "peak_memory_mb": evaluation.peak_memory_mb(device),
        "run": str(folder),
    }
    metrics_file.with_suffix(".tmp").write_text(json.dumps(metrics))
    os.replace(metrics_file.with_suffix(".tmp"), metrics_file)
    state_file.unlink()
    return metrics


def save_state(path: Path, model: torch.nn.Module, optimizer, scaler, data: str, *progress) -> None:
    """All that `restore` needs to go on as if nothing had happened; written whole or not at all."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {
        "model": models.adapter_state(model),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": [torch.get_rng_state(), cuda],
        "data": data,
        "progress": progress,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def restore(path: Path, model: torch.nn.Module, optimizer, scaler, data: str) -> tuple | None:
    """Load what `save_state` wrote; returns its progress: epochs done, log rows, seconds. None if the data changed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights, moments, scale, (cpu, cuda) = (
            state[key] for key in ("model", "optimizer", "scaler", "rng")
        )
    except Exception as error:  # whatever a damaged file makes torch raise
        raise models.ModelError(f"cannot read {path}: remove it to start anew") from error
    if state.get("data") != data:
        print(f"the training images are not those of {path}: starting anew")
        return None
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(moments)
    scaler.load_state_dict(scale)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    return state["progress"]


HELP = {
    "dataset": "a task of data.py's table, or vtab or fgvc, all of theirs (default: digits, the embedded demo)",
    "source": "of vtab-1k: the prepared folder, the originals, or auto: originals unless they cannot be had",
    "normalize": "channel mean and std: ImageNet's, as most published results, the model's, none (default: imagenet)",
    "targets": "ends of layer paths: attn.qkv attn.q attn.k attn.v attn.proj mlp.fc1 mlp.fc2 (default: attn.qkv)",
    "coef_init": "start of every lambda; for lora its frozen value alpha / rank (default: 1, that is alpha = rank)",
    "mask_schedule": "p over the epochs: p, from 0 to p, from p to 0 (default: constant, as published)",
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    # data
    flag("--dataset", default="digits", help=HELP["dataset"])
    flag(
        "--data-dir",
        default="data",
        help="holds originals, vtab-1k/<task>/, fgvc/<set>/ (default: data)",
    )
    flag("--source", choices=data.SOURCES, default="auto", help=HELP["source"])
    flag("--img-size", type=COUNT, help="side in pixels (default: the model's own)")
    flag(
        "--normalize",
        choices=[*data.NORMALIZE, "model"],
        default="imagenet",
        help=HELP["normalize"],
    )
    # model
    flag(
        "--model",
        help="timm name with its tag (default: the paper's ViT-B/16 IN-21k; vit_nano for digits)",
    )
    flag(
        "--checkpoint",
        help="local .safetensors, .pth or Google .npz; none: random (default: timm's download)",
    )
    flag(
        "--method",
        choices=models.METHODS,
        default="mlae",
        help="what trains beside the head (default: mlae)",
    )
    flag("--targets", nargs="+", default=["attn.qkv"], metavar="PATH", help=HELP["targets"])
    flag(
        "--rank",
        type=COUNT,
        default=8,
        help="experts a layer (default: 8; 0.30 M parameters on ViT-B)",
    )
    flag("--coef-init", type=POSITIVE, default=1.0, help=HELP["coef_init"])
    # masking
    flag(
        "--mask-prob",
        type=FRACTION,
        default=0.5,
        help="masking probability p (default: 0.5, the paper's middle)",
    )
    flag(
        "--masking",
        choices=models.MASKINGS,
        default="stochastic",
        help="default: stochastic, the paper's best",
    )
    flag(
        "--mask-pattern",
        choices=PATTERNS,
        default="random",
        help="p over depth (default: random, p everywhere)",
    )
    flag("--mask-schedule", choices=SCHEDULES, default="constant", help=HELP["mask_schedule"])
    # optimization
    flag(
        "--epochs",
        type=COUNT,
        help="passes over the images (default: 100, the common recipe; digits 20)",
    )
    flag(
        "--batch-size",
        type=COUNT,
        default=64,
        help="default: 64, as published; no image is dropped",
    )
    flag(
        "--lr",
        type=POSITIVE,
        help="AdamW's peak (default: 1e-3, the common recipe; digits 8e-3, by val200)",
    )
    flag(
        "--weight-decay",
        type=FRACTION,
        default=1e-4,
        help="of matrices only (default: 1e-4, as published)",
    )
    flag(
        "--warmup-epochs",
        type=float,
        help="linear, then cosine to 0 (default: a tenth of the epochs)",
    )
    flag(
        "--drop-path",
        type=FRACTION,
        help="stochastic depth (default: 0.1, the common recipe; digits and linear 0)",
    )
    flag(
        "--label-smoothing",
        type=FRACTION,
        default=0.0,
        help="of the cross-entropy (default: 0, none)",
    )
    # run
    flag(
        "--seed",
        type=WHOLE,
        default=0,
        help="of head, experts, masks, order, drop-path, crops (default: 0)",
    )
    flag(
        "--seeds",
        type=WHOLE,
        nargs="+",
        metavar="SEED",
        help="one run each, then mean and standard deviation",
    )
    flag(
        "--val",
        action="store_true",
        help="train on 800, score val200, leave the test set alone: to choose settings",
    )
    flag(
        "--amp",
        choices=AMP,
        default="auto",
        help="mixed precision (default: bf16 where CUDA has it)",
    )
    flag(
        "--compile",
        action="store_true",
        help="torch.compile (default: off; compiling takes longer than the demo)",
    )
    flag(
        "--grad-checkpoint",
        action="store_true",
        help="recompute blocks backwards: less memory, more time",
    )
    flag(
        "--accumulate",
        type=COUNT,
        default=1,
        help="parts of a batch, one mask each (default: 1, as published)",
    )
    flag(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="default: auto, the fastest here",
    )
    flag(
        "--workers",
        type=WHOLE,
        default=4,
        help="processes that decode images (default: 4; 0: none)",
    )
    flag("--out", default="runs", help="where run folders go (default: runs)")
    flag("--resume", action="store_true", help="go on after the last whole epoch of the same run")
    args = parser.parse_args(argv)
    name = {"vtab_1k": "vtab", "vtab1k": "vtab"}.get(
        key := args.dataset.lower().replace("-", "_"), key
    )
    suite = data.SUITES.get(name)
    args.resume |= bool(suite)  # a suite goes on where it stopped
    try:
        tasks = (
            [task for task in data.TASKS.values() if task.benchmark == suite]
            if suite
            else [data.find_task(name)]
        )
        results, missing = [], {}
        for task in tasks:
            for number in args.seeds or [args.seed]:
                try:
                    results.append(run(settle(parser, args, task, number)))
                    print(json.dumps(results[-1]), flush=True)
                except (data.DataError, Diverged) as error:
                    if not suite:
                        raise
                    missing[
                        f"{task.name}, seed {number}" if isinstance(error, Diverged) else task.name
                    ] = error
                    print(f"{task.name}: left out, see the end")
                    if isinstance(error, data.DataError):
                        break
        report = [f"left out: {len(missing)} of {len(tasks)} tasks"] if missing else []
        report += [
            f"- {task}: {str(error).removeprefix(f'{task}: ')}" for task, error in missing.items()
        ]
        if not results:
            print(*report, sep="\n")
            parser.error(
                f"--dataset {name}: not one of its {len(tasks)} tasks could run; see above"
            )
        if suite:
            print(
                evaluation.tabulate(evaluation.collect(*(result["run"] for result in results))),
                *report,
                sep="\n",
            )
        if suite or len(results) > 1:
            print(json.dumps(evaluation.summarize(results, name if suite else tasks[0].name)))
    except (data.DataError, models.ModelError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(
            "interrupted: the same command with --resume goes on after the last whole epoch",
            file=sys.stderr,
        )
        sys.exit(130)


def settle(
    parser: Parser, args: argparse.Namespace, task: data.Task, number: int
) -> argparse.Namespace:
    """The arguments of one run: those given, and for those left out what suits the task."""
    args = argparse.Namespace(**vars(args) | {"dataset": task.name, "seed": number})
    if args.drop_path is None and args.method == "linear":
        args.drop_path = 0.0  # noise in a backbone that nothing adapts
    for name, value in PRESETS[task.benchmark].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    if not 0 <= args.warmup_epochs < args.epochs:
        parser.error(
            f"--warmup-epochs {args.warmup_epochs:g} must be from 0 to below --epochs {args.epochs}"
        )
    if args.accumulate > args.batch_size:
        parser.error(
            f"--accumulate {args.accumulate} must not be above --batch-size {args.batch_size}"
        )
    if args.mask_schedule != "constant" and args.masking == "fixed":
        parser.error(
            f"--mask-schedule {args.mask_schedule} needs --masking stochastic or mixed: fixed masks stay"
        )
    args.img_size = args.img_size or models.input_size(args.model)
    return args


if __name__ == "__main__":
    main()
