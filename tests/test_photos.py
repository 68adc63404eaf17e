"""photos.py, folders.py and views.py: a folder of one's own images, from its files to a run."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stop_after
from PIL import Image
from test_hostile import refused

import data
import eval as evaluation
import folders
import photos
import runs
import suite
import train
import views

NANO = ["--model", "vit_nano", "--epochs", "1", "--img-size", "14", "--device", "cpu"]
NANO += ["--workers", "0"]


def save(path, seed, size=(20, 14), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def fill(folder, *classes, count=5, first=0):
    """PNG images, all of them different, in folders of these classes."""
    for number, name in enumerate(classes):
        for i in range(count):
            save(folder / name / f"{i}.png", [first, number, i])
    return folder


@pytest.fixture
def flat(tmp_path):
    return fill(tmp_path / "photos", "cat", "dog", count=10)


def names(images):
    return {path.relative_to(images.folder).as_posix() for path in images.files}


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_flat_folder_is_cut_by_class_and_for_good(flat):
    train_images, test = data.load(str(flat), img_size=14)
    assert not names(train_images) & names(test) and len(train_images) + len(test) == 20
    assert test.labels.tolist() == [0, 0, 1, 1] and train_images.class_names == ("cat", "dog")
    again = data.load(str(flat), cut=photos.Cut(seed=0))[1]
    other = data.load(str(flat), cut=photos.Cut(seed=1))[1]
    assert names(again) == names(test) != names(other)
    half, _ = data.load(str(flat), cut=photos.Cut(test_share=0.5))
    assert half.labels.bincount().tolist() == [5, 5]
    for i in range(10, 13):  # a few new images move few others
        save(flat / "cat" / f"{i}.png", i)
    assert len(names(data.load(str(flat))[1]) & names(test)) >= 3


def test_val_is_cut_from_train_and_keeps_the_test_out(flat):
    _, test = data.load(str(flat), img_size=14)
    train_images, val = data.load(str(flat), split="train", img_size=14)
    parts = [names(part) for part in (train_images, val, test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 20
    assert val.labels.tolist() == [0, 0, 1, 1]


def test_the_folders_own_split_is_kept(tmp_path):
    for number, part in enumerate(("train", "val", "test")):
        fill(tmp_path / "p" / part, "a", "b", count=number + 2, first=number)
    train_images, test = data.load(str(tmp_path / "p"))
    assert (len(train_images), len(test)) == (4 + 6, 8)
    train_images, val = data.load(str(tmp_path / "p"), split="train")
    assert (len(train_images), len(val)) == (4, 6)
    (tmp_path / "p" / "test").rename(tmp_path / "elsewhere")
    train_images, test = data.load(str(tmp_path / "p"))  # val/ is the test now
    assert (len(train_images), len(test)) == (4, 6)
    train_images, val = data.load(str(tmp_path / "p"), split="train")  # and val a share of train/
    assert (len(train_images), len(val)) == (2, 2)


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "p", "bus", "train", count=2)
    assert data.find_task(str(tmp_path / "p")).class_names == ("bus", "train")


def test_every_format_is_read(tmp_path, flat):
    kinds = ["jpg", "JPEG", "webp", "bmp", "tiff", "gif", "ppm"]
    for number, ending in enumerate(kinds):
        save(flat / "cat" / "deeper" / f"x.{ending}", number)
    train_images, test = data.load(str(flat), img_size=14)
    assert len(train_images) + len(test) == 27 and len(list(train_images.batches(50, 0))) == 1
    assert "BMP+GIF+JPEG+PNG+PPM+TIFF+WEBP" in test.description


def test_exif_turns_own_images_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right: turn by 90 degrees clockwise
    for name in ("a", "b"):
        for i in range(2):
            save(tmp_path / "p" / name / f"{i}.png", [len(name), i], exif=exif)
    images, _ = data.load(str(tmp_path / "p"), img_size=14, augment="none")
    pixels = Image.open(images.files[0]).convert("RGB").rotate(-90, expand=True)
    wanted = np.array(pixels.resize((14, 14), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(images[0][0].numpy(), wanted)
    images.upright = False
    assert not np.array_equal(images[0][0].numpy(), wanted)
    assert not data.TASKS["dtd"].upright


@pytest.mark.parametrize("task, augment", [("dtd", "none"), ("cub", "crop"), ("digits", "none")])
def test_augmentation_suits_the_data(task, augment, flat):
    assert data.find_task(task).recipe["augment"] == augment
    assert data.load(str(flat))[0].augment == "crop"


def test_flips_are_the_same_from_memory_and_from_files(flat):
    images, _ = data.load(str(flat), img_size=14, augment="flip")
    order = torch.arange(len(images))
    [(streamed, _)] = images.epoch(order, 50, 0, "0 3")
    images.prepare("cpu", 0)
    [(held, _)] = images.epoch(order, 50, 0, "0 3")
    [(other, _)] = images.epoch(order, 50, 0, "0 4")
    assert torch.equal(streamed, held) and not torch.equal(held, other)
    plain, _ = images.prepared
    flipped = [not torch.equal(a, b) for a, b in zip(plain, held, strict=True)]
    assert 0 < sum(flipped) < len(flipped)
    assert torch.equal(held[flipped], plain[flipped].flip(-1))
    assert 400 < sum(views.mirrored(f"0 {i}") for i in range(1000)) < 600


def test_what_does_not_fit_is_streamed(flat, monkeypatch, capsys):
    images, _ = data.load(str(flat), img_size=14, augment="none")
    need = 3 * len(images) * 14 * 14
    monkeypatch.setattr("images.free_memory", lambda device="cpu": 2 * need - 2)
    images.prepare("cpu", 0)
    assert images.prepared is None and "read from the files" in capsys.readouterr().out
    monkeypatch.setattr("images.free_memory", lambda device="cpu": 2 * need)
    images.prepare("cpu", 0)
    assert images.prepared is not None


def scored_again(folder, *flags):
    """Whether eval.py says that the merged model agrees."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(folder), "--device", "cpu", *flags])
    return stop.value.code == 0


