"""train.py as a user runs it, on the embedded demo and a small prepared folder."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log, stop_after, write_lists
from PIL import Image
from safetensors.torch import load_file, save_file

import backbone
import baselines
import data
import eval as evaluation
import mlae
import model as models
import train

ROOT = Path(train.__file__).parent


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


@pytest.mark.parametrize(("at", "amp"), [(1, "off"), (3, "off"), (1, "fp16")])
def test_resume_goes_on_as_if_nothing_had_happened(run, monkeypatch, at, amp):
    epochs = 2 if amp == "fp16" else 3  # slow on a CPU
    arguments = ["--epochs", epochs, "--drop-path", 0.1, "--mask-schedule", "increase"]
    arguments += ["--amp", amp]
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
    arguments = ["--epochs", 3, "--img-size", 28, "--mask-prob", 0.3]
    folded = run("--out", "folded", *arguments)

    def two_branch(self, x):
        h = torch.nn.functional.linear(x, self.lora_A) * self.coefficients()
        return torch.nn.functional.linear(x, self.weight, self.bias) + h @ self.lora_B.T

    monkeypatch.setattr(mlae.MLAELinear, "forward", two_branch)
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
        backbone.timm.models.vision_transformer.VisionTransformer, "set_grad_checkpointing"
    )
    with pytest.raises(SystemExit) as stop:
        run("--grad-checkpoint")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--grad-checkpoint: vit_nano cannot do that" in err


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
    dtypes, head = set(), torch.nn.Linear.forward

    def forward(self, x):
        y = head(self, x)
        if (
            not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        ):  # not the probe of `inject`
            dtypes.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
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
    metrics = run("--compile", "--epochs", 2, "--mask-schedule", "increase")
    newest = tuple(map(int, torch.__version__.split(".")[:2])) >= (
        2,
        15,
    )  # torch 2.6 looks at a first p of 0 again
    assert len(frames) == 2 * 16 and len(set(frames)) <= (1 if newest else 2) and frames[0] > 0
    assert [row["mask_prob"] for row in log(metrics)] == ["0.25", "0.5"]


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
    assert {row["mask_prob"] for row in log(fixed)} == {"0"}
    mixed = run(
        "--masking", "mixed", "--mask-schedule", "decrease", "--rank", 2, "--normalize", "model"
    )
    assert [row["mask_prob"] for row in log(mixed)] == ["0.25", "0"]
    assert len({m["run"] for m in (head, fixed, mixed)}) == 3


def test_frozen_batch_norms_keep_their_statistics(run, capsys):
    metrics = run(
        "--model",
        "resnet18",
        "--no-pretrained",
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


def test_what_trains_is_printed(run, capsys):
    train.main(["--device", "cpu", "--epochs", "1"])
    count = 6 * 8 * (96 + 288 + 1) + 970
    text = f"{count:,} of {688_138 + count - 970:,} parameters train, 970 in the head"
    assert f"6 of 24 linear layers adapted; {text}" in capsys.readouterr().out


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
        (["--dataset", "sun397"], "or unpack a prepared archive (Google Drive"),
        (
            ["--dataset", "dtd", "--source", "prepared"],
            "/data/vtab-1k/dtd: unpack a prepared archive",
        ),
        (
            ["--dataset", "sun397", "--source", "original"],
            "/data/SUN397: get it by hand from https://vision.princeton.edu",
        ),
        (["--source", "tfds"], "argument --source: invalid choice: 'tfds'"),
        (["--dataset", "cub"], "/data/fgvc/cub: put the images of CUB-200-2011 into"),
        (["--accumulate", "0"], "argument --accumulate: must be 1 or more, not 0"),
        (["--workers", "-1"], "argument --workers: must be from 0 to"),
        (["--model", "vit_nanoo"], "timm has no model 'vit_nanoo'"),
        (["--checkpoint", "absent.pth"], "no checkpoint file "),
        (["--warmup-epochs", "2"], "--warmup-epochs 2 must be from 0 to below --epochs 2"),
        (
            ["--mask-schedule", "increase", "--masking", "fixed"],
            "schedule increase needs masking stochastic or mixed",
        ),
        (
            ["--mask-pattern", "hourglass", "--mask-prob", "0.8"],
            "hourglass over 6 layers reaches a mean of 0.66, not 0.8",
        ),
        (["--img-size", "30"], "img_size 30 is not a multiple of vit_nano's patch size 7"),
        (
            ["--model", "vit_tiny_patch16_224.nonsense"],
            "timm has no weights 'vit_tiny_patch16_224.nonsense'; there are: ",
        ),
        (["--lr", "inf"], "argument --lr: must be above 0, not inf"),
        (["--seed", "-1"], "argument --seed: must be from 0 to"),
        (["--out", "/dev/null/runs"], "--out: cannot write /dev/null/runs"),
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


def test_a_damaged_test_image_costs_no_training(run, cifar, capsys, monkeypatch):
    whole = (cifar / "images/3.png").read_bytes()
    listed = (cifar / "test.txt").read_text()
    (cifar / "test.txt").write_text(listed.replace("images/100/3.png", "images/other.png"))
    (cifar / "images/other.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    arguments = ["--dataset", "cifar", "--model", "vit_nano"]
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "other.png" in captured.err and captured.err.count("\n") == 1
    (folder,) = Path("runs/cifar").iterdir()
    assert {"state.pt", "adapter.safetensors"} <= {file.name for file in folder.iterdir()}
    (cifar / "images/other.png").write_bytes(whole)
    monkeypatch.setattr(train, "train_step", None)  # nothing trains again
    assert "test_top1" in run(*arguments, "--resume")


def test_val_never_opens_the_test_list(run, cifar):
    (cifar / "test.txt").unlink()
    assert "val_top1" in run("--dataset", "cifar", "--model", "vit_nano", "--val")


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
    assert "PNG images, 1000 train / 40 of 10000" in run(*arguments)["data"]


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
    weights = load_file(backbone.NANO_FILE)
    for name, shift in (("a", 0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        save_file({k: v + shift for k, v in weights.items()}, tmp_path / name / "model.safetensors")
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
        and err.endswith("error: the loss is nan in epoch 1: lower --lr 1e+30\n")
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
    scripts = {"train.py": "--mask-prob", "suite.py": "--mask-prob", "data.py": "--data-dir"}
    for script, flag in scripts.items():  # it answers at once: nothing slow is imported
        command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert answer.returncode == 0 and flag in answer.stdout
        assert "torch" not in answer.stderr and "timm" not in answer.stderr
        assert "numpy" not in answer.stderr


def test_the_same_command_again_loses_nothing(run, monkeypatch, capsys):
    first = run()
    with monkeypatch.context() as patch:
        patch.setattr(train, "create_model", None)  # nothing trains again
        assert run() == first
        train.main(["--epochs", "2", "--img-size", "14", "--device", "cpu"])
        assert capsys.readouterr().out.startswith("finished before (--overwrite runs it")
    (Path(first["run"]) / "metrics.json").write_text("{}")  # whoever reads it runs again
    assert run("--overwrite")["test_loss"] == first["test_loss"]
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit) as stop:
        run("--seed", 1)
    [folder] = Path("runs/digits").glob("*seed1*")
    state = (folder / "state.pt").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("--seed", 1)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "was interrupted: --resume goes on, --overwrite starts anew" in err
    assert (folder / "state.pt").read_bytes() == state
    assert run("--seed", 1, "--overwrite")["test_loss"] == pytest.approx(
        run("--seed", 1, "--out", "elsewhere")["test_loss"]
    )


def test_what_looks_like_success_and_is_not_is_said(run, capsys, tmp_path):
    run("--resume", "--data-dir", tmp_path / "photos", "--lr", 1e-9)
    train.main(["--epochs", "2", "--img-size", "14", "--resume", "--lr", "1e-9", "--seed", "1"])
    out, err = capsys.readouterr()
    assert "nothing to resume in runs/digits/mlae" in out
    assert "warning: hardly anything was learned (training top-1 is " in err
    assert "--data-dir" not in err
    train.main(["--epochs", "2", "--img-size", "14", "--data-dir", "photos"])
    out, err = capsys.readouterr()
    assert "note: --dataset digits is in this repository, --data-dir is not read" in err
    assert "warning" not in err
    lines = out.splitlines()  # without a terminal: a line an epoch, then one for people, then JSON
    assert [line.split(":")[0] for line in lines[2:4]] == ["epoch 1", "epoch 2"]
    assert re.fullmatch(r"test top-1 \d+\.\d\d % \(797 images\), run runs/digits/\S+", lines[-2])


class Scale(torch.nn.Linear):
    """A toy method: the frozen layer's output times a learned scale for each feature."""

    def __init__(self, linear, start):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = torch.nn.Parameter(torch.full((linear.out_features,), start))
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)

    @classmethod
    def from_linear(cls, linear, start):
        return cls(linear, start)

    def forward(self, x):
        return super().forward(x) * self.scale

    def to_linear(self):
        linear = torch.nn.Linear(self.in_features, self.out_features)
        linear.weight.data = self.weight * self.scale[:, None]
        linear.bias.data = self.bias * self.scale
        return linear


