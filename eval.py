"""Score a finished run again, from its own files, as it was trained and merged.

    python eval.py runs/digits/mlae-vit_nano-seed0-...
    python eval.py RUN --predictions answers.csv --features embeddings.npz    # of the scored images
    python eval.py RUN --predict photos/            # a CSV of the five likeliest classes of each
    python eval.py RUN --export onnx model.onnx     # or timm, torch, peft
    python eval.py RUN --prune 4                    # the 4 most important experts of each layer

It rebuilds the model of `config.json` with the weights of `adapter.safetensors`, scores it on the
run's images (the test set; val200 after `--val`) and says whether the model merged into a plain
timm model agrees. Exit code 0 if it does, 1 if not. Nothing is written but what a flag names, and
nothing that is there already is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flags import parse_eval

if __name__ == "__main__":
    parse_eval(__doc__, None)  # --help and typing errors need not wait for torch

import torch
from huggingface_hub import constants as hub
from torch import Tensor, nn

import data
import model as models
import photos
import predictions
import prune
from backbone import count_parameters, eval_mode, weights_of
from baselines import METHODS
from configs import LARGEST, look_in, read_config
from export import AGREE, FORMATS, Base, check_place, export, preparation
from files import NUMBER, RunError, check_new, read_json
from predictions import class_names, report, score
from runs import autocast, one_line, pick_device


def load_data(args: argparse.Namespace, download: bool = True) -> tuple[data.Images, data.Images]:
    """The images that a run with these arguments trains on, and those that it is scored on."""
    if args.img_size > LARGEST:
        raise RunError(f"--img-size {args.img_size}: at most {LARGEST} pixels")
    return data.load(
        args.dataset,
        args.data_dir,
        split="train" if args.val else "trainval",
        img_size=args.img_size,
        source=args.source,
        download=download,
        augment=args.augment,
        cut=photos.cut_of(args),
    )


def create_model(args: argparse.Namespace, classes: int | None = None) -> nn.Module:
    """The model of a run with these arguments, before the first step, on the CPU."""
    own = {name: getattr(args, name) for name in METHODS[args.method].settings}
    return models.create(
        args.model,
        classes or data.find_task(args.dataset).classes,
        method=args.method,
        pretrained=not args.no_pretrained,
        checkpoint=args.checkpoint,
        img_size=args.img_size,
        drop_path=args.drop_path,
        targets=args.targets,
        **own,
    )


def mean_and_std(args: argparse.Namespace, model: nn.Module) -> tuple[tuple, tuple]:
    """Of the inputs, a value per channel, as the run asks for."""
    if args.normalize == "model":
        return model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    return data.NORMALIZE[args.normalize]


def create_normalizer(args: argparse.Namespace, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """(B, 3, S, S) uint8 -> float32 on the model's device, by the run's mean and std."""
    mean, std = mean_and_std(args, model)
    if not all(value > 0 for value in std):
        raise RunError(f"--normalize {args.normalize}: a standard deviation is 0")
    return data.normalizer(mean, std, next(model.parameters()).device)


def predict(
    model: nn.Module,
    images: data.Images,
    normalize: Callable[[Tensor], Tensor],
    amp: str = "off",
    workers: int = 4,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in float32 and labels (N,), on the CPU, in eval mode.

    Every module's mode is restored afterwards.
    """
    device = next(model.parameters()).device
    logits, labels = [], []
    with eval_mode(model), torch.inference_mode(), autocast(device, amp):
        for x, y in images.batches(256, workers):
            logits.append(model(normalize(x)).float())  # (B, classes)
            labels.append(y)
    return torch.cat(logits).cpu(), torch.cat(labels)


def evaluate(
    model: nn.Module, images: data.Images, normalize: Callable, **options
) -> dict[str, float]:
    """`score` of `predict`."""
    return score(*predict(model, images, normalize, **options))


