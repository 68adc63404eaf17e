"""MLAE, Masked LoRA Experts (Wang et al. 2024, arXiv 2405.18897), in one file you can copy.

A linear layer W (out, in) with bias b is frozen and given r rank-1 *experts* (the cellular
decomposition of a LoRA). Expert i is a row a_i of `lora_A` (r, in), a column b_i of
`lora_B` (out, r) and a learned coefficient lambda_i:

    y = x W^T + b + sum_i m_i lambda_i (x . a_i) b_i

The mask m is what makes it MLAE. At every training step each layer keeps each expert with
probability 1 - p and scales the kept ones by 1 / (1 - p), so that the mean output is the one
without a mask. All images and tokens of a batch share one mask. In eval mode every expert acts.
A second, fixed mask (`expert_mask`) can switch experts off for good. The paper's claim: experts
that cannot lean on each other learn different things (`expert_similarity`).

B starts at zero, so training starts at the pre-trained model, exactly; at the first step only B
has a gradient. With p = 0 and a constant lambda = alpha / r the r experts are one LoRA of rank r
(Hu et al. 2021).

To use it elsewhere, copy this file and swap the layers you want to adapt:

    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:  # W and b are shared, not copied
        block.attn.qkv = MLAELinear.from_linear(block.attn.qkv, rank=8, mask_prob=0.5)
    ...  # train: model.train() masks, model.eval() does not
    for block in model.blocks:  # in the end: merge into plain nn.Linear layers
        block.attn.qkv = block.attn.qkv.to_linear()
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class MLAELinear(nn.Linear):
    """A frozen linear layer with `rank` masked rank-1 experts (the equation is above).

    (..., in_features) -> (..., out_features). `weight` and `bias` are frozen; `lora_A` (rank, in),
    `lora_B` (out, rank) and `lora_lambda` (rank,) train.

    Args:
        rank: number of experts r.
        mask_prob: probability p in [0, 1) that an expert is masked at a training step.
        coef_init: the start of every lambda that is not masked for good.
        expert_mask: fixed mask (rank,) of 0 and 1, in force in every mode; None keeps all. Masked
            experts start, and so stay, at zero: neither gradient nor weight decay moves them.
        rows: the output rows that the experts act on, None for all; `lora_B` is then
            (len(rows), rank). For q, k or v alone in a fused qkv layer.

    Raises ValueError for a rank below 1, a mask_prob outside [0, 1), a bad mask or bad rows.
    """

    rate: Tensor | None = None  # p for a CUDA graph, which reads memory; see `hold_mask_prob`

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        rank: int = 8, mask_prob: float = 0.5, coef_init: float = 1.0,
        expert_mask: Tensor | None = None, rows: Tensor | None = None,
        device=None, dtype=None, _factors_on=None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_factors(rank, rows, _factors_on)
        self.mask_prob = mask_prob
        mask = [1.0] * rank if expert_mask is None else expert_mask
        mask = torch.as_tensor(mask, dtype=torch.float32, device="cpu")
        if mask.shape != (rank,) or not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"expert_mask must hold {rank} values of 0 or 1, not {expert_mask!r}")
        self.register_buffer("expert_mask", mask.to(self.lora_A))
        self.lora_lambda = nn.Parameter(self.expert_mask * coef_init)  # (rank,)
        with torch.no_grad():
            self.lora_A *= self.expert_mask[:, None]

    def coefficients(self) -> Tensor:
        """c_i = m_i lambda_i (rank,): a new random mask at every call in training mode."""
        mask = self.expert_mask
        if self.training:
            p = self._mask_prob if self.rate is None else self.rate
            keep = torch.rand(self.rank, device=mask.device) >= p
            mask = mask * keep / (1 - p)
        return self.lora_lambda * mask

    def two_branch(self, x: Tensor) -> Tensor:
        """The definition, y = x W^T + b + ((x A^T) c) B^T; `forward` is the same, but faster. With
        torch.func, which takes no autograd function, use this."""
        A, B, c = self.lora_A, self.full_B(), self.coefficients()
        return F.linear(x, self.weight, self.bias) + ((x @ A.T) * c) @ B.T  # (..., out)

    def forward(self, x: Tensor) -> Tensor:
        dtype, device = self.weight.dtype, x.device.type
        autocast = not x.is_meta and torch.is_autocast_enabled(device)
        if autocast and torch.float64 not in (dtype, x.dtype):
            dtype = torch.get_autocast_dtype(device)
        elif x.dtype != dtype:
            raise RuntimeError(f"input is {x.dtype} but the layer's weight is {dtype}")
        A, B, c = self.lora_A, self.full_B(), self.coefficients()
        return _FoldedLinear.apply(x, self.weight, self.bias, A, B, c, dtype)

    def full_B(self) -> Tensor:
        """B with a row for every output (out, rank): zeros outside `rows`."""
        if self.rows is None:
            return self.lora_B
        zeros = self.lora_B.new_zeros(self.out_features, self.rank)
        return zeros.index_copy(0, self.rows.to(zeros.device), self.lora_B)  # (out, rank)

    def _add_factors(self, rank: int, rows: Tensor | None, device=None) -> None:
        """Freeze W and b; A starts at random, B at zero, on `device` if not on the weight's."""
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, not {rank!r}")
        like = {"device": device or self.weight.device, "dtype": self.weight.dtype}
        outputs = self.out_features
        if rows is not None:
            rows = torch.as_tensor(rows, dtype=torch.long, device="cpu")
            there = set(range(outputs)).intersection(rows.tolist())
            if not 0 < len(rows) == len(there):
                raise ValueError(f"rows must be different row numbers from 0 to {outputs - 1}")
            outputs, rows = len(rows), rows.to(like["device"])
        self.rank, self.rows = rank, rows
        if rows is not None:
            self.register_state_dict_post_hook(save_rows)
            self.register_load_state_dict_pre_hook(load_rows)
        self.register_forward_pre_hook(keep_calls)
        self.requires_grad_(False)  # all that is there so far
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def _apply(self, move, *args, **words):
        """Move `rows` as well: it is not a buffer, so that an average of models (EMA) skips it."""
        self.rows = None if self.rows is None else move(self.rows)
        return nn.Linear._apply(self, move, *args, **words)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs) -> MLAELinear:
        """Adapt `linear`: its weight and bias are shared, not copied, and frozen.

        kwargs as for the class. The experts of a float16 or bfloat16 layer are float32 unless
        `dtype` says otherwise: AdamW's steps are too small for half precision. Raises ValueError
        for a layer with experts, for the out_proj of nn.MultiheadAttention, and for one that does
        more than a linear layer, or is of complex numbers.
        """
        if hasattr(linear, "lora_A"):
            raise ValueError("the layer has experts already; merge them first with to_linear()")
        if isinstance(linear, NonDynamicallyQuantizableLinear):
            raise ValueError("nn.MultiheadAttention never calls its out_proj: it cannot be adapted")
        more = {"a forward of its own": type(linear).forward is not nn.Linear.forward}
        more["hooks"] = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
        more["a parametrization"] = hasattr(linear, "parametrizations")
        more["complex numbers"] = linear.weight.is_complex()
        for what, has in more.items():
            if has:
                raise ValueError(f"the {type(linear).__name__} has {what}: it cannot be adapted")
        kwargs.setdefault("dtype", torch.promote_types(linear.weight.dtype, torch.float32))
        # on meta: no memory for a weight that is replaced at once
        kwargs |= {"device": "meta", "_factors_on": linear.weight.device}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **kwargs)
        linear.requires_grad_(False)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    @property
    def mask_prob(self) -> float:
        """Masking probability p; ValueError if it is set outside [0, 1). See `set_mask_prob`."""
        return self._mask_prob

    @mask_prob.setter
    def mask_prob(self, p: float) -> None:
        check_mask_prob(p)
        self._mask_prob = float(p)
        if self.rate is not None:
            self.rate.fill_(p)

    def _fold_onto(self, weight: Tensor) -> Tensor:
        c = self.lora_lambda * self.expert_mask
        return _fold(weight, self.lora_A, self.full_B(), c)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """B diag(lambda) A (out, in) as eval mode adds it to `weight`, in float32 or wider."""
        return self._fold_onto(torch.zeros_like(self.weight))

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear that computes what this layer, left as it is, computes in eval mode."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        merged = self._fold_onto(self.weight).to(self.weight.dtype)
        linear.weight = nn.Parameter(merged.contiguous())
        if has_bias:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, mask_prob={self.mask_prob:g}"


