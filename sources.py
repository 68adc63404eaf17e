"""Where a task's images come from: originals, cut and proven; a prepared folder; FGVC's lists.

A reader gets the task, the root folder, the roles wanted ("train", "val", "test"), the source asked
for ("auto", "original", "prepared") and whether it may download. It opens what these roles need.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import splits
from files import regular
from images import find, image_format, lines, within
from originals import Content
from splits import CUTS, DataError, Missing

ARCHIVE = "1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p"  # all 19 tasks, on Google Drive
ROLE_NUMBER = {"train": 0, "val": 1, "test": 2}  # of a role in a task's sizes


@dataclass(frozen=True)
class Original:
    """Where original images are: `read(root, split)`, one of originals.py; `place`: what must be in
    <root>; `get`: where from; `fetch`: torchvision's classes, which download; `needs`: packages;
    `note`: what a result should say of them."""

    read: Callable[[Path, str], Content]
    place: tuple[str, ...]
    get: str
    fetch: tuple[Callable, ...] = ()
    needs: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Found:
    """What a reader found, by role: `images` (paths, encoded images or an array) and `labels`; the
    names of its file `formats`; `digests`, sha256 of a slice's keys or labels in order; whether all
    that can be compared `agrees` with the official split; the number of unreadable images that were
    `left_out`; `title` and `notes` for people."""

    source: str
    title: str
    images: dict[str, Sequence] = field(default_factory=dict)
    labels: dict[str, Sequence[int]] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    digests: dict[str, str] = field(default_factory=dict)
    agrees: bool = True
    left_out: int = 0
    notes: list[str] = field(default_factory=list)


def read(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """By the task's own reader; DataError for files that the system does not let it read."""
    try:
        return task.read(task, root, roles, source, download)
    except OSError as error:  # no permission, a name that is too long, a folder in a file's place
        reason = error.strerror or error
        raise DataError(f"{task.name}: cannot read {error.filename}: {reason}") from error


