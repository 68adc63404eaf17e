"""Where images come from: downloads, the prepared folder and its proof, FGVC's lists."""

import dataclasses

import pytest
from PIL import Image

import data
import sources
import splits
from splits import DataError, Missing


@pytest.fixture
def fetch(monkeypatch, request):
    """The real download with DTD's class replaced: it writes what the test tells it to, then stops or ends."""
    monkeypatch.setattr(sources, "_fetch", request.getfixturevalue("fetch_itself"))

    def use(download):
        task = data.TASKS["dtd"]
        changed = dataclasses.replace(task.original, fetch=(download,))
        monkeypatch.setitem(data.TASKS, "dtd", dataclasses.replace(task, original=changed))

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
    # the archive is kept for torchvision to check or to fetch again, what was unpacked is not
    assert calls == [[], ["dtd", "dtd/dtd-r1.0.1.tar.gz"]] and not (root / "dtd").exists()

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
            keys = [f"c{i // 40:02}/{part}{i}.jpg" for i in range(1880)]
            (folder / "labels" / f"{part}1.txt").write_text("\n".join(keys))
            for key in keys:
                (folder / "images" / key).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (2, 2)).save(folder / "images" / key)

    fetch(whole)
    monkeypatch.setitem(splits.CONSTANTS["keys"], "dtd", {})  # these are not DTD's names
    monkeypatch.setattr(splits, "_official_labels", lambda name, role: None)
    train, test = data.load("dtd", tmp_path, img_size=8)
    assert train.about == "originals, JPEG images, 1000 train / 1880 test" and train.official
    assert {path.name for path in tmp_path.iterdir()} == {"dtd"}
    fetch(None)  # it is there: nothing is fetched again
    assert len(data.load("dtd", tmp_path)[1]) == 1880
    (tmp_path / "dtd/dtd/images" / test.items[7].parent.name / test.items[7].name).write_bytes(
        b"no image"
    )
    with pytest.raises(
        DataError, match="dtd: the originals are not whole: .* is not a readable image"
    ):
        data.load("dtd", tmp_path)