def test_a_run_and_its_lists(flat, run, capsys):
    metrics = run("--dataset", flat, *NANO)
    folder = Path(metrics["run"])
    assert metrics["dataset"] == "photos" and folder.parent.name == "photos"
    assert metrics["official"] and {"test_top1", "test_mean_class_top1"} < metrics.keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == ["cat", "dog"] and config["source"] == "folder"
    assert config["arguments"]["dataset"] == str(flat) and config["arguments"]["augment"] == "crop"
    lists = read_csv(folder / "train.csv"), read_csv(folder / "test.csv")
    assert [len(rows) for rows in lists] == [16, 4]
    assert all((flat / row["path"]).parent.name == row["label"] for row in sum(lists, []))

    assert scored_again(folder)
    moved = flat.rename(flat.with_name("elsewhere"))
    refused(capsys, evaluation.main, folder, "--device", "cpu")
    assert scored_again(folder, "--data-dir", str(moved))
    model, _ = evaluation.load_run(folder)  # needs no image
    assert model.num_classes == 2
    fill(moved, "horse", first=3)
    assert "other classes" in refused(capsys, evaluation.main, folder, "--data-dir", moved)


def test_where_a_folder_lies_is_not_what_it_is(flat, run, tmp_path, capsys):
    first = run("--dataset", flat, *NANO)
    away = tmp_path / "away" / "photos"
    away.parent.mkdir()
    flat.rename(away)
    assert run("--dataset", away, *NANO) == first  # finished before
    fill(flat, "cat", "dog", count=4, first=9)  # another folder of that name
    second = run("--dataset", flat, *NANO)
    assert second["run"] != first["run"]
    suite.main(["--table", "runs"])
    out = capsys.readouterr().out
    assert "own, test top-1" in out and "*" not in out
    assert out.splitlines()[0].count("photos ") == 2  # two columns


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(flat, run, monkeypatch):
    flags = ["--dataset", flat, *NANO, "--epochs", "3"]
    whole = run(*flags, "--out", "whole")
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run(*flags)
    resumed = run(*flags, "--resume")
    weights = [Path(m["run"], "adapter.safetensors").read_bytes() for m in (whole, resumed)]
    assert resumed["test_loss"] == whole["test_loss"] and weights[0][-900:] == weights[1][-900:]


