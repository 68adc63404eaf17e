"""train.py as a user runs it, on the embedded demo and on few photos of birds."""

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import capture_on_cpu, log, stop_after
from safetensors.torch import load_file
from test_runs import end_of, ended, fewer_digits, fork, largest_file

import data
import eval as evaluation
import methods
import model as models
import runs
import train

FILES = {"config.json", "log.csv", "metrics.json", "adapter.safetensors", "correct.npy"}
QUICK = ["--device", "cpu", "--epochs", "2", "--img-size", "14"]


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fewer_digits(monkeypatch, 129, 100)  # batches of 64, 64 and 1


def refused(capsys, *words):
    """Runs train.py, which must end in exit code 2 and one line on stderr; returns the line."""
    code, _, err = ended(capsys, train.main, *QUICK, *words)
    assert code == 2 and err.count("\n") == 1 and err.strip().isprintable(), err
    return err


def interrupted(monkeypatch, run, *words):
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 130


def weights_of(metrics):
    return load_file(Path(metrics["run"], "adapter.safetensors"))


def config_of(metrics):
    return json.loads(Path(metrics["run"], "config.json").read_text())


def losses(metrics):
    return [float(row["loss"]) for row in log(metrics)]


def assert_same_run(one, two):
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for a, b in zip(log(one), log(two), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    assert one["test_loss"] == two["test_loss"]


def test_a_run_and_all_its_files(run):
    metrics = run("--mask-prob", 0.3)
    folder = Path(metrics["run"])
    assert {f.name for f in folder.iterdir()} == FILES and folder.parent == Path("runs/digits")
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["trainable_parameters"] == 6 * 8 * (96 + 288 + 1) + 97 * 10
    assert (metrics["method"], metrics["dataset"], metrics["seed"]) == ("mlae", "digits", 0)
    assert 15 < metrics["test_top1"] <= 100 and metrics["train_seconds"] > 0
    config = config_of(metrics)
    assert config["arguments"]["mask_prob"] == 0.3
    assert config["versions"]["torch"] == torch.__version__
    assert config["weights"]["sha256"] == models.sha256(models.NANO_FILE)
    first, second = log(metrics)
    assert (first["epoch"], second["epoch"], second["mask_prob"]) == ("1", "2", "0.3")
    assert float(second["loss"]) < float(first["loss"])


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


def test_what_looks_like_success_and_is_not_is_said(run, capsys):
    train.main([*QUICK, "--resume", "--lr", "1e-9", "--data-dir", "photos"])
    out, err = capsys.readouterr()
    assert "nothing to resume" in out and "--lr" in err and "--data-dir" in err


# --- what trains ----------------------------------------------------------------------------------


def test_learning_rates_are_the_formula(run):
    # 12 steps, of which 3 are a linear warm-up, then half a cosine over 9
    want = [1e-3 * (i + 1) / 3 for i in range(3)]
    want += [1e-3 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    words = ["--lr", 1e-3, "--batch-size", 129, "--epochs", 12, "--warmup-epochs", 3]
    assert [float(row["lr"]) for row in log(run(*words))] == pytest.approx(want, rel=1e-6)


def test_lambda_has_its_own_learning_rate(run):
    """At the second step, the first at which lambda has a gradient."""
    moved = []
    for factor in (1, 5):
        metrics = run("--lambda-lr", factor, "--coef-init", 1, "--batch-size", 129)
        moved.append(weights_of(metrics)["blocks.0.attn.qkv.lora_lambda"] - 1)
    assert moved[0].abs().max() > 1e-3 and torch.allclose(moved[1], 5 * moved[0], rtol=1e-3)


def test_recomputed_blocks_give_the_same_training(run):
    words = ["--drop-path", 0.1, "--epochs", 1]
    plain, again = run("--out", "plain", *words), run("--out", "again", *words, "--grad-checkpoint")
    assert again["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-5)


def test_accumulation_gives_the_gradient_of_the_whole_batch(run):
    whole, parts = (run("--mask-prob", 0, "--accumulate", n, "--batch-size", 50) for n in (1, 3))
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-3) and whole["run"] != parts["run"]
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=5e-3)
    masked = run("--accumulate", 2)  # a mask for each part
    assert masked["test_loss"] != run()["test_loss"]


def test_mixed_precision(run):
    found = {}
    for amp in ("off", "bf16", "fp16"):
        metrics = run("--amp", amp, "--epochs", 1)
        assert config_of(metrics)["amp"] == amp
        found[amp] = losses(metrics)[0]
    assert len(set(found.values())) == 3
    assert found == pytest.approx(dict.fromkeys(found, found["off"]), rel=0.05)


def test_neither_another_p_nor_the_short_last_batch_compiles_anew(run, monkeypatch):
    graphs, compile_it = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(compile_it, backend=backend))
    monkeypatch.setitem(models.NANO, "depth", 2)
    metrics = run("--compile", "--mask-schedule", "increase", "--no-pretrained")
    assert 1 <= len(graphs) <= 2  # torch 2.6 looks at a first p of 0 again
    assert [row["mask_prob"] for row in log(metrics)] == ["0.25", "0.5"]


