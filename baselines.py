"""The methods: one row of METHODS each, MLAE and what it is compared with.

    METHODS["mlae"].settings      # {"rank": 8, "mask_prob": 0.5, ...}: flags of train.py
    METHODS["lora"].layer         # the class that takes the place of a linear layer

A new method is one more row. `model.py` adapts, saves and merges models by these rows and
`train.py` calls their hooks, for every method alike; no other script names a method.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlae import PATTERNS, MLAELinear, fixed_masks, mask_rates, set_mask_prob

__all__ = ["MASKINGS", "METHODS", "METHODS_HELP", "PATTERNS", "SCHEDULES", "Method"]

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


def orthogonality(model: nn.Module) -> Tensor:
    """Mean over all factors of the model of ||A A^T - I||_F or ||B^T B - I||_F, a scalar."""
    norms = []
    for name, factor in model.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            rows = factor if name.endswith("A") else factor.T  # (rank, in) or (rank, out)
            excess = rows @ rows.T - torch.eye(len(rows)).to(rows)  # (rank, rank)
            norms.append(torch.linalg.matrix_norm(excess))
    return torch.stack(norms).mean()


def rmlora_plan(num_layers: int, settings: dict) -> list[dict]:
    """RM-LoRA (Mao et al. 2024, arXiv 2407.12074): LoRA with a penalty and masked gradients.

    The loss gains penalty_weight * `orthogonality`; `mask_gradients` does the rest.
    """
    if settings["active_ranks"] < 1 or settings["variant"] not in (1, 2):
        raise ValueError("active_ranks must be at least 1, and variant 1 or 2")
    return lora_plan(num_layers, {name: settings[name] for name in ("rank", "coef_init")})


def mask_gradients(model: nn.Module, progress: float) -> None:
    """Let `active_ranks` random ranks of each layer learn at this step, by their gradients.

    Variant 1: the same ranks of A and B; 2: drawn for each. Momentum and weight decay still move
    the others. As published the first step, when B is zero, is not masked. The head is not masked
    either; in the authors' code it stops learning after the first step.
    """
    settings, layers = model.method_settings, mlae_layers(model)
    idle = layers[0].lora_A.grad is None
    if idle or not any(layer.lora_B.any() for layer in layers):
        return
    order = torch.rand(2, len(layers), settings["rank"], device="cpu").argsort(-1)
    active = (order < settings["active_ranks"]).to(layers[0].lora_A.device)
    active_A, active_B = active if settings["variant"] == 2 else (active[0], active[0])
    for layer, rows, columns in zip(layers, active_A, active_B, strict=True):
        layer.lora_A.grad *= rows[:, None]
        layer.lora_B.grad *= columns


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with the factors `lora_A` (rank, in) and a zero `lora_B` (out, rank).

    Raises ValueError for a rank below 1, and for `rows`: it adapts whole layers only.
    """

    def __init__(
        self, in_features, out_features, bias, rank, rows, device=None, dtype=None, _frozen=None
    ) -> None:
        if rows is not None:
            raise ValueError(f"{type(self).__name__} adapts whole layers, not some of their rows")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, not {rank!r}")
        device = device if _frozen is None else "meta"
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if _frozen is not None:
            self.weight, self.bias = _frozen.weight, _frozen.bias
        self.requires_grad_(False)
        self.like = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **self.like))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **self.like))

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs) -> AdaptedLinear:
        """Adapt `linear`, as `MLAELinear.from_linear` does: shared weights, float32 factors."""
        if type(linear) is not nn.Linear:
            raise ValueError(f"{type(linear).__name__} is not a plain linear layer")
        kwargs.setdefault("dtype", torch.promote_types(linear.weight.dtype, torch.float32))
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        return cls(*sizes, _frozen=linear, **kwargs).train(linear.training)


