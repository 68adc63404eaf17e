"""The table, the prepared folder and the demo, against the facts and against Pillow and NumPy alone."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import images as image_sets
import originals
import splits
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
            image = {1: image.convert("L"), 2: image.convert("P"), 3: image.convert("RGBA")}.get(
                i, image
            )
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
        (folder / file.name).write_text(
            "\n".join(edit(lines) if file.name == listing else lines) + "\n"
        )
    return tmp_path


def test_the_table():
    vtab = [task for task in data.TASKS.values() if task.benchmark == "vtab-1k"]
    groups = {
        group: sum(task.group == group for task in vtab)
        for group in ("natural", "specialized", "structured")
    }
    assert groups == {"natural": 7, "specialized": 4, "structured": 8}
    assert sum(task.benchmark == "fgvc" for task in data.TASKS.values()) == 5
    assert all(task.sizes[:2] == (800, 200) for task in vtab)
    assert sum(task.sizes[2] for task in vtab) == 387_905
    names = [name for task in data.TASKS.values() for name in (task.name, *task.aliases)]
    assert len(names) == len(set(names)) and all(
        key == task.name for key, task in data.TASKS.items()
    )


def test_names_and_aliases():
    assert data.find_task("CIFAR-100").name == "cifar"
    assert data.find_task("flowers102").name == "oxford_flowers102"
    with pytest.raises(DataError, match="unknown dataset 'cifra': did you mean 'cifar'"):
        data.find_task("cifra")
    with pytest.raises(
        DataError, match="unknown dataset 'zzz': there are vtab, fgvc, cifar, caltech101"
    ):
        data.find_task("zzz")


def test_prepared_folder_against_pillow(prepared):
    train, test = load("cifar100", prepared, img_size=16)
    assert len(train) == 1000 and len(test) == 20
    assert train.labels.tolist() == [i % 100 for i in range(800)] + [i % 100 for i in range(200)]
    for i in (0, 1, 2, 3, 799, 800):
        path = (
            prepared
            / "vtab-1k/cifar/images"
            / (f"train800/{i:06}.png" if i < 800 else f"val200/{i - 800:06}.png")
        )
        want = np.asarray(
            Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
        )
        image, label = train[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 16, 16) and label == i % 100
        assert np.array_equal(image.permute(1, 2, 0), want)
    assert train.about == "prepared folder, PNG images, 1000 train / 20 of 10000 test (subset)"
    train, val = load("cifar", prepared, split="train", img_size=16)
    assert len(train) == 800 and len(val) == 200 and val.about.endswith("800 train / 200 val")


def test_the_prepared_folder_only_where_the_originals_cannot_be_had(prepared, capsys, monkeypatch):
    train, _ = load("cifar", prepared)
    assert train.source == "prepared" and "reading the prepared folder" in capsys.readouterr().out
    assert (
        load("cifar", prepared, source="prepared")[0].source == "prepared"
        and not capsys.readouterr().out
    )
    with pytest.raises(DataError, match="no .*cifar-100-python: get it by hand"):
        load("cifar", prepared, source="original", download=False)
    pixels = np.zeros((60_000, 2, 2, 3), np.uint8)
    rows = {
        "train": splits.rows(pixels[:50_000], [0] * 50_000),
        "test": splits.rows(pixels[50_000:], [1] * 10_000),
    }
    monkeypatch.setattr(originals, "read", lambda name, root, split, download: rows[split])
    train, test = load("cifar", prepared)
    assert train.about == "originals, raw images, 1000 train / 10000 test"
    assert train.source == "original" and train.official and test.official
    rows["test"] = None  # whoever asks for it fails
    train, val = load("cifar", prepared, split="train")
    assert len(train) == 800 and len(val) == 200 and val.official


def test_a_subset_or_a_padded_list_is_never_the_benchmark(prepared, tmp_path):
    assert not load("cifar", prepared)[1].official
    root = edited(prepared, tmp_path, "test.txt", lambda lines: lines * 500)
    _, test = load("cifar", root)
    assert len(test) == 10_000 and not test.official
    assert test.about.endswith("1000 train / 10000 test; 9980 images are repeated")


def test_a_training_image_in_the_test_list_is_noticed(prepared, tmp_path):
    root = edited(
        prepared, tmp_path, "test.txt", lambda lines: [*lines[:-1], "images/val200/000007.png 7"]
    )
    _, test = load("cifar", root)
    assert test.about.endswith("; 1 images are repeated") and not test.official


def test_a_declared_subset_is_named(prepared, tmp_path):
    root = edited(prepared, tmp_path, "none", None)
    (root / "vtab-1k/cifar/SUBSET").write_text("not the official\nimages")
    assert load("cifar", root)[1].about.endswith("(subset); SUBSET: not the official images")
    val = load("cifar", root, split="train")[1]
    assert val.about.endswith("200 val; SUBSET: not the official images") and not val.official
    (root / "vtab-1k/cifar/SUBSET").unlink()
    assert load("cifar", root, split="train")[1].official  # 800 and 200, as far as counts tell


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


def test_an_epoch_gathers_what_was_prepared(prepared, tmp_path):
    train, _ = load("cifar", edited(prepared, tmp_path, "none", None), img_size=16)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    streamed = list(train.epoch(order, 300, 2, "0 0"))
    train.prepare("cpu", workers=2)
    state = torch.get_rng_state()
    gathered = list(train.epoch(order, 300, 2, "0 0"))
    assert torch.equal(state, torch.get_rng_state())
    assert [len(labels) for _, labels in gathered] == [300, 300, 300, 100]
    for (images, labels), (again, labels_again) in zip(gathered, streamed, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)
    first = order[:300].tolist()
    assert torch.equal(gathered[0][0], torch.stack([train[i][0] for i in first]))
    assert gathered[0][1].tolist() == [train[i][1] for i in first]


def test_without_the_test_set_a_validation_run_goes_through(prepared, birds, tmp_path):
    root = edited(prepared, tmp_path / "vtab", "none", None)
    (root / "vtab-1k/cifar/test.txt").unlink()
    assert len(load("cifar", root, split="train")[1]) == 200
    folder = birds / "fgvc/CUB_200_2011"
    listing = json.loads((folder / "train.json").read_text())
    name = next(iter(listing))
    for i in range(200):  # all 200 classes, so that the test list is not needed to know them
        image = folder / "images" / f"{i}.jpg"
        shutil.copy(folder / "images" / name, image)
    (folder / "train.json").write_text(json.dumps({f"{i}.jpg": i for i in range(200)}))
    (folder / "test.json").write_text("damaged")
    small, val = load("cub", birds, split="train")
    assert small.labels.tolist() == list(range(200)) and val.labels.tolist()[:3] == [1, 4, 7]


def test_digest_is_of_the_data_alone(prepared, birds, tmp_path):
    root = tmp_path / "elsewhere"
    shutil.copytree(prepared / "vtab-1k", root / "vtab-1k")  # at another place and time
    for here, away in zip(load("cifar", prepared), load("cifar", root, img_size=8), strict=True):
        assert here.digest() == away.digest() and len(here.digest()) == 64
        assert here.fingerprint() != away.fingerprint()
    train, test = load("cifar", root)
    before = train.digest(), test.digest()
    assert len(set(before)) == 2
    listing = root / "vtab-1k/cifar/test.txt"
    listing.write_text(listing.read_text().replace(" 3\n", " 4\n"))
    after = [images.digest() for images in load("cifar", root)]
    assert after[0] == before[0] and after[1] != before[1]
    Image.new("RGB", (4, 4), "red").save(root / "vtab-1k/cifar/images/train800/000005.png")
    assert load("cifar", root)[0].digest() != before[0]
    digits = load("digits", img_size=14)[0]
    assert digits.digest() == load("digits", img_size=28)[0].digest()
    digits.files = digits.files[::-1]
    assert digits.digest() != load("digits")[0].digest()


def test_workers_are_forked_whatever_python_starts_by_default(prepared, monkeypatch):
    asked = []

    def loader(*args, **kwargs):
        asked.append((kwargs["num_workers"], kwargs["multiprocessing_context"]))
        return real(*args, **kwargs)

    real = image_sets.DataLoader
    monkeypatch.setattr(image_sets, "DataLoader", loader)
    monkeypatch.setattr(image_sets, "FEW", 0)
    monkeypatch.setattr(image_sets, "_cores", lambda: 2)
    digits = load("digits", img_size=14)[1]
    assert len(list(digits.batches(400, 2))) == 2 and asked == [(2, "fork")]
    monkeypatch.setattr(image_sets.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert len(list(digits.batches(400, 2))) == 2 and asked[1] == (0, None)


def decodings(monkeypatch):
    """A list that grows by one with every image decoded in this process."""
    seen, scale = [], data.Images._scaled
    monkeypatch.setattr(data.Images, "_scaled", lambda self, i: (seen.append(i), scale(self, i))[1])
    return seen


def test_the_cache_is_read_the_second_time(prepared, tmp_path, monkeypatch):
    root = edited(prepared, tmp_path, "none", None)
    seen = decodings(monkeypatch)
    state = torch.get_rng_state()
    first = load("cifar", root, img_size=16)[0].tensors(workers=0)
    assert len(seen) == 1000 and torch.equal(
        state, torch.get_rng_state()
    )  # or a cache would change the training
    (cache,) = (root / "cache").iterdir()
    assert cache.name == "cifar-prepared-trainval-16.safetensors"
    again = load("cifar", root, img_size=16)[0].tensors(workers=0)
    assert len(seen) == 1000 and torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    load("cifar", root, img_size=8)[0].tensors(workers=0)  # another size is another file
    load("cifar", root, img_size=16, split="train")[0].tensors(workers=0)
    assert len(seen) == 2800 and len(list((root / "cache").iterdir())) == 3


def flip_a_byte(file):
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        lambda f: f.write_bytes(f.read_bytes()[:-100]),
        lambda f: f.write_bytes(b"{}"),
        None,
    ],
)
def test_a_damaged_or_stale_cache_is_built_again(prepared, tmp_path, monkeypatch, damage):
    root = edited(prepared, tmp_path, "none", None)
    if damage is None:  # its own copy of the images, of which one changes
        (root / "vtab-1k/cifar/images").unlink()
        shutil.copytree(prepared / "vtab-1k/cifar/images", root / "vtab-1k/cifar/images")
    first = load("cifar", root, img_size=16)[0].tensors()[0]
    (cache,) = (root / "cache").iterdir()
    size = len(cache.read_bytes())
    if damage:
        damage(cache)
    else:
        Image.new("RGB", (4, 4), "red").save(root / "vtab-1k/cifar/images/train800/000005.png")
    seen = decodings(monkeypatch)
    again = load("cifar", root, img_size=16)[0].tensors(workers=0)[0]
    assert len(seen) == 1000
    if damage:
        assert torch.equal(first, again) and len(cache.read_bytes()) == size
    else:
        assert not torch.equal(first[5], again[5]) and torch.equal(first[6:], again[6:])
    assert torch.equal(load("cifar", root, img_size=16)[0].tensors(workers=0)[0], again)
    assert len(seen) == 1000 and len(list((root / "cache").iterdir())) == 1


def test_no_cache_where_it_cannot_be_written(prepared, tmp_path, capsys):
    root = edited(prepared, tmp_path, "none", None)
    (root / "cache").write_text("a file in its place")
    images = load("cifar", root, img_size=16)[0].tensors()[0]
    assert (
        len(images) == 1000
        and "decoded images are not kept: cannot write" in capsys.readouterr().out
    )


BIRDS = {"train": 30, "val": 10, "test": 12}


@pytest.fixture
def birds(tmp_path):
    """A CUB of few images, in VPT's layout: class ids from 1 with gaps, images of several shapes."""
    folder, rng = tmp_path / "fgvc/CUB_200_2011", np.random.default_rng(0)
    for part, count in BIRDS.items():
        listing = {}
        for i in range(count):
            name = f"{i % 5:03}.bird/{part}{i}.jpg"
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
            coarse.resize((90 + 7 * (i % 9), 120 - 5 * (i % 7))).save(folder / "images" / name)
            listing[name] = 3 * (i % 5) + 1
        (folder / f"{part}.json").write_text(json.dumps(listing))
    return tmp_path


