"""suite.py: many runs in one command, and the table of what has been run."""

import io
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.stats
from conftest import stop_after, write_lists

import data
import runs
import splits
import suite
import train
from runs import RunError

SMALL = "--device cpu --model vit_nano --epochs 1 --img-size 7 --batch-size 250".split()


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs suite.py, which has to end with this code; returns all that it printed, or the error."""
    monkeypatch.chdir(tmp_path)

    def run(*words, ends=0):
        code = 0
        try:
            suite.main([*map(str, words)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert code == ends
        return err.splitlines()[-1] if code else out

    return run


def ran(dataset, seed, top1=None, *, digest=None, answers=None, images="same", **changes):
    """The files of a finished run; changes are settings that differ from the defaults, `answers`
    whether each of these `images` was right."""
    folder = Path("runs", dataset, str(len([*Path().rglob("metrics.json")])))
    folder.mkdir(parents=True)
    identity = {"method": "mlae", "model": "vit", "dataset": dataset, "seed": seed} | changes
    config = {"arguments": {"rank": 8, "targets": ["attn.qkv"], "val": False} | identity}
    identity |= {"checkpoint": digest} if digest else {}
    config |= {"identity": identity, "versions": {"torch": "2.14.1"}}
    (folder / "config.json").write_text(json.dumps(config))
    metrics = {"dataset": dataset, "seed": seed, "official": True, "data": "originals"}
    metrics |= {"model": "vit:file", "run": str(folder)}
    if answers is not None:
        np.save(folder / "correct.npy", np.packbits(answers))
        metrics |= {"images": len(answers), "digest": images}
        top1 = round(100 * float(np.mean(answers)), 2)
    metrics["val_top1" if "val" in changes else "test_top1"] = float(top1)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def edit(run, **changes):
    """Change what a run's metrics.json says."""
    file = Path(run["run"], "metrics.json")
    file.write_text(json.dumps(run | changes))


def pretend(monkeypatch, score):
    """Makes up runs of this top-1, or None if they diverge; returns their arguments."""
    started = []

    def run(args, load):
        load(args)
        started.append(args)
        top1 = score(args)
        if top1 is None:
            raise runs.Diverged("the loss is nan")
        return ran(top1=top1, **runs.identity(args, runs.usual(args)))

    monkeypatch.setattr(data, "load_data", lambda args: None)
    monkeypatch.setattr(train, "run", run)
    return started


def last_rows(out):
    return json.loads(out.splitlines()[-1])["rows"]


def table(text):
    """{first cell: other cells} of the markdown tables' lines."""
    cells = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *others = (cell.strip() for cell in line.strip("|").split("|"))
            cells[name] = others
    return cells


def test_a_suite_runs_what_is_there_and_lists_the_rest(cifar, call, monkeypatch):
    monkeypatch.setattr(splits, "prove_labels", lambda *arguments: splits.Proof(None))
    kitti = cifar.parent / "kitti"  # a whole task, and of cifar a subset
    kitti.mkdir()
    (kitti / "images").symlink_to(cifar / "images")
    write_lists(kitti, 711, 0)
    out = call("--dataset", "vtab", *SMALL)
    rows, last = table(out), {row["dataset"]: row for row in last_rows(out)}
    (file,) = Path("runs/kitti").glob("*/metrics.json")
    top1 = json.loads(file.read_text())["test_top1"]
    assert rows["cifar"][0].endswith(" *") and rows["natural"] == ["-"]  # a subset is in no mean
    assert rows["kitti"] == [f"{top1:.2f} (1)"]
    assert rows["structured"] == [f"{top1:.2f} (1) [1 of 8 tasks]"]
    assert rows["mean of groups"] == ["-"] and last["mean of groups"]["test_top1"] is None
    assert rows["MLAE (Wang et al. 2024)"][:3] == ["78.8", "-", "90.9"]
    assert out.count("PARTIAL") == 1 and out.count("\nleft out: ") == 17
    assert last["kitti"]["official"] and last["kitti"]["test_top1"] == top1