class MoRLinear(AdaptedLinear):
    """Mixture of Ranks (arXiv 2410.13408): N experts that differ in the scales of a shared LoRA.

        y = x W^T + b + sum_i g_i lB_i * (B (lA_i * (A x))),  g = softmax(router x)

    for every token, with lA_i (rank,) and lB_i (out,) in `scale_A` (N, rank) and `scale_B`
    (N, out). How the scales start is not published: at 1, with noise of 0.02 on lA, or all experts
    would be one. alpha is the rank, and no loss balances the experts.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, rank=8, num_experts=8, rows=None, **place
    ) -> None:
        super().__init__(in_features, out_features, bias, rank, rows, **place)
        noise = 0.02 * torch.randn(num_experts, rank)
        self.scale_A = nn.Parameter((1 + noise).to(**self.like))
        self.scale_B = nn.Parameter(torch.ones(num_experts, out_features, **self.like))
        self.router = nn.Linear(in_features, num_experts, bias=False, **self.like)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # (..., out)
        x = x.to(self.lora_A.dtype)
        gates = self.router(x).softmax(-1)  # (..., N)
        h = F.linear(x, self.lora_A)  # (..., rank)
        h = gates.unsqueeze(-1) * h.unsqueeze(-2)  # (..., N, rank)
        experts = self.scale_A.unsqueeze(-1) * self.lora_B.T  # (N, rank, out)
        experts = experts * self.scale_B.unsqueeze(1)
        return y + (h.flatten(-2) @ experts.flatten(0, 1)).to(y.dtype)  # (..., out)

    def delta_weight(self) -> Tensor:
        """Raises TypeError: the router's weights depend on the input, so there is no one matrix."""
        raise TypeError("a mixture of ranks depends on the input: it has no one update to merge")

    to_linear = delta_weight


GATES = ("code", "paper")  # which entries of SNELL's update stay, and how they count


