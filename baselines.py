"""The methods: one row of METHODS each, MLAE and what it is compared with.

    METHODS["mlae"].settings      # {"rank": 8, "mask_prob": 0.5, ...}: flags of train.py
    METHODS["lora"].layer         # the class that takes the place of a linear layer

A new method is one more row. `model.py` adapts, saves and merges models by these rows and
`train.py` calls their hooks, for every method alike; no other script names a method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlae import MLAELinear, fixed_masks, mask_rates, set_mask_prob

MASKINGS = {  # which masks act: (a new one at every step, one drawn for good)
    "stochastic": (True, False),
    "fixed": (False, True),
    "mixed": (True, True),
}
SCHEDULES = {  # the factor on p at a progress from 0 to 1 of the training
    "constant": lambda progress: 1.0,
    "increase": lambda progress: progress,
    "decrease": lambda progress: 1.0 - progress,
}


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    Attributes:
        trains: what it trains beside the head, in words.
        layer: the nn.Linear that takes the place of a linear layer, with `from_linear(linear,
            **keywords)`, `delta_weight()` and `to_linear()`; None if there is no such layer.
        settings: the method's settings with their defaults: keywords of `model.create`.
        plan: (number of layers, settings) -> the keywords of `from_linear` for each layer.
        fixed: names of the layer's parameters that do not train.
        thaws: whether a parameter of the backbone, given its name, trains too.
        targets: the layers that it adapts unless others are asked for.
        mergeable: whether its layers can be merged into plain ones.
        recipe: settings of the training that suit it better than the task's recipe.
        penalty: model -> scalar, added to the loss.
        before_step: (model, progress) is called between backward and the optimizer's step, and
            once before the first step; progress goes from 0 to 1 over the training.
        log: model -> columns of the run's log, once an epoch.
        version: to be raised when the method changes, so that its runs are others.
    """

    trains: str
    layer: type[nn.Linear] | None = None
    settings: dict = field(default_factory=dict)
    plan: Callable[[int, dict], list[dict]] = lambda num_layers, settings: [settings] * num_layers
    fixed: tuple[str, ...] = ()
    thaws: Callable[[str], bool] = lambda name: False
    targets: tuple[str, ...] = ("attn.qkv",)
    mergeable: bool = True
    recipe: dict = field(default_factory=dict)
    penalty: Callable[[nn.Module], Tensor | float] = lambda model: 0.0
    before_step: Callable[[nn.Module, float], None] = lambda model, progress: None
    log: Callable[[nn.Module], dict] = lambda model: {}
    version: int = 1

    def signature(self) -> dict:
        """What sets runs of this row apart from others under the same name: a layer of one's own,
        another version; nothing for the rows of this file."""
        own = {}
        if self.layer and self.layer.__module__ not in ("mlae", __name__):
            own["layer"] = f"{self.layer.__module__}.{self.layer.__qualname__}"
        if self.version != 1:
            own["version"] = self.version
        return own

    def own(self, given: dict) -> dict:
        """This method's settings: those given, defaults for the rest, without other methods'.

        Raises TypeError for a setting that no method has.
        """
        for name in given:
            if name not in self.settings and name not in self.foreign():
                raise TypeError(f"no method has a setting {name!r}")
        return {name: given.get(name, usual) for name, usual in self.settings.items()}

    def foreign(self) -> set[str]:
        """The names of settings that other methods have and this one does not."""
        names = set()
        for row in METHODS.values():
            names.update(row.settings)
        return names - set(self.settings)

    def complete(self, args: argparse.Namespace) -> None:
        """Fill in, in place, the targets and settings that are None; set others' aside aloud."""
        usual = self.settings | {"targets": list(self.targets)}
        for name, value in usual.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        for name in self.foreign():
            if getattr(args, name, None) is not None:
                setattr(args, name, None)
                print(f"note: {args.method} has no {name}; it is ignored", file=sys.stderr)


def mlae_layers(model: nn.Module) -> list[MLAELinear]:
    """The MLAE layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MLAELinear)]


def mlae_plan(num_layers: int, settings: dict) -> list[dict]:
    """The masking of each layer: a rate for random masks, a fixed mask drawn here, or both.

    The mask is drawn from torch's generator. Raises ValueError for a masking, rate or pattern that
    is not to be had.
    """
    masking, pattern, p = settings["masking"], settings["pattern"], settings["mask_prob"]
    if masking not in MASKINGS:
        raise ValueError(f"masking must be one of {', '.join(MASKINGS)}, not {masking!r}")
    if settings["schedule"] not in SCHEDULES:
        raise ValueError(f"mask schedule must be one of {', '.join(SCHEDULES)}")
    if settings["schedule"] != "constant" and masking == "fixed":
        raise ValueError(f"schedule {settings['schedule']} needs masking stochastic or mixed")
    rates: list = [0.0] * num_layers
    masks: list = [None] * num_layers
    every_step, for_good = MASKINGS[masking]
    if every_step:
        rates = mask_rates(pattern, num_layers, p).tolist()
    if for_good:
        masks = list(fixed_masks(pattern, num_layers, settings["rank"], p))
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
    p = settings["mask_prob"] * SCHEDULES[settings["schedule"]](progress)
    set_mask_prob(model, mask_rates(settings["pattern"], len(mlae_layers(model)), p))


def mlae_log(model: nn.Module) -> dict:
    """The mean masking probability of the layers."""
    rates = torch.tensor([layer.mask_prob for layer in mlae_layers(model)])
    return {"mask_prob": round(rates.mean().item(), 6)}


def lora_plan(num_layers: int, settings: dict) -> list[dict]:
    """LoRA (Hu et al. 2021) is MLAE without masks and with lambda fixed at alpha / rank."""
    return [settings | {"mask_prob": 0.0}] * num_layers


METHODS: dict[str, Method] = {
    "mlae": Method(
        trains="masked rank-1 experts (Wang et al. 2024)",
        layer=MLAELinear,
        settings={
            "rank": 8,
            "mask_prob": 0.5,
            "masking": "stochastic",
            "pattern": "random",
            "schedule": "constant",
            "coef_init": 1.0,
        },
        plan=mlae_plan,
        before_step=mlae_schedule,
        log=mlae_log,
    ),
    "lora": Method(
        trains="low-rank adaptation (Hu et al. 2021)",
        layer=MLAELinear,
        settings={"rank": 8, "coef_init": 1.0},
        plan=lora_plan,
        fixed=("lora_lambda",),
    ),
    "linear": Method(
        trains="nothing: a linear probe",
        recipe={"drop_path": 0.0},  # it would be noise in a backbone that nothing adapts
    ),
    "full": Method(trains="every parameter", thaws=lambda name: True),
}
