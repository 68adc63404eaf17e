"""Score a finished run again, from its own files, as it was trained and merged.

    python eval.py runs/digits/mlae-vit_nano-seed0-...
    python eval.py RUN --predictions answers.csv --features embeddings.npz  # writes these files
    python eval.py RUN --test more_photos/          # score other images, a folder for each class
    python eval.py RUN --predict photos/ --top-k 3  # a CSV of the likeliest classes of each image
    python eval.py RUN --export onnx model.onnx     # or timm, torch, peft
    python eval.py RUN --prune 4                    # the 4 most important experts of each layer

It rebuilds the model of `config.json` with the weights of `adapter.safetensors`. It scores it on
the run's images (the test set; val200 after `--val`) and says whether the model merged into a plain
timm model agrees (exit code 0; else 1). It writes only files that a flag names, and overwrites none.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants as hub
from timm.utils import accuracy
from torch import Tensor, nn

import data
import model as models
import runs
from data import DataError, Images
from export import AGREE, check_new, check_place, export
from methods import METHODS, mlae_layers
from mlae import MLAELinear
from model import ModelError, merge
from runs import COUNT, DEVICES, WHOLE, RunError, read_json, write_atomically
from splits import printable, regular, within

BINS = 15  # of the calibration error


# --- a run and its images -------------------------------------------------------------------------
def read_config(folder: str | Path) -> dict:
    """A run's config.json, its arguments as a Namespace in which nothing is left open: train.py's
    own parser reads them again. A flag that is not there, or null, takes its default; a method of
    one's own may have settings without a flag. Raises RunError if there is no such file, or today's
    code does not know its task, method or a value."""
    path = Path(folder, "config.json")
    if not path.exists():
        raise RunError(f"{folder} is not a run of train.py: there is no file {path}")
    config, parser = read_json(path), runs.train_parser()
    parser.exit_on_error = False
    with runs.reading(path):
        saved = config["arguments"]
        saved["dataset"]  # a default would be another run
        if config["amp"] not in runs.AMP[1:] or "tag" not in config["weights"]:
            raise ValueError("today's code does not know its amp or weights")
        row = models.find_method(saved["method"])
        flags = {action.dest: action.option_strings[-1] for action in parser._actions}
        words, args = [], argparse.Namespace()
        for name, value in saved.items():
            flag = flags.get(name, f"--{name}")
            if name in row.settings and name not in flags:
                setattr(args, name, value)
            elif isinstance(value, dict):
                words += [flag, *(f"{target}={p}" for target, p in value.items())]
            elif isinstance(value, list):
                words += [flag, *map(str, value)]
            elif value is True:
                words.append(flag)
            elif value is not None and value is not False:
                words.append(f"{flag}={value}")
        args, unknown = parser.parse_known_args(words, args)
        if unknown:
            raise ValueError(f"today's code does not know {' '.join(unknown)}")
        config["arguments"] = args
        names, task = config.setdefault("class_names", None), data.TASKS.get(args.dataset)
        if names and not all(map(str.isprintable, names)):
            raise ValueError("its class_names cannot be printed")
        if names and task and len(names) != task.classes:
            raise ValueError(f"it has {len(names)} class_names, not {task.classes}")
        recipe = data.FOLDER_RECIPE  # of a folder of one's own, which need not be here
        if task or not names:
            recipe = data.find_task(args.dataset).recipe
        runs.fill_in(args, recipe, row.settings, {"targets": list(row.targets)})
        args.img_size = args.img_size or models.input_size(args.model)
        config.setdefault("source", "auto")
    return config


def point_to(config: dict, data_dir: str | None) -> None:
    """Have a run's arguments find its data where they are now, and read what was read then."""
    run = config["arguments"]
    if os.path.isabs(run.dataset):  # a folder of one's own, which may have moved
        run.dataset = os.path.abspath(data_dir or run.dataset)
    run.data_dir = data_dir or run.data_dir
    if config["source"] in data.SOURCES:
        run.source = config["source"]  # whatever else is there now


