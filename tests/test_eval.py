"""eval.py on runs that train.py has left."""

import copy
import csv
import importlib.util
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_runs import ended, fewer_digits

import data
import eval as evaluation
import model as models
import runs
import train


@pytest.fixture(autouse=True)
def few(monkeypatch):
    fewer_digits(monkeypatch, 200, 100)


def score_again(capsys, *arguments):
    return ended(capsys, evaluation.main, *arguments, "--device", "cpu", "--workers", 0)


def test_evaluation_restores_every_mode(nano):
    net = nano(mask_prob=0.5).train()
    net.blocks[2].eval()
    before = [module.training for module in net.modules()]
    images = data.load("digits", img_size=28)[1]
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")
    first = evaluation.evaluate(net, images, normalize)
    assert [module.training for module in net.modules()] == before
    assert evaluation.evaluate(net, images, normalize) == first  # no mask acted


@pytest.mark.parametrize(
    "words", ["", "--val --amp bf16 --masking mixed", "--method full --normalize model"]
)
def test_eval_repeats_the_number(run, capsys, words):
    metrics = run(*words.split(), "--epochs", 1)
    code, out, _ = score_again(capsys, metrics["run"])
    split = "val" if "--val" in words else "test"
    numbers = f"{metrics[f'{split}_top1']:.2f} %   loss {metrics[f'{split}_loss']:.6f}"
    assert code == 0 and re.findall(r"top-1 (.*)", out) == [numbers] * 3  # as reported, and merged
    assert f"{metrics['trainable_parameters']:,}" in out


def test_a_backbone_may_move_but_not_change(run, capsys, tmp_path):
    then, now = tmp_path / "then.safetensors", tmp_path / "now.safetensors"
    weights = load_file(models.NANO_FILE)
    save_file({key: value + 0.1 for key, value in weights.items()}, then)
    words = ["--method", "linear", "--epochs", 1]
    metrics = run(*words, "--checkpoint", then)
    assert metrics["test_loss"] != run(*words)["test_loss"]
    then.rename(now)
    assert score_again(capsys, metrics["run"], "--checkpoint", now)[0] == 0
    code, _, err = score_again(capsys, metrics["run"], "--checkpoint", models.NANO_FILE)
    assert code == 2 and err.count("\n") == 1 and "sha256" in err


def test_what_is_no_run_and_a_merged_model_that_differs(run, capsys, tmp_path, monkeypatch):
    code, _, err = score_again(capsys, tmp_path / "absent")
    assert code == 2 and err.count("\n") == 1 and "absent" in err
    metrics = run("--epochs", 1)
    other = models.create("vit_nano", 10, img_size=14)
    monkeypatch.setattr(evaluation, "merge", lambda model: other)
    assert score_again(capsys, metrics["run"])[0] == 1


def test_an_adapter_of_another_run_is_refused_and_another_score_is_a_failure(run, capsys):
    one, two = (Path(run("--method", name, "--epochs", 1)["run"]) for name in ("mlae", "lora"))
    adapter = (one / "adapter.safetensors").read_bytes()
    (one / "adapter.safetensors").write_bytes((two / "adapter.safetensors").read_bytes())
    code, _, err = score_again(capsys, one)
    assert code == 2 and "another run" in err
    (one / "adapter.safetensors").write_bytes(adapter)
    metrics = json.loads((one / "metrics.json").read_text())
    (one / "metrics.json").write_text(json.dumps(metrics | {"test_top1": 3.0}))
    assert score_again(capsys, one)[0] == 1


def test_a_run_on_random_weights_is_rebuilt_by_its_seed(run, capsys):
    words = "--no-pretrained", "--method", "linear", "--seed", 3, "--epochs", 1
    assert score_again(capsys, run(*words)["run"])[0] == 0


def test_scores_against_their_formulas():
    logits, labels = 3 * torch.randn(200, 7), torch.randint(0, 6, (200,))
    labels[labels == 2] = 3  # classes 2 and 6 do not occur
    probabilities = torch.softmax(logits.double(), 1).numpy()
    truth, guess, sure = labels.numpy(), probabilities.argmax(1), probabilities.max(1)
    means, error = [], 0.0
    for label in (0, 1, 3, 4, 5):
        means.append((guess[truth == label] == label).mean())
    for b in range(15):
        rows = (b / 15 < sure) & (sure <= (b + 1) / 15)
        if rows.any():
            error += rows.mean() * abs((guess == truth)[rows].mean() - sure[rows].mean())
    found = evaluation.score(logits, labels)
    assert found["top1"] == pytest.approx(100 * (guess == truth).mean(), abs=0.005)
    assert found["mean_class_top1"] == pytest.approx(100 * np.mean(means), abs=0.005)
    assert evaluation.calibration_error(logits, labels) == pytest.approx(error, abs=1e-12)
    top5 = np.mean((probabilities.argsort(1)[:, -5:] == truth[:, None]).any(1))
    assert f"top-5 {100 * top5:.2f} %" in evaluation.report(logits, labels, [*"abcdefg"])


