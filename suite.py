"""Many runs: tasks x seeds x settings, and the table of what has been run.

    python suite.py --dataset vtab --seed 0 1 2              # all 19 tasks (fgvc: 5), three seeds
    python suite.py --method mlae lora --lr 5e-4 1e-3 2e-3   # every combination, on the demo
    python suite.py --method mlae lora --lr 4e-3 8e-3 --choose lr --seed 0 1 2   # both tuned
    python suite.py --table runs --against lora              # the table of what is in a folder

Flags are train.py's, each with one value or several: `--targets attn.qkv attn.qkv,mlp.fc1` are two.
Finished runs are skipped, and stopped ones go on. The same command in several shells, or on machines
that share --out, divides the runs. <out>/runs.csv has a row for each run; the last line is JSON.

With --choose, every value of these flags is tried first, for each task, method and other setting by
itself: it trains on 800 images and scores val200. The best mean wins, of equals the smaller value.
The chosen values are then trained on the 1000 images with every --seed and scored on the test set.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas
import scipy.stats

import data
import runs
import train
from methods import METHODS
from model import few, find_method
from runs import RunError, shown
from splits import printable, regular

PROTOCOL = "here: the last epoch's weights, scored once; mean ± standard deviation over seeds (n)"
PUBLISHED = Path(__file__).resolve().parent / "results" / "published.csv"
MARKDOWN = {"tablefmt": "github", "disable_numparse": True}
WIDE = 6  # tasks and means that are columns of a table; more are its lines
LOADED = ("dataset", "data_dir", "source", "img_size", "augment", "val", *data.FOLDER_FLAGS)
COMPARED = {"difference": 2, "low": 2, "high": 2, "image_low": 1, "image_high": 1}  # digits


def suite_parser(manual: str | None = None) -> argparse.ArgumentParser:
    """The parser of suite.py: train.py's flags, with several values where that makes sense."""
    parser = runs.new_parser("suite.py", manual)

    def add(group, name: str, **options) -> None:
        if "nargs" in options:  # several words already: commas inside a value
            options = {"type": lambda text: text.split(",")} | options | {"action": "store"}
        elif name[2:].replace("-", "_") not in runs.PLACE and "action" not in options:
            options["nargs"] = "+"
        if name != "--resume":  # a suite always goes on
            group.add_argument(name, **options)

    runs.add_flags(lambda title: partial(add, parser.add_argument_group(title)))
    flag = parser.add_argument_group("choosing").add_argument
    words = "flags whose best value is chosen on val200 for each task and method, for example lr"
    flag("--choose", nargs="+", metavar="FLAG", default=[], help=words)
    words = "seeds of the search on val200 (default: 0)"
    flag("--search-seed", nargs="+", type=runs.WHOLE, default=[0], metavar="SEED", help=words)
    flag = parser.add_argument_group("table").add_argument
    words = "train nothing; print the table of the runs in these folders or csv files (runs.csv)"
    flag("--table", nargs="+", metavar="PATH", help=words)
    words = "add the paired differences from one configuration, for example lora or mask-prob=0"
    flag("--against", metavar="WORDS", help=words)
    forms, words = ["markdown", "csv", "json", "latex"], "format of the table (default: markdown)"
    flag("--format", choices=forms, default="markdown", help=words)
    return parser


# --- a row a run ----------------------------------------------------------------------------------
def read_runs(*paths: str | Path) -> pandas.DataFrame:
    """The finished runs in folders, and in tables like runs.csv, a row each; later ones are below.

    Columns, of Python objects, None where a run has no such value: all arguments but runs.PLACE;
    `identity`, the dict of what makes the run this run; `split` ("val" or "test") and `top1` on it
    (%); `benchmark` and `task` of the table; `weights`, their tag; what is in metrics.json, log.csv
    and config.json; `run`, its folder below the table's; `correct`, its correct.npy in base64. Runs
    that are damaged or unknown are named and left out; RunError for a file that is no such table.
    """
    rows = []
    for path in map(Path, paths):
        if path.is_file():
            rows += read_table(path)
            continue
        for file in sorted(path.rglob("metrics.json"), key=lambda file: file.lstat().st_mtime):
            try:
                rows.append(row_of(file.parent, path))
            except RunError as error:
                print(printable(f"{file.parent} is left out: {error}"), file=sys.stderr)
    found = pandas.DataFrame(rows, dtype=object)  # numbers stay as they are
    return found.where(found.notna(), None)


