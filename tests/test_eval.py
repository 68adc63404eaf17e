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


ROUNDS = ["", "--val --amp bf16 --masking mixed", "--method full --normalize model"]
ROUNDS += ["--no-pretrained --method linear --seed 3"]  # random weights are rebuilt by the seed


@pytest.mark.parametrize("words", ROUNDS)
def test_eval_repeats_the_number(run, capsys, words):
    metrics = run(*words.split(), "--epochs", 1)
    code, out, _ = score_again(capsys, metrics["run"])
    split = "val" if "--val" in words else "test"
    numbers = f"{metrics[f'{split}_top1']:.2f} %   loss {metrics[f'{split}_loss']:.6f}"
    assert code == 0 and re.findall(r"top-1 (.*)", out) == [numbers] * 3  # as reported, and merged
    assert f"{metrics['trainable_parameters']:,}" in out


def refused(capsys, *arguments):
    """The one line with which eval.py ends."""
    code, _, err = score_again(capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.strip().isprintable(), err
    return err


def test_a_backbone_may_move_but_not_change(run, capsys, tmp_path):
    then, now = tmp_path / "then.safetensors", tmp_path / "now.safetensors"
    weights = load_file(models.NANO_FILE)
    save_file({key: value + 0.1 for key, value in weights.items()}, then)
    words = ["--method", "linear", "--epochs", 1]
    metrics = run(*words, "--checkpoint", then)
    assert metrics["test_loss"] != run(*words)["test_loss"]
    then.rename(now)
    assert "--checkpoint" in refused(capsys, metrics["run"])
    assert score_again(capsys, metrics["run"], "--checkpoint", now)[0] == 0
    error = refused(capsys, metrics["run"], "--checkpoint", models.NANO_FILE)
    assert "sha256" in error and "--checkpoint" in error


def test_what_is_not_here_is_asked_for_by_flags_of_eval(run, capsys, birds):
    words = "--dataset", "cub", "--data-dir", birds, "--model", "vit_nano", "--epochs", 1
    folder = Path(run(*words, "--workers", 0)["run"])
    (birds / "fgvc").rename(birds / "moved")
    error = refused(capsys, folder)
    assert "--data-dir" in error and "--download" in error and "--dataset" not in error
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    edit_config(folder, arguments=arguments | {"model": "vit_tiny_patch16_384", "img_size": 32})
    error = refused(capsys, folder)  # weights that no test downloads
    assert "--checkpoint" in error and "--download" in error


def test_files_that_are_not_one_runs(run, capsys, tmp_path, monkeypatch):
    assert "absent" in refused(capsys, tmp_path / "absent")
    one, two = (Path(run("--method", name, "--epochs", 1)["run"]) for name in ("mlae", "lora"))
    with monkeypatch.context() as patch:
        other = models.create("vit_nano", 10, img_size=14)
        patch.setattr(evaluation, "merge", lambda model: other)
        assert score_again(capsys, one)[0] == 1
    adapter = (one / "adapter.safetensors").read_bytes()
    (one / "adapter.safetensors").write_bytes((two / "adapter.safetensors").read_bytes())
    assert "adapter.safetensors" in refused(capsys, one)
    (one / "adapter.safetensors").write_bytes(adapter)
    metrics = json.loads((one / "metrics.json").read_text())
    (one / "metrics.json").write_text(json.dumps(metrics | {"test_top1": 3.0}))
    assert score_again(capsys, one)[0] == 1


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
    assert any("a, 1 of 4" in line for line in lines)
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

    every = tmp_path / "every.csv"  # the probabilities of all classes
    assert score_again(capsys, bird_run, "--predictions", every, "--top-k", 999)[0] == 0
    every = rows_of(every.read_text())
    assert [row | {"rank": None} for row in every[::200]] == [
        row | {"rank": None} for row in scored
    ]
    assert sum(float(row["probability"]) for row in every[:200]) == pytest.approx(1, abs=1e-4)
    assert len({row["prediction"] for row in every[:200]}) == 200 and len(every) == 12 * 200

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
        assert numbers == sorted(np.argsort([norms[name, i] for i in range(6)])[-2:])
    share = evaluation.kept_experts(net, 0.25)
    found = {(name, i) for name, numbers in share.items() for i in numbers}
    assert found == set(sorted(norms, key=norms.get)[-18:])
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
    assert "ranks" in refused(capsys, smaller)


def test_several_numbers_of_experts_are_a_table_alone(run, capsys):
    metrics = run("--epochs", 1)
    code, out, _ = score_again(capsys, metrics["run"], "--prune", 8, 3, 1)
    rows = [line.split() for line in out.splitlines()[-3:]]
    assert code == 0 and [row[0] for row in rows] == ["8", "3", "1"]
    assert rows[0][-1] == f"{metrics['test_top1']:.2f}" and "test images again" in out
    assert not list(Path("runs").rglob("*prune*"))
    other = run("--method", "mor", "--epochs", 1)["run"]  # no lambda to order its experts by
    assert "--prune" in refused(capsys, other, "--prune", 1)


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


WRONG = "--prune 2.5, --prune 99, --prune 4 --predict there, --predict absent, --top-k 3"
NAMED = {
    "--prune 4 --out there": "there",
    "--prune 4 2 --out new": "--out",
    "--export onnx new.onnx --features new.npz": "--features",
    "--export timm new.onnx": ".safetensors",
    "--export pickle new": "timm, onnx, torch, peft",
    "--export peft there": "there",
    "--predictions new.txt": ".csv",
    "--predictions absent/new.csv": "absent",
    "--predict pipe.csv": "pipe.csv",
    "--predict broken.png": "broken.png",
}


@pytest.mark.parametrize("words", [*WRONG.split(", "), *NAMED])
def test_wrong_arguments_end_in_one_line(finished, capsys, words, monkeypatch):
    monkeypatch.chdir(finished)
    before = sorted(finished.rglob("*"))
    assert NAMED.get(words, words.split()[0]) in refused(capsys, "run", *words.split())
    assert sorted(finished.rglob("*")) == before


def test_scores_are_taken_in_the_precision_and_with_the_means_of_the_run(nano):
    net, images = nano(), data.load("digits", img_size=28)[1]
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")
    one, two = (evaluation.evaluate(net, images, normalize, amp=amp) for amp in ("off", "bf16"))
    assert one["loss"] != two["loss"] and one["loss"] == pytest.approx(two["loss"], rel=0.02)
    net.pretrained_cfg = net.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    args = train.settle(runs.train_parser().parse_args(["--normalize", "model"]))
    assert data.mean_and_std(args, net) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_names_of_classes_that_cannot_be_right(run, capsys):
    folder = Path(run("--epochs", 1)["run"])
    for names in (["a"] * 9, ["a\x1b"] * 10):
        edit_config(folder, class_names=names)
        assert "class_names" in refused(capsys, folder)
