"""The order of TFDS and the draws, against published lists and the rule in other words."""

import hashlib

from splits import CUTS, tfds_order

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
            assert 0 <= wanted.start < wanted.start + wanted.count <= cut.counts[wanted.split]


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
