"""The table, the prepared folder and the demo, against the facts and against Pillow and NumPy alone."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataError, load


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A whole CIFAR-100 task in the prepared layout: 1000 + 20 random images of 12 x 10 pixels, three of them odd."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "vtab-1k" / "cifar"
    rng = np.random.default_rng(0)
    lists = {"train800": 800, "val200": 200, "test": 20}
    for name, count in lists.items():
        (folder / "images" / name).mkdir(parents=True)
        lines = []
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8))
            image = {1: image.convert("L"), 2: image.convert("P"), 3: image.convert("RGBA")}.get(i, image)
            image.save(folder / "images" / name / f"{i:06}.png")
            lines.append(f"images/{name}/{i:06}.png {i % 100}\n")
        (folder / f"{name}.txt").write_text("".join(lines))
    both = (folder / "train800.txt").read_text() + (folder / "val200.txt").read_text()
    (folder / "train800val200.txt").write_text(both)
    return root


def edited(prepared, tmp_path, listing, edit):
    """A copy of the prepared folder's lists with one list edited; the images are linked, not copied."""
    folder = tmp_path / "vtab-1k" / "cifar"
    folder.mkdir(parents=True)
    source = prepared / "vtab-1k" / "cifar"
    (folder / "images").symlink_to(source / "images")
    for file in source.glob("*.txt"):
        lines = file.read_text().splitlines()
        (folder / file.name).write_text("\n".join(edit(lines) if file.name == listing else lines) + "\n")
    return tmp_path


def test_the_table():
    vtab = [task for task in data.TASKS.values() if task.benchmark == "vtab-1k"]
    groups = {group: sum(task.group == group for task in vtab) for group in ("natural", "specialized", "structured")}
    assert groups == {"natural": 7, "specialized": 4, "structured": 8}
    assert sum(task.benchmark == "fgvc" for task in data.TASKS.values()) == 5
    assert all(task.sizes[:2] == (800, 200) for task in vtab)
    assert sum(task.sizes[2] for task in vtab) == 387_905
    names = [name for task in data.TASKS.values() for name in (task.name, *task.aliases)]
    assert len(names) == len(set(names)) and all(key == task.name for key, task in data.TASKS.items())


def test_names_and_aliases():
    assert data.find_task("CIFAR-100").name == "cifar"
    assert data.find_task("flowers102").name == "oxford_flowers102"
    with pytest.raises(DataError, match="unknown dataset 'cifra': did you mean 'cifar'"):
        data.find_task("cifra")
    with pytest.raises(DataError, match="unknown dataset 'zzz': the tasks are cifar, caltech101"):
        data.find_task("zzz")


