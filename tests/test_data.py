"""data.py on tasks: lists, images, batches and digests against the facts, Pillow and NumPy alone."""

import json
import os
import re
import shutil
import subprocess
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import edited
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as pil

import data
import splits
import tasks
from data import DataError, load

BICUBIC = Image.Resampling.BICUBIC


def in_memory(images):
    images.prepare("cpu", 0)
    return images.prepared


# --- the table ------------------------------------------------------------------------------------


def test_the_table():
    vtab = [task for task in data.TASKS.values() if task.benchmark == "vtab-1k"]
    groups = [task.group for task in vtab]
    assert [groups.count(name) for name in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert len(data.tasks_of("fgvc")) == 5
    assert all(task.sizes[:2] == (800, 200) for task in vtab)
    assert sum(task.sizes[2] for task in vtab) == 387_904
    names = []
    for key, task in data.TASKS.items():
        assert key == task.name
        names += [task.name, *task.aliases]
    assert len(names) == len(set(names))
    assert data.find_task("CIFAR-100").name == "cifar"
    for name, hint in {"cifra": "did you mean 'cifar'", "vtab": "suite.py", "zzz": "dtd"}.items():
        with pytest.raises(DataError, match=hint):
            data.find_task(name)


def printed_table(*arguments):
    """The exit code of data.py."""
    with pytest.raises(SystemExit) as stop:
        data.main([*map(str, arguments)])
    return stop.value.code


def test_the_printed_table(prepared, birds, capsys):
    shutil.copytree(prepared / "vtab-1k", birds / "vtab-1k", symlinks=True)
    assert printed_table("--data-dir", birds) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if not line.startswith(" ")]
    names = [task.name for task in data.TASKS.values() if task.benchmark in ("vtab-1k", "fgvc")]
    assert [row[0] for row in rows] == ["task", *names] and len(names) == 24
    assert rows[1][:5] == ["cifar", "100", "800", "200", "10000"]
    assert "NOT OFFICIAL: prepared folder" in lines[2]
    assert lines[3].split()[:3] == ["train800", "labels", "sha256"]
    assert sum("not there" in line for line in lines) == 22


def test_the_printed_table_of_damaged_data_and_wrong_arguments(prepared, tmp_path, capsys):
    root = edited(prepared, tmp_path, "test.txt", lambda x: ["images/test/gone.png 3", *x[1:]])
    assert printed_table("--data-dir", root, "--dataset", "cifar") == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and "gone.png" in out
    wrong = {"nowhere": ["--data-dir", root / "nowhere"], "cifra": ["--dataset", "cifra"]}
    for word, arguments in wrong.items():
        assert printed_table(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and word in captured.err and not captured.out


# --- which images, and whether they are the benchmark's -------------------------------------------


def test_prepared_folder_against_pillow(prepared):
    train, test = load("cifar100", prepared, img_size=16)
    assert len(train) == 1000 and len(test) == 20 and train.source == "prepared"
    assert train.labels.tolist() == [i % 100 for i in range(800)] + [i % 100 for i in range(200)]
    for i in (0, 1, 2, 3, 799, 800):
        name = f"train800/{i:06}.png" if i < 800 else f"val200/{i - 800:06}.png"
        image = Image.open(prepared / "vtab-1k/cifar/images" / name).convert("RGB")
        pixels, label = train[i]
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16) and label == i % 100
        assert np.array_equal(pixels.permute(1, 2, 0), image.resize((16, 16), BICUBIC))
    assert train.description == (
        "prepared folder (order not proven), PNG images, 1000 train / 20 of 10000 test (subset)"
    )
    train, val = load("cifar", prepared, split="train", img_size=16)
    assert len(train) == 800 and len(val) == 200 and val.description.endswith("800 train / 200 val")


def fake_originals(monkeypatch, labels):
    """CIFAR-100's originals with these labels of each split, and black images."""

    def whole_split(task, root, split, download=True):
        pixels = np.zeros((len(labels[split]), 2, 2, 3), np.uint8)
        return tasks.in_memory(pixels, labels[split])

    monkeypatch.setattr(tasks, "whole_split", whole_split)


def test_the_prepared_folder_only_where_the_originals_cannot_be_had(prepared, capsys, monkeypatch):
    assert load("cifar", prepared)[0].source == "prepared"
    assert "reading the prepared folder" in capsys.readouterr().out
    assert load("cifar", prepared, source="prepared")[0].source == "prepared"
    assert not capsys.readouterr().out
    with pytest.raises(DataError, match="no .*cifar-100-python: get it by hand"):
        load("cifar", prepared, source="original", download=False)
    monkeypatch.setitem(splits.CONSTANTS["histograms"], "cifar", {})  # these are not its labels
    labels = {"train": [0] * 50_000, "test": [1] * 10_000}
    fake_originals(monkeypatch, labels)
    train, test = load("cifar", prepared)
    assert train.source == "original" and train.official and test.official
    del labels["test"]  # whoever asks for it fails
    train, val = load("cifar", prepared, split="train")
    assert len(train) == 800 and len(val) == 200 and val.official


