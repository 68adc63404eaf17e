"""MLAE's masks over many layers and over the training; `mlae.py` has those of one layer.

    keywords = mlae_plan(["blocks.0.attn.qkv", "blocks.1.attn.qkv"], settings)  # for each layer
    mlae_schedule(model, 0.5)                            # half of the training is done

How often an expert is masked, `mask_prob`, is one number p, or one for each target:
{"attn.qkv": 0.5, "mlp.fc1": 0.3}. Its pattern spreads it over the depth of the model: with one
number over all adapted layers, with several over the layers of each target by themselves, so that
every target has its own p as the mean. Its schedule multiplies all of them, step by step.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence

import torch
from torch import nn

from mlae import MLAELinear, expert_similarity, fixed_masks, mask_rates, set_mask_prob

MASKINGS = {  # which masks act: (a new one at every step, one drawn for good)
    "stochastic": (True, False),
    "fixed": (False, True),
    "mixed": (True, True),
}
SCHEDULES = {  # the factor on p at a progress from 0 to 1 of the training
    "constant": lambda progress: 1.0,
    "increase": lambda progress: progress,
    "decrease": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
    "off-at-end": lambda progress: min(1.0, 10 * (1 - progress)),  # over the last tenth
}


def mlae_layers(model: nn.Module) -> dict[str, MLAELinear]:
    """Path -> MLAE layer of a model, in the order of its modules."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MLAELinear):
            found[name] = module
    return found


def ends_in(name: str, target: str) -> bool:
    """Whether a layer is of a target: its path ends so. A fused attn.qkv is also of attn.q."""
    fused = re.sub(r"\b[qkv]$", "qkv", target)
    return f".{name}".endswith((f".{target}", f".{fused}"))


def groups(names: Sequence[str], mask_prob: float | dict) -> list[tuple[float, list[int]]]:
    """[(p, numbers of the layers that have it as their mean), ...], in the order of the layers.

    All layers are one group if `mask_prob` is a number, else those of a target are. Raises
    ValueError for a layer without a p, or with two, and for a target without layers.
    """
    if not isinstance(mask_prob, dict):
        return [(mask_prob, list(range(len(names))))]
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        targets = []
        for target in sorted(mask_prob):
            if ends_in(name, target):
                targets.append(target)
        if not targets:
            hint = "suite.py wants commas between the targets of one setting"
            raise ValueError(f"--mask-prob has no value for {name}, which is adapted too; {hint}")
        if len({mask_prob[target] for target in targets}) > 1:
            words = " and ".join(targets)
            raise ValueError(f"--mask-prob: {words} share {name}: give them the same value")
        members.setdefault(targets[0], []).append(number)
    for target in mask_prob:
        if not any(ends_in(name, target) for name in names):
            raise ValueError(f"--mask-prob {target}: no adapted layer has a name that ends so")
    return [(mask_prob[target], numbers) for target, numbers in members.items()]


def layer_rates(names: Sequence[str], settings: dict, factor: float = 1.0) -> list[float]:
    """The masking probability of each layer; `factor` is the schedule's."""
    rates = [0.0] * len(names)
    for p, numbers in groups(names, settings["mask_prob"]):
        spread = mask_rates(settings["pattern"], len(numbers), p * factor)
        for number, rate in zip(numbers, spread.tolist(), strict=True):
            rates[number] = rate
    return rates


def mlae_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """The masking of each layer: a rate for random masks, a fixed mask drawn here, or both.

    The mask is drawn from torch's generator. Raises ValueError for a masking, rate or pattern that
    is not to be had.
    """
    masking, pattern = settings["masking"], settings["pattern"]
    if masking not in MASKINGS:
        raise ValueError(f"--masking must be one of {', '.join(MASKINGS)}, not {masking!r}")
    if settings["schedule"] not in SCHEDULES:
        raise ValueError(f"--mask-schedule must be one of {', '.join(SCHEDULES)}")
    if settings["schedule"] != "constant" and masking == "fixed":
        raise ValueError(f"schedule {settings['schedule']} needs masking stochastic or mixed")
    rates: list = [0.0] * len(names)
    masks: list = [None] * len(names)
    every_step, for_good = MASKINGS[masking]
    if every_step:
        rates = layer_rates(names, settings)
    if for_good:
        for p, numbers in groups(names, settings["mask_prob"]):
            drawn = fixed_masks(pattern, len(numbers), settings["rank"], p)
            for number, mask in zip(numbers, drawn, strict=True):
                masks[number] = mask
    shared = {"rank": settings["rank"], "coef_init": settings["coef_init"]}
    plan = []
    for rate, mask in zip(rates, masks, strict=True):
        plan.append(shared | {"mask_prob": rate, "expert_mask": mask})
    return plan


def mlae_schedule(model: nn.Module, progress: float) -> None:
    """Set the masking probability p of the next step: p times the schedule at this progress."""
    settings = model.method_settings
    every_step, _ = MASKINGS[settings["masking"]]
    if settings["schedule"] == "constant" or not every_step:
        return
    factor = SCHEDULES[settings["schedule"]](progress)
    rates = layer_rates(list(mlae_layers(model)), settings, factor)
    set_mask_prob(model, torch.tensor(rates, dtype=torch.float64))


def mlae_log(model: nn.Module) -> dict:
    """The mean masking probability of the layers, and the similarity of their experts."""
    rates = torch.tensor([layer.mask_prob for layer in mlae_layers(model).values()])
    return {"mask_prob": round(rates.mean().item(), 6)} | similarity_log(model)


def similarity_log(model: nn.Module) -> dict:
    """The mean |cosine| of two experts of a layer that are not masked for good, over the layers."""
    means = []
    for layer in mlae_layers(model).values():
        acts = layer.expert_mask.bool()
        cosines = expert_similarity(layer)[acts][:, acts].abs()  # (active, active)
        pairs = len(cosines) * (len(cosines) - 1)
        if pairs:
            means.append((cosines.sum() - cosines.trace()).item() / pairs)
    return {"similarity": statistics.mean(means) if means else 0.0}
