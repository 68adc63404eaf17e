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
import copy
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants as hub
from timm.utils import accuracy
from torch import Tensor, nn

import data
from data import DataError, Images, create_normalizer, load_data, mean_and_std
from export import AGREE, FORMATS, Base, check_place, export, preparation
from methods import METHODS, mlae_layers
from mlae import MLAELinear
from model import (
    ModelError,
    count_parameters,
    create_model,
    eval_mode,
    few,
    load_adapter,
    merge,
    save_adapter,
    weights_of,
)
from runs import (
    COUNT,
    DEVICES,
    WHOLE,
    RunError,
    autocast,
    check_new,
    new_file,
    new_parser,
    one_line,
    pick_device,
    point_to,
    read_config,
    read_json,
    write_json,
)

BINS = 15  # of the calibration error
PAIRS = 5  # of classes, in the report


# --- a run and its images -------------------------------------------------------------------------


def load_run(folder: str | Path, checkpoint: str | None = None) -> tuple[nn.Module, dict]:
    """(model, config) of a run: its trained model on the CPU, in eval mode, and its config.json.

    `checkpoint` says where the backbone's file is now. Raises RunError or ModelError for what is
    not a run, or if the weights are not those that it was trained on.
    """
    folder = Path(folder)
    config = read_config(folder)
    args, trained_on = config["arguments"], config["weights"]
    args.checkpoint = checkpoint or args.checkpoint
    task = data.TASKS.get(args.dataset)
    model = create_model(args, len(config["class_names"]) if not task else task.classes)
    weights = weights_of(model, args.checkpoint, not args.no_pretrained)
    key = "sha256" if "sha256" in trained_on else "tag"  # a file may have another name now
    if weights.get(key) != trained_on[key]:
        raise RunError(
            f"{folder} was trained on {trained_on['tag']}, not on {weights['tag']} ({key} differs)"
        )
    if "ranks" in config:  # pruned
        shrink(model, config["ranks"])
    load_adapter(model, folder / "adapter.safetensors")
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


def scored_images(folder: Path, config: dict, download: bool = False) -> Images:
    """The test images of a run, or val200; says so if they are others than it was scored on.

    Raises RunError if its data have other classes by now.
    """
    args, then = config["arguments"], folder / "metrics.json"
    _, images = load_data(args, download)
    if images.class_names and list(images.class_names) != config["class_names"]:
        raise RunError(f"{args.dataset} has other classes than the run was trained on")
    if then.exists() and read_json(then).get("digest", "") not in ("", images.digest()):
        note = "these are not the images that the run was scored on; it may have trained on some"
        print(f"note: {note}", file=sys.stderr)
    return images


def images_to_predict(place: Path, img_size: int, augment: str) -> Images:
    """The images of a file or a folder, in the order of their names, with labels -1.

    They are turned as their EXIF orientation says, then resized and cropped like a run's test
    images: `augment` and `img_size` as for `Images`. Raises DataError if there is none.
    """
    files, bad = [place], {}
    if place.is_dir():
        files = [path for path in data.files_below(place) if data.is_image(path)]
        bad = data.unreadable(files)
        files = [path for path in files if path not in bad]
    elif not place.is_file():
        raise DataError(f"--predict: there is no image and no folder {place}")
    names = few([path.name for path in bad])
    if not files:
        what = f"it cannot read {names}" if bad else " ".join(data.ENDINGS)
        raise DataError(f"--predict: no readable image in {place} ({what})")
    if bad:
        print(f"left out: {len(bad)} files that cannot be read: {names}", file=sys.stderr)
    return Images(files, [-1] * len(files), img_size, augment=augment, upright=True)


def names_of(images: Images, root: Path) -> list[str]:
    """The path of each image below `root`, whole if it lies elsewhere; its number if no file."""
    names = []
    for i, file in enumerate(images.files):
        if not isinstance(file, Path):
            names.append(str(i))
        elif file.is_relative_to(root):
            names.append(file.relative_to(root).as_posix())
        else:
            names.append(str(file))
    return names


def class_names(config: dict, classes: int) -> list[str]:
    """The names in a run's config.json, or the numbers of the classes from 0 where it has none."""
    return config["class_names"] or [str(label) for label in range(classes)]