def load_run(folder: str | Path, checkpoint: str | None = None) -> tuple[nn.Module, dict]:
    """(model, config) of a run: its trained model on the CPU, in eval mode, and its config.json.
    `checkpoint` says where the backbone's file is now. Raises RunError or ModelError for what is
    not a run, or if the weights are not those that it was trained on."""
    folder = Path(folder)
    config = read_config(folder)
    args, trained_on = config["arguments"], config["weights"]
    args.checkpoint = checkpoint or args.checkpoint
    task = data.TASKS.get(args.dataset)
    classes = task.classes if task else len(config["class_names"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)  # --no-pretrained: the same random backbone
        model = models.create_model(args, classes)
    weights = models.weights_of(model, args.checkpoint, not args.no_pretrained)
    key = "sha256" if "sha256" in trained_on else "tag"  # a file may have another name now
    if weights.get(key) != trained_on[key]:
        differs = f"not on {weights['tag']} ({key} differs): name the right file with --checkpoint"
        raise RunError(f"{folder} was trained on {trained_on['tag']}, {differs}")
    if "ranks" in config:  # pruned
        with runs.reading(folder / "config.json", "its ranks are of another model; "):
            prune(model, {name: list(range(rank)) for name, rank in config["ranks"].items()})
    header = models.load_adapter(model, folder / "adapter.safetensors")
    if header.get("identity", config["identity"]) != config["identity"]:
        raise RunError(f"{folder}: adapter.safetensors and config.json are of two runs")
    return model.eval(), config


@contextmanager
def offline() -> Iterator[None]:
    """Inside, the hub gives what is on this machine already, and asks for nothing."""
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def scored_images(folder: Path, config: dict, download: bool = False) -> Images:
    """The test images of a run, or val200: of a folder of one's own those in the run's list,
    whatever has come since. A note if it was scored on others. DataError if images are gone."""
    args, then = config["arguments"], folder / "metrics.json"
    listing, top = folder / ("val.csv" if args.val else "test.csv"), Path(args.dataset)
    if top.is_absolute():
        if not top.is_dir():
            raise DataError(f"there is no folder {top}: --data-dir says where it is now")
        with runs.reading(listing):
            text = regular(listing).read_text("utf-8", "surrogateescape")
            rows = list(csv.DictReader(io.StringIO(text)))
            files = [top / within(row["path"], listing) for row in rows]
            labels = [config["class_names"].index(row["label"]) for row in rows]
        gone = [str(path) for path in files if not path.is_file()]
        if gone:
            raise DataError(f"{models.few(gone)} of {listing} are gone: give their new --data-dir")
        images = Images(files, labels, args.img_size, augment=args.augment, upright=True)
        images.folder, images.description = args.dataset, f"{len(files)} images of {listing.name}"
    else:
        try:
            _, images = data.load_data(args, download)
        except DataError as error:
            remedy = "--data-dir says where they are now, eval.py --download gets what it can"
            raise DataError(f"{error}; {remedy}") from error
    if then.exists() and read_json(then).get("digest", "") not in ("", images.digest()):
        note = "these are not the images that the run was scored on; it may have trained on some"
        print(f"note: {note}", file=sys.stderr)
    return images


def images_to_test(place: Path, config: dict, names: list[str]) -> Images:
    """All images of a folder with a folder for each class, some or all of the run's by name. Raises
    DataError if there is none, or for a class that the run does not know."""
    args, files, labels = config["arguments"], [], []
    for folder in data.entries(place, folders=True):
        name = printable(data.nfc(folder.name))
        if name not in names:
            raise DataError(f"--test {place}: the run does not know the class {name}")
        own = [file for file in data.files_below(folder) if file.suffix.lower() in data.ENDINGS]
        files += own
        labels += [names.index(name)] * len(own)
    if not files:
        raise DataError(f"--test {place}: it has no folder of a class with images in it")
    images = Images(files, labels, args.img_size, augment=args.augment, upright=True)
    images.folder = str(place)
    images.description = f"{len(files)} images of {len(set(labels))} classes in {place}"
    return images


def images_to_predict(places: list[Path], img_size: int, augment: str) -> Images:
    """The images of files and folders, those of a folder in the order of their names, with labels
    -1: turned as their EXIF orientation says, then resized and cropped like a run's test images.
    `img_size` and `augment` are as for `Images`. Raises DataError if there is none."""
    files, others = [], []
    for place in places:
        if not place.exists():
            raise DataError(f"--predict: there is no image or folder {place}")
        for path in data.files_below(place) if place.is_dir() else [place]:
            known = path.suffix.lower() in data.ENDINGS or path == place
            (files if known else others).append(path)
    bad = data.unreadable(files)
    files = [path for path in files if path not in bad]
    reasons = models.few([f"{path.name} ({why})" for path, why in bad.items()])
    if not files:
        where, what = models.few(list(map(str, places))), reasons or " ".join(data.ENDINGS)
        raise DataError(f"--predict: no readable image in {where} ({what})")
    if others:
        data.note_passed_over(others, models.few([path.name for path in others]))
    if bad:
        words = f"left out: {len(bad)} files that cannot be read: {printable(reasons)}"
        print(words, file=sys.stderr)
    return Images(files, [-1] * len(files), img_size, augment=augment, upright=True)


def class_names(config: dict, classes: int) -> list[str]:
    """The names in a run's config.json, or the numbers of the classes from 0 where it has none."""
    return config["class_names"] or [str(label) for label in range(classes)]


# --- scores ---------------------------------------------------------------------------------------
def predict(
    model: nn.Module, images: Images, normalize: Callable, amp="off", workers=4, features=False
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes), or with `features` what the head is given (N, D), in float32, and labels
    (N,), on the CPU, in eval mode. Every module's mode is restored afterwards."""
    device = next(model.parameters()).device
    outputs, labels = [], []
    with models.eval_mode(model), torch.inference_mode(), runs.autocast(device, amp):
        for x, y in images.batches(256, workers):
            x = normalize(x)  # (B, 3, S, S)
            if features:
                x = model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)
            else:
                x = model(x)
            outputs.append(x.float())  # (B, classes) or (B, D)
            labels.append(y)
    return torch.cat(outputs).cpu(), torch.cat(labels)


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


