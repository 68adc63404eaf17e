"""Hostile input: damaged and made-up files, pipes, giant sizes, full disks. Each ends in one line.

Nothing here may hang: a pipe that is opened all the same is closed after LIMIT seconds, and the
test fails.
"""

import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import backbone
import data
import eval as evaluation
import files
import images
import model as models
import plot
import sources
import suite
import train

LIMIT = 10  # seconds
SMALL = ["--device", "cpu", "--img-size", "14", "--workers", "0"]
DEEP = "[" * 100_000
GIANT = 10**12


def refused(capsys, main, *arguments):
    """Runs a main() that must end in exit code 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1 and err.strip().isprintable(), err
    assert time.monotonic() - start < LIMIT
    return err


def snapshot(folder):
    """{path: bytes} of the regular files in a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@contextlib.contextmanager
def unblocked(path):
    """Whoever waits for a pipe is let go after LIMIT seconds."""
    command = ["sh", "-c", 'sleep "$1"; : <>"$2"', "sh", str(LIMIT), str(path)]
    helper = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        helper.kill()
        helper.wait()


def as_pipe(path):
    os.mkfifo(path)


def as_folder(path):
    path.mkdir()


def as_loop(path):
    path.symlink_to(path.name)


def as_device(path):
    path.symlink_to("/dev/null")


PLACES = [as_pipe, as_folder, as_device, as_loop]
THERE = PLACES[:-1]  # a link that leads nowhere is as good as no file


def put(path, content):
    """Writes bytes, text or JSON, or puts there what no file is."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def changed(content, key, value):
    """JSON content with the value at a key such as "arguments.rank" changed, or gone if None."""
    content = json.loads(json.dumps(content))
    *outer, last = key.split(".")
    place = content
    for name in outer:
        place = place[name]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return content


GONE = object()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one epoch, and the state that it had after it."""
    root = tmp_path_factory.mktemp("trained")
    save_state = train.save_state

    def keep(path, *arguments):
        save_state(path, *arguments)
        shutil.copy(path, root / "state.pt")

    train.save_state = keep
    try:
        train.main([*SMALL, "--epochs", "1", "--out", str(root / "runs")])
    finally:
        train.save_state = save_state
    return root


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of that run's folder, in runs/digits, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return next(Path("runs/digits").iterdir())


def read(path):
    return json.loads(path.read_text())


# --- config.json ---------------------------------------------------------------------------------

TEXTS = {
    "empty": "",
    "cut": '{"arguments": {',
    "list": "[]",
    "null": "null",
    "number": "1",
    "deep": DEEP,
    "latin": b'{"arguments": "\xe9"}',
    "binary": bytes(range(256)),
    "digits": "9" * 5000,
}
ARGUMENTS = {
    "dataset": [5, [], "a_new_task", GONE],
    "method": [["mlae"], "a_new_method", None],
    "data_dir": [7, None],
    "source": [3, "moon"],
    "img_size": ["28", -14, GIANT, 14.5, True, None],
    "normalize": ["x", {}],
    "model": [1, "no_such_model", "two\nlines", "local-dir:/", GONE],
    "checkpoint": [7, "absent.pth", "/dev/zero", "a\0b"],
    "no_pretrained": ["no", None],
    "targets": ["attn.qkv", [1], ["no.such"], None, GONE],
    "rank": [0, -1, 2_000_000_000, 97, "8", float("nan"), None],
    "mask_prob": [1, -0.5, float("nan"), float("inf"), "0.5"],
    "masking": ["x", 1],
    "pattern": ["x", 1],
    "coef_init": [1e39, float("inf"), "1"],
    "drop_path": [1, float("nan"), "x"],
    "seed": [-1, 10**30, "0"],
    "val": ["yes", None],
}
CONFIGS = [pytest.param(text, id=f"text-{name}") for name, text in TEXTS.items()]
CONFIGS += [pytest.param(place, id=place.__name__) for place in PLACES]
for key, values in ARGUMENTS.items():
    for value in values:
        label = "gone" if value is GONE else str(value)[:12]
        CONFIGS.append(pytest.param((f"arguments.{key}", value), id=f"{key}-{label!r}"))
