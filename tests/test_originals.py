"""The readers of the originals, on their own files made small, and the download."""

import gzip
import hashlib
import io
import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

import data
import splits
import tasks
from splits import CUTS, Cut, DataError, Missing, Slice

# fmt: off
EUROSAT = {"AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
           "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000}
CALTECH = {
    "BACKGROUND_Google": 467, "Faces": 435, "Faces_easy": 435, "Leopards": 200, "Motorbikes": 798, "accordion": 55,
    "airplanes": 800, "anchor": 42, "ant": 42, "barrel": 47, "bass": 54, "beaver": 46, "binocular": 33, "bonsai": 128,
    "brain": 98, "brontosaurus": 43, "buddha": 85, "butterfly": 91, "camera": 50, "cannon": 43, "car_side": 123,
    "ceiling_fan": 47, "cellphone": 59, "chair": 62, "chandelier": 107, "cougar_body": 47, "cougar_face": 69,
    "crab": 73, "crayfish": 70, "crocodile": 50, "crocodile_head": 51, "cup": 57, "dalmatian": 67, "dollar_bill": 52,
    "dolphin": 65, "dragonfly": 68, "electric_guitar": 75, "elephant": 64, "emu": 53, "euphonium": 64, "ewer": 85,
    "ferry": 67, "flamingo": 67, "flamingo_head": 45, "garfield": 34, "gerenuk": 34, "gramophone": 51,
    "grand_piano": 99, "hawksbill": 100, "headphone": 42, "hedgehog": 54, "helicopter": 88, "ibis": 80,
    "inline_skate": 31, "joshua_tree": 64, "kangaroo": 86, "ketch": 114, "lamp": 61, "laptop": 81, "llama": 78,
    "lobster": 41, "lotus": 66, "mandolin": 43, "mayfly": 40, "menorah": 87, "metronome": 32, "minaret": 76,
    "nautilus": 55, "octopus": 35, "okapi": 39, "pagoda": 47, "panda": 38, "pigeon": 45, "pizza": 53, "platypus": 34,
    "pyramid": 57, "revolver": 82, "rhino": 59, "rooster": 49, "saxophone": 40, "schooner": 63, "scissors": 39,
    "scorpion": 84, "sea_horse": 57, "snoopy": 35, "soccer_ball": 64, "stapler": 45, "starfish": 86,
    "stegosaurus": 59, "stop_sign": 64, "strawberry": 35, "sunflower": 85, "tick": 49, "trilobite": 86,
    "umbrella": 75, "watch": 239, "water_lilly": 37, "wheelchair": 59, "wild_cat": 34, "windsor_chair": 56,
    "wrench": 39, "yin_yang": 60}
# fmt: on
ROLES = ("train", "val", "test")


def sha256(words):
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


@pytest.fixture(autouse=True)
def _formats(monkeypatch):
    """Files may be empty here."""
    monkeypatch.setattr(tasks, "image_format", lambda item, where: "JPEG")


@pytest.fixture
def made_up(monkeypatch):
    """Let originals have other keys and labels than the official ones."""
    monkeypatch.setattr(splits, "prove_keys", lambda name, role, keys: splits.sha256(keys))
    monkeypatch.setattr(splits, "prove_labels", lambda *arguments: splits.Proof(None))
    monkeypatch.setattr(splits, "prove_histogram", lambda *arguments: True)


def cut(name, root, roles=ROLES):
    """(images, labels) of the task's slices."""
    found = tasks.read_originals(data.TASKS[name], root, roles, "original", True)
    return [(found.images[role], found.labels[role]) for role in roles]


class Listed:
    """A folder of which there are only the names, {folder: files}: to make files takes long."""

    def __init__(self, path, names):
        self.path, self.name, self.names = path, path.name, names

    def iterdir(self):
        files = self.names if isinstance(self.names, dict) else dict.fromkeys(self.names)
        return [Listed(self.path / name, inside) for name, inside in files.items()]

    def is_dir(self):
        return self.names is not None

    def __truediv__(self, name):
        return self.path / name


def listed(monkeypatch, root, place, names):
    """Let the originals in <root>/<place> have these names."""
    (root / place).mkdir(parents=True)
    monkeypatch.setattr(tasks, "find", lambda *arguments: Listed(root / place, names))


def small(monkeypatch, name, counts, *slices):
    """Let a task's originals be few, cut into these slices (split, start, count)."""
    few = [Slice(split, start, start + count) for split, start, count in slices]
    monkeypatch.setitem(CUTS, name, Cut(counts, *few, ordered=True))


def by_hand(keys, split):
    """The rule in other words: the hex digest read as a number."""
    return sorted(
        keys, key=lambda key: int(hashlib.md5(split.encode() + str(key).encode()).hexdigest(), 16)
    )


@pytest.fixture(scope="module")
def caltech(tmp_path_factory):
    root = tmp_path_factory.mktemp("caltech")
    for name, count in CALTECH.items():
        folder = root / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for i in range(1, count + 1):
            (folder / f"image_{i:04}.jpg").touch()
    return root


def test_caltech101_slices_are_the_official_ones(caltech):
    """By the counts of TFDS's metadata, the digests of the facts, and a prepared copy's labels."""
    assert sum(CALTECH.values()) == 9144
    task = data.TASKS["caltech101"]
    found = tasks.read_originals(task, caltech, ROLES, "original", True)
    assert CUTS["caltech101"].counts == {"train": 3060, "test": 6084}
    assert found.digests == {
        "train800": "b508d3bc3b228f01e14401b4ba49bcb5a14b69174d292aada61e848f54fc84fd",
        "val200": "7d66c33f70fd64bea28af098874cf80ba2bbea52b9d3385f24328dd90f2e39c3",
        "test": "e5f1185162dc93b9730e517a94b48dc25db6f627104ef0168aea542d5007876a",
    }
    training = found.images["train"] + found.images["val"]
    assert len(set(training)) == 1000 and len(set(found.images["test"])) == 6084
    assert not set(training) & set(found.images["test"])
    keys = [f"{path.parent.name}/{path.name}" for path in found.images["train"]]
    assert splits.sha256(keys) == found.digests["train800"]
    sha = [splits.sha256(found.labels[role]) for role in ROLES]
    assert sha[0] == "2fc0f0b1cf916aafe07a8252f7b86730531bd51ccd1d95727583e9ae3376e66b"
    assert sha[1] == "dbb8738ac957ae9a6eefc5d917c12ec974d132afd10899cb575ce3ab6c7665cb"
    first = splits.sha256(found.labels["test"][:500])  # as many as the prepared copy has
    assert first == "fc8e3c5691a621810ec79769fefc14c7712099a63fe7b699ffad002571160f85"


def test_caltech101_as_a_run_loads_it(caltech):
    train, test = data.load("caltech101", caltech, source="original", img_size=8)
    assert (len(train), len(test)) == (1000, 6084) and train.official and test.official
    assert test.digests == splits.CONSTANTS["keys"]["caltech101"]
    assert test.description == "originals, JPEG images, 1000 train / 6084 test"


def test_caltech101_whether_or_not_the_stray_file_is_there(caltech):
    stray = caltech / "caltech101/101_ObjectCategories/BACKGROUND_Google/tmp"
    without = cut("caltech101", caltech)
    stray.touch()
    with_it = cut("caltech101", caltech)
    stray.unlink()
    assert all(a[0] == b[0] for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize("change", ["renamed", "missing", "added", "moved"])
def test_a_changed_file_of_caltech101_is_named(caltech, change):
    folder = caltech / "caltech101/101_ObjectCategories"
    file, other = folder / "wrench/image_0007.jpg", folder / "wrench/image_7.jpg"
    if change == "moved":
        other = folder / "yin_yang/image_0061.jpg"
    names = {"missing": file, "added": other}
    if change == "added":
        other.touch()
    else:
        file.rename(other)
        if change == "missing":
            other.unlink()
        else:
            names = {"missing": file, "added": other}
    missing = change != "added"
    added = change != "missing"
    want = "1 (wrench/image_0007.jpg) missing" if missing else "none missing"
    with pytest.raises(DataError) as raised:
        cut("caltech101", caltech)
    other.unlink(missing_ok=True)
    file.touch()
    message = str(raised.value)
    assert message.startswith(f"caltech101: {want}") and "\n" not in message
    assert (str(names["missing"].relative_to(folder)) in message) == missing
    assert (str(names["added"].relative_to(folder)) in message) == added
    assert re.search(r"which changes \d+ of train800, \d+ of val200, [1-9]\d* of test", message)


def test_eurosat_slices(tmp_path, monkeypatch):
    names = {n: [f"{n}_{i}.jpg" for i in range(1, count + 1)] for n, count in EUROSAT.items()}
    listed(monkeypatch, tmp_path, "eurosat/2750", {**names, "readme.txt": None})
    (train, labels), (val, _), (test, test_labels) = cut("eurosat", tmp_path)
    order = by_hand(
        [f"{n}_{n}_{i}.jpg" for n, count in EUROSAT.items() for i in range(1, count + 1)], "train"
    )
    for found, want in ((train, order[:800]), (val, order[16200:16400]), (test, order[21600:])):
        assert [f"{path.parent.name}_{path.name}" for path in found] == want
    assert all(
        list(EUROSAT)[label] == path.parent.name for label, path in zip(labels, train, strict=True)
    )
    assert len(test_labels) == 5400


def test_flowers_from_setid(tmp_path, made_up):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    rng = np.random.default_rng(0)
    labels, ids = rng.integers(1, 103, 8189), rng.permutation(np.arange(1, 8190))
    parts = {"trnid": ids[:1020], "valid": ids[1020:2040], "tstid": ids[2040:]}
    (tmp_path / "flowers-102/jpg").mkdir(parents=True)
    savemat(tmp_path / "flowers-102/setid.mat", {name: part[None] for name, part in parts.items()})
    savemat(tmp_path / "flowers-102/imagelabels.mat", {"labels": labels[None]})
    found = cut("oxford_flowers102", tmp_path)
    cuts = [("trnid", "train", 800), ("valid", "validation", 200), ("tstid", "test", 6149)]
    for (paths, got), (name, split, count) in zip(found, cuts, strict=True):
        want = by_hand([f"image_{i:05}.jpg" for i in parts[name]], split)[:count]
        assert [path.name for path in paths] == want
        assert got.tolist() == [labels[int(name[6:11]) - 1] - 1 for name in want]
    savemat(tmp_path / "flowers-102/setid.mat", {**parts, "tstid": np.array([[9000]])})
    with pytest.raises(DataError, match=r"setid.mat: tstid names images outside 1..8189"):
        cut("oxford_flowers102", tmp_path)
    (tmp_path / "flowers-102/setid.mat").write_bytes(b"")
    with pytest.raises(DataError, match="oxford_flowers102: the originals at .* are damaged"):
        cut("oxford_flowers102", tmp_path)


def test_dtd_and_pets_lists(tmp_path, made_up):
    classes = [f"class{i:02}" for i in range(47)]
    for name in classes:
        (tmp_path / "dtd/dtd/images" / name).mkdir(parents=True)
    (tmp_path / "dtd/dtd/labels").mkdir()
    for part in ("train", "val", "test"):
        keys = [f"{name}/{name}_{part}{i:02}.jpg" for name in classes for i in range(40)]
        (tmp_path / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(keys) + "\n")
    (train, labels), (val, _), (test, _) = cut("dtd", tmp_path)
    keys = [f"{name}/{name}_val{i:02}.jpg" for name in classes for i in range(40)]
    assert [f"{path.parent.name}/{path.name}" for path in val] == by_hand(keys, "validation")[:200]
    assert [classes[label] for label in labels] == [path.parent.name for path in train] and len(
        set(test)
    ) == 1880
    listing = tmp_path / "dtd/dtd/labels/test1.txt"
    for line, message in (
        ("../class01/x.jpg", "test1.txt, line 2: ../class01/x.jpg leads out"),
        ("no/x.jpg", "there is no class no"),
    ):
        listing.write_text("class01/a.jpg\n" + line)
        with pytest.raises(DataError, match=message):
            cut("dtd", tmp_path)
    listing.write_text("class01/a.jpg\n")
    with pytest.raises(DataError, match="have 1 test images and 1 labels, not 1880"):
        cut("dtd", tmp_path)

    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for part, count in (("trainval", 3680), ("test", 3669)):
        lines = [f"Pet_{part}_{i} {i % 37 + 1} 1 2" for i in range(count)]
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    (train, labels), (val, _), (test, _) = cut("oxford_iiit_pet", tmp_path)
    order = by_hand([f"Pet_trainval_{i}.jpg" for i in range(3680)], "train")
    assert [path.name for path in train + val] == order[:800] + order[2944:3144]
    assert labels.tolist() == [int(name[13:-4]) % 37 for name in order[:800]] and len(test) == 3669
    (folder / "annotations/test.txt").write_text("Pet_1 x 1 2")
    with pytest.raises(
        DataError, match="test.txt, line 1: expected '<name> <class> <species> <breed>'"
    ):
        cut("oxford_iiit_pet", tmp_path)


def test_cifar_rows(tmp_path, monkeypatch, made_up):
    rng = np.random.default_rng(0)
    (tmp_path / "cifar-100-python").mkdir()
    pixels = {}
    for part, count in (("train", 120), ("test", 30)):
        pixels[part] = rng.integers(0, 256, (count, 3072), np.uint8)
        labels = rng.integers(0, 100, count).tolist()
        with open(tmp_path / "cifar-100-python" / part, "wb") as file:
            pickle.dump({"data": pixels[part], "fine_labels": labels}, file)
        pixels[part + " labels"] = labels
        md5 = hashlib.md5((tmp_path / "cifar-100-python" / part).read_bytes()).hexdigest()
        monkeypatch.setattr(tasks.datasets.CIFAR100, f"{part}_list", [[part, md5]])
    slices = ("train", 0, 80), ("train", 90, 20), ("test", 0, 30)
    small(monkeypatch, "cifar", {"train": 120, "test": 30}, *slices)
    (train, labels), (val, _), (test, _) = cut("cifar", tmp_path)
    order = by_hand(range(120), "train")
    want = pixels["train"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(train, want[order[:80]]) and np.array_equal(val, want[order[90:110]])
    assert labels.tolist() == [pixels["train labels"][i] for i in order[:80]] and len(test) == 30
    (tmp_path / "cifar-100-python/test").unlink()
    (tmp_path / "cifar-100-python/test").mkdir()  # whoever opens it fails
    assert np.array_equal(cut("cifar", tmp_path, ["train", "val"])[1][0], val)
    with pytest.raises(DataError, match="cifar: the originals at .* are damaged"):
        cut("cifar", tmp_path, ["test"])


def test_damaged_cifar_is_an_error_not_a_reason_to_read_something_else(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python/train").write_bytes(b"damaged")
    with pytest.raises(
        DataError, match=r"cifar: the originals at .*cifar-100-python are damaged"
    ) as raised:
        data.load("cifar", tmp_path)
    assert not isinstance(raised.value, Missing)


def test_svhn_digit_zero_is_class_zero(tmp_path, monkeypatch, made_up):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    rng = np.random.default_rng(0)
    images = {
        part: rng.integers(0, 256, (32, 32, 3, count), np.uint8)
        for part, count in (("train", 60), ("test", 9))
    }
    labels = {part: rng.integers(1, 11, value.shape[-1]) for part, value in images.items()}
    for part in images:
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images[part], "y": labels[part][:, None]})
    monkeypatch.setattr(tasks.datasets.SVHN, "_check_integrity", lambda self: True)
    slices = ("train", 0, 40), ("train", 50, 10), ("test", 0, 9)
    small(monkeypatch, "svhn", {"train": 60, "test": 9}, *slices)
    (train, got), _, (test, _) = cut("svhn", tmp_path)
    order = by_hand(range(60), "train")[:40]
    assert np.array_equal(train, images["train"].transpose(3, 0, 1, 2)[order])
    assert got.tolist() == (labels["train"][order] % 10).tolist() and len(test) == 9


def test_patch_camelyon_rows(tmp_path, monkeypatch, made_up):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    rng = np.random.default_rng(0)
    (tmp_path / "pcam").mkdir()
    pixels = {}
    for part, count in (("train", 50), ("valid", 20), ("test", 7)):
        pixels[part] = (
            rng.integers(0, 256, (count, 96, 96, 3), np.uint8),
            rng.integers(0, 2, (count, 1, 1, 1)),
        )
        for kind, array in zip("xy", pixels[part], strict=True):
            with h5py.File(
                tmp_path / f"pcam/camelyonpatch_level_2_split_{part}_{kind}.h5", "w"
            ) as file:
                file[kind] = array
    counts = {"train": 50, "validation": 20, "test": 7}
    slices = ("train", 0, 30), ("validation", 0, 10), ("test", 0, 7)
    small(monkeypatch, "patch_camelyon", counts, *slices)
    (train, labels), (val, _), (test, _) = cut("patch_camelyon", tmp_path)
    order = [int(key[6:]) for key in by_hand([f"train_{i}" for i in range(50)], "train")[:30]]
    assert (
        np.array_equal(train, pixels["train"][0][order])
        and labels.tolist() == pixels["train"][1].ravel()[order].tolist()
    )
    order = [int(key[6:]) for key in by_hand([f"valid_{i}" for i in range(20)], "validation")[:10]]
    assert np.array_equal(val, pixels["valid"][0][order]) and len(test) == 7


def test_dsprites_labels_and_brightness(tmp_path, monkeypatch, made_up):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (100, 64, 64), np.uint8)
    latents = np.stack([rng.integers(0, n, 100) for n in (1, 3, 6, 40, 32, 32)], 1)
    (tmp_path / "dsprites").mkdir()
    np.savez(
        tmp_path / "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        imgs=images,
        latents_classes=latents,
    )
    order = by_hand(range(100), "train")
    for name, want in (("loc", latents[:, 4] // 2), ("ori", np.floor(latents[:, 3] / 2.5))):
        slices = ("train", 0, 70), ("train", 80, 10), ("train", 90, 10)
        small(monkeypatch, f"dsprites_{name}", {"train": 100}, *slices)
        (train, labels), _, (test, _) = cut(f"dsprites_{name}", tmp_path)
        assert (
            np.array_equal(train, images[order[:70]] * 255)
            and labels.tolist() == want[order[:70]].tolist()
        )
        assert np.array_equal(test, images[order[90:]] * 255)


def test_smallnorb_matrices(tmp_path, monkeypatch, made_up):
    rng = np.random.default_rng(0)
    images = {
        part: rng.integers(0, 256, (40, 2, 96, 96), np.uint8) for part in ("training", "testing")
    }
    info = np.stack(
        [rng.integers(0, 10, 40), rng.integers(0, 9, 40), 2 * rng.integers(0, 18, 40)], 1
    ).astype("<i4")
    for part, letters in (("training", "46789"), ("testing", "01235")):
        stem = tmp_path / f"smallnorb-5x{letters}x9x18x6x2x96x96-{part}"
        raw = (
            b"\x55\x4c\x3d\x1e"
            + np.array([4, *images[part].shape], "<i4").tobytes()
            + images[part].tobytes()
        )
        stem.with_name(f"{stem.name}-dat.mat").write_bytes(raw)
        raw = b"\x54\x4c\x3d\x1e" + np.array([2, 40, 3, 1], "<i4").tobytes() + info.tobytes()
        stem.with_name(f"{stem.name}-info.mat.gz").write_bytes(gzip.compress(raw))
    for name, want in (("azi", info[:, 2] // 2), ("ele", info[:, 1])):
        slices = ("train", 0, 30), ("test", 0, 10), ("test", 20, 20)
        small(monkeypatch, f"smallnorb_{name}", {"train": 40, "test": 40}, *slices)
        (train, labels), (val, _), (test, _) = cut(f"smallnorb_{name}", tmp_path)
        order = by_hand(range(40), "train")[:30]
        assert (
            np.array_equal(train, images["training"][order, 0])
            and labels.tolist() == want[order].tolist()
        )
        order = by_hand(range(40), "test")
        assert np.array_equal(val, images["testing"][order[:10], 0])
        assert np.array_equal(test, images["testing"][order[20:], 0])
    (tmp_path / "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat").write_bytes(
        b"MATLAB 5.0 MAT-file" * 9
    )
    with pytest.raises(DataError, match="is not a matrix file of small NORB"):
        cut("smallnorb_ele", tmp_path)


def test_clevr_counts_and_distances(tmp_path, monkeypatch, made_up):
    distances = [7.9, 8.0, 8.001, 8.5, 8.6, 9.0, 9.5, 9.51, 10.0, 12.0]
    for name in ("train", "val"):
        scenes = [
            {
                "image_filename": f"CLEVR_{name}_{i:06}.png",
                "objects": [{"pixel_coords": [0, 0, distance + k]} for k in range(3 + i % 8)],
            }
            for i, distance in enumerate(distances)
        ]
        (tmp_path / "CLEVR_v1.0/scenes").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"CLEVR_v1.0/scenes/CLEVR_{name}_scenes.json").write_text(
            json.dumps({"scenes": scenes[::-1]})
        )
    want = {"count": [i % 8 for i in range(10)], "dist": [0, 0, 1, 1, 2, 2, 3, 4, 4, 5]}
    for name, labels in want.items():
        slices = ("train", 0, 5), ("train", 6, 3), ("validation", 0, 10)
        small(monkeypatch, f"clevr_{name}", {"train": 10, "validation": 10}, *slices)
        found = cut(f"clevr_{name}", tmp_path)
        for (paths, got), part in zip(found, ("train", "train", "val"), strict=True):
            assert [labels[int(path.stem[-6:])] for path in paths] == got.tolist()
            assert all(path.parent == tmp_path / "CLEVR_v1.0/images" / part for path in paths)
        order = by_hand([f"CLEVR_train_{i:06}.png" for i in range(10)], "train")
        assert [path.name for path in found[1][0]] == order[6:9]
    (tmp_path / "CLEVR_v1.0/scenes/CLEVR_val_scenes.json").write_text("damaged")
    assert len(cut("clevr_count", tmp_path, ["train", "val"])) == 2  # does not open it
    with pytest.raises(DataError, match="clevr_count: the originals at .* are damaged"):
        cut("clevr_count", tmp_path, ["test"])


def test_kitti_videos_and_distances(tmp_path, monkeypatch, made_up):
    rng = np.random.default_rng(0)
    place = rng.permutation(60)  # image -> line of the mapping; six images a video
    (tmp_path / "devkit/mapping").mkdir(parents=True)
    (tmp_path / "devkit/mapping/train_rand.txt").write_text(",".join(str(i + 1) for i in place))
    videos = [f"2011_09_26_drive_{i // 3:04}_sync" for i in range(60)]
    mapping = [f"2011_09_26 {video} {i:010}" for i, video in enumerate(videos)]
    (tmp_path / "devkit/mapping/train_mapping.txt").write_text("\n".join(mapping) + "\n")
    (tmp_path / "kitti/training/label_2").mkdir(parents=True)
    (tmp_path / "kitti/training/image_2").mkdir()
    near = [8.0, 8.1, 20.0, 20.5]
    for i in range(60):
        line = f"{{}} 0 0 0 0 0 0 0 0 0 0 0 0 {near[i % 4] if i % 5 else 1e9} 0\n"
        kinds = ("Car", "Van", "Truck")[i % 3], "Pedestrian"
        text = (
            line.format(kinds[0]) + "Pedestrian 0 0 0 0 0 0 0 0 0 0 0 0 1.0 0\n"
            if i % 5
            else "DontCare -1 -1\n"
        )
        (tmp_path / f"kitti/training/label_2/{i:06}.txt").write_text(text)
    np.random.seed(123)  # TFDS's own calls
    test = np.random.choice(sorted(set(videos)), 2, replace=False)
    val = np.random.choice(sorted(set(videos) - set(test)), 2, replace=False)
    of = {
        i: "test" if videos[k] in test else "val" if videos[k] in val else "train"
        for i, k in enumerate(place)
    }
    counts = {"train": 48, "validation": 6, "test": 6}
    slices = ("train", 0, 48), ("validation", 0, 6), ("test", 0, 6)
    small(monkeypatch, "kitti", counts, *slices)
    (train, labels), (val, _), (test, _) = cut("kitti", tmp_path)
    for paths, part in ((train, "train"), (val, "val"), (test, "test")):
        assert {int(path.stem) for path in paths} == {i for i in of if of[i] == part}
    want = [([0, 1, 1, 2][int(p.stem) % 4] if int(p.stem) % 5 else 3) for p in train]
    assert labels.tolist() == want
    assert [path.name for path in train] == by_hand([path.name for path in train], "train")


def test_packages_that_reading_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="svhn: reading the originals needs scipy: pip install scipy"):
        cut("svhn", tmp_path)


def test_resisc45_slices(tmp_path, monkeypatch):
    names = {}
    for name, count in splits.CONSTANTS["classes"]["resisc45"].items():
        names[name] = [f"{name}_{i:03}.jpg" for i in range(1, count + 1)]
    listed(monkeypatch, tmp_path, "NWPU-RESISC45", names)
    found = tasks.read_originals(data.TASKS["resisc45"], tmp_path, ROLES, "original", True)
    assert found.digests["train800"].startswith("7c42d524") and len(found.images["test"]) == 6300
    assert found.digests["val200"].startswith("2a2bb0da")
    classes = sorted(names)
    for role in ROLES:
        for path, label in zip(found.images[role], found.labels[role], strict=True):
            assert path.parent.name == classes[label]
    names["airport"][3] = "airport_4.jpg"
    changes = r"1 \(airport/airport_004.jpg\) missing, 1 \(airport/airport_4.jpg\) too many"
    with pytest.raises(DataError, match=f"resisc45: {changes}, which changes"):
        cut("resisc45", tmp_path)


def test_sun397_folder(tmp_path, monkeypatch, made_up):
    names = ["/a/abbey/sun_x.jpg", "/c/church/outdoor/sun_y.jpg", "/c/church/outdoor/sun_z.jpg"]
    for name in (*names, splits.SUN397_UNUSED):
        path = tmp_path / "SUN397" / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    asked = []

    def split(keys, name):
        asked.append(sorted(keys))
        return {"train": ([names[2], names[0]], [1, 0])}.get(name, ([names[1]], [1]))

    monkeypatch.setattr(tasks, "sun397_split", split)
    counts = {"train": 2, "validation": 1, "test": 1}
    small(monkeypatch, "sun397", counts, ("train", 0, 2), ("validation", 0, 1), ("test", 0, 1))
    (train, labels), (val, _), _ = cut("sun397", tmp_path)
    assert asked[0] == sorted([*names, splits.SUN397_UNUSED])
    order = by_hand(names[::2], "train")
    assert train == [tmp_path / "SUN397" / name[1:] for name in order]
    assert labels.tolist() == [names[::2].index(name) for name in order]
    assert val == [tmp_path / "SUN397" / names[1][1:]]


def crc32c_by_hand(message):
    """Bit by bit."""
    crc = 0xFFFFFFFF
    for byte in message:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked_crc(message):
    crc = crc32c_by_hand(message)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def test_crc32c_is_the_standards():
    assert crc32c_by_hand(b"123456789") == 0xE3069283  # RFC 3720's polynomial, its check value
    blocks = [b"123456789", bytes(32), bytes(range(256)) * 3, b"1234"]
    got = tasks.crc32c([memoryview(block) for block in blocks])
    assert got.tolist() == [crc32c_by_hand(block) for block in blocks]


def length_delimited(number, content):
    length = len(content)
    varint = b""
    while length > 127:
        varint += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content


def tf_record(image, filename, label, packed):
    """A serialised tf.train.Example, framed as in a TFRecord file."""
    integers = length_delimited(1, bytes([label])) if packed else bytes([1 << 3, label])
    features = {"image": (1, length_delimited(1, image)), "label": (3, integers)}
    features["filename"] = (1, length_delimited(1, filename.encode()))
    entries = b""
    for name, (kind, values) in features.items():
        feature = length_delimited(2, length_delimited(kind, values))
        entries += length_delimited(1, length_delimited(1, name.encode()) + feature)
    example = length_delimited(1, entries)
    length = len(example).to_bytes(8, "little")
    return length + masked_crc(length) + example + masked_crc(example)


@pytest.fixture
def dmlab(tmp_path, monkeypatch, made_up):
    rng = np.random.default_rng(0)
    images, labels = {}, {}
    for split, count in (("train", 12), ("validation", 5), ("test", 4)):
        for part in range(2):
            records = b""
            for i in range(part, count, 2):
                name = f"video_{split}_{i}.jpg"
                file = io.BytesIO()
                pixels = rng.integers(0, 256, (6 + i, 8, 3), np.uint8)
                Image.fromarray(pixels).save(file, "jpeg", quality=95)
                images[name], labels[name] = file.getvalue(), i % 6
                records += tf_record(file.getvalue(), name, i % 6, i % 2 == 0)
            (tmp_path / "dmlab").mkdir(exist_ok=True)
            (tmp_path / f"dmlab/dmlab-{split}.tfrecord-0000{part}-of-00002").write_bytes(records)
    counts = {"train": 12, "validation": 5, "test": 4}
    small(monkeypatch, "dmlab", counts, ("train", 0, 8), ("validation", 0, 3), ("test", 0, 4))
    return tmp_path, images, labels


def test_dmlab_records(dmlab):
    root, images, labels = dmlab
    (train, train_labels), (val, _), (test, _) = cut("dmlab", root)
    order = by_hand([name for name in images if "train" in name], "train")[:8]
    assert train == [images[name] for name in order] and len(val) == 3 and len(test) == 4
    assert train_labels.tolist() == [labels[name] for name in order]
    loaded, _ = data.load("dmlab", root, img_size=16)
    image = Image.open(io.BytesIO(train[0])).convert("RGB").resize((16, 16), Image.BICUBIC)
    assert np.array_equal(loaded[0][0].permute(1, 2, 0), np.asarray(image))
    assert len(loaded.digest()) == 64 and loaded.digest() != data.load("dmlab", root)[1].digest()
    assert (
        loaded.description
        == "originals, JPEG images, 11 of 1000 train (subset) / 4 of 22735 test (subset)"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:], "a wrong checksum: get it"),
        (lambda raw: bytes([raw[0] ^ 1]) + raw[1:], "dmlab: the originals at .* are damaged|again"),
        (lambda raw: raw[:-3], "ends within a record: get it again"),
    ],
)
def test_damaged_dmlab_records(dmlab, damage, message):
    root, _, _ = dmlab
    for path in root.glob("dmlab/dmlab-test*"):
        path.write_bytes(damage(path.read_bytes()))
    assert len(cut("dmlab", root, ["train", "val"])) == 2  # does not open the test set's files
    with pytest.raises(DataError, match=message):
        cut("dmlab", root)


