"""What a model says of images: how right it is, and files of its answers.

    score(logits, labels)               # {"top1": 92.22, "mean_class_top1": 92.1, "loss": 0.219427}
    images = open_images(Path("photos"), img_size=224, augment="none")
    write_csv(Path("photos.csv"), best(names, logits, classes, k=5), "--predictions")

Logits are (N, classes) float32 and labels (N,) int64, on the CPU, as `eval.predict` returns them.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn

from files import few, new
from folders import ENDINGS, files_below, is_image, unreadable
from images import Images
from splits import DataError

BINS = 15  # of the calibration error
PAIRS = 5  # of classes, in the report


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 accuracy and its mean over classes, in percent, and mean cross-entropy in nats."""
    counts = confusion(logits.argmax(1), labels, logits.shape[1])
    images = counts.sum(1)  # of each class
    occurs = images > 0
    shares = counts.diag()[occurs].double() / images[occurs]
    mean = shares.mean().item()
    top1 = counts.trace().item() / len(labels)
    loss = F.cross_entropy(logits, labels).item()
    return {
        "top1": round(100 * top1, 2),
        "mean_class_top1": round(100 * mean, 2),
        "loss": round(loss, 6),
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
    place = (confidence * bins).ceil().long()
    place = place.clamp(1, bins) - 1
    gap = (prediction == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64)
    sums.index_add_(0, place, gap)
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
    mean = score(logits, labels)["mean_class_top1"]
    error = 100 * calibration_error(logits, labels)
    lines = [
        f"top-5 {top5:.2f} %",
        f"mean over classes {mean:.2f} %",
        f"calibration error {error:.2f} % ({BINS} bins)",
    ]
    for label, taken, count, images in confused(logits, labels):
        lines.append(f"{names[label]} taken for {names[taken]}: {count} of {images}")
    return lines


def class_names(config: dict, classes: int) -> list[str]:
    """The names in a run's config.json, or the numbers of the classes from 0 where it has none."""
    return config["class_names"] or [str(label) for label in range(classes)]


def open_images(place: Path, img_size: int, augment: str) -> Images:
    """The images of a file or a folder, in the order of their names, with labels -1.

    They are turned as their EXIF orientation says, then resized and cropped like a run's test
    images: `augment` and `img_size` as for `Images`. Raises DataError if there is none.
    """
    files = [place]
    if place.is_dir():
        files = [path for path in files_below(place) if is_image(path) and path.is_file()]
    elif not place.is_file():
        raise DataError(f"--predict: there is no image and no folder {place}")
    bad = unreadable(files) if place.is_dir() else {}
    names = few([path.name for path in bad])
    files = [path for path in files if path not in bad]
    if not files:
        what = f"it cannot read {names}" if bad else " ".join(ENDINGS)
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


def scored(names: list[str], labels: Tensor, logits: Tensor, classes: list[str]) -> list[dict]:
    """A row an image: its label, the prediction, and the probability that the model gives it."""
    probabilities, predictions = logits.double().softmax(1).max(1)
    rows = []
    for i, name in enumerate(names):
        label = classes[labels[i]]
        guess = classes[predictions[i]]
        row = {"image": name, "label": label, "prediction": guess}
        row["probability"] = f"{probabilities[i]:.6f}"
        rows.append(row)
    return rows


def best(names: list[str], logits: Tensor, classes: list[str], k: int) -> list[dict]:
    """k rows an image, or as many as there are classes: the most probable classes, in order."""
    k = min(k, len(classes))
    probabilities, predictions = logits.double().softmax(1).topk(k)  # (N, k)
    rows = []
    for i, name in enumerate(names):
        for rank in range(k):
            guess = classes[predictions[i, rank]]
            row = {"image": name, "rank": rank + 1, "prediction": guess}
            row["probability"] = f"{probabilities[i, rank]:.6f}"
            rows.append(row)
    return rows


def print_csv(rows: list[dict], file: TextIO) -> None:
    """Write the rows, with a line of their keys first."""
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def write_csv(path: Path, rows: list[dict], flag: str) -> None:
    """`print_csv` to a new file; RunError, naming the flag, if it cannot be written."""
    escape = "surrogateescape"  # a file's name may be no text
    with (
        new(path, flag) as draft,
        open(draft, "w", newline="", encoding="utf-8", errors=escape) as file,
    ):
        print_csv(rows, file)


def show(rows: list[dict], place: Path, file: Path | None) -> None:
    """The rows of `best`: into a file if there is one; else as CSV for a folder, or as lines."""
    if file:
        write_csv(file, rows, "--predictions")
    elif place.is_dir():
        print_csv(rows, sys.stdout)
    else:
        for row in rows:
            print(f"{float(row['probability']):7.2%}  {row['prediction']}")


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
    arrays = {"features": features.numpy(), "labels": labels.numpy()}
    arrays["images"] = np.array(names)
    with new(path, "--features") as draft, open(draft, "wb") as file:
        np.savez(file, **arrays)
