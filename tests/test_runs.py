"""What surrounds a run: flags, settings, identity, files, locks, the parts of ranks, errors."""

import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import runs

GIANT = 10**12


def parsed(*words):
    return runs.train_parser().parse_args([*map(str, words)])


def settled(*words):
    return runs.settle(parsed(*words))


def own(*words):
    args = settled(*words)
    return runs.identity(args, runs.usual(args))


def fork(work):
    """The number of a process that does `work` and ends with 0, or with the code it exits with."""
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
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- flags and settings ---------------------------------------------------------------------------


def test_help_names_every_method_masking_pattern_and_schedule():
    text = runs.train_parser().format_help()
    for name in (*runs.METHODS, *runs.MASKINGS, *runs.PATTERNS, *runs.SCHEDULES):
        assert name in text
    assert "8; snell, snella: 32" in " ".join(text.split())  # defaults of --rank


@pytest.mark.parametrize(
    "words",
    [
        "--mask-prob 1",
        "--mask-prob nan",
        "--mask-prob attn.qkv=0.5 0.3",
        "--mask-prob attn.qkv=0.5 attn.qkv=0.3",
        "--mask-prob 0.5 0.3",
        "--rank 0",
        "--lr -1",
        "--img-size 2000000000",
        "--coef-init nan",
        "--seed -1",
        "--masking some",
        "--augment rotate",
        "--budget 0.1",
        "--maskprob 0.5",
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(capsys, words):
    with pytest.raises(SystemExit) as stop:
        parsed(*words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words.split()[0] in err


def test_a_masking_probability_may_be_one_for_each_target():
    wanted = {"attn.qkv": 0.5, "mlp.fc1": 0.3}
    assert parsed("--mask-prob", "mlp.fc1=0.3", "attn.qkv=0.5").mask_prob == wanted
    assert parsed("--mask-prob", "mlp.fc1=0.3,attn.qkv=0.5").mask_prob == wanted
    assert parsed("--mask-prob", "0.3").mask_prob == 0.3 and parsed().mask_prob is None
    assert [parsed("--budget", word).budget for word in ("0.3M", "50K", "7")] == [
        300_000,
        50_000,
        7,
    ]


def test_an_identity_is_what_differs_from_the_defaults():
    plain = {"dataset": "digits", "method": "mlae", "model": "vit_nano", "epochs": 20, "seed": 0}
    assert own() == plain
    assert own("--lr", "8e-3", "--rank", "8", "--mask-prob", "0.5") == plain  # as by default
    assert own("--lr", "1e-3", "--val") == plain | {"lr": 1e-3, "val": True}
    assert own("--epochs", "5") == plain | {"epochs": 5}  # its warm-up follows
    assert own("--epochs", "5", "--warmup-epochs", "2") == plain | {"epochs": 5, "warmup_epochs": 2}
    assert own("--method", "lora", "--coef-init", "2")["coef_init"] == 2


def test_machine_and_place_are_not_what_a_run_is():
    words = "--device cpu --workers 0 --out elsewhere --data-dir photos --resume --overwrite"
    assert own(*words.split()) == own()


def test_settings_of_other_methods_are_set_aside_aloud(capsys):
    plain = own("--method", "linear")
    assert own("--method", "linear", "--mask-prob", "0.3", "--rank", "4") == plain
    err = capsys.readouterr().err
    assert "mask_prob" in err and "rank" in err


@pytest.mark.parametrize(
    "words", ["--warmup-epochs 20", "--warmup-epochs -1", "--rank 8 --budget 1M"]
)
def test_settings_that_do_not_go_together(words):
    with pytest.raises(
        runs.RunError, match=words.split()[0] if "rank" not in words else "--budget"
    ):
        settled(*words.split())


def test_folders_are_those_of_earlier_versions():
    """A golden value for each kind of setting: the names of folders in use must not change."""
    names = {
        "": "mlae-vit_nano-seed0-6e2c1e",
        "--lr 2e-3 --mask-prob 0.3 --val": "mlae-vit_nano-p0.3-lr0.002-seed0-val-939a59",
        "--mask-prob attn.qkv=0.5 mlp.fc1=0 --targets attn.qkv mlp.fc1 --seed 3": "mlae-vit_nano-pattn.qkv=0.5,mlp.fc1=0-seed3-f2010d",
        "--method snella --rank 4 --mask-prob 0.2": "snella-vit_nano-r4-seed0-5182ea",
    }
    for words, name in names.items():
        assert runs.run_folder("runs", own(*words.split())) == Path("runs/digits", name)


def test_a_new_flag_renames_no_old_run():
    args, usual = settled(), runs.usual(settled())
    before = runs.run_folder("runs", runs.identity(args, usual))
    args.new_flag = usual.new_flag = 3
    assert runs.run_folder("runs", runs.identity(args, usual)) == before


# --- files ----------------------------------------------------------------------------------------


def saved(folder, flags, **changes):
    """A run's folder with this configuration."""
    config = {"arguments": flags, "weights": {"tag": "x"}, "amp": "off", "source": "embedded"}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--mask-prob attn.qkv=0.5 mlp.fc1=0.3 --targets attn.qkv mlp.fc1",
        "--method linear --lr 3.3333333333333335e-05 --val --img-size 14",
        "--method snella --budget 20K --freeze-lambda",
        "--mask-schedule off-at-end --mask-pattern hourglass --augment flip --freeze-lambda",
        "--no-pretrained --checkpoint weights.pth --out a/b --data-dir photos",
    ],
)
def test_saved_arguments_are_read_as_they_were(tmp_path, words):
    args = settled(*words.split())
    folder = saved(tmp_path, vars(args))
    assert vars(runs.read_config(folder)["arguments"]) == vars(args)


def test_what_an_old_configuration_lacks_takes_the_defaults(tmp_path):
    old = {"dataset": "digits", "method": "mlae", "rank": None, "val": True}
    args = runs.read_config(saved(tmp_path, old))["arguments"]
    assert vars(args) == vars(settled("--val")) | {"warmup_epochs": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "a_new_task"),
        ("method", "a_new_method"),
        ("source", "moon"),
        ("img_size", GIANT),
        ("no_pretrained", "no"),
        ("rank", 0),
        ("mask_prob", 1),
        ("mask_prob", {"attn.qkv": float("inf")}),
        ("masking", "x"),
        ("pattern", 1),
        ("seed", 10**30),
        ("a_new_flag", 3),
    ],
    ids=str,
)
def test_a_saved_value_that_no_flag_would_take_is_an_error(tmp_path, name, value):
    folder = saved(tmp_path, vars(settled()) | {name: value})
    with pytest.raises(runs.RunError, match="config.json"):
        runs.read_config(folder)


