"""train.py and eval.py as a user runs them, on the embedded demo and a small prepared folder."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import eval as evaluation
import model as models
import train

ROOT = Path(train.__file__).parent


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs train.py in this process, from another folder, on small images; returns its last line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        train.main(["--device", "cpu", "--epochs", "2", "--img-size", "14", *map(str, arguments)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def log(metrics):
    with open(Path(metrics["run"], "log.csv")) as file:
        return list(csv.DictReader(file))


def test_a_run_and_all_its_files(run):
    metrics = run("--mask-prob", 0.3)
    folder = Path(metrics["run"])
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "log.csv",
        "metrics.json",
        "adapter.safetensors",
    }
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert folder.parent == Path("runs/digits")
    net = models.create("vit_nano", 10)
    assert metrics["head_parameters"] == 97 * 10
    assert metrics["trainable_parameters"] == 6 * 8 * (96 + 288 + 1) + 970
    assert metrics["trainable_parameters"] == sum(
        p.numel() for p in net.parameters() if p.requires_grad
    )
    assert metrics["method"] == "mlae" and metrics["dataset"] == "digits" and metrics["seed"] == 0
    assert (
        15 < metrics["test_top1"] <= 100
        and metrics["train_seconds"] > 0
        and metrics["peak_memory_mb"] > 50
    )
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["arguments"]["mask_prob"] == 0.3 and config["versions"]["torch"] == torch.__version__
    )
    assert (
        config["weights"]["tag"] == "vit_nano:vit_nano.safetensors"
        and len(config["weights"]["sha256"]) == 64
    )
    rows = log(metrics)
    assert [row["epoch"] for row in rows] == ["1", "2"] and {row["mask_prob"] for row in rows} == {
        "0.3"
    }
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])


def test_the_score_is_that_of_the_saved_adapter_by_hand(run):
    metrics = run()
    net = models.create("vit_nano", 10, img_size=14).eval()
    models.load_adapter(net, Path(metrics["run"], "adapter.safetensors"))
    images, labels = data.load("digits", img_size=14)[1].tensors()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = net((images / 255 - mean[:, None, None]) / std[:, None, None])
    assert metrics["test_top1"] == pytest.approx(
        100 * (logits.argmax(1) == labels).double().mean().item(), abs=0.13
    )
    assert metrics["test_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4
    )


def test_same_seed_same_result_and_another_seed_another(run):
    first, again = run("--out", "a"), run("--out", "b", "--workers", 1)
    other = run("--out", "a", "--seed", 1)
    one, two, three = (
        load_file(Path(m["run"], "adapter.safetensors")) for m in (first, again, other)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["head.weight"], three["head.weight"])
    assert first["run"] != other["run"] and Path(first["run"]).name == Path(again["run"]).name


def test_several_seeds_are_single_runs_and_their_mean(run):
    summary = run("--seeds", 0, 1, 2)
    single = run("--seed", 1)
    scores = [
        json.loads(Path(folder, "metrics.json").read_text())["test_top1"]
        for folder in summary["run"]
    ]
    assert (
        summary["seed"] == [0, 1, 2]
        and summary["run"][1] == single["run"]
        and scores[1] == single["test_top1"]
    )
    assert summary["test_top1"] == pytest.approx(np.mean(scores), abs=0.006)
    assert summary["test_top1_std"] == pytest.approx(np.std(scores, ddof=1), abs=0.006)
    assert (
        summary["trainable_parameters"] == single["trainable_parameters"]
        and "test_loss" not in summary
    )


@pytest.mark.parametrize(("at", "amp"), [(1, "off"), (3, "off"), (1, "fp16")])
def test_resume_goes_on_as_if_nothing_had_happened(run, monkeypatch, at, amp):
    arguments = ["--epochs", 3, "--drop-path", 0.1, "--mask-schedule", "increase", "--amp", amp]
    whole = run("--out", "whole", *arguments)
    stop_after(monkeypatch, at)
    with pytest.raises(SystemExit) as stop:
        run("--out", "parts", *arguments)
    assert stop.value.code == 130
    torch.manual_seed(123)
    resumed = run("--out", "parts", *arguments, "--resume")
    one, two = (load_file(Path(m["run"], "adapter.safetensors")) for m in (whole, resumed))
    assert all(torch.equal(one[key], two[key]) for key in one)
    for a, b in zip(log(whole), log(resumed), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert resumed["test_loss"] == whole["test_loss"]
    assert run("--out", "parts", *arguments, "--resume") == resumed  # finished: nothing runs again


def test_learning_rates_are_the_formula(run):
    # 13 steps an epoch (800 images), 4 epochs: one epoch of warm-up, then half a cosine over three
    want = [1e-3 * (i + 1) / 13 for i in range(13)]
    want += [1e-3 * (1 + math.cos(math.pi * i / 39)) / 2 for i in range(39)]
    got = [train.learning_rate(i, 52, 13, 1e-3) for i in range(52)]
    assert got == pytest.approx(want, rel=1e-12)
    rows = log(run("--val", "--epochs", 4, "--lr", 1e-3, "--warmup-epochs", 1))
    assert [float(row["lr"]) for row in rows] == pytest.approx(
        [want[12], want[25], want[38], want[51]]
    )


def test_folded_and_two_branch_training_coincide(run, monkeypatch):
    """The same masks and starts, so the curves differ by rounding alone, which training amplifies."""
    arguments = ["--epochs", 6, "--img-size", 28, "--mask-prob", 0.3]
    folded = run("--out", "folded", *arguments)

    def two_branch(self, x):
        h = torch.nn.functional.linear(x, self.lora_A) * self.coefficients()
        return torch.nn.functional.linear(x, self.weight, self.bias) + h @ self.lora_B.T

    monkeypatch.setattr(models.MLAELinear, "forward", two_branch)
    plain = run("--out", "plain", *arguments)
    curves = [[float(row["loss"]) for row in log(metrics)] for metrics in (folded, plain)]
    assert curves[0] == pytest.approx(curves[1], rel=2e-3) and curves[0] != curves[1]
    assert folded["test_top1"] == pytest.approx(plain["test_top1"], abs=0.6)


def test_recomputed_blocks_give_the_same_training(run, capsys):
    plain = run("--out", "plain", "--drop-path", 0.1)
    try:
        again = run("--out", "again", "--drop-path", 0.1, "--grad-checkpoint")
    except SystemExit:  # timm's reentrant checkpoints of old
        assert "loses gradients; pip install -U timm" in capsys.readouterr().err
        return
    assert again["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-5)


def test_recomputation_is_refused_where_there_is_none(run, capsys, monkeypatch):
    monkeypatch.delattr(
        models.timm.models.vision_transformer.VisionTransformer, "set_grad_checkpointing"
    )
    with pytest.raises(SystemExit) as stop:
        run("--grad-checkpoint")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--grad-checkpoint: vit_nano cannot recompute its blocks" in err


def test_accumulation_gives_the_gradient_of_the_whole_batch(run):
    whole, parts = (
        run("--mask-prob", 0, "--accumulate", n, "--batch-size", 50) for n in (1, 3)
    )  # 17 + 17 + 16
    losses = [[float(row["loss"]) for row in log(metrics)] for metrics in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and whole["run"] != parts["run"]
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=5e-3)
    masked = run("--mask-prob", 0.5, "--accumulate", 2)  # a mask for each part
    assert masked["test_loss"] != run("--mask-prob", 0.5)["test_loss"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(run, monkeypatch, amp):
    dtypes, head = set(), models.nn.Linear.forward

    def forward(self, x):
        y = head(self, x)
        if (
            not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        ):  # not the probe of `inject`
            dtypes.add(y.dtype)
        return y

    monkeypatch.setattr(models.nn.Linear, "forward", forward)
    mixed = run("--amp", amp)
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert json.loads(Path(mixed["run"], "config.json").read_text())["amp"] == amp
    exact = run("--amp", "off")
    assert mixed["test_loss"] == pytest.approx(exact["test_loss"], rel=0.05)


def test_no_compilation_after_the_first_step(run, monkeypatch):
    """Neither for another p, nor for the short last batch, nor in the next epochs."""
    from torch._dynamo.utils import counters

    compile_it, frames = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda model, **kwargs: compile_it(model, backend="aot_eager", **kwargs)
    )
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda *a, **k: frames.append(counters["frames"]["total"]) or step(*a, **k),
    )
    metrics = run("--compile", "--epochs", 3, "--mask-schedule", "increase")
    newest = tuple(map(int, torch.__version__.split(".")[:2])) >= (
        2,
        15,
    )  # torch 2.6 looks at a first p of 0 again
    assert len(frames) == 3 * 16 and len(set(frames)) <= (1 if newest else 2) and frames[0] > 0
    assert [row["mask_prob"] for row in log(metrics)] == ["0.0", "0.25", "0.5"]


def test_every_method_and_masking(run):
    head = run("--method", "linear", "--val")
    assert (
        head["trainable_parameters"] == head["head_parameters"] == 970 and "test_top1" not in head
    )
    assert (
        run("--method", "full", "--epochs", 1)["trainable_parameters"] == 688_138 - 12 * 96
    )  # 12 positions fewer
    assert run("--method", "lora")["trainable_parameters"] == 6 * 8 * (96 + 288) + 970
    fixed = run(
        "--masking", "fixed", "--mask-pattern", "incremental", "--targets", "attn.proj", "mlp.fc2"
    )
    assert {row["mask_prob"] for row in log(fixed)} == {"0.0"}
    mixed = run(
        "--masking", "mixed", "--mask-schedule", "decrease", "--rank", 2, "--normalize", "model"
    )
    assert [row["mask_prob"] for row in log(mixed)] == ["0.5", "0.0"]
    assert len({m["run"] for m in (head, fixed, mixed)}) == 3


def test_frozen_batch_norms_keep_their_statistics(run, capsys):
    metrics = run(
        "--model",
        "resnet18",
        "--checkpoint",
        "none",
        "--method",
        "linear",
        "--epochs",
        1,
        "--img-size",
        16,
    )
    torch.manual_seed(0)
    net = models.create("resnet18", 10, pretrained=False, method="linear").eval()
    models.load_adapter(net, Path(metrics["run"], "adapter.safetensors"))
    images = data.load("digits", img_size=16)[1]
    again = evaluation.evaluate(net, images, data.normalizer(*data.NORMALIZE["imagenet"], "cpu"))
    assert (again["top1"], again["loss"]) == (metrics["test_top1"], metrics["test_loss"])


def test_lambda_of_lora_stays_where_coef_init_put_it(run):
    lora = run("--method", "lora", "--coef-init", 2)
    state = load_file(Path(lora["run"], "adapter.safetensors"))
    assert all((value == 2).all() for key, value in state.items() if key.endswith("lora_lambda"))


def test_weight_decay_leaves_vectors_alone(run, capsys, tmp_path):
    train.main(["--device", "cpu", "--epochs", "1"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "with decay" in line)
    matrices, vectors = 6 * 8 * (96 + 288) + 960, 6 * 8 + 10
    assert line.endswith(f"{matrices:,} with decay 0.0001, {vectors} with decay 0")
    assert line.startswith(f"{6 * 8 * (96 + 288 + 1):,} + 970 (head) of ")


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
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        evaluation.main()
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
        assert code == 2 and err.count("\n") == 1 and "is not a run of train.py" in err
    folder = Path(run("--method", "linear")["run"])
    other = tmp_path / "other.safetensors"
    changed = load_file(models.NANO_FILE)
    models.save_file({key: value + 1 for key, value in changed.items()}, other)
    code, _, err = score_again(capsys, folder, "--checkpoint", other)
    assert code == 2 and "sha256 differs" in err
    monkeypatch.setattr(models, "merge", lambda model: models.create("vit_nano", 10, img_size=14))
    code, out, _ = score_again(capsys, folder)
    assert code == 1 and "they agree" not in out


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "data" / "vtab-1k" / "cifar"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
    for i in range(10, 3000):
        (folder / "images" / f"{i}.png").symlink_to(f"{i % 10}.png")
    write_lists(folder, 30, 7)
    return folder


def write_lists(folder, test, step):
    cuts = {
        "train800": (0, 800),
        "val200": (800, 1000),
        "train800val200": (0, 1000),
        "test": (1000, 1000 + test),
    }
    for name, cut in cuts.items():
        (folder / f"{name}.txt").write_text(
            "".join(f"images/{i}.png {i % 10 * step}\n" for i in range(*cut))
        )


def test_a_vtab_task_from_its_prepared_folder(run, cifar):
    metrics = run("--dataset", "cifar100", "--model", "vit_nano", "--lr", 0.003)
    assert metrics["dataset"] == "cifar" and metrics["data"].endswith("30 of 10000 test (subset)")
    assert metrics["head_parameters"] == 97 * 100
    assert float(log(metrics)[-1]["loss"]) < math.log(100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifra"], "unknown dataset 'cifra': did you mean 'cifar'?"),
        (["--dataset", "vtabs"], "unknown dataset 'vtabs': did you mean 'vtab'?"),
        (["--mask-prob", "1"], "argument --mask-prob: must be in [0, 1), not 1"),
        (["--mask-prob", "nan"], "argument --mask-prob: must be in [0, 1), not nan"),
        (["--mask-prob", "half"], "argument --mask-prob: invalid float value: 'half'"),
        (["--rank", "0"], "argument --rank: must be 1 or more, not 0"),
        (["--rank", "x"], "argument --rank: invalid int value: 'x'"),
        (["--lr", "-1"], "argument --lr: must be above 0, not -1"),
        (
            ["--targets", "attn.qvk"],
            "target 'attn.qvk' matches no linear layer of vit_nano; there are: attn.qkv (6)",
        ),
        (["--dataset", "dtd"], "get it by hand from https://www.robots.ox.ac.uk"),
        (["--dataset", "sun397"], "/data/vtab-1k/sun397: unpack a prepared archive"),
        (
            ["--dataset", "dtd", "--source", "prepared"],
            "/data/vtab-1k/dtd: unpack a prepared archive",
        ),
        (
            ["--dataset", "sun397", "--source", "original"],
            "sun397 has a prepared folder only; use --source prepared",
        ),
        (["--source", "tfds"], "argument --source: invalid choice: 'tfds'"),
        (["--dataset", "cub"], "/data/fgvc/cub: put the images of CUB-200-2011 into"),
        (["--accumulate", "0"], "argument --accumulate: must be 1 or more, not 0"),
        (["--accumulate", "100"], "--accumulate 100 must not be above --batch-size 64"),
        (["--workers", "-1"], "argument --workers: must be from 0 to"),
        (["--model", "vit_nanoo"], "timm has no model 'vit_nanoo'"),
        (["--checkpoint", "absent.pth"], "no checkpoint file "),
        (["--warmup-epochs", "2"], "--warmup-epochs 2 must be from 0 to below --epochs 2"),
        (
            ["--mask-schedule", "increase", "--masking", "fixed"],
            "--mask-schedule increase needs --masking stochastic",
        ),
        (
            ["--mask-pattern", "hourglass", "--mask-prob", "0.8"],
            "hourglass over 6 layers reaches a mean of 0.66 at most",
        ),
        (["--img-size", "30"], "img_size 30 is not a multiple of vit_nano's patch size 7"),
        (
            ["--model", "vit_tiny_patch16_224.nonsense"],
            "timm has no weights 'vit_tiny_patch16_224.nonsense'; there are: ",
        ),
        (["--lr", "inf"], "argument --lr: must be above 0, not inf"),
        (["--seed", "-1"], "argument --seed: must be from 0 to"),
        (["--out", "/dev/null/runs"], "--out: cannot make /dev/null/runs"),
        (["--checkpoint", str(Path(__file__).parent / "test_data.py")], "cannot load checkpoint"),
        (["--maskprob", "0.5"], "unrecognized arguments: --maskprob 0.5"),
        (["--device", "cuda"], "--device cuda: there is none here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["--epochs", "2", *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and message in captured.err, (
        captured.err
    )
    assert not captured.out and not list(tmp_path.iterdir())


def test_damaged_images_stop_the_run_before_it_writes(run, cifar, capsys):
    arguments = ["--dataset", "cifar", "--model", "vit_nano"]
    whole = (cifar / "images/3.png").read_bytes()
    (cifar / "images/3.png").write_bytes(whole[:60])
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "3.png" in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_damaged_test_image_stops_the_run_before_it_trains(run, cifar, capsys):
    whole = (cifar / "images/3.png").read_bytes()
    (cifar / "images/1003.png").unlink()
    (cifar / "images/1003.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    arguments = ["--dataset", "cifar", "--model", "vit_nano"]
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "1003.png" in captured.err and captured.err.count("\n") == 1
    assert not Path("runs").exists()
    (cifar / "images/1003.png").write_bytes(whole)
    assert "test_top1" in run(*arguments)


def stop_after(monkeypatch, epochs):
    save = train.save_state

    def save_and_stop(path, model, optimizer, scaler, data, epoch, *rest):
        save(path, model, optimizer, scaler, data, epoch, *rest)
        if epoch == epochs:
            monkeypatch.setattr(train, "save_state", save)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", save_and_stop)


def test_resume_only_on_the_same_images(run, cifar, capsys, monkeypatch):
    arguments = ["--dataset", "cifar", "--model", "vit_nano", "--resume"]
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run(*arguments)
    lines = (cifar / "train800val200.txt").read_text().splitlines()
    lines[:2] = [line[:-2] + " 5" for line in lines[:2]]
    (cifar / "train800val200.txt").write_text("\n".join(lines))
    first = run(*arguments)
    fresh = run(*arguments[:-1], "--out", "fresh")
    assert first["test_loss"] == fresh["test_loss"]
    write_lists(cifar, 40, 7)  # the subset grows: its result is no longer this one
    assert run(*arguments)["data"].startswith(
        "prepared folder, PNG images, 1000 train / 40 of 10000"
    )


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "state.pt"])
def test_damaged_files_of_a_run(run, capsys, monkeypatch, name):
    if name == "state.pt":
        stop_after(monkeypatch, 1)
        with pytest.raises(SystemExit):
            run()
        folder = next(Path("runs/digits").iterdir())
        capsys.readouterr()
        torch.save({"progress": 1}, folder / name)
        with pytest.raises(SystemExit) as stop:
            run("--resume")
        err = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and err.count("\n") == 1
            and "state.pt: remove it to start anew" in err
        )
        return
    whole = run()
    Path(whole["run"], name).write_text("{")
    again = run("--resume")
    assert again["test_loss"] == whole["test_loss"]


def test_resume_takes_only_the_same_checkpoint(run, tmp_path):
    weights = load_file(models.NANO_FILE)
    for name, shift in (("a", 0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        models.save_file(
            {k: v + shift for k, v in weights.items()}, tmp_path / name / "model.safetensors"
        )
    first = run("--checkpoint", "a/model.safetensors")
    other = run("--checkpoint", "b/model.safetensors", "--resume")
    assert first["run"] != other["run"] and first["test_loss"] != other["test_loss"]


def test_a_loss_that_is_not_finite_is_an_error(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--lr", 1e30)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and err.count("\n") == 1
        and err.endswith("error: the loss is nan in epoch 1: --lr 1e+30 is too high\n")
    )


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        run()


def test_the_command_line_itself(tmp_path):
    bad = subprocess.run(
        [sys.executable, ROOT / "train.py", "--dataset", "cifra"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        bad.returncode == 2
        and bad.stderr == "train.py: error: unknown dataset 'cifra': did you mean 'cifar'?\n"
    )
    assert (
        subprocess.run(
            [sys.executable, ROOT / "train.py", "--help"], capture_output=True
        ).returncode
        == 0
    )


def test_demo_beats_the_linear_probe(run):
    """The README's claim with fewer epochs: the method shows."""
    mlae, linear = (
        run("--epochs", 10, "--img-size", 28, "--method", method) for method in ("mlae", "linear")
    )
    assert mlae["test_top1"] > linear["test_top1"] + 5


