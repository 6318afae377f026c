"""The plan of a feature folder: images, buckets, splits, captions and fingerprints."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.features.buckets import Bucket, Crop, nearest_bucket, parse_buckets, plan_crop
from data.features.config import SPLITS
from data.features.manifests import shard_name
from data.features.record import (
    AGAIN,
    CLAIM_FILE,
    FEATURES,
    PATCHES,
    bits_of_facts,
    bucket_folder,
    read_feature_record,
)
from data.features.shards import Shapes
from data.images.decode import decode_image
from data.images.members import Archive
from data.resumable import map_of_ranks
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, write_json
from dnnlib.typed import parse_json, typed

IMAGES_FILE = "images.jsonl"
CLAIM_FORMAT = "setdiffit-feature-preparation"
# Increment it whenever what encoders see of an image changes, so that features are made again.
_PREPROCESSING_VERSION = 1
_ID_DIGITS = 16
_FINGERPRINT_DIGITS = 32

Key = tuple[str, str, str]  # Sample, feature and fingerprint.
Encoders = Mapping[str, Mapping[str, Any] | None]  # Facts about each feature's encoder, if known.


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedImage:
    """A sample to be made, and the image that it is made from: one line of the list of images.

    ``id`` is the sample's name and ``file`` that of the image. ``stamp`` changes with the content
    of the file, as far as size, dates and inode, or an archive's CRC-32, show that.
    """

    id: str
    file: str
    stamp: str
    sha256: str
    width: int
    height: int
    bucket: str
    split: str
    caption: str

    @property
    def crop(self) -> Crop:
        """How the image is resized and cropped to its bucket."""
        return plan_crop(self.width, self.height, Bucket.of(self.bucket))

    @property
    def caption_hash(self) -> str:
        """Identity of the caption."""
        return hashlib.sha256(self.caption.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a feature folder is to hold.

    Attributes:
        name: Name of the folder or zip of the images.
        images: The samples, ordered by name.
        encoders: Facts about the encoders, as far as they are known.
    """

    name: str = ""
    images: Sequence[PlannedImage]
    buckets: Sequence[Bucket]
    validation_share: float = 0.0
    shard_size: int = 1
    encoders: Encoders

    @functools.cached_property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """For each sample, by name, the fingerprints of all features whose encoder is known."""
        known = [feature for feature in FEATURES if self.encoders.get(feature)]
        return {
            image.id: {feature: self._fingerprint(image, feature) for feature in known}
            for image in self.images
        }

    def keys(self, image: PlannedImage) -> list[Key]:
        """Return the (sample, feature, fingerprint) keys of a sample's features."""
        return [(image.id, *pair) for pair in self.fingerprints[image.id].items()]

    def shapes(self, bucket: str) -> Shapes:
        """Return the shapes of the arrays of a bucket, given its name, as far as they are known."""
        shapes: dict[str, tuple[int | None, ...]] = {}
        size = next((b for b in self.buckets if b.name == bucket), None)
        if size is None:
            return shapes
        vae, visual, text = (self.encoders.get(feature) for feature in FEATURES)
        if vae:
            shapes["vae.npy"] = (vae["channels"], *size.latent_size(vae["downsampling"]))
        if visual:
            rows, columns = size.grid(visual["patch_size"])
            shapes["dinov3.npy"] = (visual["dim"],)
            shapes[PATCHES] = (rows * columns, visual["dim"])
        if text:
            shapes["t5h.npy"], shapes["t5m.npy"] = (None, text["dim"]), (text["max_tokens"],)
        return shapes

    def _fingerprint(self, image: PlannedImage, feature: str) -> str:
        """Return the hash of everything that a feature is made from.

        For latents and visual features it covers the image's bytes and crop, and for text features
        the caption. For all it covers the encoder's weights and settings, precision, dtype, shape,
        and a version; for patches also their bits, unless these are 16.
        """
        facts, crop, shapes = self.encoders[feature], image.crop, self.shapes(image.bucket)
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
            made_from.update(
                source=image.sha256,
                crop=[*crop.source, *crop.resized, crop.left, crop.top, *crop.bucket],
                shape=shapes["vae.npy" if feature == "vae" else PATCHES],
            )
        if feature == "visual":
            made_from.update({name: facts[name] for name in ("patch_size", "num_registers")})
            if bits_of_facts(facts) != 16:
                made_from.update(bits=bits_of_facts(facts))
        text = json.dumps(made_from, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]

    def describe(self, image: PlannedImage, truncated: bool) -> dict[str, Any]:
        """Return the content of a sample's member ``json``."""
        return dict(
            caption=image.caption,
            file=image.file,
            size=[image.width, image.height],
            crop=image.crop.to_dict(),
            bucket=image.bucket,
            split=image.split,
            source_hash=image.sha256,
            caption_hash=image.caption_hash,
            truncated=truncated,
            fingerprint=self.fingerprints[image.id],
        )

    def shards(self, folder: Path) -> dict[Path, list[PlannedImage]]:
        """Return the samples of each planned shard, in order, by the path of the shard."""
        groups: dict[tuple[str, str], list[PlannedImage]] = defaultdict(list)
        for image in self.images:
            groups[image.split, image.bucket].append(image)
        shards = {}
        for place in [(split, bucket.name) for split in SPLITS for bucket in self.buckets]:
            part = groups[place]
            for number, first in enumerate(range(0, len(part), self.shard_size)):
                path = bucket_folder(folder, *place) / shard_name(number)
                shards[path] = part[first : first + self.shard_size]
        return shards

    @property
    def source_hash(self) -> str:
        """Identity of the images with their names and captions."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.file}\n{image.sha256} {image.caption_hash}\n".encode())
        return digest.hexdigest()

    def write(self, folder: Path) -> None:
        """Write the plan to a feature folder, keeping stored facts about encoders not in use."""
        facts: Encoders = {}
        with contextlib.suppress(ValueError):
            facts, _ = read_claim(folder)
        claim = dict(
            format=CLAIM_FORMAT,
            version=1,
            name=self.name,
            buckets=[bucket.name for bucket in self.buckets],
            validation_share=self.validation_share,
            shard_size=self.shard_size,
            **{name: self.encoders.get(name) or facts.get(name) for name in FEATURES},
        )
        write_json(folder / CLAIM_FILE, claim)
        with atomic_write(folder / IMAGES_FILE, "w", encoding="utf-8") as file:
            for image in self.images:
                file.write(f"{json.dumps(dataclasses.asdict(image), ensure_ascii=False)}\n")


def scan_images(
    archive: Archive,
    names: Sequence[str],
    known: Mapping[str, PlannedImage],
    captions: Mapping[str, str],
    buckets: Sequence[Bucket],
    num_threads: int,
) -> list[PlannedImage | str]:
    """Return a sample for each image ``names`` of an archive, or the reason why it has none.

    Collective: the ranks share the images, each of which is decoded once. ``names`` are the first
    images of the archive. Samples have no split yet; their names are the first digits of the hash
    of the file name. ``known`` has the samples of an earlier plan, by file; their images are not
    read again if their stamps are unchanged.
    """

    def scan(index: int) -> PlannedImage | str:
        file, stamp = names[index], _stamp(archive, index)
        there = known.get(file)
        try:
            if there is not None and there.stamp == stamp:
                size, sha256 = (there.width, there.height), there.sha256
            else:
                data = archive.read(index)
                size, sha256 = decode_image(data).size, hashlib.sha256(data).hexdigest()
            bucket = nearest_bucket(*size, buckets)
            plan_crop(*size, bucket)
        except ValueError as error:
            return f"{archive.path}/{file}: {error}"
        name, caption = hashlib.sha256(file.encode()).hexdigest()[:_ID_DIGITS], captions.get(file)
        return PlannedImage(name, file, stamp, sha256, *size, bucket.name, "", caption or "")

    return map_of_ranks(scan, range(len(names)), num_threads, "Reading images")


def _stamp(archive: Archive, index: int) -> str:
    member = archive.member(index)
    if member.crc is not None:
        return f"{member.compressed_size} {member.crc:08x}"
    try:
        stat = os.stat(member.path)
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def with_splits(images: Sequence[PlannedImage], validation_share: float) -> list[PlannedImage]:
    """Return samples with their splits assigned, ordered by name.

    In each bucket with at least two samples, the share of those whose names sort first becomes the
    validation split: at least one if the share is not 0, and never all. Raises ValueError if two
    different files have the same sample name.
    """
    by_name: dict[str, PlannedImage] = {}
    for image in images:
        other = by_name.setdefault(image.id, image)
        if other.file != image.file:
            problem = f"has the same name in the features, {image.id}, as {other.file}"
            raise refusal(image.file, but=problem, remedy="rename one of them")
    left = {}  # By bucket: how many more samples go to validation.
    for bucket, num in Counter(image.bucket for image in by_name.values()).items():
        wanted = max(int(validation_share * num + 0.5), 1) if validation_share else 0
        left[bucket] = min(wanted, num - 1)
    planned = []
    for _, image in sorted(by_name.items()):
        split = "validation" if left[image.bucket] > 0 else "train"
        left[image.bucket] -= 1
        planned.append(dataclasses.replace(image, split=split))
    return planned


# What was planned before.


def read_claim(folder: Path) -> tuple[Encoders, tuple[Bucket, ...]]:
    """Return the encoder facts and buckets in the claim of a folder; ValueError if damaged."""
    file = folder / CLAIM_FILE
    try:
        claim = parse_json(file.read_text(encoding="utf-8"))
        facts = {feature: claim[feature] for feature in FEATURES}
        return facts, parse_buckets(",".join(claim["buckets"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {AGAIN}.") from None


def bits_there(folder: Path) -> int | None:
    """Return the bits of the patch features that a folder has or plans; None if it has none."""
    with contextlib.suppress(ValueError):
        return read_feature_record(folder).feature_bits
    with contextlib.suppress(ValueError):
        visual = read_claim(folder)[0]["visual"]
        return None if visual is None else bits_of_facts(visual)
    return None


def read_images(folder: Path) -> list[PlannedImage]:
    """Return the samples in a folder's list of images; ValueError if it is missing or damaged."""
    file = folder / IMAGES_FILE
    images: list[PlannedImage] = []
    try:
        *lines, rest = file.read_text(encoding="utf-8").split("\n")
        if rest or not lines:
            raise ValueError("it does not end with a whole line")
        for line in lines:
            image = typed(PlannedImage, parse_json(line))
            plan_crop(image.width, image.height, Bucket.of(image.bucket))  # May raise ValueError.
            images.append(image)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"{file}: damaged, line {len(images) + 1} ({error}).") from None
    return images