def load_run(folder: str | Path, checkpoint: str | None = None) -> tuple[nn.Module, dict]:
    """(model, config) of a run: its trained model on the CPU, in eval mode, and its config.json.

    `checkpoint` says where the backbone's file is now. Raises RunError or ModelError for what is
    not a run, or if the weights are not those that it was trained on.
    """
    folder = Path(folder)
    config = read_config(folder)
    args, trained_on = config["arguments"], config["weights"]
    args.checkpoint = checkpoint or args.checkpoint
    model = create_model(args, len(config["class_names"] or []))
    weights = weights_of(model, args.checkpoint, not args.no_pretrained)
    key = "sha256" if "sha256" in trained_on else "tag"  # a file may have another name now
    if weights.get(key) != trained_on[key]:
        raise RunError(
            f"{folder} was trained on {trained_on['tag']}, not on {weights['tag']} ({key} differs)"
        )
    if "ranks" in config:  # pruned
        prune.shrink(model, config["ranks"])
    models.load_adapter(model, folder / "adapter.safetensors")
    return model.eval(), config


@contextmanager
def offline() -> Iterator[None]:
    """Inside, the hub gives what is on this machine already, and asks for nothing."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def scored_images(folder: Path, config: dict, download: bool = False) -> data.Images:
    """The test images of a run, or val200; says so if they are others than it was scored on.

    Raises RunError if its data have other classes by now.
    """
    run, then = config["arguments"], folder / "metrics.json"
    _, images = load_data(run, download)
    if images.class_names and list(images.class_names) != config["class_names"]:
        raise RunError(f"{run.dataset} has other classes than the run was trained on")
    if then.exists() and read_json(then, {}).get("digest", "") not in ("", images.digest()):
        note = "these are not the images that the run was scored on; it may have trained on some"
        print(f"note: {note}", file=sys.stderr)
    return images


def answers(
    args: argparse.Namespace, model: nn.Module, config: dict, images: data.Images
) -> tuple[Tensor, Tensor]:
    """`predict` as the run was scored; RunError for logits that are not finite."""
    normalize = create_normalizer(config["arguments"], model)
    logits, labels = predict(model, images, normalize, config["amp"], args.workers)
    if not logits.isfinite().all():
        raise RunError(f"{args.run}: the trained model's logits are not finite")
    return logits, labels


def check(args: argparse.Namespace, model: nn.Module, config: dict) -> bool:
    """Print the scores of a run unmerged and merged; whether the two agree."""
    run = config["arguments"]
    images = scored_images(args.run, config, args.download)
    tag = config["weights"]["tag"]
    counts = count_parameters(model)
    trained, head = counts["trainable"], counts["head"]
    print(f"{run.method} on {run.dataset}, {tag}, seed {run.seed}: {images.description}")
    print(f"parameters: {trained:,} trained, of them {head:,} in the head")
    split = "val" if run.val else "test"
    if (args.run / "metrics.json").exists():
        shape = {f"{split}_top1": (0, 100), f"{split}_loss": NUMBER}
        metrics = read_json(args.run / "metrics.json", shape)
        top1, loss = metrics[f"{split}_top1"], metrics[f"{split}_loss"]
        print(f"reported  top-1 {top1:.2f} %   loss {loss:.6f}")
    logits, labels = answers(args, model, config, images)
    scores = score(logits, labels)
    print(f"unmerged  top-1 {scores['top1']:.2f} %   loss {scores['loss']:.6f}")
    classes = class_names(config, logits.shape[1])
    for line in report(logits, labels, classes):
        print(f"          {line}")
    names = predictions.names_of(images, Path(images.folder or run.data_dir))
    if args.predictions:
        rows = predictions.scored(names, labels, logits, classes)
        predictions.write_csv(args.predictions, rows, "--predictions")
    if args.features:
        embed(args, model, config, images, names)
    if not METHODS[run.method].mergeable:
        print(f"{run.method} cannot be merged: its update depends on the input")
        return True
    merged, labels = answers(args, models.merge(model), config, images)
    scores = score(merged, labels)
    print(f"merged    top-1 {scores['top1']:.2f} %   loss {scores['loss']:.6f}")
    difference = (merged - logits).abs().max().item()
    agree = difference <= AGREE * max(1.0, logits.abs().max().item())
    verdict = "they agree" if agree else "they do not agree"
    print(f"largest difference of a logit {difference:.1e}: {verdict}")
    return agree


def embed(args, model: nn.Module, config: dict, images: data.Images, names: list[str]) -> None:
    """Write --features: what the head is given for each image."""
    normalize = create_normalizer(config["arguments"], model)
    net = predictions.Embedding(model)
    features, labels = predict(net, images, normalize, config["amp"], args.workers)
    predictions.write_features(args.features, features, labels, names)


def answer(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Print or write the likeliest classes of the images of --predict."""
    run, place = config["arguments"], args.predict
    images = predictions.open_images(place, run.img_size, run.augment)
    names = predictions.names_of(images, place if place.is_dir() else place.parent)
    logits, _ = answers(args, model, config, images)
    classes = class_names(config, logits.shape[1])
    rows = predictions.best(names, logits, classes, args.top_k or 5)
    predictions.show(rows, place, args.predictions)
    if args.features:
        embed(args, model, config, images, names)


