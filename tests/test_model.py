"""Backbones, injection, adapter files and merging, against plain timm models."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import model as models
import train
from methods import METHODS
from model import ModelError


def create(**kwargs):
    return models.create("vit_nano", 10, **{"pretrained": False, **kwargs})


def plain_nano():
    return create(method="full")


def tiny(classes=5, side=64, depth=1, **kwargs):
    """A ViT-Ti of few blocks, made by timm."""
    name = "vit_tiny_patch16_224"
    return timm.create_model(name, num_classes=classes, img_size=side, depth=depth, **kwargs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_checkpoint_with_another_grid_and_head(tmp_path, suffix):
    source, path = tiny(7), tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"model": source.state_dict()}, path)
    else:
        save_file(source.state_dict(), path)
    same, other = tiny(3), tiny(3, 96)
    head = same.head.weight.clone()
    for net in (same, other):
        models.load_checkpoint(net, path)
        assert torch.equal(net.blocks[0].mlp.fc2.weight, source.blocks[0].mlp.fc2.weight)
    assert torch.equal(same.pos_embed, source.pos_embed) and torch.equal(same.head.weight, head)
    grid = source.pos_embed[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    want = nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(other.pos_embed[:, 1:], want.flatten(2).transpose(1, 2))
    with pytest.raises(ModelError, match="lacks blocks.1"):
        models.load_checkpoint(tiny(depth=2), path)
    with pytest.raises(ModelError, match="unknown blocks.0"):
        models.load_checkpoint(tiny(depth=0), path)
    path.write_bytes(b"garbage")
    with pytest.raises(ModelError, match="w.*"):
        models.load_checkpoint(same, path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="w.pth: .*could run code") as raised:
        models.load_checkpoint(plain_nano(), tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()
    assert "weights_only" not in str(raised.value)  # torch's advice to run it is not passed on


def to_google(net):
    """The arrays of a timm ViT of one block under the names of Google's .npz checkpoints."""
    block, theirs = net.blocks[0], "Transformer/encoderblock_0"
    attn = f"{theirs}/MultiHeadDotProductAttention_1"
    out = {
        "cls": net.cls_token,
        "embedding/bias": net.patch_embed.proj.bias,
        "embedding/kernel": net.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "Transformer/posembed_input/pos_embedding": net.pos_embed,
        "head/bias": torch.zeros(21843),
        "head/kernel": torch.zeros(192, 21843),
        f"{attn}/out/bias": block.attn.proj.bias,
        f"{attn}/out/kernel": block.attn.proj.weight.T.reshape(3, 64, 192),
    }
    for i, name in enumerate(("query", "key", "value")):
        out[f"{attn}/{name}/kernel"] = block.attn.qkv.weight.chunk(3)[i].T.reshape(192, 3, 64)
        out[f"{attn}/{name}/bias"] = block.attn.qkv.bias.chunk(3)[i].reshape(3, 64)
    for i, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
        out[f"{theirs}/MlpBlock_3/Dense_{i}/kernel"] = layer.weight.T
        out[f"{theirs}/MlpBlock_3/Dense_{i}/bias"] = layer.bias
    norms = {f"{theirs}/LayerNorm_0": block.norm1, f"{theirs}/LayerNorm_2": block.norm2}
    for name, layer in (norms | {"Transformer/encoder_norm": net.norm}).items():
        out |= {f"{name}/scale": layer.weight, f"{name}/bias": layer.bias}
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


def test_google_npz(tmp_path):
    source, net = tiny(), tiny()
    nn.init.normal_(source.norm.weight)
    arrays = to_google(source)
    np.savez(tmp_path / "w.npz", **arrays)
    models.load_checkpoint(net, tmp_path / "w.npz")
    for key, value in source.state_dict().items():
        if not key.startswith("head"):
            torch.testing.assert_close(net.state_dict()[key], value, msg=key)
    models.load_checkpoint(tiny(side=96), tmp_path / "w.npz")
    del arrays["cls"]
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ModelError, match="wrong.npz"):
        models.load_checkpoint(net, tmp_path / "wrong.npz")


def test_every_tag_and_size_has_a_name():
    assert models.input_size("vit_nano") == 28
    assert models.input_size("vit_base_patch16_224.orig_in21k") == 224
    net = models.create_backbone("vit_nano", 10)
    assert models.weights_of(net, None, True)["sha256"] == models.sha256(models.NANO_FILE)
    assert models.weights_of(net, None, False) == {"tag": "vit_nano.random"}
    tag = timm.get_pretrained_cfg("vit_tiny_patch16_224").tag
    assert models.weights_of(tiny(), None, True) == {"tag": f"vit_tiny_patch16_224.{tag}"}


