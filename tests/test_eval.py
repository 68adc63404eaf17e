"""eval.py on runs that train.py has left."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import model as models
import runs
import train


def test_evaluation_restores_every_mode(nano):
    net = nano(mask_prob=0.5).train()
    net.blocks[2].eval()
    before = [module.training for module in net.modules()]
    images = data.load("digits", img_size=28)[1]
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")
    first = evaluation.evaluate(net, images, normalize)
    assert [module.training for module in net.modules()] == before
    assert evaluation.evaluate(net, images, normalize) == first  # no mask acted


def score_again(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments", [[], ["--val", "--amp", "bf16", "--masking", "mixed"], ["--method", "full"]]
)
def test_eval_repeats_the_number(run, capsys, monkeypatch, tmp_path, arguments):
    metrics = run(*arguments)
    folder = Path(metrics["run"]).resolve()
    monkeypatch.chdir("/")
    code, out, _ = score_again(capsys, folder, "--device", "cpu")
    split = "val" if "--val" in arguments else "test"
    top1, loss = metrics[f"{split}_top1"], metrics[f"{split}_loss"]
    for name in ("reported ", "unmerged ", "merged   "):
        assert f"\n{name} top-1 {top1:.2f} %   loss {loss:.6f}\n" in out
    assert out.rstrip().endswith("they agree") and code == 0
    assert (
        f"{metrics['trainable_parameters']:,} trained, of them {metrics['head_parameters']:,} in the head"
        in out
    )


def test_eval_of_what_is_not_the_run_it_was(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    for folder in (tmp_path / "absent", tmp_path):
        code, _, err = score_again(capsys, folder)
        assert code == 2 and err.count("\n") == 1 and str(folder) in err
    folder = Path(run("--method", "linear")["run"])
    other = tmp_path / "other.safetensors"
    changed = load_file(models.NANO_FILE)
    save_file({key: value + 1 for key, value in changed.items()}, other)
    code, _, err = score_again(capsys, folder, "--checkpoint", other)
    assert code == 2 and "sha256 differs" in err
    monkeypatch.setattr(
        evaluation, "merge", lambda model: models.create("vit_nano", 10, img_size=14)
    )
    code, out, _ = score_again(capsys, folder)
    assert code == 1 and "they agree" not in out


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    logits = torch.tensor([[0.0, 0.0], [0.6, 0.0]])  # confidences 0.5 and 0.6456...
    sure = 1 / (1 + np.exp(-0.6))
    apart = (0.5 + sure) / 2  # 1 right at 0.5 and 0 right at 0.65, each in a bin of its own
    found = evaluation.calibration_error(logits, torch.tensor([0, 1]), bins=4)
    assert found == pytest.approx(apart, abs=1e-7)


def test_scores_against_their_formulas():
    logits, labels = 3 * torch.randn(200, 7), torch.randint(0, 6, (200,))
    labels[labels == 2] = 3  # classes 2 and 6 do not occur
    probabilities = torch.softmax(logits.double(), 1).numpy()
    truth, guess = labels.numpy(), probabilities.argmax(1)
    means, error = [], 0.0
    for label in (0, 1, 3, 4, 5):
        means.append((guess[truth == label] == label).mean())
    for b in range(15):
        sure = probabilities.max(1)
        rows = (b / 15 < sure) & (sure <= (b + 1) / 15)
        if rows.any():
            gap = abs((guess == truth)[rows].mean() - sure[rows].mean())
            error += rows.mean() * gap
    order = probabilities.argsort(1)[:, -5:]
    top5 = np.mean((order == truth[:, None]).any(1))
    found = evaluation.score(logits, labels)
    assert found["mean_class_top1"] == pytest.approx(100 * np.mean(means), abs=0.005)
    assert found["mean_class_top1"] != found["top1"]
    assert evaluation.calibration_error(logits, labels) == pytest.approx(error, abs=1e-12)
    names = [str(label) for label in range(7)]
    assert f"top-5 {100 * top5:.2f} %" in evaluation.report(logits, labels, names)
    table = np.zeros((7, 7), int)
    np.add.at(table, (truth, guess), 1)
    np.fill_diagonal(table, 0)
    pairs = evaluation.confused(logits, labels)
    assert [count for *_, count, _ in pairs] == sorted(table.flatten())[::-1][:5]
    for label, taken, count, images in pairs:
        assert table[label, taken] == count and images == (truth == label).sum()
    assert evaluation.confused(torch.eye(3), torch.arange(3)) == []


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def bird_run(run, birds):
    """A run whose test view is a centre crop, with names for its 200 classes."""
    metrics = run("--dataset", "cub", "--data-dir", birds, "--model", "vit_nano", "--seed", 3)
    folder = Path(metrics["run"]).resolve()
    edit_config(folder, class_names=[f"bird {i}" for i in range(200)])
    return folder, birds


def test_predictions_of_a_folder_are_those_of_the_scored_images(bird_run, capsys, tmp_path):
    folder, birds = bird_run
    table, features = tmp_path / "scored.csv", tmp_path / "scored.npz"
    code, out, _ = score_again(capsys, folder, "--predictions", table, "--features", features)
    assert code == 0 and "taken for bird " in out
    scored = rows_of(table.read_text())
    top1 = np.mean([row["label"] == row["prediction"] for row in scored])
    assert len(scored) == 12 and f"unmerged  top-1 {100 * top1:.2f} %" in out
    model, _ = evaluation.load_run(folder)
    with np.load(features) as file:
        assert file["images"].tolist() == [row["image"] for row in scored]
        assert [f"bird {label}" for label in file["labels"]] == [row["label"] for row in scored]
        with torch.no_grad():
            logits = model.head(torch.from_numpy(file["features"]))
        again = file["features"]
    assert [f"bird {i}" for i in logits.argmax(1)] == [row["prediction"] for row in scored]

    images = birds / "fgvc" / "CUB_200_2011" / "images"
    assert all((birds / row["image"]).is_file() for row in scored)
    arguments = ["--predict", images, "--top-k", 3, "--features", tmp_path / "own.npz"]
    code, out, _ = score_again(capsys, folder, *arguments)
    rows = rows_of(out)
    assert code == 0 and len(rows) == 3 * len(list(images.rglob("*.jpg")))
    first = {row["image"]: row for row in rows if row["rank"] == "1"}
    with np.load(tmp_path / "own.npz") as file:
        own = dict(zip(file["images"].tolist(), file["features"], strict=True))
    for row, feature in zip(scored, again, strict=True):
        name = row["image"].removeprefix("fgvc/CUB_200_2011/images/")
        assert first[name]["prediction"] == row["prediction"]
        assert first[name]["probability"] == row["probability"]
        assert np.abs(own[name] - feature).max() < 1e-5


def test_an_image_is_turned_as_its_camera_says(bird_run, capsys, tmp_path):
    folder, _ = bird_run
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "lying.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1).copy()).save(tmp_path / "standing.png")
    Image.fromarray(pixels).save(tmp_path / "other.png")
    said = []
    for name in ("lying", "standing", "other"):
        table = tmp_path / f"{name}.csv"
        score_again(capsys, folder, "--predict", tmp_path / f"{name}.png", "--predictions", table)
        rows = rows_of(table.read_text())
        assert len(rows) == 5
        said.append([row["probability"] for row in rows])
    assert said[0] == said[1] != said[2]
    code, out, _ = score_again(capsys, folder, "--predict", tmp_path / "other.png", "--top-k", 999)
    assert code == 0 and out.count("bird") == 200
    assert out.split("%")[0].strip() == f"{100 * float(said[2][0]):.2f}"


def active(net):
    """Nano models of the fixture, with coefficients and sizes that differ from expert to expert."""
    for layer in models.adapters(net).values():
        torch.nn.init.normal_(layer.lora_lambda)
        layer.lora_lambda.data *= layer.expert_mask
    return net.eval()


def test_pruning_keeps_the_largest_updates(nano, images):
    net = active(nano(rank=6, masking="fixed", targets=["attn.qkv", "mlp.fc1"]))
    norms = {}
    for name, layer in models.adapters(net).items():
        for i in range(6):
            update = layer.lora_lambda[i] * torch.outer(layer.lora_B[:, i], layer.lora_A[i])
            norms[name, i] = update.double().norm().item()
    for amount in (2, 6):
        for name, numbers in evaluation.kept_experts(net, amount).items():
            best = sorted(range(6), key=lambda i: norms[name, i])[6 - amount :]  # noqa: B023
            assert numbers == sorted(best) or amount == 6
    share = evaluation.kept_experts(net, 0.25)
    found = [(name, i) for name, numbers in share.items() for i in numbers]
    assert set(found) == set(sorted(norms, key=norms.get)[-18:])
    logits = net(images)
    assert torch.allclose(
        evaluation.prune(net, evaluation.kept_experts(net, 6))(images), logits, atol=1e-5
    )
    for name, layer in models.adapters(net).items():  # the others switched off, in place
        off = [i for i in range(6) if i not in share[name]]
        layer.lora_lambda.data[off] = 0
    pruned = evaluation.prune(net, share)
    assert torch.allclose(pruned(images), net(images), atol=1e-5)
    assert not torch.allclose(net(images), logits, atol=1e-3)
    experts, parameters = evaluation.size(pruned)
    assert experts == 18 and parameters < evaluation.size(net)[1] / 3


def spoil_one_layer(folder):
    """Take all importance from the experts of the first layer of a run."""
    state = load_file(folder / "adapter.safetensors")
    header = {"format": "pt", "architecture": "vit_nano", "config": "{}"}
    state["blocks.0.attn.qkv.lora_lambda"] *= 0
    save_file(state, folder / "adapter.safetensors", header)


def test_a_pruned_run_is_a_run(run, capsys, tmp_path):
    folder = Path(run("--val", "--rank", 4)["run"]).resolve()
    spoil_one_layer(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, out, err = score_again(capsys, folder, "--prune", 0.25)
    assert code == 0 and not err and "test" not in out.splitlines()[0]
    top1 = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line[:6].strip()}
    assert list(top1)[:5] == ["kept", "4", "2", "1", "0.25"]
    smaller = folder.with_name(f"{folder.name}-prune0.25")
    ranks = json.loads((smaller / "config.json").read_text())["ranks"]
    assert sum(ranks.values()) == 6 and ranks["blocks.0.attn.qkv"] == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    code, out, _ = score_again(capsys, smaller)
    assert code == 0 and f"unmerged  top-1 {top1['0.25']} %" in out
    files = [(path / "adapter.safetensors").stat().st_size for path in (folder, smaller)]
    assert files[1] < 0.6 * files[0]
    for kind in ("timm", "peft"):
        if kind == "peft":
            pytest.importorskip("peft")
        place = tmp_path / f"again-{kind}.safetensors"
        assert score_again(capsys, smaller, "--export", kind, place)[0] == 0


def test_pruning_says_that_the_test_set_is_looked_at_again(run, capsys):
    folder = Path(run()["run"]).resolve()
    code, out, _ = score_again(capsys, folder, "--prune", 8, 3, 1)
    assert code == 0 and "test images again" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["8", "3", "1"]
    assert out.splitlines()[2].endswith(
        f"{train.json.loads((folder / 'metrics.json').read_text())['test_top1']:.2f}"
    )
    assert not list(folder.parent.glob("*prune*"))


WRONG = {  # arguments -> what the line must say
    "--prune 0": "--prune",
    "--prune 2.5": "--prune",
    "--prune 1.0": "--prune",
    "--prune nan": "--prune",
    "--prune 99": "8 experts",
    "--prune 4 --out there": "exists already",
    "--prune 4 2 --out new": "--out",
    "--out new": "--out",
    "--prune 4 --predict there": "not allowed with",
    "--prune 4 --features new.npz": "--features",
    "--export onnx new.onnx --predictions new.csv": "--predictions",
    "--export timm new.onnx": ".safetensors",
    "--export onnx new.bin": ".onnx",
    "--export torch new.pt": ".pt2",
    "--export pickle new": "timm, onnx, torch, peft",
    "--export timm absent/new.safetensors": "cannot write to absent",
    "--export timm image.png/new.safetensors": "cannot write to image.png",
    "--export timm folder.safetensors": "exists already",
    "--export peft there": "exists already",
    "--export timm /proc/new.safetensors": "cannot write",
    "--predictions new.txt": ".csv",
    "--predictions folder.csv": "exists already",
    "--predictions pipe.csv": "exists already",
    "--predictions absent/new.csv": "cannot write to absent",
    "--features new.csv": ".npz",
    "--features /proc/new.npz": "cannot write",
    "--predict absent": "no image and no folder",
    "--predict there": "no readable image in there",
    "--predict pipe.csv": "no image and no folder",
    "--predict config.json": "cannot read image config.json",
    "--predict broken": "broken.png",
    "--predict image.png --top-k 0": "--top-k",
    "--top-k 3": "--predict",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_end_in_one_line(wrong_place, capsys, arguments, monkeypatch):
    folder = wrong_place
    monkeypatch.chdir(folder.parent)
    before = sorted(folder.parent.rglob("*"))
    code, out, err = score_again(capsys, folder, "--device", "cpu", *arguments.split())
    assert code == 2 and err.count("\n") == 1 and err.strip().isprintable(), err
    assert WRONG[arguments] in err
    assert sorted(folder.parent.rglob("*")) == before


@pytest.fixture(scope="module")
def wrong_place(tmp_path_factory):
    """A run among files that are in the way."""
    top = tmp_path_factory.mktemp("wrong")
    arguments = ["--device", "cpu", "--epochs", 1, "--img-size", 14, "--out", top / "runs"]
    metrics = train.run(runs.settle(runs.train_parser().parse_args([*map(str, arguments)])))
    folder = top / "run"
    os.rename(metrics["run"], folder)
    for name in ("there", "folder.safetensors", "folder.csv", "broken"):
        (top / name).mkdir()
    os.mkfifo(top / "pipe.csv")
    os.mkfifo(top / "there" / "pipe.png")
    Image.new("RGB", (20, 20)).save(top / "image.png")
    half = (top / "image.png").read_bytes()[:45]
    (top / "broken" / "broken.png").write_bytes(half)
    (top / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": ["a"] * 9},
        {"class_names": "ten"},
        {"class_names": ["a\n"] * 10},
        {"ranks": {"blocks.0.attn.qkv": 1}},
        {"ranks": [4] * 6},
        {"ranks": {f"blocks.{i}.attn.qkv": 9 for i in range(6)}},
        {"ranks": {f"blocks.{i}.attn.qkv": True for i in range(6)}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_a_config_that_cannot_be_right(run, capsys, changes):
    folder = Path(run("--epochs", 1)["run"])
    edit_config(folder, **changes)
    code, _, err = score_again(capsys, folder, "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and next(iter(changes)) in err


@pytest.mark.parametrize("method", ["mor", "snell", "linear", "full"])
def test_only_experts_with_a_lambda_are_pruned(run, capsys, method):
    folder = Path(run("--method", method, "--epochs", 1)["run"])
    code, _, err = score_again(capsys, folder, "--prune", 1)
    assert code == 2 and err.count("\n") == 1 and f"--prune: {method} has no experts" in err


def test_one_bad_file_in_a_folder_stops_no_prediction(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = evaluation.images_to_predict(tmp_path, 28, "none")
    assert [path.name for path in images.files] == ["good.png"]
    assert "left out: 1 files that cannot be read: bad.png" in capsys.readouterr().err


def test_a_run_from_before_a_setting_existed_has_its_default(run):
    folder = Path(run("--epochs", 1)["run"])
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    for name in ("lambda_lr", "freeze_lambda", "pattern", "schedule", "label_smoothing"):
        del arguments[name]
    edit_config(folder, arguments=arguments)
    _, config = evaluation.load_run(folder)
    found = vars(config["arguments"])
    assert (found["lambda_lr"], found["freeze_lambda"], found["pattern"]) == (1.0, False, "random")
