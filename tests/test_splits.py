"""The order of TFDS, the slices and the draws, against digests that were checked outside."""

import numpy as np
import pytest

import splits
from splits import CONSTANTS, CUTS, ROLES, DataError, Proof, tfds_order

# how the digests of train800, val200 and test begin outside this repository; None: not given there
FACTS = {
    "cifar": ("5b25ee06", "93377e43", "aa6d3ee4"),
    "svhn": ("901fe4f6", "36ae944d", None),
    "dsprites_loc": ("54130b46", "86005e8c", "047f98bb"),
    "dsprites_ori": ("54130b46", "86005e8c", "047f98bb"),
    "smallnorb_azi": ("438b845e", "d9fca0e8", "f5e0032c"),
    "smallnorb_ele": ("438b845e", "d9fca0e8", "f5e0032c"),
    "patch_camelyon": ("c1122cb7", "b3998b44", "57bf9b06"),
    "clevr_count": ("5dc10331", "9a915022", "4952b4e5"),
    "clevr_dist": ("5dc10331", "9a915022", "4952b4e5"),
    "eurosat": ("7dac90de", "5c9a3ab3", "244a530e"),
    "resisc45": ("7c42d524", "2a2bb0da", None),
    "caltech101": ("b508d3bc", "7d66c33f", "e5f11851"),
    "sun397": ("bbfe318c", "ed3f4079", None),
    "dtd": ("616c0cbf", "559c9d46", "f5a83f25"),
    "oxford_flowers102": ("a850e1e5", "d5b13b78", "3be8d436"),
    "oxford_iiit_pet": ("d25e5174", "2205e2e9", None),
    "kitti": ("672f709e", "ac416761", None),
    "diabetic_retinopathy": ("791f64de", None, None),
}
CLASSES = CONSTANTS["classes"]
PACKED = dict(np.load(splits.FOLDER / "splits.npz"))


FILES = {
    "caltech101": "image_{i:04}.jpg",
    "eurosat": "{folder}_{i}.jpg",
    "resisc45": "{folder}_{i:03}.jpg",
}


def files_of(name):
    """The files of each class of an original that is one folder a class."""
    files = {}
    for folder, count in CLASSES[name].items():
        files[folder] = {FILES[name].format(folder=folder, i=i) for i in range(1, count + 1)}
    return files


def keys_of(name, split):
    """The keys of a whole split, where they follow a rule."""
    if name in CLASSES:
        return list(splits.from_folders(name, files_of(name), split)[0])
    numbers = range(CONSTANTS["counts"][name][split])
    rules = CONSTANTS["numbered"].get(name)
    return [rules[split].format(i) for i in numbers] if rules else numbers


def test_the_order_is_eurosats_published_one():
    order = tfds_order(keys_of("eurosat", "train"), "train")
    assert order[:2] == ["Forest_Forest_687.jpg", "Residential_Residential_188.jpg"]
    want = "d9a11f8c577477b9a1e5027b18ee0141a6c29f8343c3cfbbdf92362ab322ae65"
    assert splits.sha256(order) == want


def test_digests_are_those_checked_outside():
    for name, facts in FACTS.items():
        for slice_name, fact in zip(ROLES.values(), facts, strict=True):
            assert fact is None or CONSTANTS["keys"][name][slice_name].startswith(fact)
    no_list = ("oxford_iiit_pet", "kitti", "diabetic_retinopathy", "dmlab")  # of the test's names
    for name in [*FACTS, "dmlab"]:
        known = ["train800", "val200", "test"]
        assert list(CONSTANTS["keys"][name]) == (known[:2] if name in no_list else known)


RULED = ["cifar", "svhn", "dsprites_loc", "smallnorb_azi", "patch_camelyon", "clevr_count"]


@pytest.mark.parametrize("name", [*RULED, *CLASSES])
def test_slices_of_keys_that_follow_a_rule_and_their_labels(name):
    orders = {}
    for role, slice_name in ROLES.items():
        split, start, stop = getattr(CUTS[name], role)
        if split not in orders:
            orders[split] = tfds_order(keys_of(name, split), split)
        keys = orders[split][start:stop]
        assert splits.prove_keys(name, role, keys) == CONSTANTS["keys"][name][slice_name]
        if name in CLASSES:
            paths, labels = splits.from_folders(name, files_of(name), split)
            label_of = dict(zip(paths, labels, strict=True))
            assert splits.prove_labels(name, role, [label_of[key] for key in keys]) == Proof(True)


def test_keys_that_are_not_the_official_ones_are_an_error():
    keys = keys_of("clevr_count", "train")
    keys = [keys[row] for row in CUTS["clevr_count"].rows("val", keys)]
    splits.prove_keys("clevr_count", "val", keys)
    for others in ([*keys[:99], "renamed.jpg", *keys[100:]], keys[::-1]):
        with pytest.raises(DataError, match="clevr_count: val200"):
            splits.prove_keys("clevr_count", "val", others)


def test_labels_that_nobody_knows_prove_nothing():
    assert splits.prove_labels("svhn", "train", [0] * 800) == Proof(None)
    assert splits.prove_labels("sun397", "test", [0] * 100) == Proof(None)  # only a beginning
    assert splits.prove_labels("sun397", "test", [0] * 21750) == Proof(False)


def test_sun397_by_a_packed_table_of_five_images(monkeypatch):
    keys = ["/a/abbey/sun_a.jpg", "/a/abbey/sun_b.jpg"]
    keys += [f"/b/bar/sun_{letter}.jpg" for letter in "acd"]
    table = {
        "sun397 splits": np.array([0 | 1 << 2 | 2 << 4 | 0 << 6, 2], np.uint8),
        "sun397 counts": np.array([2, 3], np.uint16),
    }
    monkeypatch.setattr(splits, "_packed", table.get)
    found = [*keys[::-1], splits.SUN397_UNUSED]
    assert splits.sun397_split(found, "train") == ([keys[0], keys[3]], [0, 1])
    assert splits.sun397_split(found, "validation") == ([keys[1]], [0])
    assert splits.sun397_split(found, "test") == ([keys[2], keys[4]], [1, 1])
    for changed, count in ((keys[1:], "4 images in 2"), (keys[2:], "3 images in 1")):
        with pytest.raises(DataError, match=count):
            splits.sun397_split(changed, "train")


def test_the_packed_table_of_sun397_has_tfdss_counts():
    members = np.stack([PACKED["sun397 splits"] >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    assert np.bincount(members.ravel()[:108_753]).tolist() == [76_128, 10_875, 21_750]
    assert PACKED["sun397 counts"].sum() == 108_753


def test_the_cuts_of_original_lists_are_pinned():
    cut = CUTS["fashion_mnist"]
    assert cut.train == ("train", 0, 50_000) and cut.val == ("train", 50_000, 60_000)
    cut = CUTS["digits"]
    assert cut.val == ("train", 800, 1000) and cut.test == ("train", 1000, 1797)