@pytest.mark.parametrize("key", ["arguments", "weights", "amp"])
def test_a_configuration_without_a_part_is_an_error(tmp_path, key):
    folder = saved(tmp_path, vars(settled()), **{key: []})
    with pytest.raises(runs.RunError, match="config.json"):
        runs.read_config(folder)


@pytest.mark.parametrize("name", ["dataset", "method"])
def test_a_configuration_without_its_task_or_method_is_an_error(tmp_path, name):
    arguments = vars(settled())
    del arguments[name]  # the demo's would be another run
    with pytest.raises(runs.RunError, match="config.json"):
        runs.read_config(saved(tmp_path, arguments))


TEXTS = {
    "cut": b'{"arguments": {',
    "list": b"[]",
    "deep": b"[" * 100_000,
    "latin": b'{"arguments": "\xe9"}',
}


@pytest.mark.parametrize("kind", [*TEXTS, "pipe", "folder", "device", "loop", "absent"])
def test_what_is_no_json_file_is_an_error_and_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "config.json"
    places = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path.name),
        "absent": lambda: None,
    }
    places.get(kind, lambda: path.write_bytes(TEXTS[kind]))()
    with pytest.raises(runs.RunError, match="config.json"):
        runs.read_json(path)


LOGS = {
    "header": "epoch,loss,train_top1\n",
    "words": "epoch,loss,train_top1\n1,a,b\n",
    "nan": "epoch,loss,train_top1\n1,nan,5\n",
    "short": "epoch,loss,train_top1\n1,2\n",
    "other": "epoch,error\n1,2\n",
}


@pytest.mark.parametrize("kind", LOGS)
def test_what_is_no_log_is_an_error(tmp_path, kind):
    (tmp_path / "log.csv").write_text(LOGS[kind])
    with pytest.raises(runs.RunError, match="log.csv"):
        runs.read_log(tmp_path / "log.csv")