def test_a_suite_runs_on_folders(flat, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    suite.main(["--dataset", "photos", "--seed", "0", "1", *NANO])
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["dataset"].startswith("photos ") and row["n"] == 2


def test_names_and_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "digits", "a", "b")
    fill(tmp_path / "pictures", "a", "b")
    assert data.find_task("digits").benchmark == "demo"
    assert data.find_task("./digits").benchmark == "own"
    assert data.find_task("pictures").folder == str(tmp_path / "pictures")
    assert runs.collect is not None and data.find_task("CIFAR").benchmark == "vtab-1k"


def test_mean_class_top1_is_of_the_classes_that_occur():
    logits = torch.eye(4)[[0, 0, 0, 0, 0, 3]]
    labels = torch.tensor([0, 0, 0, 0, 2, 3])
    scores = evaluation.score(logits, labels)
    assert scores["top1"] == 83.33 and scores["mean_class_top1"] == round(200 / 3, 2)


def test_bad_images_are_named_and_left_out_at_wish(flat, run, capsys):
    make_bad(flat)
    line = refused(capsys, train.main, "--dataset", flat, *NANO)
    assert "5 files" in line and "cat/0.png" in line and "2 more" in line
    assert "--skip-bad-images" in line and not Path("runs").exists()
    metrics = run("--dataset", flat, "--skip-bad-images", *NANO)
    assert metrics["left_out"] == 5 and "5 unreadable images left out" in metrics["data"]
    assert not metrics["official"]
    folder = Path(metrics["run"])
    assert len(read_csv(folder / "train.csv")) + len(read_csv(folder / "test.csv")) == 19


