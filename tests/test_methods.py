"""The methods beside MLAE: their updates against formulas written anew in float64, and hooks."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log, stop_after
from safetensors.torch import load_file
from torch import nn

import eval as evaluation
import methods
import model as models
import runs
from methods import METHODS, MoRLinear, SNELLLinear, allocate_sparsity, orthogonality
from mlae import set_mask_prob

NEW = ("rmlora", "mor", "snell", "snella", "bitfit", "layernorm")
FEW = {"rank": 4}


def make(method, **kwargs):
    own = FEW if "rank" in METHODS[method].settings else {}
    return models.create("vit_nano", 10, pretrained=False, method=method, **{**own, **kwargs})


def step(net, method, progress, x, lr=0.01):
    """One step of training as train.py's, by plain gradient descent."""
    net.zero_grad()
    loss = F.cross_entropy(net(x), torch.arange(len(x))) + METHODS[method].penalty(net)
    loss.backward()
    METHODS[method].before_step(net, progress)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter -= lr * parameter.grad


# ---- the start, what trains, how much


@pytest.mark.parametrize("method", NEW)
def test_training_starts_at_the_pretrained_model(method, images):
    plain = models.create("vit_nano", 10, method="linear").eval()
    net = models.create("vit_nano", 10, method=method, **FEW).eval()
    net.head.load_state_dict(plain.head.state_dict())
    difference = (net(images) - plain(images)).abs().max()
    assert (0 < difference < 1e-3) if "snell" in method else (difference == 0)


def test_the_first_kernel_is_as_small_as_the_authors():
    layer = SNELLLinear(768, 3072, rank=32)
    for factor, size in ((layer.lora_A, 768), (layer.lora_B, 3072)):
        bound = 1 / math.sqrt(size * 16)
        assert 0.99 * bound < factor.abs().max() <= bound
    kernel = snell_kernel(layer.lora_A.detach(), layer.lora_B.detach())
    assert kernel.abs().mean() == pytest.approx(4e-4, rel=0.1)


TRAINED = {
    "rmlora": ("lora_A", "lora_B"),
    "mor": ("lora_A", "lora_B", "scale_A", "scale_B", "router.weight"),
    "snell": ("lora_A", "lora_B"),
    "snella": ("lora_A", "lora_B", "mix"),
    "bitfit": ("bias",),
    "layernorm": ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "norm.weight", "norm.bias"),
}  # fmt: skip


@pytest.mark.parametrize("method", NEW)
def test_gradients_reach_these_parameters_and_no_others(method, images):
    net = make(method).train()
    for i in range(2):
        step(net, method, i / 2, images)
    for name, parameter in net.named_parameters():
        ours = name.endswith(TRAINED[method]) or name.startswith("head.")
        assert parameter.requires_grad == ours, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ours, name


LAYERED = [method for method, row in METHODS.items() if row.layer]


def named(sizes):
    return {f"layer{number}": size for number, size in enumerate(sizes)}


def test_numbers_of_parameters_by_formula():
    dim, rank = 768, 8
    six = 4 * [(dim, dim)] + [(dim, 4 * dim), (4 * dim, dim)]
    four = [(dim, 3 * dim), *six[3:]]

    def size(method, sizes):
        return models.adapter_size(method, named(sizes), rank=rank)

    assert size("snell", 12 * six) == 165_888 * rank
    assert size("snell", 12 * four) == 147_456 * rank
    assert size("snella", 12 * four) == 147_456 * rank + 48 * 3
    mor = rank * 5 * dim + 8 * (5 * dim + rank)  # the factors; the router and both scales
    assert size("mor", 24 * six[4:5]) == 24 * mor
    qkv = 12 * rank * 4 * dim
    assert size("rmlora", 12 * four[:1]) == size("lora", 12 * four[:1]) == qkv
    assert size("mlae", 12 * four[:1]) == qkv + 12 * rank


