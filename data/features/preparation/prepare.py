"""Makes a feature folder from captioned images, on any number of ranks, resumable at any time."""

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.features.buckets import DEFAULT_BUCKETS, Bucket
from data.features.preparation import pack
from data.features.preparation.captions import read_captions, require_captions
from data.features.preparation.encode import FeatureEncoder
from data.features.preparation.plan import (
    Plan,
    PlannedImage,
    bits_there,
    read_images,
    scan_images,
    with_splits,
)
from data.features.preparation.stage import Stage
from data.features.record import FEATURES, FeatureRecord, is_feature_folder
from data.images.archive import open_archive
from data.images.members import Archive
from data.images.samples import SampleArchive
from data.resumable import check_folder, locked, map_of_ranks
from dnnlib.errors import refusal
from dnnlib.parallel import num_cores_of_rank
from encoders.autoencoder import AUTOENCODER, load_autoencoder
from encoders.text import TEXT, load_text_encoder
from encoders.visual import VISUAL, load_visual_encoder
from torch_utils import distributed

_ENCODERS = {
    "vae": (AUTOENCODER, load_autoencoder),
    "visual": (VISUAL, load_visual_encoder),
    "text": (TEXT, load_text_encoder),
}
_MAX_THREADS = 16
_NUM_BROKEN_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """How features are made from images.

    ``batch_size`` and ``num_threads`` affect the speed; all else determines the result.
    """

    captions: str | None = None
    caption_key: str | None = None
    buckets: tuple[Bucket, ...] = DEFAULT_BUCKETS
    validation_share: float = 0.02
    shard_size: int = 64
    precision: str = "fp32"
    feature_bits: int = 16  # Of patch features: 16 or 8.
    max_images: int | None = None
    skip_broken: bool = False
    only: str | None = None
    overwrite: bool = False
    batch_size: int = 8
    num_threads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a preparation did.

    Attributes:
        record: The folder's record; None if only one feature was prepared.
        num_images: Number of samples that the folder is to hold.
        num_made: Number of each feature that this preparation made.
        num_packed: Number of shards that this preparation wrote.
        skipped: Sentences about the images that were left out.
    """

    record: FeatureRecord | None
    num_images: int
    num_made: dict[str, int]
    num_packed: int
    skipped: tuple[str, ...]


def prepare(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    locations: Mapping[str, str | None],
    preparation: Preparation,
    device: torch.device,
) -> Outcome:
    """Make the feature folder ``dest`` from captioned images. Collective.

    Existing features that are still valid are used again, whatever else has changed: a fingerprint
    of everything that a feature is made from identifies it. A preparation that was killed at any
    moment thus continues when it is started again, with any number of ranks. The folder is complete
    when its record appears.

    Args:
        source: Folder or zip of images.
        locations: For each of FEATURES, the local folder or Hugging Face id of its encoder.

    Raises ValueError if images, captions and encoders do not fit together, or if ``dest`` holds
    anything else.
    """
    dest = Path(dest)
    num_threads = preparation.num_threads or num_cores_of_rank(_MAX_THREADS)
    with distributed.together():
        _check_options(dest, locations, preparation)
        archive, captions = _open(source, preparation)
    encoders = _load_encoders(locations, preparation, device)
    with locked(dest, "preparing"):
        images, skipped = _plan_images(archive, dest, captions, preparation, num_threads)
        plan = Plan(
            name=archive.path.stem,
            images=images,
            buckets=preparation.buckets,
            validation_share=preparation.validation_share,
            shard_size=preparation.shard_size,
            encoders=_facts_of(encoders, preparation.feature_bits),
        )
        sizes = preparation.batch_size, num_threads
        encoder = FeatureEncoder(plan, archive, encoders, Stage(dest), *sizes)
        record, num_packed = None, 0
        if preparation.only is not None:
            _stage_missing(dest, encoder)
        else:
            if preparation.overwrite:
                distributed.on_main(lambda: pack.remove_all(dest, encoder.stage))
            record, num_packed = _make_all(dest, encoder)
        made = sum(distributed.gather_objects(encoder.num_made), collections.Counter())
        return Outcome(
            record=record,
            num_images=len(images),
            num_made={feature: made[feature] for feature in FEATURES},
            num_packed=num_packed,
            skipped=tuple(skipped),
        )


# No valid feature is deleted before it is stored elsewhere: it moves from its encoder, or from an
# outdated shard, to the stage, and from there to its shard.


def _stage_missing(folder: Path, encoder: FeatureEncoder) -> None:
    """Stage missing features of the plan; leave shards and record unchanged. Collective."""
    plan, num_threads = encoder.plan, encoder.num_threads
    distributed.on_main(lambda: plan.write(folder))
    there = pack.staged_keys(plan, encoder.stage, num_threads)
    for _, keys in pack.look_at_shards(folder, plan, num_threads).values():
        there.update(keys)
    encoder.encode(plan.shards(folder), there)


def _make_all(folder: Path, encoder: FeatureEncoder) -> tuple[FeatureRecord, int]:
    """Make everything in the plan; return the record and number of shards written. Collective."""
    plan, stage, num_threads = encoder.plan, encoder.stage, encoder.num_threads
    found = pack.look_at_shards(folder, plan, num_threads)
    right = {path for path, (is_right, _) in found.items() if is_right}
    others = [path for path in found if path not in right]
    missing = {path: images for path, images in plan.shards(folder).items() if path not in right}

    def claim() -> None:
        plan.write(folder)
        if others or missing:
            pack.open_up(folder)

    distributed.on_main(claim)
    there = pack.staged_keys(plan, stage, num_threads)
    unpack = functools.partial(pack.unpack, plan=plan, stage=stage, staged=there)
    # One at a time, because each of them takes up space twice for a while.
    unpacked = map_of_ranks(unpack, others, 1, "Unpacking shards", "shard")
    there = there.union(*unpacked)
    encoder.encode(missing, there, lambda path: pack.pack(path, plan, missing[path], stage))
    return distributed.on_main(lambda: pack.finish(folder, plan, stage)), len(missing)


def _check_options(
    dest: Path, locations: Mapping[str, str | None], preparation: Preparation
) -> None:
    """Raise ValueError for what is wrong with the options, before any work begins."""
    check_folder(dest, "features", is_feature_folder)
    only, share = preparation.only, preparation.validation_share
    if preparation.overwrite and only is not None:
        raise ValueError("--overwrite makes all features again; leave out --only.")
    for feature in FEATURES:
        location, is_wanted = locations.get(feature), only in (None, feature)
        if location is None and is_wanted:
            what = "is needed, the folder or Hugging Face id of the encoder"
            remedy = "or prepare another feature by itself with --only"
            raise refusal(f"--{feature}", but=what, remedy=remedy)
        if location is not None and not is_wanted:
            raise ValueError(f"--{feature}: has no effect with --only={only}.")
        if location is not None:
            _ENCODERS[feature][0].check_location(str(location))
    _check_bits(dest, preparation)
    if not 0 <= share < 1:
        raise refusal("--validation-share", f"{share:g}", accepted="0 to less than 1")


def _check_bits(dest: Path, preparation: Preparation) -> None:
    """Raise ValueError if a folder would get patch features of different bit widths."""
    bits, only = preparation.feature_bits, preparation.only
    if only not in (None, "visual"):
        if bits != 16:
            raise ValueError(f"--feature-bits: has no effect with --only={only}.")
        return
    there = bits_there(dest)
    if there not in (None, bits) and not preparation.overwrite:
        but = f"{dest} has patch features in {there} bits"
        remedy = f"give --feature-bits={there}, another --dest, or --overwrite to make all again"
        raise refusal("--feature-bits", bits, but=but, remedy=remedy)


def _facts_of(encoders: Mapping[str, Any], feature_bits: int) -> dict[str, dict[str, Any]]:
    """Return the facts about encoders; those of the visual encoder state the bits unless 16."""
    facts = {feature: dict(encoder.facts()) for feature, encoder in encoders.items()}
    if "visual" in facts and feature_bits != 16:
        facts["visual"]["bits"] = feature_bits
    return facts


def _open(source: str | os.PathLike, preparation: Preparation) -> tuple[Archive, dict[str, str]]:
    """Return images and captions; ValueError if ``source`` is not a set of image files."""
    if is_feature_folder(source):
        raise ValueError(f"--source: {source} holds features already; give images.")
    archive = open_archive(source)
    if isinstance(archive, SampleArchive):
        problem = f"{source} holds images of one size without names"
        raise refusal("--source", but=problem, remedy="give a folder or zip of image files")
    names = archive.names[: preparation.max_images]
    captions = read_captions(archive, names, preparation.captions, preparation.caption_key)
    # With skip_broken, captions are required later, and only for images that are not broken.
    if preparation.only in (None, "text") and not preparation.skip_broken:
        require_captions(captions, names, archive.path, preparation.captions)
    return archive, captions


def _load_encoders(
    locations: Mapping[str, str | None], preparation: Preparation, device: torch.device
) -> dict[str, Any]:
    """Return the encoders by feature; raises ValueError if the autoencoder does not fit."""
    encoders = {
        feature: _ENCODERS[feature][1](str(location), device, precision=preparation.precision)
        for feature, location in locations.items()
        if location is not None
    }
    vae = encoders.get("vae")
    if vae is not None and vae.img_channels != 3:
        takes = f"{vae.location} takes images of {vae.img_channels} channel(s)"
        problem = f"{takes}, but features are made of RGB images"
        raise refusal("--vae", but=problem, remedy="use another autoencoder")
    for bucket in preparation.buckets if vae is not None else ():
        if any(side % vae.downsampling for side in bucket.size):
            problem = f"the sides of {bucket.name} are not multiples of {vae.downsampling}"
            problem += f", which --vae={vae.location} takes"
            raise refusal("--buckets", but=problem, remedy="give other sizes")
    return encoders


def _plan_images(
    archive: Archive,
    dest: Path,
    captions: Mapping[str, str],
    preparation: Preparation,
    num_threads: int,
) -> tuple[list[PlannedImage], list[str]]:
    """Return the samples to be made, and sentences about unusable images. Collective."""
    known: dict[str, PlannedImage] = {}
    with contextlib.suppress(ValueError):  # Without a list, all images are read.
        known = {image.file: image for image in read_images(dest)}
    names = archive.names[: preparation.max_images]
    scanned = scan_images(archive, names, known, captions, preparation.buckets, num_threads)
    broken = [found for found in scanned if isinstance(found, str)]
    usable = [found for found in scanned if not isinstance(found, str)]
    if broken and not preparation.skip_broken:
        more = ["..."] if len(broken) > _NUM_BROKEN_SHOWN else []
        raise ValueError(
            f"{archive.path}: {len(broken)} of {len(names)} images cannot be used:\n  "
            + "\n  ".join(broken[:_NUM_BROKEN_SHOWN] + more)
            + "\nNo features were made. Repair or remove them, or give --skip-broken."
        )
    if not usable:
        raise ValueError(f"{archive.path}: no image is left, all are broken; first: {broken[0]}")
    if preparation.only in (None, "text"):
        files = [image.file for image in usable]
        require_captions(captions, files, archive.path, preparation.captions)
    return with_splits(usable, preparation.validation_share), broken
