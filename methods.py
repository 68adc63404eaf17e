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

from mlae import MLAELinear, expert_similarity, fixed_masks, mask_rates, set_mask_prob

# --- the row of a method --------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    Attributes:
        trains: what it trains beside the head, in words.
        layer: the nn.Linear that takes the place of a linear layer, with `from_linear(linear,
            **keywords)`, `delta_weight()` and `to_linear()`; None if there is no such layer.
        settings: the method's settings with their defaults: keywords of `model.create`.
        settings_by_target: the settings that may be {target: value} instead of a value.
        layer_settings: (paths of the layers, settings) -> the keywords of `from_linear` for each layer.
        frozen: settings -> names of the layer's parameters that do not train.
        lr_factor: (name of a parameter, settings) -> its learning rate over that of the rest.
        unfreezes: (name of a parameter of the backbone, its module) -> whether it trains too; None if
            nothing of the backbone is meant to.
        targets: the layers that it adapts unless others are asked for.
        mergeable: whether its layers can be merged into plain ones.
        penalty: model -> scalar, added to the loss.
        before_step: (model, progress) is called between backward and the optimizer's step, and
            once before the first step; progress goes from 0 to 1 over the training.
        after_epoch: model -> columns of the run's log, once an epoch.
        version: to be raised when the method changes, so that its runs are others.
    """

    trains: str
    layer: type[nn.Linear] | None = None
    settings: dict = field(default_factory=dict)
    settings_by_target: tuple[str, ...] = ()
    layer_settings: Callable[[Sequence, dict], list[dict]] = lambda names, settings: (
        [settings] * len(names)
    )
    frozen: Callable[[dict], tuple[str, ...]] = lambda settings: ()
    lr_factor: Callable[[str, dict], float] = lambda name, settings: 1.0
    unfreezes: Callable[[str, nn.Module], bool] | None = None
    targets: tuple[str, ...] = ("attn.qkv",)
    mergeable: bool = True
    penalty: Callable[[nn.Module], Tensor | float] = lambda model: 0.0
    before_step: Callable[[nn.Module, float], None] = lambda model, progress: None
    after_epoch: Callable[[nn.Module], dict] = lambda model: {}
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

    def complete(self, given: dict) -> dict:
        """This method's settings: those given, defaults for the rest, without other methods'.

        Raises TypeError for a setting that no method has.
        """
        for name in given:
            if name not in self.settings and name not in self.foreign():
                raise TypeError(f"no method has a setting {name!r}")
        return {name: given.get(name, usual) for name, usual in self.settings.items()}

    def unfrozen(self, model: nn.Module) -> list[str]:
        """The names of what trains in a backbone; ValueError if there is nothing for `unfreezes`."""
        if self.unfreezes is None:
            return []
        names = []
        for name, _ in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if self.unfreezes(name, owner):
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


# --- MLAE's masks over many layers and over the training -------------------------------------------
# How often an expert is masked, `mask_prob`, is one number p, or one for each target:
# {"attn.qkv": 0.5, "mlp.fc1": 0.3}. Its pattern spreads it over the depth of the model: with one
# number over all adapted layers, with several over the layers of each target by themselves, so that
# every target has its own p as the mean. Its schedule multiplies all of them, step by step.

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


# --- LoRA and RM-LoRA ------------------------------------------------------------------------------


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


# --- Mixture of Ranks ------------------------------------------------------------------------------


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


# --- SNELL and SNELLA ------------------------------------------------------------------------------
# SNELL and SNELLA: sparse tuning of a linear layer by a kernel of low-rank factors.
#
# A linear layer W (out, in) is frozen. Two factors, `lora_A` (rank, in) and `lora_B` (out, rank),
# make an update of full rank: not by their product but by the distances of their vectors, of which
# the first half of the ranks counts as a and b, the second as a' and b':
#
#     D_ji = 0.1 ||a_i - b_j|| - 0.1 ||a'_i - b'_j||
#
# Most entries are then dropped, by the quantile q of |D| over the layer at its `sparsity`:
#
#     W' = W + D * |D|.detach() where |D| > q, W elsewhere      gate="code", what the authors run
#     W' = W + D * max(|D| - q, 0)                              gate="paper", what they print
#
# SNELL (Shen et al. 2024, arXiv 2411.01800) has one sparsity for all layers. SNELLA (arXiv
# 2510.24037) puts D + a softmax(D / g) + b, the softmax over the outputs, in the place of D, with
# learned (a, g, b); and it shares a budget of nonzero entries, which falls in training, out to the
# layers by their importance (`reallocate`).
#
# What we do differently: a fused qkv is one layer with one quantile, the authors have three (of some
# rows alone, as --targets attn.q attn.v, the quantile is theirs together); the budget is shared out
# at every step, theirs once an epoch.

GATES = ("code", "paper")


def kernel(A: Tensor, B: Tensor) -> Tensor:
    """D (out, in) of the factors A (rank, in) and B (out, rank)."""
    a = A.unflatten(0, (2, -1)).mT  # (2, in, rank / 2)
    b = B.unflatten(1, (2, -1)).transpose(0, 1)  # (2, out, rank / 2)
    # by a product of matrices; its gradient at distance 0 is 0
    distance = torch.cdist(b, a, compute_mode="use_mm_for_euclid_dist")  # (2, out, in)
    return 0.1 * (distance[0] - distance[1])


def quantile(values: Tensor, share: float) -> Tensor:
    """The linearly interpolated quantile of (n,), at a share from 0 to 1.

    torch.quantile refuses more than 2^24 values, and kthvalue is slow on a GPU.
    """
    position = share * (len(values) - 1)
    below = int(position)
    rest = values.topk(len(values) - below, sorted=False).values  # (n - below,)
    around = rest.topk(min(2, len(rest)), largest=False).values
    return torch.lerp(around[0], around[-1], position - below)


class SNELLLinear(MLAELinear):
    """A frozen linear layer with a sparse update by a kernel (the equations are above).

    (..., in_features) -> (..., out_features). `lora_A` and `lora_B` train, and in SNELLA `mix`
    (3,), which holds (a, g, b). No (out, in) matrix is kept for the backward pass: the update is
    made again there. Factors, rows and merging are MLAELinear's; there are no coefficients.

    Args:
        rank: of both halves together, an even number.
        sparsity: share of the entries that are dropped, an attribute that is saved with the layer.
        adaptive: SNELLA.
        gate: a key of GATES.
        place: rows, device and dtype as for MLAELinear.

    Raises ValueError for a value that is not to be had.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 32,
        sparsity: float = 0.9,
        adaptive: bool = False,
        gate: str = "code",
        **place,
    ) -> None:
        super().__init__(in_features, out_features, bias, rank=rank, mask_prob=0.0, **place)
        del self.lora_lambda, self.expert_mask
        if rank % 2:
            raise ValueError(f"rank must be even, for its two halves, not {rank}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, not {gate!r}")
        self.sparsity = float(sparsity)
        self.gate = gate
        with torch.no_grad():
            for factor in (self.lora_A, self.lora_B):
                bound = 1 / math.sqrt(factor.numel() / 2)  # kaiming's of (2, size, rank / 2)
                factor.uniform_(-bound, bound)
        # of SNELLA: the kernel's mixture; running means of |p grad| and of its deviation
        mix = sensitivity = None
        if adaptive:
            mix = nn.Parameter(self.lora_A.new_tensor([1.0, 1.0, 0.0]))
            entries = self.lora_A.numel() + self.lora_B.numel()
            sensitivity = self.lora_A.new_zeros(2, entries)
        self.register_parameter("mix", mix)
        self.register_buffer("sensitivity", sensitivity)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.sparsity, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.sparsity = min(1.0, max(0.0, state.item()))  # a file may hold anything

    def _update(self, dtype: torch.dtype) -> Tensor:
        A = self.lora_A.to(dtype)
        B = self.lora_B.to(dtype)
        delta = kernel(A, B)  # (out, in)
        if self.mix is not None:
            scale, temperature, shift = self.mix.to(dtype)
            shares = (delta / temperature).softmax(0)  # over the outputs
            delta = delta + scale * shares + shift
        size = delta.abs()
        threshold = quantile(size.detach().flatten(), self.sparsity)
        if self.gate == "paper":
            return delta * (size - threshold).clamp_min(0)
        gate = torch.where(size > threshold, size, 0)
        return delta * gate.detach()

    def _fold_onto(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            update = self._update(wide)
            if self.rows is not None:
                zeros = weight.new_zeros(weight.shape, dtype=wide)
                update = zeros.index_copy(0, self.rows, update)
            return weight + update

    def _folded(self, x: Tensor) -> Tensor:
        weight = self._fold_onto(self.weight)
        weight = weight.to(self.weight.dtype)
        return F.linear(x, weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._folded, x, use_reentrant=False, preserve_rng_state=False)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, rank={self.rank}, sparsity={self.sparsity:.4g}"


def allocate_sparsity(importance: Sequence, sizes: Sequence, budget: int) -> list[float]:
    """The sparsities of L layers that share `budget` nonzero entries by importance.

    A share is rounded down and at most the layer's size; what is left over is shared out again
    among the layers that have room, until no whole entry is left for any. Without any importance
    (before the first step) the shares are as the sizes.

    Args:
        importance: of each layer (L,), not negative; only ratios matter.
        sizes: entries of each layer (L,).
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
    for layer in layers:
        factors = layer.lora_A, layer.lora_B
        if all(factor.grad is not None for factor in factors):
            products = [factor * factor.grad for factor in factors]
            now = torch.cat([product.abs().flatten() for product in products])
            mean, deviation = layer.sensitivity
            now = torch.where(now.isfinite(), now, mean)  # float16 gradients may overflow
            mean.lerp_(now, 0.15)
            distance = (now - mean).abs()
            deviation.lerp_(distance, 0.15)
    settings = model.method_settings
    first = settings["start_sparsity"]
    last = settings["sparsity"]
    left = (1 - progress) ** 3
    overall = last + (first - last) * left
    entries = []
    importance = []
    for layer in layers:
        entries.append(layer.lora_B.shape[0] * layer.in_features)
        product = layer.sensitivity.prod(0)
        importance.append(product.mean())
    importance = torch.stack(importance).tolist()
    budget = round(sum(entries) * (1 - overall))
    shares = allocate_sparsity(importance, entries, budget)
    for layer, sparsity in zip(layers, shares, strict=True):
        layer.sparsity = sparsity


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


# --- the table -------------------------------------------------------------------------------------

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
        settings_by_target=("mask_prob",),
        layer_settings=mlae_plan,
        frozen=lambda settings: ("lora_lambda",) if settings["freeze_lambda"] else (),
        lr_factor=mlae_lr_factor,
        before_step=mlae_schedule,
        after_epoch=mlae_log,
    ),
    "lora": Method(
        trains="low-rank adaptation (Hu et al. 2021)",
        layer=MLAELinear,
        settings={"rank": 8, "coef_init": 1.0},
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
        layer_settings=snella_plan,
        targets=ALL_LINEARS,
        before_step=reallocate,
    ),
    "bitfit": Method(trains="every bias", unfreezes=lambda name, module: name.endswith("bias")),
    "layernorm": Method(trains="the norms' scales and shifts", unfreezes=is_layer_norm),
    "linear": Method(trains="nothing: a linear probe"),
    "full": Method(trains="every parameter", unfreezes=lambda name, module: True),
}


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The injected layers by path, in the order of `model.named_modules()`."""
    kinds = tuple({row.layer for row in METHODS.values() if row.layer})
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
