"""train.py as a user runs it, on the embedded demo and a small prepared folder."""

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import log, stop_after, write_lists
from safetensors.torch import load_file, save_file
from test_runs import end_of, fork, largest_file

import data
import eval as evaluation
import methods
import model as models
import train

FILES = {"config.json", "log.csv", "metrics.json", "adapter.safetensors"}
QUICK = ["--device", "cpu", "--epochs", "2", "--img-size", "14"]
STEPS = 3  # of an epoch of 129 images in batches of 64


@pytest.fixture(autouse=True)
def few(request, monkeypatch, tmp_path):
    """Another working directory; the demo has 129 images to train on and 100 to score."""
    monkeypatch.chdir(tmp_path)
    load = data.load

    def fewer(name, *arguments, **options):
        found = load(name, *arguments, **options)
        if name != "digits":
            return found
        for images, count in zip(found, (129, 100), strict=True):
            images.items = images.files = images.items[:count]
            images.labels = images.labels[:count]
        return found

    monkeypatch.setattr(data, "load", fewer)


def refused(capsys, *words):
    """Runs train.py, which must end in exit code 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*QUICK, *map(str, words)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.strip().isprintable(), err
    return err


def weights_of(metrics):
    return load_file(Path(metrics["run"], "adapter.safetensors"))


def assert_same_run(one, two):
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for a, b in zip(log(one), log(two), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    assert one["test_loss"] == two["test_loss"]


def losses(metrics):
    return [float(row["loss"]) for row in log(metrics)]


# --- a run and its files --------------------------------------------------------------------------


def test_a_run_and_all_its_files(run):
    metrics = run("--mask-prob", 0.3)
    folder = Path(metrics["run"])
    assert {f.name for f in folder.iterdir()} == FILES
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert folder.parent == Path("runs/digits") and metrics["head_parameters"] == 97 * 10
    assert metrics["trainable_parameters"] == 6 * 8 * (96 + 288 + 1) + 970
    assert (metrics["method"], metrics["dataset"], metrics["seed"]) == ("mlae", "digits", 0)
    assert 15 < metrics["test_top1"] <= 100 and metrics["train_seconds"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["mask_prob"] == 0.3
    assert config["versions"]["torch"] == torch.__version__
    assert config["weights"]["tag"] == "vit_nano:vit_nano.safetensors"
    assert len(config["weights"]["sha256"]) == 64
    rows = log(metrics)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {row["mask_prob"] for row in rows} == {"0.3"}
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])


def test_the_score_is_that_of_the_saved_adapter_by_hand(run):
    metrics = run()
    net = models.create("vit_nano", 10, img_size=14).eval()
    models.load_adapter(net, Path(metrics["run"], "adapter.safetensors"))
    images, labels = next(data.load("digits", img_size=14)[1].batches(100, 0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = net((images / 255 - mean[:, None, None]) / std[:, None, None])
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert metrics["test_top1"] == pytest.approx(top1, abs=0.01)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics["test_loss"] == pytest.approx(loss, abs=1e-4)


def test_same_seed_same_result_and_another_seed_another(run):
    first, again = run("--out", "a"), run("--out", "b", "--workers", 1)
    other = run("--out", "a", "--seed", 1)
    assert_same_run(first, again)
    assert not torch.equal(weights_of(first)["head.weight"], weights_of(other)["head.weight"])
    assert first["run"] != other["run"] and Path(first["run"]).name == Path(again["run"]).name


def test_learning_rates_are_the_formula(run):
    # 12 steps, of which 3 are a linear warm-up, then half a cosine over 9
    want = [1e-3 * (i + 1) / 3 for i in range(3)]
    want += [1e-3 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    got = [train.learning_rate(i, 12, 3, 1e-3) for i in range(12)]
    assert got == pytest.approx(want, rel=1e-12)
    rows = log(run("--epochs", 4, "--lr", 1e-3, "--warmup-epochs", 1))
    assert [float(row["lr"]) for row in rows] == pytest.approx(want[2::3], rel=1e-6)


def test_what_looks_like_success_and_is_not_is_said(run, capsys):
    train.main([*QUICK, "--resume", "--lr", "1e-9", "--data-dir", "photos"])
    out, err = capsys.readouterr()
    assert "nothing to resume" in out and "epoch 2:" in out
    assert "hardly anything was learned" in err and "--data-dir" in err


# --- what trains ----------------------------------------------------------------------------------


def test_recomputed_blocks_give_the_same_training(run):
    plain = run("--out", "plain", "--drop-path", 0.1)
    again = run("--out", "again", "--drop-path", 0.1, "--grad-checkpoint")
    assert again["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-5)


def test_accumulation_gives_the_gradient_of_the_whole_batch(run):
    whole, parts = (run("--mask-prob", 0, "--accumulate", n, "--batch-size", 50) for n in (1, 3))
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-3) and whole["run"] != parts["run"]
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=5e-3)
    masked = run("--accumulate", 2)  # a mask for each part
    assert masked["test_loss"] != run()["test_loss"]


def test_parts_of_a_batch_bring_the_penalty_once(run, monkeypatch):
    gradients = []
    for parts in (1, 3):

        def penalty(model):
            return 1e6 * model.head.bias.sum()  # beside it the images' gradient is nothing

        def before_step(model, progress):
            if model.head.bias.grad is not None:
                gradients.append(model.head.bias.grad.mean().item())

        changes = {"penalty": penalty, "before_step": before_step}
        row = dataclasses.replace(methods.METHODS["lora"], **changes)
        monkeypatch.setitem(methods.METHODS, "lora", row)
        run("--method", "lora", "--accumulate", parts, "--epochs", 1)
    assert gradients == pytest.approx([1e6] * 2 * STEPS, rel=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(run, monkeypatch, amp):
    dtypes, head = set(), torch.nn.Linear.forward

    def forward(self, x):
        y = head(self, x)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            dtypes.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    mixed = run("--amp", amp)
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert json.loads(Path(mixed["run"], "config.json").read_text())["amp"] == amp
    exact = run("--amp", "off")
    assert mixed["test_loss"] == pytest.approx(exact["test_loss"], rel=0.05)


def test_no_compilation_after_the_first_steps(run, monkeypatch):
    """Neither for another p, nor for the short last batch, nor in the next epochs."""
    from torch._dynamo.utils import counters

    compile_it, step, frames = torch.compile, torch.optim.AdamW.step, []

    def eager(model, **options):
        return compile_it(model, backend="eager", **options)

    def noted(self, *arguments, **options):
        frames.append(counters["frames"]["total"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    metrics = run("--compile", "--mask-schedule", "increase")
    # torch 2.6 looks at a first p of 0 again
    assert len(frames) == 2 * STEPS and frames[0] > 0 and len(set(frames)) <= 2
    assert [row["mask_prob"] for row in log(metrics)] == ["0.25", "0.5"]


def test_every_method_and_masking(run):
    head = run("--method", "linear", "--val")
    assert head["trainable_parameters"] == head["head_parameters"] == 970
    assert "val_top1" in head and "test_top1" not in head
    full = run("--method", "full", "--epochs", 1)
    assert full["trainable_parameters"] == 688_138 - 12 * 96  # 12 positions fewer
    assert run("--method", "lora")["trainable_parameters"] == 6 * 8 * (96 + 288) + 970
    words = ["--mask-pattern", "incremental", "--targets", "attn.proj", "mlp.fc2"]
    fixed = run("--masking", "fixed", *words)
    assert {row["mask_prob"] for row in log(fixed)} == {"0"}
    words = ["--mask-schedule", "decrease", "--rank", 2, "--normalize", "model"]
    mixed = run("--masking", "mixed", *words)
    assert [row["mask_prob"] for row in log(mixed)] == ["0.25", "0"]
    assert len({m["run"] for m in (head, full, fixed, mixed)}) == 4


def test_frozen_batch_norms_keep_their_statistics(run):
    words = ["--no-pretrained", "--method", "linear", "--epochs", 1, "--img-size", 16]
    metrics = run("--model", "resnet18", *words)
    torch.manual_seed(0)
    net = models.create("resnet18", 10, pretrained=False, method="linear").eval()
    models.load_adapter(net, Path(metrics["run"], "adapter.safetensors"))
    images = data.load("digits", img_size=16)[1]
    again = evaluation.evaluate(net, images, data.normalizer(*data.NORMALIZE["imagenet"], "cpu"))
    assert (again["top1"], again["loss"]) == (metrics["test_top1"], metrics["test_loss"])


def test_frozen_and_unmasked_mlae_is_lora_step_by_step(run, monkeypatch):
    words = ["--coef-init", 2.0, "--rank", 4, "--drop-path", 0.1]
    plain = ["--mask-prob", 0, "--freeze-lambda"]
    one, two = run("--method", "lora", *words), run("--method", "mlae", *words, *plain)
    assert one["trainable_parameters"] == 6 * 4 * (96 + 288) + 970
    assert losses(one) == losses(two)
    first, second = weights_of(one), weights_of(two)
    assert all(torch.equal(first[key], second[key]) for key in first)
    lambdas = [value for key, value in first.items() if key.endswith("lora_lambda")]
    assert len(lambdas) == 6 and all((value == 2).all() for value in lambdas)


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_lambda_has_its_own_learning_rate(run, monkeypatch, factor):
    rates, step = {True: [], False: []}, torch.optim.AdamW.step

    def noted(self, *arguments, **options):
        for group in self.param_groups:
            for parameter in group["params"]:
                rates[parameter.shape == (7,)].append(group["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run("--rank", 7, "--lambda-lr", factor, "--epochs", 1)
    assert max(rates[False]) == pytest.approx(8e-3)
    assert max(rates[True]) == pytest.approx(factor * 8e-3)


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


def test_a_method_is_one_more_row(run, monkeypatch):
    """What a reader touches to add a method: METHODS. Saving, scoring and merging follow."""
    toy = methods.Method(trains="a toy", layer=Scale, settings={"start": 1.0})
    monkeypatch.setitem(methods.METHODS, "toy", toy)
    metrics = run("--method", "toy", "--targets", "mlp.fc1", "--lr", 0.01)
    assert metrics["trainable_parameters"] == 6 * 4 * 96 + 970
    state = weights_of(metrics)
    assert {key.rpartition(".")[2] for key in state} == {"scale", "weight", "bias"}
    assert (state["blocks.0.mlp.fc1.scale"] != 1).all()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([metrics["run"], "--device", "cpu"])
    assert stop.value.code == 0  # merged, it agrees


def test_hooks_are_called_at_their_time(run, monkeypatch):
    calls = []

    def before_step(model, progress):
        calls.append((progress, model.head.weight.grad is not None))

    changes = {"before_step": before_step, "after_epoch": lambda model: {"mine": 7.0}}
    row = dataclasses.replace(methods.METHODS["lora"], **changes)
    monkeypatch.setitem(methods.METHODS, "lora", row)
    metrics = run("--method", "lora")
    steps = 2 * STEPS
    assert calls == [(i / steps, i > 0) for i in range(steps + 1)]
    assert [row["mine"] for row in log(metrics)] == ["7", "7"]


# --- the data -------------------------------------------------------------------------------------


def test_a_vtab_task_from_its_prepared_folder(run, cifar):
    metrics = run("--dataset", "cifar100", "--model", "vit_nano", "--epochs", 1)
    assert metrics["dataset"] == "cifar" and not metrics["official"]
    assert metrics["images"] == 30 and metrics["head_parameters"] == 97 * 100
    (cifar / "test.txt").unlink()  # which --val never opens
    assert "val_top1" in run("--dataset", "cifar", "--model", "vit_nano", "--epochs", 1, "--val")


def test_a_damaged_test_image_costs_no_training(run, cifar, capsys, monkeypatch):
    whole = (cifar / "images/3.png").read_bytes()
    listed = (cifar / "test.txt").read_text()
    (cifar / "test.txt").write_text(listed.replace("images/100/3.png", "images/other.png"))
    (cifar / "images/other.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    words = ["--dataset", "cifar", "--model", "vit_nano", "--workers", 0]
    assert "other.png" in refused(capsys, *words)
    (folder,) = Path("runs/cifar").iterdir()
    assert {"state.pt", "adapter.safetensors"} <= {file.name for file in folder.iterdir()}
    (cifar / "images/other.png").write_bytes(whole)
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # nothing trains again
    assert "test_top1" in run(*words, "--resume")


def test_resume_only_on_the_same_images(run, cifar, monkeypatch):
    words = ["--dataset", "cifar", "--model", "vit_nano", "--workers", 0]
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run(*words, "--resume")
    lines = (cifar / "train800val200.txt").read_text().splitlines()
    lines[:2] = [line[:-2] + " 5" for line in lines[:2]]
    (cifar / "train800val200.txt").write_text("\n".join(lines))
    assert_same_run(run(*words, "--resume"), run(*words, "--out", "fresh"))
    write_lists(cifar, 40, 7)  # the subset grows: its result is no longer this one
    assert run(*words, "--resume")["images"] == 40


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset cifra", "'cifar'"),
        ("--dataset sun397", "SUN397"),
        ("--targets attn.qvk", "attn.qkv (6)"),
        ("--model vit_nanoo", "vit_nanoo"),
        ("--model two\nlines\x1b[2J", "two"),
        ("--checkpoint absent.pth", "absent.pth"),
        ("--checkpoint " + __file__, "test_train.py"),
        ("--mask-schedule increase --masking fixed", "increase"),
        ("--mask-pattern hourglass --mask-prob 0.8", "hourglass"),
        ("--img-size 30", "30"),
        ("--rank 97", "rank"),  # vit_nano's layers have 96 inputs
        ("--coef-init 1e39", "coef"),
        ("--out /dev/null/runs", "--out"),
    ],
    ids=lambda value: ascii(value)[:40].replace(str(Path(__file__).parent), ""),
)
def test_wrong_arguments_are_one_line_before_anything_is_written(capsys, tmp_path, words, message):
    assert message in refused(capsys, *words.split(" "))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_an_error(capsys):
    assert "--lr" in refused(capsys, "--lr", 1e30)
    (folder,) = Path("runs/digits").iterdir()
    assert not (folder / "metrics.json").exists()


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        run()


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def large(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", large)
    assert "--grad-checkpoint" in refused(capsys)


@pytest.mark.parametrize("size", [500, 50_000])
def test_a_full_disk_keeps_the_last_weights(run, capsys, size):
    folder = Path(run("--epochs", 1)["run"])
    before = (folder / "adapter.safetensors").read_bytes()
    with largest_file(size):
        assert "--out" in refused(capsys, "--epochs", 1, "--overwrite")
    assert (folder / "adapter.safetensors").read_bytes() == before
    assert json.loads((folder / "config.json").read_text())["arguments"]["epochs"] == 1
    assert not list(folder.glob("*.tmp"))


# --- again, and going on --------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "amp"), [(1, "off"), (2, "off"), (1, "fp16")])
def test_resume_goes_on_as_if_nothing_had_happened(run, monkeypatch, at, amp):
    words = ["--epochs", 3, "--drop-path", 0.1, "--mask-schedule", "increase", "--amp", amp]
    whole = run("--out", "whole", *words)
    stop_after(monkeypatch, at)
    with pytest.raises(SystemExit) as stop:
        run("--out", "parts", *words)
    assert stop.value.code == 130
    torch.manual_seed(123)
    resumed = run("--out", "parts", *words, "--resume")
    assert_same_run(whole, resumed)
    assert run("--out", "parts", *words, "--resume") == resumed  # finished: nothing runs again


def test_the_same_command_again_loses_nothing(run, monkeypatch, capsys):
    first = run()
    with monkeypatch.context() as patch:
        patch.setattr(models, "create_model", None)  # nothing trains again
        assert run() == first
    (Path(first["run"]) / "metrics.json").write_text("{}")  # whoever reads it runs again
    assert run("--overwrite")["test_loss"] == first["test_loss"]
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run("--seed", 1)
    (folder,) = Path("runs/digits").glob("*seed1*")
    state = (folder / "state.pt").read_bytes()
    assert "--resume" in refused(capsys, "--seed", 1)
    assert (folder / "state.pt").read_bytes() == state
    again, fresh = run("--seed", 1, "--overwrite"), run("--seed", 1, "--out", "elsewhere")
    assert_same_run(again, fresh)


def test_a_result_of_other_defaults_is_not_taken_for_this_run(run, capsys):
    path = Path(run()["run"], "config.json")
    config = json.loads(path.read_text())
    config["arguments"] |= {"out": "elsewhere", "lr": 2e-3}
    path.write_text(json.dumps(config))
    assert "--lr 0.002" in refused(capsys)


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_a_damaged_result_is_made_again(run, name):
    whole = run()
    Path(whole["run"], name).write_text("{")
    assert run("--resume")["test_loss"] == whole["test_loss"]


def replaced(key, value):
    def edit(path):
        state = torch.load(path)
        state[key] = value
        torch.save(state, path)

    return edit


def with_moments(change):
    def edit(path):
        state = torch.load(path)
        moments = state["optimizer"]["state"]
        moments[0]["exp_avg"] = change(moments[0]["exp_avg"])
        torch.save(state, path)

    return edit


STATES = {
    "moments of another shape": with_moments(lambda mean: torch.zeros(3)),
    "moments that are not finite": with_moments(lambda mean: mean * float("nan")),
    "no moments": replaced("optimizer", {"state": {}}),
    "no row for an epoch": replaced("progress", {"epoch": 1, "rows": [], "seconds": 1.0}),
    "rows of text": replaced("progress", {"epoch": 1, "rows": ["x"], "seconds": 1.0}),
    "text": lambda path: path.write_bytes(b"text"),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "no weights": replaced("weights", {}),
    "random numbers": replaced("rng", {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}),
    "program": replaced("progress", Path("a class that is not loaded")),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_damaged_state_is_refused(run, capsys, monkeypatch, kind):
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run()
    (folder,) = Path("runs/digits").iterdir()
    STATES[kind](folder / "state.pt")
    assert "state.pt" in refused(capsys, "--resume")


def test_resume_takes_only_the_same_checkpoint(run):
    weights = load_file(models.NANO_FILE)
    for name, shift in (("a", 0), ("b", 0.1)):
        moved = {key: value + shift for key, value in weights.items()}
        save_file(moved, f"{name}.safetensors")
    first = run("--checkpoint", "a.safetensors")
    shutil.copy("a.safetensors", "c.safetensors")
    assert run("--checkpoint", "c.safetensors")["run"] == first["run"]
    other = run("--checkpoint", "b.safetensors", "--resume")
    assert first["run"] != other["run"] and first["test_loss"] != other["test_loss"]


# --- other processes ------------------------------------------------------------------------------


def train_with(*words):
    return lambda: train.main([*QUICK, *map(str, words)])


def result_in(out):
    (file,) = Path(str(out)).glob("digits/*/metrics.json")
    return json.loads(file.read_text()) | {"run": str(file.parent)}


def moments(monkeypatch, act):
    """Calls `act` with a word at every moment that matters to what is on the disk."""
    replace, save, unlink = os.replace, torch.save, Path.unlink

    def noted_save(state, file):
        save(state, file)
        file.truncate(file.tell() // 2)
        act("half of state.pt")
        file.seek(0)
        save(state, file)

    def noted_replace(draft, path):
        act(f"before {path.name}")
        replace(draft, path)
        act(f"after {path.name}")

    def noted_unlink(path, **options):
        act(f"before the end of {path.name}")
        unlink(path, **options)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(torch, "save", noted_save)
    monkeypatch.setattr(Path, "unlink", noted_unlink)


def test_killed_at_any_moment_and_resumed(monkeypatch):
    with monkeypatch.context() as patch:
        moments(patch, lambda word: print(word, file=open("moments", "a")))  # noqa: SIM115
        assert end_of(fork(train_with("--out", "whole"))) == 0
    words = Path("moments").read_text().splitlines()
    halves = [number for number, word in enumerate(words) if word == "half of state.pt"]
    last_log = len(words) - 1 - words[::-1].index("before log.csv")  # a row before its state
    names = ("before metrics.json", "after metrics.json", "after adapter.safetensors")
    for number in sorted({*halves, last_log, *map(words.index, names)}):
        left = [number]

        def act(word, left=left):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1

        with monkeypatch.context() as patch:
            moments(patch, act)
            assert end_of(fork(train_with("--out", number))) == 9
        assert end_of(fork(train_with("--out", number, "--resume"))) == 0, words[number]
        assert_same_run(result_in("whole"), result_in(number))
        files = {path.name for path in Path(result_in(number)["run"]).iterdir()}
        assert files - {"lock"} == FILES, words[number]  # a lock without a holder does no harm


def test_sigterm_ends_like_ctrl_c_and_a_second_process_stops(capsys):
    words = ["--epochs", "500"]

    def work():
        sys.stderr = open("err", "w", buffering=1)  # noqa: SIM115
        train_with(*words)()

    child = fork(work)
    try:
        while not list(Path().glob("runs/digits/*/state.pt")):
            time.sleep(0.02)
        assert "another process is at it" in refused(capsys, *words, "--resume")
    finally:
        os.kill(child, signal.SIGTERM)
    assert end_of(child) == 130 and "--resume" in Path("err").read_text()
    (folder,) = Path("runs/digits").iterdir()
    assert {"state.pt", "log.csv", "config.json"} == {file.name for file in folder.iterdir()}


def ranks_end(count, work):
    """Run `work` in `count` processes that are the ranks of one run; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for number in range(count):

        def as_rank(number=number):
            here = place | {"RANK": number, "LOCAL_RANK": number}
            os.environ.update({name: str(value) for name, value in here.items()})
            work()

        children.append(fork(as_rank))
    return [end_of(child) for child in children]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--method rmlora --accumulate 2",
        "--method snella --rank 4 --grad-checkpoint",
        "--method full --label-smoothing 0.1",
    ],
)
def test_two_ranks_train_as_one_process_does(monkeypatch, words):
    """In float64: AdamW makes whole steps of the rounding errors of gradients that are zero."""
    create, normalizer = models.create_model, train.create_normalizer
    monkeypatch.setattr(models, "create_model", lambda *given: create(*given).double())

    def double(*arguments):
        normalize = normalizer(*arguments)
        return lambda images: normalize(images).double()

    monkeypatch.setattr(train, "create_normalizer", double)
    # batches of 64, 64 and 1: the second rank has none of the last
    words = [*words.split(), "--epochs", 1, "--lr", 1e-3]
    assert end_of(fork(train_with(*words, "--out", "one"))) == 0
    assert ranks_end(2, train_with(*words, "--out", "two")) == [0, 0]
    one, two = result_in("one"), result_in("two")
    first, second = weights_of(one), weights_of(two)
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-11
    assert losses(one) == pytest.approx(losses(two), rel=1e-6)
    assert {path.name for path in Path(two["run"]).iterdir()} == FILES
    assert json.loads(Path(two["run"], "config.json").read_text())["processes"] == 2


def test_ranks_resume(monkeypatch):
    words = ["--drop-path", 0.1]
    assert ranks_end(2, train_with(*words, "--out", "whole")) == [0, 0]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        codes = ranks_end(2, train_with(*words, "--out", "parts"))
    assert codes[0] == 130 and codes[1] != 0
    assert ranks_end(2, train_with(*words, "--out", "parts", "--resume")) == [0, 0]
    assert_same_run(result_in("whole"), result_in("parts"))


def test_a_batch_that_ranks_cannot_share(monkeypatch, capfd):
    monkeypatch.setattr(time, "sleep", lambda seconds: os._exit(77))  # by then torchrun ends it
    assert ranks_end(2, train_with("--batch-size", 33)) == [2, 77]
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--batch-size 33" in err


def test_the_command_itself_under_torchrun(tmp_path):
    """Two processes of torchrun, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", train.__file__, *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test_top1" in json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("parameters train") == 1  # the first rank alone prints
