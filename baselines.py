"""The methods: one row of METHODS each, MLAE and what it is compared with.

    METHODS["mlae"].settings      # {"rank": 8, "mask_prob": 0.5, ...}: flags of train.py
    METHODS["lora"].layer         # the class that takes the place of a linear layer

A new method is one more row. `model.py` adapts, saves and merges models by these rows and
`train.py` calls their hooks, for every method alike; no other script names a method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from masking import mlae_layers, mlae_log, mlae_plan, mlae_schedule, similarity_log
from mlae import MLAELinear
from snell import SNELLLinear, allocate_sparsity, reallocate

__all__ = ["METHODS", "Method", "MoRLinear", "SNELLLinear", "adapters", "allocate_sparsity"]


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    Attributes:
        trains: what it trains beside the head, in words.
        layer: the nn.Linear that takes the place of a linear layer, with `from_linear(linear,
            **keywords)`, `delta_weight()` and `to_linear()`; None if there is no such layer.
        settings: the method's settings with their defaults: keywords of `model.create`.
        by_target: the settings that may be {target: value} instead of a value.
        plan: (paths of the layers, settings) -> the keywords of `from_linear` for each layer.
        fixed: settings -> names of the layer's parameters that do not train.
        lr_factor: (name of a parameter, settings) -> its learning rate over that of the rest.
        thaws: (name of a parameter of the backbone, its module) -> whether it trains too; None if
            nothing of the backbone is meant to.
        targets: the layers that it adapts unless others are asked for.
        mergeable: whether its layers can be merged into plain ones.
        penalty: model -> scalar, added to the loss.
        before_step: (model, progress) is called between backward and the optimizer's step, and
            once before the first step; progress goes from 0 to 1 over the training.
        log: model -> columns of the run's log, once an epoch.
        version: to be raised when the method changes, so that its runs are others.
    """

    trains: str
    layer: type[nn.Linear] | None = None
    settings: dict = field(default_factory=dict)
    by_target: tuple[str, ...] = ()
    plan: Callable[[Sequence, dict], list[dict]] = lambda names, settings: [settings] * len(names)
    fixed: Callable[[dict], tuple[str, ...]] = lambda settings: ()
    lr_factor: Callable[[str, dict], float] = lambda name, settings: 1.0
    thaws: Callable[[str, nn.Module], bool] | None = None
    targets: tuple[str, ...] = ("attn.qkv",)
    mergeable: bool = True
    penalty: Callable[[nn.Module], Tensor | float] = lambda model: 0.0
    before_step: Callable[[nn.Module, float], None] = lambda model, progress: None
    log: Callable[[nn.Module], dict] = lambda model: {}
    version: int = 1

    def signature(self) -> dict:
        """What sets runs of this row apart from others under the same name: a layer of one's own,
        another version; nothing for the rows of this file."""
        own = {}
        if self.layer and self.layer.__module__ not in ("mlae", "snell", __name__):
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

    def thawed(self, model: nn.Module) -> list[str]:
        """The names of what trains in a backbone; ValueError if there is nothing for `thaws`."""
        if self.thaws is None:
            return []
        names = []
        for name, _ in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if self.thaws(name, owner):
                names.append(name)
        if not names:
            raise ValueError(f"the model has none of what this method trains: {self.trains}")
        return names

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


def mlae_lr_factor(name: str, settings: dict) -> float:
    """Lambda may learn faster or slower than the rest."""
    return settings["lambda_lr"] if name.endswith("lora_lambda") else 1.0


def lora_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """LoRA (Hu et al. 2021) is MLAE without masks and with lambda fixed at alpha / rank."""
    shared = {"rank": settings["rank"], "coef_init": settings["coef_init"]}
    return [shared | {"mask_prob": 0.0}] * len(names)


