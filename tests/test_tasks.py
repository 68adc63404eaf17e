"""Where a task's images come from: originals made small, downloads, and the prepared folder."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from test_splits import files_of

import data
import splits
import suite
import tasks
from splits import CONSTANTS, CUTS, ROLES, Cut, DataError, Missing


def read(name, root):
    """(images, labels) of train, val and test of a task's originals."""
    training, test = data.load(name, root, source="original", download=False)
    count = CUTS[name].sizes()[0]
    labels = training.labels.tolist()
    train = training.items[:count], labels[:count]
    val = training.items[count:], labels[count:]
    return train, val, (test.items, test.labels.tolist())


def by_hand(keys, split):
    """TFDS's order in other words: the hex digest read as a number."""

    def place(key):
        return int(hashlib.md5(f"{split}{key}".encode()).hexdigest(), 16)

    return sorted(keys, key=place)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


SPLITS = {"train": "train", "validation": "val", "test": "test"}
RANDOM = np.random.default_rng(0)


def noise(*shape, high=256):
    return RANDOM.integers(0, high, shape, np.uint8)


# --- originals made small -------------------------------------------------------------------------
# Each function writes a few images of a task as its publisher does, and returns
# {split of TFDS: (keys, images, labels)}.


def files(folder, keys, labels, names=None):
    """Writes empty files that are called as their keys, or by other names."""
    paths = [folder / name for name in names or keys]
    for path in paths:
        write(path, "")
    return keys, paths, labels


def write_folders(root, name):
    place, rule = {
        "eurosat": ("eurosat/2750", "{0}/{0}_{1}.jpg"),
        "resisc45": ("NWPU-RESISC45", "{0}/{0}_{1:03}.jpg"),
    }[name]
    labels = [i % 3 for i in range(30)]
    classes = ["airport", "Beach", "zoo"]  # upper and lower case alike
    names = [rule.format(classes[label], i) for i, label in enumerate(labels, 1)]
    return {"train": files(root / place, [name.replace("/", "_") for name in names], labels, names)}


def write_caltech(root, name):
    folder, whole = root / "caltech101/101_ObjectCategories", {"train": [], "test": []}
    np.random.seed(1234)  # TFDS's own calls
    labels = {"BACKGROUND_Google": 1, "Faces": 2, "ant": 0}  # upper and lower case alike
    for name, label in labels.items():
        listed = [f"image_{i:04}.jpg" for i in range(1, 41)]
        stray = ["tmp"] if label == 1 else []  # of the first archive
        train = np.random.choice(listed + stray, 30, replace=False)
        for file in listed:
            whole["train" if file in train else "test"].append((f"{name}/{file}", label))
    return {split: files(folder, *zip(*rows, strict=True)) for split, rows in whole.items()}


def write_sun397(root, name):
    write(root / "SUN397" / splits.SUN397_UNUSED[1:], "")
    whole = {}
    for split in SPLITS:
        names = [f"{i % 3}/outdoor/sun_{split}{i}.jpg" for i in range(12)]
        keys = [f"/{name}" for name in names]
        whole[split] = files(root / "SUN397", keys, [i % 3 for i in range(12)], names)
    return whole


def split_sun397(keys, split):
    """In the place of the official table."""
    keys = [key for key in keys if f"sun_{split}" in key]
    return keys, [int(key[1]) for key in keys]


def write_dtd(root, name="dtd"):
    whole = {}
    for split, part in SPLITS.items():
        keys = [f"{name}/{part}{i}.jpg" for name in ("banded", "woven") for i in range(6)]
        whole[split] = files(root / "dtd/dtd/images", keys, [0] * 6 + [1] * 6)
        write(root / f"dtd/dtd/labels/{part}1.txt", "\n".join(keys) + "\n")
    return whole


def mat(**content):
    io_module = pytest.importorskip("scipy.io", reason="scipy is not installed")
    file = io.BytesIO()
    io_module.savemat(file, content)
    return file.getvalue()


