"""export.py against those who read its files: timm, PEFT, onnxruntime, torch.export."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_runs import ended, fewer_digits

import data
import eval as evaluation
import export
import model as models

SOME = {"masking": "fixed", "targets": ["attn.q", "attn.v", "mlp.fc1"]}


def plain_timm(net):
    """The timm model that `net` started from, made by timm, with another head."""
    name = "vit_tiny_patch16_224"
    plain = timm.create_model(name, num_classes=10, **models.NANO, pretrained=False)
    own = {}
    for key, value in net.state_dict().items():
        if key in plain.state_dict() and not key.startswith("head"):
            own[key] = value.clone()
    missing, unexpected = plain.load_state_dict(own, strict=False)
    assert sorted(missing) == ["head.bias", "head.weight"] and not unexpected
    return plain.eval()


@pytest.mark.parametrize("settings", [{}, SOME, {"method": "lora"}], ids=["mlae", "some", "lora"])
def test_peft_gives_the_same_logits(nano, images, tmp_path, settings):
    peft = pytest.importorskip("peft")
    net = nano(rank=3, **settings).eval()
    for name, parameter in net.named_parameters():  # no two experts alike, and no head of zeros
        if name.startswith("head") or name.endswith("lora_lambda"):
            torch.nn.init.normal_(parameter)
    export.export_peft(net, tmp_path / "new/adapter")
    plain = plain_timm(net)
    with torch.no_grad():
        before, logits = plain(images), net(images)
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "new/adapter").eval()(images)
    assert (again - logits).abs().max() < 1e-4 < (before - logits).abs().max()


def test_peft_takes_nothing_but_lora_and_the_head(nano, tmp_path):
    thawed = nano()
    thawed.norm.weight.requires_grad_(True)
    for net in (thawed, nano(method="mor"), nano(method="snell"), nano(method="linear")):
        with pytest.raises(models.ModelError, match="PEFT"):
            export.export_peft(net, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def handed_out(capsys, folder, kind, path):
    """The exit code and the output of an export, or its one line of error."""
    code, out, err = ended(capsys, evaluation.main, folder, "--export", kind, path)
    if code == 0:
        return 0, out
    assert err.count("\n") == 1 and not path.exists()
    return code, err


def largest_difference(net, program, count, floats=False):
    x = torch.randint(256, (count, 3, 14, 14), dtype=torch.uint8)
    normalised = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")(x)
    with torch.no_grad():
        return (program(normalised if floats else x) - net(normalised)).abs().max()


@pytest.fixture(autouse=True)
def few(monkeypatch):
    fewer_digits(monkeypatch, 129, 20)


@pytest.fixture
def finished(run):
    folder = Path(run("--epochs", 1, "--rank", 2)["run"]).resolve()
    return folder, evaluation.load_run(folder)[0]


def test_the_printed_line_of_timm_loads_the_file(finished, capsys, tmp_path):
    folder, net = finished
    _, out = handed_out(capsys, folder, "timm", tmp_path / "model.safetensors")
    line = out.splitlines()[-1]
    names = {"timm": timm}
    exec(line, names)
    assert largest_difference(net, names["model"], 3, floats=True) < 1e-5
    about = json.loads((tmp_path / "model.safetensors.json").read_text())
    assert about["python"] == [line.replace(f"{tmp_path}/", "")]  # no place of this machine
    assert about["resize"] == about["crop"] == [14, 14]
    assert about["mean"] == [0.485, 0.456, 0.406] and about["interpolation"] == "bicubic"
    config = timm.data.resolve_model_data_config(names["model"])
    assert config["mean"] == (0.485, 0.456, 0.406) and config["input_size"] == (3, 14, 14)
    assert config["crop_pct"] == 1.0 and config["crop_mode"] == "squash"


def test_onnx_takes_any_batch(finished, capsys, tmp_path):
    for package in export.FORMATS["onnx"].packages:
        pytest.importorskip(package)
    import onnxruntime

    folder, net = finished
    handed_out(capsys, folder, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")

    def program(x):
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    assert largest_difference(net, program, 1) < 1e-4 > largest_difference(net, program, 5)


def test_the_function_in_the_docs_gives_the_probabilities_of_predict(run, capsys, tmp_path, birds):
    words = "--dataset", birds / "fgvc/CUB_200_2011/images", "--model", "vit_nano"  # 5 classes
    folder = Path(run(*words, "--img-size", 28, "--epochs", 1, "--workers", 0)["run"])
    messy = tmp_path / "messy"
    messy.mkdir()
    noise = np.random.default_rng(9).integers(0, 256, (61, 97, 4), np.uint8)
    Image.fromarray(noise).save(messy / "alpha.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(messy / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(noise[..., :3]).save(messy / "turned.jpg", exif=exif)
    handed_out(capsys, folder, "torch", tmp_path / "model.pt2")
    answers = tmp_path / "answers.csv"
    words = "--predict", messy, "--predictions", answers, "--top-k", 1, "--workers", 0
    assert ended(capsys, evaluation.main, folder, *words)[0] == 0
    about = json.loads((tmp_path / "model.pt2.json").read_text())
    page = (Path(export.__file__).parent / "docs/export.md").read_text()
    names = {}
    exec(page.split("```python")[1].split("```")[0], names)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for row in csv.DictReader(answers.open()):
        x = torch.from_numpy(names["pixels"](messy / row["image"], about).copy())
        probability = program(x).softmax(1).max().item()
        assert probability == pytest.approx(float(row["probability"]), abs=1e-5)


def test_a_program_of_torch_takes_any_batch_even_unmerged(run, capsys, tmp_path):
    folder = Path(run("--method", "mor", "--epochs", 1, "--rank", 2)["run"])
    net, _ = evaluation.load_run(folder)
    handed_out(capsys, folder, "torch", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert largest_difference(net, program, 1) < 1e-4 > largest_difference(net, program, 5)
    code, err = handed_out(capsys, folder, "timm", tmp_path / "mor.safetensors")
    assert code == 2 and "mor" in err and not list(tmp_path.glob(".draft*"))


def test_an_export_that_differs_is_not_kept(finished, capsys, tmp_path, monkeypatch):
    other = models.create("vit_nano", 10, img_size=14)
    torch.nn.init.normal_(other.head.weight)
    monkeypatch.setattr(export, "merge", lambda model: other)
    before = sorted(tmp_path.rglob("*"))
    code, err = handed_out(capsys, finished[0], "timm", tmp_path / "new.safetensors")
    assert code == 2 and "--export timm" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    for kind, name in (("onnx", "new.onnx"), ("peft", "new")):
        code, err = handed_out(capsys, finished[0], kind, tmp_path / name)
        assert code == 2 and f"pip install {kind}" in err


def test_random_images_where_the_data_are_not(run, capsys, tmp_path, birds):
    words = ["--dataset", "cub", "--data-dir", birds, "--model", "vit_nano", "--epochs", 1]
    folder = run(*words)["run"]
    (birds / "fgvc").rename(birds / "moved")
    code, out = handed_out(capsys, folder, "timm", tmp_path / "new.safetensors")
    assert code == 0 and "random" in out