def test_a_log_is_read_as_it_was_written(tmp_path):
    rows = [
        {"epoch": 1, "loss": 0.25, "train_top1": 50.0},
        {"epoch": 2, "loss": 1e-9, "train_top1": 1},
    ]
    runs.write_log(tmp_path / "log.csv", rows)
    assert runs.read_log(tmp_path / "log.csv") == rows


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": object()})
    with largest_file(100), pytest.raises(runs.RunError, match="metrics.json"):
        runs.write_json(path, {"a": "x" * 1000})
    with largest_file(100), pytest.raises(runs.RunError, match="metrics.json"):
        with runs.write_atomically(path) as draft, open(draft, "wb") as file:
            torch.save({"a": torch.zeros(1000)}, file)  # whose error hides the system's
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_a_new_file_takes_the_place_of_none(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(KeyError), runs.new_file(path, "--predictions") as draft:
        draft.write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with runs.new_file(path, "--predictions") as draft:
        draft.write_text("all")
    for place in (path, tmp_path / "absent/a.csv", tmp_path / "a.txt"):
        with pytest.raises(runs.RunError, match="--predictions"):
            runs.check_new(place, "--predictions", ".csv")
    assert path.read_text() == "all"


METRICS = {
    "dataset": "digits",
    "model": "x",
    "data": "",
    "official": True,
    "seed": 0,
    "test_top1": 9,
}


def test_a_damaged_run_is_named_and_left_out(tmp_path, capsys):
    identity = {"method": "mlae"}
    for name, change in {
        "good": {},
        "text": {"test_top1": "x"},
        "nan": {"test_top1": float("nan")},
        "high": {"test_top1": 101},
        "list": {"dataset": []},
        "task": {"dataset": "a_new_task"},
    }.items():
        saved(tmp_path / name, {}, identity=identity)
        (tmp_path / name / "metrics.json").write_text(json.dumps(METRICS | change))
    saved(tmp_path / "alone", {}, identity=[])
    (tmp_path / "alone/metrics.json").write_text("{}")
    (result,) = runs.collect(tmp_path)
    err = capsys.readouterr().err
    assert result.top1 == 9 and result.identity == identity and result.split == "test"
    assert err.count("\n") == 6 and all(name in err for name in ("text", "nan", "high", "alone"))


# --- locks ----------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    folder = tmp_path / "a/b"

    def hold():
        with runs.claim(folder):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = fork(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(runs.Busy, match="another process"), runs.claim(folder):
        pass
    assert (folder / "lock").exists()
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    with runs.claim(folder):
        (folder / "mine").write_text("")
    assert [file.name for file in folder.iterdir()] == ["mine"]


def test_a_claim_leaves_no_empty_folders(tmp_path):
    with pytest.raises(KeyError), runs.claim(tmp_path / "a/b"):
        raise KeyError
    assert not (tmp_path / "a").exists() and tmp_path.exists()


@pytest.mark.parametrize("out", ["a_file", "a_file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_made_is_no_other_process(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("mine")
    with pytest.raises(runs.RunError, match="--out") as caught, runs.claim(Path(out)):
        pass
    assert not isinstance(caught.value, runs.Busy) and Path("a_file").read_text() == "mine"


def test_processes_hold_a_lock_one_after_the_other(tmp_path):
    count = tmp_path / "count"
    count.write_text("0")

    def add():
        for _ in range(20):
            with runs.lock(tmp_path / "lock", patience=60):
                count.write_text(str(int(count.read_text()) + 1))

    children = [fork(add) for _ in range(3)]
    assert [end_of(child) for child in children] == [0, 0, 0]
    assert count.read_text() == "60" and not (tmp_path / "lock").exists()


# --- errors ---------------------------------------------------------------------------------------


def ends(error, script="train.py"):
    with pytest.raises(SystemExit) as stop, runs.one_line(script):
        raise error
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (runs.RunError("--lr is\nhigh"), "--lr is\\nhigh"),
        (runs.data.DataError("no data"), "no data"),
        (runs.models.ModelError("\x1b[2J"), "\\x1b[2J"),
        (OSError(28, "No space left", "a.csv"), "a.csv: No space left"),
        (MemoryError(), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--accumulate"),
    ],
    ids=["run", "data", "model", "disk", "memory", "torch"],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, words):
    assert ends(error) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_ctrl_c_says_how_to_go_on_and_a_bug_keeps_its_traceback(capsys):
    assert ends(KeyboardInterrupt()) == 130 and "--resume" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shapes"), runs.one_line("train.py"):
        raise RuntimeError("shapes do not fit")


def test_sigterm_ends_like_ctrl_c(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, runs.one_line("suite.py"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_reader_that_has_gone_ends_it_quietly(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)

    def work():
        os.dup2(writer, 1)
        sys.stdout, sys.stderr = open(1, "w"), open(tmp_path / "err", "w")  # noqa: SIM115
        try:
            with runs.one_line("suite.py"):
                print("a row")
        finally:
            sys.stdout.flush()  # as Python does when it exits

    assert end_of(fork(work)) == 1
    assert (tmp_path / "err").read_text() == ""


# --- ranks ----------------------------------------------------------------------------------------


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
        monkeypatch.setattr(runs, "world_size", lambda: count)
        monkeypatch.setattr(runs, "process_rank", lambda rank=rank: rank)
        parts.append(list(runs.rank_batches(Counting(), order, batch, 0, "")))
    for step, whole in enumerate(order.split(batch)):
        shares = [part[step] for part in parts]
        labels = torch.cat([y for _, y, _ in shares])
        assert sorted(labels[labels >= 0].tolist()) == sorted(whole.tolist())
        assert {size for _, _, size in shares} == {len(whole)}
        assert len({len(x) for x, _, _ in shares}) == 1  # equally many draws
    assert {len(part) for part in parts} == {len(order.split(batch))}
