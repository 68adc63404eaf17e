"""Many runs: tasks x seeds x settings, and the table of what has been run.

    python suite.py --dataset vtab --seed 0 1 2              # all 19 tasks (fgvc: 5), three seeds
    python suite.py --method mlae lora --lr 5e-4 1e-3 2e-3   # every combination, on the demo
    python suite.py --method mlae lora --lr 4e-3 8e-3 --choose lr --seed 0 1 2   # tuned alike
    python suite.py --table runs --format markdown           # what is in a folder or csv, as a table
    python suite.py --table runs --against lora              # and the paired difference to that

With --choose, every value of those flags is tried first: trained on 800 images and scored on
val200, for each task, method and other setting by itself. The best mean is chosen, of equals the
smaller value. Only then do the seeds run on the 1000 images, and are tested. <out>/runs.csv has a
row for every run.

It takes train.py's flags, each with one value or several, and runs their product in this process;
`--targets attn.qkv attn.qkv,mlp.fc1` are two values, and so are `--mask-prob 0.3
attn.qkv=0.5,mlp.fc1=0.3`. What is finished is skipped, and what was interrupted goes on. The same
command in several shells, or on several machines that share --out, shares the runs out. Tasks
whose data are missing are named at the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas
import scipy.stats

import data
import train
from methods import METHODS
from model import find_method, first_line
from runs import (
    OUT_OF_MEMORY,
    PLACE,
    WHOLE,
    Busy,
    Diverged,
    Result,
    RunError,
    add_flags,
    collect,
    launched,
    lock,
    new_parser,
    one_line,
    out_of_memory,
    read_json,
    read_log,
    result_of,
    shown,
    train_parser,
    write_atomically,
)

TABLE_FORMATS = ["markdown", "csv", "json", "latex"]
PROTOCOL = "here: the last epoch's weights, scored once; mean ± standard deviation over seeds (n)"
GROUPED = ("vtab-1k",)  # benchmarks with a mean of groups
PUBLISHED = Path(__file__).resolve().parent / "results" / "published.csv"
WIDE = 6  # tasks and means that are columns of a table; more are its lines
PAUSE = 2.0  # seconds between two looks at runs of other processes


def suite_parser(manual: str | None = None) -> argparse.ArgumentParser:
    """The parser of suite.py: train.py's flags, with several values where that makes sense."""
    parser = new_parser("suite.py", manual)

    def group(title: str) -> Callable:
        add = parser.add_argument_group(title).add_argument

        def flag(name: str, **options) -> None:
            if name == "--resume":  # a suite always goes on
                return
            if name[2:].replace("-", "_") in PLACE or options.get("action") == "store_true":
                add(name, **options)
            elif "nargs" not in options:
                add(name, nargs="+", **options)
            else:  # several words already: commas inside a value
                options = {"type": lambda text: text.split(",")} | options
                add(name, **options | {"action": "store"})

        return flag

    add_flags(group)
    flag = parser.add_argument_group("choosing").add_argument
    words = "choose these on val200 (--table: were chosen)"
    flag("--choose", nargs="+", metavar="FLAG", help=words)
    words = "seeds of the search on val200 (default: 0)"
    flag("--search-seed", nargs="+", type=WHOLE, default=[0], metavar="SEED", help=words)
    flag = parser.add_argument_group("table").add_argument
    flag(
        "--table", metavar="PATH", type=Path, help="print the runs of a folder or csv, run nothing"
    )
    words = "in that table the paired difference to this, as in: lora, or mask-prob=0"
    flag("--against", metavar="WORDS", help=words)
    words = "of the table (default: markdown)"
    flag("--format", choices=TABLE_FORMATS, default="markdown", help=words)
    return parser


# --- many runs -------------------------------------------------------------------------------------


