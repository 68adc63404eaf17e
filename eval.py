"""Score a finished run again, from its own files, as it was trained and merged.

    python eval.py runs/digits/mlae-vit_nano-seed0-...

It rebuilds the model of `config.json` with the weights of `adapter.safetensors`, scores it on the
run's images (the test set; val200 after `--val`) and says whether the model merged into a plain
timm model agrees. Exit code 0 if it does, 1 if not.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import constants as hub
from torch import Tensor, nn

import data
import model as models
import photos
from backbone import ModelError, count_parameters, create_backbone, eval_mode, weights_of
from baselines import METHODS
from files import NUMBER, RunError, check_shape, read_json
from flags import AMP, DEVICES, WHOLE, Parser, train_parser
from runs import autocast, one_line, pick_device

AGREE = 1e-4  # largest difference of a logit between the merged model and the one that was trained

LARGEST = 4096  # side of an image in pixels
# what config.json must hold, and by the type of its default, a setting of the method
CONFIG = {
    "arguments": {
        "dataset": str | os.PathLike,  # a folder's name need not be printable
        "data_dir": str | os.PathLike,  # need not be printable
        "source": str,
        "img_size": range(1, LARGEST + 1),
        "normalize": str,
        "model": str,
        "checkpoint": str | None,
        "no_pretrained": bool,
        "method": str,
        "targets": list,
        "drop_path": (0, math.nextafter(1, 0)),
        "seed": range(2**31),
        "val": bool,
    },
    "weights": {"tag": str},
    "amp": str,
    "source": str,
}
SETTINGS = {int: range(1, 2**31), float: (0, torch.finfo(torch.float32).max), str: str, bool: bool}


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


def adapter_size(method: str, sizes: Sequence[tuple[int, int]], **settings) -> int:
    """How many parameters a method trains in layers of these (in_features, out_features)."""
    row, count = METHODS[method], 0
    own = row.own(settings)
    plan = row.plan(len(sizes), own)
    for (inputs, outputs), keywords in zip(sizes, plan, strict=True):
        layer = row.layer(inputs, outputs, device="meta", **keywords)
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and name not in row.fixed(own):
                count += parameter.numel()
    return count


def nearest_rank(method: str, sizes: Sequence[tuple[int, int]], budget: int, **settings) -> int:
    """The rank at which `adapter_size` comes nearest to a number of parameters.

    Raises ValueError for a method that has no rank, or no layers.
    """
    if "rank" not in METHODS[method].settings or not sizes:
        raise ValueError(f"{method} has no rank to choose")
    off = {}  # rank -> how far it is from the budget
    for rank in itertools.count(1):
        try:
            off[rank] = adapter_size(method, sizes, **settings, rank=rank) - budget
        except ValueError:
            if rank % 2 == 0:  # a kernel refuses odd ranks; another setting is wrong
                raise
        if off.get(rank, -1) >= 0:
            break
    return min(off, key=lambda rank: abs(off[rank]))


def rank_within(args: argparse.Namespace) -> int:
    """The rank at which a run's adapters come nearest to args.budget parameters, head not counted.

    Raises ModelError for a method without a rank.
    """
    plain = create_backbone(args.model, 1, pretrained=False, img_size=args.img_size)
    sizes = []
    for name, rows in models.find_layers(plain, args.targets).items():
        linear = plain.get_submodule(name)
        sizes.append((linear.in_features, len(rows) if rows else linear.out_features))
    names = METHODS[args.method].settings.keys() - {"rank"}
    settings = {name: getattr(args, name) for name in names}
    try:
        rank = nearest_rank(args.method, sizes, args.budget, **settings)
    except ValueError as error:
        raise ModelError(f"--budget: {error}") from error
    count = adapter_size(args.method, sizes, rank=rank, **settings)
    print(f"--budget {args.budget:,}: rank {rank} is nearest, with {count:,} parameters")
    return rank


def create_normalizer(
    args: argparse.Namespace, model: nn.Module, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """(B, 3, S, S) uint8 -> float32 on the device, by the mean and std that the run asks for."""
    if args.normalize == "model":
        mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    else:
        mean, std = data.NORMALIZE[args.normalize]
    if not all(value > 0 for value in std):
        raise RunError(f"--normalize {args.normalize}: a standard deviation is 0")
    return data.normalizer(mean, std, device)


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


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 accuracy (%), its mean over the classes that occur, mean cross-entropy (nats)."""
    is_right = logits.argmax(1) == labels
    counts = labels.bincount()
    share = labels[is_right].bincount(minlength=len(counts)) / counts  # nan of an absent class
    loss = F.cross_entropy(logits, labels).item()
    return {
        "top1": round(100 * is_right.sum().item() / len(labels), 2),
        "mean_class_top1": round(100 * share.nanmean().item(), 2),
        "loss": round(loss, 6),
    }


def evaluate(
    model: nn.Module, images: data.Images, normalize: Callable, **options
) -> dict[str, float]:
    """`score` of `predict`."""
    return score(*predict(model, images, normalize, **options))


