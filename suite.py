"""Many runs: tasks x seeds x settings, and the table of what has been run.

    python suite.py --dataset vtab --seed 0 1 2              # all 19 tasks (fgvc: 5), three seeds
    python suite.py --method mlae lora --lr 5e-4 1e-3 2e-3   # every combination, on the demo
    python suite.py --method mlae lora --lr 4e-3 8e-3 --choose lr --seed 0 1 2   # tuned alike
    python suite.py --table runs --format markdown           # what is in a folder, as one table
    python suite.py --table runs --against lora              # and the paired difference to that

With --choose, every value of those flags is tried first: trained on 800 images and scored on
val200, for each task, method and other setting by itself. The best mean is chosen, of equals the
smaller value, and <out>/search.csv has all of it. Only then do the seeds run on the 1000 images,
and are tested.

It takes train.py's flags, each with one value or several, and runs their product in this process;
`--targets attn.qkv attn.qkv,mlp.fc1` are two values, and so are `--mask-prob 0.3
attn.qkv=0.5,mlp.fc1=0.3`. What is finished is skipped, and what was interrupted goes on. The same
command in several shells, or on several machines that share --out, shares the runs out. Tasks
whose data are missing are named at the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flags import shown, suite_parser

if __name__ == "__main__":
    suite_parser(__doc__).parse_args()  # --help and typing errors need not wait for torch

import data
import train
from baselines import METHODS
from files import whole
from model import find_method
from processes import Busy, launched, lock
from runs import OUT_OF_MEMORY, Diverged, RunError, collect, one_line, out_of_memory
from stats import compare
from table import rows_of, summary, tabulate

PAUSE = 2.0  # seconds between two looks at runs of other processes


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
    results, left_out = [], {}
    queue, passed_over = deque(runs), 0
    while queue:
        args = queue.popleft()
        if args.dataset in left_out:
            continue
        try:
            metrics = train.run(args)
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
            done(args, metrics)
        passed_over = 0
    return results, left_out


@dataclass
class Trial:
    """Settings that --choose tries: the arguments of one run without seed, top-1 on val200 (%) by
    seed, and the runs' folders."""

    arguments: dict
    top1: dict[int, float]
    folders: dict[int, str]

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
    runs are left out. The choice is on disk before it returns.
    """
    names = chosen_flags(args)
    others = identifying_flags(args, names)
    path = Path(args.out, "search.csv")
    every = argparse.Namespace(**vars(args))
    every.val, every.seed = True, args.search_seed
    runs = combinations(every)
    trials: dict[str, Trial] = {}  # in this order, whatever order the results come in
    for run in runs:
        key, arguments = without_seed(run)
        trials.setdefault(key, Trial(arguments, {}, {}))

    def note(run: argparse.Namespace, metrics: dict) -> None:
        trial = trials[without_seed(run)[0]]
        trial.top1[run.seed] = metrics["val_top1"]
        trial.folders[run.seed] = metrics["run"]
        write_search(path, [*others, *names], list(trials.values()), [])

    _, left_out = run_all(runs, note)
    scored = [trial for trial in trials.values() if trial.top1]
    best = choose(scored, names, others)
    if best:
        write_search(path, [*others, *names], scored, best)
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


def write_search(path: Path, names: list[str], trials: list[Trial], best: list[Trial]) -> None:
    """search.csv: a line for each run on val200, and whether its settings were chosen; lines of
    earlier searches in the same folder stay. `choice` are the flags that were chosen."""
    lines = {}  # folder of a run -> its line
    choice = " ".join(names)
    for trial in trials:
        for seed, top1 in sorted(trial.top1.items()):
            line = {}
            for name in ("dataset", "method", *names):
                value = trial.arguments[name]
                line[name] = "" if value is None else shown(value)  # none: the method lacks it
            line |= {"seed": seed, "val_top1": top1, "chosen": int(trial in best)}
            line["choice"] = choice
            lines[trial.folders[seed]] = line | {"run": trial.folders[seed]}
    with lock(path.with_name("search.lock"), patience=60):  # others may be writing it too
        earlier = read_search(path)
        rows = []
        for line in earlier:
            if line["choice"] != choice or line["run"] not in lines:
                rows.append(line)
        rows += lines.values()
        columns = dict.fromkeys(["dataset", "method", *names])
        for line in earlier:
            columns |= dict.fromkeys(line)
        last = ["seed", "val_top1", "chosen", "choice", "run"]
        columns = [name for name in columns if name not in last] + last
        with whole(path) as draft, open(draft, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def read_search(path: Path) -> list[dict]:
    """The lines of an earlier search.csv; none if there is none, or it is another file."""
    if not path.is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    ours = all(None not in row and row.get("run") and "choice" in row for row in rows)
    return rows if ours else []


def main(argv: list[str] | None = None) -> None:
    args = suite_parser(__doc__).parse_args(argv)
    folder, form, against = args.table, args.format, args.against
    del args.table, args.format, args.against
    with one_line("suite.py"):
        if launched()[1] > 1:
            raise RunError("torchrun is for train.py; start suite.py itself several times")
        if folder:
            known = collect(folder)
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
        rows = rows_of(collect(*folders), chosen=names)
        print(tabulate(rows, form))
        print(json.dumps({"rows": list(map(summary, rows))}))


if __name__ == "__main__":
    main()
