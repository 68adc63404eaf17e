"""The examples of README.md, docs/ and the scripts' manuals: the Python runs, the flags exist."""

import ast
import importlib
import re
import shlex
from functools import partial
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from test_runs import fewer_digits

import bench
import eval as evaluation
import export
import model as models
import plot
import suite
import tasks
import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MANUALS = sorted(path for path in ROOT.glob("*.py") if "\n    python " in path.read_text())
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+\.\d+")
WORK = [(train, "run"), (evaluation, "load_run"), (suite, "run_all"), (suite, "read_runs")]
WORK += [(plot, "group"), (bench, "measure"), (bench, "memory")]


def test_the_tutorial_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """Accuracies to three points, the rest to 0.5: on another machine training ends elsewhere."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    blocks, names = BLOCK.findall((ROOT / "docs/tutorial.md").read_text()), {}
    for language, text in blocks:
        exec(text if language else "", names)
    printed = capsys.readouterr().out
    shown = "".join(text for language, text in blocks if not language)
    assert NUMBER.sub("", printed) == NUMBER.sub("", shown) != ""
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=3 if float(theirs) > 5 else 0.5)


def test_the_python_of_the_pages_runs(run, monkeypatch):
    fewer_digits(monkeypatch, 64, 10)
    folder = run("--epochs", 1, "--img-size", 28)["run"]
    create_vit = partial(torchvision.models.VisionTransformer, 32, 16, 1, 2, 8, 16)
    monkeypatch.setattr(torchvision.models, "vit_b_16", create_vit)
    for page in PAGES:
        names = vars(tasks) | {"TASKS": {}} if page.name == "data.md" else {}
        text = "" if page.name == "tutorial.md" else page.read_text()
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            model = models.create_backbone("vit_nano", 10, pretrained=False)  # timm's
            model.encoder = create_vit().encoder
            layer = SimpleNamespace(q_proj=torch.nn.Linear(8, 8))  # the real one: test_mlae.py
            model.vit = SimpleNamespace(layers=[SimpleNamespace(attention=layer)])
            names["model"] = model  # and what the blocks above left
            exec(re.sub(r'"runs/[^"]*"', repr(folder), code), names)


def commands(page):
    """(script, its words) of each command on a page or in a script's manual."""
    text = page.read_text()
    text = text if page.suffix == ".md" else ast.get_docstring(ast.parse(text))
    for name, value in re.findall(r"`(\$\w+)` stands for\n+```\n(.*?)\n```", text, re.DOTALL):
        text = text.replace(name, value)
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    inline = [" ".join(code.split()) for code in inline]
    for part in re.split(r"\n| && ", "\n".join([text, *inline])):
        part = part.strip().removeprefix("$ ")
        if re.match(r"(python|torchrun|sbatch) .*\w\.py", part):
            words = [word for word in shlex.split(part, comments=True) if word != "..."]
            words = shlex.split(words[-1]) if words[0] == "sbatch" else words
            place = [word.endswith(".py") for word in words].index(True)
            yield words[place], words[place + 1 :]


@pytest.mark.parametrize("page", PAGES + MANUALS, ids=lambda page: page.name)
def test_every_command_is_known(page, tmp_path, monkeypatch, capsys, read=plot.read_runs):
    """As far as its work, which data.py and sweeps of results/ do; tables: test_results.py."""

    def end(*arguments, **options):
        raise SystemExit(0)  # all flags are checked by now

    for script, name in WORK:
        monkeypatch.setattr(script, name, end)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    for name in ("data", "docs", "photos/cat", "photos/dog"):
        (tmp_path / name).mkdir(parents=True)
    for script, words in commands(page):
        if script == "docs/tables.py" or "shapes" in words:
            continue  # it takes no flags; docs/data.md itself adds this task
        words = [path for word in words for path in glob(word) or [word]]
        draws = page in PAGES and any(word.startswith("results/") for word in words)
        monkeypatch.setattr(plot, "read_runs", read if draws else end)
        try:
            importlib.import_module(script.removesuffix(".py")).main(words)
        except SystemExit as ended:
            assert not ended.code, (script, words, capsys.readouterr().err)
