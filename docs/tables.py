"""Writes the tables of the PAGES below anew, from results/: python docs/tables.py

In a code block the test tables of its `python suite.py --table` command stand below it; elsewhere a
table stands between `<!-- table: its name -->` and `<!-- end -->`.
"""

import contextlib
import functools
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import suite  # noqa: E402

RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", RESULTS / "README.md"]
PAGES += [ROOT / "docs" / f"{name}.md" for name in ("results", "paper", "demo")]
FENCE = re.compile(r"^```\n(?:.*\n)*?```$", re.MULTILINE)
NAMED = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
COLUMNS = {  # of the tables of methods: (method, p, masking)
    "linear": ("linear", None, None),
    "LoRA": ("lora", None, None),
    "RM-LoRA": ("rmlora", None, None),
    "MLAE, p = 0": ("mlae", 0.0, "stochastic"),
    "MLAE, p = 0.3": ("mlae", 0.3, "stochastic"),
    "MLAE, p = 0.5": ("mlae", 0.5, "stochastic"),
    "MoR": ("mor", None, None),
    "SNELL": ("snell", None, None),
    "SNELLA": ("snella", None, None),
    "full": ("full", None, None),
}
SEARCHED = {  # rows of the table of what a search is worth: (task, method, p, masking)
    "LoRA, `cifar`": ("cifar", "lora", None, None),
    "RM-LoRA, `cifar`": ("cifar", "rmlora", None, None),
    "MoR, `cifar`": ("cifar", "mor", None, None),
    "MLAE, p = 0.5, fixed masks, `cifar`": ("cifar", "mlae", 0.5, "fixed"),
    "MLAE, p = 0.3, `caltech101`": ("caltech101", "mlae", 0.3, "stochastic"),
    "SNELLA, `caltech101`": ("caltech101", "snella", None, None),
}
QUOTED = ("MLAE", "LoRA, r = 8", "PACE", "LoRA (", "linear (", "full (2409")  # published rows


@functools.cache
def read(name: str) -> pandas.DataFrame:
    return suite.read_runs(RESULTS / f"{name}.csv")


def tested(name: str, task: str, method: str, p: float | None, masking: str | None):
    """The runs in results/<name>.csv on a task's test images, of a method with a learned lambda."""
    runs = read(name)
    runs = runs[(runs["split"] == "test") & (runs["freeze_lambda"].map(bool) == False)]  # noqa: E712
    wanted = {"task": task, "method": method, "mask_prob": p, "masking": masking}
    for column, value in wanted.items():
        runs = runs[runs[column].isna() if value is None else runs[column] == value]
    return runs


def spread(top1: pandas.Series) -> str:
    top1 = top1.astype(float)
    return f"{top1.mean():.2f} ± {top1.std():.2f} ({len(top1)})" if len(top1) else ""


def first() -> pandas.DataFrame:
    """README's first table: what the main question needs."""
    cells = {}
    for row, task, of_mlae, of_others in (
        ("part of CIFAR-100", "cifar", "main", "main"),
        ("part of Caltech101", "caltech101", "main", "main"),
        ("demo (digits, a tiny ViT)", "digits", "masking", "methods"),
    ):
        found = {}
        for name in ("linear", "LoRA", "MLAE, p = 0", "MLAE, p = 0.5"):
            folder = of_mlae if name.startswith("MLAE") else of_others
            found[name] = tested(folder, task, *COLUMNS[name]).sort_values("seed")
        cells[row] = {name: spread(runs["top1"]) for name, runs in found.items()}
        mlae, lora = (found[name].to_dict("records") for name in ("MLAE, p = 0.5", "LoRA"))
        mean, _, _ = suite.interval(
            [a["top1"] - b["top1"] for a, b in zip(mlae, lora, strict=True)]
        )
        low, high = suite.image_interval(mlae, lora)
        cells[row]["p = 0.5 minus LoRA [95 %]"] = f"{mean:+.2f} [{low:.1f}, {high:.1f}]"
    return pandas.DataFrame(cells).T.rename_axis("")


