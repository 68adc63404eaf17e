"""export.py against those who read its files: timm, PEFT, onnxruntime, torch.export."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import eval as evaluation
import export
import model as models
from methods import METHODS

SETTINGS = {
    "experts": {},
    "fixed masks": {"masking": "fixed"},
    "q and v of qkv, and fc1": {"targets": ["attn.q", "attn.v", "mlp.fc1"]},
    "lora": {"method": "lora", "coef_init": 0.5},
}


def active(net):
    """Coefficients that differ from expert to expert, and a head that is not zero."""
    for layer in models.adapters(net).values():
        if hasattr(layer, "lora_lambda"):
            torch.nn.init.normal_(layer.lora_lambda)
    torch.nn.init.normal_(net.head.weight, std=0.3)
    torch.nn.init.normal_(net.head.bias)
    return net.eval()


def plain_timm(net):
    """The timm model that `net` started from, made by timm, with another head."""
    plain = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, **models.NANO, pretrained=False
    )
    own = {}
    for key, value in net.state_dict().items():
        if key in plain.state_dict() and not key.startswith("head"):
            own[key] = value.clone()
    missing, unexpected = plain.load_state_dict(own, strict=False)
    assert sorted(missing) == ["head.bias", "head.weight"] and not unexpected
    return plain.eval()


@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_gives_the_same_logits(nano, images, tmp_path, settings):
    peft = pytest.importorskip("peft")
    net = active(nano(rank=3, **SETTINGS[settings]))
    export.export_peft(net, tmp_path / "new" / "adapter")
    plain = plain_timm(net)
    with torch.no_grad():
        before, logits = plain(images), net(images)
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "new" / "adapter").eval()(images)
    assert (again - logits).abs().max() < 1e-4 < (before - logits).abs().max()
    state = load_file(tmp_path / "new" / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    blocks = {key for key in state if ".lora_B." in key}
    assert len(blocks) == len(models.adapters(net))


def test_peft_of_what_is_no_lora(nano, tmp_path):
    for method in METHODS:
        net = models.create("vit_nano", 10, method=method, pretrained=False)
        kind = models.adapters(net)
        is_lora = kind and all(hasattr(layer, "lora_lambda") for layer in kind.values())
        if is_lora:
            export.export_peft(net, tmp_path / method)
            assert (tmp_path / method / "adapter_config.json").exists()
        else:
            with pytest.raises(models.ModelError, match="PEFT's LoRA"):
                export.export_peft(net, tmp_path / method)
            assert not (tmp_path / method).exists()
    net = nano()
    net.norm.weight.requires_grad_(True)
    with pytest.raises(models.ModelError, match="norm.weight"):
        export.export_peft(net, tmp_path / "thawed")


def handed_out(capsys, folder, kind, path):
    """The output of a successful export."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(folder), "--export", kind, str(path)])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


@pytest.fixture
def finished(run):
    folder = Path(run("--epochs", 1, "--rank", 2)["run"]).resolve()
    return folder, evaluation.load_run(folder)[0]


def test_the_printed_line_of_timm_loads_the_file(finished, capsys, tmp_path):
    folder, net = finished
    out = handed_out(capsys, folder, "timm", tmp_path / "model.safetensors")
    line = out.splitlines()[-1]
    assert line.startswith("model = timm.create_model(") and "checkpoint_path=" in line
    names = {"timm": timm}
    exec(line, names)
    x = torch.randn(3, 3, 14, 14)
    with torch.no_grad():
        assert (names["model"](x) - net(x)).abs().max() < 1e-5
    about = json.loads((tmp_path / "model.safetensors.json").read_text())
    assert about["python"] == [line] and about["resize"] == about["crop"] == [14, 14]
    assert about["mean"] == [0.485, 0.456, 0.406] and about["interpolation"] == "bicubic"
    assert re.search(r"on 8 images of the run: \d\.\de-\d\d\n", out)


def test_onnx_takes_any_batch(finished, capsys, tmp_path):
    for package in export.ONNX:
        pytest.importorskip(package)
    import onnxruntime

    folder, net = finished
    handed_out(capsys, folder, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 5):
        x = torch.randn(count, 3, 14, 14)
        logits = session.run(["logits"], {"images": x.numpy()})[0]
        with torch.no_grad():
            assert (torch.from_numpy(logits) - net(x)).abs().max() < 1e-4
    names = sorted(path.name for path in tmp_path.glob("model*"))
    assert names == ["model.onnx", "model.onnx.json"]


def test_a_program_of_torch_takes_any_batch_even_unmerged(run, capsys, tmp_path):
    folder = Path(run("--method", "mor", "--epochs", 1, "--rank", 2)["run"])
    net, _ = evaluation.load_run(folder)
    handed_out(capsys, folder, "torch", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 5):
        x = torch.randn(count, 3, 14, 14)
        with torch.no_grad():
            assert (program(x) - net(x)).abs().max() < 1e-4
    kinds = {"timm": "mor.safetensors"}
    if importlib.util.find_spec("peft"):
        kinds["peft"] = "mor"
    for kind, path in kinds.items():
        with pytest.raises(SystemExit) as stop:
            evaluation.main([str(folder), "--export", kind, str(tmp_path / path)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        assert "depends on the input" in err or "no product of A and B" in err
        assert not (tmp_path / path).exists() and not list(tmp_path.glob(".draft*"))


def test_an_export_that_differs_is_not_kept(finished, capsys, tmp_path, monkeypatch):
    folder, _ = finished
    merge = models.merge

    def wrong(net):
        merged = merge(net)
        merged.head.bias.data += 0.1
        return merged

    monkeypatch.setattr(export, "merge", wrong)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(folder), "--export", "timm", str(tmp_path / "new.safetensors")])
    assert stop.value.code == 2 and "differ by 1.0e-01" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named(finished, capsys, tmp_path, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    for kind, name in (("onnx", "new.onnx"), ("peft", "new")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([str(folder), "--export", kind, str(tmp_path / name)])
        assert stop.value.code == 2 and "pip install" in capsys.readouterr().err


def test_random_images_where_the_data_are_not(run, capsys, tmp_path, prepared):
    flags = ["--dataset", "cifar", "--data-dir", prepared, "--model", "vit_nano", "--epochs", 1]
    folder = Path(run(*flags)["run"]).resolve()
    evaluation_of = [str(folder), "--data-dir", str(tmp_path / "absent"), "--export", "timm"]
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*evaluation_of, str(tmp_path / "new.safetensors")])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "8 random images" in out