@pytest.mark.parametrize("targets", [["attn.q", "attn.v"], ["attn.proj", "mlp.fc2"]], ids=str)
@pytest.mark.parametrize("method", LAYERED)
def test_a_budget_counts_what_trains_and_all_of_it_learns(method, targets, images, capsys):
    args = argparse.Namespace(model="vit_nano", img_size=28, targets=targets, method=method)
    vars(args).update(METHODS[method].settings, budget=30_000)
    rank = models.rank_within(args)
    net = make(method, targets=targets, rank=rank).train()
    if method == "mlae":
        set_mask_prob(net, 0.0)
    counts = models.count_parameters(net)
    adapters = counts["trainable"] - counts["head"]
    assert f"rank {rank} is nearest, with {adapters:,} parameters" in capsys.readouterr().out
    for _ in range(3):
        net.zero_grad()
        F.cross_entropy(net(images), torch.arange(4)).backward()
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.data -= 0.01 * parameter.grad
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad != 0).float().mean() > 0.9, name


def test_layer_norms_are_known_by_their_class():
    net = models.create("convnext_atto", 3, pretrained=False, method="layernorm")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {"stem.1.weight", "stages.1.downsample.0.bias", "head.norm.weight"} <= trained
    assert not any("conv" in name or "mlp" in name for name in trained)
    with pytest.raises(models.ModelError, match="the model has none of what this method trains"):
        models.create("resnet10t", 3, pretrained=False, method="layernorm")  # batch norms alone


@pytest.mark.parametrize(
    ("method", "amount", "want"),
    [
        ("lora", 300_000, 8),  # 36,864 a rank
        ("lora", 8.51 * 36_864, 9),
        ("mlae", 1, 1),
        ("snell", 200_000, 6),  # 36,864 a rank, even ranks only: 184,320 is out
        ("mor", 340_000, 1),  # 12 * (rank * 3080 + 8 * 3072)
        ("mor", 340_000 + 12 * 3080, 2),
    ],
)
def test_the_rank_nearest_to_a_budget(method, amount, want):
    assert models.nearest_rank(method, named(12 * [(768, 2304)]), amount) == want


def test_no_rank_for_a_method_without_one_or_with_a_wrong_setting():
    with pytest.raises(ValueError, match="bitfit has no rank"):
        models.nearest_rank("bitfit", {"fc": (8, 8)}, 100)
    with pytest.raises(ValueError, match="gate must be one of code, paper, not 'x'"):
        models.nearest_rank("snell", {"fc": (8, 8)}, 100, gate="x")


# ---- SNELL and SNELLA


def snell_kernel(A, B):
    half = len(A) // 2
    a, b = A.T[None], B[:, None]  # (1, in, rank), (out, 1, rank)
    near = (a[..., :half] - b[..., :half]).square().sum(-1).sqrt()
    far = (a[..., half:] - b[..., half:]).square().sum(-1).sqrt()
    return 0.1 * near - 0.1 * far


def snell_update(A, B, sparsity, gate="code", mix=None):
    """(out, in), as the papers have it, by autograd through every step."""
    D = snell_kernel(A, B)
    if mix is not None:
        a, g, b = mix
        weights = torch.exp(D / g)
        D = D + a * weights / weights.sum(dim=0, keepdim=True) + b
    threshold = float(np.quantile(D.detach().abs().numpy(), sparsity))
    if gate == "paper":
        return D * torch.clamp(D.abs() - threshold, min=0)
    kept = (D.abs() > threshold).to(D)
    return D * D.abs().detach() * kept


def random_snell(*sizes, **keywords):
    layer = SNELLLinear(*sizes, dtype=torch.float64, **keywords)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    if layer.mix is not None:
        layer.mix.data = torch.tensor([0.7, 1.3, -0.2], dtype=torch.float64)
    return layer