# --- scores ---------------------------------------------------------------------------------------


def predict(
    model: nn.Module,
    images: Images,
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


def evaluate(model: nn.Module, images: Images, normalize: Callable, **options) -> dict[str, float]:
    """`score` of `predict`."""
    return score(*predict(model, images, normalize, **options))


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 accuracy and its mean over classes, in percent, and mean cross-entropy in nats."""
    counts = confusion(logits.argmax(1), labels, logits.shape[1])
    images = counts.sum(1)  # of each class
    occurs = images > 0
    shares = counts.diag()[occurs].double() / images[occurs]
    return {
        "top1": round(100 * (counts.trace().item() / len(labels)), 2),
        "mean_class_top1": round(100 * shares.mean().item(), 2),
        "loss": round(F.cross_entropy(logits, labels).item(), 6),
    }


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many images of each class (rows) are taken for each (columns)."""
    cells = labels * classes + predicted  # (N,)
    return cells.bincount(minlength=classes**2).view(classes, classes)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error, from 0 to 1 (Guo et al. 2017, arXiv 1706.04599).

        ECE = sum_b n_b / N |accuracy_b - confidence_b|

    Bin b of B holds the n_b of N images whose largest probability lies in ((b - 1) / B, b / B];
    its accuracy is their share of right answers, its confidence the mean of that probability.
    """
    confidence, prediction = logits.double().softmax(1).max(1)  # (N,)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (prediction == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gap)
    return sums.abs().sum().item() / len(labels)


def confused(logits: Tensor, labels: Tensor) -> list[tuple[int, int, int, int]]:
    """(class, the class that it is taken for, how often, images of the class), the most frequent
    first; pairs that do not occur are left out."""
    classes = logits.shape[1]
    counts = confusion(logits.argmax(1), labels, classes)
    images = counts.sum(1)
    counts.fill_diagonal_(0)
    worst = counts.flatten().argsort(descending=True, stable=True)[:PAIRS]
    found = []
    for cell in worst.tolist():
        label, taken = divmod(cell, classes)
        count = counts[label, taken].item()
        if count:
            found.append((label, taken, count, images[label].item()))
    return found


def report(logits: Tensor, labels: Tensor, names: list[str]) -> list[str]:
    """Lines for people: top-5, mean over classes, calibration, the most confused pairs."""
    (top5,) = accuracy(logits, labels, (5,))  # percent
    error = 100 * calibration_error(logits, labels)
    lines = [
        f"top-5 {top5:.2f} %",
        f"mean over classes {score(logits, labels)['mean_class_top1']:.2f} %",
        f"calibration error {error:.2f} % ({BINS} bins)",
    ]
    for label, taken, count, images in confused(logits, labels):
        lines.append(f"{names[label]} taken for {names[taken]}: {count} of {images}")
    return lines


# --- answers, in files ----------------------------------------------------------------------------


def best(names: list[str], logits: Tensor, classes: list[str], k: int) -> list[dict]:
    """k rows an image, or as many as there are classes: the most probable classes, in order."""
    k = min(k, len(classes))
    probabilities, predictions = logits.double().softmax(1).topk(k)  # (N, k)
    rows = []
    for i, name in enumerate(names):
        for rank in range(k):
            guess, p = classes[predictions[i, rank]], f"{probabilities[i, rank]:.6f}"
            rows.append({"image": name, "rank": rank + 1, "prediction": guess, "probability": p})
    return rows


def scored(names: list[str], labels: Tensor, logits: Tensor, classes: list[str]) -> list[dict]:
    """A row an image: its label, the prediction, and the probability that the model gives it."""
    rows = []
    for row, label in zip(best(names, logits, classes, 1), labels.tolist(), strict=True):
        own = {"image": row["image"], "label": classes[label]}
        rows.append(own | {key: row[key] for key in ("prediction", "probability")})
    return rows


def print_csv(rows: list[dict], file) -> None:
    """Write the rows, with a line of their keys first."""
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    """`print_csv` to a new file; RunError if it cannot be written."""
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # any file name
    with new_file(path, "--predictions") as draft, open(draft, "w", **options) as file:
        print_csv(rows, file)


class Embedding(nn.Module):
    """A timm model without its classifier: (B, 3, S, S) -> (B, D), what its head is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x)
        return self.model.forward_head(features, pre_logits=True).flatten(1)


