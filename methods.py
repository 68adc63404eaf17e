"""The methods: one row of METHODS each, MLAE and what it is compared with.

    METHODS["mlae"].settings      # {"rank": 8, "mask_prob": 0.5, ...}: flags of train.py
    METHODS["lora"].layer         # the class that takes the place of a linear layer

A new method is one more row. model.py adapts, saves and merges models by these rows and train.py
calls their hooks, for every method alike; no other script names a method.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mlae import SCHEDULES, MLAELinear, expert_similarity, fixed_masks, mask_rates, set_mask_prob


# --- the row of a method --------------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """A row of METHODS."""

    trains: str  # what it trains, in words; the head trains always
    # takes the place of a linear layer, with `from_linear(linear, **keywords)`, `delta_weight()`
    # and `to_linear()`; None if there is no such layer
    layer: type[nn.Linear] | None = None
    settings: dict = field(default_factory=dict)  # keywords of `model.create`, with their defaults
    # paths of the layers, settings -> the keywords of `from_linear` for each layer
    layer_settings: Callable = lambda names, settings: [settings] * len(names)
    frozen: Callable = lambda settings: ()  # names of the layer's parameters that do not train
    # name of a parameter of the backbone, its module -> whether it trains too; None: none does
    unfreezes: Callable[[str, nn.Module], bool] | None = None
    targets: tuple[str, ...] = ("attn.qkv",)  # the layers that it adapts unless told otherwise
    mergeable: bool = True  # whether its layers can be merged into plain ones
    penalty: Callable = lambda model: 0.0  # a scalar, added to the loss
    # called between backward and the optimizer's step, and once before the first step, with a
    # progress from 0 to 1 over the training
    before_step: Callable = lambda model, progress: None
    after_epoch: Callable = lambda model: {}  # columns of the run's log, once an epoch
    capturable: bool = True  # whether a step with it can be one CUDA graph: no shape changes
    version: int = 1  # to be raised when the method changes, so that its runs are others

    def signature(self) -> dict:
        """What sets its runs apart from others of the same name; nothing for rows of this file."""
        own = {} if self.version == 1 else {"version": self.version}
        if self.layer and self.layer.__module__ not in ("mlae", __name__):
            own["layer"] = f"{self.layer.__module__}.{self.layer.__qualname__}"
        return own

    def complete(self, given: dict) -> dict:
        """The settings given, without other methods', and defaults for the rest; TypeError for one
        that no method has."""
        for name in given:
            if name not in self.settings and name not in self.foreign():
                raise TypeError(f"no method has a setting {name!r}")
        return {name: given.get(name, usual) for name, usual in self.settings.items()}

    def unfrozen(self, model: nn.Module) -> list[str]:
        """The names of what trains in a backbone; ValueError if there is none for `unfreezes`."""
        if self.unfreezes is None:
            return []
        names = []
        for name, _ in model.named_parameters():
            if self.unfreezes(name, model.get_submodule(name.rpartition(".")[0])):
                names.append(name)
        if not names:
            raise ValueError(f"the model has none of what this method trains: {self.trains}")
        return names

    def foreign(self) -> set[str]:
        """The names of settings that other methods have and this one does not."""
        return set().union(*(row.settings for row in METHODS.values())) - set(self.settings)


# --- MLAE's masks over many layers and over the training ------------------------------------------
# `mask_prob` is one number p, or one for each target: {"attn.qkv": 0.5, "mlp.fc1": 0.3}. Its
# pattern spreads it over the depth of the model: one number over all adapted layers, several over
# those of each target, which so has its own p as the mean. Its schedule multiplies all of them.

# which masks act: (a new one at every step, one drawn for good)
MASKINGS = {"stochastic": (True, False), "fixed": (False, True), "mixed": (True, True)}


def mlae_layers(model: nn.Module) -> dict[str, MLAELinear]:
    """Path -> MLAE layer of a model, in the order of its modules."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, MLAELinear)}