@pytest.mark.parametrize("gate", ["code", "paper"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_snell_is_its_equations(gate, adaptive, sparsity):
    layer = random_snell(11, 7, rank=6, sparsity=sparsity, adaptive=adaptive, gate=gate)
    x = torch.randn(5, 3, 11, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(5, 3, 7, dtype=torch.float64)
    names = ["lora_A", "lora_B"] + ["mix"] * adaptive
    twins = [getattr(layer, name).detach().clone().requires_grad_() for name in names]
    x_twin = x.detach().clone().requires_grad_()
    update = snell_update(*twins[:2], sparsity, gate, *twins[2:])
    branches = x_twin @ layer.weight.T + layer.bias + x_twin @ update.T
    y = layer(x)
    torch.testing.assert_close(y, branches, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.delta_weight(), update.detach(), rtol=1e-9, atol=1e-9)
    (y * towards).sum().backward()
    (branches * towards).sum().backward()
    for name, twin in zip(["x", *names], [x_twin, *twins], strict=True):
        own = x if name == "x" else getattr(layer, name)
        torch.testing.assert_close(own.grad, twin.grad, rtol=1e-7, atol=1e-9, msg=name)
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.899, 0.99])
def test_as_many_entries_stay_as_the_sparsity_says(sparsity):
    layer = random_snell(20, 30, rank=4, sparsity=sparsity)
    kept = 599 - math.floor(sparsity * 599)  # those above the quantile, the smallest is position 0
    assert int((layer.delta_weight() != 0).sum()) == kept


def test_the_quantile_is_numpys():
    values = torch.randn(101, dtype=torch.float64)
    for share in (0.0, 0.123, 0.5, 0.9, 0.999, 1.0):
        want = np.quantile(values.numpy(), share)
        assert methods.quantile(values, share).item() == pytest.approx(want)
    ties = torch.tensor([3.0, 1.0, 1.0, 1.0])
    assert methods.quantile(ties, 0.5) == 1 and methods.quantile(ties, 5 / 6) == 2


@pytest.mark.parametrize("adaptive", [False, True])
def test_equal_factors_give_no_nan(adaptive):
    layer = SNELLLinear(6, 5, rank=4, sparsity=0.0, adaptive=adaptive)
    with torch.no_grad():
        layer.lora_A.fill_(0.5)
        layer.lora_B.fill_(0.5)
        layer.lora_B[0, 0] = 0.25
    layer(torch.randn(3, 6)).square().sum().backward()
    for parameter in (layer.lora_A, layer.lora_B):
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_matrix_of_the_layers_size_is_kept_for_the_backward_pass(adaptive):
    layer = SNELLLinear(40, 50, rank=4, adaptive=adaptive)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(3, 40, requires_grad=True))
    assert all(tensor.numel() < 50 * 40 for tensor in kept)
    y.sum().backward()
    assert layer.lora_A.grad.any()


def test_snell_of_some_rows_is_snell_of_these_alone():
    linear = nn.Linear(8, 9).double()
    layer = SNELLLinear.from_linear(linear, rank=4, rows=[1, 2, 7], sparsity=0.5)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    delta = layer.delta_weight()
    assert layer.lora_B.shape == (3, 4) and not delta[[0, 3, 4, 5, 6, 8]].any()
    want = snell_update(layer.lora_A.detach(), layer.lora_B.detach(), 0.5)
    torch.testing.assert_close(delta[[1, 2, 7]], want)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rank": 5}, "rank must be even"),
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1.0"),
        ({"gate": "soft"}, "gate must be one of code, paper, not 'soft'"),
        ({"rows": [9]}, "rows must be"),
    ],
)
def test_settings_of_snell_that_are_not_to_be_had(keywords, message):
    with pytest.raises(ValueError, match=message):
        SNELLLinear(4, 4, **keywords)


@pytest.mark.parametrize(
    ("method", "keywords", "message"),
    [
        ("rmlora", {"variant": 3}, "variant must be 1 or 2"),
        ("rmlora", {"active_ranks": 0}, "active_ranks at least 1"),
        ("mor", {"num_experts": 0}, "num_experts must be at least 1, not 0"),
        ("snella", {"sparsity": 1.5}, r"sparsity must be in \[0, 1\), not 1.5"),
        ("snella", {"start_sparsity": -1}, r"sparsity must be in \[0, 1\), not -1"),
    ],
)
def test_settings_that_are_not_to_be_had(method, keywords, message):
    with pytest.raises(models.ModelError, match=message):
        make(method, **keywords)


@pytest.mark.parametrize("kind", [MoRLinear, SNELLLinear])
def test_a_half_precision_layer_gets_float32_factors(kind):
    linear = nn.Linear(8, 6).to(torch.bfloat16).eval()
    layer = kind.from_linear(linear, rank=4)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), linear(x), rtol=0.02, atol=0.02)
    assert layer(x).dtype == torch.bfloat16
    layer(x).float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="experts already"):
        kind.from_linear(layer)
    with pytest.raises(RuntimeError):
        layer(x.float())


