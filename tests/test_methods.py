"""The rows of METHODS: what trains, and the updates and hooks against formulas in float64."""

import argparse
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log, stop_after
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import eval as evaluation
import model as models
import runs
from methods import (
    ALL_LINEARS,
    METHODS,
    LoRALinear,
    MoRLinear,
    SNELLLinear,
    allocate_sparsity,
)

LAYERED = [method for method, row in METHODS.items() if row.layer]


def make(method, **settings):
    """Few ranks, all of which act; other methods ignore the settings."""
    settings = {"rank": 4, "mask_prob": 0.0, **settings}
    return models.create("vit_nano", 10, pretrained=False, method=method, **settings)


def layers_of(net):
    return list(models.adapters(net).values())


def trained(net):
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def step(net, method, progress, x, lr=0.01):
    """One step of training as train.py's, by plain gradient descent."""
    net.zero_grad()
    loss = F.cross_entropy(net(x), torch.arange(len(x))) + METHODS[method].penalty(net)
    loss.backward()
    METHODS[method].before_step(net, progress)
    for parameter in trained(net):
        parameter.data -= lr * parameter.grad


def fill_gradients(net):
    for parameter in trained(net):
        parameter.grad = torch.ones_like(parameter)


def assert_same(y, want, leaves, twins):
    """The same values, and the same gradients of a weighted sum in the leaves."""
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(want)
    (y * towards).sum().backward()
    (want * towards).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-7, atol=1e-9)


def twins_of(leaves):
    return [leaf.detach().clone().requires_grad_() for leaf in leaves]


TRAINED = {
    "mlae": ("lora_A", "lora_B", "lora_lambda"),
    "lora": ("lora_A", "lora_B"),
    "rmlora": ("lora_A", "lora_B"),
    "mor": ("lora_A", "lora_B", "scale_A", "scale_B", "router.weight"),
    "snell": ("lora_A", "lora_B"),
    "snella": ("lora_A", "lora_B", "mix"),
    "bitfit": ("bias",),
    "layernorm": ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "norm.weight", "norm.bias"),
    "linear": (),
    "full": ("",),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_these_parameters_and_no_others(method, images):
    net = make(method).train()
    row = METHODS[method]
    assert len(layers_of(net)) == (6 * len(row.targets) if row.layer else 0)
    for i in range(2):
        step(net, method, i / 2, images)
    for name, parameter in net.named_parameters():
        ours = name.endswith(TRAINED[method]) or name.startswith("head.")
        assert parameter.requires_grad == ours, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ours, name


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_at_the_pretrained_model(method, images):
    plain = models.create("vit_nano", 10, method="linear").eval()
    net = models.create("vit_nano", 10, method=method, rank=4, targets=ALL_LINEARS)
    net.head.load_state_dict(plain.head.state_dict())
    for training in (True, False):
        difference = (net.train(training)(images) - plain(images)).abs().max()
        assert (0 < difference < 1e-3) if "snell" in method else (difference == 0)


def test_settings_of_other_methods_are_ignored_and_unknown_ones_are_not():
    net = make("linear", rank=4)
    assert net.method == "linear" and net.method_settings == {}
    assert make("lora").method_settings == {"rank": 4, "coef_init": 1.0, "lora_dropout": 0.0}
    with pytest.raises(TypeError, match="rnak"):
        make("linear", rnak=4)


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("rmlora", {"variant": 3}),
        ("mor", {"num_experts": 0}),
        ("snell", {"rank": 5}),
        ("snell", {"sparsity": 1.0}),
        ("snell", {"gate": "soft"}),
        ("snella", {"sparsity": 1.5}),
        ("snella", {"start_sparsity": -1}),
    ],
)
def test_settings_that_are_not_to_be_had(method, wrong):
    (name,) = wrong
    with pytest.raises(models.ModelError, match=name.removeprefix("start_").replace("_", ".")):
        make(method, **wrong)