FLOWERS = {"trnid": [*range(1, 37, 3)], "valid": [*range(2, 37, 3)], "tstid": [*range(3, 37, 3)]}


def write_flowers(root, name):
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    write(folder / "setid.mat", mat(**FLOWERS))
    write(folder / "imagelabels.mat", mat(labels=[[i % 102 + 1 for i in range(36)]]))
    whole = {}
    for split, numbers in zip(SPLITS, FLOWERS.values(), strict=True):
        keys = [f"image_{number:05}.jpg" for number in numbers]
        paths = [folder / "jpg" / key for key in keys]
        whole[split] = keys, paths, [number - 1 for number in numbers]
    return whole


def write_clevr(root, name):
    distances = [7.9, 8.0, 8.001, 8.5, 8.6, 9.0, 9.5, 9.51, 10.0, 12.0, 8.0, 8.0]
    labels = [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 0, 0]
    if name == "clevr_count":
        labels = [i % 8 for i in range(12)]
    whole = {}
    for split, part in (("train", "train"), ("validation", "val")):
        keys, scenes = [f"CLEVR_{part}_{i:06}.png" for i in range(12)], []
        for i, distance in enumerate(distances):
            objects = [{"pixel_coords": [0, 0, distance + k]} for k in range(3 + i % 8)]
            scenes.append({"image_filename": keys[i], "objects": objects})
        listing = root / f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json"
        write(listing, json.dumps({"scenes": scenes[::-1]}))
        whole[split] = keys, [root / "CLEVR_v1.0/images" / part / key for key in keys], labels
    return whole


def write_kitti(root, name):
    place = np.random.default_rng(0).permutation(120)  # image -> line of the mapping
    write(root / "devkit/mapping/train_rand.txt", ",".join(str(i + 1) for i in place))
    videos = [f"2011_09_26_drive_{i // 6:04}_sync" for i in range(120)]
    mapping = [f"2011_09_26 {video} {i:010}" for i, video in enumerate(videos)]
    write(root / "devkit/mapping/train_mapping.txt", "\n".join(mapping) + "\n")
    (root / "kitti/training/image_2").mkdir(parents=True)
    np.random.seed(123)  # TFDS's own calls
    test = np.random.choice(sorted(set(videos)), 2, replace=False)
    val = np.random.choice(sorted(set(videos) - set(test)), 2, replace=False)
    whole = {split: ([], [], []) for split in SPLITS}
    for i, line in enumerate(place):
        text, label = "DontCare -1 -1\n", 3
        if i % 5:
            kind = ("Car", "Van", "Truck")[i % 3]
            distance, label = [(8.0, 0), (8.1, 1), (20.0, 1), (20.5, 2)][i % 4]
            text = f"{kind} {'0 ' * 12}{distance} 0\n"
            text += f"Pedestrian {'0 ' * 12}1.0 0\n{kind} {'0 ' * 12}500 0\n"
        write(root / f"kitti/training/label_2/{i:06}.txt", text)
        video = videos[line]
        split = "test" if video in test else "validation" if video in val else "train"
        path = root / f"kitti/training/image_2/{i:06}.png"
        for column, value in zip(whole[split], (path.name, path, label), strict=True):
            column.append(value)
    return whole


def jpeg(width, height):
    file = io.BytesIO()
    Image.fromarray(noise(height, width)).save(file, "jpeg")
    return file.getvalue()


def write_retinopathy(root, name):
    whole, solution = {}, ["image,level,Usage"]
    usages = {"train": "", "validation": ",Public", "test": ",Private"}
    for number, (split, usage) in enumerate(usages.items()):
        keys, labels = [f"{number}{i}_left" for i in range(12)], [i % 5 for i in range(12)]
        rows = [f"{key},{label}{usage}" for key, label in zip(keys, labels, strict=True)]
        solution += rows if usage else []
        if not usage:
            write(root / "eyes/trainLabels.csv", "\n".join(["image,level", *rows]))
        folder = root / "eyes" / ("test" if usage else "train")
        whole[split] = keys, [folder / f"{key}.jpeg" for key in keys], labels
        for path in whole[split][1]:
            write(path, jpeg(540, 30))
    write(root / "eyes/retinopathy_solution.csv", "\n".join(solution))
    return whole


