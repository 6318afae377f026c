"""Opens what ``dataset_tool.py convert`` reads: folders, zips, samples, CIFAR, MNIST and digits."""

import dataclasses
import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dnnlib import safe_pickle
from training.archive import Archive, Member, SampleArchive, open_archive
from training.fewshot_sources import cifar_splits, find_fewshot_files, read_fewshot
from training.labels import read_class_splits, read_labels

SPLITS = ("train", "test", "all")
_ACCEPTED = (
    "a folder of images, a zip of one, an .npz of samples in ADM's layout, cifar-10-python.tar.gz, "
    "cifar-100-python.tar.gz, train-images-idx3-ubyte[.gz] or its folder, the pickles of FC100, "
    "CIFAR-FS or miniImageNet or their folder, a folder of Omniglot's train_small.npz and "
    "test_small.npz, or digits"
)
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
_MNIST_PREFIXES = {"train": "train", "test": "t10k"}
_CIFAR_DAMAGED = "download it again from https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclasses.dataclass(frozen=True)
class Source:
    """Images to convert, in order.

    Attributes:
        name: What the user called it.
        num_images: Number of images.
        item: Maps an index to an image: where its file lies, or uint8 pixels [H, W] or [H, W, 3].
        image_name: Maps an index to the image's name, for messages.
        labels: Class index of every image, or None.
        class_names: One name per class, or None without labels.
        class_splits: Class indices of each split of the classes, or None.
        notes: Sentences that the user should read.
    """

    name: str
    num_images: int
    item: Callable[[int], Member | np.ndarray]
    image_name: Callable[[int], str]
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    class_splits: Mapping[str, Sequence[int]] | None = None
    notes: tuple[str, ...] = ()


def open_source(source: str, split: str | None = None, class_split: str | None = None) -> Source:
    """Return the images that ``--source`` names.

    ``split`` (train, test or all; train by default) is for CIFAR archives and MNIST folders, and
    an error elsewhere; ``class_split`` (fc100 or cifar-fs) is for CIFAR-100. Raises ValueError for
    anything that is none of these, or is damaged.
    """
    path = Path(source)
    is_archive = path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar"))
    if class_split is not None and path.exists() and not is_archive:
        raise ValueError(
            f"--class-split: got {class_split}, but {source} is no CIFAR-100 archive; leave it out."
        )
    if source == "digits" and not path.exists():
        return _without_split(open_digits, source, split)
    if not path.exists():
        raise ValueError(f"--source: got {source}, which does not exist; accepted: {_ACCEPTED}.")
    if path.is_dir():
        if any(_find_idx(path, kind, "images") for kind in _MNIST_PREFIXES.values()):
            return open_mnist(path, split or "train")
        if find_fewshot_files(path) is not None:
            return _without_split(open_fewshot, source, split)
        return _without_split(open_images, source, split)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        if class_split is not None and split not in (None, "all"):
            raise ValueError(
                f"--split: got {split}, but --class-split={class_split} divides the classes of all "
                "images; leave it out."
            )
        return open_cifar(path, split or ("all" if class_split else "train"), class_split)
    if "-ubyte" in path.name:
        return _without_split(open_mnist, source, split)
    if path.suffix.lower() == ".npz":
        return _without_split(open_samples, source, split)
    if find_fewshot_files(path) is not None:
        return _without_split(open_fewshot, source, split)
    if path.suffix.lower() != ".zip":
        raise ValueError(
            f"--source: got {source}, which is of no known kind; accepted: {_ACCEPTED}."
        )
    return _without_split(open_images, source, split)


def _without_split(opener: Callable[..., Source], source: str, split: str | None) -> Source:
    if split is not None:
        raise ValueError(
            f"--split: got {split}, but {source} has no splits; leave it out (it is for CIFAR "
            "archives and folders of MNIST files)."
        )
    return opener(source)


def open_images(source: str) -> Source:
    """Return the images of a folder or zip, labelled by dataset.json or the first folder level.

    One folder around everything, as many zips have it, counts for neither.
    """
    archive = open_archive(source)
    folder = _common_folder(archive.names)
    found, splits, notes = None, {}, ()
    for root in dict.fromkeys(("", folder)):
        if archive.read_file(f"{root}dataset.json") is not None:
            found = read_labels(archive, root)
            if found is not None:
                splits = read_class_splits(archive, len(found[1]), root)
            break
    else:
        found, notes = _labels_from_folders(archive, folder)
    labels, class_names = found or (None, None)
    return Source(
        name=str(source),
        num_images=len(archive),
        item=archive.member,
        image_name=archive.label,
        labels=labels,
        class_names=class_names,
        class_splits=splits or None,
        notes=notes,
    )


