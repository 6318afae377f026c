"""Encodes an image dataset to a latent archive, on any number of ranks, in resumable parts."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.images.dataset import ImageDataset
from data.latents.record import (
    CHECKSUMS_FILE,
    CLAIM_FILE,
    FORMAT_VERSION,
    LABELS_FILE,
    RECORD_FILE,
    LatentRecord,
    check_latent_shard,
    checksums_of_shard,
    is_latent_archive,
    is_latent_folder,
    latent_shard_name,
    read_archive_labels,
    read_checksums,
    read_record,
)
from data.loader import read_batches
from data.resumable import (
    BackgroundWriter,
    check_claim,
    check_folder,
    check_protocol,
    locked,
    map_of_ranks,
    memory_for,
    progress_of_ranks,
    share,
    to_float16,
)
from dnnlib.addresses import is_address
from dnnlib.files import atomic_write, sha256_of_file, write_json
from encoders.autoencoder import INPUT_TRANSFORM, Autoencoder, load_autoencoder
from torch_utils import distributed
from torch_utils.fingerprints import package_versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are encoded to latents.

    ``batch_size`` and ``num_workers`` affect only the speed; all else determines the result.
    """

    hflip: bool = False
    mean_only: bool = False
    precision: str = "fp32"
    shard_size: int = 4096
    batch_size: int = 64
    num_workers: int | None = None


def encode(
    source: Path | str, dest: Path | str, vae: str, encoding: Encoding, device: torch.device
) -> tuple[LatentRecord, int | None]:
    """Encode an image dataset to the latent archive ``dest``. Collective.

    The ranks divide the missing shards among themselves, so an encoding that was killed at any
    moment continues when it is started again, with any number of ranks. The archive is complete
    when its record appears. Returns the record and the number of shards made in this call, or None
    instead of that number if the archive was complete already.

    Raises ValueError if the images do not fit the autoencoder, if ``dest`` holds anything else, or
    if a latent exceeds the range of float16.
    """
    dest = Path(dest)
    with distributed.together():
        check_folder(dest, "latents", is_latent_folder)
        if not is_address(source) and is_latent_folder(source):
            raise ValueError(f"--source: {source} holds latents already; give a dataset of images.")
        dataset = ImageDataset(source, use_labels=None)
    autoencoder = load_autoencoder(vae, device, precision=encoding.precision)
    autoencoder.check_images(str(source), dataset.resolution, dataset.img_channels)

    plan = _plan(dataset, autoencoder, encoding)
    with locked(dest, "encoding into"):
        missing = distributed.on_main(lambda: _claim(dest, plan, dataset))
        if missing is None:
            return distributed.on_main(lambda: read_record(dest)), None
        with distributed.together():
            _encode_shards(dest, plan, missing, dataset, autoencoder, encoding)
        record = _finish(dest, plan, dataset)
    return record, len(missing)


def _plan(dataset: ImageDataset, autoencoder: Autoencoder, encoding: Encoding) -> LatentRecord:
    """Return the record of the archive to be made, with its hashes still empty."""
    num_images, size = len(dataset), encoding.shard_size
    return LatentRecord(
        num_images=num_images,
        resolution=dataset.resolution,
        img_channels=dataset.img_channels,
        latent_shape=list(autoencoder.latent_shape(dataset.resolution)),
        kind="mean" if encoding.mean_only else "mean-std",
        mirrored=encoding.hflip,
        scale=autoencoder.scale,
        shift=autoencoder.shift,
        vae=autoencoder.location,
        vae_hash=autoencoder.sha256,
        source=dataset.name,
        source_hash=distributed.on_main(lambda: dataset.content_hash),
        class_names=None if dataset.labels is None else list(dataset.class_names),
        labels_sha256=None,
        input_transform=INPUT_TRANSFORM,
        precision=encoding.precision,
        shard_size=size,
        shards=[
            dict(file=latent_shard_name(i), num_images=min(size, num_images - i * size), sha256="")
            for i in range(math.ceil(num_images / size))
        ],
        packages=package_versions("diffusers"),
    )


def _protocol(record: LatentRecord) -> dict[str, Any]:
    """Return the settings that determine an archive's content, by the names that users know."""
    return {
        "autoencoder (--vae)": record.vae_hash,
        "images (--source)": record.source_hash,
        "--hflip": record.mirrored,
        "--mean-only": record.kind == "mean",
        "--precision": record.precision,
        "--shard-size": record.shard_size,
        "input transform": record.input_transform,
        "format version": FORMAT_VERSION,
    }