def test_frozen_batch_norms_keep_their_statistics(run):
    words = ["--no-pretrained", "--method", "linear", "--epochs", 1, "--img-size", 16]
    metrics = run("--model", "resnet18", *words)
    torch.manual_seed(0)
    net = models.create("resnet18", 10, pretrained=False, method="linear").eval()
    models.load_adapter(net, Path(metrics["run"], "adapter.safetensors"))
    images = data.load("digits", img_size=16)[1]
    again = evaluation.evaluate(net, images, data.normalizer(*data.NORMALIZE["imagenet"], "cpu"))
    assert (again["top1"], again["loss"]) == (metrics["test_top1"], metrics["test_loss"])


def test_frozen_and_unmasked_mlae_is_lora_step_by_step(run):
    words = ["--coef-init", 2.0, "--rank", 4, "--drop-path", 0.1]
    plain = ["--mask-prob", 0, "--freeze-lambda"]
    one, two = run("--method", "lora", *words), run("--method", "mlae", *words, *plain)
    assert one["trainable_parameters"] == 6 * 4 * (96 + 288) + 970
    assert losses(one) == losses(two)
    first, second = weights_of(one), weights_of(two)
    assert all(torch.equal(first[key], second[key]) for key in first)
    lambdas = [value for key, value in first.items() if key.endswith("lora_lambda")]
    assert len(lambdas) == 6 and all((value == 2).all() for value in lambdas)


class Scale(torch.nn.Linear):
    """A toy method: the frozen layer's output times a learned scale for each feature."""

    @classmethod
    def from_linear(cls, linear, start):
        scaled = cls(linear.in_features, linear.out_features)
        scaled.load_state_dict(linear.state_dict())
        scaled.requires_grad_(False)
        scaled.scale = torch.nn.Parameter(torch.full((linear.out_features,), start))
        return scaled

    def forward(self, x):
        return super().forward(x) * self.scale

    def to_linear(self):
        linear = torch.nn.Linear(self.in_features, self.out_features)
        linear.weight.data = self.weight * self.scale[:, None]
        linear.bias.data = self.bias * self.scale
        return linear


def test_a_method_is_one_more_row(run, capsys, monkeypatch):
    """What a reader touches to add a method: METHODS. Saving, scoring and merging follow."""
    calls, gradients = [], []

    def penalty(model):
        return 1e6 * model.head.bias.sum()  # beside it the images' gradient is nothing

    def before_step(model, progress):
        calls.append(progress)
        if model.head.bias.grad is not None:
            gradients.append(model.head.bias.grad.mean().item())

    toy = methods.Method(
        trains="a toy",
        layer=Scale,
        settings={"start": 1.0},
        penalty=penalty,
        before_step=before_step,
        after_epoch=lambda model: {"mine": 7.0},
    )
    monkeypatch.setitem(methods.METHODS, "toy", toy)
    metrics = run("--method", "toy", "--targets", "mlp.fc1", "--accumulate", 3)
    assert calls == [i / 6 for i in range(7)]  # before all, and before each of 2 * 3 steps
    assert gradients == pytest.approx([1e6] * 6, rel=1e-4)  # the parts of a batch bring it once
    assert [row["mine"] for row in log(metrics)] == ["7", "7"]
    assert metrics["trainable_parameters"] == 6 * 4 * 96 + 970
    state = weights_of(metrics)
    assert {key.rpartition(".")[2] for key in state} == {"scale", "weight", "bias"}
    assert (state["blocks.0.mlp.fc1.scale"] != 1).all()
    assert ended(capsys, evaluation.main, metrics["run"])[0] == 0  # merged, it agrees


