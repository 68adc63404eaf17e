"""Images of one's own for a finished run, and files of what a model says: CSV and embeddings.

images = open_images(Path("photos"), img_size=224, augment="none")
rows = best(images.names, logits, classes, k=5)
write_csv(Path("photos.csv"), rows, "--predictions")
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import ImageOps
from torch import Tensor, nn

from files import new
from images import Images, open_image
from splits import DataError

# files that are taken for images in a folder; one that is named may have any name
ENDINGS = (".png .jpg .jpeg .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm").split()


class Upright(Sequence):
    """Image files as pixels (H, W, 3) uint8, turned as their EXIF orientation says, read when
    asked for; DataError, naming the file, for one that cannot be read."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        try:
            with open_image(self.files[i]) as image:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:  # whatever a damaged file makes Pillow raise
            raise DataError(f"--predict: cannot read image {self.files[i]}: {error}") from error


def open_images(place: Path, img_size: int, augment: str) -> Images:
    """The images of a file or a folder, in the order of their names, with labels -1.

    They are resized and cropped like a run's test images: `augment` and `img_size` as for `Images`.
    Raises DataError if there is none.
    """
    files = [place]
    if place.is_dir():
        inside = sorted(place.rglob("*"))
        files = [path for path in inside if path.suffix.lower() in ENDINGS and path.is_file()]
    elif not place.is_file():
        raise DataError(f"--predict: there is no image and no folder {place}")
    if not files:
        raise DataError(f"--predict: no image in {place} ({' '.join(ENDINGS)})")
    return Images(Upright(files), [-1] * len(files), img_size, augment=augment)


def names_of(images: Images, root: Path) -> list[str]:
    """The path of each image below `root`, whole if it lies elsewhere; its number if no file."""
    files = images.files.files if isinstance(images.files, Upright) else images.files
    names = []
    for i, file in enumerate(files):
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
        row = {"image": name, "label": classes[labels[i]], "prediction": classes[predictions[i]]}
        rows.append(row | {"probability": f"{probabilities[i]:.6f}"})
    return rows


def best(names: list[str], logits: Tensor, classes: list[str], k: int) -> list[dict]:
    """k rows an image, or as many as there are classes: the most probable classes, in order."""
    probabilities, predictions = logits.double().softmax(1).topk(min(k, len(classes)))
    rows = []
    for name, likely, guesses in zip(names, probabilities, predictions, strict=True):
        for rank, (probability, guess) in enumerate(zip(likely, guesses, strict=True), 1):
            row = {"image": name, "rank": rank, "prediction": classes[guess]}
            rows.append(row | {"probability": f"{probability:.6f}"})
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
    arrays = {"features": features.numpy(), "labels": labels.numpy(), "images": np.array(names)}
    with new(path, "--features") as draft, open(draft, "wb") as file:
        np.savez(file, **arrays)