def test_the_most_confused_classes_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    logits = torch.eye(3)[[0, 1, 1, 2, 1, 0, 2]]
    lines = evaluation.report(logits, labels, ["a", "b", "c"])
    assert "recall of a: 1 of 4" in lines
    lines = [line for line in lines if "taken for" in line]
    found = [re.findall(r"\b[abc]\b|\d+", line) for line in lines]
    assert found[0] == ["a", "b", "2", "4"]  # 2 of the 4 images of class 0 are taken for class 1
    assert sorted(found[1:]) == [["a", "c", "1", "4"], ["b", "a", "1", "2"]]


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def bird_run(run, birds):
    """A run whose test view is a centre crop, with names for its 200 classes."""
    words = ["--dataset", "cub", "--data-dir", birds, "--model", "vit_nano", "--workers", 0]
    folder = Path(run(*words, "--seed", 3)["run"])
    edit_config(folder, class_names=[f"bird {i}" for i in range(200)])
    return folder


def test_predictions_of_a_folder_are_those_of_the_scored_images(bird_run, birds, capsys, tmp_path):
    files = ["--predictions", tmp_path / "scored.csv", "--features", tmp_path / "scored.npz"]
    code, out, _ = score_again(capsys, bird_run, *files)
    assert code == 0 and "taken for bird " in out
    scored = rows_of((tmp_path / "scored.csv").read_text())
    top1 = np.mean([row["label"] == row["prediction"] for row in scored])
    assert len(scored) == 12 and f"unmerged  top-1 {100 * top1:.2f} %" in out
    assert all((birds / row["image"]).is_file() for row in scored)
    features = dict(np.load(tmp_path / "scored.npz"))
    assert features["images"].tolist() == [row["image"] for row in scored]
    assert [f"bird {label}" for label in features["labels"]] == [row["label"] for row in scored]
    model, _ = evaluation.load_run(bird_run)
    with torch.no_grad():
        guesses = model.head(torch.from_numpy(features["features"])).argmax(1)
    assert [f"bird {i}" for i in guesses] == [row["prediction"] for row in scored]

    images = birds / "fgvc/CUB_200_2011/images"
    words = ["--predict", images, "--top-k", 3, "--features", tmp_path / "own.npz"]
    code, out, _ = score_again(capsys, bird_run, *words)
    rows = rows_of(out)
    assert code == 0 and len(rows) == 3 * len(list(images.rglob("*.jpg")))
    first = {row["image"]: row for row in rows if row["rank"] == "1"}
    again = dict(np.load(tmp_path / "own.npz"))
    places = again["images"].tolist()
    for row, feature in zip(scored, features["features"], strict=True):
        name = row["image"].removeprefix("fgvc/CUB_200_2011/images/")
        assert first[name]["prediction"] == row["prediction"]
        assert first[name]["probability"] == row["probability"]
        assert np.abs(again["features"][places.index(name)] - feature).max() < 1e-5


