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

NANO = "--model vit_nano --epochs 1 --img-size 14 --device cpu --workers 0".split()


def save(path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (14, 20, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def fill(folder, *classes, count=5, first=0):
    """PNG images, all of them different, in folders of these classes."""
    for number, name in enumerate(classes):
        for i in range(count):
            save(folder / name / f"{i}.png", [first, number, i])
    return folder


@pytest.fixture
def flat(tmp_path):
    return fill(tmp_path / "photos", "cat", "dog", count=10)


def load(folder, **options):
    return data.load(str(folder), img_size=14, **options)


def names(images):
    return {path.relative_to(images.folder).as_posix() for path in images.files}


def read_csv(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_a_flat_folder_is_split_by_class_and_for_good(flat):
    training, test = load(flat)
    assert not names(training) & names(test) and len(training) + len(test) == 20
    assert test.labels.tolist() == [0, 0, 1, 1] and training.class_names == ("cat", "dog")
    assert names(test) == {"cat/1.png", "cat/8.png", "dog/7.png", "dog/9.png"}  # as ever
    small, val = load(flat, split="train")  # drawn from the training images
    assert val.labels.tolist() == [0, 0, 1, 1] and not names(small) & names(val)
    assert names(small) | names(val) == names(training)
    assert names(load(flat, folder_split=data.FolderSplit(seed=1))[1]) != names(test)
    half, _ = load(flat, folder_split=data.FolderSplit(test_share=0.5))
    assert half.labels.bincount().tolist() == [5, 5] and half.augment == "crop"
    for i in range(10, 13):  # a few new images move few others
        save(flat / "cat" / f"{i}.png", i)
    assert len(names(load(flat)[1]) & names(test)) >= 3


def test_the_folders_own_split_is_kept(tmp_path):
    for number, part in enumerate(("train", "val", "test")):
        fill(tmp_path / "p" / part, "a", "b", count=number + 2, first=number)

    def sizes(split):
        return tuple(map(len, load(tmp_path / "p", split=split)))

    assert sizes("trainval") == (4 + 6, 8)
    assert sizes("train") == (4, 6)
    (tmp_path / "p" / "test").rename(tmp_path / "elsewhere")
    assert sizes("trainval") == (4, 6)  # val/ is the test now
    assert sizes("train") == (2, 2)  # and val a share of train/


@pytest.mark.parametrize("parts", ["Train Test", "train valid", "val test"])
def test_splits_under_other_names_are_not_classes(tmp_path, parts):
    for name in parts.split():
        fill(tmp_path / "photos" / name, "cat", "dog", count=2)
    with pytest.raises(data.DataError, match="train, val and test"):
        load(tmp_path / "photos")


def test_names_and_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "digits", "a", "b")
    fill(tmp_path / "pictures", "bus", "train")  # a class may have that name
    assert data.find_task("digits").benchmark == "demo"
    assert data.find_task("./digits").benchmark == "own"
    assert data.find_task("pictures").class_names == ("bus", "train")


def test_a_single_image_is_trained_on(flat, capsys):
    fill(flat, "horse", count=1, first=5)
    training, test = load(flat)
    assert "horse/0.png" in names(training) and 2 not in test.labels
    assert "horse" in capsys.readouterr().err


def test_the_same_image_twice_is_counted(tmp_path, capsys):
    for part in ("train", "test"):
        fill(tmp_path / part, "cat", "dog", first=len(part))
    for other in ("test/cat/again.png", "train/dog/again.png"):
        (tmp_path / other).write_bytes((tmp_path / "train/cat/0.png").read_bytes())
    _, test = load(tmp_path)
    err = capsys.readouterr().err
    assert "1 training images are in another class too" in err
    for text in (test.description, err):
        assert "1 test images are training images too" in text


def test_every_format_is_read_and_other_files_are_no_images(flat, capsys):
    for number, ending in enumerate(["jpg", "JPEG", "webp", "bmp", "tiff", "gif", "ppm"]):
        save(flat / "cat" / "deeper" / f"x.{ending}", number)
    for name in (".DS_Store", "._0.png", "notes.txt"):
        (flat / "cat" / name).touch()
    save(flat / "loose.png", 3)
    (flat / "cat" / "loop").symlink_to(flat)
    (flat / "cat" / "self").symlink_to("self")
    training, test = load(flat)
    assert len(training) + len(test) == 27 and len(list(training.batches(50, 0))) == 1
    assert "BMP+GIF+JPEG+PNG+PPM+TIFF+WEBP" in test.description
    err = capsys.readouterr().err
    assert "notes.txt" in err and "loose.png" in err and ".DS" not in err


def test_exif_turns_own_images_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right: turn by 90 degrees clockwise
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        save(tmp_path / "p" / name, ord(name[2]), exif=exif)
    images, _ = load(tmp_path / "p", augment="none")
    pixels = Image.open(images.files[0]).convert("RGB").rotate(-90, expand=True)
    wanted = pixels.resize((14, 14), Image.Resampling.BICUBIC)
    assert np.array_equal(images[0][0].permute(1, 2, 0), wanted)
    assert not any(task.upright for task in data.TASKS.values())


@pytest.mark.parametrize(("name", "largest"), [("x.png", 65535), ("x.tif", 65535), ("x.tif", 4000)])
def test_grey_images_of_16_bits_or_12_of_them_keep_their_greys(tmp_path, name, largest):
    white = 4095 if largest == 4000 else 65535
    ramp = np.linspace(0, largest, 28 * 28).astype(np.uint16).reshape(28, 28)
    tags = {"tiffinfo": {281: largest}} if white == 4095 else {}
    Image.fromarray(ramp).save(tmp_path / name, **tags)
    image, _ = data.Images([tmp_path / name], [0], 28, upright=True)[0]
    assert np.array_equal(image[0].numpy(), np.floor(ramp * (255 / white) + 1e-9))


@pytest.mark.parametrize("ending", ["heic", "avif"])
def test_photos_of_phones_are_read_where_that_can_be(flat, ending):
    if f".{ending}" not in data.ENDINGS:
        pytest.skip("not readable here")
    save(flat / f"cat/x.{ending}", 3)
    training, test = load(flat)
    assert len(training) + len(test) == 21 and len(list(training.batches(50, 0))) == 1
    assert ("HEIF" if ending == "heic" else "AVIF") in test.description


def test_the_package_that_reads_heic_is_named(flat, capsys, monkeypatch):
    monkeypatch.setattr(data, "ENDINGS", [".png"])
    load(flat)
    assert not capsys.readouterr().err
    (flat / "cat/x.HEIC").touch()
    load(flat)
    err = capsys.readouterr().err
    assert "cat/x.HEIC" in err and "pip install pillow-heif" in err


def refused(capsys, folder):
    """The last line on stderr of a train.py that must end with exit code 2; notes may precede."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset", str(folder), *NANO])
    *notes, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("train.py: error: "), line
    assert all(note.startswith("note: ") for note in notes)
    assert not Path("runs").exists()
    return line


def test_bad_images_are_named_and_left_out_at_wish(flat, run, capsys):
    whole = (flat / "cat" / "0.png").read_bytes()
    (flat / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    (flat / "cat" / "empty.gif").touch()
    Image.fromarray(np.zeros((9, 9), np.float32)).save(flat / "cat" / "float.tif")
    Image.new("RGB", (1, 6000)).save(flat / "cat" / "stripe.png")
    (flat / "dog" / "gone.webp").symlink_to("nowhere")
    os.mkfifo(flat / "dog" / "pipe.png")
    line = refused(capsys, flat)
    assert "6 files" in line and "cat/0.png" in line and "--skip-bad-images" in line
    metrics = run("--dataset", flat, "--skip-bad-images", *NANO)
    assert metrics["left_out"] == 6 and not metrics["official"]
    folder = Path(metrics["run"])
    assert len(read_csv(folder / "train.csv")) + len(read_csv(folder / "test.csv")) == 19
    reasons = {row["path"]: row["reason"] for row in read_csv(folder / "refused.csv")}
    assert len(reasons) == 6 and "32 bits" in reasons["cat/float.tif"]
    assert "1 x 6000" in reasons["cat/stripe.png"]


# each: what is there, as folders of images ("/" at the end: empty), and what the error names
WRONG = {
    "one-class": (["cat"], "two or more"),
    "empty-class": (["cat", "dog", "horse/"], "horse"),
    "no-test": (["train/cat", "train/dog"], "test images"),
    "class-of-the-test": (["train/cat", "train/dog", "test/cat", "test/horse"], "horse"),
    "nothing": ([], "--dataset"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_cannot_be_trained_on_ends_in_a_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders, words = WRONG[case]
    for name in folders:
        (tmp_path / "photos" / name).mkdir(parents=True)
        if not name.endswith("/"):
            fill(tmp_path / "photos", name, count=3, first=len(name))
    assert words in refused(capsys, tmp_path / "photos")


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
    rows = read_csv(folder / "train.csv")
    assert {row["label"] for row in rows} == set(config["class_names"])
    tested = read_csv(folder / "test.csv")
    assert len(rows) == 16 and len(tested) == 4
    assert all(row["path"].startswith("dog/") == (row["label"] == "dog") for row in tested)
    moved = flat.rename(flat.with_name("elsewhere"))
    assert not scored_again(folder)
    assert scored_again(folder, "--data-dir", str(moved))
    model, _ = evaluation.load_run(folder)  # needs no image
    assert model.num_classes == 2
    fill(moved, "horse", first=3)  # a new class, and more images: the run's list is what counts
    fill(moved, "dog", first=7)
    capsys.readouterr()
    assert scored_again(folder, "--data-dir", str(moved))
    out, err = capsys.readouterr()
    assert "4 images" in out and not err
    assert scored_again(folder, "--data-dir", str(moved), "--prune", "2")
    assert scored_again(f"{folder}-prune2", "--data-dir", str(moved))
    assert "4 images" in capsys.readouterr().out
    (moved / tested[0]["path"]).unlink()
    assert not scored_again(folder, "--data-dir", str(moved))
    assert tested[0]["path"] in capsys.readouterr().err


def test_a_folder_is_scored_whole_by_the_names_of_its_classes(flat, run, tmp_path, capsys):
    folder = Path(run("--dataset", flat, *NANO)["run"])
    other = fill(tmp_path / "other", "dog", count=3, first=5)
    answers = tmp_path / "answers.csv"
    assert scored_again(folder, "--test", str(other), "--predictions", str(answers))
    assert "3 images of 1 classes" in capsys.readouterr().out
    rows = read_csv(answers)
    assert [row["label"] for row in rows] == ["dog"] * 3
    assert sorted(row["image"] for row in rows) == ["dog/0.png", "dog/1.png", "dog/2.png"]
    fill(other, "horse", first=3)
    assert not scored_again(folder, "--test", str(other))
    assert "horse" in capsys.readouterr().err


def test_exchanged_images_of_the_same_names_and_sizes_are_another_folder(flat):
    own = data.identify({}, str(flat), "runs")
    one, two = flat / "cat/0.png", flat / "dog/0.png"
    save(one, 1)
    save(two, 1)
    assert data.identify({}, str(flat), "runs") != own
    own = data.identify({}, str(flat), "runs")
    content = one.read_bytes()
    one.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert data.identify({}, str(flat), "runs") != own


def test_where_a_folder_lies_is_not_what_it_is(flat, run, tmp_path, capsys):
    first = run("--dataset", flat, *NANO)
    away = tmp_path / "away" / "photos"
    away.parent.mkdir()
    flat.rename(away)
    assert run("--dataset", away, *NANO) == first  # finished before
    fill(flat, "cat", "dog", count=4, first=9)  # another folder of that name
    suite.main(["--dataset", str(flat), "--seed", "0", "1", *NANO])
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["dataset"].startswith("photos ") and row["n"] == 2
    suite.main(["--table", "runs"])
    assert capsys.readouterr().out.splitlines()[0].count("photos ") == 2  # two columns
    with pytest.raises(SystemExit):
        train.main(["--dataset", str(flat), "--out", str(flat / "runs"), *NANO])
    assert "--out" in capsys.readouterr().err  # not among the images


def test_flags_of_folders_are_set_aside_for_a_task(capsys):
    identity = data.identify({"seed": 1, "test_share": 0.3}, "digits", "runs")
    assert identity == {"seed": 1} and "--test-share" in capsys.readouterr().err


def test_a_letter_with_dots_is_one_letter_on_every_system(flat, run, tmp_path):
    (flat / "cat").rename(flat / "Ga\u0308nse")  # as a Mac writes it
    folder = Path(run("--dataset", flat, *NANO)["run"])
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == ["G\u00e4nse", "dog"]
    fill(tmp_path / "other", "G\u00e4nse", "dog", count=2, first=5)
    assert scored_again(folder, "--test", str(tmp_path / "other"))
    own = data.identify({}, str(flat), "runs")
    (flat / "Ga\u0308nse").rename(flat / "G\u00e4nse")
    assert data.identify({}, str(flat), "runs") == own


def test_predictions_name_every_file_and_no_formula(flat, run, tmp_path, capsys):
    folder = run("--dataset", flat, *NANO)["run"]
    place = tmp_path / "new"
    save(place / "=1+1.png", 3)
    save(place / "a\x1b[2J.png", 4)
    (place / "photo.xyz").touch()
    assert scored_again(folder, "--predict", str(place), "--top-k", "1")
    out, err = capsys.readouterr()
    assert "photo.xyz" in err and "\x1b" not in out
    paths = [line.split(",")[0] for line in out.splitlines()]
    assert paths == ["image", "./=1+1.png", "a\\x1b[2J.png"]
    places = [os.path.relpath(flat / "cat/0.png"), str(flat / "dog")]
    assert scored_again(folder, "--predict", *places, "--top-k", "1")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[1].startswith("cat/0.png,1,")
