"""data.py on tasks: lists, images, batches and digests against the facts, Pillow and NumPy alone."""

import json
import os
import re
import shutil
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


def test_the_table():
    vtab = data.tasks_of("vtab-1k")
    assert all(task.sizes[:2] == (800, 200) for task in vtab)
    assert sum(task.sizes[2] for task in vtab) == 387_904
    names = []
    for key, task in data.TASKS.items():
        names += [key, *task.aliases]
    assert len(names) == len(set(names))
    assert data.find_task("CIFAR-100").name == "cifar"
    for name, hint in {"cifra": "'cifar'", "vtab": "suite.py", "zzz": "dtd"}.items():
        with pytest.raises(DataError, match=hint):
            data.find_task(name)


def test_the_printed_table(prepared, birds, capsys):
    def printed(code, *arguments):
        with pytest.raises(SystemExit) as stop:
            data.main([*map(str, arguments)])
        assert stop.value.code == code
        return "".join(capsys.readouterr())

    (birds / "vtab-1k").symlink_to(prepared / "vtab-1k")
    out = printed(0, "--data-dir", birds)
    names = re.findall(r"^(\w+) +\d+ +(?:\d+ +){3}", out, re.MULTILINE)
    assert names == [task.name for task in data.tasks_of("vtab-1k") + data.tasks_of("fgvc")]
    assert out.count("not there") == 22 and out.count("NOT OFFICIAL") == 2
    (birds / "fgvc/CUB_200_2011/val.json").write_text("{")
    assert "val.json" in printed(1, "--data-dir", birds, "--dataset", "cub")
    assert "nowhere" in printed(2, "--data-dir", birds / "nowhere")
    assert "cifra" in printed(2, "--dataset", "cifra")


def test_prepared_folder_against_pillow(prepared):
    train, test = load("cifar100", prepared, img_size=16)
    assert len(train) == 1000 and len(test) == 20 and train.source == "prepared"
    assert train.labels.tolist() == [i % 100 for i in range(1000)]
    names = {i: f"train800/{i:06}.png" for i in range(4)}  # of several modes
    for i, name in (names | {800: "val200/000000.png"}).items():
        image = Image.open(prepared / "vtab-1k/cifar/images" / name).convert("RGB")
        pixels, label = train[i]
        assert pixels.dtype == torch.uint8 and label == i % 100
        assert np.array_equal(pixels.permute(1, 2, 0), image.resize((16, 16), BICUBIC))
    assert not test.official and "order not proven" in test.description
    assert "20 of 10000 test (subset)" in test.description


def test_the_prepared_folder_only_where_the_originals_cannot_be_had(prepared, monkeypatch):
    assert load("cifar", prepared)[0].source == "prepared"
    with pytest.raises(DataError, match="cifar-100-python"):
        load("cifar", prepared, source="original", download=False)
    labels = {"train": np.zeros(50_000, int), "test": np.repeat(np.arange(100), 100)}

    def whole_split(task, root, split, download=True):
        pixels = np.zeros((len(labels[split]), 2, 2, 3), np.uint8)
        return splits.in_memory(pixels, labels[split])

    monkeypatch.setattr(tasks, "whole_split", whole_split)
    train, test = load("cifar", prepared)
    assert train.source == "original" and train.official and test.official
    assert test.digests == splits.CONSTANTS["keys"]["cifar"]
    del labels["test"]  # whoever asks for it fails
    train, val = load("cifar", prepared, split="train")
    assert len(train) == 800 and len(val) == 200 and val.official
    assert load("cifar", prepared, source="prepared")[0].source == "prepared"


def test_a_subset_or_a_padded_list_is_never_the_benchmark(prepared, tmp_path):
    root = edited(prepared, tmp_path, "none", None)
    folder = root / "vtab-1k/cifar"
    (folder / "test.txt").unlink()  # not needed to validate
    train, val = load("cifar", root, split="train")
    assert len(train) == 800 and len(val) == 200 and val.official  # as far as counts tell
    (folder / "SUBSET").write_text("not the official\nimages")
    val = load("cifar", root, split="train")[1]
    assert not val.official and "SUBSET: not the official images" in val.description
    (folder / "SUBSET").unlink()
    listed = (folder / "val200.txt").read_text().splitlines()
    listed[100] = listed[0]  # of the same class
    (folder / "val200.txt").write_text("\n".join(listed))
    val = load("cifar", root, split="train")[1]
    assert len(val) == 200 and not val.official and "1 images are repeated" in val.description


