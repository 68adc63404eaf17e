"""A folder of one's own images: how it is split, what is read, and a run on it."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation
import suite
import train

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
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


# --- the split ------------------------------------------------------------------------------------


def test_a_flat_folder_is_split_by_class_and_for_good(flat):
    training, test = data.load(str(flat), img_size=14)
    assert not names(training) & names(test) and len(training) + len(test) == 20
    assert test.labels.tolist() == [0, 0, 1, 1] and training.class_names == ("cat", "dog")
    assert names(test) == {"cat/1.png", "cat/8.png", "dog/7.png", "dog/9.png"}  # as ever
    other = data.load(str(flat), folder_split=data.FolderSplit(seed=1))[1]
    assert names(other) != names(test)
    half, _ = data.load(str(flat), folder_split=data.FolderSplit(test_share=0.5))
    assert half.labels.bincount().tolist() == [5, 5] and half.augment == "crop"
    for i in range(10, 13):  # a few new images move few others
        save(flat / "cat" / f"{i}.png", i)
    assert len(names(data.load(str(flat))[1]) & names(test)) >= 3


def test_val_is_drawn_from_train_and_keeps_the_test_out(flat):
    _, test = data.load(str(flat), img_size=14)
    training, val = data.load(str(flat), split="train", img_size=14)
    parts = [names(part) for part in (training, val, test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 20
    assert val.labels.tolist() == [0, 0, 1, 1]


def test_the_folders_own_split_is_kept(tmp_path):
    for number, part in enumerate(("train", "val", "test")):
        fill(tmp_path / "p" / part, "a", "b", count=number + 2, first=number)

    def sizes(split):
        return tuple(map(len, data.load(str(tmp_path / "p"), split=split)))

    assert sizes("trainval") == (4 + 6, 8)
    assert sizes("train") == (4, 6)
    (tmp_path / "p" / "test").rename(tmp_path / "elsewhere")
    assert sizes("trainval") == (4, 6)  # val/ is the test now
    assert sizes("train") == (2, 2)  # and val a share of train/


@pytest.mark.parametrize("parts", ["Train Test", "training testing", "train valid", "val test"])
def test_splits_under_other_names_are_not_classes(tmp_path, parts):
    for name in parts.split():
        fill(tmp_path / "photos" / name, "cat", "dog", count=2)
    with pytest.raises(data.DataError, match="call the parts of a split train, val and test"):
        data.load(str(tmp_path / "photos"))


def test_names_and_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "digits", "a", "b")
    fill(tmp_path / "pictures", "bus", "train")  # a class may have that name
    assert data.find_task("digits").benchmark == "demo"
    assert data.find_task("./digits").benchmark == "own"
    assert data.find_task("pictures").class_names == ("bus", "train")


def test_a_single_image_is_trained_on(flat, capsys):
    fill(flat, "horse", count=1, first=5)
    training, test = data.load(str(flat))
    assert "horse/0.png" in names(training) and 2 not in test.labels
    err = capsys.readouterr().err
    assert "single image" in err and "horse" in err


def test_an_image_on_both_sides_is_counted(tmp_path, capsys):
    fill(tmp_path / "p" / "train", "cat", "dog")
    fill(tmp_path / "p" / "test", "cat", "dog", first=1)
    for i in range(2):
        copy = (tmp_path / "p" / "train" / "cat" / f"{i}.png").read_bytes()
        (tmp_path / "p" / "test" / "cat" / f"again{i}.png").write_bytes(copy)
    _, test = data.load(str(tmp_path / "p"))
    assert "2 test images are training images too" in test.description
    assert "warning: 2 test images" in capsys.readouterr().err


# --- the files ------------------------------------------------------------------------------------


def test_every_format_is_read(flat):
    for number, ending in enumerate(["jpg", "JPEG", "webp", "bmp", "tiff", "gif", "ppm"]):
        save(flat / "cat" / "deeper" / f"x.{ending}", number)
    training, test = data.load(str(flat), img_size=14)
    assert len(training) + len(test) == 27 and len(list(training.batches(50, 0))) == 1
    assert "BMP+GIF+JPEG+PNG+PPM+TIFF+WEBP" in test.description


def test_other_files_are_no_images_and_links_lead_nowhere(flat, capsys):
    for name in (".DS_Store", "._0.png", "notes.txt"):
        (flat / "cat" / name).touch()
    (flat / ".cache").mkdir()
    save(flat / "loose.png", 3)
    (flat / "cat" / "loop").symlink_to(flat)
    (flat / "cat" / "self").symlink_to("self")
    training, test = data.load(str(flat))
    err = capsys.readouterr().err
    assert len(training) + len(test) == 20
    assert "3 files" in err and "notes.txt" in err and "loose.png" in err and ".DS" not in err


def test_exif_turns_own_images_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right: turn by 90 degrees clockwise
    for name in ("a", "b"):
        for i in range(2):
            save(tmp_path / "p" / name / f"{i}.png", [len(name), i], exif=exif)
    images, _ = data.load(str(tmp_path / "p"), img_size=14, augment="none")
    pixels = Image.open(images.files[0]).convert("RGB").rotate(-90, expand=True)
    wanted = pixels.resize((14, 14), Image.Resampling.BICUBIC)
    assert np.array_equal(images[0][0].permute(1, 2, 0), wanted)
    assert not data.TASKS["dtd"].upright


def test_grey_images_of_16_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    Image.fromarray(ramp).save(tmp_path / "x-ray.png")
    image, _ = data.Images([tmp_path / "x-ray.png"], [0], 28, upright=True)[0]
    assert np.array_equal(image[0].numpy(), ramp // 257)


def refused(capsys, *arguments):
    """The last line on stderr of a train.py that must end with exit code 2; notes may precede."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, arguments), *NANO])
    *notes, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("train.py: error: "), line
    assert all(note.startswith("note: ") for note in notes)
    assert not Path("runs").exists()
    return line


