"""Which labels a conversion gives to the images of a folder or zip, and where they come from."""

import collections
import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.images.labels import (
    check_class_names,
    labels_of_metadata,
    listed_name,
    read_class_splits,
)
from data.images.members import Archive, parse_metadata
from dnnlib.errors import refusal
from dnnlib.files import read_file
from dnnlib.text import by_number, is_number, join_names

_SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev", "holdout")
)
_CSV_HEADER = ["name", "class"]
_SHARD_DIGITS = 4  # Folders with fewer digits, or without leading zeros, are unlikely to be shards.


@dataclasses.dataclass(frozen=True)
class LabelChoice:
    """What ``--labels`` (folders, none or a file) and ``--label-level`` ask for."""

    labels: str | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        if self.level is not None and self.labels not in (None, "folders"):
            problem = f"has an effect on folders alone, not with --labels={self.labels}"
            raise refusal("--label-level", self.level, but=problem, remedy="leave it out")

    def __bool__(self) -> bool:
        return self.labels is not None or self.level is not None


BY_ITSELF = LabelChoice()


@dataclasses.dataclass(frozen=True)
class Labelling:
    """Labels of an archive's images, or None, and where they come from or why there are none."""

    origin: str
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    class_splits: Mapping[str, Sequence[int]] | None = None
    notes: tuple[str, ...] = ()


def label_images(archive: Archive, choice: LabelChoice) -> Labelling:
    """Return the labels of a folder or zip: as chosen, or else from dataset.json or class folders.

    Raises ValueError, naming the options to give, if the folders may be splits or shards instead.
    """
    if choice.labels == "none":
        return Labelling("--labels=none")
    if choice.labels not in (None, "folders"):
        return _from_file(archive, choice.labels)
    outer = _outer_folder(archive)
    if not choice:
        for root in dict.fromkeys(("", outer)):
            if archive.read_file(f"{root}dataset.json") is not None:
                return _from_metadata(archive, root)
        _check_misplaced(archive, outer)
    level = choice.level or 1 + outer.count("/")
    depths = [name.count("/") for name in archive.names]
    if not choice:
        if max(depths) < level:
            place = f"all images are in one folder, {outer.rstrip('/')}" if outer else "no folders"
            return Labelling(f"{place}; give one folder per class for labels")
        parts = [
            n.split("/")[level - 1]
            for n, depth in zip(archive.names, depths, strict=True)
            if depth >= level
        ]
        if min(depths) >= level and _in_thousands(archive.names, parts):
            return Labelling("the folders are shards of 1,000 images each, as in FFHQ")
        _check_no_guess(archive, level, set(parts), min(depths) > level)
    return _from_folders(archive, level, depths)


def _outer_folder(archive: Archive) -> str:
    """Return the one folder that contains everything, with a slash; empty if there is none."""
    folder = archive.names[0].partition("/")[0] + "/"
    return folder if all(name.startswith(folder) for name in archive.names) else ""


def _from_folders(archive: Archive, level: int, depths: Sequence[int]) -> Labelling:
    outside = next((index for index, depth in enumerate(depths) if depth < level), None)
    if outside is not None:
        problem = "lies outside the class folders that other images are in"
        if not any(depth >= level for depth in depths):
            problem = f"has no folder of level {level} above it"
        remedy = "move it into one, give every image a label in a dataset.json, or give "
        raise refusal(archive.label(outside), but=problem, remedy=f"{remedy}--labels=none")
    parts = [name.split("/")[level - 1] for name in archive.names]
    class_names = sorted(set(parts), key=by_number)
    check_class_names(class_names, archive.path)
    numbers = {name: index for index, name in enumerate(class_names)}
    labels = np.array([numbers[part] for part in parts], np.int64)
    notes = ()
    if len(class_names) == 1:
        notes = (f"One class only: this level of folders holds nothing but {class_names[0]!r}.",)
    return Labelling(f"folder level {level}", labels, class_names, notes=notes)


