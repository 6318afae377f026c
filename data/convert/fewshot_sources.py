"""Reads few-shot datasets, each of whose classes belongs to one split: train, val or test."""

import dataclasses
import itertools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.images.labels import CLASS_SPLITS
from dnnlib import safe_pickle
from dnnlib.errors import refusal
from dnnlib.text import by_number

# FC100 (Oreshkin et al., TADAM, arXiv 1805.10123) divides the 20 superclasses of CIFAR-100, here
# numbered in alphabetical order.
_FC100_SUPERCLASSES = {
    "train": (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19),
    "val": (8, 11, 13, 16),
    "test": (0, 7, 12, 14),
}
# CIFAR-FS (Bertinetto et al., arXiv 1805.08136); all other classes are for training.
_CIFAR_FS = {
    "val": "beaver otter flatfish shark lamp television beetle butterfly sea camel cattle crab "
    "crocodile maple_tree motorcycle tractor",
    "test": "whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain chimpanzee "
    "fox snail worm baby man woman bicycle pickup_truck rocket",
}
_PICKLES = (".pickle", ".pkl")
_OMNIGLOT = {"train": "train_small.npz", "test": "test_small.npz"}
_OMNIGLOT_SIDE = 28
# One in this many training classes becomes a validation class: 97 of Omniglot's 964.
_OMNIGLOT_VAL = 10


@dataclasses.dataclass(frozen=True)
class SplitImages:
    """The images of one split, uint8 [M, H, W] or [M, H, W, 3], and their classes."""

    images: np.ndarray
    labels: np.ndarray  # int64 [M], indices into class_names.
    class_names: Sequence[str]


def cifar_splits(
    name: str, class_names: Sequence[str], labels: np.ndarray, superclasses: list[int], path: Path
) -> dict[str, list[int]]:
    """Return the class indices of each split by which ``fc100`` or ``cifar-fs`` divides CIFAR-100.

    ``class_names`` are those of the fine classes; ``labels`` and ``superclasses`` belong to the
    images of the archive ``path``. Raises ValueError if a class has images of several superclasses.
    """
    if name == "fc100":
        of_class: dict[int, int] = {}
        for label, superclass in zip(map(int, labels), superclasses, strict=True):
            if of_class.setdefault(label, superclass) != superclass:
                several = f"superclasses {of_class[label]} and {superclass}"
                raise _damaged(path, f"class {class_names[label]!r} has images of {several}")
        return {
            split: sorted(label for label, found in of_class.items() if found in wanted)
            for split, wanted in _FC100_SUPERCLASSES.items()
        }
    of_name = {name: split for split, names in _CIFAR_FS.items() for name in names.split()}
    result: dict[str, list[int]] = {split: [] for split in CLASS_SPLITS}
    for index, class_name in enumerate(class_names):
        result[of_name.get(class_name, "train")].append(index)
    return result


def find_fewshot_files(path: Path) -> dict[str, Path] | None:
    """Return the file of each split of a few-shot dataset in the folder, or at the file, ``path``.

    Returns None if there is no such dataset. Raises ValueError if a folder mixes the files of
    several datasets, or if a pickle's name does not include its split.
    """
    if path.is_file():
        if path.suffix not in _PICKLES:
            return None
        split, _ = _split_of(path)
        if split is None:
            accepted = "CIFAR_FS_train.pickle, FC100_test.pickle, mini-imagenet-cache-val.pkl"
            accepted += ", train_NAME.pkl and the like"
            raise refusal(path, but="the name does not say its split", accepted=accepted)
        return {split: path}
    if all((path / name).is_file() for name in _OMNIGLOT.values()):
        return {split: path / name for split, name in _OMNIGLOT.items()}
    files = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
    files = [file for file in files if _split_of(file)[0] is not None]
    found = {split: file for file, (split, _) in zip(files, map(_split_of, files), strict=True)}
    kinds = {kind for _, kind in map(_split_of, files)}
    if len(kinds) > 1 or len(found) < len(files):
        problem = f"holds files of several datasets ({', '.join(file.name for file in files)})"
        raise refusal(path, but=problem, remedy="put each dataset into a folder of its own")
    return found or None


def _split_of(path: Path) -> tuple[str | None, str]:
    """Return the split in a file's name, or None, and the rest of the name."""
    match = re.fullmatch(r"(.+[-_])(train|val|test)|(train|val|test)(_.+)", path.stem)
    if match is None:
        return None, ""
    return match[2] or match[3], match[1] or match[4]


def read_fewshot(
    files: Mapping[str, Path],
) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, list[int]]]:
    """Return images [N, H, W(, 3)], labels [N], class names and class splits of the given files.

    If classes of two splits have the same name, for example because each split counts from 0, all
    names get the split's name as a prefix. Raises ValueError for a file of unknown content.
    """
    parts = {split: _read_split(files[split]) for split in CLASS_SPLITS if split in files}
    if any(path.suffix == ".npz" for path in files.values()):
        parts = _with_omniglot_val(parts)
    names = [name for part in parts.values() for name in part.class_names]
    clash = len(set(names)) < len(names)
    images, labels, class_names, splits = [], [], [], {}
    for split, part in parts.items():
        splits[split] = list(range(len(class_names), len(class_names) + len(part.class_names)))
        labels.append(part.labels + len(class_names))
        images.append(part.images)
        class_names += [f"{split} {name}" if clash else name for name in part.class_names]
    shapes = {part.images.shape[1:] for part in parts.values()}
    if len(shapes) > 1:
        listed = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        folder, problem = next(iter(files.values())).parent, f"the splits hold images of {listed}"
        raise refusal(folder, but=problem, remedy="convert files of one dataset")
    return np.concatenate(images), np.concatenate(labels), class_names, splits


