"""Class labels of an image archive, read from ``dataset.json`` or from a sample archive."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.images.members import Archive, plain_name
from data.images.samples import SampleArchive
from dnnlib.errors import refusal

UNLABELLED = -1
CLASS_SPLITS = ("train", "val", "test")
_MAX_CLASSES = 1_000_000  # A larger label is a mistake, and so many class names would take memory.


def read_labels(archive: Archive, folder: str = "") -> tuple[np.ndarray, list[str]] | None:
    """Return ``(labels, class_names)`` of an archive's images, or None if it is unlabelled.

    ``labels`` holds the class index of every image in order, int64 [N]. Without stored class
    names, the classes are "0", "1", ... up to the largest label. ``folder`` (ending in ``/``) is
    where in the archive ``dataset.json`` lies; its file names are relative to it.

    Raises ValueError for a malformed file, an image without a label, or a label that is no class.
    """
    if isinstance(archive, SampleArchive):
        return _labels_of_samples(archive)
    metadata = archive.metadata(folder)
    if metadata.get("labels") is None:
        return None
    where = f"{archive.path}/{folder}dataset.json"
    return labels_of_metadata(metadata, archive, folder, where)


def labels_of_metadata(
    metadata: Mapping[str, Any], archive: Archive, folder: str, where: str
) -> tuple[np.ndarray, list[str]]:
    """Return the result of :func:`read_labels` for a parsed ``dataset.json`` with labels.

    ``where`` names that file in error messages.
    """
    labels_by_name = parse_labels(metadata["labels"], where)
    class_names = parse_class_names(metadata.get("class_names"), where)
    names = [name.removeprefix(folder) for name in archive.names]
    labels = np.array([labels_by_name.get(name, UNLABELLED) for name in names], np.int64)
    missing = np.flatnonzero(labels == UNLABELLED)
    if len(missing):
        name = names[missing[0]]
        other = next((key for key in labels_by_name if key.lower() == name.lower()), None)
        problem = f"has no label in {where}{more(len(missing), 'image')}"
        remedy = "add it there, or remove the image"
        if other is not None:
            remedy = f"it is called {other} there: names must agree in upper and lower case"
        raise refusal(archive.label(missing[0]), but=problem, remedy=remedy)
    if class_names is None:
        class_names = [str(index) for index in range(max(labels_by_name.values()) + 1)]
    bad = np.flatnonzero(labels >= len(class_names))
    if len(bad):
        known = f"{len(class_names)} classes (0 to {len(class_names) - 1})"
        problem = f"has label {labels[bad[0]]} in {where}, which names {known}"
        remedy = 'correct the label or "class_names"'
        raise refusal(archive.label(bad[0]), but=problem, remedy=remedy)
    return labels, class_names


def read_class_splits(
    archive: Archive, num_classes: int, folder: str = ""
) -> dict[str, tuple[int, ...]]:
    """Return the class indices of each split that ``dataset.json`` names; empty if it has none.

    ``folder`` is as in :func:`read_labels`. Raises ValueError unless the splits are disjoint lists
    of classes, called train, val and test.
    """
    splits = archive.metadata(folder).get("class_splits")
    if splits is None:
        return {}
    where = f'{archive.path}/{folder}dataset.json: "class_splits"'
    if not isinstance(splits, dict) or not set(splits) <= set(CLASS_SPLITS):
        raise ValueError(f"{where} must have lists of class indices called train, val and test.")
    split_of: dict[int, str] = {}
    for split, classes in splits.items():
        if not isinstance(classes, list):
            raise ValueError(f"{where} must have lists of class indices; {split} is none.")
        for index in classes:
            if type(index) is not int or not 0 <= index < num_classes:
                problem = f"has class {index!r} in {split}; accepted: 0 to {num_classes - 1}"
                raise ValueError(f"{where} {problem}.")
            if index in split_of:
                problem = f"has class {index} in {split_of[index]} and in {split}"
                raise ValueError(f"{where} {problem}; a class belongs to one split.")
            split_of[index] = split
    return {split: tuple(classes) for split, classes in splits.items()}


def _labels_of_samples(archive: SampleArchive) -> tuple[np.ndarray, list[str]] | None:
    labels, names = archive.read_array("arr_1"), archive.read_array("class_names")
    if labels is None:
        return None
    remedy = "save it so, or leave it out"
    if labels.dtype.kind not in "iu" or labels.shape != (len(archive),):
        problem = f"arr_1 holds {labels.dtype} of shape {list(labels.shape)}; expected the class"
        problem += f" index of each image, integers [{len(archive)}]"
        raise refusal(archive.path, but=problem, remedy=remedy)
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        problem = f"class_names holds {names.dtype} of shape {list(names.shape)}; expected one"
        raise refusal(archive.path, but=f"{problem} name per class", remedy=remedy)
    num_classes = _MAX_CLASSES if names is None else len(names)
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        known = "" if names is None else f', and "class_names" has {num_classes} names'
        problem = f"has label {labels[bad[0]]} in arr_1; a label is a class index, 0 or larger"
        raise refusal(archive.label(int(bad[0])), but=problem + known)
    labels = labels.astype(np.int64)
    return labels, (np.arange(labels.max() + 1).astype(str) if names is None else names).tolist()


def parse_labels(pairs: object, where: str) -> dict[str, int]:
    """Return the label of each file name in the ``labels`` entry of a ``dataset.json``.

    Raises ValueError unless it is a list of [file name, class index] pairs, or an object of class
    indices by file name, and if a name has two labels. ``where`` names the file in messages.
    """
    if isinstance(pairs, dict):
        pairs = list(pairs.items())
    if not isinstance(pairs, list):
        raise ValueError(f'{where}: "labels" must be a list of [file name, class index] pairs.')
    result = {}
    for pair in pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str)):
            problem = f'"labels" holds {pair!r}, which is not a [file name, class index] pair'
            raise refusal(where, but=problem)
        name, label = pair
        if type(label) is not int or not 0 <= label < _MAX_CLASSES:
            problem = f"{name} has label {label!r}; a label is a class index, 0 or larger"
            raise refusal(where, but=problem + f" and below {_MAX_CLASSES:,}")
        name = listed_name(name)
        if result.setdefault(name, label) != label:
            problem = f"{name} is listed twice, with labels {result[name]} and {label}"
            raise refusal(where, but=problem, remedy="keep one of them")
    return result


def listed_name(name: str) -> str:
    """Return a file name from a list of labels in the form in which archives give names."""
    return plain_name(name.replace("\\", "/"))


def check_class_names(names: Sequence[str], where: Any) -> None:
    """Raise ValueError for a class name that is not valid Unicode text."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            but = f"the name of the class {name!r} is not valid text"
            raise refusal(where, but=but, remedy="rename it") from None


def parse_class_names(names: object, where: str) -> list[str] | None:
    """Return the ``class_names`` of a ``dataset.json``, or None; ValueError unless all are text."""
    if names is None:
        return None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f'{where}: "class_names" must be a list of names, one per class.')
    check_class_names(names, where)
    return names


def more(count: int, noun: str) -> str:
    """Return `` (and 3 more images)`` for messages that show one of ``count`` (here 4) cases."""
    return f" (and {count - 1} more {noun}{'s' if count > 2 else ''})" if count > 1 else ""