def _fold(weight: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """W' = W + B diag(c) A (out, in), in float32 or wider even under autocast: rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
        return torch.addmm(weight.to(wide), B.to(wide) * c.to(wide), A.to(wide))


class _FoldedLinear(torch.autograd.Function):
    """y = x W'^T + b: one matrix product each way, as in the frozen layer.

    Autograd through W' would form the (out, in) gradient that low-rank adapters exist to avoid.
    For g = dL/dy (N, out):

        dx = g W'                         P  = (g B)^T x
        dA = diag(c) P                    dc = sum_in A * P
        dB = g^T (x A^T) diag(c)
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, c, dtype):
        folded = _fold(weight, A, B, c).to(dtype)  # (out, in)
        ctx.cast = x.dtype != dtype
        x = x.to(dtype)  # (..., in)
        kept = folded if ctx.needs_input_grad[0] else None  # (out, in), for dx alone
        ctx.save_for_backward(x, weight, kept, A, B, c)
        return F.linear(x, folded, None if bias is None else bias.to(dtype))  # (..., out)

    @staticmethod
    def backward(ctx, g):
        x, weight, folded, A, B, c = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.cast:
                raise RuntimeError("no second derivatives under autocast; two_branch has them")
            folded = _fold(weight, A, B, c).to(g.dtype)  # again, for second derivatives to see it
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx = g @ folded if need_x else None  # (..., in)
        g = g.reshape(-1, g.shape[-1])  # (N, out)
        x = x.reshape(-1, x.shape[-1])  # (N, in)
        P = (g @ B.to(g.dtype)).T @ x  # (r, in)
        dA = P * c[:, None]  # (r, in)
        dc = (P * A).sum(1)  # (r,)
        h = x @ A.to(x.dtype).T  # (N, r)
        dB = (h.T @ g).T * c  # (out, r); written as g.T @ h it takes twice the time on a CPU
        # only for a caller who thawed the layer
        dweight = g.T @ x if need_weight else None  # (out, in)
        dbias = g.sum(0) if need_bias else None  # (out,)
        return dx, dweight, dbias, dA, dB, dc, None