@pytest.mark.parametrize("kind", [MoRLinear, SNELLLinear])
def test_under_autocast_products_are_bfloat16_and_factors_are_not_rounded(kind):
    layer = kind(64, 48, rank=8)
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor, std=0.3)
    x = torch.randn(10, 64)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).norm() < 0.02 * want.norm()
    y.float().square().sum().backward()
    grads = [p.grad for p in layer.parameters() if p.requires_grad]
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize("method", ["rmlora", "snell", "snella", "bitfit", "layernorm"])
def test_merged_is_unmerged(method, images):
    net = make(method).train()
    for i in range(3):
        step(net, method, i / 3, images, lr=0.3)
    plain = models.merge(net.eval())
    assert not models.adapters(plain)
    torch.testing.assert_close(plain(images), net(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(images), models.create("vit_nano", 10)(images), atol=1e-3)


# ---- Mixture of Ranks


def random_mor(**keywords):
    layer = MoRLinear(7, 5, dtype=torch.float64, **keywords)
    for name in ("lora_A", "lora_B", "scale_A", "scale_B"):
        nn.init.normal_(getattr(layer, name))
    return layer


def test_mor_is_its_equation():
    layer = random_mor(rank=3, num_experts=4)
    names = ["lora_A", "lora_B", "scale_A", "scale_B", "router.weight"]
    A, B, scale_A, scale_B, router = (
        layer.get_parameter(name).detach().clone().requires_grad_() for name in names
    )
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    gates = torch.exp(x_twin @ router.T)
    gates = gates / gates.sum(dim=-1, keepdim=True)
    want = x_twin @ layer.weight.T + layer.bias
    for i in range(4):
        expert = torch.diag(scale_B[i]) @ B @ torch.diag(scale_A[i]) @ A  # alpha / rank is 1
        want = want + gates[..., i : i + 1] * (x_twin @ expert.T)
    y = layer(x)
    torch.testing.assert_close(y, want)
    towards = torch.randn_like(y)
    (y * towards).sum().backward()
    (want * towards).sum().backward()
    twins = dict(zip(["x", *names], [x_twin, A, B, scale_A, scale_B, router], strict=True))
    for name, twin in twins.items():
        own = x if name == "x" else layer.get_parameter(name)
        torch.testing.assert_close(own.grad, twin.grad, msg=name)


def test_the_experts_of_mor_do_not_start_the_same():
    layer = MoRLinear(7, 5, rank=16, num_experts=8)
    assert layer.lora_B.eq(0).all() and layer.scale_B.eq(1).all()
    assert 0.005 < (layer.scale_A - 1).std() < 0.04
    assert len(layer.scale_A.unique(dim=0)) == 8


def test_mor_of_some_rows_is_mor_of_these_alone():
    layer = random_mor(rank=3, rows=[0, 4])
    assert layer.scale_B.shape == (8, 2)
    alone = MoRLinear(7, 2, rank=3, dtype=torch.float64)
    trained = {name: value for name, value in layer.state_dict().items() if name != "rows"}
    alone.load_state_dict(trained | {"weight": layer.weight[[0, 4]], "bias": layer.bias[[0, 4]]})
    x = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:, [0, 4]], alone(x))
    others = F.linear(x, layer.weight, layer.bias)[:, 1:4]
    assert torch.equal(layer(x)[:, 1:4], others)


def test_mor_says_why_it_does_not_merge():
    layer = MoRLinear(7, 5)
    for call in (layer.delta_weight, layer.to_linear):
        with pytest.raises(TypeError, match="depends on the input"):
            call()
    with pytest.raises(models.ModelError, match="mor cannot be merged: its update depends"):
        models.merge(make("mor"))


# ---- RM-LoRA


def test_the_penalty_is_the_mean_of_norms():
    net = make("rmlora")
    norms = []
    for layer in models.adapters(net).values():
        nn.init.normal_(layer.lora_B)
        A, B = layer.lora_A.detach().double().numpy(), layer.lora_B.detach().double().numpy()
        norms += [np.linalg.norm(A @ A.T - np.eye(4)), np.linalg.norm(B.T @ B - np.eye(4))]
    assert orthogonality(net).item() == pytest.approx(np.mean(norms), rel=1e-5)
    assert METHODS["rmlora"].penalty(net).item() == pytest.approx(0.1 * np.mean(norms), rel=1e-5)


