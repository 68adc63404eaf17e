"""suite.py: many runs in one command, and the table of what has been run."""

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import stop_after, write_lists

import data
import model as models
import runs
import splits
import suite
import train
from model import ModelError
from runs import Result, RunError


@pytest.fixture
def three(tmp_path, cifar, monkeypatch):
    """A root with three of VTAB-1k's nineteen tasks, one of them a subset; with made-up labels."""
    monkeypatch.setattr(splits, "prove_labels", lambda *arguments: splits.Proof(None))
    for task, test in (("dtd", 1880), ("kitti", 711)):
        folder = cifar.parent / task
        folder.mkdir()
        (folder / "images").symlink_to(cifar / "images")
        write_lists(folder, test, 0)
    return tmp_path


def call(capsys, *arguments):
    """Runs suite.py; returns all that it printed."""
    suite.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    for line in err.splitlines():  # tqdm's, and of training for one epoch
        assert "step" in line or line.startswith("warning: hardly anything was learned")
    return out


SMALL = ["--device", "cpu", "--model", "vit_nano", "--epochs", 1, "--img-size", 14]
SMALL += ["--batch-size", 250]


@pytest.fixture
def vtab(three, capsys, monkeypatch):
    """Runs --dataset vtab on those three; returns all that was printed and the last line's rows."""
    monkeypatch.chdir(three)

    def run(*arguments):
        out = call(capsys, "--dataset", "vtab", *SMALL, *arguments)
        rows = json.loads(out.splitlines()[-1])["rows"]
        return out, {row["dataset"]: row for row in rows}

    return run