def ends_in(name: str, target: str) -> bool:
    """Whether a layer is of a target: its path ends so. A fused attn.qkv is also of attn.q."""
    fused = re.sub(r"\b[qkv]$", "qkv", target)
    return f".{name}".endswith((f".{target}", f".{fused}"))


def by_layer(names: Sequence[str], mask_prob: float | dict, draw: Callable) -> list:
    """A value for each layer, of `draw(number of layers, their mean p)`.

    All are drawn at once if `mask_prob` is a number, else those of each target. Raises ValueError
    for a layer without a p, or with two, and for a target without layers.
    """
    if not isinstance(mask_prob, dict):
        return list(draw(len(names), mask_prob))
    members: dict[str, list[str]] = {}
    for name in names:
        targets = [target for target in sorted(mask_prob) if ends_in(name, target)]
        if not targets:
            hint = "in suite.py put commas between the targets of one setting"
            raise ValueError(f"--mask-prob has no value for {name}, which is adapted too; {hint}")
        if len({mask_prob[target] for target in targets}) > 1:
            words = " and ".join(targets)
            raise ValueError(f"--mask-prob: {words} share {name}: give them the same value")
        members.setdefault(targets[0], []).append(name)
    for target in mask_prob:
        if not any(ends_in(name, target) for name in names):
            raise ValueError(f"--mask-prob {target}: no adapted layer has a name that ends so")
    values = {}
    for target, own in members.items():
        values.update(zip(own, draw(len(own), mask_prob[target]), strict=True))
    return [values[name] for name in names]


def layer_rates(names: Sequence[str], settings: dict, factor: float = 1.0) -> list[float]:
    """The masking probability of each layer; `factor` is the schedule's."""
    pattern, p = settings["pattern"], settings["mask_prob"]
    return by_layer(names, p, lambda n, p: mask_rates(pattern, n, p * factor).tolist())