def row_of(folder: str | Path, out: str | Path) -> dict:
    """The row of a finished run below the folder `out`; RunError if it is damaged or unknown."""
    folder = Path(folder)
    log, answers = folder / "log.csv", folder / "correct.npy"
    config, metrics = map(runs.read_json, (folder / "config.json", folder / "metrics.json"))
    last = runs.read_log(log)[-1] if log.exists() else {}
    with runs.reading(folder):
        own, task = config["identity"], metrics["dataset"]
        split = "val" if own.get("val") else "test"
        if own["method"] not in METHODS or (task not in data.TASKS and data.FOLDER not in own):
            raise ValueError(f"this code does not know {own['method']} on {task}")
        benchmark = data.OWN if data.FOLDER in own else data.TASKS[task].benchmark
        if data.FOLDER in own:  # folders of one name differ by their digests
            task = printable(f"{task} {own[data.FOLDER][:6]}")
        row = dict.fromkeys(vars(runs.train_parser().parse_args([]))) | config["arguments"]
        row = {name: value for name, value in row.items() if name not in runs.PLACE}
        row |= {"identity": own, "benchmark": benchmark, "task": task, "split": split}
        row |= {"weights": printable(metrics.pop("model")), "official": metrics["official"]}
        metrics.pop("digests", None)  # they are long, and the task's
        row |= {name.removeprefix(f"{split}_"): value for name, value in metrics.items()}
        row |= {"top1": float(row["top1"]), "run": folder.relative_to(out).as_posix()}
        row["data"] = printable(" ".join(metrics["data"].split()))
        row |= {"similarity": last.get("similarity"), "train_top1": last.get("train_top1")}
        row |= {"train_loss": last.get("loss"), "device": config.get("device")}
        row |= {"processes": config.get("processes")} | config.get("versions", {})
        row |= {"commit": config.get("git"), "code": config.get("code"), "correct": None}
        if answers.exists():
            packed = np.load(regular(answers))  # (N / 8,)
            right = np.unpackbits(packed, count=row["images"])  # (N,)
            if abs(100 * right.mean() - row["top1"]) > 0.01:
                raise ValueError("correct.npy has not the answers that were scored")
            row["correct"] = base64.b64encode(packed).decode()
    return row


def read_table(path: Path) -> list[dict]:
    """The rows of a runs.csv; RunError if it is none."""
    rows = []
    with runs.reading(path):
        for row in pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records"):
            rows.append({name: from_cell(text) for name, text in row.items()})
            if rows[-1]["method"] not in METHODS or not isinstance(rows[-1]["identity"], dict):
                raise ValueError(f"a row has no identity, or an unknown method: {row['method']}")
    return rows


def from_cell(text: str):
    """The value of a cell that `to_cell` wrote; pandas alone would make 8 of a column 8.0."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def to_cell(value) -> str:
    """A value as JSON, but text that JSON would not take for something else as it is."""
    if value is None or value != value:  # nan: another row has such a column
        return ""
    is_plain = isinstance(value, str) and from_cell(value) == value
    return value if is_plain else json.dumps(value)


def add_to_table(out: str, folder: str, seen: dict[str, dict]) -> None:
    """Write a finished run into <out>/runs.csv, in the place of an earlier row of it. Not if `seen`,
    {run: its cells} as last seen there, has it: of many processes each passes every run."""
    path = Path(out, "runs.csv")
    row = {name: to_cell(value) for name, value in row_of(folder, out).items()}
    if path.exists() and row.items() <= seen.get(row["run"], {}).items():
        return
    with runs.lock(path.with_name("runs.lock"), patience=60):  # others may be writing it too
        seen.clear()
        for other in read_table(path) if path.exists() else ():
            seen[other["run"]] = {name: to_cell(value) for name, value in other.items()}
        if not row.items() <= seen.get(row["run"], {}).items():
            seen.pop(row["run"], None)
            seen[row["run"]] = row  # the newest is the last
            with runs.write_atomically(path) as draft:
                pandas.DataFrame(seen.values(), dtype=object).to_csv(draft, index=False)


# --- many runs ------------------------------------------------------------------------------------
def combinations(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The settled arguments of every run: the product of all values, each run once."""
    values = {}
    for name, value in vars(args).items():
        values[name] = value if isinstance(value, list) else [value]
    del values["search_seed"]
    suites, values["dataset"] = values["dataset"], []
    for name in suites:
        members = [task.name for task in data.tasks_of(data.SUITES.get(name))]
        values["dataset"] += members or [name]
    found = {}
    for combination in itertools.product(*values.values()):
        one = argparse.Namespace(**dict(zip(values, combination, strict=True)))
        vars(one).update(dict.fromkeys(find_method(one.method).foreign()))  # lora has no masks
        one = train.settle(one)
        found[json.dumps(vars(one), sort_keys=True)] = one
    return list(found.values())