def test_the_gradient_of_the_penalty_by_hand():
    net = make("rmlora").double()
    layers = list(models.adapters(net).values())
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    orthogonality(net).backward()
    for layer in layers:
        for factor, grad in (
            (layer.lora_A, layer.lora_A.grad),
            (layer.lora_B.T, layer.lora_B.grad.T),
        ):
            off = (factor @ factor.T - torch.eye(4)).detach()
            want = 2 * off @ factor / off.square().sum().sqrt() / (2 * len(layers))
            torch.testing.assert_close(grad, want.detach())


def test_momentum_moves_ranks_whose_gradient_is_masked(images):
    net = make("rmlora", rank=8, active_ranks=1)
    layer = net.blocks[0].attn.qkv
    nn.init.normal_(layer.lora_B)
    optimizer = torch.optim.AdamW([layer.lora_A], lr=0.1, weight_decay=0.0)
    layer.lora_A.grad = torch.ones_like(layer.lora_A)
    optimizer.step()
    before = layer.lora_A.detach().clone()
    fill_gradients(net)
    METHODS["rmlora"].before_step(net, 0.5)
    assert (layer.lora_A.grad[:, 0] == 0).sum() == 7
    optimizer.step()
    assert (layer.lora_A != before).all()


def test_the_penalty_leaves_a_zero_B_to_the_loss():
    net = make("rmlora")
    orthogonality(net).backward()
    for layer in models.adapters(net).values():
        assert layer.lora_B.grad.eq(0).all() and layer.lora_A.grad.any()
        assert layer.lora_A.grad.isfinite().all()


def fill_gradients(net):
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("variant", [1, 2])
def test_after_the_first_step_k_ranks_have_gradients(variant):
    net = make("rmlora", rank=8, active_ranks=3, variant=variant)
    layers = list(models.adapters(net).values())
    fill_gradients(net)
    METHODS["rmlora"].before_step(net, 0.1)
    assert all(layer.lora_A.grad.eq(1).all() for layer in layers)  # B is zero: the first step
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    drawn, together = set(), 0
    for _ in range(20):
        fill_gradients(net)
        METHODS["rmlora"].before_step(net, 0.2)
        assert net.head.weight.grad.eq(1).all() and net.head.bias.grad.eq(1).all()
        for layer in layers:
            rows, columns = layer.lora_A.grad[:, 0], layer.lora_B.grad[0]
            assert rows.sum() == columns.sum() == 3
            assert (layer.lora_A.grad == rows[:, None]).all()
            assert (layer.lora_B.grad == columns).all()
            together += int(torch.equal(rows, columns))
            drawn.add(tuple(rows.tolist()))
    assert len(drawn) > 30  # of 56; 120 draws
    assert together == 120 if variant == 1 else together < 12  # by chance 1 in 56


def test_every_rank_acts_in_the_forward_pass_and_before_gradients_nothing_happens(images):
    net = make("rmlora").train()
    for layer in models.adapters(net).values():
        nn.init.normal_(layer.lora_B)
    METHODS["rmlora"].before_step(
        net, 0.5
    )  # as train.py calls it before the first step on --resume
    assert torch.equal(net(images), net.eval()(images))
    assert net.blocks[0].attn.qkv.lora_lambda.eq(4).all()  # alpha / rank of the authors


# ---- SNELLA's budget