def report(logits: Tensor, labels: Tensor, names: list[str]) -> list[str]:
    """Lines for people: top-5, mean over classes, calibration, the three classes of least recall
    and the five most confused pairs."""
    (top5,) = accuracy(logits, labels, (5,))  # percent
    lines = [
        f"top-5 {top5:.2f} %",
        f"mean over classes {score(logits, labels)['mean_class_top1']:.2f} %",
        f"calibration error {100 * calibration_error(logits, labels):.2f} % ({BINS} bins)",
    ]
    counts = confusion(logits.argmax(1), labels, len(names))
    images = counts.sum(1)  # of each class
    recall = counts.diag() / images  # nan for a class without images: it comes last
    for label in recall.argsort(stable=True)[:3].tolist():
        if images[label]:
            lines.append(f"low recall: {names[label]}, {counts[label, label]} of {images[label]}")
    counts.fill_diagonal_(0)
    for cell in counts.flatten().argsort(descending=True, stable=True)[:5].tolist():
        label, taken = divmod(cell, len(names))
        if counts[label, taken]:
            times = f"{counts[label, taken]} of {images[label]}"
            lines.append(f"often confused: {names[label]} taken for {names[taken]}, {times}")
    return lines


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
    coefficient = (layer.lora_lambda * layer.expert_mask).double().abs()
    return coefficient * layer.lora_A.double().norm(dim=1) * layer.lora_B.double().norm(dim=0)


def kept_experts(model: nn.Module, amount: int | float) -> dict[str, list[int]]:
    """Path -> numbers of the experts that stay, in their order; of equals the first. A whole
    `amount` is the number of experts of each layer, a fraction the share over all layers, of which
    a layer may then keep none. Raises ModelError for a number above the rank."""
    layers = layers_with_experts(model)
    scores = [importance(layer) for layer in layers.values()]
    ranks = [len(values) for values in scores]
    if amount > max(ranks):
        raise ModelError(f"--prune {amount}: no layer has more than {max(ranks)} experts")
    groups, count = scores, amount
    if isinstance(amount, float):
        groups, count = [torch.cat(scores)], max(1, round(amount * sum(ranks)))
    places = [values.argsort(descending=True, stable=True).argsort() for values in groups]
    stays = (torch.cat(places) < count).split(ranks)  # (rank,) of each layer
    return {name: own.nonzero().flatten().tolist() for name, own in zip(layers, stays, strict=True)}


