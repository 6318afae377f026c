"""Checks every image and label of a dataset."""

import contextlib
import dataclasses
import os
import zlib
from collections import Counter

from data.images.archive import open_archive
from data.images.decode import decode_image
from data.images.labels import more, parse_class_names, parse_labels, read_labels
from data.images.members import Archive, Member
from data.images.samples import SampleArchive
from dnnlib.parallel import process_map
from dnnlib.progress import progress


@dataclasses.dataclass(frozen=True)
class _Inspected:
    size: tuple[int, int] = (0, 0)  # Width, height.
    num_channels: int = 0
    error: str | None = None


def verify_images(path: str | os.PathLike, *, num_workers: int | None = None) -> list[str]:
    """Decode every image of a dataset and return one sentence for each problem found.

    Checks that images are readable, square, of one size and number of channels, that their
    checksums are right, and that every image has a label of a class and every label an image. In
    a sample archive, which holds pixels, there is nothing to decode.
    Raises ValueError if ``path`` is no archive of images at all.
    """
    archive = open_archive(path)
    if isinstance(archive, SampleArchive):
        return _verify_samples(archive)
    problems = _label_problems(archive)
    results = process_map(
        _inspect, map(archive.member, range(len(archive))), num_workers=num_workers
    )
    found: list[tuple[int, tuple[int, int], int]] = []
    with (
        contextlib.closing(results),
        progress(total=len(archive), label=f"Verifying {archive.path}") as bar,
    ):
        for index, result in enumerate(results):
            bar.update()
            if result.error is not None:
                problems.append(f"{archive.label(index)}: {result.error}")
            else:
                found.append((index, result.size, result.num_channels))
    if found:
        # What most images are is taken as right.
        (size, channels), _ = Counter(
            (size, channels) for _, size, channels in found
        ).most_common()[0]
        if size[0] != size[1]:
            problems.append(f"{archive.path}: images are {size[0]}x{size[1]}, not square")
        problems += [
            f"{archive.label(index)}: is {own[0]}x{own[1]} with {num} channel(s), but most images "
            f"are {size[0]}x{size[1]} with {channels}"
            for index, own, num in found
            if (own, num) != (size, channels)
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
    return list(dict.fromkeys(problems))  # Damaged labels are noticed twice.


def _inspect(member: Member) -> _Inspected:
    try:
        data = member.read()
        if member.crc is not None and zlib.crc32(data) != member.crc:
            return _Inspected(error="its bytes differ from the checksum in the zip")
        image = decode_image(data)
    except ValueError as error:
        return _Inspected(error=str(error))
    return _Inspected(size=image.size, num_channels=1 if image.mode == "L" else 3)


def _label_problems(archive: Archive) -> list[str]:
    where = f"{archive.path}/dataset.json"
    try:
        metadata = archive.metadata()
        if metadata is None or metadata.get("labels") is None:
            return []
        labels = parse_labels(metadata["labels"], where)
        class_names = parse_class_names(metadata.get("class_names"), where)
    except ValueError as error:
        return [str(error)]
    names = set(archive.names)
    problems = [
        f"{archive.path}/{name}: has no label" for name in archive.names if name not in labels
    ]
    for name, label in labels.items():
        if name not in names:
            problems.append(f"{where}: has a label for {name}, which does not exist")
        elif class_names is not None and label >= len(class_names):
            problems.append(
                f"{archive.path}/{name}: has label {label}, beyond the {len(class_names)} classes"
            )
    if len(metadata["labels"]) != len(labels):
        repeated = len(metadata["labels"]) - len(labels)
        problems.append(f"{where}: gives some images more than one label{more(repeated, 'case')}")
    return problems