def open_samples(source: str) -> Source:
    """Return the images of an ``.npz`` sample archive, labelled if it has ``arr_1``."""
    archive = SampleArchive(Path(source))

    def item(index: int) -> np.ndarray:
        try:
            return archive.pixels(index)
        except ValueError as error:
            raise ValueError(f"{archive.label(index)}: cannot be read ({error}).") from None

    labels, class_names = read_labels(archive) or (None, None)
    return Source(
        name=str(source),
        num_images=len(archive),
        item=item,
        image_name=archive.label,
        labels=labels,
        class_names=class_names,
        notes=() if labels is not None else ("No labels: the archive has no arr_1.",),
    )


def _common_folder(names: Sequence[str]) -> str:
    first = names[0].partition("/")[0] + "/"
    return first if all(name.startswith(first) for name in names) else ""


def _labels_from_folders(
    archive: Archive, folder: str
) -> tuple[tuple[np.ndarray, list[str]] | None, tuple[str, ...]]:
    parts = [name.removeprefix(folder).split("/") for name in archive.names]
    outside = [index for index, part in enumerate(parts) if len(part) == 1]
    if len(outside) == len(parts):
        where = f"all images are in one folder, {folder.rstrip('/')}" if folder else "no folders"
        return None, (f"No labels: {where}; give one folder per class for labels.",)
    if outside:
        raise ValueError(
            f"{archive.label(outside[0])}: lies outside the class folders that other images are "
            "in; move it into one, or give every image a label in a dataset.json."
        )
    class_names = sorted({part[0] for part in parts})
    index = {name: number for number, name in enumerate(class_names)}
    labels = np.array([index[part[0]] for part in parts], np.int64)
    notes = ()
    if len(class_names) == 1:
        notes = (f"One class only: the first folder level holds nothing but {class_names[0]!r}.",)
    return (labels, class_names), notes


def _array_source(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    class_splits: Mapping[str, Sequence[int]] | None = None,
) -> Source:
    labels = np.asarray(labels, np.int64)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: holds {len(images)} images but {labels.size} labels.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        bad = int(np.flatnonzero((labels < 0) | (labels >= len(class_names)))[0])
        raise ValueError(
            f"{name}: image {bad} has label {labels[bad]}, beyond the {len(class_names)} classes."
        )
    return Source(
        name=name,
        num_images=len(images),
        item=images.__getitem__,
        image_name=lambda index: f"{name}, image {index}",
        labels=labels,
        class_names=list(class_names),
        class_splits=class_splits,
    )


