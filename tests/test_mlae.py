"""The layer against the two-branch formula in float64, and everything a layer of PyTorch is expected to survive."""

import ast
import copy
import io
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_two_branch_formula(bias):
    layer = make(bias=bias, dtype=torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.0, 1.3, 0.0, -0.7], dtype=torch.float64, requires_grad=True)
    layer.coefficients = lambda: c
    leaves = [x, layer.lora_A, layer.lora_B, c]
    weights = torch.randn(3, 5, 10, dtype=torch.float64)
    got = layer(x)
    want = two_branch(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, c)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves),
        torch.autograd.grad((want * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_gradcheck_with_masked_experts():
    layer = make(dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.0, 1.3, 0.0, -0.7], dtype=torch.float64, requires_grad=True)

    def call(x, A, B, c):
        return mlae._FoldedLinear.apply(x, layer.weight, layer.bias, A, B, c, torch.float64)

    assert torch.autograd.gradcheck(call, (x, layer.lora_A, layer.lora_B, c))


def test_a_thawed_base_gets_its_gradients():
    layer = make(dtype=torch.float64).requires_grad_(True).eval()
    x = torch.randn(7, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = layer.weight.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    c = layer.lora_lambda.detach()
    two_branch(
        x, layer.weight, layer.bias, layer.lora_A.detach(), layer.lora_B.detach(), c
    ).square().sum().backward()
    torch.testing.assert_close(got, (layer.weight.grad, layer.bias.grad))


def test_experts_change_nothing_at_the_start():
    linear = nn.Linear(6, 10)
    x = torch.randn(5, 6)
    before = linear(x)
    layer = MLAELinear.from_linear(linear)
    assert torch.equal(layer(x), before) and torch.equal(layer.eval()(x), before)
    assert layer.weight is linear.weight and layer.bias is linear.bias


@pytest.mark.parametrize("p", [0.25, 0.5, 0.9])
def test_mask_is_zero_or_scaled_and_its_mean_is_eval(p):
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


def test_eval_is_deterministic_and_training_is_not():
    layer, x = make(rank=16), torch.randn(5, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_no_masking_is_eval_mode_exactly():
    layer, x = make(mask_prob=0), torch.randn(5, 6)
    assert torch.equal(layer(x), layer.eval()(x))


def test_train_and_eval_return_self_and_leave_the_weights_alone():
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    assert layer.eval() is layer and not layer.training
    assert layer.train() is layer and layer.training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_prob": 1.0},
        {"mask_prob": -0.1},
        {"mask_prob": math.nan},
        {"rank": 0},
        {"rank": 2.5},
        {"expert_mask": [1, 0]},
        {"expert_mask": [1, 0, 0.5, 1]},
        {"rows": []},
        {"rows": [3, 3]},
        {"rows": [10]},
    ],
)
def test_bad_arguments_raise_at_construction(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MLAELinear(6, 10, **{"rank": 4, **wrong})


def test_mask_prob_is_checked_when_set_later():
    layer = make()
    for bad in (1.0, math.nan):
        with pytest.raises(ValueError, match="mask_prob"):
            layer.mask_prob = bad
    with pytest.raises(ValueError, match="2 masking probabilities for 1"):
        set_mask_prob(layer, [0.1, 0.2])
    net = nn.Sequential(make(), make(10, 6))
    with pytest.raises(ValueError, match="mask_prob"):
        set_mask_prob(net, [0.1, 1.5])
    assert [m.mask_prob for m in net] == [0.5, 0.5]
    set_mask_prob(net, torch.tensor(0.25))
    assert [m.mask_prob for m in net] == [0.25, 0.25]
    set_mask_prob(net, mask_rates("decremental", 2, 0.25))
    assert [m.mask_prob for m in net] == [0.0, 0.5]


def test_a_fixed_mask_holds_in_every_mode_and_nothing_moves_the_masked_experts():
    layer = MLAELinear(6, 10, rank=4, mask_prob=0.5, expert_mask=[1, 0, 1, 0])
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
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    layer.eval()
    x = torch.randn(5, 6)
    c = layer.lora_lambda * torch.tensor([1.0, 0, 1, 0])
    torch.testing.assert_close(
        layer(x), two_branch(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, c)
    )


def test_rows_leave_the_other_rows_alone():
    rows = [0, 1, 2, 7, 8]
    layer = make(rows=rows).eval()
    assert layer.lora_B.shape == (5, 4)
    others = [i for i in range(10) if i not in rows]
    delta = layer.delta_weight()
    assert torch.equal(delta[others], torch.zeros(5, 6))
    torch.testing.assert_close(delta[rows], (layer.lora_B * layer.lora_lambda) @ layer.lora_A)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + delta, layer.bias))