BIRDS = ["--dataset", "cub", "--model", "vit_nano", "--workers", 0, "--data-dir"]


def test_a_damaged_test_image_costs_no_training(run, birds, capsys, monkeypatch):
    (image,) = birds.rglob("test3.jpg")
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # its header is whole
    code, _, err = ended(capsys, train.main, *QUICK, *BIRDS, birds)
    assert code == 2 and "test3.jpg" in err
    (folder,) = Path("runs/cub").iterdir()
    assert {"state.pt", "adapter.safetensors"} <= {file.name for file in folder.iterdir()}
    image.write_bytes(whole)
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # nothing trains again
    assert "test_top1" in run(*BIRDS, birds, "--resume")


def relabel(birds, name):
    path = birds / "fgvc/CUB_200_2011" / name
    path.write_text(path.read_text().replace(": 4", ": 7"))


def test_progress_goes_on_with_the_same_images_wherever_they_are(run, birds, monkeypatch):
    whole = run(*BIRDS, birds, "--out", "whole")
    interrupted(monkeypatch, run, *BIRDS, birds)
    shutil.copytree(birds / "fgvc", birds / "node" / "fgvc")  # another place, another time
    assert_same_run(run(*BIRDS, birds / "node", "--resume"), whole)


def test_progress_on_other_images_is_kept_until_it_is_overwritten(run, birds, monkeypatch, capsys):
    interrupted(monkeypatch, run, *BIRDS, birds)
    (state,) = Path().rglob("state.pt")
    before = {path: path.read_bytes() for path in state.parent.iterdir()}
    relabel(birds, "train.json")
    with pytest.raises(SystemExit):
        run(*BIRDS, birds, "--resume")
    assert "--overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in state.parent.iterdir()} == before
    again, fresh = run(*BIRDS, birds, "--overwrite"), run(*BIRDS, birds, "--out", "fresh")
    assert_same_run(again, fresh)