for key, value in [("weights", []), ("weights.tag", 3), ("amp", "fp8"), ("amp", 5), ("source", 5)]:
    CONFIGS.append(pytest.param((key, value), id=f"{key}-{value}"))
CONFIGS.append(pytest.param(("weights", GONE), id="weights-gone"))


@pytest.mark.parametrize("content", CONFIGS)
def test_a_hostile_configuration(folder, capsys, content):
    path = folder / "config.json"
    put(path, changed(read(path), *content) if isinstance(content, tuple) else content)
    before = snapshot(".")
    with unblocked(path):
        err = refused(capsys, evaluation.main, folder, "--device", "cpu", "--workers", 0)
    assert snapshot(".") == before
    if isinstance(content, tuple) and "a_new_" in str(content[1]):
        assert "is unknown here" in err and "damaged" not in err


# --- adapter.safetensors -------------------------------------------------------------------------


def with_value(key, value):
    def edit(state):
        name = next(name for name in state if name.endswith(key))
        state[name] = value(state[name])

    return edit


def without(key):
    return lambda state: state.pop(next(name for name in state if name.endswith(key)))


def nan(tensor):
    return torch.full_like(tensor, torch.nan)


STATES = {
    "nan": with_value("lora_A", nan),
    "infinite": with_value("lora_lambda", lambda tensor: tensor / 0),
    "beyond float32": with_value("lora_B", lambda tensor: tensor.double() + 1e39),
    "integers": with_value("lora_A", lambda tensor: tensor.long()),
    "8 bits": with_value("lora_A", lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "other shape": with_value("lora_A", lambda tensor: tensor[:, :1].clone()),
    "no values": with_value("lora_A", lambda tensor: tensor[:0].clone()),
    "lacks a key": without("lora_B"),
    "further key": lambda state: state.update({"new\n\x1b[2Jkey": torch.zeros(1)}),
}


@pytest.mark.parametrize("edit", STATES.values(), ids=STATES)
def test_a_hostile_adapter(folder, capsys, edit):
    path = folder / "adapter.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, {"architecture": "vit_nano", "config": "{}"})
    before = snapshot(".")
    assert "adapter" in refused(capsys, evaluation.main, folder, "--device", "cpu")
    assert snapshot(".") == before


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


ADAPTERS = {
    "empty": b"",
    "text": b"not a file of tensors",
    "giant header": struct.pack("<Q", 2**62) + b"{}",
    "giant tensor": header(a={"dtype": "F32", "shape": [GIANT], "data_offsets": [0, 4 * GIANT]}),
    "deep header": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    "no metadata": save({"a": torch.zeros(1)}),
    "other model": save({"a": torch.zeros(1)}, {"architecture": "vit_base"}),
    "deep config": save({"a": torch.zeros(1)}, {"architecture": "vit_nano", "config": DEEP}),
}


@pytest.mark.parametrize(
    "content", [*ADAPTERS.values(), *PLACES], ids=[*ADAPTERS, *map(str, PLACES)]
)
def test_what_is_no_adapter(folder, capsys, content):
    path = folder / "adapter.safetensors"
    put(path, content)
    with unblocked(path):
        assert "adapter" in refused(capsys, evaluation.main, folder, "--device", "cpu")


@pytest.mark.parametrize("rows", [[-1, 0], [0, 0], [0, 10**9]], ids=str)
def test_rows_that_a_layer_has_not(nano, tmp_path, rows):
    net = nano(targets=["attn.v"])
    models.save_adapter(net, tmp_path / "a.safetensors", {})
    state = load_file(tmp_path / "a.safetensors")
    name = next(name for name in state if name.endswith(".rows"))
    state[name][:2] = torch.tensor(rows)
    save_file(state, tmp_path / "b.safetensors", {"architecture": "vit_nano"})
    with pytest.raises(files.ModelError, match="rows are not different rows from 0 to 287"):
        models.load_adapter(net, tmp_path / "b.safetensors")


# --- metrics.json and log.csv --------------------------------------------------------------------

METRICS = [*TEXTS.values(), *THERE]
for key, values in {
    "test_top1": ["x", None, float("nan"), 101, True, [], GONE],
    "dataset": [[], {}, None, GONE],
    "seed": ["0", -1, 10**30, None],
    "official": ["yes", 1, GONE],
    "data": [3, "\x1b[2J", "two\nlines"],
    "model": [None, GONE],
}.items():
    METRICS += [(key, value) for value in values]


@pytest.mark.parametrize("content", METRICS, ids=lambda content: repr(content)[:25])
def test_a_table_skips_a_damaged_run(folder, capsys, content):
    whole = read(folder / "metrics.json")
    shutil.copytree(folder, folder.with_name("damaged"))
    path = folder.with_name("damaged") / "metrics.json"
    put(path, changed(whole, *content) if isinstance(content, tuple) else content)
    capsys.readouterr()
    with unblocked(path):
        suite.main(["--table", "runs"])
    out, err = capsys.readouterr()
    assert f"{whole['test_top1']:.2f} (1)" in out
    assert err.count("\n") == 1 and "damaged is damaged and left out" in err, err
    assert err.strip().isprintable() and "\x1b" not in out


@pytest.mark.parametrize(
    "content",
    [*TEXTS.values(), *PLACES, {"arguments": [], "identity": {}}, {"identity": {}}],
    ids=lambda content: repr(content)[:25],
)
def test_a_table_skips_a_run_without_its_configuration(folder, capsys, content):
    path = folder / "config.json"
    put(path, content)
    capsys.readouterr()
    with unblocked(path), pytest.raises(SystemExit):
        suite.main(["--table", "runs"])
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "is damaged and left out" in err[0] and "no finished run" in err[1]


def test_a_new_task_or_method_is_unknown_and_not_damaged(folder, capsys):
    path = folder / "config.json"
    put(path, changed(read(path), "identity.method", "a_new_method"))
    with pytest.raises(SystemExit):
        suite.main(["--table", "runs"])
    err = capsys.readouterr().err
    assert "a_new_method on digits is unknown here" in err and "damaged" not in err


@pytest.mark.parametrize("content", METRICS[: len(TEXTS) + len(THERE)], ids=lambda c: repr(c)[:25])
def test_a_damaged_result_is_not_taken_for_one(folder, content):
    path = folder / "metrics.json"
    put(path, content)
    args = train.settle(train.train_parser().parse_args([*SMALL, "--epochs", "1"]))
    with unblocked(path):
        assert train.finished(folder, args) is None


LOGS = {
    "empty": "",
    "header": "epoch,loss,train_top1\n",
    "words": "epoch,loss,train_top1\n1,a,b\n",
    "nan": "epoch,loss,train_top1\n1,nan,5\n",
    "short": "epoch,loss,train_top1\n1,2\n",
    "other": "epoch,error\n1,2\n",
    "latin": b"epoch,loss\xe9\n1,2\n",
    "nul": b"epoch,loss,train_top1\n1,\0,2\n",
    "long": "epoch,loss,train_top1\n1,2," + "9" * 200_000 + "\n",
}


@pytest.mark.parametrize("content", [*LOGS.values(), *PLACES], ids=[*LOGS, *map(str, PLACES)])
def test_a_hostile_log(folder, capsys, content):
    put(folder / "log.csv", content)
    with unblocked(folder / "log.csv"):
        assert "log.csv" in refused(capsys, plot.main, folder)
    assert not (folder / "curves.png").exists()


# --- state.pt ------------------------------------------------------------------------------------


def first(state):
    return state["optimizer"]["state"][0]


def bomb(path, member="archive/data/0"):
    """A zip archive of 10 KB that unpacks to 10 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, bytes(10**7))


def set_at(*keys):
    """A function that sets the value at state[key][key]..., the last of `keys`, or removes it."""
    *outer, last, value = keys

    def edit(state):
        for key in outer:
            state = state[key]
        if value is GONE:
            del state[last]
        else:
            state[last] = value

    return edit


RESUMED = {
    "a number": set_at("weights", 3),
    "no weights": set_at("weights", {}),
    "weight NaN": lambda state: with_value("lora_A", nan)(state["weights"]),
    "weight of another shape": lambda s: with_value("lora_A", lambda t: t[:1])(s["weights"]),
    "weight without data": lambda s: with_value("lora_A", lambda t: t.to("meta"))(s["weights"]),
    "sparse weight": lambda s: with_value("lora_A", lambda t: t.to_sparse())(s["weights"]),
    "weight as text": lambda s: with_value("lora_A", lambda t: "x")(s["weights"]),
    "no optimizer": set_at("optimizer", GONE),
    "no moments": set_at("optimizer", "state", {}),
    "one moment less": set_at("optimizer", "state", 0, "exp_avg", GONE),
    "moment NaN": lambda state: first(state).update(exp_avg=nan(first(state)["exp_avg"])),
    "moment of another shape": lambda s: first(s).update(exp_avg_sq=torch.zeros(3)),
    "moment as text": set_at("optimizer", "state", 0, "exp_avg", "x"),
    "digest a number": set_at("digest", 5),
    "random numbers as text": set_at("rng", "cpu", "x"),
    "few random numbers": set_at("rng", "cpu", torch.zeros(3, dtype=torch.uint8)),
    "epoch as text": set_at("progress", "epoch", "1"),
    "epoch below 0": set_at("progress", "epoch", -1),
    "giant epoch": set_at("progress", "epoch", GIANT),
    "rows as text": set_at("progress", "rows", ["x"]),
    "row of text": set_at("progress", "rows", [{"loss": "x"}]),
    "no rows": set_at("progress", "rows", []),
    "seconds NaN": set_at("progress", "seconds", float("nan")),
}


@pytest.mark.parametrize("edit", [*RESUMED.values(), *THERE, bomb, b"", b"text"], ids=str)
def test_a_hostile_state(folder, trained, capsys, edit):
    path = folder / "state.pt"
    (folder / "metrics.json").unlink()
    if edit in RESUMED.values():
        state = torch.load(trained / "state.pt")
        edit(state)
        torch.save(state, path)
    else:
        put(path, edit)
    before = (folder / "adapter.safetensors").read_bytes()
    with unblocked(path):
        err = refused(capsys, train.main, *SMALL, "--epochs", "1", "--resume")
    assert "state.pt: remove it to start anew" in err
    assert (folder / "adapter.safetensors").read_bytes() == before


def test_the_state_itself_is_taken(folder, trained, capsys):
    metrics = read(folder / "metrics.json")
    (folder / "metrics.json").unlink()
    shutil.copy(trained / "state.pt", folder)
    train.main([*SMALL, "--epochs", "1", "--resume"])
    assert "resumed after epoch 1" in capsys.readouterr().out
    assert read(folder / "metrics.json")["test_loss"] == metrics["test_loss"]


# --- checkpoints ---------------------------------------------------------------------------------


class Program:
    """A pickle that would start a program."""

    def __reduce__(self):
        return os.system, ("echo started",)


REASONS = {  # which check refuses it, before memory is taken
    "numbers": "no dense tensor",
    "list": "object has no attribute",
    "program": "Weights only load failed",
    "sparse": "no dense tensor",
    "meta": "no dense tensor",
    "giant": "no dense tensor",
    "nan": "not finite",
    "infinite": "not finite",
    "integers": "is of torch.int64, not torch.float32",
    "empty": "it lacks",
}
CHECKPOINTS = {
    "numbers": lambda state: dict.fromkeys(state, 1),
    "texts": lambda state: dict.fromkeys(state, "x"),
    "numbers for names": lambda state: dict(enumerate(state.values())),
    "list": lambda state: list(state.values()),
    "number": lambda state: 3,
    "wrapped": lambda state: {"state_dict": {"model": 7}},
    "program": lambda state: Program(),
    "sparse": lambda state: {key: value.to_sparse() for key, value in state.items()},
    "meta": lambda state: {key: value.to("meta") for key, value in state.items()},
    "giant": lambda state: {key: torch.zeros(1).expand(GIANT) for key in state},
    "nan": lambda state: {key: nan(value) for key, value in state.items()},
    "integers": lambda state: {key: value.long() for key, value in state.items()},
    "complex": lambda state: {key: value.to(torch.cfloat) for key, value in state.items()},
    "infinite": lambda state: {key: value.double() * 1e300 for key, value in state.items()},
    "one shape": lambda state: dict.fromkeys(state, torch.zeros(2)),
    "empty": lambda state: {},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    torch.save(CHECKPOINTS[name](load_file(backbone.NANO_FILE)), "vit.pth")
    err = refused(capsys, train.main, *SMALL, "--checkpoint", "vit.pth")
    assert "vit.pth" in err and REASONS.get(name, "") in err
    assert not Path("runs").exists()


NO_CHECKPOINT = {
    "empty": b"",
    "text": b"x" * 1000,
    "giant tensor": ADAPTERS["giant tensor"],
    "half a zip": b"PK\x03\x04" + bytes(100),
    "bomb": bomb,
    "bomb of an array": lambda path: bomb(path, "embedding/kernel.npy"),
}


BOMBS = [bomb, NO_CHECKPOINT["bomb of an array"]]


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "npz"])
@pytest.mark.parametrize(
    "content", [*NO_CHECKPOINT.values(), *PLACES], ids=[*NO_CHECKPOINT, *map(str, PLACES)]
)
def test_what_is_no_checkpoint(tmp_path, monkeypatch, capsys, content, suffix):
    monkeypatch.chdir(tmp_path)
    path = Path(f"vit.{suffix}")
    put(path, content)
    with unblocked(path):
        err = refused(capsys, train.main, *SMALL, "--checkpoint", path)
    assert "vit." in err and ("would unpack to 9 MiB" in err) == (content in BOMBS)
    assert not Path("runs").exists()


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--rank", "2000000000"],
        ["--rank", "97"],  # vit_nano's layers have 96 inputs
        ["--rank", "2000000000", "--masking", "fixed"],
        ["--rank", "2000000000", "--method", "lora"],
        ["--img-size", "2000000000"],
        ["--coef-init", "1e39"],
        ["--coef-init", "nan"],
        ["--coef-init", "1e39", "--method", "lora"],
        ["--model", "two\nlines\x1b[2J"],
        ["--model", "local-dir:/"],
        ["--targets", "\x1b[2J"],
        ["--dataset", "\udcff"],
    ],
    ids=" ".join,
)
def test_hostile_flags(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    refused(capsys, train.main, *SMALL, *flags)
    assert not Path("runs").exists()


# --- data ----------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def png(width, height):
    """A PNG whose header declares a size, and that ends there."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    length = struct.pack(">I", len(chunk) - 4)
    return b"\x89PNG\r\n\x1a\n" + length + chunk + struct.pack(">I", zlib.crc32(chunk))


def eps_starts_nothing(monkeypatch):
    def start(*arguments, **options):
        raise AssertionError("Pillow starts a program")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(subprocess, "check_call", start)


PREPARED = {
    "image is EPS": ("images/3.png", EPS),
    "image is text": ("images/3.png", b"text"),
    "image is empty": ("images/3.png", b""),
    "image is giant": ("images/3.png", png(2**31 - 1, 2**31 - 1)),
    "list of latin": ("train800.txt", b"images/\xe9.png 0\n" * 800),
    "list of NUL": ("train800.txt", b"images/\0.png 0\n" * 800),
    "list of long names": ("train800.txt", f"{'x' * 5000}.png 0\n" * 800),
    "list leads out": ("train800.txt", "../../../secret 0\n" * 800),
    "list of escapes": ("train800.txt", "\x1b[2J 0\n" * 800),
    "list without labels": ("train800.txt", "images/1.png\n" * 800),
    "list with a giant label": ("train800.txt", f"images/1.png {'9' * 5000}\n" * 800),
    "marker of latin": ("SUBSET", b"\xe9"),
}
for place in THERE:
    for name in ("images/3.png", "train800.txt", "train800val200.txt", "SUBSET"):
        PREPARED[f"{name} {place.__name__}"] = (name, place)


@pytest.mark.parametrize("name, content", PREPARED.values(), ids=PREPARED)
def test_a_hostile_prepared_folder(cifar, capsys, monkeypatch, name, content):
    monkeypatch.chdir(cifar.parents[2])
    put(cifar / name, content)
    flags = ["--dataset", "cifar", "--source", "prepared", "--model", "vit_nano", "--val"]
    with unblocked(cifar / name):
        refused(capsys, train.main, *SMALL, *flags)
    assert not Path("runs").exists() and not Path("data/cache").exists()


def test_pillow_starts_no_program(tmp_path, monkeypatch):
    eps_starts_nothing(monkeypatch)
    for item in (tmp_path / "a.png", EPS):
        put(tmp_path / "a.png", EPS)
        with pytest.raises(data.DataError, match="not a readable image"):
            images.image_format(item, "here")
    for script in Path(images.__file__).parent.glob("*.py"):
        assert script.name == "images.py" or "Image.open(" not in script.read_text()


FGVC = {
    "deep": DEEP,
    "latin": b'{"\xe9": 1}',
    "list": "[]",
    "text for a class": '{"a.jpg": "1"}',
    "NaN for a class": '{"a.jpg": NaN}',
    "NUL": '{"\\u0000.jpg": 1}',
    "long name": json.dumps({"x" * 5000: 1}),
    "leads out": '{"../../a.jpg": 1}',
    "no text": '{"\\udcff": 1}',
}


@pytest.mark.parametrize("content", [*FGVC.values(), *PLACES], ids=[*FGVC, *map(str, PLACES)])
def test_hostile_lists_of_fgvc(birds, capsys, monkeypatch, content):
    monkeypatch.chdir(birds)
    path = birds / "fgvc/CUB_200_2011/train.json"
    put(path, content)
    flags = ["--dataset", "cub", "--data-dir", ".", "--model", "vit_nano"]
    with unblocked(path):
        refused(capsys, train.main, *SMALL, *flags)
    assert not Path("runs").exists()


def test_a_data_folder_whose_name_is_no_text(cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path(os.fsdecode(b"pho\xfftos"))
    flags = ["--dataset", "cifar", "--data-dir", root, "--model", "vit_nano", "--source"]
    assert "pho" in refused(capsys, train.main, *SMALL, *flags, "prepared")
    (tmp_path / "data").rename(root)
    train_images, _ = data.load("cifar", root, split="train", img_size=8, source="prepared")
    train_images.prepare("cpu", 0)
    assert train_images.cache.is_file() and train_images.digest()


def test_a_pipe_for_a_cache(cifar, monkeypatch):
    train_images, _ = data.load("cifar", cifar.parents[1], split="train", img_size=8)
    train_images.cache.parent.mkdir()
    os.mkfifo(train_images.cache)
    start = time.monotonic()
    with unblocked(train_images.cache):
        train_images.prepare("cpu", 0)
    assert time.monotonic() - start < LIMIT and train_images.cache.is_file()


@pytest.mark.parametrize("dataset", ["cifar", "svhn", "clevr_count", "dtd", "cub"])
def test_eval_neither_downloads_nor_writes(folder, capsys, monkeypatch, dataset):
    asked = []
    monkeypatch.setattr(sources, "_fetch", lambda *arguments: asked.append(arguments))
    path = folder / "config.json"
    config = changed(read(path), "arguments.dataset", dataset)
    put(path, changed(config, "arguments.data_dir", "/nowhere/photos"))
    classes = {"cifar": 100, "svhn": 10, "clevr_count": 8, "dtd": 47, "cub": 200}[dataset]
    net = models.create("vit_nano", classes, img_size=14)
    models.save_adapter(net, folder / "adapter.safetensors", {})
    before = snapshot(".")
    err = refused(capsys, evaluation.main, folder, "--device", "cpu")
    assert "/nowhere/photos" in err and not asked and snapshot(".") == before


def test_eval_asks_the_hub_for_nothing(folder, capsys, monkeypatch, tmp_path):
    asked = []

    def connect(*arguments, **options):
        asked.append(arguments)
        raise OSError("tests connect to nothing")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    path = folder / "config.json"
    config = changed(read(path), "arguments.model", "vit_tiny_patch16_224")
    put(path, changed(config, "arguments.img_size", 32))
    assert "--checkpoint" in refused(capsys, evaluation.main, folder, "--device", "cpu")
    assert not asked


def test_a_slow_download_says_that_it_tries(capsys, monkeypatch):
    def silent(*arguments, **options):
        assert "downloading its weights" in capsys.readouterr().out
        raise OSError("no answer")

    monkeypatch.setattr(backbone.timm, "create_model", silent)
    with pytest.raises(files.ModelError, match="no answer; without a network, give the weights"):
        backbone.create_backbone("vit_tiny_patch16_224", 10)


def test_a_broken_download_sweeps_through_no_link(tmp_path, monkeypatch, fetch_itself):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo").write_text("mine")
    root = tmp_path / "data"
    root.mkdir()
    (root / ".dtd.partial").symlink_to(mine)

    def broken(folder, download):
        (folder / "link").symlink_to(mine)
        (folder / "dtd").mkdir()
        raise OSError("the line is cut")

    original = sources.Original(broken, ("dtd/dtd",), "somewhere", (broken,))
    with pytest.raises(OSError, match="cut"):
        fetch_itself("dtd", original, root)
    assert (mine / "photo").read_text() == "mine"
    assert [path.name for path in root.iterdir()] == [".dtd.partial"]


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 500, 4096, 50_000, 120_000])
def test_a_disk_that_is_full(folder, capsys, size):
    before = snapshot(folder)
    with largest_file(size):
        err = refused(capsys, train.main, *SMALL, "--epochs", "1", "--overwrite")
    assert "--out: cannot write runs/digits/" in err and "File too large" in err
    after = snapshot(folder)
    assert not [path for path in after if path.suffix == ".tmp"]
    assert after[folder / "adapter.safetensors"] == before[folder / "adapter.safetensors"]
    for name in ("config.json", "log.csv"):
        assert after[folder / name]
    assert read(folder / "config.json")["arguments"]["epochs"] == 1