def test_digests_of_originals_are_stored(monkeypatch, tmp_path):
    labels = {"train": np.zeros(50_000, int), "test": np.repeat(np.arange(100), 100)}
    order = splits.tfds_order(range(50_000), "train")
    for role, start in (("train", 0), ("val", 45_000)):
        counts = splits.CONSTANTS["histograms"]["cifar"][splits.ROLES[role]]
        classes = np.repeat(np.arange(100), counts)
        labels["train"][order[start : start + len(classes)]] = classes
    fake_originals(monkeypatch, labels)
    train, test = load("cifar", tmp_path)
    assert train.official and test.digests == splits.CONSTANTS["keys"]["cifar"]
    assert list(load("cifar", tmp_path, split="train")[1].digests) == ["train800", "val200"]
    labels["train"][order[45_001]] += 1
    with pytest.raises(DataError, match="cifar: labels of val200"):
        load("cifar", tmp_path)


def test_a_subset_or_a_padded_list_is_never_the_benchmark(prepared, tmp_path):
    assert not load("cifar", prepared)[1].official
    root = edited(prepared, tmp_path, "test.txt", lambda lines: lines * 500)
    _, test = load("cifar", root)
    assert len(test) == 10_000 and not test.official
    assert test.description.endswith("1000 train / 10000 test; 9980 images are repeated")
    listing = root / "vtab-1k/cifar/test.txt"
    listing.write_text("images/val200/000007.png 7\n")  # a training image
    _, test = load("cifar", root)
    assert test.description.endswith("; 1 images are repeated") and not test.official


def test_a_declared_subset_is_named(prepared, tmp_path):
    root = edited(prepared, tmp_path, "none", None)
    (root / "vtab-1k/cifar/SUBSET").write_text("not the official\nimages")
    val = load("cifar", root, split="train")[1]
    assert val.description.endswith("200 val; SUBSET: not the official images") and not val.official
    (root / "vtab-1k/cifar/SUBSET").unlink()
    assert load("cifar", root, split="train")[1].official  # 800 and 200, as far as counts tell


def test_without_the_test_set_a_validation_run_goes_through(prepared, tmp_path):
    root = edited(prepared, tmp_path, "none", None)
    (root / "vtab-1k/cifar/test.txt").unlink()
    assert len(load("cifar", root, split="train")[1]) == 200