@torch.no_grad()
def prune(model: nn.Module, experts: dict[str, list[int]]) -> nn.Module:
    """Leave the layers of a model, in place, these experts alone; returns the model."""
    for path, numbers in experts.items():
        layer = model.get_submodule(path)
        for name in ("lora_A", "lora_B", "lora_lambda"):
            factor = getattr(layer, name)
            values = factor[:, numbers] if name == "lora_B" else factor[numbers]
            setattr(layer, name, nn.Parameter(values.contiguous(), factor.requires_grad))
        layer.expert_mask = layer.expert_mask[numbers]
        layer.rank = len(numbers)
    return model


# --- the command line -----------------------------------------------------------------------------
def predict_as_scored(args, model: nn.Module, config: dict, images: Images, features=False):
    """`predict` as the run was scored; RunError for values that are not finite."""
    normalize = data.create_normalizer(config["arguments"], model)
    outputs, labels = predict(model, images, normalize, config["amp"], args.workers, features)
    if not outputs.isfinite().all():
        raise RunError(f"{args.run}: its outputs are not finite: train it with a lower --lr")
    return outputs, labels


def score_run(args, model, config: dict, images: Images, logits: Tensor, labels: Tensor) -> bool:
    """Print the scores of logits (N, classes), and those of the model merged. Whether the merged
    model agrees, and the score with the run's."""
    run, metrics_file, repeats = config["arguments"], args.run / "metrics.json", True
    line = "{}  top-1 {top1:.2f} %   loss {loss:.6f}"
    own = score(logits, labels)
    if metrics_file.exists() and not args.test:
        metrics, split = read_json(metrics_file), "val" if run.val else "test"
        with runs.reading(metrics_file):
            top1, loss = float(metrics[f"{split}_top1"]), float(metrics[f"{split}_loss"])
        print(line.format("reported", top1=top1, loss=loss))
        # another device, or another version of torch, may change the answer to an image or two
        are_others = metrics.get("digest", "") not in ("", images.digest())
        repeats = are_others or abs(top1 - own["top1"]) <= max(0.5, 200 / len(labels))
    print(line.format("unmerged", **own))
    for words in report(logits, labels, class_names(config, model.num_classes)):
        print(f"          {words}")
    if not repeats:
        print("the reported score is another: metrics.json and the weights may be of two runs")
    if not METHODS[run.method].mergeable:
        print(f"{run.method} cannot be merged: its update depends on the input")
        return repeats
    merged, labels = predict_as_scored(args, merge(model), config, images)
    print(line.format("merged  ", **score(merged, labels)))
    difference = (merged - logits).abs().max().item()
    agree = difference <= AGREE * max(1.0, logits.abs().max().item())
    print(f"largest difference of a logit {difference:.1e}: they {'' if agree else 'do not '}agree")
    return agree and repeats


