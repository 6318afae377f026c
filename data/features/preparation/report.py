"""Text reports about feature folders: buckets, encoders, and what a preparation did."""

import itertools
import os
from collections.abc import Iterator

from data.features.manifests import read_manifest
from data.features.preparation.prepare import Outcome
from data.features.record import FEATURES, SPLITS, FeatureRecord, read_feature_record
from dnnlib.text import format_count


def describe_outcome(dest: str | os.PathLike, outcome: Outcome, only: str | None) -> Iterator[str]:
    """Yield lines that report what a preparation did; ``only`` is the feature it was limited to."""
    if outcome.skipped:
        yield "Broken:\n  " + "\n  ".join(outcome.skipped)
        yield f"Skipped {len(outcome.skipped)} broken image(s)."
    made = [f"{outcome.num_made[feature]} {feature}" for feature in FEATURES]
    if outcome.record is None:
        done = f"{outcome.num_made[only]} of {outcome.num_images} {only} features made"
        rest = "the others existed already. Run the command without --only to make shards."
        yield f"{dest}: {done}, {rest}"
        return
    if not any(outcome.num_made.values()) and not outcome.num_packed:
        yield f"{dest}: complete already."
    else:
        yield f"Made: {', '.join(made)} features of {outcome.num_images} images."
        yield f"Wrote {outcome.num_packed} shard(s)."
    yield from bucket_report(outcome.record)


def describe_folder(path: str | os.PathLike) -> Iterator[str]:
    """Yield lines that describe a complete feature folder; raises ValueError for another one."""
    record = read_feature_record(path)
    places = itertools.product(SPLITS, [bucket.name for bucket in record.buckets])
    shards = [shard for place in places for shard in read_manifest(path, *place).shards]
    num_bytes = sum(shard["num_bytes"] for shard in shards)
    counts = ", ".join(f"{record.num_samples(split)} {split}" for split in SPLITS)
    vae, visual, text = record.vae, record.visual, record.text
    where = [f"{part['location']}, hash {part['hash']}" for part in (vae, visual, text)]
    registers = f"{visual['num_registers']} registers, {visual['dim']} channels"
    registers += "" if record.feature_bits == 16 else f" in {record.feature_bits} bits"
    packages = ", ".join(f"{name} {version}" for name, version in record.packages.items())
    yield f"samples       {counts}"
    yield f"size          {format_count(num_bytes, 'B')} in {len(shards)} shard(s)"
    yield f"source        {record.name}, hash {record.source_hash}"
    normalised = f"(latent - {vae['shift']:g}) * {vae['scale']:g}"
    yield f"autoencoder   {where[0]}: {vae['channels']} channels, {normalised}"
    yield f"visual        {where[1]}: patches of {visual['patch_size']}, {registers}"
    yield f"text          {where[2]}: {text['dim']} channels, at most {text['max_tokens']} tokens"
    yield f"captions      {record.captions['num_truncated']} cut to {text['max_tokens']} tokens"
    for name, part in record.statistics.items():
        mean, std = (sum(part[key]) / len(part[key]) for key in ("mean", "std"))
        yield f"{name:13s} mean {mean:.4f}, deviation {std:.4f} of {part['count']} rows"
    yield f"made with     {packages}"
    yield f"content hash  {record.content_hash}"
    yield ""
    yield from bucket_report(record)


def bucket_report(record: FeatureRecord) -> Iterator[str]:
    """Yield a table of the buckets: size, latent, patches, and number of samples in each split."""
    total = max(sum(record.num_samples(split) for split in SPLITS), 1)
    yield "bucket      latent      patches     train  validation   share"
    for bucket in record.buckets:
        latent = "x".join(map(str, bucket.latent_shape))
        patches = "x".join(map(str, bucket.patch_grid))
        train, validation = (bucket.num[split] for split in SPLITS)
        share = (train + validation) / total
        columns = f"{bucket.name:11s} {latent:11s} {patches:8s} {train:8d} {validation:11d}"
        yield f"{columns}   {share:5.1%}"