def test_layer_norms_are_known_by_their_class():
    net = models.create("convnext_atto", 3, pretrained=False, method="layernorm")
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {"stem.1.weight", "stages.1.downsample.0.bias", "head.norm.weight"} <= names
    assert not any("conv" in name or "mlp" in name for name in names)
    with pytest.raises(models.ModelError, match="none of what this method trains"):
        models.create("resnet10t", 3, pretrained=False, method="layernorm")  # batch norms alone


def named(sizes):
    return {f"layer{number}": size for number, size in enumerate(sizes)}


def test_numbers_of_parameters_by_formula():
    dim, rank = 768, 8
    six = 4 * [(dim, dim)] + [(dim, 4 * dim), (4 * dim, dim)]
    four = [(dim, 3 * dim), *six[3:]]

    def size(method, sizes):
        return models.adapter_size(method, named(sizes), rank=rank)

    assert size("snell", 12 * six) == 165_888 * rank
    assert size("snella", 12 * four) == 147_456 * rank + 48 * 3
    mor = rank * 5 * dim + 8 * (5 * dim + rank)  # the factors; the router and both scales
    assert size("mor", 24 * six[4:5]) == 24 * mor
    qkv = 12 * rank * 4 * dim
    assert size("rmlora", 12 * four[:1]) == size("lora", 12 * four[:1]) == qkv
    assert size("mlae", 12 * four[:1]) == qkv + 12 * rank


def test_the_rank_nearest_to_a_budget():
    layers = named(12 * [(768, 2304)])
    assert models.nearest_rank("lora", layers, 8.51 * 36_864) == 9  # 36,864 a rank
    assert models.nearest_rank("mlae", layers, 1) == 1
    assert models.nearest_rank("snell", layers, 200_000) == 6  # even alone: 184,320 is out
    assert models.nearest_rank("mor", layers, 12 * (2 * 3080 + 8 * 3072)) == 2
    for method, wrong in (("bitfit", {}), ("snell", {"gate": "x"})):
        with pytest.raises(ValueError, match="gate" if wrong else "bitfit"):
            models.nearest_rank(method, layers, 100, **wrong)


@pytest.mark.parametrize("method", LAYERED)
def test_a_budget_counts_what_trains(method, capsys):
    targets = ["attn.q", "mlp.fc2"]
    args = argparse.Namespace(model="vit_nano", img_size=28, targets=targets, method=method)
    vars(args).update(METHODS[method].settings, budget=30_000)
    rank = models.rank_within(args)
    net = make(method, targets=targets, rank=rank)
    counts = models.count_parameters(net)
    assert f"{counts['trainable'] - counts['head']:,}" in capsys.readouterr().out


# ---- SNELL and SNELLA


def snell_update(A, B, sparsity, gate, mix):
    """(out, in), as the papers have it, by autograd through every step."""
    half = len(A) // 2
    a, b = A.T[None], B[:, None]  # (1, in, rank), (out, 1, rank)
    near = (a[..., :half] - b[..., :half]).square().sum(-1).sqrt()
    far = (a[..., half:] - b[..., half:]).square().sum(-1).sqrt()
    D = 0.1 * near - 0.1 * far
    if mix is not None:
        scale, temperature, shift = mix
        weights = torch.exp(D / temperature)
        D = D + scale * weights / weights.sum(dim=0, keepdim=True) + shift
    threshold = float(np.quantile(D.detach().abs().numpy(), sparsity))
    if gate == "paper":
        return D * torch.clamp(D.abs() - threshold, min=0)
    kept = (D.abs() > threshold).to(D)
    return D * D.abs().detach() * kept


def random_snell(*sizes, **keywords):
    layer = SNELLLinear(*sizes, dtype=torch.float64, **keywords)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    if layer.mix is not None:
        layer.mix.data = torch.tensor([0.7, 1.3, -0.2], dtype=torch.float64)
    return layer