@pytest.mark.parametrize(
    ("importance", "sizes", "budget", "kept"),
    [
        ([1, 3], [100, 100], 80, [20, 60]),
        ([1, 9], [100, 10], 50, [40, 10]),  # 45 go over its size: 5, then 35 left over
        ([1, 1, 2], [1000, 20, 20], 200, [160, 20, 20]),
        ([1, 1, 1], [9, 9, 9], 10, [3, 3, 3]),  # one is left: a third of it is no entry
        ([0.1, 0.2, 0.7], [100, 100, 100], 100, [10, 20, 70]),
        ([2, 1], [10, 10], 99, [10, 10]),
        ([1, 0], [10, 10], 15, [10, 0]),
        ([0, 0], [30, 10], 20, [15, 5]),
        ([1, 5], [10, 10], 0, [0, 0]),
        ([1e-30, 3e-30], [100, 100], 80, [20, 60]),
    ],
)
def test_shares_by_hand(importance, sizes, budget, kept):
    shares = allocate_sparsity(torch.tensor(importance), sizes, budget)
    want = [1 - count / size for count, size in zip(kept, sizes, strict=True)]
    assert isinstance(shares, list) and shares == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("progress", "overall"), [(0.0, 0.1), (0.5, 0.7 - 0.6 / 8), (0.9, 0.7 - 6e-4), (1.0, 0.7)]
)
def test_the_budget_falls_as_a_cube_to_its_end(progress, overall):
    net = make("snella", start_sparsity=0.1, sparsity=0.7)
    layers = list(models.adapters(net).values())
    for layer in layers:
        layer.sensitivity.uniform_()
    METHODS["snella"].before_step(net, progress)
    sizes = [layer.weight.numel() for layer in layers]
    kept = [(1 - layer.sparsity) * size for layer, size in zip(layers, sizes, strict=True)]
    assert sum(kept) == pytest.approx((1 - overall) * sum(sizes), abs=len(sizes) + 1)
    for layer, count in zip(layers, kept, strict=True):
        assert int((layer.delta_weight() != 0).sum()) == pytest.approx(count, abs=2)


def test_before_the_first_step_all_layers_are_equally_sparse():
    net = make("snella")
    assert {layer.sparsity for layer in models.adapters(net).values()} == {0.01}
    METHODS["snella"].before_step(net, 0.0)
    for layer in models.adapters(net).values():
        assert layer.sparsity == pytest.approx(0.01, abs=1e-4)


def test_importance_is_the_product_of_two_running_means():
    net = make("snella").double()
    layers = list(models.adapters(net).values())
    means, spreads = {}, {}
    for progress in (0.2, 0.4, 0.6):
        for layer in layers:
            products = []
            for factor in (layer.lora_A, layer.lora_B):
                factor.grad = torch.randn_like(factor)
                products.append((factor * factor.grad).detach().numpy().ravel())
            now = np.abs(np.concatenate(products))
            means[layer] = 0.85 * means.get(layer, 0.0) + 0.15 * now
            spreads[layer] = 0.85 * spreads.get(layer, 0.0) + 0.15 * np.abs(now - means[layer])
        METHODS["snella"].before_step(net, progress)
    importance = [float(np.mean(means[layer] * spreads[layer])) for layer in layers]
    sizes = [layer.weight.numel() for layer in layers]
    budget = round(sum(sizes) * (1 - (0.8 + (0.01 - 0.8) * 0.4**3)))
    want = allocate_sparsity(importance, sizes, budget)
    assert [layer.sparsity for layer in layers] == pytest.approx(want, abs=1e-4)
    assert len({round(share, 3) for share in want}) > 3


def test_shares_without_a_number_end():
    assert allocate_sparsity([math.nan, 1.0], [10, 10], 5) == [1.0, 1.0]


def test_an_overflow_does_not_stay_in_the_importance():
    net = make("snella")
    layer = models.adapters(net)["blocks.0.attn.qkv"]
    for value in (1.0, torch.inf, torch.nan):
        fill_gradients(net)
        layer.lora_A.grad[0, 0] = value
        METHODS["snella"].before_step(net, 0.5)
    assert layer.sensitivity.isfinite().all() and math.isfinite(layer.sparsity)


def test_a_saved_layer_knows_its_sparsity_and_its_importance(tmp_path, images):
    net = make("snella").train()
    for i in range(3):
        step(net, "snella", (i + 1) / 3, images)
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    fresh = make("snella")
    own = models.adapter_state(net)
    base = {key: value for key, value in net.state_dict().items() if key not in own}
    fresh.load_state_dict(base, strict=False)
    assert not torch.equal(fresh.eval()(images), net.eval()(images))
    models.load_adapter(fresh, tmp_path / "a.safetensors")
    for one, two in zip(
        models.adapters(net).values(), models.adapters(fresh).values(), strict=True
    ):
        assert one.sparsity == two.sparsity != 0.01
        assert torch.equal(one.sensitivity, two.sensitivity)
    METHODS["snella"].before_step(fresh.requires_grad_(False), 1.0)  # as train.py on --resume
    assert torch.equal(fresh(images), net(images))