def run_all(todo: list[argparse.Namespace], left_out: dict[str, str]) -> list[tuple]:
    """(arguments, metrics) of the runs that end, in the order of `todo`; each goes into runs.csv.
    What other processes are at comes last. `left_out` gets the reason for what is left out."""

    @lru_cache(maxsize=1)  # the images of the last task stay in memory
    def load_images(*values) -> tuple:
        return data.load_data(argparse.Namespace(**dict(zip(LOADED, values, strict=True))))

    results, queue, passed_over, seen = {}, list(enumerate(todo)), 0, {}
    while queue:
        number, args = queue.pop(0)
        if args.dataset in left_out:
            continue
        try:
            metrics = train.run(args, lambda args: load_images(*map(vars(args).get, LOADED)))
        except runs.Busy as error:
            queue.append((number, args))
            passed_over += 1
            if passed_over == len(queue):
                print(f"waiting for other processes: {error}", flush=True)
            if passed_over >= len(queue):
                time.sleep(2.0)
            continue
        except data.DataError as error:
            left_out[args.dataset] = str(error)
        except (runs.Diverged, runs.OtherImages, MemoryError, RuntimeError) as error:
            is_full = runs.out_of_memory(error)
            if not is_full and not isinstance(error, RunError):
                raise
            name = f"{args.method} on {args.dataset}, seed {args.seed}"
            left_out[name] = runs.OUT_OF_MEMORY if is_full else str(error)
        else:
            results[number] = args, metrics
            print(json.dumps(metrics), flush=True)
            add_to_table(args.out, metrics["run"], seen)
        passed_over = 0
    return [results[number] for number in sorted(results)]


def choose(results: list[tuple], names: list[str], others: list[str]) -> list[dict]:
    """Of (arguments, metrics) of runs on val200, the settings (arguments with no seed) with the best
    mean for each task, method and value of the flags `others`, of equals the smaller `names`;
    those with which a seed diverged are behind the rest. Prints the choice."""
    trials, groups = {}, {}  # {settings: top-1 of each seed}, {what is compared: its trials}
    for run, metrics in results:
        settings = json.dumps(vars(run) | {"seed": None})
        trials.setdefault(settings, []).append(metrics["val_top1"])
    for text, scores in trials.items():
        settings = json.loads(text)
        group = json.dumps([settings[name] for name in ("dataset", "method", *others)])
        groups.setdefault(group, []).append((len(scores), statistics.mean(scores), settings))
    chosen = []
    for rivals in groups.values():
        rivals.sort(key=lambda trial: [size(trial[2][name]) for name in names])
        _, _, best = max(rivals, key=lambda trial: trial[:2])  # the first of equals
        chosen.append(best)
        what = f"{best['method']} on {best['dataset']} {words_of(best, others)}".rstrip()
        tried = [f"{words_of(settings, names)} {mean:.2f}" for _, mean, settings in rivals]
        print(f"chosen on val200, {what}: {words_of(best, names)} of {', '.join(tried)}")
        for name in names:
            sizes = {size(settings[name]) for _, _, settings in rivals}
            is_number = all(isinstance(value, int | float) for value in sizes)  # no word, no None
            if is_number and len(sizes) > 1 and size(best[name]) in (min(sizes), max(sizes)):
                print(f"note: that is the smallest or largest {name}: try more values")
    return chosen


def size(value):
    """What orders the values of a flag: of one for each target their mean."""
    return statistics.mean(value.values()) if isinstance(value, dict) else value


def words_of(settings: dict, names: list[str]) -> str:
    """For example "lr=0.001"; without settings that the method has not."""
    return " ".join(f"{one}={shown(settings[one])}" for one in names if settings[one] is not None)


# --- intervals ------------------------------------------------------------------------------------
def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high): the 95 % interval of the mean by Student's t; None, None of one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None, None
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return mean, float(mean - half), float(mean + half)