def score_or_predict(args: argparse.Namespace, model: nn.Module, config: dict) -> bool:
    """Score a run, or say what is on the images of --predict; write --predictions and --features.
    Whether all agrees, see `score_run`."""
    run, classes, agree = config["arguments"], class_names(config, model.num_classes), True
    if args.predict:
        images = images_to_predict(args.predict, run.img_size, run.augment)
        folders = [path if path.is_dir() else path.parent for path in args.predict]
        root = os.path.commonpath([path.absolute() for path in folders])
        logits, labels = predict_as_scored(args, model, config, images)
    else:
        if args.test:
            images = images_to_test(args.test, config, classes)
        else:
            images = scored_images(args.run, config, args.download)
        root = images.folder or run.data_dir
        about = f"{config['weights']['tag']}, seed {run.seed}: {images.description}"
        print(f"{run.method} on {run.dataset}, {about}")
        counts = models.count_parameters(model)
        print("parameters: {trainable:,} trained, of them {head:,} in the head".format(**counts))
        logits, labels = predict_as_scored(args, model, config, images)
        agree = score_run(args, model, config, images, logits, labels)

    # --- each image ---
    names = [str(i) for i in range(len(images))]
    if isinstance(images.files[0], Path):
        top = f"{Path(root).absolute().as_posix()}/"
        names = [path.absolute().as_posix().removeprefix(top) for path in images.files]
        # a table program would take a name that begins so for a formula
        names = [f"./{name}" if name[0] in "=+-@" else name for name in names]
    columns = ["image", "rank" if args.predict else "label", "prediction", "probability"]
    if args.top_k and not args.predict:
        columns.insert(2, "rank")
    top_k = args.top_k or (5 if args.predict else 1)
    probabilities, guesses = logits.double().softmax(1).topk(min(top_k, len(classes)))  # (N, k)
    rows, table = [], io.StringIO()
    for i, name in enumerate(names):
        for rank, guess in enumerate(guesses[i].tolist()):
            row = {"image": name, "label": classes[labels[i]], "rank": rank + 1}
            row |= {"prediction": classes[guess], "probability": f"{probabilities[i, rank]:.6f}"}
            rows.append(row)
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if args.predictions:
        with write_atomically(args.predictions, "--predictions") as draft:  # of any file name
            draft.write_text(table.getvalue(), "utf-8", "surrogateescape", newline="")
    elif args.predict and (len(args.predict) > 1 or args.predict[0].is_dir()):
        print("\n".join(map(printable, table.getvalue().splitlines())))
    elif args.predict:
        for row in rows:
            print(f"{float(row['probability']):7.2%}  {row['prediction']}")
    if args.features:
        features, labels = predict_as_scored(args, model, config, images, features=True)
        arrays = {"features": features.numpy(), "labels": labels.numpy(), "images": np.array(names)}
        with write_atomically(args.features, "--features") as draft, open(draft, "wb") as file:
            np.savez(file, **arrays)  # (N, D) float32, (N,) int64 with -1 for none, (N,) names
    return agree