def make_bad(flat):
    whole = (flat / "cat" / "0.png").read_bytes()
    (flat / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    (flat / "cat" / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (flat / "cat" / "text.jpg").write_text("no image")
    (flat / "cat" / "empty.gif").touch()
    (flat / "dog" / "gone.webp").symlink_to("nowhere")


def only_cats(folder):
    fill(folder, "cat")


def empty_class(folder):
    fill(folder, "cat", "dog")
    (folder / "horse").mkdir()


def class_without_images(folder):
    fill(folder, "cat", "dog")
    (folder / "horse").mkdir()
    (folder / "horse" / "a.txt").touch()


def no_test_images(folder):
    fill(folder / "train", "cat", "dog")
    (folder / "test" / "cat").mkdir(parents=True)


def no_test_folder(folder):
    fill(folder / "train", "cat", "dog")


def only_in_test(folder):
    fill(folder / "train", "cat", "dog")
    fill(folder / "test", "cat", "horse")


def single_images(folder):
    fill(folder, "cat", "dog", count=1)


def loose_images(folder):
    fill(folder.parent, folder.name)


def no_images(folder):
    (folder / "cat").mkdir(parents=True)
    (folder / "dog").mkdir()


def a_pipe(folder):
    fill(folder, "cat", "dog")
    os.mkfifo(folder / "cat" / "pipe.png")


def all_bad(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_text("no image")


HOSTILE = [
    (only_cats, "one class only, cat"),
    (empty_class, "class folder horse has no images"),
    (class_without_images, "class folder horse has no images"),
    (no_test_images, "no readable test images"),
    (no_test_folder, "no readable test images"),
    (only_in_test, "classes that"),
    (single_images, "no readable test images"),
    (loose_images, "no folder for a class"),
    (no_images, "has no images"),
    (a_pipe, "cat/pipe.png"),
    (all_bad, "cannot be read|no readable images"),
    (lambda folder: folder.write_text("a file"), "is a file, not a folder"),
    (lambda folder: None, "is not there"),
    (lambda folder: folder.mkdir(), "no folder for a class"),
    (lambda folder: folder.symlink_to(folder), "is not there"),
]


@pytest.mark.parametrize("make, words", HOSTILE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_cannot_be_trained_on_ends_in_a_line(
    make, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "photos")
    line = refused_after_notes(capsys, "--dataset", tmp_path / "photos", *NANO)
    assert any(word in line for word in words.split("|")), line
    assert not Path("runs").exists()


def refused_after_notes(capsys, *arguments):
    """As `refused`, but notes about the folder may come before the error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, arguments)])
    *notes, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("train.py: error: "), line
    assert all(note.startswith("note: ") for note in notes)
    return line


FLAGS = [
    ["--test-share", "0"],
    ["--test-share", "1"],
    ["--val-share", "-0.1"],
    ["--val-share", "nan"],
    ["--augment", "rotate"],
    ["--source", "original"],
    ["--split-seed", "-1"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_wrong_flag_ends_in_a_line(flags, flat, capsys):
    assert flags[0] in refused(capsys, train.main, "--dataset", flat, *flags, *NANO)


def test_an_unreadable_folder_ends_in_a_line(flat, capsys, monkeypatch):
    listdir = os.listdir

    def deny(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", deny)
    line = refused(capsys, train.main, "--dataset", flat, *NANO)
    assert "dog: Permission denied" in line


def test_other_files_are_no_images_and_links_lead_nowhere(flat, capsys):
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt", "raw.heic"):
        (flat / "cat" / name).touch()
    (flat / ".cache").mkdir()
    save(flat / "loose.png", 3)
    (flat / "cat" / "loop").symlink_to(flat)
    (flat / "cat" / "self").symlink_to("self")
    train_images, test = data.load(str(flat))
    err = capsys.readouterr().err
    assert len(train_images) + len(test) == 20
    assert "1 .heic" in err and "1 .txt" in err and ".db" not in err and "1 images lie in no" in err


def test_an_image_on_both_sides_is_counted(tmp_path, capsys):
    fill(tmp_path / "p" / "train", "cat", "dog")
    fill(tmp_path / "p" / "test", "cat", "dog", first=1)
    for i in range(2):
        copy = (tmp_path / "p" / "train" / "cat" / f"{i}.png").read_bytes()
        (tmp_path / "p" / "test" / "cat" / f"again{i}.png").write_bytes(copy)
    _, test = data.load(str(tmp_path / "p"))
    assert "2 test images are training images too" in test.description
    assert "warning: 2 test images" in capsys.readouterr().err


def test_a_single_image_is_trained_on(flat, capsys):
    fill(flat, "horse", count=1, first=5)
    train_images, test = data.load(str(flat))
    assert "cat/0.png" in names(train_images) | names(test)
    assert "horse/0.png" in names(train_images) and 2 not in test.labels
    assert "single image" in capsys.readouterr().err


def test_a_class_name_that_is_no_text_is_shown_with_escapes(flat, run):
    (flat / "cat").rename(os.fsdecode(os.fsencode(flat) + b"/\xe9t\xe9"))
    metrics = run("--dataset", flat, *NANO)
    config = json.loads(Path(metrics["run"], "config.json").read_text())
    assert config["class_names"] == ["dog", "\\udce9t\\udce9"]
    assert scored_again(Path(metrics["run"]))


def test_a_file_is_asked_for_once(flat, monkeypatch):
    folders.defect.cache_clear()
    data.load(str(flat))
    before = folders.defect.cache_info().misses
    data.load(str(flat))
    assert folders.defect.cache_info().misses == before == 20


def test_grey_images_of_16_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    Image.fromarray(ramp).save(tmp_path / "x-ray.png")
    image, _ = data.Images([tmp_path / "x-ray.png"], [0], 28, upright=True)[0]
    assert np.array_equal(image[0].numpy(), ramp // 257)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("train", "valid")])
def test_splits_under_other_names_are_not_classes(tmp_path, names):
    for name in names:
        for label in ("cat", "dog"):
            fill(tmp_path / "photos" / name, label, count=3)
    with pytest.raises(data.DataError, match="call the parts of a split train, val and test"):
        data.load(str(tmp_path / "photos"))


def test_flags_of_folders_are_set_aside_for_a_task(run, capsys):
    plain = run("--epochs", 1)
    again = run("--epochs", 1, "--test-share", 0.3)
    assert again["run"] == plain["run"]
    with pytest.raises(data.DataError, match="lies among the images"):
        photos.identify({}, "/photos", "/photos/runs")