def image_interval(a: list[dict], b: list[dict]) -> list[float]:
    """[low, high]: the 95 % interval, in points, of the mean top-1 of runs a minus that of runs b
    of the same seeds, over seeds and images together; [] if not all have answers to these.

    Half of it is hypot(half of `interval` over the seeds, 1.96 deviations over the images): those of
    10,000 mean differences over images drawn with replacement, the same for all runs."""
    if not all(run.get("correct") and run.get("digest") == a[0].get("digest") for run in [*a, *b]):
        return []
    packed = [np.frombuffer(base64.b64decode(run["correct"]), np.uint8) for run in [*a, *b]]
    right = np.unpackbits(np.stack(packed), axis=1, count=a[0]["images"])  # (2 S, N)
    differences = np.subtract(*np.split(100.0 * right, 2))  # (S, N) of -100, 0, 100
    mean, low, _ = interval(differences.mean(1).tolist())
    kinds, counts = np.unique(differences.mean(0), return_counts=True)  # (K,), (K,)
    images = counts.sum()
    drawn = np.random.default_rng(0).multinomial(images, counts / images, 10_000)  # of each kind
    half = math.hypot(mean - low, 1.96 * (drawn @ kinds / images).std())
    return [mean - half, mean + half]


def compare(rows: list[dict], words: str) -> None:
    """Fill in the paired differences to one configuration of each table: the mean, its interval over
    seeds and, of single tasks, that over seeds and images. Means are compared if both are over all
    tasks. RunError if the words, "mlae mask_prob=0", fit none or several in every table."""
    found, notes, unknown = [], [], []
    for place in dict.fromkeys((row["benchmark"], row["split"]) for row in rows):
        table = [row for row in rows if (row["benchmark"], row["split"]) == place]
        names = sorted({row["configuration"] for row in table})
        fit = [name for name in names if settings_in(words) <= settings_in(name)]
        found += fit
        if len(fit) != 1:
            problem = f"fits {'several' if fit else 'none'} of its configurations"
            notes.append(f"note: {', '.join(place)} is not compared: {words!r} {problem}")
            continue
        others = {row["task"]: row for row in table if row["configuration"] == fit[0]}
        for row in table:
            other = others.get(row["task"], row)
            if other is row or row["of"] > 1 and not (row["official"] and other["official"]):
                continue
            seeds = sorted(row["scores"].keys() & other["scores"].keys())
            row |= {"against": fit[0], "pairs": len(seeds), **dict.fromkeys(COMPARED)}
            paired = [row["scores"][seed] - other["scores"][seed] for seed in seeds]
            numbers, ends = interval(paired) if seeds else (), ()
            if row["of"] == 1 and len(seeds) > 1:
                own, rival = ([one["runs"][seed] for seed in seeds] for one in (row, other))
                ends = image_interval(own, rival)
                unknown += [] if ends else [f"{row['configuration']} on {row['task']}"]
            for name, value in zip(COMPARED, [*numbers, *ends], strict=False):
                if value is not None:
                    row[name] = round(value, COMPARED[name]) + 0.0  # no -0.0
    if not any(row["against"] for row in rows):
        names = found or sorted({row["configuration"] for row in rows})
        problem = f"fits {'several' if found else 'none'} of these configurations"
        raise RunError(f"--against {words!r} {problem}: {', '.join(names)}")
    if unknown:
        what = f"no answers for each of the same images are stored for {few(unknown)}"
        notes.append(printable(f"note: {what}: the interval is over seeds alone"))
    for note in notes:
        print(note, file=sys.stderr)


def settings_in(words: str) -> set[tuple]:
    """The words as keys that are equal for --mask-prob=0 and mask_prob=0.0."""
    words = re.sub("-(?=[^ ]*=)", "_", re.sub("(^| )--", " ", words))
    return {tuple(natural(word)) for word in words.split()}