def test_gradients_reach_the_chosen_rows():
    layer = make(rows=[7, 2], dtype=torch.float64).eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    leaves = [layer.lora_A, layer.lora_B, layer.lora_lambda]
    whole = torch.zeros(10, 4, dtype=torch.float64)
    whole[7], whole[2] = layer.lora_B[0], layer.lora_B[1]
    want = two_branch(x, layer.weight, layer.bias, layer.lora_A, whole, layer.lora_lambda)
    got = layer(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), leaves),
        torch.autograd.grad(want.sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_from_linear_keeps_the_mode_and_refuses_a_layer_with_experts():
    linear = nn.Linear(6, 10)
    with pytest.raises(ValueError, match="mask_prob"):
        MLAELinear.from_linear(linear, mask_prob=2)
    assert linear.weight.requires_grad
    assert (
        not MLAELinear.from_linear(linear.eval()).training
        and MLAELinear.from_linear(linear.train()).training
    )
    with pytest.raises(ValueError, match="experts already"):
        MLAELinear.from_linear(make())


@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_the_fast_path_of_torchs_transformer_does_not_bypass_the_experts(name):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    adapted = MLAELinear.from_linear(getattr(layer, name), rank=4)
    nn.init.normal_(adapted.lora_B)
    merged = copy.deepcopy(layer)
    setattr(layer, name, adapted)
    setattr(merged, name, adapted.to_linear())
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # else torch does not take the fast path
        got, want = layer(x), merged(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    encoder = nn.TransformerEncoder(layer, 2).eval()  # two copies of it
    plain = nn.TransformerEncoder(merged, 2).eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), plain(x), atol=1e-4, rtol=0)


def test_the_out_proj_of_torchs_attention_is_refused():
    with pytest.raises(ValueError, match="nn.MultiheadAttention never calls its out_proj"):
        MLAELinear.from_linear(nn.MultiheadAttention(8, 2).out_proj)


def test_first_step_gradients():
    layer = MLAELinear(6, 10, rank=4, mask_prob=0)
    layer(torch.randn(5, 6)).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert not layer.lora_A.grad.any() and not layer.lora_lambda.grad.any()
    assert layer.lora_B.grad.abs().min() > 0


def test_merging():
    layer, x = make(), torch.randn(5, 6)
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
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_merging_in_bfloat16_rounds_once():
    layer = make(64, 64).bfloat16()
    exact = (
        layer.weight.double()
        + (layer.lora_B.double() * layer.lora_lambda.double()) @ layer.lora_A.double()
    )
    assert (
        layer.to_linear().weight != exact.bfloat16()
    ).float().mean() < 0.01  # float32 may tip a tie