def test_frozen_and_unmasked_mlae_is_lora_step_by_step(run, monkeypatch):
    losses, step = {}, train.train_step
    for method in ("mlae", "lora"):
        seen = losses[method] = []

        def noted(*arguments, seen=seen, **options):
            loss, correct = step(*arguments, **options)
            seen.append(loss.item())
            return loss, correct

        monkeypatch.setattr(train, "train_step", noted)
        words = ["--coef-init", 2.0, "--rank", 4, "--drop-path", 0.1]
        if method == "mlae":
            words += ["--mask-prob", 0, "--freeze-lambda"]
        metrics = run("--method", method, *words)
        assert metrics["trainable_parameters"] == 6 * 4 * (96 + 288) + 970
    assert losses["mlae"] == losses["lora"] and len(losses["lora"]) == 32


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_lambda_has_its_own_learning_rate(run, monkeypatch, factor):
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *arguments, **options):
        for group in self.param_groups:
            for parameter in group["params"]:
                is_lambda = parameter.shape == (7,)
                rates.append((is_lambda, group["lr"]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run("--rank", 7, "--lambda-lr", factor, "--epochs", 1)
    peak = max(lr for is_lambda, lr in rates if not is_lambda)
    assert {is_lambda for is_lambda, _ in rates} == {True, False} and peak == pytest.approx(8e-3)
    assert max(lr for is_lambda, lr in rates if is_lambda) == pytest.approx(factor * peak)


def test_a_method_is_one_more_row(run, monkeypatch):
    """What a reader touches to add a method: METHODS. Saving, scoring and merging follow."""
    toy = baselines.Method(trains="a toy", layer=Scale, settings={"start": 1.0})
    monkeypatch.setitem(baselines.METHODS, "toy", toy)
    metrics = run("--method", "toy", "--targets", "mlp.fc1", "--lr", 0.01)
    assert metrics["trainable_parameters"] == 6 * 4 * 96 + 970
    state = load_file(Path(metrics["run"], "adapter.safetensors"))
    assert {key.rpartition(".")[2] for key in state} == {"scale", "weight", "bias"}
    assert (state["blocks.0.mlp.fc1.scale"] != 1).all()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([metrics["run"], "--device", "cpu"])
    assert stop.value.code == 0  # merged, it agrees


def test_a_term_of_the_loss_is_one_hook(run, monkeypatch):
    """What a reader touches to add a term to the loss: `penalty` of a row."""
    rows, progress = {}, []
    for weight in (0.0, 100.0):

        def penalty(model, weight=weight):
            return weight * sum(
                layer.lora_B.square().sum() for layer in baselines.mlae_layers(model).values()
            )

        def before_step(model, share):
            progress.append((share, model.head.weight.grad is not None))

        changes = {"penalty": penalty, "before_step": before_step}
        row = dataclasses.replace(baselines.METHODS["lora"], **changes)
        monkeypatch.setitem(baselines.METHODS, "lora", row)
        metrics = run("--method", "lora", "--out", weight)
        rows[weight] = load_file(Path(metrics["run"], "adapter.safetensors"))
    size = {weight: state["blocks.0.attn.qkv.lora_B"].norm() for weight, state in rows.items()}
    assert size[100.0] < 0.5 * size[0.0]
    one_run = progress[: len(progress) // 2]
    assert one_run == [(i / 32, i > 0) for i in range(33)]  # 1000 images, 16 steps, 2 epochs


def test_parts_of_a_batch_bring_the_penalty_once():
    weight = torch.nn.Parameter(torch.tensor(2.0))
    method = baselines.Method(trains="", penalty=lambda net: weight**2)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD([weight, *net.parameters()], lr=0.0)
    for accumulate in (1, 3):
        train.train_step(
            net,
            optimizer,
            torch.randn(6, 3),
            torch.zeros(6, dtype=torch.long),
            model=net,
            size=6,
            normalize=lambda x: x,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            amp="off",
            accumulate=accumulate,
            label_smoothing=0.0,
            method=method,
            progress=0.5,
        )
        assert weight.grad.item() == pytest.approx(4.0)


def test_demo_beats_the_linear_probe(run):
    """The README's claim with fewer epochs: the method shows."""
    mlae, linear = (
        run("--epochs", 6, "--img-size", 28, "--method", method) for method in ("mlae", "linear")
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
        held["official"] is False
        and (tmp_path / "data/cache/cub-lists-trainval-14.safetensors").exists()
    )
    again = run(*arguments, "--out", "again", "--workers", 0)
    assert again["test_loss"] == held["test_loss"]
    assert [row["loss"] for row in log(again)] == [row["loss"] for row in log(held)]
