"""Manifests, statistics and the record of a feature folder, from the indexes of its shards."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.features.buckets import Bucket
from data.features.preparation.plan import Encoders
from data.features.record import (
    FEATURES,
    KEYS,
    MANIFEST_FILE,
    RECORD_FILE,
    SPLITS,
    STATISTICS,
    BucketRecord,
    FeatureRecord,
    Manifest,
    bucket_folder,
    read_feature_record,
)
from data.features.shards import ShardIndex, merge_moments
from dnnlib.files import atomic_write, write_json
from torch_utils.fingerprints import package_versions


@dataclasses.dataclass(frozen=True)
class Contents:
    """The shards of a folder, in order: split, bucket's name and file name, and the index."""

    buckets: tuple[Bucket, ...]
    shards: Sequence[tuple[tuple[str, str, str], ShardIndex]]

    def of(self, split: str, bucket: str) -> list[tuple[str, ShardIndex]]:
        """Return file names and indexes of one split and bucket."""
        return [(place[2], index) for place, index in self.shards if place[:2] == (split, bucket)]


def write_record(folder: Path, contents: Contents, facts: Encoders, **others: Any) -> FeatureRecord:
    """Write all manifests, then the record, where they are not there yet; return the record.

    ``others`` are name, source_hash, validation_share and shard_size. A record that differs by
    the versions of packages alone stays as it is.
    """
    for split in SPLITS:
        for bucket in contents.buckets:
            part = contents.of(split, bucket.name)
            text = json.dumps(make_manifest(folder, split, bucket.name, part).to_dict())
            _write_if_new(bucket_folder(folder, split, bucket.name) / MANIFEST_FILE, text)
    record = _record(contents, facts, **others)
    with contextlib.suppress(ValueError):
        previous = read_feature_record(folder)
        if dataclasses.replace(record, packages=previous.packages) == previous:
            return previous
    write_json(folder / RECORD_FILE, record.to_dict())
    return record


def _record(contents: Contents, facts: Encoders, **others: Any) -> FeatureRecord:
    packages = package_versions()
    packages["diffusers"] = importlib.metadata.version("diffusers")
    vae, visual = facts["vae"], facts["visual"]
    indexes = [index for _, index in contents.shards]
    train = [index.moments for place, index in contents.shards if place[0] == "train"]
    return FeatureRecord(
        buckets=tuple(
            BucketRecord(
                name=bucket.name,
                width=bucket.width,
                height=bucket.height,
                latent_shape=(vae["channels"], *bucket.latent_size(vae["downsampling"])),
                patch_grid=bucket.grid(visual["patch_size"]),
                num={
                    split: sum(len(index.ids) for _, index in contents.of(split, bucket.name))
                    for split in SPLITS
                },
            )
            for bucket in contents.buckets
        ),
        **{feature: dict(facts[feature]) for feature in FEATURES},
        captions=dict(num_truncated=sum(sum(index.truncated) for index in indexes)),
        statistics=statistics_of(train),
        content_hash=hash_of_shards([(*place, index.sha256) for place, index in contents.shards]),
        packages=packages,
        **others,
    )


def hash_of_shards(shards: Sequence[tuple[str, ...]]) -> str:
    """Return the identity of shards, given split, bucket, file name and checksum of each."""
    return hashlib.sha256("\n".join(map(" ".join, shards)).encode()).hexdigest()


def statistics_of(moments: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return count, mean and standard deviation by channel, for each of STATISTICS.

    ``moments`` are those of shards, in order; the deviation's divisor is the count.
    """
    statistics = {}
    for name in STATISTICS:
        total: dict[str, Any] | None = None
        for part in moments:
            total = merge_moments(total, part[name])
        deviation = np.sqrt(np.asarray(total["m2"]) / total["count"])
        statistics[name] = dict(
            count=total["count"], mean=np.asarray(total["mean"]).tolist(), std=deviation.tolist()
        )
    return statistics


def _write_if_new(path: Path, text: str) -> None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)


def index_of(manifest: Manifest, file: str) -> ShardIndex | None:
    """Return what a manifest says of one of its shards, None if it does not name it."""
    for number, shard in enumerate(manifest.shards):
        if shard["file"] != file:
            continue
        rows = np.flatnonzero(manifest.shard == number)
        part = slice(*((rows[0], rows[-1] + 1) if len(rows) else (0, 0)))

        def cut(columns: Mapping[str, Any], part: slice = part) -> dict[str, list]:
            return {name: np.asarray(column[part]).tolist() for name, column in columns.items()}

        return ShardIndex(
            bucket=manifest.bucket,
            num_bytes=shard["num_bytes"],
            sha256=shard["sha256"],
            moments=shard["moments"],
            ids=manifest.ids[part],
            offset=cut(manifest.offset),
            size=cut(manifest.size),
            crc32=cut(manifest.crc32),
            fingerprint={name: column[part] for name, column in manifest.fingerprint.items()},
            truncated=manifest.truncated[part].tolist(),
        )
    return None


def make_manifest(
    folder: Path, split: str, bucket: str, shards: Sequence[tuple[str, ShardIndex]]
) -> Manifest:
    """Return the manifest of the shards of a split and bucket, given by file name, in order."""
    indexes = [index for _, index in shards]

    def joined(name: str) -> dict[str, list]:
        columns = [getattr(index, name) for index in indexes]
        keys = FEATURES if name == "fingerprint" else KEYS
        return {key: [value for column in columns for value in column[key]] for key in keys}

    def arrays(name: str) -> dict[str, np.ndarray]:
        return {key: np.array(values, np.int64) for key, values in joined(name).items()}

    return Manifest(
        folder=bucket_folder(folder, split, bucket),
        split=split,
        bucket=bucket,
        shards=[
            dict(
                file=file,
                num_samples=len(index.ids),
                num_bytes=index.num_bytes,
                sha256=index.sha256,
                moments=index.moments,
            )
            for file, index in shards
        ],
        ids=[name for index in indexes for name in index.ids],
        shard=np.array([i for i, index in enumerate(indexes) for _ in index.ids], np.int64),
        offset=arrays("offset"),
        size=arrays("size"),
        crc32=arrays("crc32"),
        fingerprint=joined("fingerprint"),
        truncated=np.array([flag for index in indexes for flag in index.truncated], bool),
    )