def combinations(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The settled arguments of every run: the product of all values, each run once."""
    values = {}
    for name, value in vars(args).items():
        if name in ("choose", "search_seed"):
            continue
        values[name] = value if isinstance(value, list) else [value]
    tasks = []
    for name in values["dataset"]:
        members = [task.name for task in data.tasks_of(data.SUITES.get(name))]
        tasks += members or [name]
    values["dataset"] = tasks
    runs = {}
    for combination in itertools.product(*values.values()):
        one = argparse.Namespace(**dict(zip(values, combination, strict=True)))
        for name in find_method(one.method).foreign():  # lora has no masks to vary
            setattr(one, name, None)
        one = train.settle(one)
        runs[json.dumps(vars(one), sort_keys=True)] = one
    return list(runs.values())


def run_all(runs: list, done: Callable = lambda run, metrics: None) -> tuple[list, dict]:
    """Run them, each result printed and given to `done`; returns the results, and why a task or run
    is left out. What other processes are at comes last: its result is read when they are ready."""
    results, left_out, load = [], {}, KeepLast()
    queue, passed_over = deque(runs), 0
    while queue:
        args = queue.popleft()
        if args.dataset in left_out:
            continue
        try:
            metrics = train.run(args, load)
        except Busy as error:
            queue.append(args)
            passed_over += 1
            if passed_over == len(queue):
                print(f"waiting for other processes: {error}", flush=True)
            if passed_over >= len(queue):
                time.sleep(PAUSE)
            continue
        except data.DataError as error:
            left_out[args.dataset] = str(error)
        except Diverged as error:
            left_out[f"{args.dataset}, seed {args.seed}"] = str(error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            left_out[f"{args.method} on {args.dataset}, seed {args.seed}"] = OUT_OF_MEMORY
        else:
            results.append(metrics)
            print(json.dumps(metrics), flush=True)
            write_runs(Path(args.out))
            done(args, metrics)
        passed_over = 0
    return results, left_out


class KeepLast:
    """data.load_data, which remembers what it returned last: runs on one task follow each other."""

    def __init__(self) -> None:
        self.key, self.images = None, None

    def __call__(self, args: argparse.Namespace) -> tuple[data.Images, data.Images]:
        names = ("dataset", "data_dir", "source", "img_size", "augment", "val", *data.FOLDER_FLAGS)
        key = [getattr(args, name) for name in names]
        if key != self.key:
            self.key, self.images = None, None  # let go first: two tasks may not fit
            self.images, self.key = data.load_data(args), key
        return self.images


@dataclass
class Trial:
    """Settings that --choose tries: the arguments of one run without seed, and top-1 on val200 (%)
    by seed."""

    arguments: dict
    top1: dict[int, float]

    def mean(self) -> float:
        return statistics.mean(self.top1.values())

    def merit(self) -> tuple[int, float]:
        """The best is chosen; settings with which a seed diverged are behind those without."""
        return len(self.top1), self.mean()

    def show(self, names: list[str]) -> str:
        """For example "lr=0.001"; without settings that the method has not."""
        given = [name for name in names if self.arguments[name] is not None]
        return " ".join(f"{name}={shown(self.arguments[name])}" for name in given)


def search(args: argparse.Namespace) -> tuple[list, dict]:
    """Try the values of the flags in args.choose on val200, and choose.

    Returns the runs with what was chosen on the 1000 images, one for each seed, and why tasks or
    runs are left out.
    """
    names = chosen_flags(args)
    others = identifying_flags(args, names)
    every = argparse.Namespace(**vars(args))
    every.val, every.seed = True, args.search_seed
    runs = combinations(every)
    trials: dict[str, Trial] = {}  # in this order, whatever order the results come in
    for run in runs:
        key, arguments = without_seed(run)
        trials.setdefault(key, Trial(arguments, {}))

    def note(run: argparse.Namespace, metrics: dict) -> None:
        trial = trials[without_seed(run)[0]]
        trial.top1[run.seed] = metrics["val_top1"]

    _, left_out = run_all(runs, note)
    scored = [trial for trial in trials.values() if trial.top1]
    best = choose(scored, names, others)
    runs = []
    for trial in best:
        for seed in args.seed if isinstance(args.seed, list) else [args.seed]:
            runs.append(argparse.Namespace(**trial.arguments | {"seed": seed, "val": False}))
    return runs, left_out


def without_seed(run: argparse.Namespace) -> tuple[str, dict]:
    """The arguments of a run but its seed, as a key and as a dict."""
    arguments = {name: value for name, value in vars(run).items() if name != "seed"}
    return json.dumps(arguments, sort_keys=True), arguments


def chosen_flags(args: argparse.Namespace) -> list[str]:
    """The names of the flags in args.choose; RunError for one that has not several values."""
    names = [name.lstrip("-").replace("-", "_") for name in args.choose]
    for name in names:
        values = getattr(args, name, None)
        if not isinstance(values, list) or len(values) < 2 or name in ("dataset", "method", "seed"):
            flag = name.replace("_", "-")
            raise RunError(f"--choose {flag}: give --{flag} several values to choose from")
    if args.val:
        raise RunError("--choose scores val200 by itself: leave --val out")
    return names


def identifying_flags(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The names of the other flags that tell searches apart: those with several values, for each
    of which there is a choice, and the methods' own flags that were given."""
    of_methods = {"targets"}
    for method in METHODS.values():
        of_methods.update(method.settings)
    known = {"dataset", "method", "seed", "search_seed", "choose", *names}
    identifying = []
    for name, value in vars(args).items():
        several = isinstance(value, list) and len(value) > 1
        given = name in of_methods and value is not None
        if name not in known and (several or given):
            identifying.append(name)
    return identifying


def choose(trials: list[Trial], names: list[str], others: list[str]) -> list[Trial]:
    """The trial with the best mean of each task, method and value of the other flags, of equals
    the one with the smaller values; says what was chosen from what.

    Settings that follow from others, as the warm-up from the epochs, make no choice of their own.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        own = [trial.arguments[name] for name in ("dataset", "method", *others)]
        groups.setdefault(json.dumps(own), []).append(trial)
    best = []
    for rivals in groups.values():
        rivals.sort(key=lambda trial: [size(trial.arguments[name]) for name in names])
        best.append(max(rivals, key=Trial.merit))  # the first of equals
        task, method = best[-1].arguments["dataset"], best[-1].arguments["method"]
        what = f"{method} on {task} {best[-1].show(others)}".rstrip()
        tried = [f"{trial.show(names)} {trial.mean():.2f}" for trial in rivals]
        print(f"chosen on val200, {what}: {best[-1].show(names)} of {', '.join(tried)}")
        for name in names:
            sizes = [size(trial.arguments[name]) for trial in rivals]
            if not all(isinstance(value, int | float) for value in sizes):
                continue  # words, or a setting that the method has not
            own = size(best[-1].arguments[name])
            if own in (min(sizes), max(sizes)) and min(sizes) < max(sizes):
                print(f"note: that is the smallest or largest {name}: try more values")
    return best


def size(value):
    """What orders the values of a flag: of one for each target their mean."""
    return statistics.mean(value.values()) if isinstance(value, dict) else value


# --- runs.csv: a row for every run ----------------------------------------------------------------


def row_of(folder: Path) -> dict:
    """A finished run as a row of runs.csv: its result, settings, machine, versions and commit.

    `task` and `weights` are what metrics.json calls dataset and model; `identity` is what tells the
    run from others, as JSON. Raises RunError for a run that cannot be read.
    """
    result, config = result_of(folder), read_json(folder / "config.json")
    metrics = dict(result.metrics)
    metrics.pop("digests", None)  # long; `digest` is of the scored images
    row = {"task": metrics.pop("dataset"), "method": metrics["method"], "seed": metrics["seed"]}
    row |= {"split": result.split, "weights": metrics.pop("model"), **metrics}
    if (folder / "log.csv").is_file():
        row["similarity"] = read_log(folder / "log.csv")[-1].get("similarity")
    row |= {name: config.get(name) for name in ("device", "processes", "versions", "git")}
    row["identity"] = result.identity
    for name, value in result.arguments.items():
        if name not in PLACE:
            row.setdefault(name, value)
    if row.get("checkpoint"):
        row["checkpoint"] = Path(row["checkpoint"]).name
    return row


def write_runs(out: Path) -> None:
    """Write <out>/runs.csv anew; other processes may be writing it too."""
    rows = []
    for file in sorted(out.rglob("metrics.json")):
        with suppress(RunError):  # damaged: --table names it
            rows.append(row_of(file.parent))
    cells = []
    for row in rows:
        cells.append({name: as_cell(value) for name, value in row.items()})
    with lock(out / "runs.lock", patience=60), write_atomically(out / "runs.csv") as draft:
        pandas.DataFrame(cells).to_csv(draft, index=False)


def as_cell(value: object) -> object:
    """Text as it is, nothing as an empty cell, all else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def from_cell(text: str) -> object:
    """What `as_cell` was given."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def read_runs(*paths: str | Path) -> list[Result]:
    """The finished runs of folders, and of files like runs.csv."""
    results, flags = [], vars(train_parser().parse_args([]))
    for path in map(Path, paths):
        if not path.is_file():
            results += collect(path)
            continue
        try:
            table = pandas.read_csv(path, dtype=str, keep_default_na=False)
            for cells in table.to_dict("records"):
                row = {key: from_cell(text) for key, text in cells.items()}
                results.append(result_from(row, flags))
        except (OSError, ValueError, LookupError) as error:
            raise RunError(f"cannot read {path}: {first_line(error)}") from error
    return results


def result_from(row: dict, flags: dict) -> Result:
    """The run of a row of runs.csv, in which `flags` are columns beside the result's."""
    arguments = {name: row[name] for name in row if name in flags}
    metrics = {name: value for name, value in row.items() if name not in flags}
    same = {"method": row["method"], "seed": row["seed"]}
    metrics |= {"dataset": row["task"], "model": row["weights"]} | same
    top1 = float(row[f"{row['split']}_top1"])
    return Result(arguments, row["identity"], metrics, row["split"], top1)


# --- intervals over seeds, by Student's t ---------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high): the 95 % interval of the mean of at least one value, None of one alone."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None, None
    error = scipy.stats.sem(values)
    if error == 0:
        return mean, mean, mean
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)