def test_a_network_of_any_size_takes_img_size():
    net = models.create("resnet10t", 5, pretrained=False, img_size=64, method="linear")
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"method": "sgd"}, "--method"),
        ({"masking": "often"}, "--masking"),
        ({"rank": 97}, "--rank 97"),
        ({"name": "vit_base_patch16_2244"}, "vit_base_patch16_224,"),
        ({"name": "vit_base_patch16_224.none"}, "vit_base_patch16_224.orig_in21k,"),
        ({"img_size": 30}, "--img-size 30"),
        ({"checkpoint": "absent.pth"}, "absent.pth"),
    ],
)
def test_create_refuses(wrong, word):
    with pytest.raises(ModelError, match=word):
        models.create(**{"name": "vit_nano", "num_classes": 10, "pretrained": False, **wrong})


@pytest.mark.parametrize(
    ("name", "targets", "count", "kwargs"),
    [
        ("deit_tiny_distilled_patch16_224", ["attn.qkv", "mlp.fc1"], 2, {"img_size": 32}),
        ("vit_small_patch14_dinov2", ["attn.q", "attn.proj"], 2, {"img_size": 28}),
        ("vit_small_patch16_dinov3", ["attn.qkv", "mlp.fc2"], 2, {"img_size": 32}),
        ("swin_tiny_patch4_window7_224", ["attn.qkv", "attn.proj"], 4, {"img_size": 56}),
        ("convnext_atto", ["mlp.fc1", "mlp.fc2"], 8, {"use_grn": False, "conv_mlp": False}),
        ("cait_xxs24_224", ["attn.q"], 3, {"img_size": 32}),  # one fused, two of its own
    ],
)
def test_families_of_timm(name, targets, count, kwargs):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    depth = {"swin": {"depths": (1, 1)}, "conv": {"depths": (1, 1, 1, 1)}}
    kwargs |= depth.get(name[:4], {"depth": 1})
    net = timm.create_model(name, num_classes=5, **kwargs)
    names = models.inject(net, targets, mask_prob=0)
    assert len(names) == count
    side = kwargs.get("img_size", 224)
    out = net(torch.randn(2, 3, side, side))
    (sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()).backward()
    assert all(layer.lora_B.grad.any() for layer in models.adapters(net).values())
    trained = {n.rsplit(".", 1)[0] for n, p in net.named_parameters() if p.requires_grad}
    assert trained == set(names) | set(models.heads(net))
    plain = timm.create_model(name, num_classes=5, **kwargs)
    plain.load_state_dict(models.merge(net).state_dict())


def test_q_and_v_alone(nano, images):
    net = nano(targets=["attn.q", "attn.v"])
    for layer in models.adapters(net).values():
        q, k, v = layer.delta_weight().chunk(3)
        assert q.any() and not k.any() and v.any()
        assert layer.lora_B.shape == (2 * 96, 8)
    both, whole = nano(targets=["attn.q", "attn.k", "attn.v"]), nano(targets=["attn.qkv"])
    assert models.count_parameters(both) == models.count_parameters(whole)
    assert models.merge(net).eval()(images).isfinite().all()


def test_models_that_cannot_be_probed_at_the_size_of_their_configuration():
    other = timm.create_model("xcit_nano_12_p8_224", img_size=64, depth=1)
    for net in (tiny(in_chans=1, side=32), other):
        assert len(models.inject(net)) == 1


@pytest.mark.parametrize("target", ["attn.qvk", "patch_embed.proj", "mlp.q"])
def test_a_target_that_matches_nothing_lists_what_there_is(target):
    net = plain_nano()
    with pytest.raises(ModelError, match="attn.proj .*mlp.fc2"):
        models.inject(net, ["attn.qkv", target])
    assert not models.adapters(net)


def test_layers_that_would_be_bypassed_in_silence_are_no_targets():
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    net["patch_embed"] = nn.ModuleDict({"proj": nn.Linear(8, 8)})
    for target in ("out_proj", "proj"):
        with pytest.raises(ModelError, match=target):
            models.inject(net, [target], head=())
    beit = timm.create_model("beit_base_patch16_224", depth=1)  # it reads the weight alone
    with pytest.raises(ModelError, match="blocks.0.attn.qkv"):
        models.inject(beit)
    sizes = {"embed_dims": (16, 16), "num_heads": (1, 1), "window_sizes": (7, 7)}
    mixed = timm.create_model("tiny_vit_5m_224", depths=(1, 1), **sizes)  # heads alternate
    with pytest.raises(ModelError, match="no q rows"):
        models.inject(mixed, ["attn.q"])