def read_config(folder: Path) -> dict:
    """A run's config.json, its arguments as a Namespace.

    Raises RunError if there is none, a value cannot be right, or today's code does not know its
    task, method or another word.
    """
    path = folder / "config.json"
    try:
        config = read_json(path, CONFIG)
    except RunError as error:
        raise RunError(f"{folder} is not a run of train.py: {error}") from None
    given, names = config["arguments"], config.setdefault("class_names", None)
    for name, usual in vars(train_parser().parse_args([])).items():
        given.setdefault(name, usual)  # a run from before there was such a flag
    check_shape(names, list | None, f"{path}: class_names")
    for name in names or []:
        check_shape(name, str, f"{path}: class_names")
    check_shape(given, photos.FLAGS, f"{path}: arguments")
    is_own = names and os.path.isabs(given["dataset"])  # its folder need not be here
    words = {
        "dataset": (given["dataset"], [given["dataset"]] if is_own else data.TASKS),
        "augment": (given["augment"], [None, *data.VIEWS]),
        "method": (given["method"], METHODS),
        "normalize": (given["normalize"], [*data.NORMALIZE, "model"]),
        "source": (given["source"], data.SOURCES),
        "amp": (config["amp"], AMP[1:]),
    }
    for name, (word, known) in words.items():
        if word not in known:
            raise RunError(f"{path}: {name} {word} is unknown here")
    if not given["augment"]:
        given["augment"] = data.TASKS[given["dataset"]].recipe["augment"]
    for name, usual in METHODS[given["method"]].settings.items():
        given.setdefault(name, usual)  # a run from before there was such a setting
        shape = SETTINGS.get(type(usual), object)
        check_shape(given, {name: shape}, f"{path}: arguments")
    for target in given["targets"]:
        check_shape(target, str, f"{path}: arguments: targets")
    config["arguments"] = argparse.Namespace(**given)
    return config


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


def check(
    folder: Path,
    data_dir: str | None,
    checkpoint: str | None,
    device: torch.device,
    workers: int,
    download: bool = False,
) -> bool:
    """Print the scores of a run unmerged and merged; whether the two agree.

    A stranger's run may name any data and weights: what is not here is fetched with `download`
    alone.
    """
    with nullcontext() if download else offline():
        model, config = load_run(folder, checkpoint)
    args = config["arguments"]
    if os.path.isabs(args.dataset):
        args.dataset = os.path.abspath(data_dir or args.dataset)
    args.data_dir = data_dir or args.data_dir
    if config["source"] in data.SOURCES:
        args.source = config["source"]  # what was read then, whatever else is there now
    model.to(device)
    normalize = create_normalizer(args, model, device)
    _, images = load_data(args, download)
    if images.class_names and list(images.class_names) != config["class_names"]:
        raise RunError(f"{args.dataset} has other classes than {folder} was trained on")

    tag = config["weights"]["tag"]
    counts = count_parameters(model)
    trained, head = counts["trainable"], counts["head"]
    print(f"{args.method} on {args.dataset}, {tag}, seed {args.seed}: {images.description}")
    print(f"parameters: {trained:,} trained, of them {head:,} in the head")
    split = "val" if args.val else "test"
    if (folder / "metrics.json").exists():
        shape = {f"{split}_top1": (0, 100), f"{split}_loss": NUMBER}
        metrics = read_json(folder / "metrics.json", shape)
        top1, loss = metrics[f"{split}_top1"], metrics[f"{split}_loss"]
        print(f"reported  top-1 {top1:.2f} %   loss {loss:.6f}")
    logits, labels = predict(model, images, normalize, config["amp"], workers)
    if not logits.isfinite().all():
        raise RunError(f"{folder}: the trained model's logits are not finite")
    scores = score(logits, labels)
    print(f"unmerged  top-1 {scores['top1']:.2f} %   loss {scores['loss']:.6f}")
    if not METHODS[args.method].mergeable:
        print(f"{args.method} cannot be merged: its update depends on the input")
        return True
    merged, labels = predict(models.merge(model), images, normalize, config["amp"], workers)
    scores = score(merged, labels)
    print(f"merged    top-1 {scores['top1']:.2f} %   loss {scores['loss']:.6f}")
    difference = (merged - logits).abs().max().item()
    agree = difference <= AGREE
    verdict = "they agree" if agree else "they do not agree"
    print(f"largest difference of a logit {difference:.1e}: {verdict}")
    return agree


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("run", type=Path, help="a run's folder")
    flag("--data-dir", help="where data, or your images, are now (default: where they were)")
    flag("--checkpoint", help="where the backbone's file is now (default: where it was)")
    flag("--download", action="store_true", help="fetch data and weights that are not here")
    flag("--device", choices=DEVICES, default="auto", help="default: auto, the fastest here")
    flag("--workers", type=WHOLE, default=4, help="image-decoding processes (0: the main process)")
    args = parser.parse_args(argv)
    with one_line("eval.py"):
        device = pick_device(args.device)
        places = args.data_dir, args.checkpoint
        agree = check(args.run, *places, device, args.workers, args.download)
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