def paired_difference(
    a: dict[int, float], b: dict[int, float]
) -> tuple[float | None, float | None, float | None, int]:
    """(mean, low, high, n) of a - b over the n seeds that both {seed: value} have.

    low and high are the mean's 95 % interval, None of one seed; without a common seed all are None.
    """
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    if not differences:
        return None, None, None, 0
    return *interval(differences), len(differences)


def compare(rows: list, words: str) -> None:
    """Fill in, in place, the paired difference of each table.Row to one configuration of its table.

    `words` are the method's name, settings as in mask_prob=0, or both, and fit one configuration. A
    mean of tasks is compared if both are over all tasks. Raises RunError, listing what there is,
    if they fit none or several in every table.
    """
    tables: dict[tuple, list] = {}
    for row in rows:
        tables.setdefault((row.benchmark, row.split), []).append(row)
    found = []
    for members in tables.values():
        fit = {row.configuration for row in members if fits(row, words)}
        found += sorted(fit)
        if len(fit) != 1:
            continue
        others = {row.task: row for row in members if row.configuration in fit}
        for row in members:
            other = others.get(row.task)
            if not other or other is row or row.of > 1 and not (row.official and other.official):
                continue
            *numbers, row.pairs = paired_difference(row.scores, other.scores)
            row.difference, row.low, row.high = map(rounded, numbers)
            row.against = other.configuration
    if not any(row.against for row in rows):
        names = ", ".join(found or sorted({row.configuration for row in rows}))
        problem = "fits several" if found else "fits none"
        raise RunError(f"--against {words!r} {problem} of these configurations: {names}")