def table(text):
    """{first cell: other cells} of the markdown table's rows."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|" and line[:3] != "| -"
    ]
    return {row[0]: row[1:] for row in cells}


def test_a_suite_runs_what_is_there_and_lists_the_rest(vtab, monkeypatch):
    out, last = vtab()
    rows = table(out)
    single = json.loads(next(Path("runs/dtd").glob("*/metrics.json")).read_text())["test_top1"]
    assert {path.name for path in Path("runs").iterdir()} == {"cifar", "dtd", "kitti", "runs.csv"}
    assert "PARTIAL, no vtab-1k result: mlae has 2 of 19 tasks with official data." in out
    assert rows["cifar"][0].endswith(" *") and "30 of 10000 test (subset)" in out
    assert "\n* a subset of vtab-1k or not its official images" in out
    assert rows["dtd"][0] == f"{single:.2f} (1)" and "svhn" not in rows  # nothing was run
    assert rows["natural"][0] == f"{single:.2f} (1) [1 of 7 tasks]"  # the subset is in no mean
    assert rows["mean of groups"][0] == "-"
    assert rows["MLAE (Wang et al. 2024)"][:3] == ["78.8", "-", "90.9"]
    missing = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(missing) == 16
    assert all("unpack" in line or "pip install" in line for line in missing)
    assert last["mean of groups"]["test_top1"] is None and not last["mean of groups"]["official"]
    assert last["dtd"]["test_top1"] == single and last["dtd"]["n"] == 1
    monkeypatch.setattr(models, "create_model", None)  # nothing trains again
    again, _ = vtab()
    assert table(again) == rows


def test_several_seeds_are_single_runs_and_their_mean(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = call(capsys, *SMALL, "--seed", 0, 1, 2)
    (row,) = json.loads(out.splitlines()[-1])["rows"]
    files = sorted(Path("runs/digits").glob("*/metrics.json"))
    scores = [json.loads(file.read_text())["test_top1"] for file in files]
    assert row["seeds"] == [0, 1, 2] and row["n"] == 3 and row["method"] == "mlae"
    assert row["test_top1"] == pytest.approx(np.mean(scores), abs=0.006)
    assert row["test_top1_std"] == pytest.approx(np.std(scores, ddof=1), abs=0.006)
    train.main([*map(str, SMALL), "--seed", "1"])
    single = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert single["test_top1"] == scores[1] and Path(single["run"]) == files[1].parent


def test_the_product_of_all_values(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--method mlae lora linear --rank 2 4 --mask-prob 0.1 0.5 --targets attn.qkv mlp.fc1,mlp.fc2"
    args = suite.suite_parser().parse_args(words.split())
    args.resume = None
    del args.table, args.format, args.against
    found = set()
    for run in suite.combinations(args):
        targets = tuple(run.targets) if run.method != "linear" else None
        found.add((run.method, run.rank, run.mask_prob, targets))
    layers = [("attn.qkv",), ("mlp.fc1", "mlp.fc2")]
    want = {("linear", None, None, None)}
    for target in layers:
        for rank in (2, 4):
            want |= {("lora", rank, None, target)}
            want |= {("mlae", rank, p, target) for p in (0.1, 0.5)}
    assert found == want


def test_train_answers_a_suite_with_the_command_to_use(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset", "VTAB"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.endswith("python suite.py --dataset vtab\n")


def test_a_suite_goes_on_past_damaged_data_and_divergence(vtab, three, monkeypatch, capsys):
    (three / "data/vtab-1k/dtd/test.txt").write_text("images/0.png x\n")
    out, _ = vtab()
    assert out.count("left out: ") == 17 and "test.txt, line 1: expected" in out
    evaluate, calls = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    with pytest.raises(SystemExit) as stop:
        vtab("--lr", 1e30, "--epochs", 2)
    assert stop.value.code == 2 and not calls
    assert "left out: kitti, seed 0: the loss is nan" in capsys.readouterr().out


def test_a_method_that_nobody_knows_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        suite.main(["--method", "mlea"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("suite.py: error: ") and "mlea" in line


def test_a_suite_without_any_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        call(capsys, "--dataset", "fgvc", *SMALL)
    out, err = (text.strip().splitlines() for text in capsys.readouterr())
    assert stop.value.code == 2 and len(err) == 1
    assert err[-1].endswith("not one of these runs was possible; see above")
    assert sum(line.startswith("left out: ") for line in out) == 5 and not Path("runs").exists()


def write_run(root, task, seed, top1, official=True, val=False, digest=None, **changes):
    """A finished run's files; changes are settings that differ from the defaults."""
    name = f"{seed}-{val}-{'-'.join(map(str, changes.values())).replace('/', '')}"
    folder = Path(root, task, name)
    folder.mkdir(parents=True)
    defaults = {"method": "mlae", "rank": 8, "source": "auto", "checkpoint": None}
    arguments = defaults | {"dataset": task, "seed": seed, "val": val} | changes
    identity = {"method": "mlae", "model": "vit", "dataset": task, "seed": seed} | changes
    identity |= {"val": True} if val else {}
    identity |= {"checkpoint": digest} if digest else {}
    config = {"arguments": arguments, "identity": identity}
    (folder / "config.json").write_text(json.dumps(config))
    split = "val" if val else "test"
    metrics = {"dataset": task, "seed": seed, f"{split}_top1": top1, "official": official}
    metrics |= {"data": "originals", "model": f"vit:{changes.get('checkpoint')}"}
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
            write_run(tmp_path / "runs", task.name, seed, scores[task.name, seed])
    for seed in range(3):
        write_run(tmp_path / "runs", "dtd", seed, 70 + seed, rank=4)
    write_run(tmp_path / "runs", "dtd", 0, 66.0, val=True)
    return tmp_path / "runs", scores


def test_the_table_of_all_runs(all_runs, capsys):
    folder, scores = all_runs
    out, _ = tabulated(capsys, folder)
    rows = table(out[out.index("| vtab-1k, test") : out.index("| fgvc, ")])
    groups = {}
    for task in data.TASKS.values():
        if task.benchmark == "vtab-1k":
            groups.setdefault(task.group, []).append([scores[task.name, seed] for seed in (0, 1)])
    means = {group: np.mean(values, 0) for group, values in groups.items()}  # (2,) over seeds
    means["mean of groups"] = np.mean(list(means.values()), 0)
    means["mean of tasks"] = np.mean([value for values in groups.values() for value in values], 0)
    for name, values in means.items():
        assert rows[name][1] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (2)"
    assert rows["vtab-1k, test top-1 (%)"][:2] == ["mlae rank=4", "mlae rank=8"]
    assert (
        rows["caltech101"][0] == "-"
        and rows["dtd"][0] == "71.00 ± 1.00 (3)"
        and out.index("vtab-1k, val top-1") < out.index("vtab-1k, test top-1")
    )  # published results are of test images, and stand under such
    sets = [value for (task, _), value in scores.items() if data.TASKS[task].benchmark == "fgvc"]
    fgvc = table(out[out.index("| fgvc, ") : out.index("| published")])
    fgvc = dict(zip(fgvc["fgvc, test top-1 (%)"], fgvc["mlae"], strict=True))  # one line
    assert len(sets) == 5 and fgvc["cub"] == f"{sets[0]:.2f} (1)"
    assert fgvc["mean of tasks"] == f"{np.mean(sets):.2f} (1)"
    published = table(out[out.index("| published") :])
    assert (
        out.count("PARTIAL") == 1
        and "PARTIAL, no vtab-1k result: mlae rank=4 has 1 of 19 tasks" in out
    )
    assert "best epoch on the test set" in published["LoRA, r = 8 (from NOAH)"]


