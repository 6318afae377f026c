"""Reads the official archives of CIFAR-10, CIFAR-100, MNIST and its relatives."""

import dataclasses
import gzip
import io
import math
import tarfile
import zlib
from pathlib import Path

import numpy as np

from data.convert.fewshot_sources import cifar_splits
from data.convert.source import Source, array_source
from dnnlib import safe_pickle
from dnnlib.errors import refusal
from dnnlib.files import read_file

_CIFAR_FILES = {
    "cifar-10": {
        "train": [f"data_batch_{number}" for number in range(1, 6)],
        "test": ["test_batch"],
        "meta": "batches.meta",
        "label_key": b"labels",
        "names_key": b"label_names",
    },
    "cifar-100": {
        "train": ["train"],
        "test": ["test"],
        "meta": "meta",
        "label_key": b"fine_labels",
        "names_key": b"fine_label_names",
    },
}
_CIFAR_DAMAGED = "download it again from https://www.cs.toronto.edu/~kriz/cifar.html"
MNIST_PREFIXES = {"train": "train", "test": "t10k"}


def open_cifar(path: Path, split: str = "train", class_split: str | None = None) -> Source:
    """Return the images of an official CIFAR-10 or CIFAR-100 python archive (fine labels).

    ``path`` is the archive, or the folder that it unpacks to. ``class_split`` divides the classes
    of CIFAR-100 for few-shot learning: ``fc100`` or ``cifar-fs``. Raises ValueError for an archive
    that is incomplete or damaged, and for a ``class_split`` of CIFAR-10.
    """
    contents = _read_folder(path) if path.is_dir() else _read_tar(path)
    kind = "cifar-10" if "batches.meta" in contents else "cifar-100"
    if class_split is not None and kind != "cifar-100":
        problem = f"{path} is CIFAR-10, which has no such splits"
        raise refusal("--class-split", class_split, but=problem, remedy="leave it out")
    files = _CIFAR_FILES[kind]
    splits = ("train", "test") if split == "all" else (split,)
    needed = [name for part in splits for name in files[part]]
    for name in (files["meta"], *needed):
        if name not in contents:
            problem = f"has no file {name}, so it is not a CIFAR-10 or CIFAR-100 python archive"
            remedy = f"{_CIFAR_DAMAGED}, or extract another archive and give its folder"
            raise refusal(path, but=problem, remedy=remedy)
    images, labels, superclasses = [], [], []
    for name in needed:
        batch = _read_cifar_pickle(path, name, contents[name])
        data, key = batch.get(b"data"), files["label_key"]
        if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
            raise _damaged(path, f"{name} holds no uint8 image data")
        if data.shape[1] != 3072:
            raise _damaged(path, f"{name} has {data.shape[1]} values per image, expected 3072")
        if not isinstance(batch.get(key), list):
            raise _damaged(path, f"{name} has no {key.decode()}")
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += batch[key]
        superclasses += batch.get(b"coarse_labels") or [0] * len(data)
    meta = _read_cifar_pickle(path, files["meta"], contents[files["meta"]])
    names = meta.get(files["names_key"])
    if not (isinstance(names, list) and all(isinstance(name, bytes) for name in names)):
        raise _damaged(path, f"{files['meta']} names no classes")
    class_names = [name.decode() for name in names]
    source = array_source(str(path), np.concatenate(images), np.array(labels), class_names)
    if class_split is None:
        return source
    parts = cifar_splits(class_split, class_names, source.labels, superclasses, path)
    return dataclasses.replace(source, class_splits=parts)


def _damaged(path: Path, problem: str) -> ValueError:
    return refusal(path, but=problem, remedy=_CIFAR_DAMAGED)


def is_cifar_folder(path: Path) -> bool:
    """Return whether a path is a folder unpacked from a CIFAR archive."""
    kinds = _CIFAR_FILES.values()
    return any(
        all((path / name).is_file() for name in (files["meta"], *files["test"])) for files in kinds
    )


def _wanted() -> set[str]:
    kinds = _CIFAR_FILES.values()
    return {name for files in kinds for name in (*files["train"], *files["test"], files["meta"])}


