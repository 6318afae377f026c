"""What a feature folder is to hold: images, buckets, splits, captions, and what features are of."""

import dataclasses
import hashlib
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.features.buckets import Bucket, Crop, nearest_bucket, plan_crop
from data.features.record import FEATURES, SPLITS, bucket_folder, shard_name
from data.features.shards import Shapes, ShardIndex, to_json
from data.images.decode import decode_image
from data.images.members import Archive
from dnnlib.files import atomic_write
from dnnlib.progress import progress
from torch_utils import distributed

IMAGES_FILE = "images.jsonl"
# Raised when what an encoder sees of an image changes, so that features are made again.
_PREPROCESSING_VERSION = 1
_ID_DIGITS = 16
_FINGERPRINT_DIGITS = 32
_LOOK_AHEAD = 4  # Images per thread.

Encoders = Mapping[str, Mapping[str, Any] | None]  # The facts of each of FEATURES, if known.


@dataclasses.dataclass(frozen=True, slots=True)
class Scanned:
    """What is known of an image file: its bytes, its upright size, or why it cannot be used.

    ``stamp`` changes when the file does, as far as the file system tells.
    """

    file: str
    stamp: str
    sha256: str = ""
    width: int = 0
    height: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedImage:
    """One sample to be made."""

    id: str
    scanned: Scanned
    bucket: Bucket
    split: str
    crop: Crop
    caption: str

    @property
    def caption_hash(self) -> str:
        """Identity of the caption."""
        return hashlib.sha256(self.caption.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """One shard to be made: its place, and its samples in order."""

    split: str
    bucket: Bucket
    number: int
    images: tuple[PlannedImage, ...]

    def path(self, folder: Path) -> Path:
        """Return where it lies in a feature folder."""
        return bucket_folder(folder, self.split, self.bucket.name) / shard_name(self.number)


# Images.


def scan_images(
    archive: Archive,
    indices: Sequence[int],
    known: Mapping[str, Scanned],
    buckets: Sequence[Bucket],
    num_threads: int,
) -> list[Scanned]:
    """Return what is known of images, in order. Collective: ranks share the work.

    Every image is decoded once; ``known`` has the images of an earlier scan, by file name, which
    are not read again if their stamp is the same.
    """
    mine = indices[distributed.rank() :: distributed.world_size()]

    def scan(index: int) -> Scanned:
        file, stamp = archive.names[index], _stamp(archive, index)
        found = known.get(file)
        if found is None or found.stamp != stamp:
            try:
                data = archive.read(index)
                image = decode_image(data)
                digest = hashlib.sha256(data).hexdigest()
                found = Scanned(file, stamp, digest, image.width, image.height)
            except ValueError as error:
                return Scanned(file, stamp, error=str(error))
        try:
            plan_crop(found.width, found.height, _bucket_of(found, buckets))
        except ValueError as error:
            return dataclasses.replace(found, error=str(error))
        return found

    total, is_main = len(indices), distributed.is_main()
    with (
        distributed.together(),
        ThreadPoolExecutor(num_threads) as pool,
        progress(total=total, label="Reading images", disable=not is_main) as bar,
    ):
        found = []
        for first in range(0, len(mine), _LOOK_AHEAD * num_threads):
            part = list(pool.map(scan, mine[first : first + _LOOK_AHEAD * num_threads]))
            found += part
            bar.update(len(part) * distributed.world_size())
    parts = distributed.gather_objects(found)
    result: list[Scanned] = [None] * len(indices)
    for rank, part in enumerate(parts):
        result[rank :: len(parts)] = part
    return result


def _stamp(archive: Archive, index: int) -> str:
    member = archive.member(index)
    if member.crc is not None:
        return f"{member.compressed_size} {member.crc:08x}"
    try:
        stat = os.stat(member.path)
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _bucket_of(scanned: Scanned, buckets: Sequence[Bucket]) -> Bucket:
    return nearest_bucket(scanned.width, scanned.height, buckets)


def plan_images(
    scanned: Sequence[Scanned],
    captions: Sequence[str],
    buckets: Sequence[Bucket],
    validation_share: float,
) -> list[PlannedImage]:
    """Return the samples to be made, ordered by name.

    A name is the first digits of a hash of the file's name. Of each bucket with two images or
    more, the share with the lowest names validates, at least one image if the share is not 0, and
    never all. Raises ValueError if two names are equal.
    """
    groups: dict[Bucket, list[tuple[str, Scanned, str]]] = defaultdict(list)
    names: dict[str, str] = {}
    for image, caption in zip(scanned, captions, strict=True):
        name = hashlib.sha256(image.file.encode()).hexdigest()[:_ID_DIGITS]
        if names.setdefault(name, image.file) != image.file:
            raise ValueError(
                f"{image.file}: has the same name in the features, {name}, as {names[name]}; "
                "rename one of them."
            )
        groups[_bucket_of(image, buckets)].append((name, image, caption))
    planned = []
    for bucket, group in groups.items():
        num_validation = 0
        if validation_share and len(group) > 1:
            wanted = int(validation_share * len(group) + 0.5)
            num_validation = min(max(wanted, 1), len(group) - 1)
        for rank, (name, image, caption) in enumerate(sorted(group, key=lambda row: row[0])):
            split = "validation" if rank < num_validation else "train"
            crop = plan_crop(image.width, image.height, bucket)
            planned.append(PlannedImage(name, image, bucket, split, crop, caption))
    return sorted(planned, key=lambda image: image.id)


def plan_shards(
    images: Sequence[PlannedImage], buckets: Sequence[Bucket], shard_size: int
) -> list[PlannedShard]:
    """Return the shards to be made of the samples."""
    shards = []
    for split in SPLITS:
        for bucket in buckets:
            part = [i for i in images if (i.split, i.bucket) == (split, bucket)]
            for number, first in enumerate(range(0, len(part), shard_size)):
                rows = tuple(part[first : first + shard_size])
                shards.append(PlannedShard(split, bucket, number, rows))
    return shards


def hash_of_source(images: Sequence[PlannedImage]) -> str:
    """Return the identity of names, images and captions."""
    digest = hashlib.sha256()
    for image in images:
        scanned = image.scanned
        digest.update(f"{scanned.file}\n{scanned.sha256} {image.caption_hash}\n".encode())
    return digest.hexdigest()


def write_images(folder: Path, images: Sequence[PlannedImage]) -> None:
    """Write the list of samples to be made."""
    with atomic_write(folder / IMAGES_FILE, "w", encoding="utf-8") as file:
        for image in images:
            row = dict(
                id=image.id,
                **{k: v for k, v in dataclasses.asdict(image.scanned).items() if k != "error"},
                bucket=image.bucket.name,
                split=image.split,
                caption=image.caption,
            )
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_images(folder: Path) -> list[PlannedImage]:
    """Return the list of samples that were to be made.

    Raises ValueError if it is missing or damaged.
    """
    file = folder / IMAGES_FILE
    images = []
    try:
        *lines, rest = file.read_text(encoding="utf-8").split("\n")
        if rest or not lines:
            raise ValueError("it does not end with a whole line")
        for line in lines:
            row = json.loads(line)
            width, height = (int(side) for side in row["bucket"].split("x"))
            bucket = Bucket(width, height)
            scanned = Scanned(
                *(str(row[key]) for key in ("file", "stamp", "sha256")),
                *(int(row[key]) for key in ("width", "height")),
            )
            crop = plan_crop(scanned.width, scanned.height, bucket)
            split, caption = str(row["split"]), str(row["caption"])
            images.append(PlannedImage(str(row["id"]), scanned, bucket, split, crop, caption))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: damaged, line {len(images) + 1} ({error!r}).") from None
    return images


# Features.


def shapes_of(bucket: Bucket, encoders: Encoders) -> Shapes:
    """Return what arrays of a bucket look like, as far as the encoders are known."""
    vae, visual, text = (encoders.get(feature) for feature in FEATURES)
    shapes: dict[str, Any] = {}
    if vae:
        size = bucket.latent_size(vae["downsampling"])
        shapes.update(latent_shape=(vae["channels"], *size))
    if visual:
        rows, columns = bucket.grid(visual["patch_size"])
        shapes.update(num_patches=rows * columns, visual_dim=visual["dim"])
    if text:
        shapes.update(text_dim=text["dim"], max_tokens=text["max_tokens"])
    return Shapes(**shapes)


def fingerprint_of(image: PlannedImage, feature: str, encoders: Encoders) -> str | None:
    """Return the identity of all that a feature is made from; None if its encoder is not known.

    Of the autoencoder and the visual encoder: the image's bytes and its crop; of the text encoder:
    the caption. Of all: weights and settings, precision, type and shape, and a version.
    """
    facts = encoders.get(feature)
    if facts is None:
        return None
    made_from: dict[str, Any] = dict(
        feature=feature,
        encoder=facts["hash"],
        precision=facts["precision"],
        version=_PREPROCESSING_VERSION,
        dtype="float16",
    )
    if feature == "text":
        made_from.update(caption=image.caption_hash, shape=[facts["max_tokens"], facts["dim"]])
    else:
        crop, shapes = image.crop, shapes_of(image.bucket, encoders)
        made_from.update(
            source=image.scanned.sha256,
            crop=[*crop.source, *crop.resized, crop.left, crop.top, *crop.bucket],
        )
        if feature == "vae":
            made_from.update(shape=shapes.latent_shape)
        else:
            made_from.update(
                patch_size=facts["patch_size"],
                num_registers=facts["num_registers"],
                shape=[shapes.num_patches, shapes.visual_dim],
            )
    text = json.dumps(made_from, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]


def describe_sample(
    image: PlannedImage, fingerprints: Mapping[str, str], truncated: bool
) -> dict[str, Any]:
    """Return the content of a sample's member ``json``."""
    return dict(
        caption=image.caption,
        file=image.scanned.file,
        size=[image.scanned.width, image.scanned.height],
        crop=image.crop.to_dict(),
        bucket=image.bucket.name,
        split=image.split,
        source_hash=image.scanned.sha256,
        caption_hash=image.caption_hash,
        truncated=truncated,
        fingerprint=dict(fingerprints),
    )


def is_right(
    shard: PlannedShard,
    index: ShardIndex | None,
    fingerprints: Mapping[str, Mapping[str, str]],
) -> bool:
    """Tell whether a shard that exists holds exactly the samples that it should.

    ``fingerprints`` has those that the features of each sample should have.
    """
    if index is None or not index.sha256 or index.ids != [image.id for image in shard.images]:
        return False
    for row, image in enumerate(shard.images):
        wanted = fingerprints[image.id]
        if any(index.fingerprint[feature][row] != wanted[feature] for feature in FEATURES):
            return False
        description = describe_sample(image, wanted, index.truncated[row])
        if zlib.crc32(to_json(description)) != index.crc32["json"][row]:
            return False
    return True