def test_the_product_of_all_values_runs_and_the_same_images_are_read_once(call, monkeypatch):
    started, reads = pretend(monkeypatch, lambda args: 50.0), []
    monkeypatch.setattr(data, "load_data", reads.append)
    words = "--method mlae lora --mask-prob 0.1 0.5 --targets attn.qkv mlp.fc1,mlp.fc2"
    call(*words.split(), "--img-size", 14, 21)
    found = {(run.method, run.mask_prob, *run.targets) for run in started}
    want = set()
    for targets in [("attn.qkv",), ("mlp.fc1", "mlp.fc2")]:
        want |= {("lora", None, *targets), ("mlae", 0.1, *targets), ("mlae", 0.5, *targets)}
    assert found == want and len(started) == 12
    assert [args.img_size for args in reads] == [14, 21]


def test_a_suite_goes_on_past_what_fails_and_waits_for_other_processes(call, monkeypatch):
    waits = []
    errors = {("dtd", 0): data.DataError("test.txt, line 1")}
    errors["kitti", 1] = RuntimeError("DefaultCPUAllocator: not enough memory")
    errors["kitti", 2] = runs.OtherImages("it was stopped on other training images")

    def score(args):
        if (args.dataset, args.seed) in errors:
            raise errors[args.dataset, args.seed]
        if not waits:
            raise runs.Busy("another process is at it")
        return 50.0 if args.lr < 1 else None

    pretend(monkeypatch, score)
    monkeypatch.setattr("time.sleep", waits.append)
    out = call("--dataset", "dtd", "kitti", "--lr", 1e-3, 1e30, "--seed", 0, 1, 2)
    seeds = [f"mlae on kitti, seed {seed}: " for seed in range(3)]
    for words in ("dtd: test.txt", *seeds):
        assert f"left out: {words}" in out
    assert [row["n"] for row in last_rows(out) if row["dataset"] == "kitti"] == [1]


BAD = ["--method mlea", "--dataset fgvc", "--table .", "--choose lr", "--choose seed --seed 0 1"]


@pytest.mark.parametrize("words", [*BAD, "--choose lr --lr 1e-3 1e-2 --val"])
def test_what_cannot_be_done_is_one_line(call, words):
    assert words.split()[0] in call(*words.split(), ends=2) and not Path("runs").exists()


def test_choosing_on_val200_and_no_look_at_the_test_before(call, monkeypatch):
    tops = {(0.001, 0): 60.0, (0.001, 1): 64.0, (0.008, 0): 61.0, (0.008, 1): 62.0}

    def score(args):
        if args.val:
            return tops.get((args.lr, args.seed))  # that of 1e30 diverges
        assert len(pandas.read_csv("runs/runs.csv")) >= 4  # the search is on disk
        return 70.0

    started = pretend(monkeypatch, score)
    out = call(*"--lr 1e-3 8e-3 1e30 --choose lr --seed 3 4 --search-seed 0 1".split())
    assert [args.val for args in started] == [True] * 6 + [False] * 2
    assert "chosen on val200, mlae on digits: lr=0.001 of lr=0.001 62.00, lr=0.008 61.50\n" in out
    (last,) = last_rows(out)
    assert last["seeds"] == [3, 4] and last["chosen"] == {"lr": 0.001}


def test_an_interrupted_search_chooses_the_same_and_nothing_runs_twice(call, monkeypatch):
    words = [*SMALL, *"--method linear --epochs 2 --lr 1e-3 8e-3 --choose lr".split()]
    whole = last_rows(call(*words, "--out", "whole"))
    stop_after(monkeypatch, 1)
    call(*words, "--out", "parts", ends=130)
    assert last_rows(call(*words, "--out", "parts")) == whole
    monkeypatch.setattr(train.models, "create_model", None)  # nothing trains again
    assert last_rows(call(*words, "--out", "parts")) == whole
    assert pandas.read_csv("parts/runs.csv")["correct"].notna().sum() == 3


