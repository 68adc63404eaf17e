"""What logits and labels say: accuracy, calibration, and what is taken for what.

    score(logits, labels)               # {"top1": 92.22, "mean_class_top1": 92.1, "loss": 0.219427}
    print(*report(logits, labels, names), sep="\\n")

Logits are (N, classes) float32 and labels (N,) int64, on the CPU, as `eval.predict` returns them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from files import check_shape

BINS = 15  # of the calibration error
PAIRS = 5  # of classes, in the report


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 accuracy and its mean over classes, in percent, and mean cross-entropy in nats."""
    right = logits.argmax(1) == labels
    top1 = right.sum().item() / len(labels)
    mean = mean_over_classes(right, labels)
    loss = F.cross_entropy(logits, labels).item()
    return {
        "top1": round(100 * top1, 2),
        "mean_class_top1": round(100 * mean, 2),
        "loss": round(loss, 6),
    }


def mean_over_classes(right: Tensor, labels: Tensor) -> float:
    """The share of right answers (N,) of each class that occurs, averaged over these classes."""
    images = labels.bincount()  # (classes,)
    hits = labels[right].bincount(minlength=len(images))
    occurs = images > 0
    shares = hits[occurs].double() / images[occurs]
    return shares.mean().item()


def top_accuracy(logits: Tensor, labels: Tensor, k: int = 5) -> float:
    """The share of images whose class is among the k largest logits; 1 if there are k classes."""
    best = logits.topk(min(k, logits.shape[1])).indices  # (N, k)
    found = (best == labels[:, None]).any(1)
    return found.double().mean().item()


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


def confused(logits: Tensor, labels: Tensor, pairs: int = PAIRS) -> list[tuple[int, int, int, int]]:
    """(class, the class that it is taken for, how often, images of the class), the most frequent
    first; pairs that do not occur are left out."""
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(1)
    counts = cells.bincount(minlength=classes**2).view(classes, classes)
    images = counts.sum(1)
    counts.fill_diagonal_(0)
    worst = counts.flatten().argsort(descending=True, stable=True)[:pairs]
    found = []
    for cell in worst.tolist():
        label, taken = divmod(cell, classes)
        count = counts[label, taken].item()
        if count:
            found.append((label, taken, count, images[label].item()))
    return found


def report(logits: Tensor, labels: Tensor, names: list[str]) -> list[str]:
    """Lines for people: top-5, mean over classes, calibration, the most confused pairs."""
    top5 = 100 * top_accuracy(logits, labels)
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
    """The names in a run's config.json, or the numbers of the classes from 0 where it has none.

    Raises RunError if they are not as many as the classes, or no text.
    """
    names = config.get("class_names")
    if names is None:
        return [str(label) for label in range(classes)]
    check_shape(names, list, "config.json: class_names")
    check_shape(len(names), range(classes, classes + 1), "config.json: the number of class_names")
    for name in names:
        check_shape(name, str, "config.json: class_names")
    return names