def rmlora_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """LoRA's, for RM-LoRA; raises ValueError for settings that are not to be had."""
    if settings["variant"] not in (1, 2) or settings["active_ranks"] < 1:
        raise ValueError("variant must be 1 or 2, and active_ranks at least 1")
    return lora_plan(names, settings)


def orthogonality(model: nn.Module) -> Tensor:
    """RM-LoRA's penalty: the mean over all factors of ||A A^T - I||_F and ||B^T B - I||_F."""
    norms = []
    for layer in mlae_layers(model).values():
        unit = torch.eye(layer.rank, device=layer.lora_A.device)
        for factor in (layer.lora_A, layer.lora_B.T):  # (rank, in), (rank, out)
            norms.append((factor @ factor.T - unit).norm())
    return torch.stack(norms).mean()


def mask_gradients(model: nn.Module, progress: float) -> None:
    """RM-LoRA (Mao et al. 2024, arXiv 2407.12074): LoRA of which `active_ranks` learn at a step.

    They are drawn for each layer, in variant 1 for A and B together, in 2 apart. Only gradients
    are masked: momentum and weight decay move all ranks. The first step, when B is zero, is not
    masked; nor is the head, which in the authors' code learns at the first step only.
    """
    settings, layers = model.method_settings, list(mlae_layers(model).values())
    started = any(layer.lora_B.any() for layer in layers)
    if layers[0].lora_A.grad is None or not started:
        return
    order = torch.rand(2, len(layers), settings["rank"], device="cpu").argsort(-1)
    active = (order < settings["active_ranks"]).to(layers[0].lora_A.device)  # (2, layers, rank)
    active_A, active_B = active[0], active[settings["variant"] - 1]
    for layer, rows, columns in zip(layers, active_A, active_B, strict=True):
        layer.lora_A.grad *= rows[:, None]
        layer.lora_B.grad *= columns


class MoRLinear(MLAELinear):
    """Mixture of Ranks (arXiv 2410.13408): N experts that differ in the scales of a shared LoRA.

        y = x W^T + b + sum_i g_i lB_i * (B (lA_i * (A x)))        g = softmax(router x)

    for every token, with rows lA_i of `scale_A` (N, rank) and lB_i of `scale_B` (N, out), or of as
    many outputs as there are `rows`. alpha is the rank; no loss balances the experts. The start of
    the scales is not published: here they are 1, with noise on lA, without which all experts would
    stay the same.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, rank=8, num_experts=8, **place
    ) -> None:
        super().__init__(in_features, out_features, bias, rank=rank, mask_prob=0.0, **place)
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        del self.lora_lambda, self.expert_mask  # of MLAELinear, which made the factors
        like = {"device": self.lora_A.device, "dtype": self.lora_A.dtype}
        self.scale_A = nn.Parameter(self.lora_A.new_empty(num_experts, rank).normal_(1, 0.02))
        self.scale_B = nn.Parameter(self.lora_B.new_ones(num_experts, len(self.lora_B)))
        self.router = nn.Linear(in_features, num_experts, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (..., out)
        x = x.to(self.lora_A.dtype)
        gates = self.router(x).softmax(-1)  # (..., N)
        h = gates.unsqueeze(-1) * F.linear(x, self.lora_A).unsqueeze(-2)  # (..., N, rank)
        experts = self.scale_A.unsqueeze(-1) * self.lora_B.T  # (N, rank, out)
        experts = (experts * self.scale_B.unsqueeze(1)).flatten(0, 1)  # (N rank, out)
        if self.rows is not None:
            zeros = experts.new_zeros(len(experts), self.out_features)
            experts = zeros.index_copy(1, self.rows, experts)
        return y + (h.flatten(-2) @ experts).to(y.dtype)

    def _fold_onto(self, weight: Tensor) -> Tensor:
        raise TypeError("a mixture of ranks has no one update to merge: it depends on the input")


def snella_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """Every layer of SNELLA starts at `start_sparsity`; `sparsity` is for `reallocate`."""
    if not 0 <= settings["sparsity"] < 1:
        raise ValueError(f"sparsity must be in [0, 1), not {settings['sparsity']}")
    shared = {"rank": settings["rank"], "gate": settings["gate"], "adaptive": True}
    return [shared | {"sparsity": settings["start_sparsity"]}] * len(names)


def is_layer_norm(name: str, module: nn.Module) -> bool:
    """A layer norm or its kin, by its class. A batch norm is none: its statistics would move, and
    they are not the adapter's to save."""
    return "Norm" in type(module).__name__ and not isinstance(module, _BatchNorm)


