import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as models
import tasks
import train

torch.set_num_threads(1)  # as in the processes that tests fork; small models gain nothing by two
# if torch.compile's backward were the first one, a process that forks later could have none
torch.ones((), requires_grad=True).backward()


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fetch_itself():
    return tasks._fetch


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, fetch_itself):
    def refuse(*arguments):
        raise OSError("tests download nothing")

    monkeypatch.setattr(tasks, "_fetch", refuse)


@pytest.fixture
def nano():
    """A factory of small models whose experts act: B is random instead of zero."""

    def make(**kwargs):
        net = models.create("vit_nano", 10, **{"pretrained": False, **kwargs})
        for layer in models.adapters(net).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
            layer.lora_B.data *= getattr(layer, "expert_mask", 1)
        return net

    return make


@pytest.fixture
def images():
    return torch.randn(4, 3, 28, 28)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs train.py in this process, from another folder, on small images; returns its last line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        train.main(["--device", "cpu", "--epochs", "2", "--img-size", "14", *map(str, arguments)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def noise(rng, height, width):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def cifar(tmp_path):
    """A prepared CIFAR-100 of ten images, which the lists call by other names, each once."""
    folder = tmp_path / "data" / "vtab-1k" / "cifar"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        noise(rng, 8, 8).save(folder / "images" / f"{i}.png")
    for i in range(1, 300):  # images/7/3.png is images/3.png: links to all would take long
        (folder / "images" / f"{i}").symlink_to(".")
    write_lists(folder, 30, 7)
    return folder


def log(metrics):
    return list(csv.DictReader(Path(metrics["run"], "log.csv").read_text().splitlines()))


def write_lists(folder, test, step):
    lines = []
    for i in range(1000 + test):
        path = f"{i // 10}/{i % 10}" if i >= 10 else i
        lines.append(f"images/{path}.png {i % 10 * step}\n")
    (folder / "train800.txt").write_text("".join(lines[:800]))
    (folder / "val200.txt").write_text("".join(lines[800:1000]))
    (folder / "train800val200.txt").write_text("".join(lines[:1000]))
    (folder / "test.txt").write_text("".join(lines[1000:]))


def capture_on_cpu(step, model, img_size, batch_size):
    """A stand-in for train.capture, where there is no CUDA graph."""
    x = torch.zeros(batch_size, 3, img_size, img_size, dtype=torch.uint8)
    y, size = torch.full((batch_size,), train.PADDING), torch.tensor(1.0)
    train.hold_mask_prob(model)

    def replay(batch, labels, count):
        x[: len(batch)], y[: len(labels)] = batch, labels
        y[len(labels) :] = train.PADDING
        size.fill_(count)
        model.zero_grad(set_to_none=False)  # a graph writes gradients anew, in their place
        step(x, y, size)

    return replay


def stop_after(monkeypatch, epochs):
    save = train.save_state

    def save_and_stop(*arguments):
        save(*arguments)
        if arguments[-1]["epoch"] == epochs:
            monkeypatch.setattr(train, "save_state", save)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", save_and_stop)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A whole CIFAR-100 task in the prepared layout: 1000 + 20 images, three of them odd."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "vtab-1k" / "cifar"
    rng, odd = np.random.default_rng(0), {1: "L", 2: "P", 3: "RGBA"}
    for name, count in {"train800": 800, "val200": 200, "test": 20}.items():
        (folder / "images" / name).mkdir(parents=True)
        lines = []
        for i in range(count):
            path = f"images/{name}/{i:06}.png"
            noise(rng, 10, 12).convert(odd.get(i, "RGB")).save(folder / path)
            lines.append(f"{path} {i % 100}\n")
        (folder / f"{name}.txt").write_text("".join(lines))
    both = (folder / "train800.txt").read_text() + (folder / "val200.txt").read_text()
    (folder / "train800val200.txt").write_text(both)
    return root


def edited(prepared, tmp_path, listing, edit):
    """A copy of the prepared folder with one list edited; the images are linked, not copied."""
    source, folder = prepared / "vtab-1k" / "cifar", tmp_path / "vtab-1k" / "cifar"
    folder.mkdir(parents=True)
    (folder / "images").symlink_to(source / "images")
    for file in source.glob("*.txt"):
        lines = file.read_text().splitlines()
        lines = edit(lines) if file.name == listing else lines
        (folder / file.name).write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def birds(tmp_path):
    """A CUB of few images, in VPT's layout: class ids from 1 with gaps, images of several shapes."""
    folder, rng = tmp_path / "fgvc/CUB_200_2011", np.random.default_rng(0)
    for part, count in {"train": 30, "val": 10, "test": 12}.items():
        listing = {}
        for i in range(count):
            name = f"{i % 5:03}.bird/{part}{i}.jpg"
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            size = 90 + 7 * (i % 9), 120 - 5 * (i % 7)
            noise(rng, 5, 4).resize(size).save(folder / "images" / name)
            listing[name] = 3 * (i % 5) + 1
        (folder / f"{part}.json").write_text(json.dumps(listing))
    return tmp_path