def open_digits(source: str = "digits") -> Source:
    """Return the 1,797 handwritten digits of scikit-learn, 8x8, their 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "--source=digits needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return _array_source(source, images, digits.target, [str(name) for name in digits.target_names])


def open_fewshot(source: str) -> Source:
    """Return the images of FC100, CIFAR-FS, miniImageNet or Omniglot, with their class splits."""
    path = Path(source)
    images, labels, class_names, splits = read_fewshot(find_fewshot_files(path))
    return _array_source(source, images, labels, class_names, splits)


def open_cifar(path: Path, split: str = "train", class_split: str | None = None) -> Source:
    """Return the images of an official CIFAR-10 or CIFAR-100 python archive (fine labels).

    ``class_split`` divides the classes of CIFAR-100, as ``fc100`` or ``cifar-fs`` do.
    """
    contents = _read_tar(path)
    kind = "cifar-10" if "batches.meta" in contents else "cifar-100"
    if class_split is not None and kind != "cifar-100":
        raise ValueError(
            f"--class-split: got {class_split}, but {path} is CIFAR-10, which has no such splits; "
            "leave it out."
        )
    files = _CIFAR_FILES[kind]
    splits = ("train", "test") if split == "all" else (split,)
    needed = [name for part in splits for name in files[part]]
    for name in (files["meta"], *needed):
        if name not in contents:
            raise ValueError(
                f"{path}: has no file {name}, so it is no CIFAR-10 or CIFAR-100 python archive; "
                f"{_CIFAR_DAMAGED}, or extract another archive and give its folder."
            )
    images, labels, superclasses = [], [], []
    for name in needed:
        batch = _read_cifar_pickle(path, name, contents[name])
        data = batch.get(b"data")
        if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
            raise ValueError(f"{path}: {name} holds no uint8 image data; {_CIFAR_DAMAGED}.")
        if data.shape[1] != 3072:
            raise ValueError(
                f"{path}: {name} has {data.shape[1]} values per image, expected 3072; "
                f"{_CIFAR_DAMAGED}."
            )
        if not isinstance(batch.get(files["label_key"]), list):
            raise ValueError(
                f"{path}: {name} has no {files['label_key'].decode()}; {_CIFAR_DAMAGED}."
            )
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += batch[files["label_key"]]
        superclasses += batch.get(b"coarse_labels") or [0] * len(data)
    meta = _read_cifar_pickle(path, files["meta"], contents[files["meta"]])
    names = meta.get(files["names_key"])
    if not (isinstance(names, list) and all(isinstance(name, bytes) for name in names)):
        raise ValueError(f"{path}: {files['meta']} names no classes; {_CIFAR_DAMAGED}.")
    class_names = [name.decode() for name in names]
    source = _array_source(str(path), np.concatenate(images), np.array(labels), class_names)
    if class_split is None:
        return source
    splits = cifar_splits(
        class_split, class_names, source.labels, np.array(superclasses), str(path)
    )
    return dataclasses.replace(source, class_splits=splits)


def _read_tar(path: Path) -> dict[str, bytes]:
    """Return the regular files of a CIFAR archive by the last part of their name."""
    wanted = {"batches.meta", "meta", "train", "test", "test_batch"}
    wanted.update(_CIFAR_FILES["cifar-10"]["train"])
    contents = {}
    try:
        with tarfile.open(path) as file:
            for member in file:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name in wanted:
                    contents[name] = file.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a tar archive, or only part of one ({error}); {_CIFAR_DAMAGED}."
        ) from None
    return contents


def _read_cifar_pickle(path: Path, name: str, content: bytes) -> dict:
    try:
        value = safe_pickle.load(io.BytesIO(content))
    except ValueError as error:
        raise ValueError(f"{path}: {name} is refused: {error}; {_CIFAR_DAMAGED}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} holds no dictionary; {_CIFAR_DAMAGED}.")
    return value


def open_mnist(path: str | Path, split: str = "train") -> Source:
    """Return MNIST or a relative of it, from an idx3 file or the folder of the idx files."""
    path = Path(path)
    if path.is_dir():
        splits = ("train", "test") if split == "all" else (split,)
        image_files = []
        for part in splits:
            found = _find_idx(path, _MNIST_PREFIXES[part], "images")
            if found is None:
                raise ValueError(
                    f"{path}: has no {_MNIST_PREFIXES[part]}-images-idx3-ubyte[.gz], which "
                    f"--split={split} needs."
                )
            image_files.append(found)
    else:
        image_files = [path]
    images, labels = [], []
    for image_file in image_files:
        prefix, kind, _ = image_file.name.partition("-images")
        if not kind:
            raise ValueError(
                f"{image_file}: is no file of images; give {prefix.partition('-')[0]}-images-idx3-"
                "ubyte[.gz], beside which the labels are found."
            )
        label_file = _find_idx(image_file.parent, prefix, "labels")
        if label_file is None:
            raise ValueError(
                f"{image_file}: has no labels beside it; put {prefix}-labels-idx1-ubyte[.gz] into "
                "the same folder."
            )
        images.append(_read_idx(image_file, num_dims=3))
        labels.append(_read_idx(label_file, num_dims=1))
        if len(images[-1]) != len(labels[-1]):
            raise ValueError(
                f"{label_file}: holds {len(labels[-1])} labels for the {len(images[-1])} images "
                f"of {image_file.name}."
            )
    if len({part.shape[1:] for part in images}) > 1:
        raise ValueError(f"{path}: the images of the two splits differ in size; convert one split.")
    all_labels = np.concatenate(labels)
    class_names = [str(index) for index in range(int(all_labels.max(initial=9)) + 1)]
    return _array_source(str(path), np.concatenate(images), all_labels, class_names)


def _find_idx(folder: Path, prefix: str, kind: str) -> Path | None:
    dims = {"images": 3, "labels": 1}[kind]
    for separator in ("-", "."):
        for ending in ("", ".gz"):
            path = folder / f"{prefix}-{kind}{separator}idx{dims}-ubyte{ending}"
            if path.is_file():
                return path
    return None


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Return the uint8 array of an idx file, described at http://yann.lecun.com/exdb/mnist/."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); download it again.") from None
    start = 4 + 4 * num_dims
    if data[:4] != bytes([0, 0, 8, num_dims]) or len(data) < start:
        raise ValueError(
            f"{path}: is no idx file of unsigned bytes in {num_dims} dimension(s); download it "
            "again."
        )
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path}: should hold {math.prod(shape)} values ({shape}) but has "
            f"{len(data) - start}; download it again."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
