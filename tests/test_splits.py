"""The order of TFDS and the draws, against published lists and the rule in other words."""

import hashlib
import zlib
from functools import cache

import numpy as np
import pytest

import splits
from splits import CONSTANTS, CUTS, ROLES, DataError, Proof, tfds_order

# fmt: off
EUROSAT = {"AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
           "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000}
# fmt: on


def by_hand(keys, split):
    """The rule in other words: the hex digest read as a number."""
    return sorted(
        keys, key=lambda key: int(hashlib.md5(split.encode() + str(key).encode()).hexdigest(), 16)
    )


def test_order_is_eurosats_published_one():
    keys = [
        f"{name}_{name}_{i}.jpg" for name, count in EUROSAT.items() for i in range(1, count + 1)
    ]
    order = tfds_order(keys, "train")
    assert order[:2] == ["Forest_Forest_687.jpg", "Residential_Residential_188.jpg"]
    want = "d9a11f8c577477b9a1e5027b18ee0141a6c29f8343c3cfbbdf92362ab322ae65"
    assert hashlib.sha256("\n".join(order).encode()).hexdigest() == want


def test_order_of_integers_is_that_of_their_digits():
    assert tfds_order(range(100), "test") == by_hand(range(100), "test")
    assert tfds_order(range(100), "test") != tfds_order(range(100), "train")
    assert [str(key) for key in tfds_order(range(100), "test")] == tfds_order(
        map(str, range(100)), "test"
    )


def test_slices_lie_in_their_splits():
    for cut in CUTS.values():
        for role in ("train", "val", "test"):
            wanted = getattr(cut, role)
            assert 0 <= wanted.start < wanted.stop <= cut.counts[wanted.split]


def test_rows_of_a_slice():
    cut = CUTS["eurosat"]
    keys = [
        f"{name}_{name}_{i}.jpg" for name, count in EUROSAT.items() for i in range(1, count + 1)
    ]
    order = by_hand(keys, "train")
    assert [keys[row] for row in cut.rows("train", keys)] == order[:800]
    assert [keys[row] for row in cut.rows("val", keys)] == order[16200:16400]
    assert [keys[row] for row in cut.rows("test", keys)] == order[21600:]
    assert CUTS["digits"].rows("val", range(1797)) == list(range(800, 1000))


def numbered(pattern, count):
    return tuple(pattern.format(i) for i in range(count))


# keys that follow a rule, so that all slices can be cut without the originals
RULES = {
    "cifar": {"train": range(50_000), "test": range(10_000)},
    "svhn": {"train": range(73_257), "test": range(26_032)},
    "dsprites_loc": {"train": range(737_280)},
    "smallnorb_azi": {"train": range(24_300), "test": range(24_300)},
    "patch_camelyon": {
        "train": numbered("train_{}", 262_144),
        "validation": numbered("valid_{}", 32_768),
        "test": numbered("test_{}", 32_768),
    },
    "clevr_count": {
        "train": numbered("CLEVR_train_{:06}.png", 70_000),
        "validation": numbered("CLEVR_val_{:06}.png", 15_000),
    },
}
# train800, val200 and test as checked outside this repository; None: not given there
FACTS = {
    "cifar": ("5b25ee06", "93377e43", "aa6d3ee4"),
    "svhn": ("901fe4f6", "36ae944d", None),
    "dsprites_loc": ("54130b46", "86005e8c", "047f98bb"),
    "smallnorb_azi": ("438b845e", "d9fca0e8", "f5e0032c"),
    "patch_camelyon": ("c1122cb7", "b3998b44", "57bf9b06"),
    "clevr_count": ("5dc10331", "9a915022", "4952b4e5"),
    "eurosat": ("7dac90de", "5c9a3ab3", "244a530e"),
    "resisc45": ("7c42d524", "2a2bb0da", None),
    "caltech101": ("b508d3bc", "7d66c33f", None),
    "sun397": ("bbfe318c", "ed3f4079", None),
    "dtd": ("616c0cbf", "559c9d46", "f5a83f25"),
    "oxford_flowers102": ("a850e1e5", "d5b13b78", "3be8d436"),
    "oxford_iiit_pet": ("d25e5174", "2205e2e9", None),
    "kitti": ("672f709e", "ac416761", None),
    "diabetic_retinopathy": ("791f64de", None, None),
}
TWINS = {
    "dsprites_ori": "dsprites_loc",
    "smallnorb_ele": "smallnorb_azi",
    "clevr_dist": "clevr_count",
}


def test_digests_are_those_checked_outside():
    for name, facts in FACTS.items():
        for slice_name, fact in zip(ROLES.values(), facts, strict=True):
            if fact:
                assert CONSTANTS["keys"][name][slice_name].startswith(fact)
    for name, twin in TWINS.items():
        assert CONSTANTS["keys"][name] == CONSTANTS["keys"][twin] and CUTS[name] == CUTS[twin]
    missing = {(name, role) for name in splits.VTAB for role in ROLES.values()}
    for name, digests in CONSTANTS["keys"].items():
        missing -= {(name, role) for role in digests}
    # no list of these was at hand
    without = {"oxford_iiit_pet", "kitti", "diabetic_retinopathy", "dmlab"}
    assert missing == {(name, "test") for name in without}


@pytest.mark.parametrize("name", RULES)
def test_slices_of_keys_that_follow_a_rule(monkeypatch, name):
    monkeypatch.setattr(splits, "tfds_order", cache(tfds_order))  # several slices of one order
    cut = CUTS[name]
    for role, slice_name in ROLES.items():
        wanted = getattr(cut, role)
        keys = RULES[name][wanted.split]
        assert len(keys) == cut.counts[wanted.split]
        rows = cut.rows(role, keys)
        assert len(rows) == wanted.count()
        digest = splits.prove_keys(name, role, [keys[row] for row in rows])
        assert digest == CONSTANTS["keys"][name][slice_name]


@pytest.mark.parametrize("name", splits.FOLDERS)
def test_slices_of_files_that_follow_a_rule(name):
    files = splits._official_files(name)
    splits.check_files(name, files)
    for role, slice_name in ROLES.items():
        keys, labels = splits.from_folders(name, files, getattr(CUTS[name], role).split)
        keys = list(keys)
        rows = CUTS[name].rows(role, keys)
        digest = splits.prove_keys(name, role, [keys[row] for row in rows])
        assert digest == CONSTANTS["keys"][name][slice_name]
        assert splits.prove_labels(name, role, [labels[row] for row in rows]) == Proof(True)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda keys: [*keys[:99], "renamed", *keys[100:]], 1),
        (lambda keys: [*keys[:99], *keys[100:], "later"], 1),
        (lambda keys: ["first", *keys[:99], "second", *keys[100:]][: len(keys)], 2),
    ],
)
def test_keys_that_are_not_the_official_ones_are_counted_and_named(monkeypatch, change, count):
    """With 800 and 200 made-up keys as DTD's official ones."""
    train = tfds_order(numbered("a/{}.jpg", 1880), "train")[:800]
    val = tfds_order(numbered("b/{}.jpg", 1880), "validation")[:200]
    codes = np.array([zlib.crc32(key.encode()) & 255 for key in train + val], np.uint8)
    digests = {"train800": splits.sha256(train), "val200": splits.sha256(val)}
    monkeypatch.setitem(CONSTANTS["keys"], "dtd", digests)
    monkeypatch.setattr(splits, "_packed", {"dtd codes": codes}.get)
    assert splits.prove_keys("dtd", "train", train) == digests["train800"]
    for role, keys in (("train", train), ("val", val)):
        changed = change(keys)
        with pytest.raises(DataError) as raised:
            splits.prove_keys("dtd", role, changed)
        names = sorted(set(changed) - set(keys))
        message = str(raised.value)
        wrong = f"of {len(changed)} keys {count} ({', '.join(names)}) differ from TFDS's list: get"
        start = f"dtd: {ROLES[role]} is not the official one, {wrong}"
        assert message.startswith(start) and "\n" not in message
    with pytest.raises(DataError, match="dtd: val200 is not the official one"):
        splits.prove_keys("dtd", "val", val[::-1])