@pytest.mark.parametrize("gate", ["code", "paper"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("sparsity", "rows"), [(0.0, range(7)), (0.37, range(7)), (0.9, [1, 5])])
def test_snell_is_its_equations(gate, adaptive, sparsity, rows):
    place = {"rows": list(rows)} if len(rows) < 7 else {}
    layer = random_snell(11, 7, rank=6, sparsity=sparsity, adaptive=adaptive, gate=gate, **place)
    x = torch.randn(5, 3, 11, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B] + [layer.mix] * adaptive
    twins = twins_of(leaves)
    x_twin, A, B = twins[:3]
    update = snell_update(A, B, sparsity, gate, twins[3] if adaptive else None)
    update = torch.eye(7, dtype=torch.float64)[:, list(rows)] @ update  # zero in other rows
    want = x_twin @ layer.weight.T + layer.bias + x_twin @ update.T
    torch.testing.assert_close(layer.delta_weight(), update.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.to_linear()(x), want, rtol=1e-9, atol=1e-9)
    assert_same(layer(x), want, leaves, twins)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_equal_factors_give_no_nan():
    layer = SNELLLinear(6, 5, rank=4, sparsity=0.0, adaptive=True)
    with torch.no_grad():
        layer.lora_A.fill_(0.5)
        layer.lora_B.fill_(0.5)
        layer.lora_B[0, 0] = 0.25
    layer(torch.randn(3, 6)).square().sum().backward()
    assert layer.lora_A.grad.isfinite().all() and layer.lora_B.grad.isfinite().all()


def test_no_matrix_of_the_layers_size_is_kept_for_the_backward_pass():
    layer = SNELLLinear(40, 50, rank=4, adaptive=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, 40, requires_grad=True))
    assert all(tensor.numel() < 50 * 40 for tensor in kept)


@pytest.mark.parametrize(
    ("importance", "sizes", "budget", "kept"),
    [
        ([1, 9], [100, 10], 50, [40, 10]),  # 45 go over its size: 5, then 35 left over
        ([1, 1, 1], [9, 9, 9], 10, [3, 3, 3]),  # one is left: a third of it is no entry
        ([2, 1], [10, 10], 99, [10, 10]),
        ([0, 0], [30, 10], 20, [15, 5]),
        ([1e-30, 3e-30], [100, 100], 80, [20, 60]),
        ([math.nan, 1.0], [10, 10], 5, [0, 0]),
    ],
)
def test_shares_by_hand(importance, sizes, budget, kept):
    shares = allocate_sparsity(torch.tensor(importance), sizes, budget)
    want = [1 - count / size for count, size in zip(kept, sizes, strict=True)]
    assert shares == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.9, 1.0])
def test_the_budget_falls_as_a_cube_to_its_end(progress):
    overall = 0.7 - 0.6 * (1 - progress) ** 3
    net = make("snella", start_sparsity=0.1, sparsity=0.7)
    layers = layers_of(net)
    assert {layer.sparsity for layer in layers} == {0.1}
    for layer in layers:
        layer.sensitivity.uniform_()
    METHODS["snella"].before_step(net, progress)
    sizes = [layer.weight.numel() for layer in layers]
    kept = [int((layer.delta_weight() != 0).sum()) for layer in layers]
    assert sum(kept) == pytest.approx((1 - overall) * sum(sizes), abs=3 * len(sizes))


def test_importance_is_the_product_of_two_running_means():
    net = make("snella").double()
    layers = layers_of(net)
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


def test_an_overflow_does_not_stay_in_the_importance():
    net = make("snella")
    layer = layers_of(net)[0]
    for value in (1.0, torch.inf, torch.nan):
        fill_gradients(net)
        layer.lora_A.grad[0, 0] = value
        METHODS["snella"].before_step(net, 0.5)
    assert layer.sensitivity.isfinite().all() and math.isfinite(layer.sparsity)