CHOICES = {  # words -> settings, the top-1 on val200 of their values, and the values that are tested
    "--lr 3 1 2 --rank 8 4 --choose lr --search-seed 0 1": (  # of equals the smaller; 2 diverged
        ["rank", "lr", "seed"],
        {(8, 3, 0): 60, (8, 3, 1): 62, (8, 1, 0): 61, (8, 1, 1): 61, (8, 2, 0): 90, (4, 2, 0): 5},
        [(8, 1, 0), (4, 2, 0)],
    ),
    "--method mlae lora --lr 1 2 --mask-prob 0 0.5 --choose lr mask-prob": (
        ["method", "lr", "mask_prob"],
        {("mlae", 2, 0): 60, ("mlae", 1, 0.5): 70, ("lora", 1, None): 40, ("lora", 2, None): 30},
        [("mlae", 1, 0.5), ("lora", 1, None)],
    ),
    "--mask-pattern random hourglass --choose mask-pattern": (  # a setting of another name
        ["pattern"],
        {("random",): 1, ("hourglass",): 2},
        [("hourglass",)],
    ),
    "--mask-prob 0 0.5 --freeze-lambda --epochs 10 20 --choose epochs": (  # the warm-up follows
        ["mask_prob", "epochs"],
        {(0, 10): 1, (0, 20): 2, (0.5, 10): 4, (0.5, 20): 3},
        [(0, 20), (0.5, 10)],
    ),
}


@pytest.mark.parametrize("words", CHOICES)
def test_the_best_mean_is_chosen_for_each_method_and_other_setting(call, monkeypatch, words):
    names, tops, want = CHOICES[words]

    def values(args):
        return tuple(getattr(args, name) for name in names)

    started = pretend(monkeypatch, lambda args: tops.get(values(args)) if args.val else 50)
    call(*words.split())
    assert [values(args) for args in started if not args.val] == want


@pytest.fixture
def all_runs(call):
    """19 tasks x 2 seeds of one configuration, 5 x 1 of FGVC, three of another configuration."""
    scores = {}
    for i, task in enumerate([*data.tasks_of("vtab-1k"), *data.tasks_of("fgvc")]):
        for seed in (0, 1) if task.benchmark == "vtab-1k" else (0,):
            scores[task.name, seed] = 50.0 + 2 * i + 3 * seed * (i % 3)
            ran(task.name, seed, scores[task.name, seed])
    for seed in range(3):
        ran("dtd", seed, 70.0 + seed, rank=4)
    ran("dtd", 0, 66.0, val=True)
    return scores


def test_the_table_of_all_runs(all_runs, call):
    out = call("--table", "runs")
    rows = table(out[out.index("| vtab-1k, test") : out.index("| fgvc, ")])
    groups = {}
    for task in data.tasks_of("vtab-1k"):
        groups.setdefault(task.group, []).append([all_runs[task.name, seed] for seed in (0, 1)])
    means = {group: np.mean(values, 0) for group, values in groups.items()}  # (2,) over seeds
    means["mean of groups"] = np.mean(list(means.values()), 0)
    means["mean of tasks"] = np.mean([value for values in groups.values() for value in values], 0)
    for name, values in means.items():
        assert rows[name][1] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (2)"
    assert rows["vtab-1k, test top-1 (%)"] == ["mlae rank=4", "mlae rank=8"]
    assert rows["caltech101"][0] == "-" and rows["dtd"][0] == "71.00 ± 1.00 (3)"
    sets = [all_runs[task.name, 0] for task in data.tasks_of("fgvc")]
    fgvc = table(out[out.index("| fgvc, ") : out.index("| published")])["mlae"]
    assert fgvc == [f"{score:.2f} (1)" for score in [*sets, np.mean(sets)]]
    assert out.count("PARTIAL") == out.count("mlae rank=4 has 1 of 19 tasks") == 1
    known = suite.read_runs("runs")
    rows, other = suite.rows_of(known), suite.rows_of(known[::-1])  # whichever came first
    assert suite.tabulate(rows) == suite.tabulate(other)
    suite.compare(rows, "rank=4")  # means over unequal tasks are not compared
    assert [row["task"] for row in rows if row["against"]] == ["dtd"]


