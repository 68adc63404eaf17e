"""Many runs: tasks x seeds x settings, and the table of what has been run.

    python suite.py --dataset vtab --seed 0 1 2              # all 19 tasks (fgvc: 5), three seeds
    python suite.py --method mlae lora --lr 5e-4 1e-3 2e-3   # every combination, on the demo
    python suite.py --table runs --format markdown           # what is in a folder, as one table

It takes train.py's flags, each with one value or several, and runs their product in this process;
`--targets attn.qkv attn.qkv,mlp.fc1` are two values. What is finished is skipped, and what was
interrupted goes on. Tasks whose data are missing are named at the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import data
import train
from baselines import METHODS
from runs import PLACE, Diverged, Parser, Result, RunError, collect, one_line

FORMATS = ["markdown", "csv", "json", "latex"]
PROTOCOL = "here: the last epoch's weights, scored once; mean ± standard deviation over seeds (n)"
GROUPED = ("vtab-1k",)  # benchmarks with a mean of groups
PUBLISHED = Path(__file__).resolve().parent / "results" / "published.csv"


def add_flags(parser: Parser) -> None:
    """train.py's flags, with several values each where that makes sense, and the table's."""

    def flag(name: str, **options) -> None:
        if name[2:].replace("-", "_") in PLACE or "action" in options:
            parser.add_argument(name, **options)
        elif "nargs" in options:  # a list already: commas inside a value
            parser.add_argument(name, **options, type=lambda text: text.split(","))
        else:
            parser.add_argument(name, nargs="+", **options)

    train.add_flags(flag)
    parser.add_argument("--table", metavar="FOLDER", type=Path, help="print the runs in a folder")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the table")


def combinations(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The settled arguments of every run: the product of all values, each run once."""
    values = {}
    for name, value in vars(args).items():
        values[name] = value if isinstance(value, list) else [value]
    tasks = []
    for name in values["dataset"]:
        members = [task.name for task in data.tasks_of(data.SUITES.get(name))]
        tasks += members or [name]
    values["dataset"] = tasks
    runs = {}
    for combination in itertools.product(*values.values()):
        one = argparse.Namespace(**dict(zip(values, combination, strict=True)))
        for name in METHODS[one.method].foreign():  # lora has no masks to vary
            setattr(one, name, None)
        one = train.settle(one)
        runs[json.dumps(vars(one), sort_keys=True)] = one
    return list(runs.values())


def run_all(runs: list) -> tuple[list, dict]:
    """Run them, each result printed; returns the results, and why a task or run is left out."""
    results, left_out = [], {}
    for args in runs:
        if args.dataset in left_out:
            continue
        try:
            results.append(train.run(args))
            print(json.dumps(results[-1]), flush=True)
        except data.DataError as error:
            left_out[args.dataset] = str(error)
        except Diverged as error:
            left_out[f"{args.dataset}, seed {args.seed}"] = str(error)
    return results, left_out


@dataclass
class Row:
    """A cell of the table: one configuration on one task, or its mean over tasks.

    `top1` is in percent over n seeds, `std` their sample standard deviation. `official`: all data
    are the benchmark's own, and of a mean `tasks` of `of` tasks are there with the same seeds.
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


def rows_of(results: list[Result]) -> list[Row]:
    """A row for each task and configuration, and for each mean of tasks.

    Runs are of one configuration if their identities differ in task and seed alone.
    """
    tables: dict[tuple, dict] = {}  # (benchmark, split, settings) -> task -> seed -> result
    arguments = {}  # settings -> all arguments of one of its runs
    for result in results:
        settings = {"model": result.metrics["model"]}  # with its weights
        for name, value in result.identity.items():
            if name not in ("dataset", "seed", "val", "checkpoint", "model"):
                settings[name] = value
        task = data.TASKS[result.metrics["dataset"]]
        key = task.benchmark, result.split, json.dumps(settings, sort_keys=True)
        by_task = tables.setdefault(key, {})
        by_seed = by_task.setdefault(task.name, {})
        by_seed[result.metrics["seed"]] = result
        arguments[key] = result.arguments | {"model": settings["model"]}
    rows = []
    for key, found in tables.items():
        benchmark, split, _ = key
        rivals = [json.loads(other[2]) for other in tables if other[:2] == key[:2]]
        for row in task_rows(benchmark, found) + mean_rows(benchmark, found):
            row.benchmark, row.split = benchmark, split
            row.method = arguments[key]["method"]
            row.configuration = label(arguments[key], rivals)
            rows.append(row)
    return rows


def label(arguments: dict, rivals: list[dict]) -> str:
    """The method, and its settings in which the configurations of the table differ."""
    words = [arguments["method"]]
    for name, value in arguments.items():
        choices = {json.dumps(rival.get(name)) for rival in rivals}
        if name != "method" and len(choices) > 1 and value is not None:
            words.append(f"{name}={value}")
    return " ".join(words)


def task_rows(benchmark: str, found: dict) -> list[Row]:
    """A row for each task; those of a suite have one without a run too."""
    rows = []
    for task in data.tasks_of(benchmark):
        results = found.get(task.name, {})
        if not results and benchmark not in data.SUITES.values():
            continue
        sources = {result.metrics["data"] for result in results.values()}
        scores = {seed: result.top1 for seed, result in results.items()}
        row = Row(task.group, task.name, is_official(results), *over_seeds(scores))
        row.data, row.tasks = "; ".join(sorted(sources)), min(1, len(results))
        rows.append(row)
    return rows


def mean_rows(benchmark: str, found: dict) -> list[Row]:
    """The means of a suite: of each group, of the groups, of the tasks; nothing for other tasks."""
    if benchmark not in data.SUITES.values():
        return []
    official: dict[str, dict] = {}  # task -> seed -> top-1
    groups: dict[str, list] = {}  # group -> names of its tasks
    for task in data.tasks_of(benchmark):
        groups.setdefault(task.group, []).append(task.name)
        results = found.get(task.name, {})
        if is_official(results):
            official[task.name] = {seed: result.top1 for seed, result in results.items()}
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
    """The table as markdown, csv, json or latex, with published results if a suite is in it."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    if form == "json":
        own = [asdict(row) for row in rows]
        return json.dumps({"runs": own, "published": published}, indent=1)
    if form == "csv":
        return as_csv(rows)
    draw = {"markdown": as_markdown, "latex": as_latex}[form]
    blocks = []
    for benchmark, split in dict.fromkeys((row.benchmark, row.split) for row in rows):
        own = [row for row in rows if row.benchmark == benchmark and row.split == split]
        for row in own:
            if row.task == "mean of tasks" and not row.official:
                count = f"{row.tasks} of {row.of} tasks with official data"
                unequal = ", of unequal seeds" if row.tasks == row.of else ""
                name = f"{benchmark} result: {row.configuration}"
                blocks.append(f"PARTIAL, no {name} has {count}{unequal}.")
        blocks.append(draw(grid(own)))
        if any(row.n and row.of == 1 and not row.official for row in own):
            blocks.append(f"* a subset of {benchmark} or not its official images; in no mean.")
    blocks.append(PROTOCOL)
    if any(row.group == "mean" for row in rows):
        head = ["published, ViT-B/16 IN-21k", "vtab-1k groups", "vtab-1k tasks", "fgvc"]
        lines = [[*head, "groups by best test epoch", "protocol"]]
        for entry in published:
            lines.append([value or "-" for value in entry.values()])
        blocks.append(draw(lines))
    return "\n\n".join(blocks)