def _check_no_guess(archive: Archive, level: int, names: set[str], goes_on: bool) -> None:
    """Raise ValueError if folders look like splits, shards or a container instead of classes."""
    shown = join_names([repr(name) for name in sorted(names)[:3]])
    problem = ""
    if {name.lower() for name in names} <= _SPLITS:
        problem = f"its folders {shown} look like splits, not like classes"
        remedy = f"give one of them as --source={archive.path}/{min(names)}, or "
    elif all(is_number(n) and len(n) >= _SHARD_DIGITS for n in names) and any(
        name.startswith("0") for name in names
    ):
        problem = f"its folders {shown} look like shards, not like classes"
        remedy = ""
        if all(re.fullmatch(r"img\d{8}\.png", name.rpartition("/")[2]) for name in archive.names):
            problem = "looks like a converted dataset that lost its dataset.json"
            remedy = "restore it, or "
    elif len(names) == 1 and goes_on:
        problem = f"all images are below the one folder {shown}, with folders inside"
        remedy = ""
    if problem:
        below = f"--label-level={level + 1} for the folders inside, " if goes_on else ""
        remedy += f"give {below}--labels=folders if they are classes, or --labels=none"
        raise refusal(archive.path, but=problem, remedy=remedy)


def _in_thousands(names: Sequence[str], folders: Sequence[str]) -> bool:
    """Return whether all files are numbered, in folders of a thousand each: 01000/01234.png."""
    for name, folder in zip(names, folders, strict=True):
        stem = name.rpartition("/")[2].partition(".")[0]
        if not (is_number(stem) and is_number(folder) and len(folder) >= _SHARD_DIGITS):
            return False
        if int(stem) // 1000 * 1000 != int(folder):
            return False
    return True


def _check_misplaced(archive: Archive, outer: str) -> None:
    """Raise ValueError if a dataset.json is spelt with capitals or lies where it labels nothing."""
    found = [name for name in archive.others if name.lower().endswith("dataset.json")]
    for name in found:
        if name.rpartition("/")[2].lower() == "dataset.json":
            problem = f"labels nothing here; it belongs at {archive.path}/{outer}dataset.json"
            remedy = "move it, convert its folder by itself, or give --labels=FILE, "
            remedy += "--labels=folders or --labels=none"
            raise refusal(f"{archive.path}/{name}", but=problem, remedy=remedy)


def _from_metadata(archive: Archive, root: str) -> Labelling:
    metadata = archive.metadata(root)
    if metadata.get("labels") is None:
        return Labelling("dataset.json holds none")
    where = f"{archive.path}/{root}dataset.json"
    labels, class_names = labels_of_metadata(metadata, archive, root, where)
    splits = read_class_splits(archive, len(class_names), root)
    notes = _notes(metadata["labels"], [name.removeprefix(root) for name in archive.names], where)
    return Labelling("dataset.json", labels, class_names, splits or None, notes)


def _from_file(archive: Archive, location: str) -> Labelling:
    """Return labels from a file in the layout of dataset.json, or of lines ``name,class``."""
    try:
        content = read_file(location)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        accepted = "folders, none, a .json file as dataset.json, or a .csv file of name,class"
        raise refusal(
            "--labels", location, but=f"it cannot be read ({reason})", accepted=accepted
        ) from None
    if location.lower().endswith(".json"):
        metadata = parse_metadata(content, location)
        if metadata.get("labels") is None:
            raise refusal("--labels", location, but='it has no "labels"')
    else:
        metadata = _parse_csv(text, location)
    labels, class_names = labels_of_metadata(metadata, archive, "", location)
    notes = _notes(metadata["labels"], archive.names, location)
    return Labelling(Path(location).name, labels, class_names, notes=notes)


def _parse_csv(text: str, where: str) -> dict[str, list]:
    rows, reader = [], csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in filter(None, reader):
            values = [part.strip() for part in row]
            if len(values) != 2:
                wanted = "not a file name and a class"
                problem = f"line {reader.line_num} has {len(row)} value(s), {wanted}"
                raise refusal(where, but=problem)
            if not values[1]:
                raise refusal(where, but=f"line {reader.line_num} names no class")
            rows.append(values)
    except csv.Error as error:
        raise refusal(where, but=f"is not a .csv file ({error})") from None
    if rows and [value.lower() for value in rows[0]] == _CSV_HEADER:
        del rows[0]
    class_names = sorted({name for _, name in rows}, key=by_number)
    numbers = {name: index for index, name in enumerate(class_names)}
    return dict(labels=[[name, numbers[kind]] for name, kind in rows], class_names=class_names)


def _notes(pairs: object, names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return sentences about images that a label file lists twice, or that do not exist."""
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    known, listed = set(names), [name for name, _ in pairs]
    counts = collections.Counter(listed_name(name) for name in listed)
    notes = []
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        notes.append(f"{where} lists {len(twice)} image(s) more than once, such as {twice[0]}.")
    strange = [name for name in counts if name not in known]
    if strange:
        notes.append(f"{where} labels {len(strange)} file(s) that are not there: {strange[0]}.")
    return tuple(notes)
