"""Opens what ``dataset_tool.py convert`` reads: folders, zips, samples, CIFAR, digits and more."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.convert.cifar_mnist import (
    is_cifar_folder,
    is_mnist_folder,
    open_cifar,
    open_mnist,
)
from data.convert.crops import Cropping, crop_images
from data.convert.fewshot_sources import find_fewshot_files, read_fewshot
from data.convert.glyphs import open_glyphs
from data.convert.labelling import BY_ITSELF, LabelChoice, label_images
from data.convert.source import Source, array_source
from data.images.archive import left_out, open_archive
from data.images.labels import read_labels
from data.images.samples import SampleArchive
from data.images.transforms import Size
from dnnlib.addresses import is_address
from dnnlib.errors import refusal
from dnnlib.files import check_source

_MINI_IMAGENET_SIDE = 84
_ACCEPTED = (
    "a folder of images, a zip of one, an .npz of samples in ADM's layout, cifar-10-python.tar.gz, "
    "cifar-100-python.tar.gz or their folders, train-images-idx3-ubyte[.gz] or its folder, the "
    "pickles of FC100, CIFAR-FS or miniImageNet or their folder, a folder of Omniglot's "
    "train_small.npz and test_small.npz, digits, or glyphs"
)
# Subfolders in which other programs put what they download.
_BELOW = ("", "cifar-10-batches-py", "cifar-100-python", "raw", "MNIST/raw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Which images of a source to convert, and how to make those that are drawn or cut out.

    Args:
        split: train, test or all (train by default), for CIFAR archives, MNIST folders, glyphs and
            crops; an error elsewhere.
        class_split: fc100 or cifar-fs, for CIFAR-100.
        choice: Which labels the images get.
        skip_broken: Leave out folders that cannot be read, and images too broken to be cropped.
        size: Width and height of the result, at which glyphs are drawn.
        crops: Number of squares to cut out of each image of a folder or zip; needs ``size``.
        max_images: With ``crops``: cut squares out of only this many images, the first ones.
        num_workers: With ``crops``: processes that measure the images; by default one per core.
    """

    split: str | None = None
    class_split: str | None = None
    choice: LabelChoice = BY_ITSELF
    skip_broken: bool = False
    size: Size | None = None
    crops: int | None = None
    max_images: int | None = None
    num_workers: int | None = None


def open_source(source: str, selection: Selection = Selection()) -> Source:
    """Return the images that ``--source`` names.

    Raises ValueError if it is not a source of images, if it is damaged, or if it does not allow
    the selection.
    """
    found = _open(source, selection)
    if selection.choice.labels == "none":
        bare = dict(labels=None, class_names=None, class_splits=None)
        return dataclasses.replace(found, **bare, origin="--labels=none")
    return found


def unconverted(path: Path) -> str | None:
    """Return the command that converts an official archive or its folder; None for other paths."""
    is_archive = path.is_file() and ("-ubyte" in path.name or _is_tar(path))
    places = [path] if is_archive else [path / name for name in _BELOW]
    for place in places:
        if is_archive or is_cifar_folder(place) or is_mnist_folder(place):
            name = place.parent.name if place.name == "raw" else place.name.partition(".")[0]
            dest = f"datasets/{name}.zip"
            return (
                f"python dataset_tool.py convert --source={shlex.quote(str(place))} --dest={dest}"
            )
    return None