def write_cifar(root, name):
    whole = {}
    for split, count in (("train", 40), ("test", 12)):
        images, labels = noise(count, 3, 32, 32), noise(count, high=100).tolist()
        content = {"data": images.reshape(count, -1), "fine_labels": labels}
        write(root / "cifar-100-python" / split, pickle.dumps(content))
        whole[split] = range(count), images.transpose(0, 2, 3, 1), labels
    write(root / "cifar-100-python/meta", pickle.dumps({"fine_label_names": []}))
    return whole


def write_svhn(root, name):
    whole = {}
    for split, count in (("train", 40), ("test", 12)):
        images, digits = noise(32, 32, 3, count), noise(count, high=10) + 1  # the digit 0 is 10
        write(root / f"{split}_32x32.mat", mat(X=images, y=digits[:, None]))
        whole[split] = range(count), images.transpose(3, 0, 1, 2), digits % 10
    return whole


def write_pcam(root, name):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    (root / "pcam").mkdir()
    whole = {}
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        images, labels = noise(20, 6, 6, 3), noise(20, high=2)
        stem = f"pcam/camelyonpatch_level_2_split_{part}"
        with h5py.File(root / f"{stem}_x.h5", "w") as file:
            file["x"] = images
        with h5py.File(root / f"{stem}_y.h5", "w") as file:
            file["y"] = labels.reshape(20, 1, 1, 1)
        whole[split] = [f"{part}_{i}" for i in range(20)], images, labels
    return whole


def write_dsprites(root, name):
    images = noise(40, 64, 64, high=2)
    latents = np.stack([noise(40, high=n) for n in (1, 3, 6, 40, 32, 32)], 1)
    path = root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    np.savez(path, imgs=images, latents_classes=latents)
    labels = latents[:, 4] // 2 if name == "dsprites_loc" else np.floor(latents[:, 3] / 2.5)
    return {"train": (range(40), images * 255, labels)}


def write_smallnorb(root, name):
    whole = {}
    for split, part in (("train", "46789-training"), ("test", "01235-testing")):
        images = noise(40, 2, 6, 6)  # of two cameras
        infos = np.stack([noise(40, high=n) for n in (10, 9, 18)], 1) * [1, 1, 2]
        labels = infos[:, 2] // 2 if name == "smallnorb_azi" else infos[:, 1]
        sizes = np.array([4, *images.shape], "<i4").tobytes()
        content = b"\x55\x4c\x3d\x1e" + sizes + images.tobytes()
        write(root / f"smallnorb-5x{part}-dat.mat", content)
        sizes = np.array([2, 40, 3, 1], "<i4").tobytes()
        content = b"\x54\x4c\x3d\x1e" + sizes + infos.astype("<i4").tobytes()
        write(root / f"smallnorb-5x{part}-info.mat.gz", gzip.compress(content))
        whole[split] = range(40), images[:, 0], labels
    return whole


def write_dmlab(root, name):
    tfrecord = pytest.importorskip("tfrecord", reason="tfrecord is not installed")
    whole = {}
    for split in SPLITS:
        keys = [f"video_{split}_{i}.jpg" for i in range(12)]
        images, labels = [jpeg(8, 6 + i) for i in range(12)], noise(12, high=6).tolist()
        for part in range(2):
            path = root / f"dmlab-{split}.tfrecord-0000{part}-of-00002"
            writer = tfrecord.TFRecordWriter(str(path))
            for i in range(6 * part, 6 * part + 6):
                example = {"image": (images[i], "byte"), "label": (labels[i], "int")}
                writer.write(example | {"filename": (keys[i].encode(), "byte")})
            writer.close()
        whole[split] = keys, images, labels
    return whole


