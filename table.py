"""The table of what has been run: means over seeds, tasks and groups, beside published results.

    rows = rows_of(collect("runs"))
    compare(rows, "lora")  # of stats.py: the paired difference of each to that one
    print(tabulate(rows, "latex"))

A mean over tasks counts official data alone, and every task has the same seeds in it.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import data
from baselines import METHODS
from files import RunError
from flags import shown
from runs import Result
from stats import natural

PROTOCOL = "here: the last epoch's weights, scored once; mean ± standard deviation over seeds (n)"
GROUPED = ("vtab-1k",)  # benchmarks with a mean of groups
PUBLISHED = Path(__file__).resolve().parent / "results" / "published.csv"
WIDE = 6  # tasks and means that are columns of a table; more are its lines


@dataclass
class Row:
    """A cell of the table: one configuration on one task, or its mean over tasks.

    `top1` is in percent over n seeds, `std` their sample standard deviation. `official`: all data
    are the benchmark's own, and of a mean `tasks` of `of` tasks are there with the same seeds.
    `chosen`: the settings that were chosen on val200. `scores`: top-1 by seed. `against` names the
    configuration that `difference` is to, over `pairs` common seeds with its 95 % interval from
    `low` to `high`; see `stats.compare`.
    """

    group: str
    task: str
    official: bool
    top1: float | None
    std: float | None
    seeds: list[int]
    n: int
    tasks: int = 1
    of: int = 1
    data: str = ""
    benchmark: str = ""
    split: str = ""
    method: str = ""
    configuration: str = ""
    chosen: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    against: str = ""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0


def rows_of(results: list[Result], chosen: Sequence[str] = ()) -> list[Row]:
    """A row for each task and configuration, and for each mean of tasks.

    Runs are of one configuration if their identities differ in task and seed alone, and those on
    test images also in the settings that were `chosen` for each task (one value for each seed).
    """
    tables: dict[tuple, dict] = {}  # (benchmark, split, settings) -> task -> seed -> result
    arguments = {}  # the same -> all arguments of one of its runs
    for result in results:
        own = result.identity
        # the weights by their tag, or by the digest of a file, whatever its name
        settings = {"model": own["model"] if "checkpoint" in own else result.metrics["model"]}
        free = chosen if result.split == "test" else ()  # what is tried on val200 stays apart
        for name, value in own.items():
            if name not in ("dataset", "seed", "val", "model", data.FOLDER, *free):
                settings[name] = value
        benchmark, name = data.place_in_table(result.metrics["dataset"], result.identity)
        key = benchmark, result.split, json.dumps(settings, sort_keys=True)
        by_seed = tables.setdefault(key, {}).setdefault(name, {})
        seed = result.metrics["seed"]
        for setting in free:
            both = {shown(one.arguments[setting]) for one in (result, by_seed.get(seed, result))}
            if len(both) > 1:  # one run would hide the other
                raise RunError(f"--choose {setting}: {name}, seed {seed}, has {' and '.join(both)}")
        by_seed[seed] = result
        weights = {"model": settings["model"], "checkpoint": own.get("checkpoint", "")[:8] or None}
        arguments[key] = result.arguments | weights
    with_means = {key[:2] for key, found in tables.items() if len(found) > 1}
    rows = []
    for key, found in tables.items():
        benchmark, split, _ = key
        rivals = [json.loads(other[2]) for other in tables if other[:2] == key[:2]]
        configuration = label(arguments[key], json.loads(key[2]), rivals)
        means = mean_rows(benchmark, found) if key[:2] in with_means else []
        for row in task_rows(benchmark, found) + means:
            row.benchmark = benchmark
            row.split = split
            row.method = arguments[key]["method"]
            row.configuration = configuration
            if row.of == 1 and split == "test":
                run = next(iter(found[row.task].values()))
                row.chosen = {name: run.arguments[name] for name in chosen}
            rows.append(row)
    return rows


def label(arguments: dict, given: dict, rivals: list[dict]) -> str:
    """The method, and its settings in which the configurations of the table differ; of a method's
    own settings that were not given, those in which its own configurations differ."""
    method = arguments["method"]
    same = [rival for rival in rivals if rival["method"] == method]
    words = [method]
    for name, value in arguments.items():
        usual = name not in given and name in ("targets", *METHODS[method].settings)
        choices = {json.dumps(rival.get(name)) for rival in (same if usual else rivals)}
        if name != "method" and len(choices) > 1 and value is not None:
            words.append(f"{name}={shown(value)}")
    return " ".join(words)


def task_rows(benchmark: str, found: dict) -> list[Row]:
    """A row for each task that has a result."""
    rows = []
    for name, group in data.groups_of(benchmark, found).items():
        results = found.get(name, {})
        if not results:
            continue
        sources = {result.metrics["data"] for result in results.values()}
        scores = {seed: result.top1 for seed, result in results.items()}
        row = Row(group, name, is_official(results), *over_seeds(scores))
        row.data = "; ".join(sorted(sources))
        row.scores = scores
        rows.append(row)
    return rows


def mean_rows(benchmark: str, found: dict) -> list[Row]:
    """Means of a suite's groups, of the groups, of the tasks; none of other tasks or of subsets."""
    if benchmark not in data.SUITES.values():
        return []
    official: dict[str, dict] = {}  # task -> seed -> top-1
    groups: dict[str, list] = {}  # group -> names of its tasks
    for task in data.tasks_of(benchmark):
        groups.setdefault(task.group, []).append(task.name)
        results = found.get(task.name, {})
        if is_official(results):
            official[task.name] = {seed: result.top1 for seed, result in results.items()}
    if not official:
        return []
    scores = list(official.values())
    count = len(data.tasks_of(benchmark))
    of_tasks = mean_row("mean of tasks", mean_over(scores), scores, count)
    if benchmark not in GROUPED:
        return [of_tasks]
    rows, group_means = [], []
    for group, names in groups.items():
        members = [official[name] for name in names if name in official]
        group_means.append(mean_over(members))
        rows.append(mean_row(group, group_means[-1], members, len(names)))
    of_groups = mean_over(group_means) if all(group_means) else {}
    return [*rows, mean_row("mean of groups", of_groups, scores, count), of_tasks]


