"""Every result on README.md and docs/results.md is the result of runs in results/.

Whole tables are compared with what the command above them prints; numbers in the text have to be
those of some configuration or some pair of them.
"""

import csv
import itertools
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

import data
import suite
from suite import paired_difference, read_runs, rows_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
NO_RUNS = ("published.csv", "pruning.csv")
PAGE = ROOT / "docs" / "results.md"
MEAN = re.compile(r"\d+\.\d{2,3} ± \d+\.\d{2,3}")  # accuracies have two digits, similarities three
SINGLE = re.compile(r"\d+\.\d{2,3} \(1\)")  # of one seed
PRINTED = re.compile(r"(?:test top-1|mean over classes) \d+\.\d\d %")  # by train.py and eval.py
DIFFERENCE = re.compile(r"[+-]?\d+\.\d\d \[-?\d+\.\d\d, -?\d+\.\d\d\]")


def experiments():
    """The runs of each file of results/; the page compares those of two of them, too."""
    for path in sorted(RESULTS.glob("*.csv")):
        if path.name not in NO_RUNS and not path.stem.endswith("-search"):
            yield read_runs(path)
    yield read_runs(RESULTS / "real.csv", RESULTS / "other-rates.csv")


def spread(values, digits):
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@pytest.fixture(scope="module")
def known():
    """(means, differences) of all runs, as the tables print them; means are of one seed, too."""
    means, differences = set(), set()
    for results in experiments():
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
        means |= similarities(results)
    means |= set(pruned().values())
    return means, differences


def similarities(results):
    """Of the experts as training ended, over the seeds of each configuration."""
    by_settings = {}
    for result in results:
        own = result.identity.items()
        settings = tuple(f"{name}={value}" for name, value in own if name != "seed")
        if result.metrics.get("similarity") is not None:
            by_settings.setdefault(settings, []).append(result.metrics["similarity"])
    found = set()
    for values in by_settings.values():
        found.add(spread(values, 3) if len(values) > 1 else f"{values[0]:.3f} (1)")
    return found


def pruned():
    """{(mask_prob, experts): mean and spread of the test top-1}."""
    by_count = {}
    with open(RESULTS / "pruning.csv", newline="") as file:
        for row in csv.DictReader(file):
            key = row["mask_prob"], row["experts"]
            by_count.setdefault(key, []).append(float(row["test_top1"]))
    return {key: spread(values, 2) for key, values in by_count.items()}


NOT_SETTINGS = {"dataset", "method", "lr", "seed", "val_top1", "chosen", "choice", "run"}


def searches():
    """Every choice in results/: (file, task, method, other settings, {rate: [val top-1]}, chosen,
    the folder of one of the runs)."""
    for path in sorted(RESULTS.glob("*-search.csv")):
        groups = {}
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                settings = [name for name in row if row[name] and name not in NOT_SETTINGS]
                assert set(row["choice"].split()) >= {"lr", *settings}, path
                others = " ".join(f"{name}={row[name]}" for name in settings)
                key = row["dataset"], row["method"], others
                scores, chosen, _ = groups.setdefault(key, ({}, set(), row["run"]))
                scores.setdefault(row["lr"], []).append(float(row["val_top1"]))
                if row["chosen"] == "1":
                    chosen.add(row["lr"])
        for (dataset, method, others), (scores, chosen, run) in groups.items():
            yield path, dataset, method, others, scores, chosen, run


@pytest.fixture(scope="module")
def choices():
    """The lines that suite.py prints about its choices."""
    found = set()
    for _, dataset, method, others, scores, chosen, _ in searches():
        tried = ", ".join(
            f"lr={lr} {statistics.mean(scores[lr]):.2f}" for lr in sorted(scores, key=float)
        )
        (best,) = chosen
        found.add(f"{method} on {dataset} {others}".rstrip() + f": lr={best} of {tried}")
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_every_number_is_a_result(known, choices, page):
    text = (ROOT / page).read_text()
    in_one_line = " ".join(text.split())
    means, differences = known
    found = MEAN.findall(in_one_line)
    assert len(found) > 2 and not set(found) - means
    assert not set(SINGLE.findall(in_one_line) + PRINTED.findall(in_one_line)) - means
    assert not set(DIFFERENCE.findall(in_one_line)) - differences
    assert not set(re.findall("^chosen on val200, (.*)", text, re.MULTILINE)) - choices


