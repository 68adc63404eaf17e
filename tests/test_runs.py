"""What surrounds a run: its identity, folder, files and state."""

import argparse
import dataclasses
import json

import pytest

import files
import mlae
import runs
import train
from baselines import METHODS


def settled(*words):
    return train.settle(train.train_parser().parse_args([*words]))


def own(*words):
    args = settled(*words)
    return runs.identity(args, train.usual(args))


def test_an_identity_is_what_differs_from_the_defaults():
    plain = {"dataset": "digits", "method": "mlae", "model": "vit_nano", "epochs": 20, "seed": 0}
    assert own() == plain
    assert own("--lr", "8e-3", "--rank", "8", "--mask-prob", "0.5") == plain  # as by default
    assert own("--lr", "1e-3", "--val") == plain | {"lr": 1e-3, "val": True}
    assert own("--epochs", "5") == plain | {"epochs": 5}  # its warm-up follows
    assert own("--epochs", "5", "--warmup-epochs", "2") == plain | {"epochs": 5, "warmup_epochs": 2}
    assert own("--method", "lora", "--coef-init", "2")["coef_init"] == 2


def test_machine_and_place_are_not_what_a_run_is():
    words = "--device cpu --workers 0 --out elsewhere --data-dir photos --resume --overwrite"
    assert own(*words.split()) == own()


def test_settings_of_other_methods_are_set_aside_aloud(capsys):
    assert own("--method", "linear", "--mask-prob", "0.3", "--rank", "4") == own(
        "--method", "linear"
    )
    err = capsys.readouterr().err
    assert "note: linear has no mask_prob; it is ignored" in err and "rank" in err


def test_a_new_flag_renames_no_old_run():
    args, usual = settled(), train.usual(settled())
    before = runs.run_folder("runs", runs.identity(args, usual))
    args.new_flag = usual.new_flag = 3
    assert runs.run_folder("runs", runs.identity(args, usual)) == before


def test_the_folder_says_what_differs():
    name = runs.run_folder("out", own("--lr", "2e-3", "--mask-prob", "0.3", "--val")).name
    assert name.startswith("mlae-vit_nano-p0.3-lr0.002-seed0-val-")
    assert runs.run_folder("out", own("--label-smoothing", "0.1")).name != (
        runs.run_folder("out", own()).name
    )


RESULT = {"official": True, "digest": "", "images": 3, "run": "runs/digits/a", "test_top1": 9.0}


def test_a_layer_of_ones_own_makes_another_run(monkeypatch):
    class Mine(mlae.MLAELinear):
        pass

    assert all(row.signature() == {} for row in METHODS.values())
    row = dataclasses.replace(METHODS["mlae"], layer=Mine)
    assert "Mine" in row.signature()["layer"]
    assert dataclasses.replace(METHODS["mlae"], version=2).signature() == {"version": 2}


def write(folder, arguments, **metrics):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"arguments": arguments}))
    (folder / "metrics.json").write_text(json.dumps(RESULT | metrics))


def test_a_result_of_other_defaults_is_not_taken_for_this_run(tmp_path):
    args = argparse.Namespace(lr=1e-3, out="runs", new_flag=1)
    write(tmp_path / "a", {"lr": 1e-3, "out": "elsewhere"})
    found = runs.finished(tmp_path / "a", args)  # a folder may have been moved
    assert found == RESULT | {"run": str(tmp_path / "a")}
    write(tmp_path / "b", {"lr": 2e-3})
    with pytest.raises(runs.RunError, match="was run with --lr 0.002, the default of its time"):
        runs.finished(tmp_path / "b", args)
    assert runs.finished(tmp_path / "absent", args) is None
    (tmp_path / "a/metrics.json").write_text("{}")
    assert runs.finished(tmp_path / "a", args) is None


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