@pytest.mark.parametrize("transposed", [False, True])
def test_a_merged_layer_can_be_saved_as_safetensors(transposed, tmp_path):
    from safetensors.torch import load_file, save_file

    layer = make(8, 8)
    if transposed:
        layer.weight = nn.Parameter(layer.weight.detach().T, requires_grad=False)
    linear = layer.to_linear()
    save_file(linear.state_dict(), tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["weight"], linear.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_at_construction_and_by_to(dtype):
    for layer in (make(dtype=dtype), make().to(dtype)):
        assert {p.dtype for p in layer.parameters()} == {dtype} and layer.expert_mask.dtype == dtype
        y = layer(torch.randn(5, 6, dtype=dtype))
        y.sum().backward()
        assert y.dtype == layer.lora_A.grad.dtype == dtype


def test_half_precision_base_gets_float32_experts():
    layer = MLAELinear.from_linear(nn.Linear(6, 10).bfloat16(), rank=4, mask_prob=0)
    nn.init.normal_(layer.lora_B)
    assert (
        layer.weight.dtype == torch.bfloat16
        and layer.lora_A.dtype == layer.lora_lambda.dtype == torch.float32
    )
    x = torch.randn(5, 6).bfloat16()
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    exact = F.linear(
        x.double(), layer.weight.double() + layer.delta_weight().double(), layer.bias.double()
    )
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError, match="float32"):
        layer(torch.randn(5, 6))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer, x = (
        make(64, 64, mask_prob=0).to(device),
        torch.randn(50, 64, device=device, requires_grad=True),
    )
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(64, 64, device=device)(x).dtype == torch.bfloat16
    y.float().square().sum().backward()
    got = x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.lora_lambda.grad
    assert all(g.dtype == torch.float32 for g in got)
    leaves = [
        t.detach().double().requires_grad_()
        for t in (x, layer.lora_A, layer.lora_B, layer.lora_lambda)
    ]
    exact = two_branch(leaves[0], layer.weight.double(), layer.bias.double(), *leaves[1:])
    exact.square().sum().backward()
    assert (y - exact).norm() / exact.norm() < 0.01
    for g, leaf in zip(got, leaves, strict=True):
        assert (g - leaf.grad).norm() / leaf.grad.norm() < 0.02
    with torch.autocast(device, torch.bfloat16):  # which leaves float64 alone
        double = torch.randn(2, 6, dtype=torch.float64, device=device)
        assert make(dtype=torch.float64).to(device)(double).dtype == torch.float64


def test_meta_device():
    layer = MLAELinear(6, 10, device="meta")
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 10)
    assert layer.delta_weight().is_meta and layer.to_linear().weight.is_meta
    with torch.device("meta"):
        assert MLAELinear.from_linear(
            nn.Linear(6, 10), expert_mask=[1] * 8, rows=[1, 2]
        ).lora_B.is_meta
        assert (
            not mask_rates("hourglass", 4, 0.3).is_meta
            and not fixed_masks("random", 4, 8, 0.3).is_meta
        )
    layer.to_empty(device="cpu").load_state_dict(MLAELinear(6, 10).state_dict())


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 4, 6)])
def test_input_shapes_of_nn_linear(shape):
    layer = make()
    y = layer(torch.randn(shape, requires_grad=True))
    y.sum().backward()
    assert y.shape == (*shape[:-1], 10)


def test_pickle_deepcopy_and_torch_save():
    layer, x = make(rows=[1, 2], expert_mask=[1, 1, 0, 1]).eval(), torch.randn(3, 6)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(x), layer(x)) and copied.mask_prob == layer.mask_prob