def _claim(dest: Path, plan: LatentRecord, dataset: ImageDataset) -> list[int] | None:
    """Claim ``dest`` for this encoding; return the shards to make, or None if it is complete.

    Raises ValueError if ``dest`` holds another encoding.
    """
    file, protocol = dest / CLAIM_FILE, _protocol(plan)

    def is_same(name: str, there: Any) -> bool:
        if name == "images (--source)" and isinstance(there, str):
            return dataset.is_same_as(there)
        return there == protocol[name]

    if file.is_file():
        check_claim(file, protocol, "--dest", "latents", is_same)
    elif is_latent_archive(dest):
        there = _protocol(read_record(dest))
        check_protocol(dest, protocol, there, "--dest", "latents", is_same)
    missing = [i for i in range(len(plan.shards)) if not _is_whole(dest, plan, i)]
    with contextlib.suppress(ValueError):  # A damaged record counts as none.
        record = read_record(dest)
        if not missing and _is_right(dest, record, plan, dataset):
            return None
        # Find damaged shards now, while the old record still has their checksums.
        for index, shard in enumerate(record.shards):
            if index not in missing and sha256_of_file(dest / shard["file"]) != shard["sha256"]:
                missing.append(index)
    write_json(file, protocol)
    (dest / RECORD_FILE).unlink(missing_ok=True)
    return sorted(missing)


def _is_whole(dest: Path, plan: LatentRecord, index: int) -> bool:
    shard = plan.shards[index]
    try:
        check_latent_shard(dest / shard["file"], (shard["num_images"], *plan.row_shape))
    except ValueError:
        return False
    return True


def _is_right(dest: Path, record: LatentRecord, plan: LatentRecord, dataset: ImageDataset) -> bool:
    """Return whether record, labels and checksums are intact and fit the data."""
    if (record.num_images, record.class_names) != (plan.num_images, plan.class_names):
        return False
    try:
        labels = read_archive_labels(dest, record)
        read_checksums(dest, record)
    except ValueError:
        return False
    return labels is None or np.array_equal(labels, dataset.labels)


def _encode_shards(
    dest: Path,
    plan: LatentRecord,
    missing: Sequence[int],
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    encoding: Encoding,
) -> None:
    """Encode and write this rank's share of the missing shards."""
    mine = share(missing)
    total, own = (sum(plan.shards[i]["num_images"] for i in part) for part in (missing, mine))
    if not mine:
        return
    moments = _moments(mine, plan, dataset, autoencoder, encoding)
    with (
        progress_of_ranks(total, own, f"Encoding {dataset.name}") as on_done,
        BackgroundWriter(1, 1) as writer,  # A shard is written while the next one is made.
    ):
        for index in mine:
            num_images = plan.shards[index]["num_images"]
            values = np.empty((num_images, *plan.row_shape), np.float16)
            for first in range(0, num_images, encoding.batch_size):
                part = next(moments)
                values[first : first + len(part)] = part
                on_done(len(part))
            writer.submit(_write_array, dest / plan.shards[index]["file"], values)


def _moments(
    mine: Sequence[int],
    plan: LatentRecord,
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    encoding: Encoding,
) -> Iterator[np.ndarray]:
    """Yield batches of the rows of some shards, float16 [N, V, C, h, w]; none spans two shards."""
    batches = []
    for index in mine:
        first = index * plan.shard_size
        images = range(first, first + plan.shards[index]["num_images"])
        size = encoding.batch_size
        batches += [images[start : start + size] for start in range(0, len(images), size)]
    channels = autoencoder.latent_channels * (1 if encoding.mean_only else 2)
    for batch, images in read_batches(dataset, batches, encoding.num_workers):
        with memory_for(len(images), "images"):
            images = images.to(autoencoder.device, non_blocking=True)
            variants = (images, images.flip(-1)) if encoding.hflip else (images,)
            moments = torch.stack([autoencoder.moments(x)[:, :channels] for x in variants], dim=1)

        def label(row: int, batch: Sequence[int] = batch) -> str:
            return dataset.file_label(batch[row])

        yield to_float16(moments, label, "latent has", autoencoder.location)


def _write_array(path: Path, values: np.ndarray) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    with atomic_write(path) as file:
        file.write(header.getvalue())
        file.write(values.data)


def _finish(dest: Path, plan: LatentRecord, dataset: ImageDataset) -> LatentRecord:
    """Hash all shards and rows, write checksums and labels, and last the record. Collective."""
    variants = plan.row_shape[0]

    def measure(shard: dict[str, Any]) -> tuple[str, np.ndarray]:
        return checksums_of_shard(dest / shard["file"], shard["num_images"], variants)

    measured = map_of_ranks(measure, plan.shards, 1, "Hashing", "file")

    def write() -> LatentRecord:
        arrays = {CHECKSUMS_FILE: np.concatenate([crcs for _, crcs in measured])}
        if dataset.labels is not None:
            arrays[LABELS_FILE] = dataset.labels.astype(np.int64)
        hashes = {}
        for name, values in arrays.items():
            _write_array(dest / name, values)
            hashes[name] = sha256_of_file(dest / name)
        record = dataclasses.replace(
            plan,
            shards=[dict(s, sha256=own) for s, (own, _) in zip(plan.shards, measured, strict=True)],
            labels_sha256=hashes.get(LABELS_FILE),
            checksums_sha256=hashes[CHECKSUMS_FILE],
        )
        write_json(dest / RECORD_FILE, record.to_dict())
        return record

    return distributed.on_main(write)