def mlae_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """The masking of each layer: a rate for random masks, a fixed mask drawn here from torch's
    generator, or both. Raises ValueError for a masking, rate or pattern that is not to be had."""
    masking, schedule, pattern = settings["masking"], settings["schedule"], settings["pattern"]
    if masking not in MASKINGS:
        raise ValueError(f"--masking must be one of {', '.join(MASKINGS)}, not {masking!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"--mask-schedule must be one of {', '.join(SCHEDULES)}")
    if schedule != "constant" and masking == "fixed":
        raise ValueError(f"--mask-schedule {schedule} needs --masking stochastic or mixed")
    every_step, for_good = MASKINGS[masking]
    rates, masks = [0.0] * len(names), [None] * len(names)
    if every_step:
        rates = layer_rates(names, settings)
    if for_good:
        rank, p = settings["rank"], settings["mask_prob"]
        masks = by_layer(names, p, lambda n, p: fixed_masks(pattern, n, rank, p))
    plan = []
    for shared, rate, mask in zip(lora_plan(names, settings), rates, masks, strict=True):
        plan.append(shared | {"mask_prob": rate, "expert_mask": mask})
    return plan


def mlae_schedule(model: nn.Module, progress: float) -> None:
    """Set the masking probability p of the next step: p times the schedule at this progress."""
    settings = model.method_settings
    every_step, _ = MASKINGS[settings["masking"]]
    if every_step and settings["schedule"] != "constant":
        factor = SCHEDULES[settings["schedule"]](progress)
        set_mask_prob(model, layer_rates(list(mlae_layers(model)), settings, factor))


def mlae_log(model: nn.Module) -> dict:
    """The share of experts that a step masks, by either mask, and the similarity of the experts."""
    kept = []
    for layer in mlae_layers(model).values():
        kept.append((1 - layer.mask_prob) * layer.expert_mask.mean().item())
    return {"mask_prob": round(1 - statistics.mean(kept), 6)} | similarity_log(model)


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


# --- LoRA and RM-LoRA -----------------------------------------------------------------------------


def lora_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """LoRA (Hu et al. 2021) is MLAE without masks and with lambda fixed at alpha / rank."""
    shared = {"rank": settings["rank"], "coef_init": settings["coef_init"], "mask_prob": 0.0}
    if "lora_dropout" in settings:
        shared["dropout"] = settings["lora_dropout"]
    return [shared] * len(names)


class LoRALinear(MLAELinear):
    """LoRA with dropout on its input, as PEFT has it: y = x W^T + b + ((drop(x) A^T) c) B^T.

    `dropout` is the probability, in [0, 1), that an entry of x is dropped in training. What the
    frozen weight and the update see is then not the same x, so that nothing can be folded into one
    product: with dropout a step takes the two branches and their time. Raises ValueError as
    MLAELinear does, and for another probability.
    """

    def __init__(self, *sizes, dropout: float = 0.0, **keywords) -> None:
        super().__init__(*sizes, **keywords)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        self.dropout = dropout

    def two_branch(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)  # (..., in)
        A, B, c = self.lora_A, self.full_B(), self.coefficients()
        return F.linear(x, self.weight, self.bias) + (F.linear(dropped, A) * c) @ B.T  # (..., out)

    def forward(self, x: Tensor) -> Tensor:
        return self.two_branch(x) if self.training and self.dropout else super().forward(x)


def rmlora_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """LoRA's, for RM-LoRA; raises ValueError for settings that are not to be had."""
    if settings["variant"] not in (1, 2):
        raise ValueError(f"variant must be 1 or 2, not {settings['variant']}")
    if settings["active_ranks"] < 1:
        raise ValueError(f"active_ranks must be at least 1, not {settings['active_ranks']}")
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
    if layers[0].lora_A.grad is None or not any(layer.lora_B.any() for layer in layers):
        return
    order = torch.rand(2, len(layers), settings["rank"], device="cpu").argsort(-1)
    active = (order < settings["active_ranks"]).to(layers[0].lora_A.device)  # (2, layers, rank)
    active_A, active_B = active[0], active[settings["variant"] - 1]
    for layer, rows, columns in zip(layers, active_A, active_B, strict=True):
        layer.lora_A.grad *= rows[:, None]
        layer.lora_B.grad *= columns


# --- layers with factors of another kind ----------------------------------------------------------


class FactoredLinear(nn.Linear):
    """A frozen linear layer with two factors: `lora_A` (rank, in) and `lora_B` (out, rank).

    It has no experts and no masks, and so is no MLAELinear, but is made, shared and merged as one.
    What the factors are for is up to the `forward` and `_fold_onto` of a subclass. `sizes` and
    `place` are as for nn.Linear, `rows` as for MLAELinear: `lora_B` is then (len(rows), rank).
    """

    def __init__(self, *sizes, rank: int, rows=None, _factors_on=None, **place) -> None:
        super().__init__(*sizes, **place)
        self._add_factors(rank, rows, _factors_on)

    _add_factors, _apply = MLAELinear._add_factors, MLAELinear._apply
    from_linear = classmethod(MLAELinear.from_linear.__func__)
    delta_weight = MLAELinear.delta_weight
    to_linear = MLAELinear.to_linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class MoRLinear(FactoredLinear):
    """Mixture of Ranks (arXiv 2410.13408): N experts that differ in the scales of a shared LoRA.

        y = x W^T + b + sum_i g_i lB_i * (B (lA_i * (A x)))        g = softmax(router x)

    for every token, with rows lA_i of `scale_A` (N, rank) and lB_i of `scale_B` (N, out), or of as
    many outputs as there are `rows`. alpha is the rank; no loss balances the experts. The start of
    the scales is not published: here they are 1, with noise on lA, without which all experts would
    stay the same.
    """

    def __init__(self, *sizes, rank=8, num_experts=8, **place) -> None:
        super().__init__(*sizes, rank=rank, **place)
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        like = {"device": self.lora_A.device, "dtype": self.lora_A.dtype}
        self.scale_A = nn.Parameter(torch.empty(num_experts, rank, **like).normal_(1, 0.02))
        self.scale_B = nn.Parameter(torch.ones(num_experts, len(self.lora_B), **like))
        self.router = nn.Linear(self.in_features, num_experts, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (..., out)
        x = x.to(self.lora_A.dtype)
        gates = self.router(x).softmax(-1)  # (..., N)
        h = gates.unsqueeze(-1) * F.linear(x, self.lora_A).unsqueeze(-2)  # (..., N, rank)
        experts = self.scale_A.unsqueeze(-1) * self.lora_B.T  # (N, rank, out)
        experts = (experts * self.scale_B.unsqueeze(1)).flatten(0, 1)  # (N rank, out)
        if self.rows is not None:
            zeros = experts.new_zeros(len(experts), self.out_features)
            experts = zeros.index_copy(1, self.rows.to(x.device), experts)
        return y + (h.flatten(-2) @ experts).to(y.dtype)

    def _fold_onto(self, weight: Tensor) -> Tensor:
        raise TypeError("a mixture of ranks has no one update to merge: it depends on the input")


# --- SNELL and SNELLA -----------------------------------------------------------------------------


def quantile(values: Tensor, share: float) -> Tensor:
    """The linearly interpolated quantile of (n,), at a share from 0 to 1.

    torch.quantile refuses more than 2^24 values, and kthvalue is slow on a GPU.
    """
    position = share * (len(values) - 1)
    below = int(position)
    rest = values.topk(len(values) - below, sorted=False).values  # (n - below,)
    around = rest.topk(min(2, len(rest)), largest=False).values
    return torch.lerp(around[0], around[-1], position - below)


class SNELLLinear(FactoredLinear):
    """A frozen linear layer W (out, in) with a sparse update by a kernel of two low-rank factors.

    It has full rank, as it is made of the distances of the factors' vectors, not of their product.
    The first half of the ranks counts as a and b, the second as a' and b':

        D_ji = 0.1 ||a_i - b_j|| - 0.1 ||a'_i - b'_j||

    Most entries are then dropped, by the quantile q of |D| over the layer at its `sparsity`:

        W' = W + D * |D|.detach() where |D| > q, W elsewhere      gate="code", what the authors run
        W' = W + D * max(|D| - q, 0)                              gate="paper", what they print

    SNELL (Shen et al. 2024, arXiv 2411.01800) has one sparsity, an attribute that is saved, for all
    layers. SNELLA (arXiv 2510.24037, `adaptive`) puts D + a softmax(D / g) + b, the softmax over
    the outputs, in the place of D, with (a, g, b) learned as `mix` (3,); and it shares a budget of
    nonzero entries out to the layers by their importance (`reallocate`).

    What we do differently: a fused qkv is one layer with one quantile, the authors have three (of
    some rows alone, as --targets attn.q attn.v, the quantile is theirs together); the budget is
    shared out at every step, theirs once an epoch. Raises ValueError for an odd rank, a sparsity
    outside [0, 1) and an unknown gate.
    """

    def __init__(self, *sizes, rank=32, sparsity=0.9, adaptive=False, gate="code", **place) -> None:
        super().__init__(*sizes, rank=rank, **place)
        if rank % 2:
            raise ValueError(f"rank must be even, for its two halves, not {rank}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
        if gate not in ("code", "paper"):
            raise ValueError(f"gate must be one of code, paper, not {gate!r}")
        place = {"dtype": torch.float32, "device": self.lora_A.device}
        # a copy of the sparsity, which torch's AveragedModel averages
        self.register_buffer("mean_sparsity", torch.zeros((), **place), persistent=False)
        self.sparsity, self.gate = float(sparsity), gate
        for factor in (self.lora_A, self.lora_B):
            bound = 1 / math.sqrt(factor.numel() / 2)  # kaiming's of (2, size, rank / 2)
            nn.init.uniform_(factor, -bound, bound)
        self.mix = nn.Parameter(self.lora_A.new_tensor([1.0, 1.0, 0.0])) if adaptive else None
        # of SNELLA: running means of |p grad| over the entries p, and of its deviation
        entries = self.lora_A.numel() + self.lora_B.numel()
        sensitivity = self.lora_A.new_zeros(2, entries) if adaptive else None
        self.register_buffer("sensitivity", sensitivity)

    @property
    def sparsity(self) -> float:
        """What was set; in scoring what torch's AveragedModel (EMA, SWA) has made of it."""
        own = self.training or torch.compiler.is_compiling()  # neither asks the GPU
        return self._sparsity if own else self._averaged()

    @sparsity.setter
    def sparsity(self, sparsity: float) -> None:
        self._sparsity = sparsity
        if self.mean_sparsity.is_meta:  # loaded with assign=True
            self.mean_sparsity = torch.zeros((), device=self.lora_A.device)
        self.mean_sparsity.fill_(sparsity)

    def _averaged(self) -> float:
        """The sparsity as set, but what an average has made of it, where that differs."""
        if self.mean_sparsity.is_meta:
            return self._sparsity
        mean, rounding = self.mean_sparsity.item(), torch.finfo(self.mean_sparsity.dtype).eps
        return self._sparsity if math.isclose(mean, self._sparsity, rel_tol=rounding) else mean

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._averaged(), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.sparsity = min(1.0, max(0.0, state.item()))  # a file may hold anything

    def _update(self, dtype: torch.dtype, sparsity: float) -> Tensor:
        a = self.lora_A.to(dtype).unflatten(0, (2, -1)).mT  # (2, in, rank / 2)
        b = self.lora_B.to(dtype).unflatten(1, (2, -1)).transpose(0, 1)  # (2, out, rank / 2)
        # by a product of matrices; its gradient at distance 0 is 0
        distance = torch.cdist(b, a, compute_mode="use_mm_for_euclid_dist")  # (2, out, in)
        D = 0.1 * (distance[0] - distance[1])  # (out, in)
        if self.mix is not None:
            scale, temperature, shift = self.mix.to(dtype)
            D = D + scale * (D / temperature).softmax(0) + shift  # over the outputs
        size = D.abs()
        threshold = quantile(size.detach().flatten(), sparsity)
        if self.gate == "paper":
            return D * (size - threshold).clamp_min(0)
        return D * torch.where(size > threshold, size, 0).detach()

    def _fold_onto(self, weight: Tensor, sparsity: float | None = None) -> Tensor:
        sparsity = self._averaged() if sparsity is None else sparsity
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            update = self._update(wide, sparsity)
            if self.rows is None:
                return weight + update
            return weight.to(wide).index_add(0, self.rows.to(update.device), update)

    def _folded(self, x: Tensor) -> Tensor:
        folded = self._fold_onto(self.weight, self.sparsity)
        return F.linear(x, folded.to(self.weight.dtype), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # no (out, in) matrix is kept for the backward pass: the update is made again there
        return checkpoint(self._folded, x, use_reentrant=False, preserve_rng_state=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:.4g}"


def allocate_sparsity(importance: Sequence, sizes: Sequence, budget: int) -> list[float]:
    """The sparsities of L layers that share `budget` nonzero entries by `importance` (L,) >= 0.

    A share is rounded down and at most the layer's entries, `sizes` (L,); what is left over is
    shared out again among the layers that have room, until no whole entry is left for any. Without
    any importance (before the first step) the shares are as the sizes.
    """
    sizes = torch.as_tensor(sizes, dtype=torch.float64, device="cpu")
    weights = torch.as_tensor(importance, dtype=torch.float64, device="cpu")
    weights = weights if weights.any() else sizes
    weights = weights / weights.sum()
    kept = torch.zeros_like(sizes)
    while True:
        wanting = weights * (kept < sizes)
        share = (budget - kept.sum()) * wanting / wanting.sum().clamp_min(1e-300)
        gain = (share + 1e-6).floor().minimum(sizes - kept)  # 2.9999999 is 3
        if not gain.sum() > 0:
            return (1 - kept / sizes).tolist()
        kept += gain


@torch.no_grad()
def reallocate(model: nn.Module, progress: float) -> None:
    """SNELLA's sparsities for the next step, from the gradients of this one if there are any.

    The budget falls as (1 - progress)^3 from that of `start_sparsity` to that of `sparsity`, both
    over all layers. A layer's importance is the mean over the entries p of its factors of

        E|p grad| * E| |p grad| - E|p grad| |        E: a running mean, 0.85 of the old
    """
    layers = [module for module in model.modules() if isinstance(module, SNELLLinear)]
    importance, sizes = [], []
    for layer in layers:
        factors = layer.lora_A, layer.lora_B
        if all(factor.grad is not None for factor in factors):
            now = torch.cat([(factor * factor.grad).abs().flatten() for factor in factors])
            mean, deviation = layer.sensitivity
            now = torch.where(now.isfinite(), now, mean)  # float16 gradients may overflow
            mean.lerp_(now, 0.15)
            deviation.lerp_((now - mean).abs(), 0.15)
        importance.append(layer.sensitivity.prod(0).mean())
        sizes.append(layer.lora_B.shape[0] * layer.in_features)
    first, last = model.method_settings["start_sparsity"], model.method_settings["sparsity"]
    overall = last + (first - last) * (1 - progress) ** 3
    budget = round(sum(sizes) * (1 - overall))
    shares = allocate_sparsity(torch.stack(importance).tolist(), sizes, budget)
    for layer, sparsity in zip(layers, shares, strict=True):
        layer.sparsity = sparsity


def snella_plan(names: Sequence[str], settings: dict) -> list[dict]:
    """Every layer of SNELLA starts at `start_sparsity`; `sparsity` is for `reallocate`."""
    for name in ("sparsity", "start_sparsity"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), not {settings[name]}")
    shared = {"rank": settings["rank"], "gate": settings["gate"], "adaptive": True}
    return [shared | {"sparsity": settings["start_sparsity"]}] * len(names)


def is_layer_norm(name: str, module: nn.Module) -> bool:
    """A layer norm or its kin, by its class. A batch norm is none: its statistics would move, and
    they are not the adapter's to save."""
    return "Norm" in type(module).__name__ and not isinstance(module, _BatchNorm)


# --- the table ------------------------------------------------------------------------------------

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
        layer_settings=mlae_plan,
        frozen=lambda settings: ("lora_lambda",) if settings["freeze_lambda"] else (),
        before_step=mlae_schedule,
        after_epoch=mlae_log,
    ),
    "lora": Method(
        trains="low-rank adaptation (Hu et al. 2021)",
        layer=LoRALinear,
        settings={"rank": 8, "coef_init": 1.0, "lora_dropout": 0.0},
        layer_settings=lora_plan,
        frozen=lambda settings: ("lora_lambda",),
        after_epoch=similarity_log,
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
        layer_settings=rmlora_plan,
        frozen=lambda settings: ("lora_lambda",),
        after_epoch=similarity_log,
        penalty=lambda model: model.method_settings["penalty_weight"] * orthogonality(model),
        before_step=mask_gradients,
    ),
    "mor": Method(
        trains="mixture of ranks (Tang et al. 2024)",
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
        trains="SNELL with adaptive sparsity (Shen et al. 2025)",
        layer=SNELLLinear,
        settings={"rank": 32, "sparsity": 0.8, "start_sparsity": 0.01, "gate": "code"},
        layer_settings=snella_plan,
        targets=ALL_LINEARS,
        before_step=reallocate,
        capturable=False,  # the number of values above its quantile changes
    ),
    "bitfit": Method(trains="every bias", unfreezes=lambda name, module: name.endswith("bias")),
    "layernorm": Method(trains="the norms' scales and shifts", unfreezes=is_layer_norm),
    "linear": Method(trains="the head alone"),
    "full": Method(trains="every parameter", unfreezes=lambda name, module: True),
}


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The injected layers by path, in the order of `model.named_modules()`."""
    kinds = tuple({row.layer for row in METHODS.values() if row.layer})
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