def test_real_images_and_a_real_model(run):
    """The main job on real data, where a copy is at hand (data/vtab-1k/cifar and $MLAE_CHECKPOINT)."""
    import os

    file, folder = os.environ.get("MLAE_CHECKPOINT"), ROOT / "data"
    if not file or not (folder / "vtab-1k/cifar").is_dir():
        pytest.skip("no data/vtab-1k/cifar or no MLAE_CHECKPOINT=<a vit_small_patch14_dinov2 file>")
    metrics = run(
        *(
            "--dataset",
            "cifar",
            "--data-dir",
            folder,
            "--model",
            "vit_small_patch14_dinov2",
            "--checkpoint",
            file,
        ),
        *("--img-size", 42, "--epochs", 3),
    )
    assert metrics["test_top1"] > 3  # chance is 1; three epochs at 42 pixels gave 5.8


@pytest.fixture
def three(tmp_path, cifar):
    """A root with three of VTAB-1k's nineteen tasks, one of them a subset."""
    for task, test in (("dtd", 1880), ("kitti", 711)):
        folder = cifar.parent / task
        folder.mkdir()
        (folder / "images").symlink_to(cifar / "images")
        write_lists(folder, test, 0)
    return tmp_path


@pytest.fixture
def suite(three, run, capsys, monkeypatch):
    """Runs --dataset vtab on those three; returns all that was printed and the last line."""
    monkeypatch.chdir(three)

    def call(*arguments):
        base = [
            "--dataset",
            "vtab",
            "--device",
            "cpu",
            "--model",
            "vit_nano",
            "--epochs",
            "1",
            "--img-size",
            "14",
        ]
        train.main([*base, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert not [
            line for line in err.splitlines() if "step" not in line
        ]  # tqdm's bar, on a terminal
        return out, json.loads(out.splitlines()[-1])

    return call


def table(text):
    """{first cell: other cells} of the markdown table's rows."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in cells}


def test_a_suite_runs_what_is_there_and_lists_the_rest(suite, three, monkeypatch):
    out, last = suite()
    rows = table(out)
    single = json.loads(next(Path("runs/dtd").glob("*/metrics.json")).read_text())["test_top1"]
    assert {path.name for path in Path("runs").iterdir()} == {"cifar", "dtd", "kitti"}
    assert (
        "PARTIAL, no vtab-1k result: mlae has 2 of 19 tasks" in out
        and "left out: 16 of 19 tasks" in out
    )
    assert rows["cifar"][0].endswith(" *") and "30 of 10000 test (subset)" in rows["cifar"][1]
    assert "* not a result on vtab-1k" in out
    assert rows["dtd"][0] == f"{single:.2f} (1)" and rows["svhn"][0] == "-"
    assert rows["natural"][0] == f"{single:.2f} (1) [1 of 7 tasks]"  # the subset is in no mean
    assert rows["mean of groups"][0] == "-" and rows["MLAE (Wang et al. 2024)"][:3] == [
        "78.8",
        "-",
        "90.9",
    ]
    missing = [line for line in out.splitlines() if line.startswith("- ")]
    assert len(missing) == 16 and all("unpack" in line or "pip install" in line for line in missing)
    assert last["dataset"] == "vtab" and last["test_top1"] is None and len(last["run"]) == 3
    monkeypatch.setattr(train.models, "create", None)  # nothing trains again
    again, _ = suite()
    assert again.count("finished: runs/") == 3 and table(again) == rows


def test_a_suite_of_several_seeds(suite):
    out, last = suite("--seeds", 0, 1, 2, "--mask-prob", 0.1)
    scores = [
        json.loads(file.read_text())["test_top1"]
        for file in Path("runs/dtd").glob("*/metrics.json")
    ]
    mean, std = np.mean(scores), np.std(scores, ddof=1)
    assert table(out)["dtd"][0] == f"{mean:.2f} ± {std:.2f} (3)" and last["seed"] == [0, 1, 2]


def test_a_suite_goes_on_past_damaged_data_and_divergence(suite, three, monkeypatch):
    (three / "data/vtab-1k/dtd/test.txt").write_text("images/0.png x\n")
    out, _ = suite("--dataset", "vtab")
    assert (
        "left out: 17 of 19 tasks" in out
        and "- dtd: " in out
        and "test.txt, line 1: expected" in out
    )
    evaluate, calls = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    with pytest.raises(SystemExit) as stop:
        suite("--lr", 1e30, "--epochs", 2)
    assert stop.value.code == 2 and not calls


def test_a_suite_without_any_data(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--dataset", "fgvc", "--model", "vit_nano")
    out, err = (text.strip().splitlines() for text in capsys.readouterr())
    assert (
        stop.value.code == 2
        and len(err) == 1
        and err[-1].endswith("--dataset fgvc: not one of its 5 tasks could run; see above")
    )
    assert sum(line.startswith("- ") for line in out) == 5 and not Path("runs").exists()


def test_training_on_fgvc_crops(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "data/fgvc/cub/images").mkdir(parents=True)
    for part, count in (("train", 40), ("val", 10), ("test", 10)):
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
            coarse.resize((40, 30)).save(tmp_path / f"data/fgvc/cub/images/{part}{i}.png")
        listing = {f"{part}{i}.png": i % 4 + 1 for i in range(count)}
        (tmp_path / f"data/fgvc/cub/{part}.json").write_text(json.dumps(listing))
    arguments = [
        "--dataset",
        "cub",
        "--model",
        "vit_nano",
        "--drop-path",
        0,
        "--method",
        "linear",
        "--batch-size",
        8,
    ]
    held = run(*arguments)
    assert (
        held["data"]
        == "lists of VPT, PNG images, 50 of 5994 train (subset) / 10 of 5794 test (subset)"
    )
    assert (
        held["benchmark"] == "not fgvc"
        and (tmp_path / "data/cache/cub-lists-trainval-14.safetensors").exists()
    )
    again = run(*arguments, "--out", "again", "--workers", 0)
    assert again["test_loss"] == held["test_loss"]
    assert [row["loss"] for row in log(again)] == [row["loss"] for row in log(held)]


def write_run(root, task, seed, top1, benchmark="vtab-1k", val=False, **arguments):
    folder = Path(
        root, task, f"{seed}-{val}-{'-'.join(map(str, arguments.values())).replace('/', '')}"
    )
    folder.mkdir(parents=True)
    arguments = {"method": "mlae", "dataset": task, "seed": seed, "val": val, "rank": 8} | arguments
    (folder / "config.json").write_text(json.dumps({"arguments": arguments}))
    split = "val" if val else "test"
    metrics = {
        "dataset": task,
        "seed": seed,
        f"{split}_top1": top1,
        "benchmark": benchmark,
        "data": "originals",
    }
    metrics["model"] = "vit"
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def all_runs(tmp_path):
    """19 tasks x 2 seeds of one configuration, 5 x 1 of FGVC, three of another configuration."""
    scores = {}
    for i, task in enumerate(
        task for task in data.TASKS.values() if task.benchmark in ("vtab-1k", "fgvc")
    ):
        for seed in (0, 1) if task.benchmark == "vtab-1k" else (0,):
            scores[task.name, seed] = 50 + 2 * i + 3 * seed * (i % 3)
            write_run(tmp_path / "runs", task.name, seed, scores[task.name, seed], task.benchmark)
    for seed in range(3):
        write_run(tmp_path / "runs", "dtd", seed, 70 + seed, rank=4)
    write_run(tmp_path / "runs", "dtd", 0, 66.0, val=True)
    return tmp_path / "runs", scores


def test_the_table_of_all_runs(all_runs, capsys):
    folder, scores = all_runs
    code, out, err = tabulated(capsys, folder)
    rows = table(out[: out.index("| fgvc, ")])
    groups = {}
    for task in data.TASKS.values():
        if task.benchmark == "vtab-1k":
            groups.setdefault(task.group, []).append([scores[task.name, seed] for seed in (0, 1)])
    means = {group: np.mean(values, 0) for group, values in groups.items()}  # (2,) over seeds
    means["mean of groups"] = np.mean(list(means.values()), 0)
    means["mean of tasks"] = np.mean([value for values in groups.values() for value in values], 0)
    for name, values in means.items():
        assert rows[name][0] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (2)"
    assert rows["vtab-1k, test top-1 (%)"][:2] == ["mlae rank=8", "mlae rank=4"]
    assert (
        rows["caltech101"][1] == "-"
        and rows["dtd"][1] == "71.00 ± 1.00 (3)"
        and "vtab-1k, val top-1" in out
    )
    sets = [value for (task, _), value in scores.items() if data.TASKS[task].benchmark == "fgvc"]
    fgvc = table(out[out.index("| fgvc, ") : out.index("| vtab-1k, val")]) | table(
        out[out.index("| published") :]
    )
    assert len(sets) == 5 and fgvc["cub"][0] == f"{sets[0]:.2f} (1)"
    assert fgvc["mean of tasks"][0] == f"{np.mean(sets):.2f} (1)"
    assert (
        out.count("PARTIAL") == 2
        and "PARTIAL, no vtab-1k result: mlae rank=4 has 1 of 19 tasks" in out
    )
    assert "best epoch on the test set" in fgvc["LoRA, r = 8 (from NOAH)"]


def tabulated(capsys, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        evaluation.main()
    captured = capsys.readouterr()
    return 0, captured.out, captured.err


def test_the_tables_formats_agree(all_runs, capsys):
    folder, _ = all_runs
    rows = json.loads(tabulated(capsys, folder, "--format", "json")[1])
    lines = list(csv.DictReader(tabulated(capsys, folder, "--format", "csv")[1].splitlines()))
    assert len(rows["published"]) == 5 and len(lines) == len(rows["runs"]) + 12
    for line, row in zip(lines, rows["runs"], strict=False):
        assert {key: "" if value is None else str(value) for key, value in row.items()} == line
    latex = tabulated(capsys, folder, "--format", "latex")[1]
    assert (
        latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 4
        and r"smallnorb\_ele & " in latex
    )
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    columns = [
        line.count("r") - 2 for line in latex.splitlines() if line.startswith(r"\begin{tabular}{")
    ]
    assert all(line.count("&") - line.count(r"\&") > 1 for line in body) and columns


def test_a_subset_is_marked_and_left_out_of_means(all_runs, capsys):
    folder, _ = all_runs
    write_run(folder.parent / "subset", "dtd", 0, 99.0, "not vtab-1k")
    write_run(folder.parent / "subset", "svhn", 0, 40.0)
    rows = table(tabulated(capsys, folder.parent / "subset")[1])
    assert rows["dtd"][0] == "99.00 (1) *" and rows["natural"][0] == "40.00 (1) [1 of 7 tasks]"


def test_seeds_that_differ_make_no_result(all_runs, capsys):
    folder, _ = all_runs
    next(folder.glob("dtd/1-False-")).rename(folder.parent / "aside")
    out = tabulated(capsys, folder)[1]
    assert "mlae rank=8 has 19 of 19 tasks with official data, of unequal seeds" in out
    rows = {
        row["task"]: row
        for row in json.loads(tabulated(capsys, folder, "--format", "json")[1])["runs"][:24]
    }
    assert (
        not rows["natural"]["official"]
        and rows["natural"]["std"] is None
        and rows["structured"]["official"]
    )
    assert not rows["mean of groups"]["official"] and rows["natural"]["seeds"] == 1


def test_the_same_weights_from_two_places_are_one_configuration(tmp_path, capsys):
    for seed, (checkpoint, source) in enumerate([("/a/x.npz", "auto"), ("/b/x.npz", "prepared")]):
        write_run(
            tmp_path / "runs", "svhn", seed, 70.0 + seed, checkpoint=checkpoint, source=source
        )
    assert table(tabulated(capsys, tmp_path / "runs")[1])["svhn"][0] == "70.50 ± 0.71 (2)"


def test_tables_of_nothing_or_of_damaged_runs(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    code, _, err = score_again(capsys, tmp_path / "runs")
    assert code == 2 and err.count("\n") == 1 and "there is no finished run in" in err
    write_run(tmp_path / "runs", "dtd", 0, 70.0)
    next((tmp_path / "runs").rglob("metrics.json")).write_text("{")
    code, _, err = score_again(capsys, tmp_path / "runs")
    assert code == 2 and err.count("\n") == 2 and "is damaged and left out" in err
    write_run(tmp_path / "runs", "svhn", 0, 60.0)
    _, out, err = tabulated(capsys, tmp_path / "runs")
    assert table(out)["svhn"][0] == "60.00 (1)" and err.count("\n") == 1
