"""SNELL and SNELLA: sparse tuning of a linear layer by a kernel of low-rank factors.

A linear layer W (out, in) is frozen. Two factors, `lora_A` (rank, in) and `lora_B` (out, rank),
make an update of full rank: not by their product but by the distances of their vectors, of which
the first half of the ranks counts as a and b, the second as a' and b':

    D_ji = 0.1 ||a_i - b_j|| - 0.1 ||a'_i - b'_j||

Most entries are then dropped, by the quantile q of |D| over the layer at its `sparsity`:

    W' = W + D * |D|.detach() where |D| > q, W elsewhere      gate="code", what the authors run
    W' = W + D * max(|D| - q, 0)                              gate="paper", what they print

SNELL (Shen et al. 2024, arXiv 2411.01800) has one sparsity for all layers. SNELLA (arXiv
2510.24037) puts D + a softmax(D / g) + b, the softmax over the outputs, in the place of D, with
learned (a, g, b); and it shares a budget of nonzero entries, which falls in training, out to the
layers by their importance (`reallocate`).

What we do differently: a fused qkv is one layer with one quantile, the authors have three (of some
rows alone, as --targets attn.q attn.v, the quantile is theirs together); the budget is shared out
at every step, theirs once an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlae import MLAELinear

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