def test_an_image_is_turned_as_its_camera_says(bird_run, capsys, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "lying.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1).copy()).save(tmp_path / "standing.png")
    Image.fromarray(pixels).save(tmp_path / "other.png")
    said = []
    for name in ("lying", "standing", "other"):
        code, out, _ = score_again(capsys, bird_run, "--predict", tmp_path / f"{name}.png")
        assert code == 0 and out.count("bird") == 5
        said.append(out)
    assert said[0] == said[1] != said[2]


def test_one_bad_file_in_a_folder_stops_no_prediction(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = evaluation.images_to_predict([tmp_path], 28, "none")
    assert [path.name for path in images.files] == ["good.png"]
    assert "bad.png" in capsys.readouterr().err


def test_pruning_keeps_the_largest_updates(nano, images):
    net = nano(rank=6, masking="fixed", targets=["attn.qkv", "mlp.fc1"]).eval()
    norms = {}
    for name, layer in models.adapters(net).items():
        torch.nn.init.normal_(layer.lora_lambda)
        layer.lora_lambda.data *= layer.expert_mask
        for i in range(6):
            update = layer.lora_lambda[i] * torch.outer(layer.lora_B[:, i], layer.lora_A[i])
            norms[name, i] = update.double().norm().item()
    for name, numbers in evaluation.kept_experts(net, 2).items():
        own = [norms[name, i] for i in range(6)]
        assert numbers == sorted(np.argsort(own)[-2:])
    share = evaluation.kept_experts(net, 0.25)
    found = [(name, i) for name, numbers in share.items() for i in numbers]
    assert set(found) == set(sorted(norms, key=norms.get)[-18:])
    logits = net(images)
    pruned = evaluation.prune(copy.deepcopy(net), share)
    for name, layer in models.adapters(net).items():  # the others switched off, in place
        off = [i for i in range(6) if i not in share[name]]
        layer.lora_lambda.data[off] = 0
    assert torch.allclose(pruned(images), net(images), atol=1e-5)
    assert not torch.allclose(net(images), logits, atol=1e-3)


def test_a_pruned_run_is_a_run(run, capsys, tmp_path):
    folder = Path(run("--val", "--rank", 4, "--epochs", 1)["run"])
    state = load_file(folder / "adapter.safetensors")
    state["blocks.0.attn.qkv.lora_lambda"] *= 0  # the experts of one layer do nothing
    header = {"format": "pt", "architecture": "vit_nano", "config": "{}"}
    save_file(state, folder / "adapter.safetensors", header)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, out, err = score_again(capsys, folder, "--prune", 0.25)
    top1 = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.strip()}
    assert code == 0 and not err and {"4", "2", "1", "0.25"} < top1.keys()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    smaller = folder.with_name(f"{folder.name}-prune0.25")
    ranks = json.loads((smaller / "config.json").read_text())["ranks"]
    assert sum(ranks.values()) == 6 and ranks["blocks.0.attn.qkv"] == 0
    code, out, _ = score_again(capsys, smaller)
    assert code == 0 and f"unmerged  top-1 {top1['0.25']} %" in out
    assert score_again(capsys, smaller, "--export", "timm", tmp_path / "a.safetensors")[0] == 0
    if importlib.util.find_spec("peft"):
        assert score_again(capsys, smaller, "--export", "peft", tmp_path / "a")[0] == 0
    edit_config(smaller, ranks=ranks | {"blocks.1.attn.qkv": 9})
    code, _, err = score_again(capsys, smaller)
    assert code == 2 and err.count("\n") == 1 and "ranks" in err


def test_several_numbers_of_experts_are_a_table_alone(run, capsys):
    metrics = run("--epochs", 1)
    code, out, _ = score_again(capsys, metrics["run"], "--prune", 8, 3, 1)
    rows = [line.split() for line in out.splitlines()[-3:]]
    assert code == 0 and [row[0] for row in rows] == ["8", "3", "1"]
    assert rows[0][-1] == f"{metrics['test_top1']:.2f}" and "test images again" in out
    assert not list(Path("runs").rglob("*prune*"))


def test_only_experts_with_a_lambda_are_pruned(run, capsys):
    metrics = run("--method", "mor", "--epochs", 1)
    code, _, err = score_again(capsys, metrics["run"], "--prune", 1)
    assert code == 2 and err.count("\n") == 1 and "--prune" in err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run among files that are in the way."""
    top = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        fewer_digits(patch, 200, 100)
        train.main(["--device", "cpu", "--epochs", "1", "--img-size", "14"])
    (run,) = top.glob("runs/digits/*")
    os.rename(run, top / "run")
    (top / "there").mkdir()
    os.mkfifo(top / "pipe.csv")
    (top / "broken.png").write_bytes(b"no image")
    return top


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--prune 2.5", "--prune"),
        ("--prune 99", "--prune"),
        ("--prune 4 --out there", "there"),
        ("--prune 4 2 --out new", "--out"),
        ("--prune 4 --predict there", "--predict"),
        ("--export onnx new.onnx --features new.npz", "--features"),
        ("--export timm new.onnx", ".safetensors"),
        ("--export pickle new", "timm, onnx, torch, peft"),
        ("--export peft there", "there"),
        ("--predictions new.txt", ".csv"),
        ("--predictions absent/new.csv", "absent"),
        ("--predict absent", "absent"),
        ("--predict pipe.csv", "pipe.csv"),
        ("--predict broken.png", "broken.png"),
        ("--top-k 3", "--predict"),
    ],
)
def test_wrong_arguments_end_in_one_line(finished, capsys, words, named, monkeypatch):
    monkeypatch.chdir(finished)
    before = sorted(finished.rglob("*"))
    code, _, err = score_again(capsys, "run", *words.split())
    assert code == 2 and err.count("\n") == 1 and err.strip().isprintable(), err
    assert named in err
    assert sorted(finished.rglob("*")) == before


def test_scores_are_taken_in_the_precision_and_with_the_means_of_the_run(nano):
    net, images = nano(), data.load("digits", img_size=28)[1]
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")
    one, two = (evaluation.evaluate(net, images, normalize, amp=amp) for amp in ("off", "bf16"))
    assert one["loss"] != two["loss"] and one["loss"] == pytest.approx(two["loss"], rel=0.02)
    net.pretrained_cfg = net.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    args = train.settle(runs.train_parser().parse_args(["--normalize", "model"]))
    assert data.mean_and_std(args, net) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("names", [["a"] * 9, ["a\x1b"] * 10], ids=["nine", "escapes"])
def test_names_of_classes_that_cannot_be_right(run, capsys, names):
    folder = Path(run("--epochs", 1)["run"])
    edit_config(folder, class_names=names)
    code, _, err = score_again(capsys, folder)
    assert code == 2 and "class_names" in err and err.count("\n") == 1
