"""Every result on README.md and docs/results.md is the result of runs in results/."""

import csv
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest

import data
from files import read_log
from runs import collect
from stats import paired_difference
from table import rows_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
MEAN = re.compile(r"\d+\.\d{2,3} ± \d+\.\d{2,3}")  # accuracies have two digits, similarities three
SINGLE = re.compile(r"\d+\.\d\d \(1\)")  # of one seed
PRINTED = re.compile(r"(?:test top-1|mean over classes) \d+\.\d\d %")  # by train.py and eval.py
TRIAL = re.compile(r"lr=[\d.e-]+ \d+\.\d\d")  # what a search prints
DIFFERENCE = re.compile(r"[+-]?\d+\.\d\d \[-?\d+\.\d\d, -?\d+\.\d\d\]")


def experiments():
    """The folders below results/ that hold runs, and the finished runs of each."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        yield folder, collect(folder)


def spread(values, digits):
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@pytest.fixture(scope="module")
def known():
    """(means, differences) of all runs, as the tables print them; means are of one seed, too."""
    means, differences = set(), set()
    for folder, results in experiments():
        rows = rows_of(results)
        for result in results:
            means.add(f"test top-1 {result.top1:.2f} %")
            of_classes = result.metrics.get("test_mean_class_top1")
            if of_classes is not None:
                means.add(f"mean over classes {of_classes:.2f} %")
        for row in rows:
            if row.std is None:
                means.add(f"{row.top1:.2f} (1)")
            else:
                means.add(f"{row.top1:.2f} ± {row.std:.2f}")
        for a, b in itertools.permutations(rows, 2):
            mean, low, high, n = paired_difference(a.scores, b.scores)
            if n > 1:
                differences.add(f"{round(mean, 2) + 0.0:+.2f} [{low:.2f}, {high:.2f}]")
        means |= similarities(folder)
    means |= pruned()
    return means, differences


def similarities(folder):
    """Of the experts as training ended, over the seeds of each configuration."""
    by_settings = {}
    for log in folder.rglob("log.csv"):
        rows = read_log(log)
        settings = re.sub(r"-seed\d+-\w+$", "", log.parent.name)
        if "similarity" in rows[-1]:
            by_settings.setdefault(settings, []).append(rows[-1]["similarity"])
    return {spread(values, 3) for values in by_settings.values() if len(values) > 1}


def pruned():
    by_count = {}
    with open(RESULTS / "pruning.csv", newline="") as file:
        for row in csv.DictReader(file):
            key = row["mask_prob"], row["experts"]
            by_count.setdefault(key, []).append(float(row["test_top1"]))
    return {spread(values, 2) for values in by_count.values()}


@pytest.fixture(scope="module")
def trials():
    """The means of every search over its seeds, as suite.py prints them."""
    found = set()
    for path in RESULTS.rglob("search.csv"):
        scores = {}
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                settings = re.sub(r"seed\d+-val-\w+$", "", row["run"])
                key = row["lr"], settings
                scores.setdefault(key, []).append(float(row["val_top1"]))
        for (lr, _), values in scores.items():
            found.add(f"lr={lr} {statistics.mean(values):.2f}")
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_every_number_is_a_result(known, trials, page):
    text = (ROOT / page).read_text()
    means, differences = known
    found = MEAN.findall(text)
    assert len(found) > 2 and not set(found) - means
    assert not set(SINGLE.findall(text) + PRINTED.findall(text)) - means
    assert not set(DIFFERENCE.findall(text)) - differences
    assert not set(TRIAL.findall(text)) - trials


def test_runs_name_no_place_of_the_machine_that_made_them():
    for _, results in experiments():
        for result in results:
            assert not Path(result.metrics["run"]).is_absolute()
            assert not Path(result.arguments["data_dir"]).is_absolute()


def test_the_page_names_the_versions_of_its_runs():
    used = set()
    for path in RESULTS.rglob("config.json"):
        versions = json.loads(path.read_text())["versions"]
        used.add(f"torch {versions['torch'].split('+')[0]}, timm {versions['timm']}")
    text = (ROOT / "docs" / "results.md").read_text()
    assert set(re.findall(r"torch \d[\d.]*\d, timm \d[\d.]*\d", text)) == used


def test_each_search_says_what_was_chosen_among_what():
    searches = sorted(RESULTS.rglob("search.csv"))
    assert searches
    for path in searches:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        chosen = [row for row in rows if row["chosen"] == "1"]
        assert 0 < len(chosen) < len(rows), path


def table_after(text, heading):
    """{first cell: the other cells} of the first markdown table whose head begins so."""
    lines = text[text.index(f"| {heading}") :].split("\n\n")[0].splitlines()
    cells = {}
    for line in lines[2:]:
        name, *values = (cell.strip() for cell in line.strip("|").split("|"))
        cells[name] = values
    return cells


def test_hours_follow_from_the_products_that_were_counted():
    with open(RESULTS / "flops.json") as file:
        counted = json.load(file)
    hours = table_after((ROOT / "docs" / "results.md").read_text(), "GPU hours")
    per_image = {}
    for method, gflop in counted["gflop_per_step"].items():
        per_image[method] = gflop / counted["batch_size"]
    for method, found in hours.items():
        want = []
        for benchmark in ("vtab-1k", "fgvc"):
            sizes = [task.sizes for task in data.tasks_of(benchmark)]
            train, val, test = (sum(column) for column in zip(*sizes, strict=True))
            step, scoring = per_image[method], per_image["linear"]
            search = 4 * (100 * train * step + val * scoring)
            seed = 100 * (train + val) * step + test * scoring
            want += [search, seed, search + 5 * seed]  # GFLOP
        assert found == [f"{gflop / 1e5 / 3600:.1f}" for gflop in want]


def test_published_rows_are_those_of_the_file():
    with open(RESULTS / "published.csv", newline="") as file:
        known = {row["method"]: row for row in csv.DictReader(file)}
    quoted = table_after((ROOT / "docs" / "results.md").read_text(), "published")
    for name, values in quoted.items():
        row = known[name.removesuffix(", best epoch on the test set")]
        own = [row[column] or "-" for column in ("groups", "tasks", "fgvc", "best_epoch")]
        assert values == own, name