@pytest.mark.parametrize("sparsity", [-2.0, 1.0, 7.0])
def test_a_sparsity_from_a_strangers_file_is_a_share(sparsity):
    layer = random_snell(9, 8, rank=4)
    state = layer.state_dict()
    layer.load_state_dict(state | {"_extra_state": torch.tensor(sparsity)})
    assert layer.sparsity == min(1, max(0, sparsity))
    assert bool(layer.delta_weight().any()) == (sparsity < 1)


def test_a_compiled_layer_follows_its_sparsity_without_another_compilation():
    torch.compiler.reset()
    layer, compiled = random_snell(9, 8, rank=4, adaptive=True), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    fast = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)
    x = torch.randn(3, 9, dtype=torch.float64)
    for sparsity in (0.1, 0.5, 0.6, 0.9):
        layer.sparsity = sparsity
        torch.testing.assert_close(fast(x), layer(x))
    assert len(compiled) <= 2


# ---- whole runs


SHORT = {"rmlora": ["--active-ranks", 2]}  # a few of the four ranks learn


def arguments_of(method):
    words = ["--method", method, "--val", "--batch-size", 400, *SHORT.get(method, [])]
    if METHODS[method].layer:
        words += ["--rank", 4, "--targets", "attn.proj", "mlp.fc1"]
    return words


@pytest.mark.parametrize("method", NEW[:-1])  # layernorm is saved as bitfit is
def test_a_killed_run_goes_on_as_if_nothing_had_happened(run, monkeypatch, method):
    arguments = arguments_of(method)
    whole = run("--out", "whole", *arguments)
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run("--out", "parts", *arguments)
    torch.manual_seed(123)
    resumed = run("--out", "parts", *arguments, "--resume")
    one, two = (load_file(f"{metrics['run']}/adapter.safetensors") for metrics in (whole, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert [row["loss"] for row in log(whole)] == [row["loss"] for row in log(resumed)]


SCORE = """import json, sys, eval as evaluation, data, torch
scores = {}
for folder in sys.argv[1:]:
    model, config = evaluation.load_run(folder)
    args = config["arguments"]
    normalize = data.create_normalizer(args, model)
    _, images = data.load_data(args)
    scores[folder] = evaluation.evaluate(model, images, normalize, workers=0)["loss"]
print(json.dumps(scores))
"""


def test_another_process_scores_the_saved_runs_the_same(run):
    want = {}
    for method in NEW:
        metrics = run(*arguments_of(method), "--epochs", 1, "--lr", 0.02)
        want[metrics["run"]] = metrics["val_loss"]
    root = Path(evaluation.__file__).parent
    folders = [str(Path(folder).absolute()) for folder in want]
    command = [sys.executable, "-c", SCORE, *folders]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    scores = json.loads(done.stdout.splitlines()[-1])
    assert list(scores.values()) == pytest.approx(list(want.values()), abs=2e-6)
    assert len(set(want.values())) == len(NEW)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", [*LAYERED, "bitfit", "layernorm"])
def test_recomputed_blocks_give_the_same_gradients(method, amp, images):
    net, grads = make(method), []
    for layer in models.adapters(net).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    for recompute in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(recompute)
        torch.manual_seed(1)  # of the masks
        with runs.autocast(torch.device("cpu"), amp):
            logits = net.train()(images[:2])
        assert logits.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        F.cross_entropy(logits.float(), torch.arange(2)).backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
        assert one.dtype == torch.float32 and one.isfinite().all()


@pytest.mark.parametrize("rows", [None, [0, 4]])
def test_a_compiled_mixture_of_ranks_is_one_graph(rows):
    torch.compiler.reset()
    layer = random_mor(rank=3, rows=rows)
    fast = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(fast(x), layer(x))
    fast(x).square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for grad, parameter in zip(
        grads, [p for p in layer.parameters() if p.requires_grad], strict=True
    ):
        torch.testing.assert_close(grad, parameter.grad)
