"""Checks every image and label of a dataset."""

import contextlib
import os
from collections import Counter

from data.images.archive import open_archive
from data.images.decode import decode_image
from data.images.labels import more, parse_class_names, parse_labels, read_labels
from data.images.members import Archive, Member
from data.images.samples import SampleArchive
from dnnlib.parallel import process_map
from dnnlib.progress import progress


def verify_images(path: str | os.PathLike, *, num_workers: int | None = None) -> list[str]:
    """Decode every image of a dataset and return one sentence for each problem found.

    Checks that images are readable, square, and of one size and number of channels, that their
    checksums are right, that each image has a valid label, and that each label has an image. Of a
    sample archive, which holds pixels, it checks the arrays and labels without decoding.

    Raises ValueError if ``path`` is no archive of images at all.
    """
    archive = open_archive(path)
    if isinstance(archive, SampleArchive):
        return _verify_samples(archive)
    problems = _label_problems(archive)
    members = map(archive.member, range(len(archive)))
    results = process_map(_inspect, members, num_workers=num_workers)
    kinds: dict[int, tuple[int, int, int]] = {}
    with (
        contextlib.closing(results),
        progress(total=len(archive), label=f"Verifying {archive.path}") as bar,
    ):
        for index, result in enumerate(results):
            bar.update()
            if isinstance(result, str):
                problems.append(f"{archive.label(index)}: {result}")
            else:
                kinds[index] = result
    if kinds:
        # The size and channels of most images count as right.
        usual = Counter(kinds.values()).most_common(1)[0][0]
        width, height, channels = usual
        if width != height:
            problems.append(f"{archive.path}: images are {width}x{height}, not square")
        problems += [
            f"{archive.label(index)}: is {own[0]}x{own[1]} with {own[2]} channel(s), but most "
            f"images are {width}x{height} with {channels}"
            for index, own in kinds.items()
            if own != usual
        ]
    return problems


def _verify_samples(archive: SampleArchive) -> list[str]:
    label = f"Verifying {archive.path}"
    with progress(total=archive.num_array_bytes, label=label, unit="B") as bar:
        problems = list(archive.check(bar.update))
    height, width = archive.image_size
    if height != width:
        problems.append(f"{archive.path}: images are {width}x{height}, not square")
    try:
        read_labels(archive)
    except ValueError as error:
        problems.append(str(error))
    return list(dict.fromkeys(problems))  # Damaged labels are found twice.


def _inspect(member: Member) -> tuple[int, int, int] | str:
    """Return width, height and channels of an image, or the reason why it cannot be used."""
    try:
        image = decode_image(member.read())
    except ValueError as error:
        return str(error)
    return *image.size, 1 if image.mode == "L" else 3


def _label_problems(archive: Archive) -> list[str]:
    where = f"{archive.path}/dataset.json"
    try:
        metadata = archive.metadata()
        if metadata.get("labels") is None:
            return []
        labels = parse_labels(metadata["labels"], where)
        class_names = parse_class_names(metadata.get("class_names"), where)
    except ValueError as error:
        return [str(error)]
    names = set(archive.names)
    unlabelled = [name for name in archive.names if name not in labels]
    problems = [f"{archive.path}/{name}: has no label" for name in unlabelled]
    for name, label in labels.items():
        if name not in names:
            problems.append(f"{where}: has a label for {name}, which does not exist")
        elif class_names is not None and label >= len(class_names):
            problem = f"has label {label}, beyond the {len(class_names)} classes"
            problems.append(f"{archive.path}/{name}: {problem}")
    repeated = len(metadata["labels"]) - len(labels)
    if repeated:
        problems.append(f"{where}: gives some images more than one label{more(repeated, 'case')}")
    return problems