def export_run(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Export a run, compare what was written on some of its images, print how to load it."""
    side, (kind, path) = config["arguments"].img_size, args.export
    try:
        images = scored_images(args.run, config, args.download)
        batch = next(images.batches(8, 0))[0]  # (B, 3, S, S)
        compared = f"{len(batch)} images of the run"
    except DataError:
        batch = torch.randint(256, (8, 3, side, side), dtype=torch.uint8)
        compared = f"{len(batch)} random images (the run's are not here)"
    difference, python = export(kind, Path(path), model, config, batch)
    print(f"largest difference of a logit, on {compared}: {difference:.1e}")
    print(f"written; to load it:\n{python}")


def prune_run(args: argparse.Namespace, model: nn.Module, config: dict) -> None:
    """Print accuracy against the number of experts. Of one K, write the pruned run, which
    `load_run` reads; it has no metrics.json, so that tables of runs leave it out."""
    layers, amounts, folder = layers_with_experts(model), args.prune, None
    if len(amounts) == 1:
        folder = args.out or Path(f"{args.run.resolve()}-prune{amounts[0]}")
        check_new(folder, "--out")
        rank = max(layer.rank for layer in layers.values())
        halves = [rank >> i for i in range(rank.bit_length())]  # rank, rank / 2 ... 1, to compare
        amounts = sorted({*amounts, *halves}, reverse=True)
    kept = {amount: kept_experts(model, amount) for amount in amounts}
    images = scored_images(args.run, config, args.download)
    if not config["arguments"].val:
        print("note: this looks at the test images again; choose on a run with --val")
    print("  kept  experts  parameters   share   top-1")
    width = {name: layer.lora_A.shape[1] + len(layer.lora_B) + 1 for name, layer in layers.items()}
    whole = sum(layer.rank * width[name] for name, layer in layers.items())  # parameters
    for amount, numbers in kept.items():
        smaller = prune(copy.deepcopy(model), numbers)
        count = sum(map(len, numbers.values()))
        parameters = sum(len(own) * width[name] for name, own in numbers.items())
        top1 = score(*predict_as_scored(args, smaller, config, images))["top1"]
        print(f"{amount:>6}  {count:7}  {parameters:10,}  {parameters / whole:6.1%}  {top1:6.2f}")
    if folder:
        numbers = kept[args.prune[0]]
        config |= {"arguments": vars(config["arguments"])}
        config["ranks"] = {name: len(own) for name, own in numbers.items()}
        config["identity"] |= {"pruned": args.prune[0]}
        with write_atomically(folder) as draft:
            draft.mkdir()
            adapter = draft / "adapter.safetensors"
            models.save_adapter(prune(copy.deepcopy(model), numbers), adapter, config)
            runs.write_json(draft / "config.json", config)
            for listing in ("test.csv", "val.csv"):  # what a run on one's own folder is scored on
                if (args.run / listing).exists():
                    (draft / listing).write_bytes(regular(args.run / listing).read_bytes())
        print(f"written; to score it: python eval.py {folder}")


def experts(text: str) -> int | float:
    """A flag's type: a number of experts, or a share of all between 0 and 1."""
    if text.isdecimal() and int(text):
        return int(text)
    if not 0 < float(text) < 1:
        expected = "a whole number from 1, or a share between 0 and 1"
        raise argparse.ArgumentTypeError(f"must be {expected}, not {text}")
    return float(text)


def main(argv: list[str] | None = None) -> None:
    parser = runs.new_parser("eval.py", __doc__)
    flag, one = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    flag("run", type=Path, help="folder of a run")
    flag("--data-dir", help="where the data are now (default: where they were in training)")
    flag("--checkpoint", help="where the backbone's file is now (default: where it was)")
    flag("--download", action="store_true", help="download what is missing (default: stop)")
    flag("--device", choices=DEVICES, default="auto", help="default: auto, the fastest one here")
    flag("--workers", type=WHOLE, default=4, help="processes that decode (0: the main one does)")
    one("--test", type=Path, metavar="FOLDER", help="score another folder, with a folder per class")
    words = "print the likeliest classes of these images"
    one("--predict", nargs="+", type=Path, metavar="IMAGE|FOLDER", help=words)
    words = "write the model for other programs: timm, onnx, torch or peft"
    one("--export", nargs=2, metavar=("FORMAT", "PATH"), help=words)
    words = "keep K experts of each layer, or a share of all (0.5); several: only print accuracies"
    one("--prune", nargs="+", type=experts, metavar="K", help=words)
    flag("--predictions", type=Path, metavar="FILE.csv", help="write class and probability here")
    flag("--features", type=Path, metavar="FILE.npz", help="write the features before the head")
    flag("--top-k", type=COUNT, metavar="N", help="classes per image (default: 1; --predict: 5)")
    flag("--out", type=Path, metavar="FOLDER", help="where --prune writes (default: RUN-pruneK)")
    args = parser.parse_args(argv)
    if args.top_k and not args.predict and not args.predictions:
        parser.error("--top-k goes with --predict or --predictions")
    if args.out and len(args.prune or []) != 1:
        parser.error("--out goes with --prune and one K")
    if (args.export or args.prune) and (args.predictions or args.features):
        parser.error("--predictions and --features do not go with --export or --prune")
    with runs.one_line("eval.py"):
        if args.predictions:
            check_new(args.predictions, "--predictions", ".csv")
        if args.features:
            check_new(args.features, "--features", ".npz")
        if args.export:
            check_place(args.export[0], Path(args.export[1]))
        with nullcontext() if args.download else offline():
            model, config = load_run(args.run, args.checkpoint)
            point_to(config, args.data_dir)
            model.to(runs.pick_device("cpu" if args.export else args.device))
            act = export_run if args.export else prune_run if args.prune else score_or_predict
            agree = act(args, model, config)
    sys.exit(1 if agree is False else 0)


if __name__ == "__main__":
    main()