def test_bad_images_are_named_and_left_out_at_wish(flat, run, capsys):
    whole = (flat / "cat" / "0.png").read_bytes()
    (flat / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    (flat / "cat" / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (flat / "cat" / "text.jpg").write_text("no image")
    (flat / "cat" / "empty.gif").touch()
    (flat / "dog" / "gone.webp").symlink_to("nowhere")
    os.mkfifo(flat / "dog" / "pipe.png")
    line = refused(capsys, "--dataset", flat)
    assert "6 files" in line and "cat/0.png" in line and "--skip-bad-images" in line
    metrics = run("--dataset", flat, "--skip-bad-images", *NANO)
    assert metrics["left_out"] == 6 and "6 unreadable images left out" in metrics["data"]
    assert not metrics["official"]
    folder = Path(metrics["run"])
    assert len(read_csv(folder / "train.csv")) + len(read_csv(folder / "test.csv")) == 19


# each: what is there, as folders of images ("/" at the end: empty), and what the error names
WRONG = {
    "one-class": (["cat"], "two or more"),
    "empty-class": (["cat", "dog", "horse/"], "horse"),
    "empty-test": (["train/cat", "train/dog", "test/cat/"], "no readable test images"),
    "no-test": (["train/cat", "train/dog"], "no readable test images"),
    "class-of-the-test": (["train/cat", "train/dog", "test/cat", "test/horse"], "horse"),
    "loose-images": (["."], "two or more"),
    "no-images": (["cat/", "dog/"], "cat"),
    "nothing": ([], "is not there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_cannot_be_trained_on_ends_in_a_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders, words = WRONG[case]
    for name in folders:
        if name.endswith("/"):
            (tmp_path / "photos" / name).mkdir(parents=True)
        else:
            fill(tmp_path / "photos", name, count=3, first=len(name))
    assert words in refused(capsys, "--dataset", tmp_path / "photos")


# --- runs -----------------------------------------------------------------------------------------


def scored_again(folder, *flags):
    """Whether eval.py says that the merged model agrees."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(folder), "--device", "cpu", *flags])
    return stop.value.code == 0


def test_a_run_and_its_lists(flat, run, capsys):
    (flat / "cat").rename(os.fsdecode(os.fsencode(flat) + b"/\xe9t\xe9"))  # a name that is no text
    metrics = run("--dataset", flat, *NANO)
    folder = Path(metrics["run"])
    assert metrics["dataset"] == "photos" == folder.parent.name and metrics["official"]
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == ["dog", "\\udce9t\\udce9"] and config["source"] == "folder"
    assert config["arguments"]["dataset"] == str(flat) and config["arguments"]["augment"] == "crop"
    lists = read_csv(folder / "train.csv"), read_csv(folder / "test.csv")
    assert [len(rows) for rows in lists] == [16, 4]
    assert {row["label"] for row in lists[0]} == set(config["class_names"])
    assert all(row["path"].startswith("dog/") for row in lists[1] if row["label"] == "dog")
    moved = flat.rename(flat.with_name("elsewhere"))
    assert not scored_again(folder)
    assert scored_again(folder, "--data-dir", str(moved))
    model, _ = evaluation.load_run(folder)  # needs no image
    assert model.num_classes == 2
    fill(moved, "horse", first=3)
    assert not scored_again(folder, "--data-dir", str(moved))
    assert "other classes" in capsys.readouterr().err


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
    assert capsys.readouterr().out.splitlines()[0].count("photos ") == 2  # two columns
    with pytest.raises(data.DataError, match="lies among the images"):
        data.identify({}, str(flat), flat / "runs")


def test_a_suite_runs_on_folders(flat, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    suite.main(["--dataset", "photos", "--seed", "0", "1", *NANO])
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["dataset"].startswith("photos ") and row["n"] == 2


def test_flags_of_folders_are_set_aside_for_a_task(capsys):
    identity = data.identify({"seed": 1, "test_share": 0.3}, "digits", "runs")
    assert identity == {"seed": 1} and "--test-share" in capsys.readouterr().err