WRITERS = {
    "cifar": write_cifar,
    "caltech101": write_caltech,
    "dtd": write_dtd,
    "svhn": write_svhn,
    "sun397": write_sun397,
    "patch_camelyon": write_pcam,
    "diabetic_retinopathy": write_retinopathy,
    "dmlab": write_dmlab,
    "kitti": write_kitti,
}
WRITERS |= dict.fromkeys(["oxford_flowers102", "oxford_flowers"], write_flowers)
WRITERS |= dict.fromkeys(["eurosat", "resisc45"], write_folders)
WRITERS |= dict.fromkeys(["clevr_count", "clevr_dist"], write_clevr)
WRITERS |= dict.fromkeys(["dsprites_loc", "dsprites_ori"], write_dsprites)
WRITERS |= dict.fromkeys(["smallnorb_azi", "smallnorb_ele"], write_smallnorb)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Writes a task's originals, small: the proofs that they are the official ones are put off."""
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *args, **kwargs: True)
    monkeypatch.setattr(splits, "sun397_split", split_sun397)
    monkeypatch.setattr(tasks, "image_format", lambda item, where: "JPEG")  # of empty files too
    monkeypatch.setattr(splits, "prove_keys", lambda name, role, keys: splits.sha256(keys))
    monkeypatch.setattr(splits, "prove_labels", lambda *arguments: splits.Proof(None))

    def use(name):
        whole = WRITERS[name](tmp_path, name)
        counts = {split: len(keys) for split, (keys, _, _) in whole.items()}
        slices, start = {}, dict.fromkeys(whole, 0)
        for role in ROLES:  # a fourth of its split each, with gaps between
            split = getattr(CUTS[name], role)[0]
            stop = start[split] + counts[split] // 4
            slices[role] = split, start[split], stop
            start[split] = stop + 1
        monkeypatch.setitem(CONSTANTS["counts"], name, counts)
        monkeypatch.setitem(CUTS, name, Cut(**slices, ordered=CUTS[name].ordered))
        return whole

    return use


@pytest.mark.parametrize("name", WRITERS)
def test_originals_are_read_and_cut(name, tmp_path, small):
    whole = small(name)
    for (images, labels), role in zip(read(name, tmp_path), ROLES, strict=True):
        split, start, stop = getattr(CUTS[name], role)
        keys, all_images, all_labels = whole[split]
        order = by_hand(keys, split) if CUTS[name].ordered else keys
        rows = [keys.index(key) for key in order[start:stop]]
        wanted = [all_images[row] for row in rows]
        assert len(images) == len(wanted) == len(all_images) // 4
        is_array = isinstance(images, np.ndarray)
        assert np.array_equal(images, wanted) if is_array else images == wanted
        assert labels == [all_labels[row] for row in rows]


DTD, DMLAB = "dtd/dtd/labels/test1.txt", "dmlab-test.tfrecord-00001-of-00002"
DAMAGED = {  # a file of the test set, what it holds instead, and what the error names
    "clevr_count": ("CLEVR_v1.0/scenes/CLEVR_val_scenes.json", lambda raw: b"{", "CLEVR_v1.0"),
    "diabetic_retinopathy": ("eyes/test/20_left.jpeg", lambda raw: jpeg(752, 500), "20_left.jpeg"),
    "dtd leads out": (DTD, lambda raw: raw[:-16] + b"woven/../../x.jp", "dtd/dtd"),
    "dtd out of its folder": (DTD, lambda raw: raw[:-16] + b"../x.jpg", "leads out"),
    "dtd repeated": (DTD, lambda raw: raw[:-16] + b"banded/test0.jpg", "11 test images"),
    "dmlab end": (DMLAB, lambda raw: raw[:-3], DMLAB),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_test_images_are_an_error_and_not_opened_to_validate(case, tmp_path, small):
    file, change, message = DAMAGED[case]
    name = case.split()[0]
    small(name)
    path = tmp_path / file
    path.write_bytes(change(path.read_bytes()))
    data.load(name, tmp_path, split="train")
    with pytest.raises(DataError, match=message):
        read(name, tmp_path)


def test_only_the_publishers_pickle_is_opened(tmp_path):
    makes_folder = f"cos\nmkdir\n(V{tmp_path / 'made'}\ntR."  # where it is unpickled
    write(tmp_path / "cifar-100-python/train", makes_folder)
    with pytest.raises(DataError, match="cifar-100-python") as raised:
        data.load("cifar", tmp_path)
    assert not (tmp_path / "made").exists()
    assert not isinstance(raised.value, Missing)  # so nothing else is read in its place


def test_the_package_that_a_reader_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="pip install scipy"):
        read("svhn", tmp_path)