def test_losses_and_sizes_are_those_of_the_runs():
    text = " ".join(PAGE.read_text().split())
    by_settings, sizes = {}, {}
    for result in read_runs(RESULTS / "real.csv"):
        identity, metrics = result.identity, result.metrics
        if result.split == "val":
            key = json.dumps([value for name, value in identity.items() if name != "seed"])
            by_settings.setdefault(key, []).append(metrics["val_loss"])
        size = metrics["trainable_parameters"] - metrics["head_parameters"]
        sizes.setdefault(identity["method"], set()).add(size)
    losses = {f"{statistics.mean(values):.2f}" for values in by_settings.values()}
    pairs = re.findall(r"(\d\.\d\d) against (\d\.\d\d)", text)
    assert len(pairs) == 4 and set(itertools.chain(*pairs)) <= losses
    (full,), _ = sizes.pop("full"), sizes.pop("linear")
    assert f"full fine-tuning {full / 1e6:.1f} million" in text
    adapters = set.union(*sizes.values())
    span = f"train {min(adapters):,} to {max(adapters):,} parameters"
    assert span in text and span in " ".join((ROOT / "README.md").read_text().split())


def test_the_example_with_photos_prints_what_it_printed():
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(
        r"^```\n(\$ python train\.py --dataset photos.*?)^```", text, re.M | re.S
    )
    printed = (RESULTS / "photos" / "output.txt").read_text().splitlines()
    lines = example.splitlines()
    assert len(lines) > 8 and not set(lines) - set(printed)


def tables_of(text):
    """The markdown tables in a text."""
    return re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)


def test_every_table_is_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    checked = 0
    for block in re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if not tables_of(block):
            continue
        printed = []
        for words in re.findall(r"^python suite\.py (--table .+)$", block, re.MULTILINE):
            suite.main(shlex.split(words))
            printed += [table.strip() for table in tables_of(capsys.readouterr().out)]
        for table in tables_of(block):
            assert table.strip() in printed
            checked += 1
    assert checked > 8


def test_the_pruning_table():
    with open(PAGE) as file:
        cells = table_after(file.read(), "experts kept")
    found = pruned()
    for name, values in cells.items():
        p = float(re.search(r"p = ([\d.]+)", name)[1])
        own = {key: value for key, value in found.items() if float(key[0]) == p}
        counts = sorted({int(count) for _, count in own}, reverse=True)
        by_count = {int(count): value for (_, count), value in own.items()}
        assert values == [by_count[count] for count in counts]


def test_runs_name_no_place_of_the_machine_that_made_them():
    for path in RESULTS.rglob("*.csv"):
        assert not re.search(r"(^|[\s,\"])/\w", path.read_text()), path


def test_the_page_names_the_versions_of_its_runs():
    used = set()
    for result in itertools.chain.from_iterable(experiments()):
        versions = result.metrics["versions"]
        used.add(f"torch {versions['torch'].split('+')[0]}, timm {versions['timm']}")
    text = PAGE.read_text()
    assert set(re.findall(r"torch \d[\d.]*\d, timm \d[\d.]*\d", text)) == used


def first_look(path, run):
    """{rate: val top-1} of the runs of a search that differ from one in rate and seed alone; none
    where the runs of a search are not kept."""

    def settings(identity):
        return {name: value for name, value in identity.items() if name not in ("lr", "seed")}

    results = read_runs(path.with_name(path.name.replace("-search", "")))
    own = [settings(result.identity) for result in results if result.metrics["run"] == run]
    found = {}
    for result in results:
        if settings(result.identity) in own:
            found.setdefault(result.arguments["lr"], []).append(result.top1)
    return found


def test_each_choice_is_the_best_on_val200_of_at_least_four():
    """Where fewer rates were tried with all seeds, others were with one, and were worse."""
    found = list(searches())
    assert found
    for path, task, method, others, scores, chosen, run in found:
        means = {float(lr): statistics.mean(values) for lr, values in scores.items()}
        best = max(sorted(means), key=means.get)  # of equals the smallest
        assert set(map(float, chosen)) == {best}, (path, task, method, others)
        looked = first_look(path, run)
        assert len(means | looked) >= 4, (path, task, method, others)
        if looked:
            assert min(means | looked) < best < max(means | looked)
            outside = [max(values) for lr, values in looked.items() if lr not in means]
            assert max(outside, default=0) < means[best], (path, task, method, others)


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
    hours = table_after(PAGE.read_text(), "GPU hours")
    per_image = {}
    for method, gflop in counted["gflop_per_step"].items():
        per_image[method] = gflop / counted["batch_size"]
    for method, found in hours.items():
        want = []
        for benchmark in ("vtab-1k", "fgvc"):
            sizes = [task.sizes for task in data.tasks_of(benchmark)]
            train, val, test = (sum(column) for column in zip(*sizes, strict=True))
            step, scoring = per_image[method], per_image["linear"]
            search = 4 * 3 * (100 * train * step + val * scoring)  # rates, seeds
            seed = 100 * (train + val) * step + test * scoring
            want += [search, seed, search + 5 * seed]  # GFLOP
        assert found == [f"{gflop / 1e5 / 3600:.1f}" for gflop in want]