def mean_row(name: str, mean: dict, scores: list[dict], of: int) -> Row:
    """The row of a mean {seed: top-1} over `scores`, out of `of` tasks."""
    whole = len(scores) == of and None not in mean
    row = Row("mean", name, whole, *over_seeds(mean), tasks=len(scores), of=of)
    row.n = min(map(len, scores)) if mean else 0
    row.scores = {seed: round(top1, 4) for seed, top1 in mean.items() if seed is not None}
    return row


def is_official(results: dict[int, Result]) -> bool:
    """Whether there are results and all are on the benchmark's own images."""
    return bool(results) and all(result.metrics["official"] for result in results.values())


def mean_over(scores: list[dict]) -> dict:
    """The mean of several {seed: top-1}, seed by seed if all have the same; else {None: mean}.

    Of tasks it is the mean of tasks, or of a group; of groups it is the mean of groups.
    """
    if not scores:
        return {}
    seeds = scores[0].keys()
    if any(score.keys() != seeds for score in scores):
        means = [statistics.mean(score.values()) for score in scores]
        return {None: statistics.mean(means)}
    mean = {}
    for seed in seeds:
        values = [score[seed] for score in scores]
        mean[seed] = statistics.mean(values)
    return mean


def over_seeds(scores: dict) -> tuple:
    """(mean, sample standard deviation, seeds, their number) of {seed: top-1}."""
    if not scores:
        return None, None, [], 0
    values = list(scores.values())
    std = round(statistics.stdev(values), 2) if len(values) > 1 else None
    seeds = sorted(seed for seed in scores if seed is not None)
    return round(statistics.mean(values), 2), std, seeds, len(values)


def tabulate(rows: list[Row], form: str = "markdown") -> str:
    """The table as markdown, csv, json or latex (booktabs; the tabulars alone).

    Markdown and json have published results too, if a suite's test results are in the table.
    """
    rows = sorted(rows, key=lambda row: natural(row.configuration))  # not by when each ran
    published = list(csv.DictReader(PUBLISHED.read_text(encoding="utf-8").splitlines()))
    if form == "json":
        return json.dumps({"runs": list(map(asdict, rows)), "published": published}, indent=1)
    if form == "csv":
        return as_csv(rows)
    blocks = []
    for split, benchmark in itertools.product(("val", "test"), data.BENCHMARKS):
        own = [row for row in rows if row.benchmark == benchmark and row.split == split]
        if not own:
            continue
        lines = [grid(own)]
        compared = [row for row in own if row.against]
        if compared:
            lines.append(grid(compared, difference))
        if form == "latex":
            blocks += map(as_latex, lines)
        else:
            blocks += [*partial(own), *map(as_markdown, lines), notes(own)]
    if form == "latex":
        return "\n\n".join(blocks)
    blocks.append(PROTOCOL)
    if any(row.group == "mean" and row.split == "test" for row in rows):
        head = ["published, ViT-B/16 IN-21k", "vtab-1k groups", "vtab-1k tasks", "fgvc"]
        lines = [[*head, "groups by best test epoch", "protocol"]]
        for entry in published:
            lines.append([value or "-" for value in entry.values()])
        blocks.append(as_markdown(lines))
    return "\n\n".join(blocks)