@pytest.mark.parametrize("sparsity", [-2.0, 0.3, 7.0])
def test_a_saved_sparsity_is_kept_and_a_strangers_is_a_share(sparsity):
    layer, other = random_snell(9, 8, rank=4), random_snell(9, 8, rank=4)
    layer.sparsity = sparsity
    other.load_state_dict(layer.state_dict())
    assert other.sparsity == min(1, max(0, sparsity))
    assert bool(other.delta_weight().any()) == (sparsity < 1)


# ---- Mixture of Ranks


def random_mor(**keywords):
    layer = MoRLinear(7, 5, dtype=torch.float64, **keywords)
    for name in ("lora_A", "lora_B", "scale_A", "scale_B"):
        nn.init.normal_(getattr(layer, name))
    return layer


@pytest.mark.parametrize("rows", [None, [0, 4]], ids=["all", "some"])
def test_mor_is_its_equation(rows):
    layer = random_mor(rank=3, num_experts=4, rows=rows)
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B, layer.scale_A, layer.scale_B, layer.router.weight]
    twins = twins_of(leaves)
    x_twin, A, B, scale_A, scale_B, router = twins
    gates = torch.exp(x_twin @ router.T)
    gates = gates / gates.sum(dim=-1, keepdim=True)
    want = x_twin @ layer.weight.T + layer.bias
    place = torch.eye(5, dtype=torch.float64)[rows or range(5)]  # (rows, out)
    for i in range(4):
        expert = torch.diag(scale_B[i]) @ B @ torch.diag(scale_A[i]) @ A  # alpha / rank is 1
        want = want + gates[..., i : i + 1] * (x_twin @ expert.T @ place)
    assert_same(layer(x), want, leaves, twins)


@pytest.mark.parametrize("kind", ["mor", "snella"])
def test_a_compiled_layer_is_one_graph_and_follows_its_sparsity(kind):
    torch.compiler.reset()
    snella = random_snell(7, 5, rank=4, adaptive=True)
    layer = snella if kind == "snella" else random_mor(rank=3, rows=[0, 4])
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(layer, dynamic=True, fullgraph=True, backend=counter)
    x = torch.randn(4, 7, dtype=torch.float64)
    for sparsity in (0.1, 0.5, 0.6, 0.9):
        layer.sparsity = sparsity  # a mixture has none
        one, two = (call(x).square().sum() for call in (fast, layer))
        torch.testing.assert_close(one, two)
        grads = [torch.autograd.grad(y, trained(layer)) for y in (one, two)]
        torch.testing.assert_close(*grads)
    assert 1 <= counter.frame_count <= 2


def test_the_experts_of_mor_do_not_start_the_same():
    layer = MoRLinear(7, 5, rank=16, num_experts=8)
    assert layer.lora_B.eq(0).all() and layer.scale_B.eq(1).all()
    assert 0.005 < (layer.scale_A - 1).std() < 0.04


def test_mor_says_why_it_does_not_merge():
    with pytest.raises(TypeError, match="depends on the input"):
        MoRLinear(7, 5).to_linear()
    with pytest.raises(models.ModelError, match="mor cannot be merged"):
        models.merge(make("mor"))


