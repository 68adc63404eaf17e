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
import itertools
import json

from flags import suite_parser

if __name__ == "__main__":
    suite_parser(__doc__).parse_args()  # --help and typing errors need not wait for torch

import data
import train
from baselines import METHODS
from runs import Diverged, RunError, collect, one_line
from table import rows_of, summary, tabulate


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


def main(argv: list[str] | None = None) -> None:
    args = suite_parser(__doc__).parse_args(argv)
    folder, form = args.table, args.format
    del args.table, args.format
    with one_line("suite.py"):
        if folder:
            known = collect(folder, tasks=data.TASKS, methods=METHODS)
            if not known:
                raise RunError(f"--table: there is no finished run in {folder}")
            print(tabulate(rows_of(known), form))
            return
        args.resume = None  # what was interrupted goes on, what was not starts
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