def _read_folder(path: Path) -> dict[str, bytes]:
    return {name: read_file(path / name) for name in _wanted() if (path / name).is_file()}


def _read_tar(path: Path) -> dict[str, bytes]:
    """Return the contents of a CIFAR archive's data files by their names without folders."""
    contents, wanted = {}, _wanted()
    try:
        with tarfile.open(path) as file:
            for member in file:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name in wanted:
                    contents[name] = file.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"not a tar archive, or only part of one ({error})") from None
    return contents


def _read_cifar_pickle(path: Path, name: str, content: bytes) -> dict:
    try:
        value = safe_pickle.load(io.BytesIO(content))
    except ValueError as error:
        raise _damaged(path, f"{name} is refused: {error}") from None
    if not isinstance(value, dict):
        raise _damaged(path, f"{name} holds no dictionary")
    return value


def open_mnist(path: str | Path, split: str = "train") -> Source:
    """Return MNIST or a relative of it, from an idx3 file of images or a folder of idx files.

    An idx3 file must have the file of its labels beside it. ``split`` applies only to a folder.
    Raises ValueError if a file is missing or damaged.
    """
    path = Path(path)
    image_files = [path]
    if path.is_dir():
        splits = ("train", "test") if split == "all" else (split,)
        image_files = [find_idx(path, MNIST_PREFIXES[part], "images") for part in splits]
        if None in image_files:
            prefix = MNIST_PREFIXES[splits[image_files.index(None)]]
            problem = f"has no {prefix}-images-idx3-ubyte[.gz], which --split={split} needs"
            raise refusal(path, but=problem)
    images, labels = [], []
    for image_file in image_files:
        prefix, kind, _ = image_file.name.partition("-images")
        if not kind:
            wanted = f"{prefix.partition('-')[0]}-images-idx3-ubyte[.gz]"
            remedy = f"give {wanted}, beside which the labels are found"
            raise refusal(image_file, but="is not a file of images", remedy=remedy)
        label_file = find_idx(image_file.parent, prefix, "labels")
        if label_file is None:
            remedy = f"put {prefix}-labels-idx1-ubyte[.gz] into the same folder"
            raise refusal(image_file, but="has no labels beside it", remedy=remedy)
        images.append(_read_idx(image_file, num_dims=3))
        labels.append(_read_idx(label_file, num_dims=1))
        if len(images[-1]) != len(labels[-1]):
            problem = f"holds {len(labels[-1])} labels for the {len(images[-1])} images of"
            raise refusal(label_file, but=f"{problem} {image_file.name}")
    if len({part.shape[1:] for part in images}) > 1:
        raise ValueError(f"{path}: the images of the two splits differ in size; convert one split.")
    all_labels = np.concatenate(labels)
    class_names = [str(index) for index in range(int(all_labels.max(initial=9)) + 1)]
    return array_source(str(path), np.concatenate(images), all_labels, class_names)


def is_mnist_folder(path: Path) -> bool:
    """Return whether a path is a folder with the images of any split of MNIST or a relative."""
    return path.is_dir() and any(find_idx(path, p, "images") for p in MNIST_PREFIXES.values())


def find_idx(folder: Path, prefix: str, kind: str) -> Path | None:
    """Return the idx file of a split's ``images`` or ``labels`` in a folder, or None."""
    dims = {"images": 3, "labels": 1}[kind]
    names = (f"{prefix}-{kind}{separator}idx{dims}-ubyte" for separator in "-.")
    paths = (folder / f"{name}{ending}" for name in names for ending in ("", ".gz"))
    return next(filter(Path.is_file, paths), None)


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Return the uint8 array of an idx file (format: http://yann.lecun.com/exdb/mnist/)."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); download it again.") from None
    start = 4 + 4 * num_dims
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist()) if len(data) >= start else ()
    if data[:4] != bytes([0, 0, 8, num_dims]) or not shape:
        problem = f"is not an idx file of unsigned bytes in {num_dims} dimension(s)"
    elif len(data) - start != math.prod(shape):
        problem = f"should hold {math.prod(shape)} values ({shape}) but has {len(data) - start}"
    else:
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    raise refusal(path, but=problem, remedy="download it again")