def test_injecting_twice_and_tied_weights_are_errors():
    for again in ({"targets": ["mlp.fc1"]}, {"method": "linear"}):
        with pytest.raises(ModelError, match="injected already"):
            models.inject(create(), **again)
    tied, shared = plain_nano(), plain_nano()
    tied.blocks[1].attn.qkv.weight = tied.blocks[0].attn.qkv.weight
    shared.blocks[1].attn.qkv = shared.blocks[0].attn.qkv
    for net in (tied, shared):
        with pytest.raises(ModelError, match="blocks.0.attn.qkv is tied"):
            models.inject(net)


def test_the_head_of_another_librarys_model_trains_and_is_saved(tmp_path):
    net = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)
    fresh = copy.deepcopy(net)
    with pytest.raises(ModelError, match="head="):
        models.inject(net, ["mlp.0"])
    with pytest.raises(ModelError, match="'fc'"):
        models.inject(net, ["mlp.0"], head="fc")
    for model in (net, fresh):
        assert len(models.inject(model, ["mlp.0", "mlp.3"], head="heads")) == 4
    x = torch.randn(2, 3, 32, 32)
    net(x).sum().backward()
    models.check_gradients(net)
    for parameter in net.parameters():
        parameter.data += 0.01 * parameter.requires_grad
    assert net.heads.head.weight.all() and not fresh.heads.head.weight.any()  # it starts at zero
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    models.load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    torch.testing.assert_close(models.merge(net)(x), net(x), atol=1e-5, rtol=0)


def test_vectors_and_positions_have_no_weight_decay():
    net = plain_nano()
    decayed, exempt = train.parameter_groups(net, 0.1)
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    want = {name for name, p in net.named_parameters() if p.ndim < 2} | {"pos_embed", "cls_token"}
    assert {names[id(parameter)] for parameter in exempt["params"]} == want
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    decayed, exempt = train.parameter_groups(create(), 0.1)
    assert len(decayed["params"]) == 2 * 6 + 1 and len(exempt["params"]) == 6 + 1  # lambda, bias