MAIN = "mlae"  # the method that the rest is compared with
ALL_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
METHODS: dict[str, Method] = {
    "mlae": Method(
        trains="masked rank-1 experts (Wang et al. 2024)",
        layer=MLAELinear,
        settings={  # the paper's, and what we found (docs/results.md)
            "rank": 8,  # 16 gain a point on the demo (results/rank)
            "mask_prob": 0.5,  # best of 0, 0.3, 0.5 on both real tasks, not the demo (results/real)
            "masking": "stochastic",  # ahead of fixed on both real tasks (results/real)
            "pattern": "random",  # of stochastic masks the best mean (results/patterns)
            "schedule": "constant",  # a rising p is ahead on the demo (results/schedules)
            "coef_init": 1.0,
            "freeze_lambda": False,  # no difference was shown (results/lambda, results/real)
            "lambda_lr": 1.0,  # nor here (results/lambda)
        },
        by_target=("mask_prob",),
        plan=mlae_plan,
        fixed=lambda settings: ("lora_lambda",) if settings["freeze_lambda"] else (),
        lr_factor=mlae_lr_factor,
        before_step=mlae_schedule,
        log=mlae_log,
    ),
    "lora": Method(
        trains="low-rank adaptation (Hu et al. 2021)",
        layer=MLAELinear,
        settings={"rank": 8, "coef_init": 1.0},
        plan=lora_plan,
        fixed=lambda settings: ("lora_lambda",),
        log=similarity_log,
    ),
    "rmlora": Method(
        trains="RM-LoRA (Mao et al. 2024)",
        layer=MLAELinear,
        settings={
            "rank": 8,
            "coef_init": 4.0,
            "penalty_weight": 0.1,
            "active_ranks": 4,
            "variant": 2,
        },
        plan=rmlora_plan,
        fixed=lambda settings: ("lora_lambda",),
        log=similarity_log,
        penalty=lambda model: model.method_settings["penalty_weight"] * orthogonality(model),
        before_step=mask_gradients,
    ),
    "mor": Method(
        trains="mixture of ranks (2024)",
        layer=MoRLinear,
        settings={"rank": 8, "num_experts": 8},
        targets=("mlp.fc1", "mlp.fc2"),
        mergeable=False,
    ),
    "snell": Method(
        trains="sparse kernel tuning (Shen et al. 2024)",
        layer=SNELLLinear,
        settings={"rank": 32, "sparsity": 0.9, "gate": "code"},
        targets=ALL_LINEARS,
    ),
    "snella": Method(
        trains="SNELL with adaptive sparsity (2025)",
        layer=SNELLLinear,
        settings={"rank": 32, "sparsity": 0.8, "start_sparsity": 0.01, "gate": "code"},
        plan=snella_plan,
        targets=ALL_LINEARS,
        before_step=reallocate,
    ),
    "bitfit": Method(trains="every bias", thaws=lambda name, module: name.endswith("bias")),
    "layernorm": Method(trains="the norms' scales and shifts", thaws=is_layer_norm),
    "linear": Method(trains="nothing: a linear probe"),
    "full": Method(trains="every parameter", thaws=lambda name, module: True),
}


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The injected layers by path, in the order of `model.named_modules()`."""
    kinds = tuple({row.layer for row in METHODS.values() if row.layer})
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