def test_the_tables_formats_agree(all_runs, call):
    rows = json.loads(call("--table", "runs", "--format", "json"))["runs"]
    lines = pandas.read_csv(io.StringIO(call("--table", "runs", "--format", "csv")), dtype=str)
    for line, row in zip(lines.fillna("").to_dict("records"), rows, strict=True):
        assert {name: suite.from_cell(text) for name, text in line.items()} == row
    latex = call("--table", "runs", "--format", "latex")
    assert f"% {suite.PROTOCOL}" in latex and "% dtd: originals" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert r"smallnorb\_ele & " in latex and r" $\pm$ " in latex


def test_a_csv_of_the_runs_prints_the_same_tables_and_weights_are_told_apart_by_digest(call):
    ran("svhn", 0, 70.0, checkpoint="/a/x.npz", digest="c0ffee1234", rank=4)
    ran("svhn", 1, 71.0, checkpoint="/b/y.npz", digest="c0ffee1234", rank=4)
    ran("svhn", 0, 50.0, checkpoint="/a/x.npz", digest="decaf56789", mask_prob={"a": 0.5})
    files = sorted(Path("runs").rglob("metrics.json"))
    seen = {}
    for file in [*files, files[0]]:
        suite.add_to_table("runs", file.parent, seen)
    known = pandas.read_csv("runs/runs.csv")
    assert len(known) == 3 and set(known["rank"]) == {4, 8} and "torch" in known
    out = call("--table", "runs", "--against", "rank=4")
    assert "70.50 ± 0.71 (2)" in out and "c0ffee12" in out and "decaf567" in out
    assert call("--table", "runs/runs.csv", "--against", "rank=4") == out
    ran("a|b", 0, 50.0, folder="c0ffee1234")
    assert r"| a\|b c0ffee " in call("--table", "runs")  # in markdown it is no border
    assert ",a|b c0ffee," in call("--table", "runs", "--format", "csv")


def test_seeds_that_differ_make_no_result(all_runs):
    ran("dtd", 2, 90.0)
    rows = suite.rows_of(suite.read_runs("runs"))
    rows = {row["task"]: row for row in rows if row["configuration"] == "mlae rank=8"}
    assert rows["structured"]["official"] and not rows["mean of groups"]["official"]
    natural = rows["natural"]
    assert not natural["official"] and natural["std"] is None and natural["n"] == 2
    own = [row["top1"] for row in rows.values() if row["group"] == "natural"]
    assert natural["top1"] == pytest.approx(np.mean(own), abs=0.006)


DAMAGE = [{"data": 1}, {"images": "4"}, {"images": 3}, {"test_top1": "much"}, {"test_top1": 70.0}]
DAMAGE += [{"dataset": "a_new_task"}]


def test_damaged_and_unknown_runs_are_left_out_in_one_line_each(call, capsys):
    bad = [ran("dtd", 0, answers=[1, 1, 0, 1]) for _ in [*DAMAGE, None]]
    for run, damage in zip(bad, DAMAGE, strict=False):
        edit(run, **damage)
    Path(bad[-1]["run"], "metrics.json").write_text("{")
    edit(ran("svhn", 0, 60.0), data="\x1b[2J")
    suite.main(["--table", "runs"])
    out, err = capsys.readouterr()
    assert table(out)["mlae"] == ["60.00 (1)"] and (out + err).replace("\n", "").isprintable()
    assert {line.split(" is left")[0] for line in err.splitlines()} == {run["run"] for run in bad}
    Path("other.csv").write_text("a,b\n1,2\n")
    assert "other.csv" in call("--table", "other.csv", ends=2)