def test_against_lora_of_peft(images):
    """With p = 0 and lambda = alpha / r the model is PEFT's LoRA: same logits, same gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = plain_nano()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    other = peft.get_peft_model(copy.deepcopy(base), config)
    models.inject(base, rank=4, mask_prob=0, coef_init=2.0, method="lora")
    twins = [module for module in other.modules() if hasattr(module, "lora_A")]
    for layer, twin in zip(models.adapters(base).values(), twins, strict=True):
        nn.init.normal_(layer.lora_B, std=0.1)
        twin.lora_A.default.weight.data.copy_(layer.lora_A)
        twin.lora_B.default.weight.data.copy_(layer.lora_B)
    torch.testing.assert_close(base(images), other(images), rtol=0, atol=1e-5)
    grads = []
    for net in (base, other):
        net(images).square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_adapter_round_trip_in_a_fresh_model(nano, images, tmp_path, method):
    net = nano(method=method, masking="mixed").eval()
    for layer in models.adapters(net).values():
        layer.sparsity = 0.5  # not SNELL's default; others have none
    models.save_adapter(net, tmp_path / "a.safetensors", {"seed": 3})
    fresh = create(method=method, masking="mixed").eval()
    if method != "full":  # the base is the caller's
        base = {k: v for k, v in net.state_dict().items() if "lora" not in k}
        fresh.load_state_dict(base, strict=False)
        nn.init.zeros_(fresh.head.weight)
    assert not torch.equal(fresh(images), net(images))
    assert models.load_adapter(fresh, tmp_path / "a.safetensors") == {"seed": 3}
    assert torch.equal(fresh(images), net(images))


def test_an_adapter_knows_its_rows_and_holds_none_of_the_base(nano, images, tmp_path):
    net = nano(targets=["attn.q", "attn.v"]).eval()
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    other = create(targets=["attn.q", "attn.k"]).eval()
    base = {k: v for k, v in net.state_dict().items() if "lora" not in k and "rows" not in k}
    other.load_state_dict(base, strict=False)
    models.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(images), net(images))
    held = {key for key in load_file(tmp_path / "a.safetensors") if not key.startswith("head.")}
    kinds = ("lora_A", "lora_B", "lora_lambda", "expert_mask", "rows")
    assert held == {f"blocks.{i}.attn.qkv.{kind}" for i in range(6) for kind in kinds}


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"rank": 4}, "blocks.0.attn.qkv.lora_A"),
        ({"num_classes": 11}, "head.weight"),
        ({"targets": ["attn.qkv", "mlp.fc1"]}, "lacks blocks.0.mlp.fc1"),
        ({"targets": ["mlp.fc1"]}, "unknown blocks.0.attn.qkv"),
        ({"method": "snell", "rank": 8, "targets": ["attn.qkv"]}, "blocks.0.attn.qkv"),
        ({"name": "vit_tiny_patch16_224", "img_size": 32}, "vit_nano, not .* vit_tiny"),
    ],
)
def test_adapters_of_another_model_do_not_fit(nano, tmp_path, kwargs, word):
    path = tmp_path / "a.safetensors"
    models.save_adapter(nano(), path, {})
    kwargs = {"name": "vit_nano", "num_classes": 10, "pretrained": False, **kwargs}
    net = models.create(**kwargs)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelError, match=word):
        models.load_adapter(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


A, ROWS = "blocks.0.attn.qkv.lora_A", "blocks.0.attn.qkv.rows"
DAMAGE = {
    "integers": (A, lambda value: value.long()),
    "floats of two digits": (A, lambda value: value.to(torch.float8_e4m3fn)),
    "not finite": (A, lambda value: value / 0),
    "rows twice": (ROWS, lambda value: value // 2),
    "rows beyond": (ROWS, lambda value: value + 200),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_do_not_pass_for_weights(nano, tmp_path, damage):
    net, path = nano(targets=["attn.q"]), tmp_path / "a.safetensors"
    models.save_adapter(net, path, {})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    key, change = DAMAGE[damage]
    state = load_file(path)
    before = net.state_dict()[key].clone()
    save_file(state | {key: change(state[key])}, path, header)
    with pytest.raises(ModelError, match=key):
        models.load_adapter(net, path)
    assert net.state_dict()[key].equal(before)
    save_file(state | {A: state[A].half()}, path, header)  # another float is rounded
    models.load_adapter(net, path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="a.safetensors"):
        models.load_adapter(net, path)


def test_merged_model_is_timms(nano, images):
    net = nano(targets=["attn.qkv", "mlp.fc2"])
    before = copy.deepcopy(net.state_dict())
    merged = models.merge(net)
    assert not models.adapters(merged)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, **models.NANO)
    plain.load_state_dict(merged.state_dict())
    want = net.eval()(images)
    torch.testing.assert_close(plain.eval()(images), want, rtol=0, atol=1e-5)
    once = merged.state_dict()
    assert all(torch.equal(v, once[k]) for k, v in models.merge(merged).state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_frozen_matrices_in_bf16_give_what_autocast_gives(nano, images):
    net = nano(targets=["attn.qkv"])
    held = copy.deepcopy(net)
    models.round_frozen(held)
    assert held.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert held.blocks[0].attn.qkv.weight.dtype == held.head.weight.dtype == torch.float32
    outputs = []
    for one in (net, held):
        with torch.autocast("cpu", torch.bfloat16), torch.random.fork_rng():
            outputs.append(one.train()(images))
        outputs[-1].float().square().sum().backward()
    assert torch.equal(*outputs)
    layers = [list(models.adapters(one).values())[0] for one in (net, held)]
    assert torch.equal(*(layer.lora_A.grad for layer in layers))


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "backbone.", "teacher"])
def test_checkpoints_of_other_training_scripts(wrap, tmp_path):
    state = models.create_backbone("vit_nano", 10, pretrained=False).state_dict()
    prefix = "backbone." if wrap == "teacher" else wrap
    renamed = {f"{prefix}{key}": value for key, value in state.items()}
    torch.save({"teacher": renamed} if wrap == "teacher" else renamed, tmp_path / "a.pth")
    net = models.create_backbone("vit_nano", 10, checkpoint=tmp_path / "a.pth")
    assert torch.equal(net.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


@pytest.mark.parametrize("name", ["reg_token", "register_tokens"])
def test_register_tokens_need_a_model_that_has_them(tmp_path, name):
    state = models.create_backbone("vit_nano", 10, pretrained=False).state_dict()
    pos_embed = torch.randn(1, 21, 96)  # a class token, four registers and 16 patches
    torch.save(state | {name: torch.zeros(1, 4, 96), "pos_embed": pos_embed}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="register tokens, vit_nano has none"):
        models.create_backbone("vit_nano", 10, checkpoint=tmp_path / "a.pth")


def test_a_pointer_is_not_the_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        models.create_backbone("vit_nano", 10, checkpoint=path)