def write_features(path: Path, features: Tensor, labels: Tensor, names: list[str]) -> None:
    """A new .npz file: features (N, D) float32, labels (N,) int64 with -1 for none, images (N,)."""
    arrays = {"features": features.numpy(), "labels": labels.numpy(), "images": np.array(names)}
    with new_file(path, "--features") as draft, open(draft, "wb") as file:
        np.savez(file, **arrays)


# --- pruning --------------------------------------------------------------------------------------


def layers_with_experts(model: nn.Module) -> dict[str, MLAELinear]:
    """The layers with experts by path; ModelError if there are none."""
    layers = mlae_layers(model)
    if not layers or not all(hasattr(layer, "lora_lambda") for layer in layers.values()):
        method = getattr(model, "method", type(model).__name__)
        raise ModelError(f"--prune: {method} has no experts with a lambda of their own")
    return layers


@torch.no_grad()
def importance(layer: MLAELinear) -> Tensor:
    """|m_i lambda_i| |a_i| |b_i| (rank,) in float64: the Frobenius norm of what expert i adds to
    the weight; 0 for an expert that is masked for good."""
    coefficient = layer.lora_lambda * layer.expert_mask
    rows = layer.lora_A.double().norm(dim=1)
    columns = layer.lora_B.double().norm(dim=0)
    return coefficient.double().abs() * rows * columns


def kept_experts(model: nn.Module, amount: int | float) -> dict[str, list[int]]:
    """Path -> numbers of the experts that stay, in their order; of equals the first.

    A whole `amount` is the number of experts of each layer, a fraction the share over all layers,
    of which a layer may then keep none. Raises ModelError for a number above the rank.
    """
    scores = {name: importance(layer) for name, layer in layers_with_experts(model).items()}
    if isinstance(amount, int):
        most = max(map(len, scores.values()))
        if not 1 <= amount <= most:
            raise ModelError(f"--prune {amount}: a layer has {most} experts")
        return {name: _largest(values, amount) for name, values in scores.items()}
    overall = torch.cat(list(scores.values()))  # (experts of all layers,)
    stays = torch.zeros(len(overall), dtype=torch.bool)
    stays[_largest(overall, max(1, round(amount * len(overall))))] = True
    sizes = list(map(len, scores.values()))
    parts = zip(scores, stays.split(sizes), strict=True)
    return {name: own.nonzero().flatten().tolist() for name, own in parts}


def _largest(values: Tensor, count: int) -> list[int]:
    order = values.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def prune(model: nn.Module, experts: dict[str, list[int]]) -> nn.Module:
    """A copy of the model whose layers hold these experts alone."""
    smaller = copy.deepcopy(model)
    for name, numbers in experts.items():
        _select(smaller.get_submodule(name), numbers)
    return smaller


def shrink(model: nn.Module, ranks: dict[str, int]) -> None:
    """Give a new model's layers, in place, the ranks of a pruned run; RunError if they are not
    ranks of its layers."""
    layers = layers_with_experts(model)
    if not isinstance(ranks, dict) or ranks.keys() != layers.keys():
        raise RunError("config.json: ranks are not of the layers that the run adapts")
    for name, rank in ranks.items():
        if type(rank) is not int or rank not in range(layers[name].rank + 1):
            raise RunError(f"config.json: ranks: {name} cannot have {rank}")
        _select(layers[name], list(range(rank)))


@torch.no_grad()
def _select(layer: MLAELinear, numbers: list[int]) -> None:
    smaller = {
        "lora_A": layer.lora_A[numbers],
        "lora_B": layer.lora_B[:, numbers],
        "lora_lambda": layer.lora_lambda[numbers],
    }
    for name, values in smaller.items():
        trains = getattr(layer, name).requires_grad
        setattr(layer, name, nn.Parameter(values.contiguous(), requires_grad=trains))
    layer.expert_mask = layer.expert_mask[numbers]
    layer.rank = len(numbers)


def size(model: nn.Module) -> tuple[int, int]:
    """(experts, parameters of the experts) over all layers of a model, its head not counted."""
    experts = parameters = 0
    for layer in layers_with_experts(model).values():
        experts += layer.rank
        for factor in (layer.lora_A, layer.lora_B, layer.lora_lambda):
            parameters += factor.numel()
    return experts, parameters