def test_prepared_folder_against_pillow(prepared):
    train, test = load("cifar100", prepared, img_size=16)
    assert len(train) == 1000 and len(test) == 20
    assert train.labels.tolist() == [i % 100 for i in range(800)] + [i % 100 for i in range(200)]
    for i in (0, 1, 2, 3, 799, 800):
        path = prepared / "vtab-1k/cifar/images" / (f"train800/{i:06}.png" if i < 800 else f"val200/{i - 800:06}.png")
        want = np.asarray(Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
        image, label = train[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 16, 16) and label == i % 100
        assert np.array_equal(image.permute(1, 2, 0), want)
    assert train.about == "prepared folder, PNG images, 1000 train / 20 of 10000 test (subset)"
    train, val = load("cifar", prepared, split="train", img_size=16)
    assert len(train) == 800 and len(val) == 200 and val.about.endswith("800 train / 200 val")


def test_a_declared_subset_is_named(prepared, tmp_path):
    root = edited(prepared, tmp_path, "none", None)
    (root / "vtab-1k/cifar/SUBSET").write_text("not the official\nimages")
    assert load("cifar", root)[1].about.endswith("(subset); SUBSET: not the official images")


def test_reading_twice_gives_identical_tensors(prepared):
    train, _ = load("cifar", prepared, img_size=16)
    assert torch.equal(train[5][0], train[5][0])
    first, again = train.tensors(), train.tensors()
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")
    before = first[0].clone()
    once = normalize(first[0])
    assert torch.equal(once, normalize(first[0])) and torch.equal(first[0], before)


def test_tensors_and_batches_are_the_items_in_order(prepared):
    train, _ = load("cifar", prepared, img_size=16)
    images, labels = train.tensors(workers=3)
    assert images.shape == (1000, 3, 16, 16) and torch.equal(labels, train.labels)
    assert all(torch.equal(images[i], train[i][0]) for i in (0, 255, 256, 999))
    for workers in (1, 4):
        batches = list(train.batches(300, workers))
        assert [len(labels) for _, labels in batches] == [300, 300, 300, 100]
        assert torch.equal(torch.cat([images for images, _ in batches]), images)
    assert [len(labels) for _, labels in train.batches(500)] == [500, 500]


def test_normalization_against_numpy(prepared):
    images = load("cifar", prepared, img_size=16)[0].tensors()[0][:4]
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    want = (images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    got = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")(images)
    np.testing.assert_allclose(got.numpy().transpose(0, 2, 3, 1), want, atol=1e-5)
    assert data.normalizer(*data.NORMALIZE["none"], "cpu")(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).eq(1).all()


@pytest.mark.parametrize(
    ("listing", "edit", "message"),
    [
        (
            "test.txt",
            lambda x: [*x[:3], "images/test/000003.png 100", *x[4:]],
            "test.txt, line 4: label 100 is outside 0..99",
        ),
        ("test.txt", lambda x: ["images/test/000003.png -1", *x[1:]], "line 1: label -1 is outside"),
        ("test.txt", lambda x: ["images/test/000003.png", *x[1:]], "line 1: expected '<image> <label>'"),
        ("test.txt", lambda x: ["images/test/gone.png 3", *x[1:]], "gone.png does not exist"),
        ("test.txt", lambda x: ["../cifar/images/test/000003.png 3", *x[1:]], "leads out of the task's folder"),
        ("test.txt", lambda x: ["/etc/hostname 3", *x[1:]], "leads out of the task's folder"),
        ("train800val200.txt", lambda x: x[:-1], "train800val200.txt has 999 images, VTAB-1k's cifar has 1000"),
        ("test.txt", lambda x: [], "test.txt has 0 images, VTAB-1k's cifar has 10000"),
        ("test.txt", lambda x: ["a\0b.png 3", *x[1:]], "is not a readable image (ValueError)"),
        ("test.txt", lambda x: x * 501, "test.txt has 10020 images, VTAB-1k's cifar has 10000"),
    ],
)
def test_damaged_lists(prepared, tmp_path, listing, edit, message):
    with pytest.raises(DataError, match=re.escape(message)):
        load("cifar", edited(prepared, tmp_path, listing, edit))


def test_missing_folders_and_lists(prepared, tmp_path):
    with pytest.raises(DataError, match=r"no folder .*vtab-1k/dtd: unpack .*Google Drive"):
        load("dtd", prepared)
    root = edited(prepared, tmp_path, "none", None)
    (root / "vtab-1k/cifar/val200.txt").unlink()
    with pytest.raises(DataError, match="no list .*val200.txt"):
        load("cifar", root, split="train")
    (root / "vtab-1k/cifar/val200.txt").write_bytes(b"\xff\xfe 3")
    with pytest.raises(DataError, match="no list .*val200.txt .*utf-8"):
        load("cifar", root, split="train")
    with pytest.raises(ValueError, match="split must be"):
        load("cifar", root, split="test")


def test_unreadable_images_are_named(prepared, tmp_path):
    folder = edited(prepared, tmp_path, "test.txt", lambda x: ["bad.png 3", *x[1:]]) / "vtab-1k/cifar"
    (folder / "bad.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"line 1: .*bad.png is not a readable image"):
        load("cifar", tmp_path)
    whole = (prepared / "vtab-1k/cifar/images/test/000000.png").read_bytes()
    (folder / "bad.png").write_bytes(whole[: len(whole) // 2])  # the header is whole
    _, test = load("cifar", tmp_path)
    with pytest.raises(DataError, match=r"cannot read image .*bad.png"):
        list(test.batches(8))


def test_digits():
    train, test = load("digits", "nowhere", img_size=28)
    assert len(train) == 1000 and len(test) == 797
    assert len(set(train.labels.tolist())) == 10
    small, val = load("digits", "nowhere", split="train", img_size=28)
    assert len(small) == 800 and len(val) == 200
    assert torch.equal(train.tensors()[0], torch.cat([small.tensors()[0], val.tensors()[0]]))


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    theirs = datasets.load_digits()
    train, test = load("digits", img_size=8)
    images = torch.cat([train.tensors()[0], test.tensors()[0]])[:, 0].numpy()
    labels = torch.cat([train.labels, test.labels]).tolist()
    ours = [(tuple(np.rint(x.ravel() / 255 * 16).astype(int)), y) for x, y in zip(images, labels, strict=True)]
    want = [(tuple(x.astype(int)), int(y)) for x, y in zip(theirs.data, theirs.target, strict=True)]
    assert sorted(ours) == sorted(want)


def test_fashion_mnist_without_a_network(tmp_path):
    with pytest.raises(DataError, match="no Fashion-MNIST in .*FashionMNIST/raw"):
        load("fashion_mnist", tmp_path, download=False)


def test_fashion_mnist_from_idx_files(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 60000), ("t10k", 10000)):
        pixels, labels = np.zeros((count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        pixels[:, 0, 0] = labels
        header = b"\0\0\x08\x03" + count.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + count.to_bytes(4, "big") + labels.tobytes()
        )
    for split, sizes in (("trainval", (60000, 10000)), ("train", (50000, 10000))):
        parts = load("fashion_mnist", tmp_path, split=split, img_size=28, download=False)
        assert tuple(map(len, parts)) == sizes
        assert all(part[7][0][0, 0, 0] == part[7][1] for part in parts)