def test_pets_and_the_proof_of_their_labels(tmp_path, monkeypatch):
    """With the official labels, but images of other names."""
    monkeypatch.setitem(CONSTANTS["keys"], "oxford_iiit_pet", {})
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    names = [f"Pet_{i}" for i in range(3680)]
    order = by_hand([f"{name}.jpg" for name in names], "train")
    drawn = order[:800] + order[2944:3144]
    official = np.load(splits.FOLDER / "splits.npz")["oxford_iiit_pet labels"].tolist()
    label_of = dict(zip(drawn, official, strict=True))

    def write_lists():
        lines = [f"{name} {label_of.get(f'{name}.jpg', 0) + 1} 1 2" for name in names]
        write(folder / "annotations/trainval.txt", "\n".join(lines))
        lines = [f"Test_{i} 7 1 2" for i in range(3669)]
        write(folder / "annotations/test.txt", "\n".join(lines))

    write_lists()
    with pytest.raises(DataError, match=drawn[0]):  # there is no such file
        read("oxford_iiit_pet", tmp_path)
    monkeypatch.setattr(tasks, "image_format", lambda item, where: "JPEG")
    train, val, test = read("oxford_iiit_pet", tmp_path)
    assert train[0] + val[0] == [folder / "images" / key for key in drawn]
    assert train[1] + val[1] == official and test[1] == [6] * 3669
    label_of[drawn[807]] = (label_of[drawn[807]] + 1) % 37
    write_lists()
    with pytest.raises(DataError, match=f"val200.*{drawn[807]}"):
        read("oxford_iiit_pet", tmp_path)


@pytest.fixture
def fetch(monkeypatch, request):
    """The real download of DTD with its class replaced by what the test says."""
    monkeypatch.setattr(tasks, "_fetch", request.getfixturevalue("fetch_itself"))

    def use(download):
        task = data.TASKS["dtd"]
        original = dataclasses.replace(task.original, fetch=(download,))
        monkeypatch.setitem(data.TASKS, "dtd", dataclasses.replace(task, original=original))

    return use


