"""images.py: decoding, views, batches and the cache, against Pillow and NumPy alone."""

import shutil

import numpy as np
import pytest
import torch
from conftest import edited
from PIL import Image

import data
import images as image_sets
from data import load


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
    monkeypatch.setattr(image_sets, "cores", lambda: 2)
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
    monkeypatch.setattr(image_sets, "cores", lambda: 2)
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