def test_fgvc_lists(birds):
    train, test = load("cub", birds, img_size=56)
    assert (
        train.about
        == "lists of VPT, JPEG images, 40 of 5994 train (subset) / 12 of 5794 test (subset)"
    )
    assert not train.official
    assert train.labels.tolist() == [i % 5 for i in range(30)] + [i % 5 for i in range(10)]
    small, val = load("cub", birds, img_size=56, split="train")
    assert len(small) == 30 and len(val) == 10 and val.about.endswith("10 of 600 val (subset)")
    image = Image.open(test.items[3])  # the test view by hand: short side 64, centre 56 x 56
    w, h = image.size
    scaled = image.resize(
        (64, 64 * h // w) if w < h else (64 * w // h, 64), Image.Resampling.BICUBIC
    )
    left, top = round((scaled.size[0] - 56) / 2), round((scaled.size[1] - 56) / 2)
    want = np.asarray(scaled.crop((left, top, left + 56, top + 56)))
    assert np.array_equal(test[3][0].permute(1, 2, 0), want)


def test_augmentation_depends_on_seed_and_index_alone(birds, monkeypatch):
    train, _ = load("cub", birds, img_size=56)
    order = [5, 3, 8, 1, 0, 2]

    def crops(workers, seed, order=order):
        state = torch.get_rng_state()
        batches = train.epoch(torch.tensor(order), 4, workers, seed)
        images, labels = map(torch.cat, zip(*batches, strict=True))
        assert torch.equal(state, torch.get_rng_state())
        assert labels.tolist() == [i % 5 for i in order]
        return images

    first = crops(0, "0 0")
    monkeypatch.setattr(image_sets, "_cores", lambda: 2)
    monkeypatch.setattr(image_sets, "FEW", 0)  # with worker processes however few the images
    assert torch.equal(first, crops(2, "0 0"))
    assert torch.equal(first.flip(0), crops(0, "0 0", order[::-1]))
    assert not any(torch.equal(a, b) for a, b in zip(first, crops(0, "0 1"), strict=True))
    plain = torch.stack([train[i][0] for i in order])
    assert not any(torch.equal(a, b) for a, b in zip(first, plain, strict=True))


def test_random_crops_have_the_published_areas_and_flip_half_of_the_time():
    ramp = np.zeros((1, 200, 200, 3), np.uint8)
    ramp[0, :, :, 0] = np.arange(200)[None]  # brightness grows to the right, green downwards
    ramp[0, :, :, 1] = np.arange(200)[:, None]
    images = data.Images(ramp, [0], 175, augment="crop")  # of a short side of 200
    views = []
    for seed in range(400):
        [(view, _)] = images.epoch(torch.tensor([0]), 1, 0, str(seed))
        views.append(view[:, :2, ::3, ::3])
    views = torch.cat(views).float()
    red, green = views[:, 0].mean(1), views[:, 1].mean(2)  # (400, 59) over columns, over rows
    flipped = red[:, 0] > red[:, -1]
    assert 0.4 < flipped.float().mean() < 0.6
    wide, high = (red[:, -1] - red[:, 0]).abs() / 198, (green[:, -1] - green[:, 0]).abs() / 198
    area = wide * high
    assert 0.06 < area.min() < 0.15 and area.max() > 0.85 and 0.45 < area.mean() < 0.62
    assert 0.7 < (wide / high).min() and (wide / high).max() < 1.45


def test_fgvc_is_held_in_memory_at_the_test_size(birds, capsys, monkeypatch):
    train, _ = load("cub", birds, img_size=56)
    streamed = torch.cat([x for x, _ in train.batches(8, 0)])
    fingerprint, digest = train.fingerprint(), train.digest()
    need = 0
    for path in train.items:
        need += np.asarray(short_side(Image.open(path), 64)).size
    assert not train.hold(limit=need - 1) and "read from the files" in capsys.readouterr().out
    assert train.hold(workers=2, limit=need)
    assert f"40 images at 64 pixels take {need / 2**30:.2f} GiB" in capsys.readouterr().out
    assert sum(item.size for item in train.items) == need
    for i in (0, 7, 39):
        want = np.asarray(short_side(Image.open(train.files[i]), 64))
        assert np.array_equal(train.items[i], want)
    assert torch.equal(torch.cat([x for x, _ in train.batches(8, 0)]), streamed)
    assert (train.fingerprint(), train.digest()) == (fingerprint, digest)
    order = torch.arange(40)
    other = load("cub", birds, img_size=56)[0]
    for held, read in zip(train.epoch(order, 8, 0), other.epoch(order, 8, 0), strict=True):
        assert torch.equal(held[0], read[0]) and torch.equal(held[1], read[1])
    seen = decodings(monkeypatch)
    again, _ = load("cub", birds, img_size=56)
    again.prepare("cpu", workers=0)
    assert not seen
    assert all(np.array_equal(a, b) for a, b in zip(again.items, train.items, strict=True))


def short_side(image, side):
    w, h = image.size
    return image.resize(
        (side, side * h // w) if w < h else (side * w // h, side), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize(
    ("part", "listing", "message"),
    [
        ("val", "{", "val.json is no list like"),
        ("val", "[1]", "val.json is no list like"),
        ("val", "{}", "val.json is no list like"),
        ("test", '{"000.bird/test0.jpg": "one"}', "test.json is no list like"),
        (
            "test",
            '{"../../../x.jpg": 1}',
            "test.json: ../../../x.jpg leads out of the task's folder",
        ),
        ("test", '{"000.bird/gone.jpg": 1}', "gone.jpg does not exist"),
        (
            "test",
            json.dumps({f"{i}.jpg": i for i in range(300)}),
            "the lists have 300 classes, cub has 200",
        ),
        ("test", None, "test.json is no list like"),
    ],
)
def test_damaged_fgvc_lists(birds, part, listing, message):
    file = birds / f"fgvc/CUB_200_2011/{part}.json"
    file.write_text(listing) if listing is not None else file.unlink()
    with pytest.raises(DataError, match=re.escape(message)):
        load("cub", birds)


def test_fgvc_sets_that_are_not_there(birds):
    with pytest.raises(
        DataError, match=r"nabirds: no folder .*fgvc/nabirds: put the images of NABirds into"
    ):
        load("nabirds", birds)
    with pytest.raises(
        DataError, match="oxford_flowers: .*; or put the images of Oxford Flowers 102 into"
    ):
        load("oxford_flowers", birds, download=False)
    with pytest.raises(DataError, match="oxford_flowers: no folder .*fgvc/oxford_flowers"):
        load("oxford_flowers", birds, source="prepared")


def test_fgvc_flowers_from_the_originals(tmp_path, monkeypatch):
    rng, parts = np.random.default_rng(0), {}
    for name, count in (("train", 1020), ("validation", 1020), ("test", 6149)):
        keys, labels = [f"{name}{i}.jpg" for i in range(count)], rng.integers(0, 102, count)
        parts[name] = splits.files(tmp_path, keys, labels)
    monkeypatch.setattr(data, "image_format", lambda path, where: "JPEG")
    monkeypatch.setattr(originals, "read", lambda name, root, split, download: parts[split])
    train, test = load("oxford_flowers", tmp_path)
    assert train.about == "originals, JPEG images, 2040 train / 6149 test" and train.official
    assert train.labels.tolist() == [*parts["train"].labels, *parts["validation"].labels]
    assert test.short == 256 and not list(tmp_path.glob("cache"))


def test_normalization_against_numpy(prepared):
    images = load("cifar", prepared, img_size=16)[0].tensors()[0][:4]
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    want = (images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    got = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")(images)
    np.testing.assert_allclose(got.numpy().transpose(0, 2, 3, 1), want, atol=1e-5)
    assert (
        data.normalizer(*data.NORMALIZE["none"], "cpu")(
            torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
        )
        .eq(1)
        .all()
    )


@pytest.mark.parametrize(
    ("listing", "edit", "message"),
    [
        (
            "test.txt",
            lambda x: [*x[:3], "images/test/000003.png 100", *x[4:]],
            "test.txt, line 4: label 100 is outside 0..99",
        ),
        (
            "test.txt",
            lambda x: ["images/test/000003.png -1", *x[1:]],
            "line 1: label -1 is outside",
        ),
        (
            "test.txt",
            lambda x: ["images/test/000003.png", *x[1:]],
            "line 1: expected '<image> <label>'",
        ),
        ("test.txt", lambda x: ["images/test/gone.png 3", *x[1:]], "gone.png does not exist"),
        (
            "test.txt",
            lambda x: ["../cifar/images/test/000003.png 3", *x[1:]],
            "leads out of the task's folder",
        ),
        ("test.txt", lambda x: ["/etc/hostname 3", *x[1:]], "leads out of the task's folder"),
        (
            "train800val200.txt",
            lambda x: x[:-1],
            "train800val200.txt has 999 images, VTAB-1k's cifar has 1000",
        ),
        ("test.txt", lambda x: [], "test.txt has 0 images, VTAB-1k's cifar has 10000"),
        ("test.txt", lambda x: ["a\0b.png 3", *x[1:]], "is not a readable image (ValueError)"),
        ("test.txt", lambda x: x * 501, "test.txt has 10020 images, VTAB-1k's cifar has 10000"),
    ],
)
def test_damaged_lists(prepared, tmp_path, listing, edit, message):
    with pytest.raises(DataError, match=re.escape(message)):
        load("cifar", edited(prepared, tmp_path, listing, edit))


def test_missing_folders_and_lists(prepared, tmp_path):
    with pytest.raises(
        DataError,
        match=r"dtd: .* there is no .*/dtd/dtd: get it by hand from https://.*Google Drive",
    ):
        load("dtd", prepared)
    with pytest.raises(DataError, match=r"dtd: no folder .*vtab-1k/dtd: unpack .*Google Drive"):
        load("dtd", prepared, source="prepared")
    with pytest.raises(DataError, match=r"sun397: no folder .*vtab-1k/sun397: unpack"):
        load("sun397", prepared)
    with pytest.raises(DataError, match="--source original: sun397 has a prepared folder only"):
        load("sun397", prepared, source="original")
    root = edited(prepared, tmp_path, "none", None)
    (root / "vtab-1k/cifar/val200.txt").unlink()
    with pytest.raises(DataError, match="no list .*val200.txt"):
        load("cifar", root, split="train")
    (root / "vtab-1k/cifar/val200.txt").write_bytes(b"\xff\xfe 3")
    with pytest.raises(DataError, match="no list .*val200.txt .*utf-8"):
        load("cifar", root, split="train")
    with pytest.raises(ValueError, match="split must not be 'test'"):
        load("cifar", root, split="test")


def test_unreadable_images_are_named(prepared, tmp_path, monkeypatch):
    folder = (
        edited(prepared, tmp_path, "test.txt", lambda x: ["bad.png 3", *x[1:]]) / "vtab-1k/cifar"
    )
    (folder / "bad.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"line 1: .*bad.png is not a readable image"):
        load("cifar", tmp_path)
    whole = (prepared / "vtab-1k/cifar/images/test/000000.png").read_bytes()
    (folder / "bad.png").write_bytes(whole[: len(whole) // 2])  # the header is whole
    _, test = load("cifar", tmp_path)
    for few in (image_sets.FEW, 0):  # in this process and in workers
        monkeypatch.setattr(image_sets, "FEW", few)
        with pytest.raises(
            DataError, match=r"^cannot read image \S*bad.png: [^\n]*; get the file "
        ):
            list(test.batches(8, 2))


def test_digits():
    train, test = load("digits", "nowhere", img_size=28)
    assert len(train) == 1000 and len(test) == 797
    assert len(set(train.labels.tolist())) == 10
    small, val = load("digits", "nowhere", split="train", img_size=28)
    assert len(small) == 800 and len(val) == 200
    assert torch.equal(train.tensors()[0], torch.cat([small.tensors()[0], val.tensors()[0]]))
    assert (
        train.official and train.about == "embedded UCI handwritten digits, 1000 train / 797 test"
    )


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    theirs = datasets.load_digits()
    train, test = load("digits", img_size=8)
    images = torch.cat([train.tensors()[0], test.tensors()[0]])[:, 0].numpy()
    labels = torch.cat([train.labels, test.labels]).tolist()
    ours = [
        (tuple(np.rint(x.ravel() / 255 * 16).astype(int)), y)
        for x, y in zip(images, labels, strict=True)
    ]
    want = [(tuple(x.astype(int)), int(y)) for x, y in zip(theirs.data, theirs.target, strict=True)]
    assert sorted(ours) == sorted(want)


def test_fashion_mnist_without_a_network(tmp_path):
    with pytest.raises(DataError, match="no .*FashionMNIST/raw/train.*: get it by hand from https"):
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