@pytest.mark.parametrize("name", ["clevr_count", "patch_camelyon"])
@pytest.mark.parametrize("role", ROLES)
def test_a_changed_key_of_a_numbered_task_is_named(name, role):
    wanted = getattr(CUTS[name], role)
    keys = list(RULES[name][wanted.split])
    rows = CUTS[name].rows(role, keys)
    keys = [keys[row] for row in rows]
    keys[7] = "renamed.png"
    message = rf"{name}: {ROLES[role]} is not the official one, of {len(keys)} keys 1 \(renamed.png"
    with pytest.raises(DataError, match=message):
        splits.prove_keys(name, role, keys)


@pytest.mark.parametrize("name", ["caltech101", "dtd", "oxford_iiit_pet", "eurosat", "sun397"])
def test_labels_are_compared_line_by_line(name):
    for role in ("train", "val"):
        labels = list(splits._official_labels(name, role))
        assert len(labels) == getattr(CUTS[name], role).count()
        assert splits.prove_labels(name, role, labels) == Proof(True)
        assert splits.prove_labels(name, role, labels[:70]) == Proof(True)
        i = next(i for i in range(50, 150) if labels[i] != labels[i + 1])
        labels[i], labels[i + 1] = labels[i + 1], labels[i]
        assert splits.prove_labels(name, role, labels) == Proof(False, i + 1)