@pytest.mark.parametrize("name", ["config.json", "log.csv", "state.pt", "adapter.safetensors"])
def test_a_folder_in_the_place_of_a_file(folder, capsys, name):
    put(folder / name, as_folder)
    (folder / name / "mine").write_text("mine")
    assert "--out: cannot write" in refused(
        capsys, train.main, *SMALL, "--epochs", "1", "--overwrite"
    )
    assert (folder / name / "mine").read_text() == "mine"
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("out", ["a_file", "a_file/below", "/proc/nowhere", "x" * 300])
def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("mine")
    refused(capsys, train.main, *SMALL, "--epochs", "1", "--out", out)
    assert snapshot(tmp_path) == {tmp_path / "a_file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_without_permission(tmp_path, monkeypatch, capsys, mode):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir(mode=mode)
    assert "Permission denied" in refused(capsys, train.main, *SMALL, "--epochs", "1")


def test_a_picture_on_a_full_disk(folder, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot.main([str(folder)])
    before = (folder / "curves.png").read_bytes()
    with largest_file(2000):
        assert "cannot write" in refused(capsys, plot.main, folder)
    assert (folder / "curves.png").read_bytes() == before


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(folder, tmp_path, cifar, mask):
    before = os.umask(mask)
    try:
        train.main([*SMALL, "--epochs", "1", "--overwrite"])
        found, _ = data.load("cifar", cifar.parents[1], split="train", img_size=8)
        found.prepare("cpu", 0)
    finally:
        os.umask(before)
    for path in [*folder.iterdir(), found.cache]:
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


# --- standard output -----------------------------------------------------------------------------


def programs(folder):
    return {
        "train": (train.main, [*SMALL, "--epochs", "1"]),
        "eval": (evaluation.main, [folder, "--device", "cpu"]),
        "suite": (suite.main, ["--table", "runs"]),
    }


@pytest.mark.parametrize("name", ["train", "eval", "suite"])
def test_a_closed_pipe_ends_quietly(folder, capsys, monkeypatch, name):
    reader, writer = os.pipe()
    os.close(reader)
    main, arguments = programs(folder)[name]
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
    monkeypatch.undo()
    assert stop.value.code == 141 and capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["train", "eval", "suite"])
def test_an_output_that_is_full(folder, capsys, monkeypatch, name):
    main, arguments = programs(folder)[name]
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        err = refused(capsys, main, *arguments)
    assert "standard output: No space left on device" in err


def test_a_program_in_a_pipeline(folder):
    script = Path(suite.__file__)
    command = f'"{sys.executable}" "{script}" --table runs | head -c 1'
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b""
