"""What a model sees of an image: the whole of it, a crop, a mirror image; as numbers of what scale.

VIEWS["crop"].test(image, 224)                  # its centre, 224 x 224
VIEWS["crop"].draw(image, 224, "0 0 17")        # a random crop: the same for the same key
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

BICUBIC = TF.InterpolationMode.BICUBIC
SCALE = (0.08, 1.0)  # of a random crop: its share of the image
RATIO = (3 / 4, 4 / 3)  # its width over its height
NORMALIZE = {  # channel mean and std
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def upright(image: Image.Image) -> Image.Image:
    """A photo as its EXIF orientation says, in 8 bits: Pillow would cut 16 bits off at 255."""
    image = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image) // 257
    return Image.fromarray(values.astype(np.uint8))


def whole(image: Image.Image, size: int, key: str = "") -> Image.Image:
    """The image, which is size x size already."""
    return image


def number(key: str) -> int:
    return zlib.crc32(key.encode())


def mirrored(key: str) -> bool:
    """Whether an image is mirrored: in half of all cases, the same for the same key."""
    generator = torch.Generator()
    generator.manual_seed(number(key))
    return torch.rand((), generator=generator).item() < 0.5


def flip(image: Image.Image, size: int, key: str) -> Image.Image:
    return TF.hflip(image) if mirrored(key) else image


def crop(image: Image.Image, size: int, key: str) -> Image.Image:
    """A random part of the image, maybe mirrored."""
    with torch.random.fork_rng(devices=[]):
        # the CPU's generator alone: manual_seed() would reseed the GPU's too
        torch.default_generator.manual_seed(number(key))
        box = RandomResizedCrop.get_params(image, SCALE, RATIO)
        is_mirrored = torch.rand(()) < 0.5
    image = TF.resized_crop(image, *box, [size, size], BICUBIC)
    return TF.hflip(image) if is_mirrored else image


@dataclass(frozen=True)
class View:
    """A way to train: draw(image, size, key) and test(image, size) give size x size images. An
    image comes with its short side at `margin` times the size; without, at size x size."""

    draw: Callable
    test: Callable
    margin: float | None = None


VIEWS = {
    "none": View(whole, whole),
    "flip": View(flip, whole),
    "crop": View(crop, TF.center_crop, 1 / 0.875),  # 256 pixels for 224
}


def normalizer(mean: tuple, std: tuple, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function from (B, 3, S, S) uint8 to new float32 images (x / 255 - mean) / std, one value
    per RGB channel."""
    mean = 255 * torch.tensor(mean, device=device)
    std = 255 * torch.tensor(std, device=device)
    mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    # to the device as bytes, a quarter of the way
    return lambda images: (images.to(device).float() - mean) / std