def test_retinopathy_lists_and_preprocessing(tmp_path, monkeypatch, made_up):
    folder = tmp_path / "eyes"
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
    rows = {"Public": ["1_left", "1_right"], "Private": ["2_left", "2_right", "3_left"]}
    lines = []
    for usage, names in rows.items():
        lines += [f"{name},{i % 5},{usage}" for i, name in enumerate(names)]
    (folder / "retinopathy_solution.csv").write_text("\n".join(["image,level,Usage", *lines]))
    training = [f"{i}_{side}" for i in range(10, 15) for side in ("left", "right")]
    lines = [f"{name},{i % 5}" for i, name in enumerate(training)]
    (folder / "trainLabels.csv").write_text("\n".join(["image,level", *lines]))
    for name in training:
        Image.new("RGB", (540, 500)).save(folder / "train" / f"{name}.jpeg")
    for name in sum(rows.values(), []):
        Image.new("RGB", (540, 540)).save(folder / "test" / f"{name}.jpeg")
    counts = {"train": 10, "validation": 2, "test": 3}
    slices = ("train", 0, 6), ("validation", 0, 2), ("test", 0, 3)
    small(monkeypatch, "diabetic_retinopathy", counts, *slices)
    (train, labels), (val, _), (test, test_labels) = cut("diabetic_retinopathy", tmp_path)
    assert [path.stem for path in train] == by_hand(training, "train")[:6]
    assert labels.tolist() == [training.index(path.stem) % 5 for path in train]
    assert [path.stem for path in val] == by_hand(rows["Public"], "validation")
    assert test_labels.tolist() == [rows["Private"].index(path.stem) for path in test]
    Image.new("RGB", (4752, 3168)).save(test[1])  # as it comes from the competition
    assert len(cut("diabetic_retinopathy", tmp_path, ["train", "val"])) == 2
    message = r"left.jpeg|right.jpeg is 4752 x 3168, not preprocessed .* radius of 300"
    with pytest.raises(DataError, match=message):
        cut("diabetic_retinopathy", tmp_path)