def keep_calls(layer: nn.Module, args: tuple) -> None:
    """An empty hook. With one, nn.TransformerEncoderLayer does not take its fast path, which reads
    the weights of its layers instead of calling them."""


def save_rows(layer: nn.Module, state: dict, prefix: str, _) -> None:
    """A hook: save `rows`, too."""
    state[f"{prefix}rows"] = layer.rows


def load_rows(layer, state: dict, prefix: str, how: dict, strict, missing, _, errors) -> None:
    """A hook: take the rows of a state, or say that it has none, or not as many."""
    rows = state.pop(f"{prefix}rows", None)
    if rows is None:
        missing.append(f"{prefix}rows")
    elif rows.shape != layer.rows.shape:
        errors.append(f"size mismatch for {prefix}rows: {len(rows)}, not {len(layer.rows)}")
    else:  # as load_state_dict does with a buffer
        place = rows.device if how.get("assign_to_params_buffers") else layer.rows.device
        layer.rows = rows.to(place, torch.long, copy=True)


def check_mask_prob(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"mask_prob must be in [0, 1), not {p}")


def set_mask_prob(model: nn.Module, p: float | list[float] | Tensor) -> None:
    """Set p of every MLAELinear: one number, or one per layer in `model.modules()` order.

    Made for schedules: a compiled model compiles once more at the first change and never again.
    Raises ValueError for a p outside [0, 1) or a wrong number of them; nothing is then changed.
    """
    layers = [m for m in model.modules() if isinstance(m, MLAELinear)]
    rates = torch.as_tensor(p, dtype=torch.float64, device="cpu").tolist()
    rates = rates if isinstance(rates, list) else [rates] * len(layers)
    if len(rates) != len(layers):
        raise ValueError(f"{len(rates)} masking probabilities for {len(layers)} MLAE layers")
    for rate in rates:
        check_mask_prob(rate)
    for layer, rate in zip(layers, rates, strict=True):
        layer.mask_prob = rate