def natural(words: str) -> list:
    """A key that sorts text by the numbers in it: rank=2 before rank=16."""
    pieces = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", words)  # every second one is a number
    return [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


# --- the table ------------------------------------------------------------------------------------
def rows_of(found: pandas.DataFrame, chosen: Sequence[str] = (), searched=False) -> list[dict]:
    """A row for each task and configuration of `read_runs`, and for each mean of tasks: `top1` (%)
    over n seeds, `std`, their sample standard deviation, `scores` and `runs` by seed. `official`:
    all data are the benchmark's own, and all `of` tasks of a mean are there with the same seeds.

    Runs are of one configuration if their identities differ in task and seed alone, and those on
    test images also in the settings that were `chosen` for each task. RunError if one of these has
    two values for one seed: one run would hide the other."""
    # --- configurations ---
    settings, tuned = [], {"val": [], "test": list(chosen)}  # what is tried on val200 stays apart
    for run in found.to_dict("records"):
        own = run["identity"]
        free = ["dataset", "seed", "val", "model", data.FOLDER, *tuned[run["split"]]]
        # the weights by their tag, or by the digest of a file, whatever its name
        given = {"model": own["model"] if "checkpoint" in own else run["weights"]}
        given |= {name: value for name, value in own.items() if name not in free}
        settings.append(json.dumps(given, sort_keys=True))
    found = found.assign(settings=settings)
    place = ["benchmark", "split", "settings", "task", "seed"]
    for (_, split, _, task, seed), same in found.groupby(place):
        for name in tuned[split]:
            values = sorted(set(map(shown, same[name])))
            if len(values) > 1:
                what = f"--choose {name}: {task}, seed {seed}, was run with {' and '.join(values)}"
                raise RunError(f"{what}; give --table only one of these runs")
    hidden = list(found["run"][found.duplicated(place, keep="last")])
    if hidden:
        what = printable(few(hidden))
        print(f"note: newer runs of the same settings hide {what}", file=sys.stderr)
    found = found.drop_duplicates(place, keep="last")
    tried = found[found["split"] == "val"].groupby(["task", "method"]).groups

    # --- rows of tasks and of means ---
    rows = []
    for (benchmark, split), table in found.groupby(["benchmark", "split"], sort=False):
        group_of = {task.name: task.group for task in data.tasks_of(benchmark)}
        groups, rivals = list(group_of.values()), list(map(json.loads, table["settings"].unique()))
        has_means = table.groupby("settings")["task"].nunique().max() > 1
        has_means &= benchmark in data.SUITES.values()
        for text, own in table.groupby("settings", sort=False):
            given, last = json.loads(text), own.iloc[-1].to_dict()
            last |= {"model": given["model"], "checkpoint": given.get("checkpoint", "")[:8] or None}
            common = {"benchmark": benchmark, "split": split, "method": given["method"]}
            common["configuration"] = label(last, given, rivals)
            scores = own.pivot(index="seed", columns="task", values="top1").astype(float)
            official = own.groupby("task")["official"].all()
            tasks = [name for name in group_of if name in scores] or list(scores)
            lines = {name: ([name], 1) for name in tasks}  # of how many tasks
            tasks = [name for name in tasks if official[name]]  # means are over these alone
            if has_means and tasks and benchmark == "vtab-1k":
                for group in dict.fromkeys(groups):
                    members = [name for name in tasks if group_of[name] == group]
                    lines[group] = members, groups.count(group)
                is_whole = {group_of[name] for name in tasks} == set(groups)
                lines["mean of groups"] = tasks if is_whole else [], len(groups)
            if has_means and tasks:
                lines["mean of tasks"] = tasks, len(groups)
            for what, (members, of) in lines.items():
                same, values = own[own["task"] == what], scores[members].dropna(how="all")
                n = int(min(values.count(), default=0))  # of values (seeds, tasks)
                part_of = group_of if what == "mean of groups" else str  # each is its own part
                row = common | {"group": "mean", "task": what, "official": False}
                row |= {"data": "; ".join(sorted(set(same["data"]))), "chosen": {}, "top1": None}
                row |= {"std": None, "seeds": [], "n": n, "tasks": len(members), "of": of}
                row |= {"scores": {}, "against": "", **dict.fromkeys(COMPARED), "pairs": 0}
                row["searched"] = searched or (what, given["method"]) in tried
                row["runs"] = {run["seed"]: run for run in same.to_dict("records")}
                if of == 1:
                    row["group"] = group_of.get(what, benchmark)
                    row["chosen"] = {flag: same[flag].iloc[0] for flag in tuned[split]}
                if n and values.isna().any(axis=None):  # the tasks have not the same seeds
                    row["top1"] = round(float(values.mean().groupby(part_of).mean().mean()), 2)
                elif n:
                    by_seed = values.T.groupby(part_of).mean().mean()  # (seeds,)
                    row["official"] = bool(official[members].all()) and len(members) == of
                    row |= {"seeds": list(by_seed.index), "scores": by_seed.round(4).to_dict()}
                    row["top1"] = round(float(by_seed.mean()), 2)
                    row["std"] = round(float(by_seed.std()), 2) if n > 1 else None
                rows.append(row)
    return rows


def label(arguments: dict, given: dict, rivals: list[dict]) -> str:
    """The method, and its settings in which the configurations of the table differ; of a method's
    own settings that were not given, those in which its own configurations differ."""
    method = arguments["method"]
    words, same = [method], [rival for rival in rivals if rival["method"] == method]
    for name, value in arguments.items():
        usual = name not in given and name in ("targets", *METHODS[method].settings)
        choices = {json.dumps(rival.get(name)) for rival in (same if usual else rivals)}
        if name != "method" and len(choices) > 1 and value is not None:
            words.append(f"{name}={shown(value)}")
    return " ".join(words)


def tabulate(rows: list[dict], form: str = "markdown") -> str:
    """The table as markdown or json, with published results, csv or latex (booktabs' tabulars)."""
    rows = sorted(rows, key=lambda row: natural(row["configuration"]))  # not by when each ran
    published = pandas.read_csv(PUBLISHED, dtype=str, keep_default_na=False)
    numbers = pandas.DataFrame(rows, dtype=object).drop(columns="runs")
    if form == "json":
        both = {"runs": numbers.to_dict("records"), "published": published.to_dict("records")}
        return json.dumps(both, indent=1)
    if form == "csv":
        return numbers.map(to_cell).to_csv(index=False).rstrip()
    benchmarks = dict.fromkeys(task.benchmark for task in data.TASKS.values())
    blocks, comment = [], "% " if form == "latex" else ""
    for split, benchmark in itertools.product(("val", "test"), [*benchmarks, data.OWN]):
        own = [row for row in rows if (row["benchmark"], row["split"]) == (benchmark, split)]
        if not own:
            continue
        blocks.append(grid(own, f"{benchmark}, {split} top-1 (%)", cell, form))
        compared = [row for row in own if row["against"]]
        if compared:
            corner = f"{split} top-1 minus that of {compared[0]['against']}, paired [95 %]"
            blocks.append(grid(compared, corner, difference, form))

        # --- what is no result of its suite yet, what the images are, and what was chosen ---
        lines, tasks = [], [row for row in own if row["group"] != "mean"]
        for row in own:
            if row["task"] == "mean of tasks" and not row["official"]:
                what = "PARTIAL, no {benchmark} result: {configuration} has {tasks} of {of} tasks "
                what += "with official data" + ", of unequal seeds" * (row["tasks"] == row["of"])
                lines.append(what.format(**row) + ".")
        lines += [f"{row['task']}: {row['data']}" for row in tasks]
        for row in tasks:
            words = ", ".join(f"{name} {shown(value)}" for name, value in row["chosen"].items())
            how = "chosen on val200" if row["searched"] else "as run; no search is in this table"
            if words:
                lines.append(f"{row['task']}, {row['configuration']}: {words} {how}")
        if not all(row["official"] for row in tasks):
            lines.append(f"* a subset of {benchmark} or not its official images; in no mean.")
        blocks.append("\n".join(comment + line for line in dict.fromkeys(lines)))  # each once
    blocks.append(comment + PROTOCOL)
    if form != "latex" and any(row["group"] == "mean" and row["split"] == "test" for row in rows):
        head = ["published, ViT-B/16 IN-21k", "vtab-1k groups", "vtab-1k tasks", "fgvc"]
        published.columns = [*head, "groups by best test epoch", "protocol"]
        blocks.append(published.replace("", "-").to_markdown(index=False, **MARKDOWN))
    return "\n\n".join(blocks)


def grid(rows: list[dict], corner: str, show: Callable[[dict], str], form: str) -> str:
    """What `show` writes for each row, configurations x tasks and means, transposed if WIDE."""
    tasks = {row["task"] for row in rows if row["group"] != "mean"}
    columns = [task for task in data.TASKS if task in tasks] or sorted(tasks)
    columns += dict.fromkeys(row["task"] for row in rows if row["group"] == "mean")
    cells = pandas.Series({(row["configuration"], row["task"]): show(row) for row in rows})
    cells = cells.unstack(fill_value="-", sort=False)[columns]
    cells = (cells if len(columns) <= WIDE else cells.T).rename_axis(index=corner).reset_index()
    if form == "latex":
        return cells.to_latex(index=False, escape=True).replace("±", r"$\pm$").rstrip()
    cells.columns = cells.columns.str.replace("|", r"\|")  # the | of a name is no border
    return cells.replace("[|]", r"\|", regex=True).to_markdown(index=False, **MARKDOWN)


def cell(row: dict) -> str:
    """For example 71.00 ± 1.00 (3), with a mark if it is not the benchmark's."""
    if row["top1"] is None:
        return "-"
    deviation = "" if row["std"] is None else f" ± {row['std']:.2f}"
    mark = " *" if row["of"] == 1 else f" [{row['tasks']} of {row['of']} tasks]"
    return f"{row['top1']:.2f}{deviation} ({row['n']}){'' if row['official'] else mark}"


def difference(row: dict) -> str:
    """For example -1.00 [-2.10, 0.10] (5); with images [-2.6, 0.6], over five common seeds."""
    if row["difference"] is None:
        return "-"
    seeds = "" if row["low"] is None else " [{low:.2f}, {high:.2f}]"
    images = "" if row["image_low"] is None else "; with images [{image_low}, {image_high}]"
    return ("{difference:+.2f}" + seeds + " ({pairs})" + images).format(**row)


# --- the command ----------------------------------------------------------------------------------
def run_suite(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The folders of all runs, after a search on val200 for the flags `names`, if there are any.
    RunError if one of these has not several values, or no run was possible."""
    left_out, todo = {}, []
    if names:
        flags = vars(args)
        several = {name for name in flags if isinstance(flags[name], list) and flags[name][1:]}
        several -= {"dataset", "method", "seed", "search_seed"}
        for name in names:
            if name not in several:
                raise RunError(f"--choose {name}: give this flag several values to choose from")
        if args.val:
            raise RunError("--choose scores val200 by itself: leave --val out")
        # what tells choices apart: other flags with several values, and given ones of the methods
        of_methods = {"targets"}.union(*(method.settings for method in METHODS.values()))
        given = {name for name in of_methods if flags.get(name) is not None}
        others = [name for name in flags if name in (several | given) - set(names)]
        tried = argparse.Namespace(**flags | {"val": True, "seed": args.search_seed})
        for settings in choose(run_all(combinations(tried), left_out), names, others):
            for seed in args.seed if isinstance(args.seed, list) else [args.seed]:
                todo.append(argparse.Namespace(**settings | {"val": False, "seed": seed}))
    results = run_all(todo if names else combinations(args), left_out)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if not results:
        raise RunError("--dataset: none of these runs was possible; the reasons are above")
    return [metrics["run"] for _, metrics in results]


def main(argv: list[str] | None = None) -> None:
    args = suite_parser(__doc__).parse_args(argv)
    names = [flag.lstrip("-").replace("-", "_") for flag in args.choose]
    names = [runs.RENAMED.get(name, name) for name in names]
    paths, form, against = args.table, args.format, args.against
    del args.table, args.format, args.against, args.choose
    args.resume = None  # what was interrupted goes on, what was not starts
    with runs.one_line("suite.py"):
        found = read_runs(*(paths or run_suite(args, names)))
        if found.empty:
            raise RunError(f"--table: there is no finished run in {' '.join(paths)}")
        for name in set(names) - set(found):
            raise RunError(f"--choose {name}: there is no such flag")
        codes = set(found.get("code", ()))
        if len(codes) > 1:
            print(f"note: these runs come from {len(codes)} versions of the code", file=sys.stderr)
        rows = rows_of(found, names, searched=not paths)
        if against:
            tried = {(row["benchmark"], "val") for row in rows if names and row["split"] == "test"}
            rivals = [row for row in rows if (row["benchmark"], row["split"]) not in tried]
            compare(rivals, against)
        print(tabulate(rows, form))
        if not paths:  # under the names of metrics.json
            last, keys = [], ("method", "configuration", "chosen", "seeds", "n", "official")
            for row in rows:
                top1 = f"{row['split']}_top1"
                score = {top1: row["top1"], f"{top1}_std": row["std"]}
                last.append({"dataset": row["task"]} | {key: row[key] for key in keys} | score)
            print(json.dumps({"rows": last}))


if __name__ == "__main__":
    main()