def _with_omniglot_val(parts: dict[str, SplitImages]) -> dict[str, SplitImages]:
    train = parts["train"]
    is_val = np.arange(len(train.class_names)) % _OMNIGLOT_VAL == 0
    return dict(train=_only(train, ~is_val), val=_only(train, is_val), test=parts["test"])


def _only(part: SplitImages, kept: np.ndarray) -> SplitImages:
    rows, number = kept[part.labels], np.cumsum(kept) - 1
    names = list(itertools.compress(part.class_names, kept))
    return SplitImages(part.images[rows], number[part.labels[rows]], names)


def _read_split(path: Path) -> SplitImages:
    if path.suffix == ".npz":
        return _read_omniglot(path)
    try:
        with open(path, "rb") as file:
            content = safe_pickle.load(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from None
    except ValueError as error:
        raise _damaged(path, f"is refused: {error}") from None
    if not isinstance(content, dict) or not content:
        raise _damaged(path, "holds no dictionary of images")
    content = {_text(key): value for key, value in content.items()}
    if {"data", "labels"} <= content.keys():
        return _read_labelled(path, content)
    if {"image_data", "class_dict"} <= content.keys():
        return _read_mini_imagenet(path, content)
    return _read_by_class(path, content)


def _damaged(path: Path, problem: str) -> ValueError:
    return refusal(path, but=problem, remedy="download it again")


def _read_labelled(path: Path, content: dict[str, Any]) -> SplitImages:
    """Read FC100 and CIFAR-FS: ``data`` [M, H, W, 3] and ``labels`` [M]."""
    images = _checked_images(path, "data", content["data"])
    labels = [_text(label) for label in np.asarray(content["labels"]).tolist()]
    if len(labels) != len(images):
        raise _damaged(path, f"holds {len(images)} images but {len(labels)} labels")
    return _numbered(images, labels)


def _read_mini_imagenet(path: Path, content: dict[str, Any]) -> SplitImages:
    """Read miniImageNet: ``image_data`` [M, H, W, 3], and ``class_dict`` with rows by class."""
    images = _checked_images(path, "image_data", content["image_data"])
    rows = content["class_dict"]
    if not isinstance(rows, dict):
        raise _damaged(path, "class_dict is not a dictionary")
    labels: list[str | None] = [None] * len(images)
    for name, indices in rows.items():
        for index in np.asarray(indices).tolist():
            if not (isinstance(index, int) and 0 <= index < len(images)) or labels[index]:
                problem = "which does not exist or has a class already"
                raise _damaged(path, f"class_dict names image {index}, {problem}")
            labels[index] = _text(name)
    if None in labels:
        raise _damaged(path, f"image {labels.index(None)} has no class")
    return _numbered(images, labels)


def _read_by_class(path: Path, content: dict[str, Any]) -> SplitImages:
    """Read the files of few-shot diffusion models: images [M, H, W, 3] by class."""
    parts = {name: _checked_images(path, name, value) for name, value in content.items()}
    shapes = {part.shape[1:] for part in parts.values()}
    if len(shapes) > 1:
        raise _damaged(path, "its classes hold images of different sizes")
    labels = [name for name, part in parts.items() for _ in part]
    return _numbered(np.concatenate(list(parts.values())), labels)


def _read_omniglot(path: Path) -> SplitImages:
    """Read Omniglot: one array [20, 28, 28] or [20, 784] per character, and invert its values.

    Few-shot diffusion models train on one minus the values in the files.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in sorted(file.files)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, f"cannot be read ({error})") from None
    images, labels = [], []
    for name, array in arrays.items():
        if array.dtype.kind in "bf" and array.ndim in (2, 3) and array.size:
            if not (array.min() >= 0 and array.max() <= 1):
                raise _damaged(path, f"{name} holds numbers outside 0 to 1")
            array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
        if array.ndim == 2 and array.shape[1] == _OMNIGLOT_SIDE**2:
            array = array.reshape(-1, _OMNIGLOT_SIDE, _OMNIGLOT_SIDE)
        images.append(255 - _checked_images(path, name, array))
        labels += [name] * len(array)
    return _numbered(np.concatenate(images), labels)


def _checked_images(path: Path, name: str, value: Any) -> np.ndarray:
    is_images = isinstance(value, np.ndarray) and value.dtype == np.uint8 and len(value) > 0
    if is_images and value.ndim == 4 and value.shape[3] == 1:
        value = value[..., 0]
    if not is_images or not (value.ndim == 3 or (value.ndim == 4 and value.shape[3] == 3)):
        raise _damaged(path, f"{name} holds no uint8 images [M, H, W, 3]")
    return value


def _numbered(images: np.ndarray, names: Sequence[str]) -> SplitImages:
    """Return images with classes numbered in order of their names, numeric names by value."""
    class_names = sorted(set(names), key=by_number)
    number = {name: index for index, name in enumerate(class_names)}
    return SplitImages(images, np.array([number[name] for name in names]), class_names)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