def tabulated(capsys, folder, *arguments):
    suite.main(["--table", str(folder), *arguments])
    captured = capsys.readouterr()
    return captured.out, captured.err


def refused(capsys, folder):
    with pytest.raises(SystemExit) as stop:
        suite.main(["--table", str(folder)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_tables_formats_agree(all_runs, capsys):
    folder, _ = all_runs
    rows = json.loads(tabulated(capsys, folder, "--format", "json")[0])
    lines = list(csv.DictReader(tabulated(capsys, folder, "--format", "csv")[0].splitlines()))
    assert len(rows["published"]) == 19 and len(lines) == len(rows["runs"])
    for line, row in zip(lines, rows["runs"], strict=True):
        for key, value in row.items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            assert line[key] == ("" if value is None else text)
    latex = tabulated(capsys, folder, "--format", "latex")[0]
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert r"smallnorb\_ele & " in latex
    for block in latex.strip().split("\n\n"):  # tabulars alone, of equal lines
        lines = block.splitlines()
        assert lines[0].startswith(r"\begin{tabular}{l") and lines[-1] == r"\end{tabular}"
        columns = lines[0].count("r") - len("tabular") + 6 + 1
        body = [line for line in lines if line.endswith(r"\\")]
        assert len(body) > 1 and {line.count("&") for line in body} == {columns - 1}
        assert [line for line in lines[1:-1] if line not in body] == [
            r"\toprule",
            r"\midrule",
            r"\bottomrule",
        ]


def test_latex_reads_every_character_of_a_name():
    line = suite.as_latex([["a_b", "50 % ± 1"], ["~x^{1}", "\\$&#"]]).splitlines()
    assert line[2] == r"a\_b & 50 \% $\pm$ 1 \\"
    tilde, hat, backslash = r"\textasciitilde{}", r"\textasciicircum{}", r"\textbackslash{}"
    assert line[4] == rf"{tilde}x{hat}\{{1\}} & {backslash}\$\&\# \\"


def test_published_rows_say_what_the_best_test_epoch_would_have_claimed(all_runs, capsys):
    folder, _ = all_runs
    rows = table(tabulated(capsys, folder)[0])
    assert rows["LoRA (2409.16434)"][:4] == ["75.24", "72.91", "-", "75.98"]
    published = json.loads(tabulated(capsys, folder, "--format", "json")[0])["published"]
    tuned = [entry for entry in published if entry["best_epoch"]]
    assert len(tuned) == 12
    assert all(float(entry["best_epoch"]) > float(entry["groups"]) for entry in tuned)


def test_a_subset_is_marked_and_left_out_of_means(all_runs, capsys):
    folder, _ = all_runs
    write_run(folder.parent / "subset", "dtd", 0, 99.0, official=False)
    write_run(folder.parent / "subset", "svhn", 0, 40.0)
    rows = table(tabulated(capsys, folder.parent / "subset")[0])
    assert rows["dtd"][0] == "99.00 (1) *" and rows["natural"][0] == "40.00 (1) [1 of 7 tasks]"


def test_seeds_that_differ_make_no_result(all_runs, capsys):
    folder, _ = all_runs
    next(folder.glob("dtd/1-False-")).rename(folder.parent / "aside")
    out = tabulated(capsys, folder)[0]
    assert "mlae rank=8 has 19 of 19 tasks with official data, of unequal seeds" in out
    rows = {}
    for row in json.loads(tabulated(capsys, folder, "--format", "json")[0])["runs"]:
        if row["benchmark"] == "vtab-1k" and row["configuration"] == "mlae rank=8":
            rows[row["task"]] = row
    assert not rows["natural"]["official"] and rows["natural"]["std"] is None
    assert rows["structured"]["official"] and rows["natural"]["n"] == 1
    assert not rows["mean of groups"]["official"]


def test_the_mean_of_groups_is_the_mean_of_tasks_applied_to_group_means():
    tasks = [{0: 10.0, 1: 20.0}, {0: 30.0, 1: 40.0}, {0: 90.0, 1: 90.0}]
    groups = [suite.mean_over(tasks[:2]), suite.mean_over(tasks[2:])]
    assert groups == [{0: 20.0, 1: 30.0}, {0: 90.0, 1: 90.0}]
    assert suite.mean_over(groups) == {0: 55.0, 1: 60.0}
    assert suite.mean_over(tasks) == {0: pytest.approx(130 / 3), 1: 50.0}
    assert suite.mean_over([{0: 10.0}, {0: 20.0, 1: 40.0}]) == {None: 20.0}


def test_the_same_weights_from_two_places_are_one_configuration(tmp_path, capsys):
    for seed, checkpoint in enumerate(["/a/x.npz", "/b/y.npz"]):
        options = {"checkpoint": checkpoint, "digest": "c0ffee1234"}
        write_run(tmp_path / "runs", "svhn", seed, 70.0 + seed, **options)
    out = tabulated(capsys, tmp_path / "runs")[0]
    assert table(out) == {
        "vtab-1k, test top-1 (%)": ["svhn"],  # one task: no empty rows, no means
        "mlae": ["70.50 ± 0.71 (2)"],
    }
    assert "published" not in out and "PARTIAL" not in out


def test_two_files_of_one_name_are_two_configurations(tmp_path, capsys):
    for digest, top1 in {"c0ffee1234": 40.0, "decaf56789": 50.0}.items():
        write_run(tmp_path / digest, "svhn", 0, top1, checkpoint="/a/x.npz", digest=digest)
    assert table(tabulated(capsys, tmp_path)[0]) == {
        "vtab-1k, test top-1 (%)": ["svhn"],
        "mlae checkpoint=c0ffee12": ["40.00 (1)"],
        "mlae checkpoint=decaf567": ["50.00 (1)"],
    }


def test_tables_of_nothing_or_of_damaged_runs(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    err = refused(capsys, tmp_path / "runs")
    assert err.count("\n") == 1 and "there is no finished run in" in err
    write_run(tmp_path / "runs", "dtd", 0, 70.0)
    next((tmp_path / "runs").rglob("metrics.json")).write_text("{")
    err = refused(capsys, tmp_path / "runs")
    assert err.count("\n") == 2 and "is left out" in err
    write_run(tmp_path / "runs", "svhn", 0, 60.0)
    write_run(tmp_path / "runs", "a_new_task", 0, 60.0)
    out, err = tabulated(capsys, tmp_path / "runs")
    assert table(out)["mlae"] == ["60.00 (1)"] and err.count("\n") == 2
    assert "mlae on a_new_task is unknown here" in err


CHOOSE = [*SMALL, "--lr", "1e-3", "8e-3", "1e30", "--choose", "lr", "--seed", "3", "4"]


def test_choosing_on_val200_and_no_look_at_the_test_before(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load, splits_read = data.load_data, []

    def watched(args):
        splits_read.append("val" if args.val else "test")
        return load(args)

    def searched():
        rows = pandas.read_csv("runs/runs.csv")
        return rows[rows["split"] == "val"]

    monkeypatch.setattr(data, "load_data", watched)
    words = [*CHOOSE, "--method", "mlae", "lora", "--epochs", "2", "--search-seed", "0", "1"]
    out = call(capsys, *words)
    assert splits_read == ["val", "test"]  # once each, and kept for the next run
    rows = searched()
    assert sorted(rows["method"]) == ["lora"] * 4 + ["mlae"] * 4  # 1e30 diverged
    for row in rows.to_dict("records"):
        metrics = json.loads(Path(row["run"], "metrics.json").read_text())
        assert metrics["val_top1"] == row["val_top1"] and metrics["seed"] == row["seed"]
    for method in ("mlae", "lora"):
        means = rows[rows["method"] == method].groupby("lr")["val_top1"].mean()
        assert means.idxmax() == 0.008
        words_of = f"lr=0.008 of lr=0.001 {means[0.001]:.2f}"
        assert f"chosen on val200, {method} on digits: {words_of}" in out
    assert out.count("note: that is the smallest or largest lr: try more values") == 2
    last = json.loads(out.splitlines()[-1])["rows"]
    assert [row["chosen"] for row in last] == [{"lr": 0.008}] * 2
    assert all(row["seeds"] == [3, 4] and row["configuration"] == row["method"] for row in last)
    monkeypatch.setattr(models, "create_model", None)  # nothing trains again
    again = call(capsys, *[word for word in words if word != "1e30"])
    assert again.splitlines()[-1] == out.splitlines()[-1]
    capsys.readouterr()
    suite.main(["--table", "runs", "--choose", "lr"])
    of_folder = capsys.readouterr().out
    suite.main(["--table", "runs/runs.csv", "--choose", "lr"])
    assert capsys.readouterr().out == of_folder


def finished(top1, *, split="test", official=True, usual=(), **own):
    """A finished run, of MLAE on the demo unless said otherwise."""
    identity = {"dataset": "digits", "method": "mlae", "model": "vit_nano", "val": split == "val"}
    identity |= own
    metrics = {
        "dataset": identity["dataset"],
        "model": "vit_nano",
        "data": "",
        "official": official,
    }
    arguments = identity | dict(usual)
    return Result(arguments, identity, metrics | {"seed": own["seed"]}, split, top1)


def test_a_row_is_named_by_what_sets_it_apart():
    usual = {"targets": ["attn.qkv"], "rank": 8}
    runs = [finished(80.0, seed=0, lr=0.1, mask_prob=p, usual=usual) for p in (0.0, 0.3)]
    runs.append(finished(80.0, seed=0, lr=0.1, usual=usual | {"mask_prob": 0.5}))
    runs.append(finished(70.0, seed=0, lr=0.2, method="lora", rank=8))
    mixture = {"method": "mor", "targets": ["attn.qkv"], "num_experts": 4}
    runs.append(finished(75.0, seed=0, lr=0.1, rank=4, **mixture))
    rows = suite.rows_of(runs)
    assert [row.configuration for row in rows] == [
        "mlae lr=0.1 mask_prob=0.0",
        "mlae lr=0.1 mask_prob=0.3",
        "mlae lr=0.1 mask_prob=0.5",
        "lora lr=0.2 rank=8",
        "mor lr=0.1 rank=4 targets=attn.qkv num_experts=4",
    ]


def test_subsets_alone_have_no_means():
    runs = [finished(80.0, seed=0, dataset=task, official=False) for task in ("dtd", "svhn")]
    assert [row.task for row in suite.rows_of(runs)] == ["dtd", "svhn"]
    runs.append(finished(80.0, seed=0, dataset="eurosat"))
    assert suite.rows_of(runs)[-1].task == "mean of tasks"


def test_the_table_does_not_depend_on_which_run_came_first():
    runs = [finished(60.0, seed=0, dataset="svhn", lr=0.1, official=False)]
    for task in ("dtd", "cifar"):
        runs.append(finished(70.0, seed=0, dataset=task, lr=0.2, official=False))
    runs.append(finished(80.0, seed=0, split="val", lr=0.1))
    printed = set()
    for order in itertools.permutations(runs):
        printed.add(suite.tabulate(suite.rows_of(order)))
    (only,) = printed
    assert re.search(r"\| cifar +\| dtd +\| svhn +\|\n", only)


def test_a_table_keeps_apart_what_was_tried_and_hides_no_run():
    tried = [finished(90.0, split="val", seed=0, lr=lr) for lr in (0.1, 0.2)]
    tested = [finished(80.0, seed=0, lr=0.1), finished(82.0, seed=1, lr=0.1)]
    rows = suite.rows_of([*tried, *tested], chosen=["lr"])
    assert [row.configuration for row in rows] == ["mlae lr=0.1", "mlae lr=0.2", "mlae"]
    assert [row.chosen for row in rows] == [{}, {}, {"lr": 0.1}] and rows[-1].top1 == 81.0
    with pytest.raises(RunError, match="--choose lr: digits, seed 1, has .*0.3"):
        suite.rows_of([*tested, finished(70.0, seed=1, lr=0.3)], chosen=["lr"])


def test_an_interrupted_search_chooses_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "--lr", "1e-3", "8e-3", "--choose", "lr", "--epochs", "2"]
    whole = call(capsys, *words, "--out", "whole").splitlines()[-1]
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit) as stop:
        call(capsys, *words, "--out", "parts")
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted: the same command goes on\n")
    assert call(capsys, *words, "--out", "parts").splitlines()[-1] == whole
    assert len(list(Path("parts/digits").iterdir())) == 3  # two trials and a run


def test_of_equals_the_smaller_value_is_chosen(capsys):
    def trial(lr, rank, *top1):
        arguments = {"dataset": "dtd", "method": "mlae", "lr": lr, "rank": rank}
        return suite.Trial(arguments, dict(enumerate(top1)))

    trials = [trial(3e-3, 8, 60.0, 62.0), trial(1e-3, 8, 61.0, 61.0), trial(2e-3, 8, 50.0)]
    trials += [trial(4e-3, 4, 10.0), trial(5e-3, 4, 20.0)]  # another setting
    assert suite.choose(trials, ["lr"], ["rank"]) == [trials[1], trials[4]]
    out = capsys.readouterr().out
    assert "mlae on dtd rank=8: lr=0.001 of lr=0.001 61.00, lr=0.002 50.00, lr=0.003 61.00" in out


def test_what_a_method_has_not_is_not_chosen_for_it(capsys):
    def trial(method, lr, p, top1):
        arguments = {"dataset": "dtd", "method": method, "lr": lr, "mask_prob": p}
        return suite.Trial(arguments, {0: top1})

    trials = [trial("mlae", 1, 0.0, 50.0), trial("mlae", 1, 0.5, 60.0)]
    trials += [trial("lora", 1, None, 40.0), trial("lora", 2, None, 30.0)]
    assert suite.choose(trials, ["lr", "mask_prob"], []) == trials[1:3]
    assert "lora on dtd: lr=1 of lr=1 40.00, lr=2 30.00" in capsys.readouterr().out


def test_what_diverged_with_one_seed_is_not_chosen():
    def trial(lr, *top1):
        arguments = {"dataset": "dtd", "method": "mlae", "lr": lr}
        return suite.Trial(arguments, dict(enumerate(top1)))

    trials = [trial(1e-3, 60.0, 61.0), trial(1e-2, 90.0)]  # its other seed diverged
    assert suite.choose(trials, ["lr"], []) == trials[:1]


def test_the_epochs_are_chosen_though_the_warm_up_follows_from_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "--mask-prob", 0, 0.5, "--epochs", 1, 2]  # the last one counts
    out = call(capsys, *words, "--choose", "epochs")
    rows = pandas.read_csv("runs/runs.csv")
    assert sorted(rows[rows["split"] == "test"]["mask_prob"]) == [0.0, 0.5]
    assert out.count("chosen on val200, mlae on digits mask_prob=0.") == 2


def test_searches_in_one_folder_are_told_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "--epochs", 1, "--lr", 1e-3, 8e-3, "--choose", "lr"]
    call(capsys, *words)
    out = call(capsys, *words, "--freeze-lambda")
    assert "chosen on val200, mlae on digits freeze_lambda=True: lr=" in out
    rows = pandas.read_csv("runs/runs.csv")
    assert rows.groupby("split")["freeze_lambda"].sum().to_dict() == {"test": 1, "val": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--choose", "lr"], "--choose lr: give --lr several values to choose from"),
        (["--choose", "seed", "--seed", "0", "1"], "--choose seed: give --seed several values"),
        (["--choose", "no-such"], "--choose no-such: give --no-such several values"),
        (["--choose", "lr", "--lr", "1e-3", "1e-2", "--val"], "leave --val out"),
    ],
)
def test_what_cannot_be_chosen(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        suite.main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_budget_picks_the_nearest_rank(capsys):
    args = runs.train_parser().parse_args(["--budget", "20k"])
    args = runs.settle(args)
    assert args.rank == 9 and args.budget is None  # 6 layers x (96 + 288 + 1) a rank: 20,790
    assert "--budget 20,000: rank 9 is nearest, with 20,790 parameters" in capsys.readouterr().out
    with pytest.raises(ModelError, match="--budget: full has no rank to choose"):
        runs.settle(runs.train_parser().parse_args(["--budget", "20k", "--method", "full"]))
    for text, count in (("0.3M", 300_000), ("50K", 50_000), ("1234", 1234)):
        assert runs.amount(text) == count
