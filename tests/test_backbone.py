"""Names, checkpoints and heads of timm models."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import model as models
from model import ModelError


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_checkpoint_with_another_grid_and_head(tmp_path, suffix):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, depth=2)
    path = tmp_path / f"w{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(
        {"model": source.state_dict()}, path
    )
    same, other = (
        timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=s, depth=2)
        for s in (64, 96)
    )
    head = same.head.weight.clone()
    for net in (same, other):
        models.load_checkpoint(net, path)
        assert torch.equal(net.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    assert torch.equal(same.pos_embed, source.pos_embed) and torch.equal(same.head.weight, head)
    grid = source.pos_embed[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    want = (
        nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
        .flatten(2)
        .transpose(1, 2)
    )
    torch.testing.assert_close(other.pos_embed[:, 1:], want)
    with pytest.raises(ModelError, match="does not fit .*: it lacks blocks.2"):
        models.load_checkpoint(
            timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3), path
        )
    with pytest.raises(ModelError, match="it has unknown blocks.1"):
        models.load_checkpoint(
            timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1), path
        )
    with pytest.raises(ModelError, match="cannot load checkpoint|does not fit"):
        models.load_checkpoint(timm.create_model("convnext_tiny"), path)
    path.write_bytes(b"garbage")
    with pytest.raises(ModelError, match="cannot load checkpoint"):
        models.load_checkpoint(same, path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="cannot load checkpoint"):
        models.load_checkpoint(models.create_backbone("vit_nano", 10), tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()


def to_google(net):
    """The arrays of a timm ViT under the names and in the layout of Google's .npz checkpoints."""
    state = {key: value.detach().numpy() for key, value in net.state_dict().items()}
    dim, heads = net.embed_dim, net.blocks[0].attn.num_heads
    out = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((dim, 21843), np.float32),
        "head/bias": np.zeros(21843, np.float32),
    }
    for i in range(len(net.blocks)):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for norm, layer in ((0, "norm1"), (2, "norm2")):
            out[f"{theirs}LayerNorm_{norm}/scale"] = state[f"{ours}{layer}.weight"]
            out[f"{theirs}LayerNorm_{norm}/bias"] = state[f"{ours}{layer}.bias"]
        attn = theirs + "MultiHeadDotProductAttention_1/"
        for j, name in enumerate(("query", "key", "value")):
            rows = slice(j * dim, (j + 1) * dim)
            out[f"{attn}{name}/kernel"] = state[f"{ours}attn.qkv.weight"][rows].T.reshape(
                dim, heads, dim // heads
            )
            out[f"{attn}{name}/bias"] = state[f"{ours}attn.qkv.bias"][rows].reshape(
                heads, dim // heads
            )
        out[f"{attn}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(
            heads, dim // heads, dim
        )
        out[f"{attn}out/bias"] = state[f"{ours}attn.proj.bias"]
        for j, name in enumerate(("fc1", "fc2")):
            out[f"{theirs}MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}mlp.{name}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}mlp.{name}.bias"]
    return out


def test_google_npz(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    nn.init.normal_(source.norm.weight)
    np.savez(tmp_path / "ViT-Ti_16.npz", **to_google(source))
    net = models.create(
        "vit_tiny_patch16_224",
        3,
        checkpoint=tmp_path / "ViT-Ti_16.npz",
        img_size=32,
        method="linear",
    )
    for key, value in source.state_dict().items():
        if not key.startswith("head"):
            torch.testing.assert_close(net.state_dict()[key], value, msg=key)
    larger = models.create(
        "vit_tiny_patch16_224", 3, checkpoint=tmp_path / "ViT-Ti_16.npz", img_size=64
    )
    assert larger.pos_embed.shape == (1, 17, 192)
    wrong = {key: value for key, value in to_google(source).items() if "encoderblock_11" not in key}
    np.savez(tmp_path / "wrong.npz", **wrong)
    with pytest.raises(ModelError, match="cannot load checkpoint .*wrong.npz"):
        models.create("vit_tiny_patch16_224", 3, checkpoint=tmp_path / "wrong.npz", img_size=32)


def test_every_tag_and_size_has_a_name():
    assert models.input_size("vit_nano") == 28
    assert models.input_size("vit_base_patch16_224.orig_in21k") == 224
    net = models.create_backbone("vit_nano", 10)
    digest = models.sha256(models.NANO_FILE)
    assert models.weights_of(net, None, True)["sha256"] == digest
    assert models.weights_of(net, None, False) == {"tag": "vit_nano.random"}
    net = models.create_backbone("vit_tiny_patch16_224", 10, pretrained=False)
    tag = timm.get_pretrained_cfg("vit_tiny_patch16_224").tag
    assert models.weights_of(net, None, True) == {"tag": f"vit_tiny_patch16_224.{tag}"}


def test_vectors_and_positions_have_no_weight_decay():
    net = models.create("vit_nano", 10, pretrained=False, method="full")
    decayed, exempt = models.parameter_groups(net, 0.1)
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    want = {name for name, p in net.named_parameters() if p.ndim < 2} | {"pos_embed", "cls_token"}
    assert {names[id(parameter)] for parameter in exempt["params"]} == want
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    adapted = models.create("vit_nano", 10, pretrained=False)
    decayed, exempt = models.parameter_groups(adapted, 0.1)
    assert len(decayed["params"]) == 2 * 6 + 1 and len(exempt["params"]) == 6 + 1  # lambda, bias
