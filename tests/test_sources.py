"""Where images come from: downloads, the prepared folder and its proof, FGVC's lists."""

import dataclasses
import shutil

import pytest
from PIL import Image

import data
import splits
import tasks
from splits import DataError, Missing

SPLITS = ("train", "validation", "test")


@pytest.fixture
def fetch(monkeypatch, request):
    """The real download, of a small DTD, with its class replaced: it writes what the test tells it
    to, then stops or ends."""
    monkeypatch.setattr(tasks, "_fetch", request.getfixturevalue("fetch_itself"))

    def use(download):
        task = data.TASKS["dtd"]
        changed = dataclasses.replace(task.original, fetch=(download,))
        few = dataclasses.replace(task, original=changed, sizes=(40, 20, 60))
        monkeypatch.setitem(data.TASKS, "dtd", few)
        slices = [
            splits.Slice(name, 0, count) for name, count in zip(SPLITS, few.sizes, strict=True)
        ]
        cut = splits.Cut(dict.fromkeys(SPLITS, 60), *slices, ordered=True)
        monkeypatch.setitem(splits.CUTS, "dtd", cut)

    return use


def test_a_download_that_breaks_off_leaves_nothing_that_counts(tmp_path, fetch, capsys):
    root, calls = tmp_path / "data", []

    def breaks_off(staging, download):
        calls.append(sorted(str(path.relative_to(staging)) for path in staging.rglob("*")))
        (staging / "dtd/dtd/images").mkdir(parents=True)
        (staging / "dtd/dtd/images/half.jpg").touch()
        (staging / "dtd/dtd-r1.0.1.tar.gz").write_bytes(b"part of it")
        raise ConnectionResetError("the line went dead")

    fetch(breaks_off)
    for _ in range(2):
        with pytest.raises(
            Missing,
            match=r"dtd: the download failed \(the line went dead\) and there is no .*by hand",
        ):
            data.load("dtd", root)
    assert calls == [[], []] and not root.exists()

    def interrupted(staging, download):
        raise KeyboardInterrupt

    fetch(interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("dtd", root)
    assert not (root / "dtd").exists()


def test_an_incomplete_folder_stands_in_the_way_of_a_download(tmp_path, fetch):
    (tmp_path / "dtd").mkdir()
    fetch(None)  # would raise
    with pytest.raises(
        DataError, match="dtd: .*/dtd is not complete: remove it, or complete it by hand"
    ) as raised:
        data.load("dtd", tmp_path)
    assert not isinstance(raised.value, Missing)


def test_a_download_without_a_network_leaves_no_folder(tmp_path, fetch):
    def refuse(staging, download):
        raise OSError("Name or service not known")

    fetch(refuse)
    with pytest.raises(Missing, match="Name or service not known"):
        data.load("dtd", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_download_that_ends_is_moved_into_place(tmp_path, fetch, monkeypatch):
    def whole(staging, download):
        for part in ("train", "val", "test"):
            folder = staging / "dtd/dtd"
            (folder / "labels").mkdir(parents=True, exist_ok=True)
            keys = [f"c{i // 40:02}/{part}{i}.jpg" for i in range(60)]
            (folder / "labels" / f"{part}1.txt").write_text("\n".join(keys))
            for key in keys:
                (folder / "images" / key).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (2, 2)).save(folder / "images" / key)

    fetch(whole)
    monkeypatch.setitem(splits.CONSTANTS["keys"], "dtd", {})  # these are not DTD's names
    monkeypatch.setattr(splits, "_official_labels", lambda name, role: None)
    train, test = data.load("dtd", tmp_path, img_size=8)
    assert train.description == "originals, JPEG images, 60 train / 60 test" and train.official
    assert {path.name for path in tmp_path.iterdir()} == {"dtd"}
    fetch(None)  # it is there: nothing is fetched again
    assert len(data.load("dtd", tmp_path)[1]) == 60
    (tmp_path / "dtd/dtd/images" / test.items[7].parent.name / test.items[7].name).write_bytes(
        b"no image"
    )
    with pytest.raises(
        DataError, match="dtd: the originals are not whole: .* is not a readable image"
    ):
        data.load("dtd", tmp_path)


LISTS = {
    "train800": ["train"],
    "val200": ["val"],
    "train800val200": ["train", "val"],
    "test": ["test"],
}


@pytest.fixture
def official_caltech(tmp_path, monkeypatch):
    """The lists of a whole prepared Caltech101: the official labels in official order, no images
    (those of a prepared folder are opened in test_data.py)."""
    monkeypatch.setattr(tasks, "image_format", lambda path, where: "JPEG")
    root = tmp_path / "official"
    folder = root / "vtab-1k/caltech101"
    folder.mkdir(parents=True)
    lines = {}
    for role in splits.ROLES:
        lines[role] = []
        for i, label in enumerate(splits._official_labels("caltech101", role)):
            lines[role].append(f"images/{role}/{i:06}.jpg {label}")
    for name, roles in LISTS.items():
        listed = sum([lines[role] for role in roles], [])
        (folder / f"{name}.txt").write_text("\n".join(listed))
    return root


def with_list(official_caltech, tmp_path, name, change):
    """A copy of the prepared folder with one list changed."""
    source, folder = official_caltech / "vtab-1k/caltech101", tmp_path / "vtab-1k/caltech101"
    folder.mkdir(parents=True)
    for listing in source.glob("*.txt"):
        shutil.copy(listing, folder)
    listing = folder / f"{name}.txt"
    listing.write_text("\n".join(change(listing.read_text().splitlines())))
    return tmp_path


def swapped(lines):
    """Two lines change places, numbers 41 and 42, whose labels differ."""
    assert lines[40].split()[1] != lines[41].split()[1]
    return [*lines[:40], lines[41], lines[40], *lines[42:]]


def prepared_caltech(root, split="trainval"):
    return data.load("caltech101", root, split=split, img_size=8, source="prepared")[1]


def test_a_prepared_folder_in_official_order_is_official(official_caltech):
    test = prepared_caltech(official_caltech)
    assert test.official and len(test) == 6084
    want = "prepared folder (official order confirmed), JPEG images, 1000 train / 6084 test"
    assert test.description == want
    assert list(test.digests) == ["train800 labels", "val200 labels", "test labels"]
    assert test.digests["train800 labels"].startswith("2fc0f0b1")
    val = prepared_caltech(official_caltech, "train")
    assert val.official and list(val.digests) == ["train800 labels", "val200 labels"]


@pytest.mark.parametrize(
    ("name", "split", "where"),
    [
        (
            "test",
            "trainval",
            "labels of test differ from the official split at line 41 of test.txt",
        ),
        (
            "train800val200",
            "trainval",
            "differ from the official split at line 41 of train800val200",
        ),
        ("val200", "train", "labels of val200 differ from the official split at line 41 of val200"),
        ("val200", "trainval", "train800val200.txt has other labels than train800.txt and val200"),
        ("train800", "trainval", "train800val200.txt has other labels than train800.txt and val20"),
    ],
)
def test_one_swapped_line_of_a_prepared_list_is_found(
    official_caltech, tmp_path, name, split, where
):
    root = with_list(official_caltech, tmp_path, name, swapped)
    images = prepared_caltech(root, split)
    assert not images.official and where in images.description


def test_line_numbers_go_on_behind_the_first_800(official_caltech, tmp_path):
    def change(lines):
        return lines[:800] + swapped(lines[800:])

    root = with_list(official_caltech, tmp_path, "train800val200", change)
    assert "val200 differ from the official split at line 841" in prepared_caltech(root).description


def test_a_beginning_of_the_test_list_is_confirmed_but_not_official(official_caltech, tmp_path):
    root = with_list(official_caltech, tmp_path, "test", lambda lines: lines[:500])
    test = prepared_caltech(root)
    assert not test.official and "(official order confirmed)" in test.description
    assert test.description.endswith("1000 train / 500 of 6084 test (subset)")
    assert prepared_caltech(root, "train").official


def test_the_other_draw_of_caltech101_is_read_and_never_official(official_caltech, tmp_path):
    def other(lines):
        return [*lines, lines[0].replace("000000", "extra")]

    test = prepared_caltech(with_list(official_caltech, tmp_path, "test", other))
    assert len(test) == 6085 and not test.official
    assert "6085 test images are another draw than the official one" in test.description
    assert test.description.endswith("1000 train / 6085 test")
    root = with_list(official_caltech, tmp_path / "more", "test", lambda lines: [*lines, *lines])
    with pytest.raises(DataError, match="test.txt has 12168 images, VTAB-1k's caltech101 has 6084"):
        prepared_caltech(root)


def test_a_prepared_folder_whose_labels_nobody_knows_says_so(prepared):
    images, _ = data.load("cifar", prepared, source="prepared")
    assert "prepared folder (order not proven), PNG images" in images.description


def test_wrong_labels_of_originals_are_an_error(tmp_path, monkeypatch):
    """On DTD's real slices, as far as they are known: the rest of its lists is made up."""
    labels = splits._official_labels("dtd", "val")
    keys = [f"{i}.jpg" for i in range(1880)]
    order = splits.tfds_order(keys, "validation")
    stored = dict.fromkeys(keys, 0) | dict(zip(order, labels, strict=False))

    def read(root, split):
        values = [stored[key] for key in keys]
        return tasks.Content(keys, tasks.np.array(values), lambda rows: [tmp_path] * len(rows))

    task = data.TASKS["dtd"]
    original = dataclasses.replace(task.original, read=read, place=())
    task = dataclasses.replace(task, original=original)
    monkeypatch.setitem(splits.CONSTANTS["keys"], "dtd", {})
    monkeypatch.setattr(tasks, "image_format", lambda item, where: "JPEG")
    found = tasks.read_originals(task, tmp_path, ["val"], "original", False)
    assert found.labels["val"].tolist() == labels
    stored[order[7]] = (stored[order[7]] + 1) % 47
    message = f"dtd: labels of val200 are not the official ones, that of {order[7]} first: get the"
    with pytest.raises(DataError, match=message):
        tasks.read_originals(task, tmp_path, ["val"], "original", False)