@pytest.mark.parametrize("error", [ConnectionResetError, KeyboardInterrupt])
def test_a_download_that_breaks_off_leaves_nothing_that_counts(tmp_path, fetch, error):
    def break_off(staging, download):
        write(staging / "dtd/dtd/images/half.jpg", "")
        raise error

    fetch(break_off)
    with pytest.raises((Missing, KeyboardInterrupt)):
        data.load("dtd", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_download_that_ends_is_moved_into_place(tmp_path, fetch, small):
    small("dtd")
    fetch(lambda staging, download: write_dtd(staging))
    assert len(data.load("dtd", tmp_path / "data")[1]) == 3
    assert os.listdir(tmp_path / "data") == ["dtd"]
    fetch(None)  # it is there: nothing is fetched again
    assert len(data.load("dtd", tmp_path / "data")[1]) == 3
    shutil.rmtree(tmp_path / "data/dtd/dtd")
    with pytest.raises(DataError, match=str(tmp_path / "data/dtd")) as raised:
        data.load("dtd", tmp_path / "data")  # a download would not complete it
    assert not isinstance(raised.value, Missing)


@pytest.fixture
def prepared_caltech(tmp_path, monkeypatch):
    """The lists of a whole prepared Caltech101, with the official labels in official order; images
    of a prepared folder are opened in test_data.py."""
    monkeypatch.setattr(tasks, "image_format", lambda item, where: "JPEG")
    cut, files, listed = CUTS["caltech101"], files_of("caltech101"), {}
    for role, name in ROLES.items():
        keys, labels = splits.from_folders("caltech101", files, getattr(cut, role)[0])
        rows = cut.rows(role, list(keys))
        listed[name] = [f"{role}/{i:06}.jpg {labels[row]}" for i, row in enumerate(rows)]
    listed["train800val200"] = listed["train800"] + listed["val200"]
    for name, rows in listed.items():
        write(tmp_path / f"vtab-1k/caltech101/{name}.txt", "\n".join(rows))
    return tmp_path


def load_prepared(root, split="trainval"):
    return data.load("caltech101", root, split=split, source="prepared")[1]


def edit(root, name, change):
    listing = root / f"vtab-1k/caltech101/{name}.txt"
    listing.write_text("\n".join(change(listing.read_text().splitlines())))


def test_a_prepared_folder_in_official_order_is_official(prepared_caltech):
    test, val = load_prepared(prepared_caltech), load_prepared(prepared_caltech, "train")
    assert test.official and len(test) == 6084 and "confirmed" in test.description
    assert val.official and list(val.digests) == ["train800 labels", "val200 labels"]
    assert val.digests["train800 labels"].startswith("2fc0f0b1")  # of a copy that goes round
    assert val.digests["val200 labels"].startswith("dbb8738a")
    edit(prepared_caltech, "test", lambda lines: lines[:500])
    part = load_prepared(prepared_caltech)
    assert not part.official and "500 of 6084 test" in part.description
    assert part.digests["test labels"].startswith("fc8e3c56")


@pytest.mark.parametrize(
    ("name", "split", "line", "where"),
    [
        ("test", "trainval", 41, "line 41 of test.txt"),
        ("train800val200", "trainval", 841, "line 841 of train800val200.txt"),
        ("val200", "train", 41, "line 41 of val200.txt"),
    ],
)
def test_a_swapped_line_of_a_prepared_list_is_found(prepared_caltech, name, split, line, where):
    def swap(lines):
        one, two = lines[line - 1 : line + 1]
        assert one.split()[1] != two.split()[1]
        return [*lines[: line - 1], two, one, *lines[line + 1 :]]

    edit(prepared_caltech, name, swap)
    images = load_prepared(prepared_caltech, split)
    assert not images.official and where in images.description


def test_the_other_draw_of_caltech101_is_read_and_never_official(prepared_caltech):
    edit(prepared_caltech, "test", lambda lines: [*lines, "test/extra.jpg 0"])
    test = load_prepared(prepared_caltech)
    assert len(test) == 6085 and not test.official and "another draw" in test.description
    edit(prepared_caltech, "test", lambda lines: [*lines, "test/more.jpg 0"])
    with pytest.raises(DataError, match="test.txt has 6086 images"):
        load_prepared(prepared_caltech)


def test_the_row_in_the_docs_is_a_task(run, tmp_path, capsys):
    page = (splits.FOLDER / "docs/data.md").read_text()
    try:
        exec(page.split("```python")[1].split("```")[0], vars(tasks))
        for role, count in (("train", 4), ("val", 2), ("test", 2)):
            for i in range(count):
                for name in ("circle", "square"):
                    path = tmp_path / "data/shapes" / role / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(noise(20, 20, 3)).save(path)
        small = ["--dataset", "shapes", "--model", "vit_nano", "--epochs", 1, "--workers", 0]
        metrics = run(*small)
        assert metrics["official"] and metrics["images"] == 4
        assert run(*small, "--val")["val_top1"] in (0, 25, 50, 75, 100)
        (tmp_path / "data/shapes/test/circle/0.png").unlink()
        assert not run(*small, "--overwrite")["official"]
        suite.main(["--table", "runs"])
        assert "shapes" in capsys.readouterr().out
    finally:
        tasks.TASKS.pop("shapes", None)