SPEED = {  # rows of the table in docs/speed.md
    "floor": "floor",
    "**MLAE, folded**": "mlae",
    "MLAE, two branches": "two-branch",
    "LoRA": "lora",
    "RM-LoRA": "rmlora",
    "MoR, 8 experts": "mor",
    "SNELL": "snell",
    "SNELLA": "snella",
    "BitFit (all biases)": "bitfit",
    "LayerNorm": "layernorm",
    "linear probe": "linear",
    "full fine-tuning": "full",
    "LoRA of PEFT": "peft",
    "LoRA of loralib": "loralib",
}


def test_the_speed_table_is_what_bench_measured():
    measured = json.loads((RESULTS / "speed.json").read_text())
    cells = table_after((ROOT / "docs" / "speed.md").read_text(), "method | qkv")
    for name, method in SPEED.items():
        want = []
        for layers in ("qkv", "all four"):
            own = measured[layers][method]
            low, median, high = own["over floor"]
            want.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
            want += [f"{own['over peft'][1]:.2f}", f"{own['memory_mb']:.0f}"]
        assert cells.pop(name) == want
    assert not cells
    text = (ROOT / "README.md").read_text()
    quoted = re.findall(r"(\d\.\d\d) times", text[text.index("## Speed") :])
    medians = [measured["qkv"][name]["over floor"][1] for name in ("mlae", "lora", "peft")]
    assert quoted == [f"{median:.2f}" for median in medians]


def test_published_rows_are_those_of_the_file():
    with open(RESULTS / "published.csv", newline="") as file:
        known = {row["method"]: row for row in csv.DictReader(file)}
    quoted = table_after(PAGE.read_text(), "published")
    for name, values in quoted.items():
        row = known[name.removesuffix(", best epoch on the test set")]
        own = [row[column] or "-" for column in ("groups", "tasks", "fgvc", "best_epoch")]
        assert values == own, name


COLUMNS = {  # of the table on README: (method, p)
    "linear": ("linear", None),
    "LoRA": ("lora", None),
    "RM-LoRA": ("rmlora", None),
    "MLAE, p = 0": ("mlae", 0.0),
    "MLAE, p = 0.3": ("mlae", 0.3),
    "MLAE, p = 0.5": ("mlae", 0.5),
    "MoR": ("mor", None),
    "SNELL": ("snell", None),
    "SNELLA": ("snella", None),
    "full": ("full", None),
}


def at_the_chosen_rate(name_of_file, method, p, task):
    """The test runs of a method on a task, at the rate that was chosen on val200."""
    rates = []
    for path, searched, name, others, _, chosen, _ in searches():
        is_ours = searched == task and name == method and path.stem == f"{name_of_file}-search"
        if is_ours and (p is None or others in ("", f"mask_prob={p}")):
            rates += map(float, chosen)
    usual = {"method": method, "dataset": task, "masking": "stochastic", "freeze_lambda": False}
    found = []
    for result in read_runs(RESULTS / f"{name_of_file}.csv"):
        own = result.arguments
        is_ours = all(own[name] in (value, None) for name, value in usual.items())
        is_ours = is_ours and own["lr"] in rates and own["mask_prob"] in (p, None)
        if is_ours and result.split == "test":
            found.append(result)
    return found


def test_the_table_on_readme():
    text = (ROOT / "README.md").read_text()
    head = re.search(r"^\| \| (linear .*) \|$", text, re.MULTILINE)[1].split(" | ")
    assert head == list(COLUMNS)
    rows = table_after(text, "| linear")
    sources = {  # of each row: its task and its folders, without and with p
        "digits (the demo)": ("digits", "methods", "masking"),
        "part of CIFAR-100": ("cifar", "real", "real"),
        "part of Caltech101": ("caltech101", "real", "real"),
    }
    for row, (task, without, masked) in sources.items():
        for cell, (method, p) in zip(rows[row], COLUMNS.values(), strict=True):
            found = at_the_chosen_rate(without if p is None else masked, method, p, task)
            top1 = [result.top1 for result in found]
            assert cell == (f"{spread(top1, 2)} ({len(top1)})" if top1 else ""), (row, method, p)
    sizes = rows["parameters on digits, without the head"]
    for cell, (method, _) in zip(sizes, COLUMNS.values(), strict=True):
        metrics = at_the_chosen_rate("methods", method, 0.5, "digits")[0].metrics
        own = metrics["trainable_parameters"] - metrics["head_parameters"]
        assert cell == f"{own:,}"