def hand_out(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Export a run, compare what was written on some of its images, print how to load it."""
    run, (kind, path) = config["arguments"], args.export
    try:
        images = scored_images(args.run, config, args.download)
        batch = next(images.batches(8, 0))[0]
        compared = f"{len(batch)} images of the run"
    except data.DataError:
        batch = torch.randint(256, (8, 3, run.img_size, run.img_size), dtype=torch.uint8)
        compared = f"{len(batch)} random images (the run's are not here)"
    x = create_normalizer(run, model)(batch)
    view = data.Images([], [], run.img_size, augment=run.augment)
    about = preparation(view, *mean_and_std(run, model))
    about |= {"class_names": config["class_names"], "weights": config["weights"]}
    base = Base(run.model, model.num_classes, run.img_size, run.checkpoint, not run.no_pretrained)
    difference = export(kind, Path(path), model, models.merge, base, x, about)
    print(f"largest difference of a logit, on {compared}: {difference:.1e}")
    print(f"done; to load it:\n{FORMATS[kind].line(Path(path), base)}")


def cut(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Print accuracy against the number of experts; write the pruned run if one is asked for."""
    folder, chosen = None, args.prune[0]
    if len(args.prune) == 1:
        run = args.run.resolve()
        folder = args.out or run.with_name(f"{run.name}-prune{chosen}")
        check_new(folder, "--out")
    rows = prune.table(model, args.prune)
    images = scored_images(args.run, config, args.download)
    if not config["arguments"].val:
        print("note: this looks at the test images again; choose on a run with --val")
    prune.print_table(model, rows, lambda net: score(*answers(args, net, config, images))["top1"])
    if folder:
        prune.write(folder, prune.prune(model, rows[chosen]), config, chosen)
        print(f"python eval.py {folder}")


def main(argv: list[str] | None = None) -> None:
    args = parse_eval(__doc__, argv)
    with one_line("eval.py"):
        if args.predictions:
            check_new(args.predictions, "--predictions", ".csv")
        if args.features:
            check_new(args.features, "--features", ".npz")
        device = pick_device("cpu" if args.export else args.device)
        if args.export:
            check_place(args.export[0], Path(args.export[1]))
        agree = True
        with nullcontext() if args.download else offline():
            model, config = load_run(args.run, args.checkpoint)
            look_in(config, args.data_dir)
            model.to(device)
            if args.predict:
                answer(args, model, config)
            elif args.export:
                hand_out(args, model, config)
            elif args.prune:
                cut(args, model, config)
            else:
                agree = check(args, model, config)
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