def amounts_to_show(model: nn.Module, amounts: Sequence[int | float]) -> list[int | float]:
    """One amount is seen among rank, rank / 2 and so on; several as they are."""
    if len(amounts) > 1:
        return list(amounts)
    step = max(layer.rank for layer in layers_with_experts(model).values())
    steps = set(amounts)
    while step:
        steps.add(step)
        step //= 2
    return sorted(steps, reverse=True)


# --- the command line -----------------------------------------------------------------------------


def answers(
    args: argparse.Namespace, model: nn.Module, config: dict, images: Images
) -> tuple[Tensor, Tensor]:
    """`predict` as the run was scored; RunError for logits that are not finite."""
    normalize = create_normalizer(config["arguments"], model)
    logits, labels = predict(model, images, normalize, config["amp"], args.workers)
    if not logits.isfinite().all():
        raise RunError(f"{args.run}: the trained model's logits are not finite")
    return logits, labels


def write_embeddings(args, model, config: dict, images: Images, names: list[str]) -> None:
    """Write --features: what the head is given for each image."""
    normalize = create_normalizer(config["arguments"], model)
    features, labels = predict(Embedding(model), images, normalize, config["amp"], args.workers)
    write_features(args.features, features, labels, names)


def check(args: argparse.Namespace, model: nn.Module, config: dict) -> bool:
    """Print the scores of a run unmerged and merged; whether the two agree."""
    run = config["arguments"]
    images = scored_images(args.run, config, args.download)
    counts = count_parameters(model)
    tag = config["weights"]["tag"]
    print(f"{run.method} on {run.dataset}, {tag}, seed {run.seed}: {images.description}")
    print("parameters: {trainable:,} trained, of them {head:,} in the head".format(**counts))
    split = "val" if run.val else "test"
    if (args.run / "metrics.json").exists():
        metrics = read_json(args.run / "metrics.json")
        top1, loss = metrics.get(f"{split}_top1"), metrics.get(f"{split}_loss")
        print(f"reported  top-1 {top1:.2f} %   loss {loss:.6f}")
    logits, labels = answers(args, model, config, images)
    print("unmerged  top-1 {top1:.2f} %   loss {loss:.6f}".format(**score(logits, labels)))
    classes = class_names(config, logits.shape[1])
    for line in report(logits, labels, classes):
        print(f"          {line}")
    names = names_of(images, Path(images.folder or run.data_dir))
    if args.predictions:
        write_csv(args.predictions, scored(names, labels, logits, classes))
    if args.features:
        write_embeddings(args, model, config, images, names)
    if not METHODS[run.method].mergeable:
        print(f"{run.method} cannot be merged: its update depends on the input")
        return True
    merged, labels = answers(args, merge(model), config, images)
    print("merged    top-1 {top1:.2f} %   loss {loss:.6f}".format(**score(merged, labels)))
    difference = (merged - logits).abs().max().item()
    agree = difference <= AGREE * max(1.0, logits.abs().max().item())
    verdict = "they agree" if agree else "they do not agree"
    print(f"largest difference of a logit {difference:.1e}: {verdict}")
    return agree


