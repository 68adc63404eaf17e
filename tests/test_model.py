"""Injection, adapters and merging, against plain timm models."""

import copy
import json

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import model as models
from methods import METHODS
from mlae import MLAELinear
from model import ModelError


def plain_nano():
    return models.create("vit_nano", 10, pretrained=False, method="full")


def small(name, **kwargs):
    """A timm model of some family, made small where the family takes the arguments."""
    return timm.create_model(name, num_classes=5, **kwargs)


def test_injection_leaves_the_logits_exactly_as_they_were(images):
    net = plain_nano().eval()
    before = net(images)
    names = models.inject(net, ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    assert len(names) == 24
    assert torch.equal(net(images), before)
    assert torch.equal(net.train()(images), before)


def test_train_and_eval_reach_every_layer(nano):
    net = nano()
    assert net.eval() is net and not any(layer.training for layer in models.adapters(net).values())
    assert net.train() is net and all(layer.training for layer in models.adapters(net).values())


def test_exactly_experts_and_head_train():
    net = models.create("vit_nano", 10, pretrained=False)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    want = {f"blocks.{i}.attn.qkv.lora_{x}" for i in range(6) for x in ("A", "B", "lambda")}
    assert trained == want | {"head.weight", "head.bias"}
    lora = models.create("vit_nano", 10, pretrained=False, method="lora", coef_init=0.5)
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {
        n for n in trained if "lambda" not in n
    }
    for layer in models.adapters(lora).values():
        assert layer.mask_prob == 0 and layer.lora_lambda.eq(0.5).all()
    linear = models.create("vit_nano", 10, pretrained=False, method="linear")
    assert {n for n, p in linear.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    assert all(p.requires_grad for p in plain_nano().parameters())


def test_vit_base_has_the_published_number_of_parameters_and_a_small_adapter(tmp_path):
    net = models.create("vit_base_patch16_224", 47, pretrained=False)
    counts = models.count_parameters(net)
    assert counts["head"] == 47 * 769
    assert counts["trainable"] - counts["head"] == 8 * (768 + 2304 + 1) * 12 == 295_008
    assert counts["total"] == sum(p.numel() for p in net.parameters())
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    assert 1.3e6 < (tmp_path / "a.safetensors").stat().st_size < 1.36e6
    base = set(timm.create_model("vit_base_patch16_224", num_classes=0).state_dict())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert not base & set(file.keys())


def test_q_and_v_alone(nano, images):
    net = nano(targets=["attn.q", "attn.v"])
    for layer in models.adapters(net).values():
        q, k, v = layer.delta_weight().chunk(3)
        assert q.any() and not k.any() and v.any()
        assert layer.lora_B.shape == (2 * 96, 8)
    both, whole = nano(targets=["attn.q", "attn.k", "attn.v"]), nano(targets=["attn.qkv"])
    assert models.count_parameters(both) == models.count_parameters(whole)
    assert models.merge(net).eval()(images).isfinite().all()


@pytest.mark.parametrize(
    ("name", "targets", "count", "kwargs"),
    [
        ("deit_tiny_distilled_patch16_224", ["attn.qkv", "mlp.fc1"], 24, {"img_size": 32}),
        ("vit_small_patch14_dinov2", ["attn.q", "attn.proj"], 24, {"img_size": 28}),
        ("vit_small_patch16_dinov3", ["attn.qkv", "mlp.fc2"], 24, {"img_size": 32}),
        ("swin_tiny_patch4_window7_224", ["attn.qkv", "attn.proj"], 24, {}),
        ("convnext_atto", ["mlp.fc1", "mlp.fc2"], 24, {}),
        ("cait_xxs24_224", ["attn.q"], 26, {}),  # fused in 24 blocks, its own layer in 2
    ],
)
def test_families_of_timm(name, targets, count, kwargs):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    if name.startswith("convnext"):
        kwargs = {"use_grn": False, "conv_mlp": False}
    net = small(name, **kwargs)
    names = models.inject(net, targets, mask_prob=0)
    assert len(names) == count
    x = torch.randn(2, 3, *([kwargs["img_size"]] * 2 if "img_size" in kwargs else (224, 224)))
    out = net(x)
    (sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()).backward()
    assert all(layer.lora_B.grad.any() for layer in models.adapters(net).values())
    trained = {n.rsplit(".", 1)[0] for n, p in net.named_parameters() if p.requires_grad}
    assert trained == set(names) | set(models.heads(net))
    plain = small(name, **kwargs)
    plain.load_state_dict(models.merge(net).state_dict())


def test_a_network_of_any_size_takes_img_size():
    net = models.create(
        "convnext_tiny", 5, pretrained=False, img_size=64, targets=["mlp.fc1"], drop_path=0.1
    )
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_models_that_cannot_be_probed_at_the_size_of_their_configuration():
    gray = timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=32, depth=2)
    assert len(models.inject(gray)) == 2
    assert gray(torch.randn(1, 1, 32, 32)).isfinite().all()
    assert models.create("xcit_nano_12_p8_224", 5, pretrained=False, img_size=64)(
        torch.randn(1, 3, 64, 64)
    ).shape == (
        1,
        5,
    )


def test_a_layer_whose_weight_is_read_by_its_parent_is_refused():
    net = small("beit_base_patch16_224", depth=1)
    with pytest.raises(
        ModelError, match=r"beit_base.* reads the weight of blocks.0.attn.qkv without a call"
    ):
        models.inject(net)


@pytest.mark.parametrize("target", ["attn.qvk", "head", "patch_embed.proj", "kv", "mlp.q"])
def test_a_target_that_matches_nothing_lists_what_there_is(target):
    net = plain_nano()
    with pytest.raises(
        ModelError, match=r"attn.qkv \(6\), attn.proj \(6\), mlp.fc1 \(6\), mlp.fc2 \(6\)$"
    ):
        models.inject(net, ["attn.qkv", target])
    assert not models.adapters(net)


def test_proj_does_not_hit_the_patch_embedding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.ModuleDict({"proj": nn.Linear(4, 4)})
            self.attn = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    assert models.inject(Net(), ["proj"], rank=4, head=()) == ["attn.proj"]


def test_a_fused_layer_whose_heads_alternate_has_no_q_rows():
    with pytest.raises(
        ModelError, match=r"'q': stages.1.blocks.0.attn.qkv of tiny_vit.* has no q rows"
    ):
        models.inject(small("tiny_vit_5m_224"), ["attn.q"])


def test_injecting_twice_and_tied_weights_are_errors():
    net = plain_nano()
    models.inject(net)
    with pytest.raises(ModelError, match="injected already"):
        models.inject(net, ["mlp.fc1"])
    with pytest.raises(ModelError, match="injected already"):
        models.inject(net, method="linear")  # it has no layers of its own
    net = plain_nano()
    net.blocks[1].attn.qkv.weight = net.blocks[0].attn.qkv.weight
    with pytest.raises(ModelError, match=r"blocks.0.attn.qkv is tied"):
        models.inject(net)
    net = plain_nano()
    net.blocks[1].attn.qkv = net.blocks[0].attn.qkv
    with pytest.raises(ModelError, match=r"blocks.0.attn.qkv is tied"):
        models.inject(net)


def test_multihead_attention_is_not_bypassed_in_silence():
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.raises(ModelError, match="'out_proj' matches no linear layer"):
        models.inject(net, ["out_proj"], head="fc")


def test_the_head_of_another_librarys_model_trains_and_is_saved(tmp_path):
    net = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)
    with pytest.raises(ModelError, match="VisionTransformer does not tell its classifier"):
        models.inject(net, ["mlp.0"])
    with pytest.raises(ModelError, match="head 'fc' is not in VisionTransformer"):
        models.inject(net, ["mlp.0"], head="fc")
    names = models.inject(net, ["mlp.0", "mlp.3"], head="heads")
    assert len(names) == 4 and net.adapted == (4, 4)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {"heads.head.weight", "heads.head.bias"} < trained
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    models.check_gradients(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.01 * parameter.requires_grad
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    torch.manual_seed(0)
    other = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)
    other.load_state_dict(models.merge(net).state_dict())
    fresh = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)
    plain = {key: value for key, value in net.state_dict().items() if "lora" not in key}
    fresh.load_state_dict({key: plain[key] for key in fresh.state_dict()})
    torch.nn.init.zeros_(fresh.heads.head.weight)
    models.inject(fresh, ["mlp.0", "mlp.3"], head="heads")
    models.load_adapter(fresh, tmp_path / "a.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    torch.testing.assert_close(other.eval()(x), net(x), atol=1e-5, rtol=0)


def test_masking_families(nano):
    def describe(**kwargs):
        layers = list(models.adapters(nano(mask_prob=0.5, **kwargs)).values())
        return [layer.mask_prob for layer in layers], [
            int(layer.expert_mask.sum()) for layer in layers
        ]

    assert describe() == ([0.5] * 6, [8] * 6)
    assert describe(masking="fixed") == ([0.0] * 6, [4] * 6)
    assert describe(masking="mixed") == ([0.5] * 6, [4] * 6)
    rates, kept = describe(masking="mixed", pattern="decremental")
    assert rates == sorted(rates) and rates[0] == 0 and sum(rates) == pytest.approx(3)
    assert kept == sorted(kept, reverse=True) and sum(kept) == 24


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "sgd"}, "method must be one of mlae"),
        ({"masking": "often"}, "masking must be one of stochastic"),
        ({"pattern": "stairs"}, "pattern must be one of random"),
        ({"mask_prob": 1.0}, r"mask_prob must be in \[0, 1\)"),
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"name": "vit_nanoo"}, "timm has no model 'vit_nanoo'"),
        ({"name": "vit_base_patch16_2244"}, "did you mean vit_base_patch16_224"),
        ({"img_size": 30}, "img_size 30 is not a multiple of vit_nano's patch size 7"),
        ({"checkpoint": "absent.pth"}, "no checkpoint file absent.pth"),
    ],
)
def test_create_refuses(wrong, message):
    with pytest.raises(ModelError, match=message):
        models.create(**{"name": "vit_nano", "num_classes": 10, "pretrained": False, **wrong})