def read_originals(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """The originals, cut by splits.py; DataError if the slices are not the official ones."""
    found, contents = Found("original", "originals"), {}
    found.notes += [task.original.note] if task.original.note else []
    cut = CUTS[task.name]
    for role in roles:
        split = getattr(cut, role).split
        if split not in contents:
            contents[split] = whole_split(task, root, split, download)
        content = contents[split]
        rows = cut.rows(role, content.keys)
        keys = [content.keys[row] for row in rows]
        labels = content.labels[rows]
        if cut.ordered:
            found.digests[splits.ROLES[role]] = splits.prove_keys(task.name, role, keys)
        if not 0 <= labels.min() <= labels.max() < task.classes:
            raise DataError(f"{task.name}: the originals have labels outside 0..{task.classes - 1}")
        proof = splits.prove_labels(task.name, role, labels)
        if proof.agrees is False or not splits.prove_histogram(task.name, role, labels):
            which = (
                f"that of {keys[proof.line - 1]} first"
                if proof.line
                else "by their count in each class"
            )
            raise DataError(
                f"{task.name}: labels of {splits.ROLES[role]} are not the official ones, {which}: "
                f"get the originals again ({task.original.get})"
            )
        found.labels[role] = labels
        found.images[role] = content.images(rows)
        if isinstance(found.images[role], np.ndarray):
            found.formats.add("raw")
            continue
        where = f"{task.name}: the originals are not whole"
        for image in found.images[role]:
            found.formats.add(image_format(image, where))
    return found


def whole_split(task, root: Path, split: str, download: bool = True) -> Content:
    """One split of a task's originals, whole; downloaded first if need be and possible.

    Raises Missing where the originals cannot be had, DataError where they are damaged.
    """
    original = task.original
    get(task.name, original, root, download)
    where = f"{task.name}: the originals"
    if original.place:
        where = f"{where} at {find(root, original.place[0])}"
    again = f"get them again ({original.get})"
    try:
        content = original.read(root, split)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise DataError(f"{where} are damaged ({_reason(error)}): {again}") from error
    count, distinct = CUTS[task.name].counts[split], len(set(content.keys))
    if not len(content.keys) == len(content.labels) == distinct == count:
        images = f"{distinct} {split} images and {len(content.labels)} labels, not {count}"
        raise DataError(f"{where} have {images}: remove them and {again}")
    return content


def _reason(error: Exception) -> str:
    """The first sentence of an error, or its name."""
    first = str(error).strip().split(". ")[0].splitlines()
    return first[0] if first else type(error).__name__


def get(name: str, original: Original, root: Path, download: bool) -> None:
    """Download originals if they are not there; Missing if that is not possible."""
    for package in original.needs:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{name}: reading the originals needs {package}: pip install {package}")
    depth = 1 if original.fetch else 4
    missing = [place for place in original.place if find(root, place, depth) is None]
    if not missing:
        return
    by_hand = f"no {root / missing[0]}: get it by hand from {original.get}"
    if not (original.fetch and download):
        raise Missing(f"{name}: {by_hand}")
    try:
        _fetch(name, original, root)
    except DataError:
        raise
    except Exception as error:  # whatever a broken download raises
        reason = _reason(error)
        raise Missing(f"{name}: the download failed ({reason}) and there is {by_hand}") from error


def _fetch(name: str, original: Original, root: Path) -> None:
    """Download into a new folder and move what is complete: what lies in <root> is whole."""
    top = root / original.place[0].split("/")[0]
    if top.is_dir():
        remedy = f"remove it, or complete it by hand from {original.get}"
        raise DataError(f"{name}: {top} is not complete: {remedy}")
    new = not root.exists()
    print(f"{name}: downloading {original.get} into {root}", flush=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as folder:
            for dataset in original.fetch:
                dataset(Path(folder), download=True)  # checks the archive's published md5
            for path in Path(folder).iterdir():
                os.replace(path, root / path.name)
    finally:
        socket.setdefaulttimeout(patience)
        if new and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def read_embedded(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """As read_originals; there is no other source, and people know it by its origin."""
    found = read_originals(task, root, roles, source, download)
    found.source, found.title = "embedded", task.origin
    found.formats.clear()
    return found


def join(images: list[Sequence]) -> Sequence:
    """Arrays or lists of images, one behind the other."""
    if isinstance(images[0], np.ndarray):
        return np.concatenate(images)
    return sum(images, [])


def read_vtab(task, root: Path, roles: Iterable[str], source: str, download: bool) -> Found:
    """The originals, or where they cannot be had, or at wish, the prepared folder."""
    folder = root / "vtab-1k" / task.name
    archive = f"unpack a prepared archive (Google Drive {ARCHIVE}) to {folder}"
    if source != "prepared":
        try:
            return read_originals(task, root, roles, source, download)
        except Missing as error:
            if source == "original":
                raise
            if not folder.is_dir():
                raise Missing(f"{error}; or {archive}") from None
            print(f"{error}; reading the prepared folder {folder} instead")
    if not folder.is_dir():
        raise Missing(f"{task.name}: no folder {folder}: {archive} or point --data-dir elsewhere")
    return read_prepared(task, folder, roles)


def read_prepared(task, folder: Path, roles: Iterable[str]) -> Found:
    """The folder that PEFT repositories pass around, compared with the official labels."""
    found = Found("prepared", "prepared folder")
    lists = {"train800.txt": ["train"], "val200.txt": ["val"]}
    if "test" in roles:
        lists = {"train800val200.txt": ["train", "val"], "test.txt": ["test"]}
    agreements = {_same_labels(folder)}
    if agreements == {False}:
        found.notes.append("train800val200.txt has other labels than train800.txt and val200.txt")
        found.agrees = False
    for name, in_list in lists.items():
        paths, labels = _prepared_list(task, folder / name, found.formats)
        count = sum(task.sizes[ROLE_NUMBER[role]] for role in in_list)
        is_other = in_list == ["test"] and len(paths) == splits.OTHER_DRAWS.get(task.name)
        if is_other:
            found.notes.append(f"{len(paths)} test images are another draw than the official one")
            found.agrees = False
        elif not paths or len(paths) > count or (len(paths) < count and in_list != ["test"]):
            raise DataError(
                f"{folder / name} has {len(paths)} images, VTAB-1k's {task.name} has {count}: "
                "unpack the archive again"
            )
        first = 0
        for role in in_list:
            stop = first + task.sizes[ROLE_NUMBER[role]] if len(in_list) > 1 else None
            found.images[role] = paths[first:stop]
            found.labels[role] = labels[first:stop]
            slice_name = splits.ROLES[role]
            found.digests[f"{slice_name} labels"] = splits.sha256(labels[first:stop])
            proof = splits.prove_labels(task.name, role, labels[first:stop])
            agreements.add(proof.agrees)
            if proof.agrees is False:
                line = f" at line {first + proof.line} of {name}" if proof.line else ""
                found.notes.append(f"labels of {slice_name} differ from the official split{line}")
                found.agrees = False
            first = stop
    if found.agrees:
        is_proven = agreements == {True}
        found.notes.append("official order confirmed" if is_proven else "order not proven")
    return found


def _same_labels(folder: Path) -> bool:
    """Whether the list of 1000 has the labels of the two that it joins, where all are there."""
    labels = {}
    for name in ("train800", "val200", "train800val200"):
        listing = folder / f"{name}.txt"
        if not listing.exists():
            return True
        labels[name] = [line.split()[-1] for _, line in lines(listing)]
    return labels["train800"] + labels["val200"] == labels["train800val200"]


def _prepared_list(task, listing: Path, formats: set[str]) -> tuple[list[Path], list[int]]:
    """Paths and labels of a list; adds the images' formats."""
    paths, labels = [], []
    for where, line in lines(listing):
        try:
            name, label = line.rsplit(None, 1)
            label = int(label)
        except ValueError:
            raise DataError(f"{where}: expected '<image> <label>', found {line!r}") from None
        if not 0 <= label < task.classes:
            raise DataError(f"{where}: label {label} is outside 0..{task.classes - 1}")
        path = listing.parent / within(name, where)
        formats.add(image_format(path, where))
        paths.append(path)
        labels.append(label)
    return paths, labels


def read_fgvc(task, root: Path, roles: Sequence[str], source: str, download: bool) -> Found:
    """VPT's layout: train.json, val.json, test.json; ids of all three, sorted, become 0..C-1."""
    folder = None
    for path in sorted((root / "fgvc").glob("*/")):
        if path.name.lower().replace("-", "_") in (task.name, *task.aliases):
            folder = folder or path
    by_hand = (
        f"put the images of {task.origin} into {root / 'fgvc' / task.name} and, beside them, "
        "train.json, val.json and test.json, which VPT's repository links to (github.com/KMnP/vpt)"
    )
    if folder is None and source != "prepared" and task.original:
        try:
            return read_originals(task, root, roles, source, download)
        except Missing as error:
            raise Missing(f"{error}; or {by_hand}") from None
    if folder is None:
        raise Missing(f"{task.name}: no folder {root / 'fgvc' / task.name}: {by_hand}")
    lists = {role: _fgvc_list(task, folder, role) for role in roles}
    ids = set().union(*(listed.values() for listed in lists.values()))
    if len(ids) < task.classes and "test" not in lists:  # else training alone knows all classes
        ids |= set(_fgvc_list(task, folder, "test").values())
    if len(ids) > task.classes:
        raise DataError(
            f"{folder}: the lists have {len(ids)} classes, {task.name} has {task.classes}"
        )
    class_of = {name: number for number, name in enumerate(sorted(ids))}
    found = Found("lists", "lists of VPT")
    for role, listed in lists.items():
        where = f"{folder / role}.json"
        found.labels[role] = [class_of[label] for label in listed.values()]
        found.images[role] = []
        for name in listed:
            places = [folder / sub / within(name, where) for sub in ("images", "Images", "")]
            there = [path for path in places if path.exists()] or places[-1:]
            found.formats.add(image_format(there[0], where))
            found.images[role].append(there[0])
    return found


def _fgvc_list(task, folder: Path, role: str) -> dict[str, int]:
    listing = folder / f"{role}.json"
    try:
        listed = json.loads(regular(listing).read_text(encoding="utf-8-sig"))
        if not listed or not all(type(label) is int for label in listed.values()):
            raise ValueError("a class is no integer, or the list is empty")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{listing} is no list like {{'<image>': <class>}} ({error}): get it again"
        ) from None
    count = task.sizes[ROLE_NUMBER[role]]
    if len(listed) > count:
        raise DataError(f"{listing} has {len(listed)} images, {task.name} has {count}")
    return listed
