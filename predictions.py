"""Images of one's own for a finished run, and files of what a model says: CSV and embeddings.

images = open_images(Path("photos"), img_size=224, augment="none")
rows = best(images.names, logits, classes, k=5)
write_csv(Path("photos.csv"), rows, "--predictions")
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TextIO

import numpy as np
from torch import Tensor, nn

from files import new
from folders import ENDINGS, files_below, is_image
from images import Images
from splits import DataError


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
    if not files:
        raise DataError(f"--predict: no image in {place} ({' '.join(ENDINGS)})")
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
