"""Makes a feature folder of captioned images, on any number of ranks, resumable at any moment."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.features.buckets import DEFAULT_BUCKETS, Bucket
from data.features.preparation.captions import read_captions, require_captions
from data.features.preparation.make import Making
from data.features.preparation.plan import (
    Plan,
    PlannedImage,
    plan_images,
    read_images,
    scan_images,
)
from data.features.record import FEATURES, FeatureRecord, is_feature_folder
from data.images.archive import open_archive
from data.images.members import Archive
from data.images.samples import SampleArchive
from data.resumable import check_folder, locked
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
    """How images become features.

    ``batch_size`` and ``num_threads`` decide the speed, everything else what is made.
    """

    captions: str | None = None
    caption_key: str | None = None
    buckets: tuple[Bucket, ...] = DEFAULT_BUCKETS
    validation_share: float = 0.02
    shard_size: int = 64
    precision: str = "fp32"
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
        record: Of the folder; None if one feature alone was prepared.
        num_images: Samples that the folder is to hold.
        num_made: How many of each feature were made now.
        num_packed: How many shards were written now.
        skipped: Sentences about images that were left out.
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
    """Make the feature folder ``dest`` of captioned images. Collective.

    What is there already and still right is used again, whatever else has changed: features are
    told apart by fingerprints of all that they are made from. So a preparation that was killed at
    any moment goes on when it is started again, with any number of ranks. The folder is complete
    when its record appears.

    Args:
        source: Folder or zip of images.
        locations: Folder or Hugging Face id of the encoder of each of FEATURES.

    Raises ValueError, one sentence, if images, captions and encoders do not fit, or if ``dest``
    holds anything else.
    """
    dest = Path(dest)
    num_threads = preparation.num_threads or num_cores_of_rank(_MAX_THREADS)
    with distributed.together():
        _check_options(dest, locations, preparation)
        archive = _open_source(source)
        captions = _captions(archive, preparation)
    encoders = _load_encoders(locations, preparation, device)
    with locked(dest, "preparing"):
        images, skipped = _plan_images(archive, dest, captions, preparation, num_threads)
        plan = Plan(
            name=archive.path.stem,
            images=images,
            buckets=preparation.buckets,
            validation_share=preparation.validation_share,
            shard_size=preparation.shard_size,
            encoders={feature: encoder.facts() for feature, encoder in encoders.items()},
        )
        making = Making(dest, archive, plan, encoders, preparation.batch_size, num_threads)
        record, num_packed = None, 0
        if preparation.only is not None:
            making.stage_missing()
        else:
            record, num_packed = making.make_all(anew=preparation.overwrite)
        return Outcome(
            record=record,
            num_images=len(images),
            num_made=making.num_made(),
            num_packed=num_packed,
            skipped=tuple(skipped),
        )


def _check_options(
    dest: Path, locations: Mapping[str, str | None], preparation: Preparation
) -> None:
    """Raise ValueError for what can be known before any work."""
    check_folder(dest, "features", is_feature_folder)
    if preparation.overwrite and preparation.only is not None:
        raise ValueError("--overwrite makes all features again; leave out --only.")
    wanted = FEATURES if preparation.only is None else (preparation.only,)
    for feature in FEATURES:
        location = locations.get(feature)
        if location is None and feature in wanted:
            raise ValueError(
                f"--{feature}: is needed, the folder or Hugging Face id of the encoder; or prepare "
                "another feature by itself with --only."
            )
        if location is not None and feature not in wanted:
            raise ValueError(f"--{feature}: has no effect with --only={preparation.only}.")
        if location is not None:
            _ENCODERS[feature][0].check_location(str(location))
    if not 0 <= preparation.validation_share < 1:
        raise ValueError(
            f"--validation-share: got {preparation.validation_share:g}; accepted: 0 to less than 1."
        )


def _open_source(source: str | os.PathLike) -> Archive:
    """Return the images; raises ValueError if there are none that have names and sizes."""
    if is_feature_folder(source):
        raise ValueError(f"--source: {source} holds features already; give images.")
    archive = open_archive(source)
    if isinstance(archive, SampleArchive):
        raise ValueError(
            f"--source: {source} holds images of one size without names; give a folder or zip of "
            "image files."
        )
    return archive


def _captions(archive: Archive, preparation: Preparation) -> dict[str, str]:
    names = archive.names[: preparation.max_images]
    captions = read_captions(archive, names, preparation.captions, preparation.caption_key)
    # Of those that may yet turn out to be broken, captions are asked for later.
    if preparation.only in (None, "text") and not preparation.skip_broken:
        require_captions(captions, names, str(archive.path), preparation.captions)
    return captions


def _load_encoders(
    locations: Mapping[str, str | None], preparation: Preparation, device: torch.device
) -> dict[str, Any]:
    """Return the encoders of the features to be made; raises ValueError if they do not fit."""
    encoders = {
        feature: _ENCODERS[feature][1](str(location), device, precision=preparation.precision)
        for feature, location in locations.items()
        if location is not None
    }
    vae = encoders.get("vae")
    if vae is not None:
        if vae.img_channels != 3:
            raise ValueError(
                f"--vae: {vae.location} takes images of {vae.img_channels} channel(s), but "
                "features are made of RGB images; use another autoencoder."
            )
        for bucket in preparation.buckets:
            if bucket.width % vae.downsampling or bucket.height % vae.downsampling:
                raise ValueError(
                    f"--buckets: the sides of {bucket.name} are no multiples of "
                    f"{vae.downsampling}, which --vae={vae.location} takes; give other sizes."
                )
    return encoders


def _plan_images(
    archive: Archive,
    dest: Path,
    captions: Mapping[str, str],
    preparation: Preparation,
    num_threads: int,
) -> tuple[list[PlannedImage], list[str]]:
    """Return the samples to be made, and sentences about images that cannot be used. Collective."""
    known: dict[str, PlannedImage] = {}
    with contextlib.suppress(ValueError):  # Images are then read again.
        known = {image.file: image for image in read_images(dest)}
    names, buckets = archive.names[: preparation.max_images], preparation.buckets
    scanned = scan_images(archive, names, known, buckets, num_threads)
    broken = [f"{archive.path}/{s.file}: {s.error}" for s in scanned if s.error is not None]
    if broken and not preparation.skip_broken:
        shown = broken[:_NUM_BROKEN_SHOWN]
        if len(broken) > len(shown):
            shown.append("...")
        raise ValueError(
            f"{archive.path}: {len(broken)} of {len(names)} images cannot be used:\n  "
            + "\n  ".join(shown)
            + "\nNo features were made. Repair or remove them, or give --skip-broken."
        )
    usable = [image for image in scanned if image.error is None]
    if not usable:
        raise ValueError(
            f"{archive.path}: no image is left, all are broken; the first: {broken[0]}"
        )
    if preparation.only in (None, "text"):
        files = [image.file for image in usable]
        require_captions(captions, files, str(archive.path), preparation.captions)
    return plan_images(usable, captions, buckets, preparation.validation_share), broken