def test_a_result_on_other_test_images_is_not_this_runs(run, birds):
    digest = run(*BIRDS, birds)["digest"]
    images = birds / "fgvc/CUB_200_2011/images"
    path = next(images.glob("*/test*.jpg"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # the same name and length
    path.write_bytes(content)
    assert run(*BIRDS, birds)["digest"] != digest


def test_a_result_of_other_code_is_never_taken_in_silence(run, capsys, monkeypatch):
    first = run()
    assert run() == first  # finished before
    monkeypatch.setattr(runs, "code_digest", lambda: "other")
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert run("--overwrite")["test_loss"] == first["test_loss"]
    assert config_of(first)["code"] == "other"
    interrupted(monkeypatch, run, "--seed", 1)
    monkeypatch.setattr(runs, "code_digest", lambda: "a third")
    train.main([*QUICK, "--seed", "1", "--resume"])
    assert "other code" in capsys.readouterr().err


# --- errors ---------------------------------------------------------------------------------------


WRONG = "--mask-prob 1, --mask-prob nan, --rank 0, --lr -1, --img-size 2000000000, --masking some"
WRONG += ", --budget 0.1, --budget 1M --rank 8, --warmup-epochs 2, --warmup-epochs -1"
WRONG += ", --maskprob 0.5, --out /dev/null/runs"
NAMED = {
    "--dataset cifra": "'cifar'",
    "--targets attn.qvk": "attn.qkv (6)",
    "--checkpoint absent.pth": "absent.pth",
    "--checkpoint THIS_FILE": "test_train.py",
    "--mask-pattern hourglass --mask-prob 0.8": "hourglass",
    "--img-size 30": "30",
    "--rank 97": "rank",  # vit_nano's layers have 96 inputs
    "--coef-init 1e39": "coef",
}


@pytest.mark.parametrize("words", [*WRONG.split(", "), *NAMED])
def test_wrong_arguments_are_one_line_before_anything_is_written(capsys, tmp_path, words):
    error = refused(capsys, *words.replace("THIS_FILE", __file__).split())
    assert NAMED.get(words, words.split()[0]) in error
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_an_error(capsys):
    assert "--lr" in refused(capsys, "--lr", 1e30)
    (folder,) = Path("runs/digits").iterdir()
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize("size", [500, 50_000])
def test_a_full_disk_keeps_the_last_weights(run, capsys, size):
    metrics = run("--epochs", 1)
    before = weights_of(metrics)
    with largest_file(size):
        assert "--out" in refused(capsys, "--epochs", 1, "--overwrite")
    after = weights_of(metrics)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert config_of(metrics)["arguments"]["epochs"] == 1
    assert not list(Path(metrics["run"]).glob("*.tmp"))


# --- again, and going on --------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "amp"), [(1, "fp16"), (2, "off")])
def test_resume_goes_on_as_if_nothing_had_happened(run, monkeypatch, at, amp):
    words = ["--drop-path", 0.1, "--mask-schedule", "increase", "--amp", amp]
    whole = run("--out", "whole", *words)
    stop_after(monkeypatch, at)
    with pytest.raises(SystemExit):
        run("--out", "parts", *words)
    torch.manual_seed(123)
    resumed = run("--out", "parts", *words, "--resume")
    assert_same_run(whole, resumed)
    assert run("--out", "parts", *words, "--resume") == resumed  # finished: nothing runs again


def test_the_same_command_again_loses_nothing(run, monkeypatch, capsys):
    first = run()
    with monkeypatch.context() as patch:
        patch.setattr(models, "create_model", None)  # nothing trains again
        assert run() == first
    for name in ("metrics.json", "config.json"):
        Path(first["run"], name).write_text("{")  # damaged: it is made again
        assert run()["test_loss"] == first["test_loss"]
    interrupted(monkeypatch, run, "--seed", 1)
    (folder,) = Path("runs/digits").glob("*seed1*")
    state = (folder / "state.pt").read_bytes()
    assert "--resume" in refused(capsys, "--seed", 1)
    assert (folder / "state.pt").read_bytes() == state
    (folder / "state.pt").write_bytes(b"going on from it would be an error")
    again, fresh = run("--seed", 1, "--overwrite"), run("--seed", 1, "--out", "elsewhere")
    assert_same_run(again, fresh)


def test_a_result_of_other_defaults_is_not_taken_for_this_run(run, capsys):
    metrics = run("--epochs", 1)
    config = config_of(metrics)
    config["arguments"] |= {"out": "elsewhere", "lr": 2e-3}
    Path(metrics["run"], "config.json").write_text(json.dumps(config))
    assert "--lr 0.002" in refused(capsys, "--epochs", 1)


def first_moment(state):
    return state["optimizer"]["state"][0]["exp_avg"]


STATES = {
    "moments of another shape": lambda state: first_moment(state).resize_(3),
    "moments not finite": lambda state: first_moment(state).fill_(float("nan")),
    "no moments": lambda state: state.update(optimizer={"state": {}}),
    "no row for an epoch": lambda state: state["progress"].update(rows=[]),
    "no weights": lambda state: state.update(weights={}),
    "random numbers": lambda state: state["rng"].update(cpu=torch.zeros(3, dtype=torch.uint8)),
    "program": lambda state: state.update(progress=Path("a class that is not loaded")),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_damaged_state_is_refused(run, capsys, monkeypatch, kind):
    interrupted(monkeypatch, run)
    (path,) = Path("runs/digits").glob("*/state.pt")
    state = torch.load(path)
    STATES[kind](state)
    torch.save(state, path)
    assert "state.pt" in refused(capsys, "--resume")


# --- other processes ------------------------------------------------------------------------------


def train_with(*words):
    return lambda: train.main([*QUICK, *map(str, words)])


def result_in(out):
    (file,) = Path(out).glob("digits/*/metrics.json")
    return json.loads(file.read_text())


def test_killed_at_any_moment_and_resumed(run):
    whole, replace = run("--out", "whole"), os.replace

    def killed():
        os.replace = replace_and_die
        train_with("--out", number)()

    def replace_and_die(draft, path):
        replace(draft, path)
        replaced.append(path)
        if len(replaced) == number:
            os._exit(9)

    for number in itertools.count(1):
        replaced = []
        if end_of(fork(killed)) == 0:
            break
        resumed = run("--out", number, "--resume")
        assert_same_run(whole, resumed)
        files = {path.name for path in Path(resumed["run"]).iterdir()}
        assert files - {"lock"} == FILES, number  # a lock without a holder does no harm
    assert number > 8  # config, twice log and state, adapter, answers, metrics


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
        child.terminate()
    assert end_of(child) == 130 and "--resume" in Path("err").read_text()
    (folder,) = Path("runs/digits").iterdir()
    assert {"state.pt", "log.csv", "config.json"} == {file.name for file in folder.iterdir()}


def ranks_end(count, work):
    """Run `work` in processes that are the ranks of one run; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def as_rank(number):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
        place |= {"RANK": number, "LOCAL_RANK": number}
        os.environ.update({name: str(value) for name, value in place.items()})
        work()

    children = [fork(partial(as_rank, number)) for number in range(count)]
    return [end_of(child) for child in children]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (4, "--label-smoothing 0.1 --batch-size 124"),  # of 5 images, one rank has 2
        (2, "--method rmlora --accumulate 2"),  # of 1 image, the second has none
        (2, "--method snella --rank 4 --grad-checkpoint"),
    ],
)
def test_ranks_train_as_one_process_does(run, monkeypatch, ranks, words):
    """In float64: AdamW makes whole steps of the rounding errors of gradients that are zero."""
    create, normalizer = models.create_model, train.create_normalizer
    monkeypatch.setattr(models, "create_model", lambda *given: create(*given).double())

    def double(*arguments):
        normalize = normalizer(*arguments)
        return lambda images: normalize(images).double()

    monkeypatch.setattr(train, "create_normalizer", double)
    words = [*words.split(), "--epochs", 1, "--lr", 1e-3]
    one = run(*words, "--out", "one")
    assert ranks_end(ranks, train_with(*words, "--out", "two")) == [0] * ranks
    two = result_in("two")
    first, second = weights_of(one), weights_of(two)
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-11
    assert losses(one) == pytest.approx(losses(two), rel=1e-6)
    assert {path.name for path in Path(two["run"]).iterdir()} == FILES
    assert config_of(two)["processes"] == ranks


def test_ranks_resume(monkeypatch):
    words = ["--drop-path", 0.1]
    assert ranks_end(2, train_with(*words, "--out", "whole")) == [0, 0]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        codes = ranks_end(2, train_with(*words, "--out", "parts"))
    assert codes[0] == 130 and codes[1] != 0
    assert ranks_end(2, train_with(*words, "--out", "parts", "--resume")) == [0, 0]
    assert_same_run(result_in("whole"), result_in("parts"))


def test_ranks_agree_on_a_result_whose_images_are_gone(run, birds):
    words = *map(str, BIRDS), str(birds), "--out", "runs"
    run(*words)
    (birds / "fgvc").rename(birds / "gone")
    assert ranks_end(2, train_with(*words)) == [0, 0]


def test_a_batch_that_ranks_cannot_share(monkeypatch, capfd):
    monkeypatch.setattr(time, "sleep", lambda seconds: os._exit(77))  # by then torchrun ends it
    assert ranks_end(2, train_with("--batch-size", 33)) == [2, 77]
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--batch-size 33" in err


def test_the_command_itself_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", train.__file__, *QUICK]
    command += ["--epochs", "1", "--method", "linear"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test_top1" in json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("parameters train") == 1  # the first rank alone prints


CHANGES = "--seed 1, --lr 1e-3, --weight-decay 0.3, --drop-path 0.5, --label-smoothing 0.2"
CHANGES += ", --warmup-epochs 0.5, --batch-size 100, --accumulate 2, --amp bf16, --normalize none"
CHANGES += ", --augment flip, --augment crop, --mask-prob 0.2, --rank 4, --coef-init 0.5"
CHANGES += ", --lambda-lr 3, --freeze-lambda, --mask-pattern incremental, --masking fixed"
CHANGES += ", --mask-schedule decrease, --targets mlp.fc1, --no-pretrained, --img-size 28"


def test_every_setting_changes_the_training(run):
    usual = run("--epochs", 1)
    for words in CHANGES.split(", "):
        changed = run("--epochs", 1, *words.split())
        assert changed["run"] != usual["run"], words
        same = losses(changed) == losses(usual)
        if same:  # too little to show in the digits of a first loss
            one, two = weights_of(changed), weights_of(usual)
            same = all(torch.equal(one[name], two[name]) for name in two)
        assert not same, words


OWN = {  # settings of the other methods
    "lora": ["--lora-dropout 0.2"],
    "rmlora": ["--penalty-weight 3", "--active-ranks 1", "--variant 1"],
    "mor": ["--num-experts 2"],
    "snell": ["--sparsity 0.5", "--gate paper"],
    "snella": ["--start-sparsity 0.5", "--sparsity 0.5"],
}


@pytest.mark.parametrize("method", OWN)
def test_every_setting_of_a_method_changes_the_training(run, method):
    words = "--method", method, "--rank", 6, "--targets", "attn.qkv"
    usual = weights_of(run(*words))
    for own in OWN[method]:
        changed = weights_of(run(*words, *own.split()))
        same = usual.keys() == changed.keys()
        assert not (same and all(torch.equal(usual[key], changed[key]) for key in usual)), own


def test_order_and_crops_are_drawn_by_epoch_and_seed(run, monkeypatch):
    seen = []
    real = runs.rank_batches

    def record(*arguments):
        batches = list(real(*arguments))
        seen.append(batches[0])
        return batches

    monkeypatch.setattr(runs, "rank_batches", record)
    run("--augment", "crop")
    run("--augment", "crop", "--seed", 1)
    first, again, other = (labels.tolist() for _, labels, _ in seen[:3])
    assert len({str(order) for order in (first, again, other)}) == 3
    images = data.load("digits", img_size=14, augment="crop")[0]
    views = [next(images.epoch(torch.arange(9), 9, 0, seed))[0] for seed in ("0 0", "0 1", "1 0")]
    assert not any(torch.equal(views[i], views[i - 1]) for i in range(3))


def test_initial_weights_and_masks_are_drawn_by_the_seed(run):
    one, two = (weights_of(run("--epochs", 1, "--lr", 1e-30, "--seed", seed)) for seed in (0, 1))
    for name in ("blocks.0.attn.qkv.lora_A", "head.weight"):
        assert not torch.equal(one[name], two[name])
    bound = 96**-0.5  # kaiming's, as nn.Linear's
    assert 0.95 * bound < one["blocks.0.attn.qkv.lora_A"].abs().max() <= bound


@pytest.mark.parametrize("words", [["--mask-schedule", "increase"], ["--method", "rmlora"]])
def test_a_step_that_is_replayed_trains_as_an_eager_one(run, monkeypatch, words):
    eager = run(*words, "--out", "eager")
    monkeypatch.setattr(train, "can_be_captured", lambda *arguments: True)
    monkeypatch.setattr(train, "capture", capture_on_cpu)
    replayed = run(*words, "--out", "replayed")
    wanted = load_file(Path(eager["run"], "adapter.safetensors"))
    found = load_file(Path(replayed["run"], "adapter.safetensors"))
    for key in wanted:  # the last batch is filled up: products of another size round differently
        assert torch.allclose(found[key], wanted[key], rtol=1e-3, atol=1e-4), key
    assert replayed["test_loss"] == pytest.approx(eager["test_loss"], rel=1e-3)


def test_a_capture_that_fails_leaves_an_eager_run(run, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    eager = run("--out", "eager")
    monkeypatch.setattr(train, "can_be_captured", lambda *arguments: True)
    monkeypatch.setattr(train, "capture", fail)
    failed = run("--out", "failed")
    assert failed["test_loss"] == eager["test_loss"]