def test_a_row_is_named_by_what_sets_it_apart_and_rows_sort_by_numbers(call):
    for p in (0.3, 0.0):
        ran("svhn", 0, 80.0, lr=0.1, mask_prob=p)
    for lr in (0.2, 2e-5):
        ran("svhn", 0, 70.0, method="lora", lr=lr)
    for rank in (16, 4):
        ran("svhn", 0, 75.0, method="mor", lr=0.1, rank=rank, num_experts=4)
    names = ["lora lr=2e-05", "lora lr=0.2"]
    names += [f"mlae mask_prob={p} lr=0.1" for p in (0.0, 0.3)]
    names += [f"mor rank={rank} num_experts=4 lr=0.1" for rank in (4, 16)]
    assert list(table(call("--table", "runs")))[1:] == names


def test_a_table_keeps_apart_what_was_tried_and_hides_no_run(call):
    for lr in (0.1, 0.2):
        ran("svhn", 0, 90.0, val=True, lr=lr)
    for seed in (0, 1):
        ran("svhn", seed, 80.0 + 2 * seed, lr=0.1)
    rows = suite.rows_of(suite.read_runs("runs"), ["lr"])
    chosen = {row["configuration"]: (row["chosen"], row["top1"]) for row in rows}
    assert chosen == {"mlae lr=0.1": ({}, 90), "mlae lr=0.2": ({}, 90), "mlae": ({"lr": 0.1}, 81)}
    ran("svhn", 1, 70.0, lr=0.3)
    with pytest.raises(RunError, match="--choose lr: svhn, seed 1"):
        suite.rows_of(suite.read_runs("runs"), ["lr"])


def test_paired_differences_are_scipys_in_each_table_by_itself(call, capsys):
    low, high = [90.0, 92.0, 91.0], [89.0, 90.0, 92.5]
    for seed in (2, 0, 1):
        ran("svhn", seed, low[seed], mask_prob=0.0)
        ran("svhn", 2 - seed, high[2 - seed], mask_prob=0.5)
    ran("svhn", 7, 1.0, mask_prob=0.5)  # without a partner
    for lr in (0.1, 0.2):
        ran("svhn", 0, 1.0, val=True, mask_prob=0.0, lr=lr)
    rows = suite.rows_of(suite.read_runs("runs"))
    suite.compare(rows, "--mask-prob=0")  # of val two fit
    assert "vtab-1k, val is not compared" in capsys.readouterr().err
    (row,) = (row for row in rows if row["against"])
    ends = scipy.stats.ttest_rel(high, low).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx(tuple(ends), abs=0.006)
    assert (row["difference"], row["pairs"], row["split"]) == (-0.5, 3, "test")
    suite.compare(rows, "lr=1e-1")
    assert [row["difference"] for row in rows if row["split"] == "val"].count(0.0) == 1
    assert "snell" in call("--table", "runs", "--against", "snell", ends=2)
    assert "mask_prob=0.5" in call("--table", "runs", "--against", "mlae", ends=2)  # fits several