def _is_tar(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz", ".tar"))


def _open(source: str, selection: Selection) -> Source:
    split, class_split, choice = selection.split, selection.class_split, selection.choice
    path = Path(source)
    is_tar = path.is_file() and _is_tar(path)
    is_cifar = is_tar or is_cifar_folder(path)
    if class_split is not None and (path.exists() or source in _BUNDLED) and not is_cifar:
        problem = f"{source} is not a CIFAR-100 archive"
        raise refusal("--class-split", class_split, but=problem, remedy="leave it out")
    is_mnist = is_mnist_folder(path)
    opener = None if is_cifar or is_mnist else _opener_of(source)
    if choice and choice.labels != "none" and opener is not open_image_files:
        problem = f"{source} has labels of its own"
        remedy = "leave it out, or give --labels=none"
        raise refusal("--labels", choice.labels or "folders", but=problem, remedy=remedy)
    if selection.crops is not None:
        if opener is not open_image_files:
            problem = f"{source} is not a folder or zip of images"
            raise refusal("--crops", selection.crops, but=problem, remedy="leave it out")
        return _open_crops(source, selection)
    if is_cifar:
        if class_split is not None and split not in (None, "all"):
            problem = f"--class-split={class_split} divides the classes of all images"
            raise refusal("--split", split, but=problem, remedy="leave it out")
        return open_cifar(path, split or ("all" if class_split else "train"), class_split)
    if is_mnist:
        return open_mnist(path, split or "train")
    if opener is open_glyphs:
        return open_glyphs(source, split or "train", selection.size)
    if split is not None:
        remedy = "leave it out (it is for CIFAR archives, MNIST folders, glyphs and --crops)"
        raise refusal("--split", split, but=f"{source} has no splits", remedy=remedy)
    if opener is open_image_files:
        return open_image_files(source, choice, selection.skip_broken)
    return opener(source)


def _opener_of(source: str) -> Callable[..., Source]:
    """Return the function that opens a source other than CIFAR; ValueError if there is none."""
    path = Path(source)
    if not path.exists():
        if source in _BUNDLED:
            return _BUNDLED[source]
        if is_address(source):
            remedy = "download the file, and give its path"
            raise refusal("--source", source, but="it is an address", remedy=remedy)
        raise refusal("--source", source, but="it does not exist", accepted=_ACCEPTED)
    check_source(path, where="--source")
    if find_fewshot_files(path) is not None:
        return open_fewshot
    if path.is_dir() or path.suffix.lower() == ".zip":
        return open_image_files
    if "-ubyte" in path.name:
        return open_mnist
    if path.suffix.lower() == ".npz":
        return open_samples
    raise refusal("--source", source, but="its kind is unknown", accepted=_ACCEPTED)


def open_image_files(
    source: str, choice: LabelChoice = BY_ITSELF, skip_broken: bool = False
) -> Source:
    """Return the images of a folder or zip, labelled by :func:`label_images`."""
    archive = open_archive(source, skip_unreadable=skip_broken, tell=False)
    found = label_images(archive, choice)
    unreadable = getattr(archive, "unreadable", [])
    return Source(
        str(source),
        len(archive),
        archive.member,
        archive.label,
        found.labels,
        found.class_names,
        found.class_splits,
        (*unreadable, *found.notes),
        found.origin,
        left_out(archive),
    )


def _open_crops(source: str, selection: Selection) -> Source:
    skip_broken = selection.skip_broken
    found = open_image_files(source, selection.choice, skip_broken)
    if selection.max_images is not None and selection.max_images < found.num_images:
        beyond = {"beyond --max-images": found.num_images - selection.max_images}
        found = dataclasses.replace(
            found, num_images=selection.max_images, left_out={**found.left_out, **beyond}
        )
    cropping = Cropping(
        num=selection.crops, resolution=selection.size[0], split=selection.split or "train"
    )
    return crop_images(found, cropping, skip_broken=skip_broken, num_workers=selection.num_workers)


def open_samples(source: str) -> Source:
    """Return the images of an ``.npz`` sample archive, labelled if it has ``arr_1``."""
    archive = SampleArchive(Path(source))

    def item(index: int) -> np.ndarray:
        try:
            return archive.pixels(index)
        except ValueError as error:
            raise ValueError(f"{archive.label(index)}: cannot be read ({error}).") from None

    found = read_labels(archive)
    origin = "arr_1" if found else "the archive has no arr_1"
    labelled = found or (None, None)
    return Source(str(source), len(archive), item, archive.label, *labelled, origin=origin)


def open_digits(source: str) -> Source:
    """Return the 1,797 handwritten 8x8 digits of scikit-learn, scaled from 0..16 to 0..255."""
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
    found = array_source(source, images, labels, class_names, splits)
    # Few-shot diffusion models reduce miniImageNet to 32x32 by area averaging.
    return dataclasses.replace(found, by_area=images.shape[1] == _MINI_IMAGENET_SIDE)


# Sources that installed packages contain.
_BUNDLED: dict[str, Callable[..., Source]] = {"digits": open_digits, "glyphs": open_glyphs}