def fits(row, words: str) -> bool:
    """Whether all of these words are in the row's configuration, numbers compared as numbers."""
    own = set(map(plain, row.configuration.split()))
    return {plain(word) for word in words.split()} <= own


def plain(word: str) -> str:
    """A setting as in mask_prob=0.0 in one spelling: mask_prob=0."""
    name, equals, value = word.lstrip("-").partition("=")
    try:
        value = f"{float(value):g}"
    except ValueError:  # no number
        pass
    return f"{name.replace('-', '_')}{equals}{value}"


def natural(words: str) -> list:
    """A key that sorts text by the numbers in it: rank=2 before rank=16."""
    pieces = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", words)  # every second one is a number
    return [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def rounded(value: float | None) -> float | None:
    """To two digits, without a zero's minus."""
    return None if value is None else round(value, 2) + 0.0


# --- the table ------------------------------------------------------------------------------------


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


def main(argv: list[str] | None = None) -> None:
    args = suite_parser(__doc__).parse_args(argv)
    folder, form, against = args.table, args.format, args.against
    del args.table, args.format, args.against
    with one_line("suite.py"):
        if launched()[1] > 1:
            raise RunError("torchrun is for train.py; start suite.py itself several times")
        if folder:
            known = read_runs(folder)
            if not known:
                raise RunError(f"--table: there is no finished run in {folder}")
            names = [name.lstrip("-").replace("-", "_") for name in args.choose or ()]
            for name in names:
                if name not in known[0].arguments:
                    raise RunError(f"--choose {name}: a run has no such flag")
            rows = rows_of(known, chosen=names)
            if against:
                compare(rows, against)
            print(tabulate(rows, form))
            return
        if against:
            raise RunError("--against is for --table")
        args.resume = None  # what was interrupted goes on, what was not starts
        names, left_out = [], {}
        if args.choose:
            names = chosen_flags(args)
            runs, left_out = search(args)
        else:
            runs = combinations(args)
        metrics, more = run_all(runs)
        for name, reason in (left_out | more).items():
            print(f"left out: {name}: {reason}")
        if not metrics:
            raise RunError("--dataset: not one of these runs was possible; see above")
        folders = [result["run"] for result in metrics]
        rows = rows_of(read_runs(*folders), chosen=names)
        print(tabulate(rows, form))
        print(json.dumps({"rows": list(map(summary, rows))}))


if __name__ == "__main__":
    main()