def test_labels_that_nobody_knows_prove_nothing():
    assert splits.prove_labels("svhn", "train", [0] * 800) == Proof(None)
    assert splits.prove_labels("dtd", "test", [0] * 1880) == Proof(None)
    assert splits.prove_labels("sun397", "test", [0] * 100) == Proof(None)  # only a beginning
    assert splits.prove_labels("sun397", "test", [0] * 21750) == Proof(False)


def test_labels_of_cifar_by_their_counts():
    counts = CONSTANTS["histograms"]["cifar"]["val200"]
    labels = np.repeat(np.arange(100), counts)
    assert splits.prove_histogram("cifar", "val", labels)
    labels[0] += 1
    assert not splits.prove_histogram("cifar", "val", labels)
    assert splits.prove_histogram("svhn", "val", labels)  # not known


def test_sun397_by_a_packed_table_of_five_images(monkeypatch):
    keys = ["/a/abbey/sun_a.jpg", "/a/abbey/sun_b.jpg", "/b/bar/sun_a.jpg", "/b/bar/sun_c.jpg"]
    keys += ["/b/bar/sun_d.jpg"]
    codes = [zlib.crc32("\n".join(some).encode()) & 0xFFFF for some in (keys[:2], keys[2:])]
    packed = {
        "sun397 splits": np.array([0 | 1 << 2 | 2 << 4 | 0 << 6, 2], np.uint8),
        "sun397 counts": np.array([2, 3], np.uint16),
        "sun397 codes": np.array(codes, np.uint16),
    }
    monkeypatch.setattr(splits, "_packed", packed.get)
    found = [*keys[::-1], splits.SUN397_UNUSED]
    assert splits.sun397_split(found, "train") == ([keys[0], keys[3]], [0, 1])
    assert splits.sun397_split(found, "validation") == ([keys[1]], [0])
    assert splits.sun397_split(found, "test") == ([keys[2], keys[4]], [1, 1])
    for changed, message in (
        (keys[1:], "sun397: /a/abbey has 1 images, not 2: get"),
        ([*keys, "/b/bar/sun_e.jpg"], "sun397: /b/bar has 4 images, not 3: get"),
        ([*keys[:4], "/b/bar/sun_e.jpg"], "sun397: an image of /b/bar has another name: get"),
        (keys[2:], "sun397: 1 classes, not 2: get"),
    ):
        with pytest.raises(DataError, match=message):
            splits.sun397_split(changed, "train")


def test_the_packed_table_of_sun397_has_tfdss_counts():
    packed = splits._packed("sun397 splits")
    members = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).ravel()
    assert np.bincount(members[:108_753]).tolist() == [76_128, 10_875, 21_750]
    assert splits._packed("sun397 counts").sum() == 108_753
    sizes = [(splits.FOLDER / name).stat().st_size for name in ("splits.npz", "splits.json")]
    assert sizes[0] < 40_000 and sum(sizes) < 60_000
