"""Opens what ``dataset_tool.py convert`` reads: folders, zips, samples, CIFAR, MNIST and digits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.convert.cifar_mnist import MNIST_PREFIXES, find_idx, open_cifar, open_mnist
from data.convert.convert import Source, array_source
from data.convert.fewshot_sources import find_fewshot_files, read_fewshot
from data.images.archive import open_archive
from data.images.labels import read_class_splits, read_labels
from data.images.members import Archive
from data.images.samples import SampleArchive
from dnnlib.errors import refusal

_ACCEPTED = (
    "a folder of images, a zip of one, an .npz of samples in ADM's layout, cifar-10-python.tar.gz, "
    "cifar-100-python.tar.gz, train-images-idx3-ubyte[.gz] or its folder, the pickles of FC100, "
    "CIFAR-FS or miniImageNet or their folder, a folder of Omniglot's train_small.npz and "
    "test_small.npz, or digits"
)


def open_source(source: str, split: str | None = None, class_split: str | None = None) -> Source:
    """Return the images that ``--source`` names.

    ``split`` (train, test or all; train by default) is for CIFAR archives and MNIST folders, and
    an error elsewhere; ``class_split`` (fc100 or cifar-fs) is for CIFAR-100. Raises ValueError for
    anything that is none of these, or is damaged.
    """
    path = Path(source)
    is_tar = path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar"))
    if class_split is not None and path.exists() and not is_tar:
        problem = f"{source} is no CIFAR-100 archive"
        raise refusal("--class-split", class_split, but=problem, remedy="leave it out")
    if is_tar:
        if class_split is not None and split not in (None, "all"):
            problem = f"--class-split={class_split} divides the classes of all images"
            raise refusal("--split", split, but=problem, remedy="leave it out")
        return open_cifar(path, split or ("all" if class_split else "train"), class_split)
    if path.is_dir() and any(find_idx(path, kind, "images") for kind in MNIST_PREFIXES.values()):
        return open_mnist(path, split or "train")
    opener = _opener_of(source)
    if split is not None:
        remedy = "leave it out (it is for CIFAR archives and folders of MNIST files)"
        raise refusal("--split", split, but=f"{source} has no splits", remedy=remedy)
    return opener(source)


def _opener_of(source: str) -> Callable[[str], Source]:
    """Return what opens a source whose images have no splits; raises ValueError if nothing does."""
    path = Path(source)
    if not path.exists():
        if source == "digits":
            return open_digits
        raise refusal("--source", source, but="it does not exist", accepted=_ACCEPTED)
    if find_fewshot_files(path) is not None:
        return open_fewshot
    if path.is_dir() or path.suffix.lower() == ".zip":
        return open_image_files
    if "-ubyte" in path.name:
        return open_mnist
    if path.suffix.lower() == ".npz":
        return open_samples
    raise refusal("--source", source, but="it is of no known kind", accepted=_ACCEPTED)


def open_image_files(source: str) -> Source:
    """Return the images of a folder or zip, labelled by dataset.json or the first folder level.

    One folder around everything, as many zips have it, counts for neither.
    """
    archive = open_archive(source)
    folder = archive.names[0].partition("/")[0] + "/"
    if not all(name.startswith(folder) for name in archive.names):
        folder = ""
    found, splits, notes = None, {}, ()
    for root in dict.fromkeys(("", folder)):
        if archive.read_file(f"{root}dataset.json") is not None:
            found = read_labels(archive, root)
            if found is not None:
                splits = read_class_splits(archive, len(found[1]), root)
            break
    else:
        found, notes = _labels_from_folders(archive, folder)
    found = found or (None, None)
    return Source(
        str(source), len(archive), archive.member, archive.label, *found, splits or None, notes
    )


def open_samples(source: str) -> Source:
    """Return the images of an ``.npz`` sample archive, labelled if it has ``arr_1``."""
    archive = SampleArchive(Path(source))

    def item(index: int) -> np.ndarray:
        try:
            return archive.pixels(index)
        except ValueError as error:
            raise ValueError(f"{archive.label(index)}: cannot be read ({error}).") from None

    found = read_labels(archive)
    notes = () if found else ("No labels: the archive has no arr_1.",)
    labelled = found or (None, None)
    return Source(str(source), len(archive), item, archive.label, *labelled, notes=notes)


def _labels_from_folders(
    archive: Archive, folder: str
) -> tuple[tuple[np.ndarray, list[str]] | None, tuple[str, ...]]:
    """Return labels and class names by the folders inside ``folder``, if any, and notes."""
    parts = [name.removeprefix(folder).split("/") for name in archive.names]
    outside = [index for index, part in enumerate(parts) if len(part) == 1]
    if len(outside) == len(parts):
        where = f"all images are in one folder, {folder.rstrip('/')}" if folder else "no folders"
        return None, (f"No labels: {where}; give one folder per class for labels.",)
    if outside:
        problem = "lies outside the class folders that other images are in"
        remedy = "move it into one, or give every image a label in a dataset.json"
        raise refusal(archive.label(outside[0]), but=problem, remedy=remedy)
    class_names, labels = np.unique([part[0] for part in parts], return_inverse=True)
    notes = ()
    if len(class_names) == 1:
        only = str(class_names[0])
        notes = (f"One class only: the first folder level holds nothing but {only!r}.",)
    return (labels.astype(np.int64), class_names.tolist()), notes


def open_digits(source: str) -> Source:
    """Return the 1,797 handwritten digits of scikit-learn, 8x8, their 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        problem = "needs scikit-learn, which is not installed: pip install scikit-learn"
        raise ValueError(f"--source=digits {problem}") from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return array_source(source, images, digits.target, [str(name) for name in digits.target_names])


def open_fewshot(source: str) -> Source:
    """Return the images of FC100, CIFAR-FS, miniImageNet or Omniglot, with their class splits."""
    path = Path(source)
    images, labels, class_names, splits = read_fewshot(find_fewshot_files(path))
    return array_source(source, images, labels, class_names, splits)