def partial(rows: list[Row]) -> list[str]:
    """A sentence for each configuration that is not yet a result of its suite."""
    sentences = []
    for row in rows:
        if row.task == "mean of tasks" and not row.official:
            count = f"{row.tasks} of {row.of} tasks with official data"
            unequal = ", of unequal seeds" if row.tasks == row.of else ""
            name = f"{row.benchmark} result: {row.configuration}"
            sentences.append(f"PARTIAL, no {name} has {count}{unequal}.")
    return sentences


def notes(rows: list[Row]) -> str:
    """What the images of each task are, and what a star in the table means."""
    lines = {}  # each once, in order
    for row in rows:
        if row.of == 1:
            lines[f"{row.task}: {row.data}"] = True
    for row in rows:
        if row.chosen:
            words = ", ".join(f"{name} {shown(value)}" for name, value in row.chosen.items())
            lines[f"{row.task}, {row.configuration}: {words} chosen on val200"] = True
    if any(row.of == 1 and not row.official for row in rows):
        lines[f"* a subset of {rows[0].benchmark} or not its official images; in no mean."] = True
    return "\n".join(lines)


def grid(rows: list[Row], show: Callable | None = None) -> list[list[str]]:
    """Lines of cells, as `cell` or `show` writes them: a line for each configuration and a column
    for each task and mean, or the other way round where there are many tasks."""
    names = dict.fromkeys(row.configuration for row in rows)
    found = dict.fromkeys(row.task for row in rows)
    order = [*data.groups_of(rows[0].benchmark, found), *found]  # the table's, then the means
    tasks = sorted(found, key=order.index)
    text = {(row.configuration, row.task): (show or cell)(row) for row in rows}
    corner = f"{rows[0].benchmark}, {rows[0].split} top-1 (%)"
    if show:
        corner = f"{rows[0].split} top-1 minus that of {rows[0].against}, paired [95 %]"
    lines = [[corner, *tasks]]
    for name in names:
        cells = [text.get((name, task), "-") for task in tasks]
        lines.append([name, *cells])
    if len(tasks) <= WIDE:
        return lines
    return [list(column) for column in zip(*lines, strict=True)]


def cell(row: Row) -> str:
    """For example 71.00 ± 1.00 (3), with a mark if it is not the benchmark's."""
    if row.top1 is None:
        return "-"
    deviation = "" if row.std is None else f" ± {row.std:.2f}"
    mark = "*" if row.of == 1 else f"[{row.tasks} of {row.of} tasks]"
    return f"{row.top1:.2f}{deviation} ({row.n}) {'' if row.official else mark}".rstrip()


def difference(row: Row) -> str:
    """For example -1.00 [-2.10, 0.10] (5): the mean, its interval and how many seeds are common."""
    if row.difference is None:
        return "-"
    ends = "" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
    return f"{row.difference:+.2f}{ends} ({row.pairs})"


def as_markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    text = []
    for line in [lines[0], rule, *lines[1:]]:
        text.append(f"| {' | '.join(map(str.ljust, line, widths))} |")
    return "\n".join(text)


def as_latex(lines: list[list[str]]) -> str:
    r"""A tabular; its document needs \usepackage{booktabs}."""
    escapes = {char: f"\\{char}" for char in "_%&#${}"}
    escapes |= {"±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes["\\"] = r"\textbackslash{}"
    text = []
    for line in lines:
        cells = [word.translate(str.maketrans(escapes)) for word in line]
        text.append(" & ".join(cells) + r" \\")
    head = rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}"
    rules = [head, r"\toprule", text[0], r"\midrule", *text[1:], r"\bottomrule"]
    return "\n".join([*rules, r"\end{tabular}"])


def as_csv(rows: list[Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(asdict(rows[0]))
    for row in rows:
        values = asdict(row).values()
        writer.writerow(json.dumps(one) if isinstance(one, dict) else one for one in values)
    return file.getvalue().rstrip()


def summary(row: Row) -> dict:
    """A row under the names of metrics.json."""
    own = {"dataset": row.task, "method": row.method, "configuration": row.configuration}
    own |= {"chosen": row.chosen, "seeds": row.seeds, "n": row.n, "official": row.official}
    return own | {f"{row.split}_top1": row.top1, f"{row.split}_top1_std": row.std}