def test_fgvc_lists(birds):
    train, test = load("cub", birds, img_size=56)
    assert "40 of 5994 train (subset) / 12 of 5794 test (subset)" in train.description
    assert not train.official and train.source == "lists"
    assert train.labels.tolist() == [i % 5 for i in range(30)] + [i % 5 for i in range(10)]
    small, val = load("cub", birds, img_size=56, split="train")
    assert len(small) == 30 and len(val) == 10
    image = Image.open(test.items[3])  # the test view by hand: the centre at a short side of 64
    width, height = image.size
    shorter = min(width, height)
    scaled = image.resize((64 * width // shorter, 64 * height // shorter), BICUBIC)
    left, top = round((scaled.size[0] - 56) / 2), round((scaled.size[1] - 56) / 2)
    wanted = scaled.crop((left, top, left + 56, top + 56))
    assert np.array_equal(test[3][0].permute(1, 2, 0), wanted)


LISTS = {
    "class-beyond": ("test.txt", lambda x: [*x[:3], "images/test/000003.png 100"], "line 4"),
    "no-class": ("test.txt", lambda x: ["images/test/000003.png"], "test.txt, line 1"),
    "gone": ("test.txt", lambda x: ["images/test/gone.png 3"], "gone.png"),
    "leads-out": ("test.txt", lambda x: ["../cifar/images/test/000003.png 3"], "leads out"),
    "empty": ("test.txt", lambda x: [], "test.txt has 0 images"),
    "too-short": ("train800val200.txt", lambda x: x[:-1], "has 999 images"),
}
BIRDS = {  # the same of FGVC
    "birds-cut": ("val", "{"),
    "birds-class-is-text": ("test", '{"000.bird/test0.jpg": "one"}'),
    "birds-lead-out": ("test", '{"../../../x.jpg": 1}'),
    "birds-gone": ("test", '{"000.bird/gone.jpg": 1}'),
    "birds-many": ("test", json.dumps({"./" * i + "000.bird/test0.jpg": i for i in range(201)})),
}


@pytest.mark.parametrize("case", [*LISTS, *BIRDS])
def test_damaged_lists(prepared, birds, tmp_path, case):
    if case in LISTS:
        listing, edit, message = LISTS[case]
        with pytest.raises(DataError, match=message):
            load("cifar", edited(prepared, tmp_path, listing, edit))
        return
    part, listing = BIRDS[case]
    (birds / f"fgvc/CUB_200_2011/{part}.json").write_text(listing)
    with pytest.raises(DataError, match="cub|CUB_200_2011"):
        load("cub", birds)


def test_what_is_not_there_is_named_with_where_to_get_it(tmp_path):
    places = {"dtd": "dtd/dtd.*https://.*Google Drive", "nabirds": "fgvc/nabirds"}
    for name, place in (places | {"fashion_mnist": "FashionMNIST/raw/train.*https://"}).items():
        with pytest.raises(DataError, match=place):
            load(name, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named(prepared, tmp_path, monkeypatch, workers):
    root = edited(prepared, tmp_path, "test.txt", lambda x: ["bad.png 3", *x[1:]])
    bad = root / "vtab-1k/cifar/bad.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"bad.png"):
        load("cifar", root)
    whole = (prepared / "vtab-1k/cifar/images/test/000000.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])  # the header is whole
    _, test = load("cifar", root)
    monkeypatch.setattr(data, "FEW_PIXELS", 0)
    monkeypatch.setattr(data, "CORES", 2)
    for use in (lambda: list(test.batches(8, workers)), lambda: test.prepare("cpu", workers)):
        with pytest.raises(DataError, match=r"^[^\n]*bad.png[^\n]*$"):  # a line, no traceback
            use()


def test_pillow_starts_no_ghostscript(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    for item in (tmp_path / "a.png", eps):
        with pytest.raises(DataError, match="cannot identify"):  # Pillow's words
            data.Images([item], [0], 8)[0]


@pytest.mark.parametrize("name", ["images/3.png", "train800.txt", "SUBSET"])
def test_a_pipe_in_the_place_of_a_file_ends_in_an_error(cifar, name):
    (cifar / name).unlink(missing_ok=True)
    os.mkfifo(cifar / name)
    with pytest.raises(DataError, match=name):
        load("cifar", cifar.parents[1], split="train", source="prepared")


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_an_epoch_is_the_same_from_files_from_memory_and_from_workers(birds, augment, monkeypatch):
    train, _ = load("cub", birds, img_size=16, augment=augment)
    order = torch.randperm(40)
    state = torch.get_rng_state()

    def epoch(order, workers, seed="0 0"):
        images, labels = zip(*train.epoch(order, 16, workers, seed), strict=True)
        return torch.cat(images), torch.cat(labels)

    images, labels = epoch(order, 0)
    assert torch.equal(labels, train.labels[order])
    assert torch.equal(epoch(order, 0, "0 1")[0], images) == (augment == "none")
    assert torch.equal(epoch(order.flip(0), 0)[0].flip(0), images)
    monkeypatch.setattr(data, "CORES", 2)
    monkeypatch.setattr(data, "FEW_PIXELS", 0)
    views = torch.stack([train[i][0] for i in range(40)])
    for workers in (0, 2):  # what a test set is scored on
        batches = [x for x, _ in train.batches(16, workers)]
        assert [len(x) for x in batches] == [16, 16, 8] and torch.cat(batches).equal(views)
    forked = epoch(order, 2)
    train.prepare("cpu", workers=2)
    for other_images, other_labels in (forked, epoch(order, 0)):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(64, 90), (200, 64), (64, 900)], ids=str)
def test_crops_and_flips_are_torchvisions_with_the_seed_of_the_item(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = Image.fromarray(pixels)
    crops = data.Images([pixels], [0], 56, augment="crop")
    flips = data.Images([pixels], [0], 64, augment="flip")
    for epoch in range(30):
        torch.manual_seed(zlib.crc32(f"3 {epoch} 0".encode()))
        box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        wanted = pil.resized_crop(image, *box, [56, 56], pil.InterpolationMode.BICUBIC)
        wanted = pil.hflip(wanted) if torch.rand(()) < 0.5 else wanted
        [(crop, _)] = crops.epoch(torch.tensor([0]), 1, 0, f"3 {epoch}")
        assert np.array_equal(crop[0].permute(1, 2, 0), wanted)
        torch.manual_seed(zlib.crc32(f"3 {epoch} 0".encode()))
        wanted = flips[0][0].flip(-1) if torch.rand(()) < 0.5 else flips[0][0]
        [(flip, _)] = flips.epoch(torch.tensor([0]), 1, 0, f"3 {epoch}")
        assert torch.equal(flip[0], wanted)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_what_does_not_fit_is_read_from_the_files(birds, augment, monkeypatch):
    train, _ = load("cub", birds, img_size=56, augment=augment)
    monkeypatch.setattr(data, "free_memory", lambda device: 3 * 40 * 56**2)
    train.prepare("cpu", 0)
    assert train.prepared is None and train.items is train.files
    monkeypatch.setattr(data, "free_memory", lambda device: 1 << 30)
    train.prepare("cpu", 0)
    kept = train.items if augment == "crop" else train.prepared
    assert len(kept) == 40 and kept is not train.files


def test_digest_is_of_the_data_alone(birds, tmp_path):
    root = tmp_path / "elsewhere"
    shutil.copytree(birds / "fgvc", root / "fgvc")  # at another place and time
    for here, away in zip(load("cub", birds), load("cub", root, img_size=8), strict=True):
        assert here.digest() == away.digest()
    train, test = (images.digest() for images in load("cub", root))
    listing = root / "fgvc/CUB_200_2011/test.json"
    listing.write_text(listing.read_text().replace('test3.jpg": 10', 'test3.jpg": 4'))
    same, other = load("cub", root)
    assert same.digest() == train != test != other.digest()
    Image.new("RGB", (4, 4), "red").save(same.files[5])
    assert load("cub", root)[0].digest() != train
    digits, test = load("digits", img_size=14)
    small, val = load("digits", split="train")
    assert np.array_equal(np.concatenate([small.items, val.items]), digits.items)
    assert len(small) == 800 and len(val) == 200 and len(test) == 797 and test.official
    digits.prepare("cpu", 0)
    assert digits.digest() == load("digits", img_size=28)[0].digest()
    assert digits.digest().startswith("dd11bd32")  # as ever: results in the repository have it


def test_normalization_against_numpy():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    before = images.clone()
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    wanted = (images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    got = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")(images)
    np.testing.assert_allclose(got.numpy().transpose(0, 2, 3, 1), wanted, atol=1e-5)
    assert torch.equal(images, before)
    assert data.normalizer(*data.NORMALIZE["none"], "cpu")(images).equal(images.float() / 255)


def test_a_decoding_process_that_dies_is_done_without(monkeypatch, capsys):
    images = data.load("digits", img_size=28)[1]
    wanted = [x.clone() for x, _ in images.batches(100, 0)]
    real = data.DataLoader

    def dies(rows, num_workers, **options):
        loader = real(rows, num_workers=0, **options | {"multiprocessing_context": None})
        for number, batch in enumerate(loader):
            if num_workers and number == 2:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
            yield batch

    monkeypatch.setattr(data, "DataLoader", dies)
    monkeypatch.setattr(data, "FEW_PIXELS", 0)
    found = [x for x, _ in images.batches(100, 4)]
    assert all(map(torch.equal, found, wanted)) and len(found) == len(wanted)
    assert "shm-size" in capsys.readouterr().err
