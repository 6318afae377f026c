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
from data.features.preparation.pack import FeatureWork
from data.features.preparation.plan import (
    PlannedImage,
    Scanned,
    plan_images,
    read_images,
    scan_images,
)
from data.features.record import FEATURES, FeatureRecord, is_feature_folder
from data.images.archive import open_archive
from data.images.members import Archive
from data.images.samples import SampleArchive
from dnnlib.files import check_target, lock_folder
from dnnlib.parallel import num_usable_cores
from encoders.autoencoder import AUTOENCODER, load_autoencoder
from encoders.text import TEXT, load_text_encoder
from encoders.visual import VISUAL, load_visual_encoder
from torch_utils import distributed

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
    with distributed.together():
        archive = _check(source, dest, locations, preparation)
        captions = _captions(archive, preparation)
    encoders = _load_encoders(locations, preparation, device)
    facts = {feature: _facts(encoder, preparation) for feature, encoder in encoders.items()}
    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: _lock(dest, stack))
        images, skipped = _plan_images(archive, dest, captions, preparation)
        work = FeatureWork(
            dest,
            archive,
            images,
            encoders,
            facts,
            buckets=preparation.buckets,
            validation_share=preparation.validation_share,
            shard_size=preparation.shard_size,
            batch_size=preparation.batch_size,
            num_threads=_num_threads(preparation),
        )
        if preparation.only is not None:
            work.make_one(preparation.only)
            record, num_packed = None, 0
        else:
            record, num_packed = work.make_all(anew=preparation.overwrite)
        num_made = work.num_made()
    return Outcome(
        record=record,
        num_images=len(images),
        num_made=num_made,
        num_packed=num_packed,
        skipped=tuple(skipped),
    )


# Checks, plans and claims.


def _check(
    source: str | os.PathLike,
    dest: Path,
    locations: Mapping[str, str | None],
    preparation: Preparation,
) -> Archive:
    """Return the images; raises ValueError for what can be known before any work."""
    check_target("--dest", dest, is_folder=True)
    if dest.suffix.lower() in (".zip", ".npz", ".npy", ".tar"):
        raise ValueError(f"--dest: got {dest}; features are written to a folder, give its name.")
    others = dest.is_dir() and any(not path.name.startswith(".") for path in dest.iterdir())
    if others and not is_feature_folder(dest):
        raise ValueError(
            f"--dest: {dest} holds other files and no features; delete it or choose another name."
        )
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
            known = {"vae": AUTOENCODER, "visual": VISUAL, "text": TEXT}
            known[feature].check_location(str(location))
    if not 0 <= preparation.validation_share < 1:
        raise ValueError(
            f"--validation-share: got {preparation.validation_share:g}; accepted: 0 to less than 1."
        )
    if is_feature_folder(source):
        raise ValueError(f"--source: {source} holds features already; give images.")
    archive = open_archive(source)
    if isinstance(archive, SampleArchive):
        raise ValueError(
            f"--source: {source} holds images of one size without names; give a folder or zip of "
            "image files."
        )
    return archive


def _names(archive: Archive, preparation: Preparation) -> list[str]:
    return archive.names[: preparation.max_images]


def _captions(archive: Archive, preparation: Preparation) -> dict[str, str]:
    names = _names(archive, preparation)
    captions = read_captions(archive, names, preparation.captions, preparation.caption_key)
    # Of those that may yet turn out to be broken, captions are asked for later.
    if preparation.only in (None, "text") and not preparation.skip_broken:
        require_captions(captions, names, str(archive.path), preparation.captions)
    return captions


def _load_encoders(
    locations: Mapping[str, str | None], preparation: Preparation, device: torch.device
) -> dict[str, Any]:
    """Return the encoders of the features to be made; raises ValueError if they do not fit."""
    load = dict(vae=load_autoencoder, visual=load_visual_encoder, text=load_text_encoder)
    encoders = {
        feature: load[feature](str(location), device, precision=preparation.precision)
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


def _facts(encoder: Any, preparation: Preparation) -> dict[str, Any]:
    """Return what the record says of an encoder."""
    names = dict(
        Autoencoder=dict(
            channels="latent_channels", downsampling="downsampling", scale="scale", shift="shift"
        ),
        VisualEncoder=dict(patch_size="patch_size", num_registers="num_registers", dim="dim"),
        TextEncoder=dict(dim="dim", max_tokens="max_tokens"),
    )[type(encoder).__name__]
    return dict(
        location=encoder.location,
        hash=encoder.sha256,
        **{key: getattr(encoder, name) for key, name in names.items()},
        precision=preparation.precision,
    )


def _lock(dest: Path, stack: contextlib.ExitStack) -> None:
    """Keep other processes out of ``dest``, and delete what killed writes have left there."""
    dest.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(dest, f"--dest: another process is preparing {dest}")
    if lock is not None:
        stack.enter_context(lock)
    for leftover in dest.rglob(".*.tmp"):
        leftover.unlink()


def _plan_images(
    archive: Archive, dest: Path, captions: Mapping[str, str], preparation: Preparation
) -> tuple[list[PlannedImage], list[str]]:
    """Return the samples to be made, and sentences about images that cannot be used. Collective."""
    known: dict[str, Scanned] = {}
    with contextlib.suppress(ValueError):  # Images are then read again.
        known = {image.scanned.file: image.scanned for image in read_images(dest)}
    names = _names(archive, preparation)
    scanned = scan_images(
        archive, range(len(names)), known, preparation.buckets, _num_threads(preparation)
    )
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
    texts = [captions.get(image.file, "") for image in usable]
    images = plan_images(usable, texts, preparation.buckets, preparation.validation_share)
    return images, broken


def _num_threads(preparation: Preparation) -> int:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return preparation.num_threads or min(max(num_usable_cores() // ranks_here, 1), _MAX_THREADS)
