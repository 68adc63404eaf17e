"""Nights on which machines fail: runs that are killed, that meet another, or share one run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import log
from safetensors.torch import load_file

import files
import processes
import runs
import suite
import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
QUICK = ["--device", "cpu", "--epochs", "2", "--img-size", "14", "--batch-size", "64"]
FILES = {"config.json", "log.csv", "adapter.safetensors", "metrics.json"}


def fork(work):
    """The number of a process that does `work` and ends with 0, or with the code that it exits with."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's other threads are not here
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_with(*words):
    return lambda: train.main([*QUICK, *map(str, words)])


@pytest.fixture(autouse=True)
def few(tmp_path, monkeypatch):
    """Another working directory; 129 images to train on and 100 to score."""
    monkeypatch.chdir(tmp_path)
    load = train.load_data

    def fewer(args):
        found = load(args)
        for images, count in zip(found, (129, 100), strict=True):
            images.items = images.files = images.items[:count]
            images.labels = images.labels[:count]
        return found

    monkeypatch.setattr(train, "load_data", fewer)


def weights_and_log(out):
    (folder,) = Path(str(out), "digits").iterdir()
    rows = log({"run": folder})
    for row in rows:
        del row["seconds"]
    return load_file(folder / "adapter.safetensors"), rows


def assert_same(out, other):
    (weights, rows), (others, other_rows) = weights_and_log(out), weights_and_log(other)
    assert weights.keys() == others.keys() and rows == other_rows
    assert all(torch.equal(weights[key], others[key]) for key in weights)


# --- killed at any moment -------------------------------------------------------------------------