def short_side(image, side):
    width, height = image.size
    shorter = min(width, height)
    return image.resize((side * width // shorter, side * height // shorter), BICUBIC)


def test_fgvc_lists(birds):
    train, test = load("cub", birds, img_size=56)
    assert "40 of 5994 train (subset) / 12 of 5794 test (subset)" in train.description
    assert not train.official and train.source == "lists"
    assert train.labels.tolist() == [i % 5 for i in range(30)] + [i % 5 for i in range(10)]
    small, val = load("cub", birds, img_size=56, split="train")
    assert len(small) == 30 and len(val) == 10
    scaled = short_side(Image.open(test.items[3]), 64)  # the test view by hand: its centre
    left, top = round((scaled.size[0] - 56) / 2), round((scaled.size[1] - 56) / 2)
    wanted = scaled.crop((left, top, left + 56, top + 56))
    assert np.array_equal(test[3][0].permute(1, 2, 0), wanted)


def test_digits(tmp_path):
    train, test = load("digits", tmp_path, img_size=28)
    assert (
        len(train) == 1000 and len(test) == 797 and train.labels.unique().tolist() == [*range(10)]
    )
    small, val = load("digits", tmp_path, split="train", img_size=28)
    assert len(small) == 800 and len(val) == 200 and train.official
    both = torch.cat([in_memory(small), in_memory(val)])
    assert torch.equal(in_memory(train), both)


# --- damaged data ---------------------------------------------------------------------------------

LISTS = {
    "class-beyond": ("test.txt", lambda x: [*x[:3], "images/test/000003.png 100"], "line 4: label"),
    "no-class": ("test.txt", lambda x: ["images/test/000003.png"], "line 1: expected"),
    "giant-class": ("test.txt", lambda x: ["a.png " + "9" * 5000], "line 1: expected"),
    "gone": ("test.txt", lambda x: ["images/test/gone.png 3"], "gone.png does not exist"),
    "leads-out": ("test.txt", lambda x: ["../cifar/images/test/000003.png 3"], "leads out"),
    "nul": ("test.txt", lambda x: ["a\0b.png 3"], "is not a readable image"),
    "empty": ("test.txt", lambda x: [], "test.txt has 0 images"),
    "too-long": ("test.txt", lambda x: x * 501, "test.txt has 10020 images"),
    "too-short": ("train800val200.txt", lambda x: x[:-1], "has 999 images"),
}


@pytest.mark.parametrize("case", LISTS)
def test_damaged_lists(prepared, tmp_path, case):
    listing, edit, message = LISTS[case]
    with pytest.raises(DataError, match=re.escape(message)):
        load("cifar", edited(prepared, tmp_path, listing, edit))


JSONS = {
    "cut": ("val", "{"),
    "deep": ("val", "[" * 100_000),
    "class-is-text": ("test", '{"000.bird/test0.jpg": "one"}'),
    "leads-out": ("test", '{"../../../x.jpg": 1}'),
    "gone": ("test", '{"000.bird/gone.jpg": 1}'),
    "many-classes": ("test", json.dumps({f"{i}.jpg": i for i in range(300)})),
    "absent": ("test", None),
}


@pytest.mark.parametrize("case", JSONS)
def test_damaged_fgvc_lists(birds, case):
    part, listing = JSONS[case]
    file = birds / f"fgvc/CUB_200_2011/{part}.json"
    file.unlink()
    if listing is not None:
        file.write_text(listing)
    with pytest.raises(DataError):
        load("cub", birds)


def test_missing_folders_and_lists_are_named_with_where_to_get_them(prepared, tmp_path):
    with pytest.raises(DataError, match=r"/dtd/dtd: get it by hand from https://.*Google Drive"):
        load("dtd", prepared)
    with pytest.raises(DataError, match=r"fgvc/nabirds.*NABirds"):
        load("nabirds", prepared)
    with pytest.raises(DataError, match="no .*FashionMNIST/raw/train.*: get it by hand from https"):
        load("fashion_mnist", tmp_path, download=False)
    root = edited(prepared, tmp_path, "none", None)
    (root / "vtab-1k/cifar/val200.txt").write_bytes(b"\xff\xfe 3")
    with pytest.raises(DataError, match="no list .*val200.txt"):
        load("cifar", root, split="train")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named(prepared, tmp_path, monkeypatch, workers):
    root = edited(prepared, tmp_path, "test.txt", lambda x: ["bad.png 3", *x[1:]])
    bad = root / "vtab-1k/cifar/bad.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"line 1: .*bad.png is not a readable image"):
        load("cifar", root)
    whole = (prepared / "vtab-1k/cifar/images/test/000000.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])  # the header is whole
    _, test = load("cifar", root)
    monkeypatch.setattr(data, "FEW_PIXELS", 0)
    monkeypatch.setattr(data, "CORES", 2)
    for use in (lambda: list(test.batches(8, workers)), lambda: test.prepare("cpu", workers)):
        with pytest.raises(DataError, match=r"^cannot read image \S*bad.png: [^\n]*$"):
            use()


def test_pillow_starts_no_program(tmp_path, monkeypatch):
    def start(*arguments, **options):
        raise AssertionError("Pillow starts a program")

    monkeypatch.setattr(subprocess, "Popen", start)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    for item in (tmp_path / "a.png", eps):
        with pytest.raises(DataError, match="cannot read image"):
            data.Images([item], [0], 8)[0]


def replaced_by(kind, path):
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["images/3.png", "train800.txt", "SUBSET"])
def test_what_is_no_file_ends_in_an_error_at_once(cifar, name, kind):
    (cifar / "SUBSET").touch()
    replaced_by(kind, cifar / name)
    start = time.monotonic()
    with pytest.raises(DataError, match=name):
        load("cifar", cifar.parents[1], split="train", source="prepared")
    assert time.monotonic() - start < 5


# --- batches, augmentation and memory -------------------------------------------------------------


def test_batches_are_the_items_in_order(prepared, monkeypatch):
    train, _ = load("cifar", prepared, img_size=16)
    images = torch.stack([train[i][0] for i in range(1000)])
    monkeypatch.setattr(data, "CORES", 2)
    monkeypatch.setattr(data, "FEW_PIXELS", 0)
    for workers in (0, 2):
        batches = list(train.batches(300, workers))
        assert [len(labels) for _, labels in batches] == [300, 300, 300, 100]
        assert torch.equal(torch.cat([x for x, _ in batches]), images)
        assert torch.equal(torch.cat([y for _, y in batches]), train.labels)
    assert torch.equal(in_memory(train), images)


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_an_epoch_is_the_same_from_files_from_memory_and_from_workers(
    prepared, augment, monkeypatch
):
    train, _ = load("cifar", prepared, img_size=16, augment=augment)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:200]
    state = torch.get_rng_state()
    first = list(train.epoch(order, 64, 0, "0 0"))
    monkeypatch.setattr(data, "CORES", 2)
    monkeypatch.setattr(data, "FEW_PIXELS", 0)
    forked = list(train.epoch(order, 64, 2, "0 0"))
    train.prepare("cpu", workers=2)
    held = list(train.epoch(order, 64, 0, "0 0"))
    assert torch.equal(state, torch.get_rng_state())
    for one, two, three in zip(first, forked, held, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[0], three[0])
        assert torch.equal(one[1], two[1]) and torch.equal(one[1], three[1])
    other = next(train.epoch(order, 64, 0, "0 1"))[0]
    assert torch.equal(other, first[0][0]) == (augment == "none")
    back = torch.cat([x for x, _ in train.epoch(order.flip(0), 64, 0, "0 0")])
    assert torch.equal(back.flip(0), torch.cat([x for x, _ in first]))


@pytest.mark.parametrize("shape", [(64, 90), (200, 64), (64, 64), (64, 900)], ids=str)
def test_crops_and_flips_are_torchvisions_with_the_seed_of_the_item(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = Image.fromarray(pixels)
    crops = data.Images([pixels], [0], 56, augment="crop")
    flips = data.Images([pixels], [0], 64, augment="flip")
    mirrored = 0
    for epoch in range(40):
        torch.manual_seed(zlib.crc32(f"3 {epoch} 0".encode()))
        box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        wanted = pil.resized_crop(image, *box, [56, 56], pil.InterpolationMode.BICUBIC)
        wanted = pil.hflip(wanted) if torch.rand(()) < 0.5 else wanted
        [(crop, _)] = crops.epoch(torch.tensor([0]), 1, 0, f"3 {epoch}")
        assert np.array_equal(crop[0].permute(1, 2, 0), wanted)
        torch.manual_seed(zlib.crc32(f"3 {epoch} 0".encode()))
        is_mirrored = bool(torch.rand(()) < 0.5)
        mirrored += is_mirrored
        [(flip, _)] = flips.epoch(torch.tensor([0]), 1, 0, f"3 {epoch}")
        assert torch.equal(flip[0], flips[0][0].flip(-1) if is_mirrored else flips[0][0])
    assert 10 < mirrored < 30


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_what_does_not_fit_is_read_from_the_files(birds, augment, monkeypatch, capsys):
    train, _ = load("cub", birds, img_size=56, augment=augment)
    monkeypatch.setattr(data, "free_memory", lambda device: 3 * 40 * 56**2)
    train.prepare("cpu", 0)
    assert train.prepared is None and train.items is train.files
    assert "read from the files" in capsys.readouterr().out
    monkeypatch.setattr(data, "free_memory", lambda device: 1 << 30)
    train.prepare("cpu", 0)
    kept = train.items if augment == "crop" else train.prepared
    assert len(kept) == 40 and kept is not train.files
    if augment == "crop":
        assert np.array_equal(kept[7], short_side(Image.open(train.files[7]), 64))
    train.prepare("cpu", 0)
    assert kept is (train.items if augment == "crop" else train.prepared)  # not decoded again


def test_digest_is_of_the_data_alone(prepared, tmp_path):
    root = tmp_path / "elsewhere"
    shutil.copytree(prepared / "vtab-1k", root / "vtab-1k")  # at another place and time
    for here, away in zip(load("cifar", prepared), load("cifar", root, img_size=8), strict=True):
        assert here.digest() == away.digest() and len(here.digest()) == 64
        assert here.fingerprint() != away.fingerprint()
    train, test = (images.digest() for images in load("cifar", root))
    listing = root / "vtab-1k/cifar/test.txt"
    listing.write_text(listing.read_text().replace(" 3\n", " 4\n"))
    same, other = load("cifar", root)
    assert same.digest() == train != test != other.digest()
    Image.new("RGB", (4, 4), "red").save(root / "vtab-1k/cifar/images/train800/000005.png")
    assert load("cifar", root)[0].digest() != train
    digits = load("digits", img_size=14)[0]
    digits.prepare("cpu", 0)
    assert digits.digest() == load("digits", img_size=28)[0].digest()
    assert digits.digest().startswith("dd11bd32")  # as ever: results in the repository have it
    digits.files = digits.files[::-1]
    assert not digits.digest().startswith("dd11bd32")


def test_normalization_against_numpy(prepared):
    train, _ = load("cifar", prepared, img_size=16)
    images = torch.stack([train[i][0] for i in range(4)])  # (4, 3, 16, 16)
    before = images.clone()
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    wanted = (images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    got = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")(images)
    np.testing.assert_allclose(got.numpy().transpose(0, 2, 3, 1), wanted, atol=1e-5)
    assert torch.equal(images, before)
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert data.normalizer(*data.NORMALIZE["none"], "cpu")(white).eq(1).all()
