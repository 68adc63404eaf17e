"""The layer against the two-branch formula in float64, and what layers of PyTorch survive."""

import copy
import math
import multiprocessing
import pickle
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import mlae
from mlae import MLAELinear, expert_similarity, fixed_masks, mask_rates, set_mask_prob


def make(n_in=6, n_out=10, **kwargs):
    """A layer with experts that act."""
    layer = MLAELinear(n_in, n_out, **{"rank": 4, **kwargs})
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.lora_lambda)
    return layer


def bare_mask_layer(rank, p):
    """A layer whose output for x = 1 is its scaled mask."""
    layer = MLAELinear(rank, rank, bias=False, rank=rank, mask_prob=p)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(rank))
        layer.lora_B.copy_(torch.eye(rank))
    return layer


def two_branch(x, weight, bias, A, B, c):
    """The definition: y = x W^T + b + sum_i c_i (x . a_i) b_i."""
    y = x @ weight.T + (0 if bias is None else bias)
    for i in range(len(c)):
        y = y + c[i] * (x @ A[i])[..., None] * B[:, i]
    return y


def equal_states(one, two):
    return all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"rows": [7, 2]}, {"expert_mask": [0, 1, 0, 1]}], ids=str
)
def test_values_and_gradients_are_those_of_the_two_branch_formula(kwargs):
    layer = make(dtype=torch.float64, **kwargs).requires_grad_(True).eval()  # a thawed base too
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    place = torch.eye(10, dtype=torch.float64)[:, kwargs.get("rows", range(10))]  # (out, rows)
    mask = torch.tensor(kwargs.get("expert_mask", [1, 1, 1, 1]))
    B, c = place @ layer.lora_B, layer.lora_lambda * mask
    got = layer(x)
    want = two_branch(x, layer.weight, layer.bias, layer.lora_A, B, c)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    delta = (B * c) @ layer.lora_A
    torch.testing.assert_close(layer.delta_weight(), delta.detach(), rtol=0, atol=1e-12)
    leaves = [x, *layer.parameters()]
    towards = torch.randn_like(want)
    grads = [torch.autograd.grad((y * towards).sum(), leaves) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


def test_gradcheck_with_masked_experts():
    layer = make(dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        torch.manual_seed(2)  # one mask for all calls
        names = ("lora_A", "lora_B", "lora_lambda")
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = layer.lora_A, layer.lora_B, layer.lora_lambda
    call(x, *values).sum().backward()
    assert 0 < layer.lora_lambda.grad.count_nonzero() < 4
    assert torch.autograd.gradcheck(call, (x, *values))


def test_experts_change_nothing_at_the_start_and_only_b_has_a_gradient():
    linear = nn.Linear(6, 10)
    x = torch.randn(5, 6)
    before = linear(x)
    layer = MLAELinear.from_linear(linear, mask_prob=0)
    assert torch.equal(layer(x), before) and torch.equal(layer.eval()(x), before)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert not layer.lora_A.grad.any() and not layer.lora_lambda.grad.any()
    assert layer.lora_B.grad.abs().min() > 0


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_a_mask_is_zero_or_scaled_and_its_mean_is_eval(p):
    layer = bare_mask_layer(64, p)
    draws = torch.stack([layer(torch.ones(64)) for _ in range(400)])
    kept = draws != 0
    torch.testing.assert_close(draws[kept], torch.full_like(draws[kept], 1 / (1 - p)))
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / draws.numel())
    assert len(draws.unique(dim=0)) > 1, "the same mask at every step"
    assert torch.equal(layer.eval()(torch.ones(64)), torch.ones(64))


def test_one_mask_for_the_whole_batch_and_another_for_another_layer():
    layer, other = bare_mask_layer(32, 0.5), bare_mask_layer(32, 0.5)
    y = layer(torch.ones(3, 7, 32))
    assert torch.equal(y, y[:1, :1].expand_as(y))
    assert not torch.equal(y[0, 0], other(torch.ones(32)))


def test_nothing_moves_experts_that_are_masked_for_good():
    layer = MLAELinear(6, 10, rank=4, expert_mask=[1, 0, 1, 0])
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    masked = [1, 3]
    assert torch.equal(layer.lora_A[masked], before["lora_A"][masked])
    assert torch.equal(layer.lora_B[:, masked], before["lora_B"][:, masked])
    assert torch.equal(layer.lora_lambda[masked], before["lora_lambda"][masked])
    assert not torch.equal(layer.lora_B[:, 0], before["lora_B"][:, 0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_prob": 1.0},
        {"rank": 0},
        {"expert_mask": [1, 0]},
        {"expert_mask": [1, 0, 0.5, 1]},
        {"rows": []},
        {"rows": [3, 3]},
        {"rows": [10]},
    ],
)
def test_bad_arguments_raise_at_construction(wrong):
    linear = nn.Linear(6, 10)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MLAELinear.from_linear(linear, **{"rank": 4, **wrong})
    assert linear.weight.requires_grad


def test_mask_prob_is_set_later_for_all_layers_or_none():
    net = nn.Sequential(make(), make(10, 6))
    for bad in (1.0, math.nan, [0.1, 1.5], [0.1], [0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match="mask"):
            set_mask_prob(net, bad)
    with pytest.raises(ValueError, match="mask_prob"):
        net[0].mask_prob = 1.0
    assert [layer.mask_prob for layer in net] == [0.5, 0.5]
    set_mask_prob(net, torch.tensor(0.25))
    assert [layer.mask_prob for layer in net] == [0.25, 0.25]
    set_mask_prob(net, mask_rates("decremental", 2, 0.25))
    assert [layer.mask_prob for layer in net] == [0.0, 0.5]


def formula(pattern, length, p):
    pos = torch.arange(length, dtype=torch.float64) / (length - 1)
    return {
        "random": 0 * pos + p,
        "incremental": 2 * p * (1 - pos),
        "decremental": 2 * p * pos,
        "hourglass": 2 * p * (1 - abs(2 * pos - 1)),
        "protruding": 2 * p * abs(2 * pos - 1),
    }[pattern]


@pytest.mark.parametrize("pattern", mlae.PATTERNS)
@pytest.mark.parametrize("length", [1, 11, 12])
def test_mask_rates_are_the_pattern_with_mean_p(pattern, length):
    for p in (0.0, 0.3, 0.65):
        rates = mask_rates(pattern, length, p)
        assert rates.shape == (length,) and rates.min() >= 0 and rates.max() < 1
        assert rates.mean().item() == pytest.approx(p, abs=1e-9)
        if length > 1 and p == 0.3:  # nothing is cut
            want = formula(pattern, length, p)
            torch.testing.assert_close(rates, want * p / want.mean())


@pytest.mark.parametrize(
    ("pattern", "p", "word"),
    [("hourglass", 0.9, "0.8"), ("stairs", 0.5, "stairs"), ("random", 1, "mask_prob")],
)
def test_mask_rates_that_cannot_be(pattern, p, word):
    with pytest.raises(ValueError, match=word):
        mask_rates(pattern, 12, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("rank", [1, 8])
def test_fixed_masks_keep_as_many_experts_whatever_the_pattern(p, rank):
    total = 12 * max(1, round(rank * (1 - p)))
    for pattern in mlae.PATTERNS:
        masks = fixed_masks(pattern, 12, rank, p, torch.Generator().manual_seed(0))
        assert masks.shape == (12, rank) and set(masks.unique().tolist()) <= {0.0, 1.0}
        assert masks.sum(1).min() >= 1 and masks.sum() == total
        again = fixed_masks(pattern, 12, rank, p, torch.Generator().manual_seed(0))
        assert torch.equal(masks, again)


def test_fixed_masks_follow_their_pattern():
    kept = {pattern: fixed_masks(pattern, 12, 8, 0.5).sum(1) for pattern in mlae.PATTERNS}
    assert (kept["random"] == 4).all()
    assert len(fixed_masks("random", 12, 8, 0.5).unique(dim=0)) > 1
    assert (kept["incremental"].diff() >= 0).all() and kept["incremental"][-1] == 8
    assert (kept["decremental"].diff() <= 0).all() and kept["decremental"][0] == 8
    assert kept["hourglass"][[0, 5, 6, 11]].tolist() == [8, 1, 1, 8]
    assert kept["protruding"][[0, 11]].tolist() == [1, 1]
    assert (kept["protruding"][[5, 6]] >= 7).all()


def test_similarity_is_the_frobenius_cosine():
    layer = make()
    matrices = torch.einsum("oi,in->ion", layer.lora_B, layer.lora_A).flatten(1)
    want = F.cosine_similarity(matrices[:, None], matrices[None], dim=2).detach()
    torch.testing.assert_close(expert_similarity(layer), want, rtol=0, atol=1e-5)
    assert torch.equal(expert_similarity(MLAELinear(6, 10, rank=3)), torch.zeros(3, 3))


def test_merging():
    layer, x = make(rows=[1, 2, 5]), torch.randn(5, 6)
    before = copy.deepcopy(layer.state_dict())
    linear, delta = layer.to_linear(), layer.delta_weight()
    assert type(linear) is nn.Linear and set(linear.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(linear(x), layer.eval()(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(linear.weight, layer.weight + delta)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.to_linear().weight, linear.weight)
        assert torch.equal(layer.delta_weight(), delta)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert equal_states(layer.state_dict(), before)


def test_a_layer_in_bfloat16_is_rounded_once_when_it_is_merged():
    layer = make(64, 64).bfloat16()
    y = layer(torch.randn(5, 64, dtype=torch.bfloat16))
    assert y.dtype == layer.expert_mask.dtype == torch.bfloat16
    A, B, c = (tensor.double() for tensor in (layer.lora_A, layer.lora_B, layer.lora_lambda))
    exact = layer.weight.double() + (B * c) @ A
    wrong = layer.to_linear().weight != exact.bfloat16()
    assert wrong.float().mean() < 0.01  # float32 may tip a tie


def test_half_precision_base_gets_float32_experts():
    layer = MLAELinear.from_linear(nn.Linear(6, 10).bfloat16(), rank=4, mask_prob=0)
    nn.init.normal_(layer.lora_B)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_lambda.dtype == torch.float32
    x = torch.randn(5, 6).bfloat16()
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    folded = layer.weight.double() + layer.delta_weight().double()
    exact = F.linear(x.double(), folded, layer.bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError, match="float32"):
        layer(torch.randn(5, 6))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer = make(64, 64, mask_prob=0).to(device)
    x = torch.randn(50, 64, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    leaves = [x, layer.lora_A, layer.lora_B, layer.lora_lambda]
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = two_branch(twins[0], layer.weight.double(), layer.bias.double(), *twins[1:])
    exact.square().sum().backward()
    assert (y - exact).norm() / exact.norm() < 0.01
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - twin.grad).norm() / twin.grad.norm() < 0.02


def test_from_linear_keeps_the_mode_and_refuses_what_it_cannot_adapt():
    linear = nn.Linear(6, 10)
    assert not MLAELinear.from_linear(linear.eval()).training
    assert MLAELinear.from_linear(linear.train()).training
    with pytest.raises(ValueError, match="experts already"):
        MLAELinear.from_linear(make())
    with pytest.raises(ValueError, match="out_proj"):  # torch's attention never calls it
        MLAELinear.from_linear(nn.MultiheadAttention(8, 2).out_proj)


@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_the_fast_path_of_torchs_transformer_does_not_bypass_the_experts(name):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    adapted = MLAELinear.from_linear(getattr(layer, name), rank=4)
    nn.init.normal_(adapted.lora_B)
    merged = copy.deepcopy(layer)
    setattr(layer, name, adapted)
    setattr(merged, name, adapted.to_linear())
    encoder = nn.TransformerEncoder(layer, 2).eval()  # two copies of it
    plain = nn.TransformerEncoder(merged, 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # else torch does not take the fast path
        torch.testing.assert_close(layer(x), merged(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder(x), plain(x), atol=1e-4, rtol=0)


def test_meta_device():
    layer = MLAELinear(6, 10, device="meta")
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 10)
    assert layer.delta_weight().is_meta and layer.to_linear().weight.is_meta
    with torch.device("meta"):
        adapted = MLAELinear.from_linear(nn.Linear(6, 10), expert_mask=[1] * 8, rows=[1, 2])
        assert adapted.lora_B.is_meta
        assert not mask_rates("hourglass", 4, 0.3).is_meta
        assert not fixed_masks("random", 4, 8, 0.3).is_meta


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 4, 6)], ids=str)
def test_input_shapes_of_nn_linear(shape):
    y = make()(torch.randn(shape, requires_grad=True))
    y.sum().backward()
    assert y.shape == (*shape[:-1], 10)


def test_copies_compute_the_same():
    layer, x = make(rows=[1, 2], expert_mask=[1, 1, 0, 1]).eval(), torch.randn(3, 6)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x)) and copied.mask_prob == layer.mask_prob


def test_compile_in_one_graph_and_a_schedule_compiles_at_most_twice():
    from torch._dynamo.testing import CompileCounterWithBackend

    net = nn.Sequential(make(16, 16), make(16, 16))
    x = torch.randn(5, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for p in (0.5, 0.4, 0.3, 0.0, 0.9):
        set_mask_prob(net, [p, p / 2])
        compiled(x).sum().backward()
    assert 1 <= counter.frame_count <= 2
    assert all(layer.lora_B.grad.any() for layer in net)
    net.eval()
    torch.testing.assert_close(compiled(x), net(x))


def train_rank(rank, folder):
    """Other masks, other data, other experts in each process: DDP has to make them equal."""
    place = {"init_method": f"file://{folder}/sync", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", timeout=timedelta(minutes=5), **place)
    torch.manual_seed(rank)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(make(6, 6), make(6, 6)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    torch.save(net.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_keeps_ranks_equal(tmp_path):
    other = multiprocessing.get_context("spawn").Process(target=train_rank, args=(1, tmp_path))
    other.start()
    train_rank(0, tmp_path)
    other.join()
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert other.exitcode == 0 and equal_states(one, two)


def test_the_layers_of_transformers_as_in_readme():
    transformers = pytest.importorskip("transformers", minversion="5")  # older: other names
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "image_size": 32, "patch_size": 16, "num_labels": 5}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for layer in model.vit.layers:
        layer.attention.q_proj = MLAELinear.from_linear(layer.attention.q_proj)
    model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    assert all(layer.attention.q_proj.lora_B.grad.any() for layer in model.vit.layers)


def test_second_derivatives_are_those_of_the_definition():
    layer = MLAELinear(4, 5, rank=3, dtype=torch.float64).eval()
    nn.init.normal_(layer.lora_B)
    values = dict(layer.named_parameters())
    names = [name for name, parameter in values.items() if parameter.requires_grad]
    inputs = torch.randn(2, 4, dtype=torch.float64), *(values[name].detach() for name in names)

    direction = tuple(map(torch.randn_like, inputs))

    def derivatives(compute):
        def loss(x, *parameters):
            own = dict(zip(names, parameters, strict=True))
            with nn.utils.stateless._reparametrize_module(layer, own):
                return (compute(x) ** 3).sum()

        rows = torch.autograd.functional.hessian(loss, inputs)
        product = torch.autograd.functional.hvp(loss, inputs, direction)[1]
        along = torch.autograd.functional.jvp(loss, inputs, direction)[1]
        return [*sum(rows, ()), *product, along]

    found = derivatives(layer.forward), derivatives(layer.two_branch)
    assert all(map(partial(torch.allclose, atol=1e-11), *found))
    assert max(block.abs().max() for block in found[0]) > 1


def test_an_input_gradient_penalty_under_autocast_is_refused():
    layer, x = MLAELinear(4, 5), torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y.float().sum(), x, create_graph=True)


def test_a_layer_that_is_more_than_linear_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Linear(4, 5)
    hooked.register_forward_hook(lambda *_: None)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    for layer in (Scaled(4, 5), hooked, normed, nn.Linear(4, 5, dtype=torch.cfloat)):
        with pytest.raises(ValueError, match="cannot be adapted"):
            MLAELinear.from_linear(layer)