def moments(monkeypatch, act):
    """Calls `act` with a word at every moment that matters to what is on the disk."""
    fsync, replace, save, unlink = os.fsync, os.replace, torch.save, Path.unlink

    def noted_save(state, file):
        save(state, file)
        file.truncate(file.tell() // 2)
        act("half of state.pt")
        file.seek(0)
        save(state, file)

    def noted_replace(draft, path):
        act(f"before {path.name}")
        replace(draft, path)
        act(f"after {path.name}")

    def noted_unlink(path, **options):
        act(f"before the end of {path.name}")
        unlink(path, **options)
        act(f"after the end of {path.name}")

    monkeypatch.setattr(os, "fsync", lambda number: (act("on its way"), fsync(number)))
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(torch, "save", noted_save)
    monkeypatch.setattr(Path, "unlink", noted_unlink)


def killed_at(monkeypatch, number, *words):
    """A run that is gone, without a chance to tidy up, at that moment."""
    left = [number]

    def act(word):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1

    with monkeypatch.context() as patch:
        moments(patch, act)
        assert end_of(fork(train_with(*words))) == 9


def test_killed_at_any_moment_and_resumed(monkeypatch):
    words = []
    with monkeypatch.context() as patch:
        moments(patch, lambda word: print(word, file=open("moments", "a")))  # noqa: SIM115
        assert end_of(fork(train_with("--out", "whole"))) == 0
    words = Path("moments").read_text().splitlines()
    halves = [number for number, word in enumerate(words) if word == "half of state.pt"]
    state = [number for number, word in enumerate(words) if word.endswith("r state.pt")]
    assert len(halves) == len(state) == 2
    ends = (
        "before log.csv",
        "before metrics.json",
        "after metrics.json",
        "after adapter.safetensors",
    )
    chosen = {words.index(word) for word in ends} | {*halves, state[0] - 1, state[1]}
    chosen.add(len(words) - 1 - words[::-1].index("before log.csv"))  # a row before its state
    for number in sorted(chosen):
        killed_at(monkeypatch, number, "--out", number)
        assert end_of(fork(train_with("--out", number, "--resume"))) == 0, words[number]
        assert_same("whole", number)
        (folder,) = Path(str(number), "digits").iterdir()
        left = {path.name for path in folder.iterdir()} - {"lock"}  # nobody's, and no harm
        assert left == FILES, words[number]


def test_an_overwriting_run_that_is_killed_goes_on(monkeypatch, capsys):
    assert end_of(fork(train_with("--out", "a"))) == 0
    counted = []
    save_state = train.save_state

    def once(*arguments):
        save_state(*arguments)
        os._exit(9)

    monkeypatch.setattr(train, "save_state", once)
    assert end_of(fork(train_with("--out", "a", "--overwrite"))) == 9
    monkeypatch.setattr(train, "save_state", lambda *all: counted.append(save_state(*all)))
    train.main([*QUICK, "--out", "a", "--overwrite", "--resume"])
    assert len(counted) == 1 and "resumed after epoch 1" in capsys.readouterr().out


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    moments(monkeypatch, calls.append)
    files.write_json(tmp_path / "a.json", {})
    assert calls[:4] == ["on its way", "before a.json", "after a.json", "on its way"]


# --- signals, memory ------------------------------------------------------------------------------


def test_sigterm_ends_like_ctrl_c_and_a_second_process_stops(capsys):
    again, err = ["--epochs", "500"], open("err", "w+")  # noqa: SIM115

    def work():
        os.dup2(err.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        train_with(*again)()

    child = fork(work)
    try:
        while not list(Path().glob("runs/digits/*/state.pt")):
            time.sleep(0.02)
        with pytest.raises(SystemExit) as stop:
            train.main([*QUICK, *again, "--resume"])
        text = capsys.readouterr().err
        assert stop.value.code == 2 and text.count("\n") == 1
        assert f"process {child} on {socket.gethostname()} is at it" in text
    finally:
        os.kill(child, signal.SIGTERM)
    assert end_of(child) == 143
    (folder,) = Path("runs/digits").iterdir()
    assert {"state.pt", "log.csv", "config.json"} == {file.name for file in folder.iterdir()}
    assert Path("err").read_text().endswith("interrupted: the same command with --resume goes on\n")


def test_a_dead_process_holds_no_lock(tmp_path):
    def hold():
        with processes.claim(tmp_path / "new"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(fork(hold)) == -9
    assert (tmp_path / "new/lock").exists()
    with processes.claim(tmp_path / "new"):
        assert f"process {os.getpid()} on" in (tmp_path / "new/lock").read_text()
    assert not (tmp_path / "new/lock").exists()


def test_many_processes_hold_a_lock_one_after_the_other(tmp_path):
    (tmp_path / "count").write_text("0")

    def add():
        for _ in range(40):
            with processes.lock(tmp_path / "lock", patience=60):
                (tmp_path / "count").write_text(str(int((tmp_path / "count").read_text()) + 1))

    children = [fork(add) for _ in range(3)]
    assert [end_of(child) for child in children] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "120" and not (tmp_path / "lock").exists()


def test_a_file_that_another_process_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("")
    look = Path.stat

    def vanish(path, **options):
        found = look(path, **options)
        path.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", vanish)
        assert files.regular(tmp_path / "lock") == tmp_path / "lock"
    with pytest.raises(FileExistsError):
        (tmp_path / "file").write_text("")
        processes.take_lock(tmp_path / "file" / "lock")


def test_a_folder_that_cannot_be_made_is_no_other_process(tmp_path, monkeypatch, capsys):
    def refuse(path, **options):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # as in /proc
    with pytest.raises(SystemExit) as stop:
        train.main([*QUICK, "--out", str(tmp_path / "there")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "at it" not in line and "there" in line


def test_a_claim_leaves_no_empty_folders(tmp_path):
    with processes.claim(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a").exists() and tmp_path.exists()


def test_out_of_memory_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", lambda *a, **k: torch.empty(2**55, dtype=torch.uint8))
    with pytest.raises(SystemExit) as stop:
        run()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    for flag in ("--batch-size", "--accumulate", "--grad-checkpoint"):
        assert flag in err
    assert not runs.out_of_memory(RuntimeError("shapes do not fit"))
    assert runs.out_of_memory(MemoryError()) and runs.out_of_memory(torch.OutOfMemoryError())


def test_a_suite_goes_on_past_a_run_that_is_too_large(monkeypatch, capsys):
    step = train.train_step

    def large(*arguments, **options):
        if options["method"].settings.get("masking"):
            raise torch.OutOfMemoryError
        return step(*arguments, **options)

    monkeypatch.setattr(train, "train_step", large)
    suite.main([*QUICK, "--method", "mlae", "lora"])
    out = capsys.readouterr().out
    assert "left out: mlae on digits, seed 0: out of memory" in out
    assert json.loads(out.splitlines()[-1])["rows"][0]["method"] == "lora"


# --- ranks ----------------------------------------------------------------------------------------


def ranks_end(count, work):
    """Run `work` in `count` processes that are the ranks of one run; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for number in range(count):

        def as_rank(number=number):
            here = place | {"RANK": number, "LOCAL_RANK": number}
            os.environ.update({name: str(value) for name, value in here.items()})
            work()

        children.append(fork(as_rank))
    return [end_of(child) for child in children]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--method rmlora --accumulate 2",
        "--method snella --rank 4 --grad-checkpoint",
        "--method full --label-smoothing 0.1",
    ],
)
def test_two_ranks_train_as_one_process_does(monkeypatch, words):
    """In float64: AdamW makes whole steps of the rounding errors of gradients that are zero."""
    create, normalizer = train.create_model, train.create_normalizer
    monkeypatch.setattr(train, "create_model", lambda args: create(args).double())

    def double(*arguments):
        normalize = normalizer(*arguments)
        return lambda images: normalize(images).double()

    monkeypatch.setattr(train, "create_normalizer", double)
    # batches of 64, 64 and 1: the second rank has none of the last
    words = [*words.split(), "--epochs", 1, "--lr", 1e-3]
    assert end_of(fork(train_with(*words, "--out", "one"))) == 0
    assert ranks_end(2, train_with(*words, "--out", "two")) == [0, 0]
    (one, rows), (two, other_rows) = weights_and_log("one"), weights_and_log("two")
    difference = max((one[key] - two[key]).abs().max().item() for key in one)
    print("largest difference", difference)
    assert difference < 1e-11
    for a, b in zip(rows, other_rows, strict=True):
        assert {k: float(v) for k, v in a.items()} == pytest.approx(
            {k: float(v) for k, v in b.items()}, rel=1e-4
        )
    (folder,) = Path("two/digits").iterdir()
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "config.json").read_text())["processes"] == 2


def test_ranks_that_are_killed_resume(monkeypatch, capfd):
    words = ["--drop-path", 0.1]
    assert ranks_end(2, train_with(*words, "--out", "whole")) == [0, 0]
    save_state = train.save_state

    def once(*arguments):
        save_state(*arguments)
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", once)
        assert ranks_end(2, train_with(*words, "--out", "parts")) == [9, 1]  # 1 has said nothing
    assert "Error" not in capfd.readouterr().err
    assert ranks_end(2, train_with(*words, "--out", "parts", "--resume")) == [0, 0]
    assert_same("whole", "parts")


def test_what_ranks_cannot_share(monkeypatch, capfd):
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: os._exit(77))  # torchrun ends it
    assert ranks_end(2, train_with("--batch-size", 33)) == [2, 77]
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--batch-size 33 is not a multiple of the 2 processes" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        suite.main(QUICK)
    assert "torchrun is for train.py" in capfd.readouterr().err and not Path("runs").exists()


class Counting:
    """As images: the numbers of a batch, as images and as labels."""

    def epoch(self, order, batch_size, workers, seed):
        for rows in order.split(batch_size):
            yield rows, rows.clone()


@pytest.mark.parametrize(
    ("number", "batch", "count"), [(1, 4, 4), (9, 4, 2), (10, 6, 3), (8, 8, 1)]
)
def test_every_image_counts_once(monkeypatch, number, batch, count):
    order = torch.randperm(number)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(processes, "world_size", lambda: count)
        monkeypatch.setattr(processes, "process_rank", lambda rank=rank: rank)
        parts.append(list(processes.epoch_of(Counting(), order, batch, 0, "")))
    for step, whole in enumerate(order.split(batch)):
        own = [part[step] for part in parts]
        labels = torch.cat([y for _, y, _ in own])
        assert sorted(labels[labels >= 0].tolist()) == sorted(whole.tolist())
        assert {size for _, _, size in own} == {len(whole)}
        assert len({len(x) for x, _, _ in own}) == 1  # equally many draws
    assert {len(part) for part in parts} == {len(order.split(batch))}


# --- suites ---------------------------------------------------------------------------------------


def test_a_suite_in_two_shells_does_every_run_once(monkeypatch):
    create = train.create_model

    def noted(args):
        with open("trained", "a") as file:
            file.write(f"{args.lr} {args.seed} {args.val}\n")
        return create(args)

    monkeypatch.setattr(train, "create_model", noted)
    monkeypatch.setattr(suite, "PAUSE", 0.1)
    words = [*QUICK, "--lr", "4e-3", "8e-3", "--choose", "lr", "--search-seed", "0", "1"]

    def shell(name):
        def work():
            sys.stdout = open(name, "w")  # noqa: SIM115
            suite.main([*words, "--seed", "0", "1"])
            sys.stdout.flush()

        return work

    children = [fork(shell(name)) for name in ("first", "second")]
    assert [end_of(child) for child in children] == [0, 0]
    trained = Path("trained").read_text().splitlines()
    assert len(trained) == len(set(trained)) == 6  # two rates, two seeds; then two seeds
    last = [Path(name).read_text().splitlines()[-1] for name in ("first", "second")]
    assert last[0] == last[1] and json.loads(last[0])["rows"][0]["n"] == 2
    lines = Path("runs/search.csv").read_text().splitlines()
    assert len(lines) == 5 and sum(line.split(",")[5] == "1" for line in lines) == 2
    assert {path.name for path in Path("runs").iterdir()} == {"digits", "search.csv"}
    assert re.search("finished before|waiting for other processes", Path("first").read_text())


def test_the_command_itself_under_torchrun(tmp_path):
    """Two processes of torchrun, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    script = str(Path(train.__file__))
    done = subprocess.run([*command, script, *QUICK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test_top1" in json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("parameters train") == 1  # the first rank alone prints
