"""What lies inside trained models, as numbers: experts, masks, attention and mistakes.

    run = Run(Path("runs/digits/mlae-..."), "mlae")
    run.experts["0.qkv"], run.masks, run.attention, run.answers

Each is read or computed when it is asked for, once. It raises NoPicture, saying why, if the run
cannot have it. `pictures.py` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from backbone import architecture, create_backbone, eval_mode
from baselines import METHODS, adapters
from configs import look_in
from eval import create_normalizer, load_run, offline, predict, scored_images
from files import RunError
from mlae import MLAELinear, expert_similarity
from predictions import class_names, confusion
from prune import importance

SHOWN = 6  # test images whose attention is drawn


class NoPicture(RunError):
    """A run that cannot have such a picture."""


@dataclass
class Run:
    """A run that pictures look into: what is asked for is read once. Nothing is fetched.

    `name` says in a few words which it is; `data_dir` and `checkpoint`: where these are now.
    """

    folder: Path
    name: str
    device: str | torch.device = "cpu"
    data_dir: str | None = None
    checkpoint: str | None = None

    @cached_property
    def trained(self) -> tuple[nn.Module, dict]:
        """The model on the device, and config.json."""
        with offline():
            model, config = load_run(self.folder, self.checkpoint)
        return model.to(self.device), config

    @cached_property
    def images(self) -> data.Images:
        """What the run was scored on: the test images, or val200."""
        _, config = self.trained
        look_in(config, self.data_dir)
        return scored_images(self.folder, config)

    @cached_property
    def answers(self) -> tuple[Tensor, Tensor]:
        """The class that the model gives each image (N,), and the right one (N,)."""
        model, config = self.trained
        normalize = create_normalizer(config["arguments"], model)
        logits, labels = predict(model, WithBar(self.images), normalize, config["amp"])
        return logits.argmax(1), labels

    @cached_property
    def confusion(self) -> Tensor:
        """How many images of each class (rows) the model takes for each (columns)."""
        return confusion(*self.answers, len(self.classes))

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes, or their numbers."""
        model, config = self.trained
        return class_names(config, model.num_classes)

    @cached_property
    def experts(self) -> dict[str, MLAELinear]:
        """The layers whose experts have a lambda of their own, by a short name as in 0.qkv."""
        model, _ = self.trained
        found = {}
        for path, layer in adapters(model).items():
            words = path.split(".")
            numbers = [word for word in words if word.isdigit()]
            if hasattr(layer, "lora_lambda"):
                found[".".join([*numbers, words[-1]])] = layer
        if not found:
            raise NoPicture(f"{self.name} has no experts with a lambda")
        if len({layer.rank for layer in found.values()}) > 1:
            raise NoPicture(f"{self.name} was pruned to layers of different ranks")
        return found

    @cached_property
    def masks(self) -> tuple[Tensor, Tensor]:
        """The fixed masks (layers, rank), and the share of the experts that a step keeps (layers,
        epochs) as each epoch ends."""
        model, config = self.trained
        args = config["arguments"]
        layers = self.experts.values()
        fixed = torch.stack([layer.expert_mask for layer in layers]).cpu()
        rates = []
        for epoch in range(args.epochs):
            METHODS[args.method].before_step(model, (epoch + 1) / args.epochs)
            rates.append([1 - layer.mask_prob for layer in layers])
        rates = torch.tensor(rates).T
        if (fixed == 1).all() and (rates == 1).all():
            raise NoPicture(f"{self.name} masks no expert")
        return fixed, rates

    @cached_property
    def attention(self) -> Attention:
        """What the class token looks at before and after, in the first images of some classes."""
        model, config = self.trained
        args = config["arguments"]
        if args.no_pretrained:
            raise NoPicture(f"{self.name} had no pre-trained backbone to compare with")
        with offline():
            base = create_backbone(
                args.model,
                model.num_classes,
                checkpoint=args.checkpoint,
                img_size=args.img_size,
            ).to(self.device)
        right = self.images.labels.tolist()
        labels = sorted(set(right))[:SHOWN]
        images = torch.stack([self.images[right.index(label)][0] for label in labels])
        x = create_normalizer(args, model)(images)
        before, _ = class_attention(base, x)
        after, logits = class_attention(model, x)
        if torch.equal(before, after):
            raise NoPicture(f"{self.name} leaves the backbone's attention as it is")
        names = [self.classes[label] for label in labels]
        answers = [self.classes[answer] for answer in logits.argmax(1)]
        maps = patch_map(model, before), patch_map(model, after)
        return Attention(images, names, *maps, answers)


@dataclass
class Attention:
    """Images (N, 3, S, S) and their classes' names; the shares of the class token's attention that
    the patches have before and after adaptation (N, side, side), and the classes it says after."""

    images: Tensor
    names: list[str]
    before: Tensor
    after: Tensor
    answers: list[str]


@dataclass
class WithBar:
    """Images whose batches move a bar, if they take longer than two seconds."""

    images: data.Images

    def batches(self, size: int, workers: int) -> Iterator:
        total = math.ceil(len(self.images) / size)
        batches = self.images.batches(size, workers)
        return tqdm(batches, "test images", total, leave=False, disable=None, delay=2)


def similarity(layer: MLAELinear) -> Tensor:
    """|cosine| of every two experts (rank, rank), on the CPU; nan on the diagonal and for experts
    that are masked for good."""
    cosines = expert_similarity(layer).abs()
    acts = layer.expert_mask != 0
    both = acts[:, None] & acts
    return cosines.where(both, torch.nan).fill_diagonal_(torch.nan).cpu()


@torch.no_grad()
def magnitudes(layer: MLAELinear) -> tuple[Tensor, Tensor]:
    """|lambda| and the importance |lambda| |a| |b| of each expert (rank,), on the CPU; nan for
    those that are masked for good."""
    acts = layer.expert_mask != 0
    size = layer.lora_lambda.abs().where(acts, torch.nan)
    return size.cpu(), importance(layer).where(acts, torch.nan).cpu()


@torch.no_grad()
def class_attention(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the class token of the last block attends to, the mean over heads (B, tokens), each row
    with sum 1; and the logits (B, classes). x: (B, 3, S, S), normalized.

    Raises NoPicture for a model without a class token, or whose attention is not timm's.
    """
    if getattr(model, "cls_token", None) is None:
        raise NoPicture(f"{architecture(model)} has no class token")
    blocks = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not blocks or not hasattr(blocks[-1], "attn_drop"):
        raise NoPicture(f"the attention of {architecture(model)} cannot be seen from outside")
    last = blocks[-1]
    seen = []
    hook = last.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    fused = last.fused_attn
    last.fused_attn = False  # torch's fused kernel never has it whole
    try:
        with eval_mode(model):
            logits = model(x)
    finally:
        hook.remove()
        last.fused_attn = fused
    return seen[0][:, :, 0].mean(1), logits  # of (B, heads, queries, tokens)


def patch_map(model: nn.Module, attention: Tensor) -> Tensor:
    """Attention (B, tokens) as a map of the image's patches (B, side, side)."""
    patches = attention[:, getattr(model, "num_prefix_tokens", 1) :]
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side)).float().cpu()