class SNELLLinear(AdaptedLinear):
    """SNELL (Shen et al. 2024, arXiv 2411.01800): a sparse update from the distance of factors.

        D_ji = 0.1 ||a_i - b_j|| - 0.1 ||a'_i - b'_j||      a, b: first half of the ranks; a', b': second
        W'   = W + D * |D| where |D| is above its `sparsity` quantile, elsewhere W

    As in the authors' code |D| has no gradient; gate="paper" has D * max(|D| - quantile, 0), as
    printed. A fused qkv is one layer with one quantile; the authors have q, k and v apart.
    `adaptive` is SNELLA (arXiv 2510.24037): D + a softmax(D / g over out) + b with `mix` (a, g, b),
    and `importance` (2, rank * (in + out)), the running means behind `reallocate`.

    D is made again in the backward pass: no (out, in) matrix is kept.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        rank=32,
        sparsity=0.9,
        adaptive=False,
        gate="code",
        rows=None,
        **place,
    ) -> None:
        super().__init__(in_features, out_features, bias, rank, rows, **place)
        if rank % 2 or not 0 <= sparsity < 1 or gate not in GATES:
            raise ValueError(
                f"SNELL needs an even rank, a sparsity in [0, 1) and a gate of {' or '.join(GATES)}"
            )
        self.sparsity = float(sparsity)
        self.gate = gate
        for factor, size in ((self.lora_A, in_features), (self.lora_B, out_features)):
            nn.init.uniform_(factor, -1, 1)
            with torch.no_grad():
                factor /= math.sqrt(size * rank / 2)
        self.mix = nn.Parameter(torch.tensor([1.0, 1.0, 0.0], **self.like)) if adaptive else None
        running = torch.zeros(2, rank * (in_features + out_features), **self.like)
        self.register_buffer("importance", running if adaptive else None)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.sparsity, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.sparsity = state.item()

    def _update(self, dtype: torch.dtype) -> Tensor:
        a = self.lora_A.to(dtype).unflatten(0, (2, -1)).mT  # (2, in, rank / 2)
        b = self.lora_B.to(dtype).unflatten(1, (2, -1)).transpose(0, 1)  # (2, out, rank / 2)
        # by products; its gradient at distance 0 is 0
        distance = torch.cdist(b, a, compute_mode="use_mm_for_euclid_dist")  # (2, out, in)
        delta = 0.1 * (distance[0] - distance[1])  # (out, in)
        if self.mix is not None:
            scale, temperature, shift = self.mix.to(dtype)
            delta = delta + scale * (delta / temperature).softmax(0) + shift
        size = delta.detach().abs()
        position = self.sparsity * (size.numel() - 1)
        ordered = size.flatten()
        threshold = ordered.kthvalue(int(position) + 1).values
        if self.gate == "code":  # interpolated, the threshold would keep the same entries
            return delta * torch.where(size > threshold, size, 0)
        above = ordered.kthvalue(min(int(position) + 2, len(ordered))).values
        threshold = torch.lerp(threshold, above, position % 1)
        return delta * (delta.abs() - threshold).clamp_min(0)

    def _fold_onto(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            return weight.to(wide) + self._update(wide)

    def _folded(self, x: Tensor) -> Tensor:
        return F.linear(x, self._fold_onto(self.weight).to(self.weight.dtype), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._folded, x, use_reentrant=False, preserve_rng_state=False)

    delta_weight = MLAELinear.delta_weight  # these two ask _fold_onto
    to_linear = MLAELinear.to_linear


def allocate_sparsity(
    importance: Sequence[float], sizes: Sequence[int], budget: int
) -> list[float]:
    """Share `budget` entries out to L layers by importance; the sparsity of each.

    A layer gets its share rounded down, at most its size; what is left over is shared out again.
    Without any importance the shares are as the sizes.
    """
    weights = [float(value) for value in importance]
    if not any(weights):
        weights = [float(size) for size in sizes]
    kept, gained = [0] * len(weights), True
    while gained:
        room = [int(size) - count for size, count in zip(sizes, kept, strict=True)]
        open_weights = [w if free else 0.0 for w, free in zip(weights, room, strict=True)]
        per_weight = (budget - sum(kept)) / (sum(open_weights) or 1.0)
        gains = []
        for weight, free in zip(open_weights, room, strict=True):
            gains.append(min(free, int(weight * per_weight + 1e-9)))
        kept = [count + gain for count, gain in zip(kept, gains, strict=True)]
        gained = any(gains)
    return [1 - count / int(size) for count, size in zip(kept, sizes, strict=True)]


@torch.no_grad()
def reallocate(model: nn.Module, progress: float) -> None:
    """SNELLA's budget: (1 - progress)^3 of the way from sparsity `start_sparsity` to `sparsity`.

    A layer's importance is the mean over its factors of E[|p grad|] E[||p grad| - E[|p grad|]|],
    E a running mean with 0.85. The authors share the budget out once an epoch, this every step.
    """
    layers = [module for module in model.modules() if isinstance(module, SNELLLinear)]
    for layer in layers:
        factors = layer.lora_A, layer.lora_B
        if layer.lora_A.grad is not None:
            products = torch.cat([(p * p.grad).abs().flatten() for p in factors])
            mean, spread = layer.importance
            products = torch.where(products.isfinite(), products, mean)  # fp16 may overflow
            mean.lerp_(products, 0.15)
            spread.lerp_((products - mean).abs(), 0.15)
    first, last = model.method_settings["start_sparsity"], model.method_settings["sparsity"]
    overall = last + (first - last) * (1 - progress) ** 3
    importance = torch.stack([layer.importance.prod(0).mean() for layer in layers])
    sizes = [layer.weight.numel() for layer in layers]
    budget = round(sum(sizes) * (1 - overall))
    for layer, sparsity in zip(
        layers, allocate_sparsity(importance.tolist(), sizes, budget), strict=True
    ):
        layer.sparsity = sparsity


def snella_plan(num_layers: int, settings: dict) -> list[dict]:
    """The keywords of SNELLA's layers, which begin at `start_sparsity`."""
    shared = {"rank": settings["rank"], "gate": settings["gate"], "adaptive": True}
    return [shared | {"sparsity": settings["start_sparsity"]}] * num_layers


ALL_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

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
        fixed=("lora_lambda",),
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
    "bitfit": Method(trains="every bias", thaws=lambda name: name.endswith("bias")),
    "layernorm": Method(trains="the norms' scales and shifts", thaws=lambda name: "norm" in name),
    "linear": Method(
        trains="nothing: a linear probe",
        recipe={"drop_path": 0.0},  # it would be noise in a backbone that nothing adapts
    ),
    "full": Method(trains="every parameter", thaws=lambda name: True),
}
METHODS_HELP = "; ".join(f"{name}: {row.trains}" for name, row in METHODS.items())
