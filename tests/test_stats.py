"""stats.py against scipy, and suite.py --table --against."""

import csv
import json

import numpy as np
import pytest
import scipy.stats

import suite
from runs import RunError
from suite import Row


def test_paired_difference_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = (dict(enumerate(90 + rng.normal(size=6))) for _ in range(2))
    mean, low, high, n = suite.paired_difference(a, b | {7: 1.0})
    found = scipy.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert n == 6 and mean == pytest.approx(np.mean(list(a.values())) - np.mean(list(b.values())))
    assert (low, high) == pytest.approx((found.low, found.high))
    shuffled = dict(reversed(b.items()))  # by seed, not by order
    assert suite.paired_difference(a, shuffled) == pytest.approx((mean, low, high, n))


def test_few_common_seeds():
    assert suite.paired_difference({0: 3.0, 1: 5.0}, {1: 4.0}) == (1.0, None, None, 1)
    assert suite.paired_difference({0: 3.0}, {1: 4.0}) == (None, None, None, 0)


def row(configuration, scores, split="test", **others):
    own = Row("demo", "digits", True, 0.0, None, list(scores), len(scores), **others)
    own.benchmark, own.split, own.configuration, own.scores = "demo", split, configuration, scores
    return own


def test_numbers_in_names_sort_as_numbers():
    names = ["mlae rank=16", "mlae rank=2", "lora rank=2 lr=0.02", "lora rank=2 lr=2e-05", "full"]
    assert sorted(names, key=suite.natural) == [names[i] for i in (4, 3, 2, 1, 0)]


def test_each_table_is_compared_by_itself():
    rows = [
        row("mlae mask_prob=0.0 lr=0.004", {0: 90.0, 1: 92.0}),
        row("mlae mask_prob=0.5 lr=0.008", {0: 89.0, 1: 90.0}),
        row("mlae mask_prob=0.0 lr=0.004", {0: 1.0}, "val"),
        row("mlae mask_prob=0.0 lr=0.008", {0: 2.0}, "val"),
    ]
    suite.compare(rows, "mask-prob=0")  # of val two fit: not compared
    assert [one.difference for one in rows] == [None, -1.5, None, None]
    assert rows[1].against == rows[0].configuration and rows[1].pairs == 2
    half = scipy.stats.t.ppf(0.975, 1) * 0.5
    assert (rows[1].low, rows[1].high) == pytest.approx((-1.5 - half, -1.5 + half), abs=0.006)
    suite.compare(rows, "--mask-prob=0 lr=4e-3")
    assert rows[3].difference == 1.0 and rows[3].low is None


def test_means_over_unequal_tasks_are_not_compared():
    whole = row("lora", {0: 70.0}, of=19, tasks=19)
    part = row("mlae", {0: 75.0}, of=19, tasks=3)
    part.official = False
    whole.task = part.task = "mean of tasks"
    tasks = [row("lora", {0: 1.0}), row("mlae", {0: 3.0})]
    suite.compare([whole, part, *tasks], "lora")
    assert part.difference is None and tasks[1].difference == 2.0
    part.official = True
    suite.compare([whole, part], "lora")
    assert part.difference == 5.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("snell", "'snell' fits none of these configurations: lora, mlae a=1, mlae a=2"),
        ("mlae", "'mlae' fits several of these configurations: mlae a=1, mlae a=2"),
    ],
)
def test_what_fits_not_one_configuration_is_refused(words, message):
    rows = [row(name, {0: 1.0}) for name in ("mlae a=1", "mlae a=2", "lora")]
    with pytest.raises(RunError, match=message):
        suite.compare(rows, words)


def test_the_table_of_this_repository_against_lora(capsys):
    def printed(form):
        suite.main(["--table", "results/methods.csv", "--against", "lora", "--format", form])
        return capsys.readouterr().out

    scores = {one["configuration"]: one for one in json.loads(printed("json"))["runs"]}
    base, ours = scores["lora lr=0.02"], scores["mlae lr=0.008"]
    by_seed = [ours["scores"][seed] - base["scores"][seed] for seed in base["scores"]]
    assert ours["difference"] == pytest.approx(np.mean(by_seed), abs=0.006)
    words = f"{ours['difference']:+.2f} [{ours['low']:.2f}, {ours['high']:.2f}] (5)"
    line = [text for text in printed("markdown").splitlines() if words in text]
    assert len(line) == 1 and line[0].startswith("| mlae lr=0.008 ")
    assert words in printed("latex")
    lines = {one["configuration"]: one for one in csv.DictReader(printed("csv").splitlines())}
    assert float(lines["mlae lr=0.008"]["low"]) == ours["low"]
    assert lines["lora lr=0.02"]["difference"] == ""


def test_against_needs_a_table(capsys):
    with pytest.raises(SystemExit) as stop:
        suite.main(["--against", "lora"])
    assert stop.value.code == 2 and "--against is for --table" in capsys.readouterr().err
