"""Every number on the pages about results is one of the runs in results/."""

import base64
import importlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.stats

import suite

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
MADE = (RESULTS / "README.md").read_text()  # how the runs were made
# a mean, one seed, or a line of train.py and eval.py; accuracies have two digits, similarities three
NUMBER = r"\d+\.\d{2,3} ± \d+\.\d{2,3}|\d+\.\d{2,3} \(1\)"
NUMBER += r"|(?:test top-1|mean over classes) \d+\.\d\d %"
DIFFERENCE = r"[+-]?\d+\.\d\d \[-?\d+\.\d\d, -?\d+\.\d\d\]|with images \[[\d., -]*\]"
CHOSEN = re.compile(r"^chosen on val200, (\S+) on (\S+).*: lr=(\S+) of (.*)", re.MULTILINE)


@pytest.fixture(scope="module")
def files():
    """{name: the runs in results/<name>.csv}"""
    paths = set(RESULTS.glob("*.csv")) - {suite.PUBLISHED, RESULTS / "pruning.csv"}
    return {path.stem: suite.read_runs(path).astype({"top1": float}) for path in sorted(paths)}


@pytest.fixture
def tables(monkeypatch):
    """docs/tables.py"""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("tables")


def but(runs, *names):
    """What these runs are, without some of its names."""
    return runs["identity"].map(
        lambda own: json.dumps({key: own[key] for key in own if key not in names}, sort_keys=True)
    )


def spread(values, digits=2):
    values = values.astype(float)
    if len(values) == 1:
        return f"{values.iloc[0]:.{digits}f} (1)"
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def test_every_number_on_the_pages_is_a_result(files, tables):
    numbers, differences = set(), set()
    both = pandas.concat([files["real"], files["other-rates"]])  # the page compares these, too
    for found in [*files.values(), both]:
        numbers |= {f"test top-1 {top1:.2f} %" for top1 in found["top1"]}
        for mean in found.get("mean_class_top1", []):
            numbers.add(f"mean over classes {mean or 0:.2f} %")
        tested = {}  # {task: the runs by seed of each configuration}
        for _, runs in found.groupby(but(found, "seed")):
            numbers.add(spread(runs["top1"]))
            if "similarity" in runs:
                numbers.add(spread(runs["similarity"].dropna(), 3))
            if runs["split"].iloc[0] == "test":
                by_seed = {run["seed"]: run for run in runs.to_dict("records")}
                tested.setdefault(runs["task"].iloc[0], []).append(by_seed)
        for rivals in tested.values():
            for a, b in itertools.permutations(rivals, 2):
                seeds = sorted(a.keys() & b.keys())
                a, b = ([one[seed] for seed in seeds] for one in (a, b))
                if len(a) > 1:
                    paired = [one["top1"] - other["top1"] for one, other in zip(a, b, strict=True)]
                    mean, low, high = (round(x, 2) + 0.0 for x in suite.interval(paired))
                    differences.add(f"{mean:+.2f} [{low:.2f}, {high:.2f}]")
                    ends = [round(end, 1) + 0.0 for end in suite.image_interval(a, b)]
                    differences.add(f"with images {ends}")
    pruned = pandas.read_csv(RESULTS / "pruning.csv").groupby(["mask_prob", "experts"])
    numbers |= {spread(top1) for _, top1 in pruned["test_top1"]}
    for page in tables.PAGES:
        text = " ".join(page.read_text().split())
        assert not set(re.findall(NUMBER, text)) - numbers, page
        assert not set(re.findall(DIFFERENCE, text)) - differences, page


def test_the_interval_with_images_is_that_of_a_plain_bootstrap(files):
    found = files["small"]
    mine = (found["rank"] == 8) & (found["mask_prob"] == 0.5) | (found["lora_dropout"] == 0.3)
    found = found[(found["split"] == "test") & mine]
    answers = {}
    for run in found.to_dict("records"):
        bits = np.frombuffer(base64.b64decode(run["correct"]), np.uint8)
        answers[run["method"], run["lora_dropout"], run["seed"]] = np.unpackbits(bits)[:3000]
    differences = []
    for seed in range(5):
        mlae, lora = answers["mlae", None, seed], answers["lora", 0.3, seed]
        differences.append(mlae.astype(float) - lora)
    differences, draw = np.stack(differences), np.random.RandomState(7)  # (5, 3000)
    means = []
    for _ in range(2000):
        means.append(100 * differences[:, draw.randint(3000, size=3000)].mean())
    of_seeds = scipy.stats.ttest_1samp(100 * differences.mean(1), 0).confidence_interval(0.95)
    half = np.hypot((of_seeds.high - of_seeds.low) / 2, 1.96 * np.std(means))
    rows = suite.rows_of(found, ["lr"])
    suite.compare(rows, "lora")
    (row,) = [row for row in rows if row["method"] == "mlae" and row["split"] == "test"]
    ends = row["image_low"], row["image_high"]
    mean = 100 * differences.mean()
    assert ends == pytest.approx((mean - half, mean + half), abs=0.2)


def test_every_table_is_made_from_the_runs(tables):
    for page in tables.PAGES:
        assert tables.renew(page.read_text()) == page.read_text(), "run python docs/tables.py"


@pytest.mark.parametrize(("name", "count"), [("real", 24), ("methods", 8), ("masking", 6)])
def test_each_choice_is_the_best_on_val200_of_at_least_four(files, name, count):
    """Where fewer rates were tried with all seeds, others were with one, and were worse."""
    found, choices = pandas.concat([files[name], files.get(f"{name}-search")]), []
    for key, runs in found.groupby(but(found, "lr", "seed", "val")):
        rates = runs[runs["split"] == "val"].groupby("lr")["top1"]
        tested = runs[runs["split"] == "test"]
        if tested.empty:
            continue
        means, whole = rates.mean(), rates.count() == rates.count().max()
        best = means[whole].idxmax()  # of equals the smaller
        assert set(tested["lr"]) == {best} and len(means) >= 4, key
        assert not (rates.max()[~whole] > means[best]).any(), key
        tried = [f"lr={lr} {mean:.2f}" for lr, mean in means[whole].items()]
        choices.append((*tested[["method", "task"]].iloc[0], str(best), ", ".join(tried)))
    assert len(choices) == count
    if name == "real":
        assert sorted(CHOSEN.findall(MADE)) == sorted(choices)


def test_the_runs_name_no_place_of_their_machine_and_a_page_their_versions(files):
    used = set()
    for found in files.values():
        assert not found[["run", "checkpoint"]].map(str).stack().str.startswith("/").any()
        if "torch" in found:
            used |= set("torch " + found["torch"].str.split("+").str[0] + ", timm " + found["timm"])
    assert set(re.findall(r"torch \d[\d.]*\d, timm \d[\d.]*\d", " ".join(MADE.split()))) == used