def methods() -> pandas.DataFrame:
    cells = {}
    for name, (method, *p) in COLUMNS.items():
        demo = tested("masking" if method == "mlae" else "methods", "digits", method, *p)
        size = (demo["trainable_parameters"] - demo["head_parameters"]).iloc[0]
        cells[name] = {
            "digits (the demo)": spread(demo["top1"]),
            "parameters on digits, without the head": f"{size:,}",
            "part of CIFAR-100": spread(tested("real", "cifar", method, *p)["top1"]),
            "part of Caltech101": spread(tested("real", "caltech101", method, *p)["top1"]),
        }
    return pandas.DataFrame(cells).rename_axis("")


def searched() -> pandas.DataFrame:
    cells = {}
    for name, wanted in SEARCHED.items():
        cells[name] = []
        for runs in (tested("other-rates", *wanted), tested("real", *wanted)):
            (lr,) = runs["lr"].unique()
            cells[name] += [f"{lr:.0e}".replace("e-0", "e-"), spread(runs["top1"])]
    columns = ["one seed chose", "test top-1 (%)", "three seeds chose", "test top-1 (%)"]
    return pandas.DataFrame(cells.values(), cells, columns).rename_axis("")


def pruned() -> pandas.DataFrame:
    runs = pandas.read_csv(RESULTS / "pruning.csv").groupby(["mask_prob", "experts"])["test_top1"]
    cells = runs.agg(lambda top1: spread(top1).removesuffix(" (5)")).unstack().iloc[:, ::-1]
    cells.index = ["p = 0, lr 3.2e-2", "p = 0.5, lr 8e-3"]
    return cells.rename_axis("experts kept in each layer")


def hours() -> pandas.DataFrame:
    counted = json.loads((RESULTS / "flops.json").read_text())
    image = pandas.Series(counted["gflop_per_step"]) / counted["batch_size"]  # GFLOP
    cells = {}
    for benchmark, name in (("vtab-1k", "VTAB-1k"), ("fgvc", "FGVC")):
        train, val, test = pandas.DataFrame([t.sizes for t in data.tasks_of(benchmark)]).sum()
        search = 4 * 3 * (100 * train * image + val * image["linear"])  # 4 rates, 3 seeds
        seed = 100 * (train + val) * image + test * image["linear"]
        cells[f"{name}: search"], cells[f"{name}: one seed"] = search, seed
        cells[f"{name}: search and five seeds"] = search + 5 * seed
    cells = pandas.DataFrame(cells).loc[["mlae", "lora", "linear", "full"]] / 1e5 / 3600
    return cells.map("{:.1f}".format).rename_axis("GPU hours at 100 TFLOP/s")


def published() -> pandas.DataFrame:
    cells = pandas.read_csv(suite.PUBLISHED, dtype=str, keep_default_na=False).replace("", "-")
    tuned = cells.pop("protocol") == "best epoch on the test set"
    order = [cells["method"].str.startswith(name).idxmax() for name in QUOTED]
    cells["method"] += tuned.map({True: ", best epoch on the test set", False: ""})
    head = ["published, ViT-B/16 IN-21k", "VTAB-1k, mean of groups", "mean of tasks", "FGVC"]
    cells.columns = [*head, "groups, best test epoch"]
    return cells.loc[order].set_index(head[0])


def renew_block(match: re.Match) -> str:
    """A code block with the test tables (of val200 if those are all) that its command prints."""
    commands = re.findall(r"^python suite\.py --table .*$", match[0], re.MULTILINE)
    if len(commands) != 1 or "\n|" not in match[0]:
        return match[0]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        suite.main(shlex.split(commands[0])[2:])
    tables = [block for block in text.getvalue().split("\n\n") if block.startswith("| ")]
    tests = [table for table in tables if re.match(r"\|[^|]*\btest top-1", table)]
    before = match[0].split(commands[0])[0]
    return "\n".join([before + commands[0], "\n\n".join(tests or tables), "```"])


def renew(text: str) -> str:
    """The text of a page with its tables made anew."""
    named = {one.__name__: one for one in (first, methods, searched, pruned, hours, published)}
    text = FENCE.sub(renew_block, text)

    def renew_table(match: re.Match) -> str:
        return match[1] + named[match[2]]().to_markdown(**suite.MARKDOWN) + match[3]

    return NAMED.sub(renew_table, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renew(page.read_text()))