def hold_mask_prob(model: nn.Module) -> None:
    """Keep p of every MLAELinear in a tensor on its device too, so that a change of `mask_prob`
    acts in a CUDA graph that has been captured before."""
    for layer in model.modules():
        if isinstance(layer, MLAELinear):
            place = layer.weight.device
            layer.rate = torch.tensor(layer.mask_prob, dtype=torch.float64, device=place)


PATTERNS = {  # how masking is spread over the layers, by their position from 0 to 1
    "random": lambda pos: torch.ones_like(pos),
    "incremental": lambda pos: 1 - pos,  # more active experts with depth
    "decremental": lambda pos: pos,
    "hourglass": lambda pos: 1 - (2 * pos - 1).abs(),  # dense at both ends
    "protruding": lambda pos: (2 * pos - 1).abs(),
}

SCHEDULES = {  # over the training: the factor on p at a progress from 0 to 1
    "constant": lambda progress: 1.0,
    "increase": lambda progress: progress,
    "decrease": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
    "off-at-end": lambda progress: min(1.0, 10 * (1 - progress)),  # over the last tenth
}


def mask_rates(pattern: str, num_layers: int, mask_prob: float) -> Tensor:
    """Masking probability of each layer (num_layers,), float64, with mean `mask_prob`.

    The paper names the patterns; their exact shapes are not published, these are ours: the rate
    of layer l of L is p times the shape in PATTERNS at l / (L - 1), over the shape's mean. Above
    0.99 it is cut, so that every expert can act, and the others are scaled until the mean is p.
    Raises ValueError for an unknown pattern, a bad p, or a p that the pattern cannot reach.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"mask pattern must be one of {', '.join(PATTERNS)}, not {pattern!r}")
    check_mask_prob(mask_prob)
    shape = PATTERNS[pattern](torch.linspace(0, 1, num_layers, dtype=torch.float64, device="cpu"))
    if (shape == shape[0]).all():
        return torch.full_like(shape, mask_prob)
    highest = 0.99
    reach = highest * (shape > 0).double().mean()
    if mask_prob > reach:
        raise ValueError(f"{pattern}: {num_layers} layers allow p <= {reach:.2f}, not {mask_prob}")
    cut = torch.zeros_like(shape, dtype=torch.bool)  # layers that are at the highest rate
    while True:
        budget = mask_prob * num_layers - highest * int(cut.sum())
        rates = torch.where(cut, highest, shape * budget / shape[~cut].sum().clamp_min(1e-12))
        if not (rates > highest).any():
            return rates
        cut |= rates > highest


def fixed_masks(
    pattern: str, num_layers: int, rank: int, mask_prob: float, generator=None
) -> Tensor:
    """Fixed masks M (num_layers, rank) of 0. and 1.

    Row l keeps about rank * (1 - mask_rates[l]) random experts, at least one. Every pattern keeps
    as many in total as `random` does, which is round(rank * (1 - mask_prob)) a layer: patterns are
    compared at an equal budget. Raises as `mask_rates` does.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    want = rank * (1 - mask_rates(pattern, num_layers, mask_prob))
    keep = want.round().clamp(1, rank)
    total = num_layers * max(1, round(rank * (1 - mask_prob)))
    while int(keep.sum()) != total:  # rounding drifted: move the layer furthest off its wish
        step = 1 if keep.sum() < total else -1
        movable = keep < rank if step == 1 else keep > 1
        distance = torch.where(movable, step * (keep - want), torch.inf)
        keep[distance.argmin()] += step
    noise = torch.rand(num_layers, rank, generator=generator, device="cpu")
    order = noise.argsort(dim=1)  # a random permutation in each row
    return (order < keep[:, None]).float()


@torch.no_grad()
def expert_similarity(layer: MLAELinear) -> Tensor:
    """Frobenius cosine of the experts' rank-1 matrices (rank, rank): cos(a_i, a_j) * cos(b_i, b_j).

    A zero expert (all of them before the first step, masked ones always) has similarity 0, to
    itself as well. The sign and size of lambda do not matter to |cosine|.
    """
    a = F.normalize(layer.lora_A.float(), dim=1)  # (rank, in)
    b = F.normalize(layer.lora_B.float(), dim=0)  # (out, rank)
    return (a @ a.T) * (b.T @ b)  # (rank, rank)