def answer(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Print or write the likeliest classes of the images of --predict."""
    run, place = config["arguments"], args.predict
    images = images_to_predict(place, run.img_size, run.augment)
    names = names_of(images, place if place.is_dir() else place.parent)
    logits, _ = answers(args, model, config, images)
    classes = class_names(config, logits.shape[1])
    rows = best(names, logits, classes, args.top_k or 5)
    if args.predictions:
        write_csv(args.predictions, rows)
    elif place.is_dir():
        print_csv(rows, sys.stdout)
    else:
        for row in rows:
            print(f"{float(row['probability']):7.2%}  {row['prediction']}")
    if args.features:
        write_embeddings(args, model, config, images, names)


def hand_out(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Export a run, compare what was written on some of its images, print how to load it."""
    run, (kind, path) = config["arguments"], args.export
    try:
        images = scored_images(args.run, config, args.download)
        batch = next(images.batches(8, 0))[0]
        compared = f"{len(batch)} images of the run"
    except DataError:
        batch = torch.randint(256, (8, 3, run.img_size, run.img_size), dtype=torch.uint8)
        compared = f"{len(batch)} random images (the run's are not here)"
    x = create_normalizer(run, model)(batch)
    about = preparation(
        Images([], [], run.img_size, augment=run.augment), *mean_and_std(run, model)
    )
    about |= {"class_names": config["class_names"], "weights": config["weights"]}
    base = Base(run.model, model.num_classes, run.img_size, run.checkpoint, not run.no_pretrained)
    difference = export(kind, Path(path), model, base, x, about)
    print(f"largest difference of a logit, on {compared}: {difference:.1e}")
    print(f"done; to load it:\n{FORMATS[kind].line(Path(path), base)}")


def cut(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Print accuracy against the number of experts; write the pruned run if one is asked for."""
    folder, chosen = None, args.prune[0]
    if len(args.prune) == 1:
        run = args.run.resolve()
        folder = args.out or run.with_name(f"{run.name}-prune{chosen}")
        check_new(folder, "--out")
    rows = {}
    for amount in amounts_to_show(model, args.prune):
        rows[amount] = kept_experts(model, amount)
    images = scored_images(args.run, config, args.download)
    if not config["arguments"].val:
        print("note: this looks at the test images again; choose on a run with --val")
    _, whole = size(model)
    print("  kept  experts  parameters   share   top-1")
    for amount, numbers in rows.items():
        smaller = prune(model, numbers)
        experts, parameters = size(smaller)
        top1 = score(*answers(args, smaller, config, images))["top1"]
        share = f"{parameters / whole:6.1%}"
        print(f"{amount:>6}  {experts:7}  {parameters:10,}  {share}  {top1:6.2f}")
    if folder:
        write_pruned(folder, prune(model, rows[chosen]), config, chosen)
        print(f"python eval.py {folder}")


def write_pruned(folder: Path, smaller: nn.Module, config: dict, amount: int | float) -> None:
    """Write a pruned run that `load_run` reads: config.json with the ranks, and the adapter.

    It has no metrics.json: tables of runs leave it out.
    """
    ranks = {name: layer.rank for name, layer in layers_with_experts(smaller).items()}
    config = config | {"arguments": vars(config["arguments"]), "ranks": ranks}
    config["identity"] = config["identity"] | {"pruned": amount}
    with new_file(folder, "--out") as draft:
        draft.mkdir()
        save_adapter(smaller, draft / "adapter.safetensors", config)
        write_json(draft / "config.json", config)


def experts(text: str) -> int | float:
    """A flag's type: a number of experts, or a share of all between 0 and 1."""
    value = float(text)
    if text.isdecimal() and value >= 1:
        return int(text)
    if not 0 < value < 1:
        expected = "a whole number from 1, or a share between 0 and 1"
        raise argparse.ArgumentTypeError(f"must be {expected}, not {text}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = new_parser("eval.py", __doc__)
    flag = parser.add_argument
    flag("run", type=Path, help="a run's folder")
    flag("--data-dir", help="where the data are now (default: where they were in training)")
    flag("--checkpoint", help="where the backbone's file is now (default: where it was)")
    flag("--download", action="store_true", help="fetch data and weights that are not here")
    flag("--device", choices=DEVICES, default="auto", help="default: auto, the fastest here")
    flag("--workers", type=WHOLE, default=4, help="image-decoding processes (0: the main process)")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--predict", type=Path, metavar="IMAGE|FOLDER", help="classes of images of your own")
    words = "write the model for other programs: timm, onnx, torch or peft"
    one("--export", nargs=2, metavar=("FORMAT", "PATH"), help=words)
    words = "keep K experts a layer, or a share of all; several: only print the table"
    one("--prune", nargs="+", type=experts, metavar="K", help=words)
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
    agree = True
    with one_line("eval.py"):
        if args.predictions:
            check_new(args.predictions, "--predictions", ".csv")
        if args.features:
            check_new(args.features, "--features", ".npz")
        device = pick_device("cpu" if args.export else args.device)
        if args.export:
            check_place(args.export[0], Path(args.export[1]))
        with nullcontext() if args.download else offline():
            model, config = load_run(args.run, args.checkpoint)
            point_to(config, args.data_dir)
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