def test_the_interval_over_seeds_and_images_is_that_of_a_plain_bootstrap(call):
    rng, answers = np.random.default_rng(2), {}
    hard = rng.random(203)  # the images differ more than the seeds do
    for p in (0.0, 0.5):
        for seed in (1, 3, 0, 2):
            right = rng.random(203) < 0.9 * np.roll(hard, int(100 * p)) + 0.02 * seed
            answers[p, seed] = right
            ran("svhn", seed, answers=right, mask_prob=p)
        ran("dtd", 0, answers=[p > 0] * 9, mask_prob=p)
        ran("dtd", 1, answers=[p > 0] * 9, mask_prob=p)
    ran("svhn", 4, answers=[True] * 203, mask_prob=0.5)  # without a partner
    rows = suite.rows_of(suite.read_runs("runs"))
    suite.compare(rows, "mask_prob=0")
    same, row = sorted((row for row in rows if row["against"]), key=lambda row: row["task"])
    assert (same["image_low"], same["image_high"]) == (100, 100)  # all alike: no width
    means = []
    for _ in range(4000):
        images, drawn = rng.integers(203, size=203), []
        for seed in range(4):
            drawn.append(answers[0.5, seed][images].mean() - answers[0.0, seed][images].mean())
        means.append(100 * np.mean(drawn))
    by_seed = [100 * (answers[0.5, s].mean() - answers[0.0, s].mean()) for s in range(4)]
    of_seeds = scipy.stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    half = np.hypot((of_seeds.high - of_seeds.low) / 2, 1.96 * np.std(means))
    ends = row["image_low"], row["image_high"]
    assert ends == pytest.approx((np.mean(by_seed) - half, np.mean(by_seed) + half), abs=0.7)
    words = "--table runs --against mask_prob=0".split()
    assert f"(4); with images [{ends[0]}, {ends[1]}]" in call(*words)
    for file in Path("runs").rglob("metrics.json"):
        suite.add_to_table("runs", file.parent, {})
    assert call("--table", "runs/runs.csv", *words[2:]) == call(*words)


def test_a_row_is_written_once_and_anew_when_its_run_has_changed(call, monkeypatch):
    ran("svhn", 0, 70.0)
    (file,) = Path("runs").rglob("metrics.json")
    seen, locked = {}, []
    lock = suite.runs.lock
    monkeypatch.setattr(suite.runs, "lock", lambda *a, **b: locked.append(1) or lock(*a, **b))
    for _ in range(3):
        suite.add_to_table("runs", file.parent, seen)
    assert len(locked) == 1
    file.write_text(file.read_text().replace("70.0", "71.0"))
    suite.add_to_table("runs", file.parent, seen)
    assert list(pandas.read_csv("runs/runs.csv")["top1"]) == [71.0]
    ran("svhn", 1, 60.0)  # another process writes this one
    for other in Path("runs").rglob("metrics.json"):
        suite.add_to_table("runs", other.parent, {})
    suite.add_to_table("runs", file.parent, seen)
    assert sorted(pandas.read_csv("runs/runs.csv")["top1"]) == [60.0, 71.0]
    Path("runs/runs.csv").unlink()
    suite.add_to_table("runs", file.parent, seen)
    assert list(pandas.read_csv("runs/runs.csv")["top1"]) == [71.0]


def test_without_answers_to_the_same_images_the_interval_is_over_seeds_alone(call, capsys):
    for seed in (0, 1):
        for p in (0.0, 0.5):
            ran("svhn", seed, answers=[1, 0, 1], mask_prob=p, images=f"digest {p}")
            ran("dtd", seed, 60.0, mask_prob=p)
            ran("kitti", seed, answers=[1, 0, 1], mask_prob=p)
    suite.main(["--table", "runs", "--against", "mask_prob=0"])
    out, err = capsys.readouterr()
    assert out.count("+0.00 [0.00, 0.00] (2)") == 3 and out.count("with images") == 1
    assert err.count("stored for") == 1
    assert "mlae mask_prob=0.5 on svhn" in err and "on dtd" in err and "on kitti" not in err


def test_a_table_says_what_it_does_not_show(call, capsys):
    for lr in (0.1, 0.2):
        ran("svhn", 0, 90.0, val=True, lr=lr)
    old = Path(ran("svhn", 0, 80.0, lr=0.1)["run"])
    ran("svhn", 0, 81.0, lr=0.1)
    ran("dtd", 0, 70.0, lr=0.1)  # as it was run: nothing was searched for it
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"code": "other"}))
    suite.main(["--table", "runs", "--choose", "lr"])
    out, err = capsys.readouterr()
    assert f"hide {old.relative_to('runs')}" in err and "2 versions of the code" in err
    lines = [line.split(": ")[0] for line in out.splitlines() if "chosen on" in line]
    assert lines == ["svhn, mlae"] and "dtd, mlae: lr 0.1 as run" in out