def test_activation_checkpointing_gives_equal_gradients():
    layer, x = make(rank=16, mask_prob=0.5), torch.randn(5, 6, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        layer.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        results.append([x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.lora_lambda.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


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
    grads = [layer.lora_B.grad.clone() for layer in net]
    assert all(g.any() for g in grads)
    net.eval()
    torch.testing.assert_close(compiled(x), net(x))


def _ddp_worker(rank, folder):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    torch.manual_seed(
        rank
    )  # other masks, other data, other experts: DDP has to make the experts equal
    net = DistributedDataParallel(nn.Sequential(make(6, 6), make(6, 6)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    torch.save(net.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_keeps_ranks_equal(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_file_stands_alone(tmp_path):
    shutil.copy(mlae.__file__, tmp_path)
    imports = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(Path(mlae.__file__).read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module)])
    }
    assert imports - {"torch"} <= set(sys.stdlib_module_names)
    code = "import torch, mlae; print(mlae.MLAELinear.from_linear(torch.nn.Linear(3, 2))(torch.ones(1, 3)).shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "torch.Size([1, 2])\n", done.stderr


def formula(pattern, length, p):
    pos = [i / (length - 1) for i in range(length)]
    return {
        "random": [p for _ in pos],
        "incremental": [2 * p * (1 - x) for x in pos],
        "decremental": [2 * p * x for x in pos],
        "hourglass": [2 * p * (1 - abs(2 * x - 1)) for x in pos],
        "protruding": [2 * p * abs(2 * x - 1) for x in pos],
    }[pattern]


@pytest.mark.parametrize("pattern", mlae.PATTERNS)
@pytest.mark.parametrize("length", [1, 6, 11, 12])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.5, 0.65])
def test_mask_rates(pattern, length, p):
    rates = mask_rates(pattern, length, p)
    assert rates.shape == (length,) and rates.min() >= 0 and rates.max() < 1
    assert rates.mean().item() == pytest.approx(p, abs=1e-9)
    if length > 1 and p == 0.3:  # nothing is cut: the formula, times what brings the mean back to p
        want = torch.tensor(formula(pattern, length, p), dtype=torch.float64)
        torch.testing.assert_close(rates, want * p / want.mean())


def test_mask_rates_that_cannot_be():
    with pytest.raises(ValueError, match="hourglass over 12 layers reaches a mean of 0.8"):
        mask_rates("hourglass", 12, 0.9)
    with pytest.raises(ValueError, match="mask pattern must be one of random, incremental"):
        mask_rates("stairs", 12, 0.5)
    with pytest.raises(ValueError, match="mask_prob"):
        mask_rates("random", 12, 1.0)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_fixed_masks(p, rank):
    total = 12 * max(1, round(rank * (1 - p)))
    for pattern in mlae.PATTERNS:
        masks = fixed_masks(pattern, 12, rank, p, torch.Generator().manual_seed(0))
        kept = masks.sum(1)
        assert masks.shape == (12, rank) and set(masks.unique().tolist()) <= {0.0, 1.0}
        assert kept.min() >= 1 and kept.sum() == total
        assert torch.equal(
            masks, fixed_masks(pattern, 12, rank, p, torch.Generator().manual_seed(0))
        )
        if rank == 8 and p == 0.5:
            steps = kept.diff()
            if pattern == "random":
                assert not steps.any() and len(masks.unique(dim=0)) > 1
            if pattern == "incremental":
                assert (steps >= 0).all() and kept[-1] == 8
            if pattern == "decremental":
                assert (steps <= 0).all() and kept[0] == 8
            if pattern == "hourglass":
                assert kept[0] == kept[-1] == 8 and kept[5] == kept[6] == 1
            if pattern == "protruding":
                assert kept[0] == kept[-1] == 1 and kept[5] == kept[6] >= 7


def test_similarity_is_the_frobenius_cosine():
    layer = make()
    matrices = [torch.outer(layer.lora_B[:, i], layer.lora_A[i]).detach() for i in range(4)]
    want = torch.tensor(
        [[(m * n).sum() / (m.norm() * n.norm()) for n in matrices] for m in matrices]
    )
    torch.testing.assert_close(expert_similarity(layer), want, rtol=0, atol=1e-5)
    assert torch.equal(expert_similarity(MLAELinear(6, 10, rank=3)), torch.zeros(3, 3))


def test_the_layers_of_torchvision_and_transformers_as_in_readme():
    vision = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(vision.heads.head.weight)  # torchvision starts it at zero
    for layer in vision.encoder.layers:
        layer.mlp[0] = MLAELinear.from_linear(layer.mlp[0])
    x = torch.randn(2, 3, 32, 32)
    vision(x).sum().backward()
    assert vision.encoder.layers[1].mlp[0].lora_B.grad.any()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("its layers had other names before transformers 5")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "image_size": 32, "patch_size": 16, "num_labels": 5}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for layer in model.vit.layers:
        layer.attention.q_proj = MLAELinear.from_linear(layer.attention.q_proj)
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.grad is not None
    assert all(layer.attention.q_proj.lora_B.grad.any() for layer in model.vit.layers)