def test_merged_model_is_timms(nano, images):
    net = nano(targets=["attn.qkv", "mlp.fc2"])
    before = copy.deepcopy(net.state_dict())
    merged = models.merge(net)
    assert not models.adapters(merged)
    timm.create_model("vit_tiny_patch16_224", num_classes=10, **models.NANO).load_state_dict(
        merged.state_dict()
    )
    with torch.no_grad():
        want = net.eval()(images)
        torch.testing.assert_close(merged.eval()(images), want, rtol=0, atol=1e-5)
    once = merged.state_dict()
    assert all(torch.equal(v, once[k]) for k, v in models.merge(merged).state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(v, once[k]) for k, v in models.merge(net).state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_merged_model_exports(nano, images):
    net = nano().eval()
    program = torch.export.export(models.merge(net), (images,))
    torch.testing.assert_close(program.module()(images), net(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_never_touches_the_base(nano, images, dtype, tmp_path):
    net = nano().to(dtype)
    base = {k: v.clone() for k, v in net.state_dict().items() if k not in models.adapter_state(net)}
    assert len(base) == len(plain_nano().state_dict()) - 2
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    for _ in range(3):
        net.train()(images.to(dtype)).float().square().sum().backward()
        optimizer.step()
        net.eval()(images.to(dtype))
        models.save_adapter(net, tmp_path / "a.safetensors", {})
        models.load_adapter(net, tmp_path / "a.safetensors")
        models.merge(net)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in base.items())
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masking", ["stochastic", "mixed"])
def test_adapter_round_trip_in_a_fresh_model(nano, images, tmp_path, method, masking):
    net = nano(method=method, masking=masking).eval()
    models.save_adapter(net, tmp_path / "a.safetensors", {"seed": 3})
    fresh = models.create("vit_nano", 10, pretrained=False, method=method, masking=masking).eval()
    if method != "full":  # the base is the caller's
        fresh.load_state_dict(
            {k: v for k, v in net.state_dict().items() if "lora" not in k}, strict=False
        )
        nn.init.zeros_(fresh.head.weight)
    assert not torch.equal(fresh(images), net(images))
    assert models.load_adapter(fresh, tmp_path / "a.safetensors") == {"seed": 3}
    assert torch.equal(fresh(images), net(images))


def test_an_adapter_knows_its_rows(nano, images, tmp_path):
    net = nano(targets=["attn.q", "attn.v"]).eval()
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    other = models.create("vit_nano", 10, pretrained=False, targets=["attn.q", "attn.k"]).eval()
    other.load_state_dict(
        {k: v for k, v in net.state_dict().items() if "lora" not in k and "rows" not in k},
        strict=False,
    )
    models.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(images), net(images))


def test_adapters_that_do_not_fit(nano, tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    models.save_adapter(nano(), path, {})
    for kwargs, classes, message in [
        ({"rank": 4}, 10, r"other shapes .rank, classes, size. in blocks.0.attn.qkv.lora_A"),
        ({}, 11, r"other shapes .rank, classes, size. in head.weight"),
        ({"targets": ["attn.qkv", "mlp.fc1"]}, 10, "lacks blocks.0.mlp.fc1"),
        ({"targets": ["mlp.fc1"]}, 10, "unknown blocks.0.attn.qkv"),
    ]:
        net = models.create("vit_nano", classes, pretrained=False, **kwargs)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ModelError, match=message):
            models.load_adapter(net, path)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ModelError, match="is for vit_nano, not for vit_tiny"):
        models.load_adapter(
            models.create("vit_tiny_patch16_224", 10, pretrained=False, img_size=32), path
        )
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == {}
    state = load_file(path)
    state["head.wieght"] = state.pop("head.weight")
    save_file(state, other, metadata=metadata)
    with pytest.raises(ModelError, match="head.wieght"):
        models.load_adapter(nano(), other)
    other.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot load adapter"):
        models.load_adapter(nano(), other)