# ---- RM-LoRA


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_of_lora_is_pefts(mode):
    """In float64, with the same mask of inputs: outputs and all gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    linear = nn.Linear(6, 10, dtype=torch.float64)
    ours = LoRALinear.from_linear(linear, rank=4, mask_prob=0, coef_init=2.0, dropout=0.4)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.4, target_modules=["0"])
    twin = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
    theirs = twin.base_model.model[0]
    A, B = theirs.lora_A["default"].to(torch.float64), theirs.lora_B["default"].to(torch.float64)
    nn.init.normal_(ours.lora_B)
    A.weight.data, B.weight.data = ours.lora_A.data.clone(), ours.lora_B.data.clone()
    inputs, outputs = [], []
    for layer in (ours, theirs):
        getattr(layer, mode)()
        torch.manual_seed(3)
        inputs.append(torch.linspace(-1, 1, 5 * 7 * 6, dtype=torch.float64).view(5, 7, 6))
        outputs.append(layer(inputs[-1].requires_grad_()))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    pairs = [inputs, [ours.lora_A, A.weight], [ours.lora_B, B.weight]]
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)
    merged = ours.to_linear()(inputs[0])
    assert torch.allclose(merged, outputs[0]) == (mode == "eval")  # it acts in training alone


def test_the_penalty_is_the_mean_of_norms_with_its_gradient():
    net = make("rmlora").double()
    layers = layers_of(net)
    for layer in layers[1:]:  # the first B stays zero, as at the start
        nn.init.normal_(layer.lora_B)
    penalty = METHODS["rmlora"].penalty(net)
    penalty.backward()
    norms = []
    for layer in layers:
        A, B = layer.lora_A, layer.lora_B
        for factor, grad in ((A, A.grad), (B.T, B.grad.T)):
            off = (factor @ factor.T - torch.eye(4)).detach()
            norm = off.square().sum().sqrt()
            want = 0.1 * 2 * off @ factor.detach() / norm / (2 * len(layers))
            torch.testing.assert_close(grad, want)
            norms.append(norm.item())
    assert penalty.item() == pytest.approx(0.1 * np.mean(norms))


@pytest.mark.parametrize("variant", [1, 2])
def test_after_the_first_step_all_ranks_act_and_k_have_gradients(variant, images):
    net = make("rmlora", rank=8, active_ranks=3, variant=variant)
    layers = layers_of(net)
    METHODS["rmlora"].before_step(net, 0.0)  # as train.py before the first step: no gradients yet
    fill_gradients(net)
    METHODS["rmlora"].before_step(net, 0.1)
    assert all(layer.lora_A.grad.eq(1).all() for layer in layers)  # B is zero: the first step
    for layer in layers:
        nn.init.normal_(layer.lora_B)
        assert layer.lora_lambda.eq(4).all()  # alpha / rank of the authors
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
    assert torch.equal(net.train()(images), net.eval()(images))
    assert together == 120 if variant == 1 else together < 12  # by chance 1 in 56


# ---- all methods


@pytest.mark.parametrize("kind", [MoRLinear, SNELLLinear])
def test_half_precision_rounds_products_and_no_factors(kind):
    linear = nn.Linear(64, 48)
    layer = kind.from_linear(linear, rank=8)
    half = kind.from_linear(copy.deepcopy(linear).bfloat16(), rank=8)
    nn.init.normal_(layer.lora_A, std=0.3)
    nn.init.normal_(layer.lora_B, std=0.3)
    half.load_state_dict(layer.state_dict())
    x = torch.randn(10, 64)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    for net, z in ((layer, y), (half, half(x.bfloat16()))):
        assert z.dtype == torch.bfloat16
        assert (z.float() - want).norm() < 0.02 * want.norm()
        z.float().square().sum().backward()
        assert {p.grad.dtype for p in trained(net)} == {torch.float32}
    with pytest.raises(RuntimeError):
        half(x)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["mlae", "mor", "snella"])
def test_recomputed_blocks_give_the_same_gradients(method, amp, images):
    net, grads = make(method, mask_prob=0.5), []
    for layer in layers_of(net):
        nn.init.normal_(layer.lora_B, std=0.1)
    for recompute in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(recompute)
        torch.manual_seed(1)  # of the masks
        with runs.autocast(torch.device("cpu"), amp):
            logits = net.train()(images[:2])
        assert logits.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        F.cross_entropy(logits.float(), torch.arange(2)).backward()
        grads.append([parameter.grad.clone() for parameter in trained(net)])
    torch.testing.assert_close(*grads)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads[1])


@pytest.mark.parametrize("method", ["rmlora", "snella"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(run, monkeypatch, method):
    words = ["--method", method, "--rank", 6, "--targets", "attn.proj", "--val"]
    words += ["--batch-size", 400]
    whole = run("--out", "whole", *words)
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run("--out", "parts", *words)
    torch.manual_seed(123)
    resumed = run("--out", "parts", *words, "--resume")
    one, two = (load_file(f"{metrics['run']}/adapter.safetensors") for metrics in (whole, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert [row["loss"] for row in log(whole)] == [row["loss"] for row in log(resumed)]
    with pytest.raises(SystemExit) as stop:
        evaluation.main([resumed["run"], "--device", "cpu"])
    assert stop.value.code == 0  # reported, unmerged and merged scores agree


def average(net, steps):
    """The moving average of a model, buffers included, after many steps that do not change it."""
    copy = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    yield copy.module
    for _ in range(steps):
        copy.update_parameters(net)
    yield copy.module


@pytest.mark.parametrize("method", ["mlae", "snell"])
def test_an_average_of_models_keeps_the_rows_of_q_and_v(method):
    net = make(method, targets=["attn.q", "attn.v"])
    rows = [layer.rows.clone() for layer in layers_of(net)]
    *_, averaged = average(net, 60)
    for layer, wanted in zip(layers_of(averaged), rows, strict=True):
        assert torch.equal(layer.rows, wanted)
    other = make(method, targets=["attn.q", "attn.k"])
    other.load_state_dict(averaged.state_dict())
    for layer, wanted in zip(layers_of(other), rows, strict=True):
        assert torch.equal(layer.rows, wanted)
    with pytest.raises(RuntimeError, match="rows"):  # of all layers
        other.load_state_dict(make(method, targets=["attn.qkv"]).state_dict())
    assert layers_of(net.to("meta"))[0].rows.is_meta


def test_an_average_of_models_has_the_sparsity_that_they_come_to():
    net = make("snella")
    steps = average(net, 80)
    next(steps)
    for layer in layers_of(net):
        layer.sparsity = 0.8
    averaged = next(steps).eval()
    for layer in layers_of(averaged):
        assert (layer.delta_weight() == 0).double().mean().item() == pytest.approx(0.8, abs=1e-3)
    other = make("snella")
    other.load_state_dict(averaged.state_dict())
    assert [layer.sparsity for layer in layers_of(other)] == pytest.approx([0.8] * 24, abs=1e-3)


@pytest.mark.parametrize("method", ["mlae", "snell"])
def test_layers_of_rows_can_be_made_on_meta_and_filled(method):
    net = make(method, targets=["attn.q", "attn.v"]).eval()
    state, x = net.state_dict(), torch.randn(2, 3, 28, 28)
    assigned = make(method, targets=["attn.q", "attn.v"]).eval().to("meta")
    assigned.load_state_dict(state, assign=True)
    emptied = make(method, targets=["attn.q", "attn.v"]).eval().to("meta").to_empty(device="cpu")
    emptied.load_state_dict(state)
    for other in (assigned, emptied):
        assert torch.equal(other(x), net(x))
        rows = [layer.rows for layer in layers_of(other)]
        assert all(torch.equal(a, b.rows) for a, b in zip(rows, layers_of(net), strict=True))
        assert not rows[0].data_ptr() == layers_of(net)[0].rows.data_ptr()
    few = {key: value[:9] if key.endswith("rows") else value for key, value in state.items()}
    with pytest.raises(RuntimeError, match="rows"):
        assigned.load_state_dict(few)
    assert torch.equal(assigned(x), net(x))


def test_the_sparsity_of_snell_keeps_its_precision_and_compiles_in_scoring():
    layer = SNELLLinear(16, 16, rank=4, sparsity=0.9).eval()
    assert SNELLLinear(16, 16, rank=4, sparsity=0.9).eval().bfloat16().sparsity == 0.9
    x = torch.randn(2, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x), layer(x))