def grid(rows: list[Row]) -> list[list[str]]:
    """Lines of cells: a line for each task and mean, a column for each configuration, the data."""
    names = sorted({row.configuration for row in rows})
    lines = [[f"{rows[0].benchmark}, {rows[0].split} top-1 (%)", *names, "data"]]
    for task in dict.fromkeys(row.task for row in rows):
        line = dict.fromkeys(names, "-")
        sources = {}
        for row in rows:
            if row.task == task:
                line[row.configuration] = cell(row)
                sources[row.data] = True
        lines.append([task, *line.values(), "; ".join(filter(None, sources))])
    return lines


def cell(row: Row) -> str:
    """For example 71.00 ± 1.00 (3), with a mark if it is not the benchmark's."""
    if row.top1 is None:
        return "-"
    deviation = "" if row.std is None else f" ± {row.std:.2f}"
    mark = "*" if row.of == 1 else f"[{row.tasks} of {row.of} tasks]"
    return f"{row.top1:.2f}{deviation} ({row.n}) {'' if row.official else mark}".rstrip()


def as_markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    text = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = map(str.ljust, line, widths)
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def as_latex(lines: list[list[str]]) -> str:
    escapes = {"_": r"\_", "%": r"\%", "&": r"\&", "±": r"$\pm$", "#": r"\#"}
    text = []
    for line in lines:
        cells = [word.translate(str.maketrans(escapes)) for word in line]
        text.append(" & ".join(cells) + r" \\")
    head = rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 2)}l}}"
    return "\n".join([head, r"\hline", text[0], r"\hline", *text[1:], r"\hline\end{tabular}"])


def as_csv(rows: list[Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(asdict(rows[0]))
    for row in rows:
        writer.writerow(asdict(row).values())
    return file.getvalue().rstrip()


def summary(row: Row) -> dict:
    """A row under the names of metrics.json."""
    top1 = f"{row.split}_top1"
    own = {"dataset": row.task, "method": row.method, "configuration": row.configuration}
    own |= {"seeds": row.seeds, "n": row.n, "official": row.official}
    return own | {top1: row.top1, f"{top1}_std": row.std}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_flags(parser)
    args = parser.parse_args(argv)
    folder, form = args.table, args.format
    del args.table, args.format
    with one_line(parser):
        if folder:
            known = collect(folder, tasks=data.TASKS, methods=METHODS)
            if not known:
                raise RunError(f"--table: there is no finished run in {folder}")
            print(tabulate(rows_of(known), form))
            return
        args.resume = True
        metrics, left_out = run_all(combinations(args))
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        if not metrics:
            raise RunError("--dataset: not one of these runs was possible; see above")
        folders = [result["run"] for result in metrics]
        rows = rows_of(collect(*folders, tasks=data.TASKS, methods=METHODS))
        print(tabulate(rows, form))
        print(json.dumps({"rows": list(map(summary, rows))}))


if __name__ == "__main__":
    main()