def test_against_lora_of_peft(images):
    """With p = 0 and lambda = alpha / r the model is PEFT's LoRA: same logits, same gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = plain_nano()
    other = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"])
    )
    models.inject(base, rank=4, mask_prob=0, coef_init=2.0)
    theirs = dict(other.named_modules())
    for name, layer in models.adapters(base).items():
        twin = theirs[f"base_model.model.{name}"]
        nn.init.normal_(layer.lora_B, std=0.1)
        twin.lora_A.default.weight.data.copy_(layer.lora_A)
        twin.lora_B.default.weight.data.copy_(layer.lora_B)
    torch.testing.assert_close(base(images), other(images), rtol=0, atol=1e-5)
    base(images).square().sum().backward()
    other(images).square().sum().backward()
    for name, layer in models.adapters(base).items():
        twin = theirs[f"base_model.model.{name}"]
        torch.testing.assert_close(
            layer.lora_A.grad, twin.lora_A.default.weight.grad, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            layer.lora_B.grad, twin.lora_B.default.weight.grad, rtol=1e-3, atol=1e-4
        )


def test_compiled_model_and_checkpointed_blocks(nano, images):
    net = nano(mask_prob=0.0)
    assert isinstance(net.blocks[0].attn.qkv, MLAELinear)
    grads, images = [], images.requires_grad_()  # timm's older reentrant checkpoints want that
    for call in ("plain", "checkpoint", "compile"):
        net.zero_grad()
        net.set_grad_checkpointing(call == "checkpoint")
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if call == "compile" else net
        run(images).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compiled_under_autocast(nano, images):
    net, grads = nano(mask_prob=0.0), []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(images)
        assert logits.dtype == torch.bfloat16
        logits.float().square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * a.abs().max().item())


def test_integers_do_not_pass_for_weights(tmp_path):
    net = models.create("vit_nano", 10, pretrained=False)
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    state = load_file(tmp_path / "a.safetensors")
    name = next(key for key in state if key.endswith("lora_A"))
    before = net.get_parameter(name).clone()
    header = {"architecture": "vit_nano", "config": "{}"}
    wrong = state | {name: torch.ones(state[name].shape, dtype=torch.int64)}
    save_file(wrong, tmp_path / "b.safetensors", header)
    with pytest.raises(ModelError, match=name):
        models.load_adapter(net, tmp_path / "b.safetensors")
    assert net.get_parameter(name).equal(before)
    eight = state | {name: state[name].to(torch.float8_e4m3fn)}  # a float, but of two digits
    save_file(eight, tmp_path / "d.safetensors", header)
    with pytest.raises(ModelError, match=name):
        models.load_adapter(net, tmp_path / "d.safetensors")
    half = state | {name: state[name].half()}  # another float is rounded, as before
    save_file(half, tmp_path / "c.safetensors", header)
    models.load_adapter(net, tmp_path / "c.safetensors")
