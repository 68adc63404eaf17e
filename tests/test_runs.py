"""What surrounds a run: flags, settings, identity, files, locks, errors."""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import runs


def settled(*words):
    return runs.settle(runs.train_parser().parse_args([*map(str, words)]))


def own(*words):
    args = settled(*words)
    return runs.identity(args, runs.usual(args))


def ended(capsys, main, *words):
    """The exit code of a script's main, what it prints, and its errors."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    return stop.value.code, *capsys.readouterr()


def fork(work):
    """A process that has started to do `work`."""

    def alone():
        torch.set_num_threads(1)  # the parent's other threads are not here
        work()

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    return child


def end_of(child):
    child.join()
    return child.exitcode


def fewer_digits(monkeypatch, train, test):
    """The demo has so many images to train on and to score."""
    load = runs.data.load

    def fewer(name, *arguments, **options):
        found = load(name, *arguments, **options)
        if name == "digits":
            for images, count in zip(found, (train, test), strict=True):
                images.items = images.files = images.items[:count]
                images.labels = images.labels[:count]
        return found

    monkeypatch.setattr(runs.data, "load", fewer)


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("word", "number"), [("0.3M", 300_000), ("50K", 50_000), ("7", 7)])
def test_a_budget_may_be_in_thousands_and_millions(word, number):
    assert runs.train_parser().parse_args(["--budget", word]).budget == number


def test_an_identity_is_what_differs_from_the_defaults():
    plain = {"dataset": "digits", "method": "mlae", "model": "vit_nano", "epochs": 20, "seed": 0}
    assert own() == plain
    assert own("--lr", "8e-3", "--rank", "8", "--mask-prob", "0.5") == plain  # as by default
    assert own("--lr", "1e-3", "--val") == plain | {"lr": 1e-3, "val": True}
    assert own("--epochs", "5") == plain | {"epochs": 5}  # its warm-up follows
    assert own("--epochs", "5", "--warmup-epochs", "2") == plain | {"epochs": 5, "warmup_epochs": 2}
    assert own("--method", "lora", "--coef-init", "2")["coef_init"] == 2
    place = "--device cpu --workers 0 --out elsewhere --data-dir photos --resume --overwrite"
    assert own(*place.split()) == plain


def test_a_checkpoint_is_known_by_what_it_holds(tmp_path):
    found = []
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content)
        found.append(own("--checkpoint", tmp_path / name))
    assert own() != found[0] == found[1] != found[2]


def test_settings_of_other_methods_are_set_aside_aloud(capsys):
    plain = own("--method", "linear")
    assert own("--method", "linear", "--mask-prob", "0.3", "--rank", "4") == plain
    err = capsys.readouterr().err
    assert "mask_prob" in err and "rank" in err


def test_folders_are_those_of_earlier_versions():
    """The names of folders in use must not change."""
    names = {
        "": "mlae-vit_nano-seed0-6e2c1e",
        "--lr 2e-3 --mask-prob 0.3 --val": "mlae-vit_nano-p0.3-lr0.002-seed0-val-939a59",
        "--mask-prob attn.qkv=0.5 mlp.fc1=0 --targets attn.qkv mlp.fc1 --seed 3": (
            "mlae-vit_nano-pattn.qkv=0.5,mlp.fc1=0-seed3-f2010d"
        ),
        "--method snella --rank 4": "snella-vit_nano-r4-seed0-5182ea",
    }
    for words, name in names.items():
        assert runs.run_folder("runs", own(*words.split())) == Path("runs/digits", name)


def saved(folder, flags, **changes):
    config = {"arguments": flags, "weights": {"tag": "x"}, "amp": "off", "source": "embedded"}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "--mask-prob attn.qkv=0.5 mlp.fc1=0.3 --targets attn.qkv mlp.fc1",
        "--method linear --lr 3.3333333333333335e-05 --val --img-size 14",
        "--mask-schedule off-at-end --mask-pattern hourglass --augment flip --freeze-lambda",
        "--no-pretrained --checkpoint weights.pth --out a/b --data-dir photos",
    ],
)
def test_saved_arguments_are_read_as_they_were(tmp_path, words):
    args = settled(*words.split())
    folder = saved(tmp_path, vars(args))
    assert vars(evaluation.read_config(folder)["arguments"]) == vars(args)


def test_what_an_old_configuration_lacks_takes_the_defaults(tmp_path):
    old = {"dataset": "digits", "method": "mlae", "rank": None, "val": True}
    args = evaluation.read_config(saved(tmp_path, old))["arguments"]
    assert vars(args) == vars(settled("--val")) | {"warmup_epochs": None}


WRONG_VALUES = {"method": "x", "dataset": "x", "source": "x", "masking": "x", "rank": 0, "new": 3}
LACKING = {"no dataset": "dataset", "no method": "method"}  # the default would be another run


@pytest.mark.parametrize("name", [*WRONG_VALUES, *LACKING])
def test_a_saved_value_that_no_flag_would_take_is_an_error(tmp_path, name):
    arguments = vars(settled()) | {name: WRONG_VALUES.get(name)}
    arguments.pop(LACKING.get(name), None)
    with pytest.raises(runs.RunError, match="config.json"):
        evaluation.read_config(saved(tmp_path, arguments))


def test_what_is_no_json_object_is_an_error_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name, text in {"cut": '{"a": {', "list": "[]", "deep": "[" * 100_000}.items():
        (tmp_path / f"{name}.json").write_text(text)
    for path in tmp_path.iterdir():
        with pytest.raises(runs.RunError, match=path.name):
            runs.read_json(path)


@pytest.mark.parametrize("rows", ["", "1,a,b\n", "1,nan,5\n", "1,2\n"])
def test_what_is_no_log_is_an_error(tmp_path, rows):
    (tmp_path / "log.csv").write_text("epoch,loss,train_top1\n" + rows)
    with pytest.raises(runs.RunError, match="log.csv"):
        runs.read_log(tmp_path / "log.csv")


def test_processes_hold_a_lock_one_after_the_other(tmp_path):
    count = tmp_path / "count"
    count.write_text("0")

    def add():
        for _ in range(20):
            with runs.lock(tmp_path / "lock", patience=60):
                count.write_text(str(int(count.read_text()) + 1))

    children = [fork(add) for _ in range(3)]
    assert [end_of(child) for child in children] == [0, 0, 0]
    assert count.read_text() == "60" and not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (runs.RunError("--lr is\nhigh"), "--lr is\\nhigh"),
        (runs.models.ModelError("\x1b[2J"), "\\x1b[2J"),
        (OSError(28, "No space left", "a.csv"), "a.csv: No space left"),
        (MemoryError(), "--batch-size"),
        (torch.OutOfMemoryError(), "--grad-checkpoint"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--accumulate"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, words):
    with pytest.raises(SystemExit) as stop, runs.one_line("train.py"):
        raise error
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_a_remedy_names_flags_of_its_own_script(capsys):
    with pytest.raises(SystemExit), runs.one_line("eval.py"):
        raise MemoryError
    assert re.findall("--[a-z-]+", capsys.readouterr().err) == ["--device"]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), runs.one_line("train.py"):
        raise RuntimeError("shapes do not fit")


def test_a_reader_that_has_gone_ends_it_quietly(tmp_path):
    script = Path(runs.__file__).with_name("train.py")
    words = ["--device", "cpu", "--epochs", "1", "--img-size", "14", "--out", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)  # as `train.py | true` does
    command = [sys.executable, script, *words]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and "pipe" not in ended.stderr.lower()


def test_a_strangers_links_are_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "config.json.tmp", "lock"):
        (folder / name).symlink_to(precious)
    runs.write_json(folder / "config.json", {})
    with pytest.raises(runs.RunError, match="lock"), runs.lock(folder / "lock"):
        pass
    assert precious.read_text() == "kept" and not (folder / "config.json").is_symlink()


def test_a_left_over_world_size_is_no_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert runs.launched() == (0, 1)


EVERYWHERE = {"rank": 8, "mask_prob": 0.5, "masking": "stochastic", "pattern": "random", "seed": 0}
EVERYWHERE |= {"schedule": "constant", "coef_init": 1.0, "targets": ["attn.qkv"], "batch_size": 64}
EVERYWHERE |= {"weight_decay": 1e-4, "label_smoothing": 0.0, "normalize": "imagenet"}
EVERYWHERE |= {"lambda_lr": 1.0, "drop_path": 0.0}
PAPERS = {"model": "vit_base_patch16_224.orig_in21k", "lr": 1e-3, "epochs": 100}
DEFAULTS = {  # what a published number may rest on
    "digits": {"epochs": 20, "lr": 8e-3, "augment": "none", "model": "vit_nano", "img_size": 28},
    "dtd": PAPERS | {"augment": "none", "img_size": 224},
    "cub": PAPERS | {"augment": "crop", "img_size": 224},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_pinned(name):
    args, wanted = vars(settled("--dataset", name)), EVERYWHERE | DEFAULTS[name]
    assert {key: args[key] for key in wanted} == wanted
    assert args["warmup_epochs"] * 10 == args["epochs"]


def test_all_that_is_not_about_the_machine_is_what_a_run_is():
    args = settled()
    own = runs.identity(args, runs.usual(args))
    for name in vars(args).keys() - {*runs.PLACE, *runs.data.FOLDER_FLAGS, "checkpoint"}:
        other = argparse.Namespace(**vars(args) | {name: "another"})
        assert runs.identity(other, runs.usual(args)) != own, name
