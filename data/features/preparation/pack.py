"""Shards of a feature folder: which are right, what is unpacked from others, and what is packed."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.features.manifests import FORMAT, MANIFEST_FILE, Manifest, read_manifest
from data.features.preparation.plan import Key, Plan, PlannedImage
from data.features.preparation.stage import Stage
from data.features.record import (
    FEATURES,
    KEYS_OF,
    RECORD_FILE,
    SPLITS,
    STATISTICS,
    BucketRecord,
    FeatureRecord,
    bucket_folder,
    is_complete,
    read_feature_record,
    read_json,
)
from data.features.shards import (
    Members,
    check_shard,
    merge_moments,
    read_member,
    recover_index,
    to_json,
    write_shard,
)
from data.resumable import progress_of_ranks, share
from dnnlib.files import atomic_write, write_json
from dnnlib.parallel import thread_map
from torch_utils import distributed
from torch_utils.fingerprints import package_versions

_BUCKETS = "bucket_*"
_OLD_FOLDER = ".old"  # Where earlier versions put shards that were to be replaced.
_ALTERED = "was altered while it was in use; start the same command again"


def find_shards(folder: Path) -> list[Path]:
    """Return the paths of all shards of a feature folder."""
    places = [(folder / split).glob(f"{_BUCKETS}/shard-*.tar") for split in SPLITS]
    places.append((folder / _OLD_FOLDER).glob("*.tar"))
    return sorted(path for place in places for path in place)


# Indexes beside shards, while a preparation is under way: the manifest of that shard alone.


def _index_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def read_index(path: Path) -> tuple[Manifest, bool] | None:
    """Return the index beside a shard, and whether the shard is as it was when that was written.

    None if there is none.
    """
    file = _index_file(path)
    try:
        index = read_json(file, FORMAT, lambda values: Manifest.of(path.parent, values))
        (shard,), found = index.shards, path.stat()
        is_same = found.st_mtime_ns <= file.stat().st_mtime_ns
        return index, is_same and found.st_size == shard["num_bytes"]
    except (OSError, ValueError):
        return None


def read_manifests(folder: Path) -> dict[Path, Manifest]:
    """Return the manifests of a feature folder that can be read, by their folders."""
    found = {}
    for split in SPLITS:
        for path in (folder / split).glob(f"{_BUCKETS}/{MANIFEST_FILE}"):
            with contextlib.suppress(ValueError):
                bucket = path.parent.name.partition("_")[2]
                found[path.parent] = read_manifest(folder, split, bucket)
    return found


def known_index(path: Path, manifests: Mapping[Path, Manifest]) -> Manifest:
    """Return what manifest, index or else the shard itself say of where things lie in a shard.

    ``manifests`` are by folder.
    """
    if path.parent in manifests:
        found = manifests[path.parent].of_shard(path.name)
        if found is not None:
            return found
    index = read_index(path)
    if index is not None:
        return index[0]
    split, bucket = path.parent.parent.name, path.parent.name.partition("_")[2]
    return recover_index(path, split, bucket)


def look_at_shards(folder: Path, plan: Plan, num_threads: int) -> dict[Path, Manifest]:
    """Return the index of each shard of this rank's share, without what cannot be used. Collective.

    A shard that has not changed since its index was written is trusted, unless the folder is
    complete. Others are read whole. Every shard has an index beside it then.
    """
    paths, is_whole = distributed.on_main(lambda: (find_shards(folder), is_complete(folder)))
    manifests = read_manifests(folder)

    def look(path: Path) -> Manifest:
        found = read_index(path)
        if found is not None and found[1] and not is_whole:
            return found[0]
        known = known_index(path, manifests)
        index, _ = check_shard(path, known, plan.shapes(known.bucket))
        write_json(_index_file(path), index.to_dict())
        return index

    mine = share(paths)
    bar = progress_of_ranks(len(paths), len(mine), "Checking shards", "shard")
    found = {}
    with distributed.together(), bar as on_done:
        for path, index in zip(mine, thread_map(look, mine, num_threads, num_threads), strict=True):
            found[path] = index
            on_done()
    return found


def is_right(plan: Plan, images: Sequence[PlannedImage], index: Manifest) -> bool:
    """Tell whether a shard that exists holds exactly the samples that it should."""
    is_whole = bool(index.shards[0]["sha256"])
    if not is_whole or index.ids != [image.id for image in images]:
        return False
    for row, image in enumerate(images):
        if any(
            index.fingerprint[feature][row] != wanted for _, feature, wanted in plan.keys(image)
        ):
            return False
        description = plan.describe(image, bool(index.truncated[row]))
        if zlib.crc32(to_json(description)) != index.crc32["json"][row]:
            return False
    return True


def wanted_rows(plan: Plan, index: Manifest) -> Iterator[tuple[int, Key]]:
    """Yield what a shard holds of the plan: row, and sample, feature and fingerprint."""
    for row, name in enumerate(index.ids):
        for feature, wanted in plan.fingerprints.get(name, {}).items():
            if index.fingerprint[feature][row] == wanted:
                yield row, (name, feature, wanted)


def unpack(
    path: Path, index: Manifest, plan: Plan, stage: Stage, staged: Collection[Key]
) -> list[Key]:
    """Stage what a shard holds of the plan and is not ``staged``, delete the shard, return what."""
    done = []
    with open(path, "rb") as file:
        for row, key in wanted_rows(plan, index):
            if key in staged:
                continue
            with contextlib.suppress(ValueError):  # What is damaged is made again.
                members = {k: read_member(file, index, row, k) for k in KEYS_OF[key[1]]}
                stage.put(*key, members, truncated=key[1] == "text" and bool(index.truncated[row]))
                done.append(key)
    path.unlink()
    _index_file(path).unlink(missing_ok=True)
    return done


def pack(path: Path, plan: Plan, images: Sequence[PlannedImage], stage: Stage) -> None:
    """Write a shard from what is staged, and its index; then nothing of it stays staged."""

    def samples() -> Iterator[tuple[str, dict[str, Any], Members]]:
        for image in images:
            members: dict[str, bytes] = {}
            truncated = False
            for key in plan.keys(image):
                found = stage.get(*key, shapes)
                if found is None:
                    raise ValueError(f"{stage.file(*key)}: {_ALTERED}.")
                members.update(found[0])
                truncated |= found[1]
            yield image.id, plan.describe(image, truncated), members

    shapes = plan.shapes(images[0].bucket)
    index = write_shard(path, images[0].split, images[0].bucket, samples())
    write_json(_index_file(path), index.to_dict())
    stage.remove(key for image in images for key in plan.keys(image))


# The whole folder.


def open_up(folder: Path) -> None:
    """Delete record and manifests: what the folder holds is told by the indexes from here on."""
    (folder / RECORD_FILE).unlink(missing_ok=True)
    for split in SPLITS:
        for path in (folder / split).glob(f"{_BUCKETS}/{MANIFEST_FILE}"):
            path.unlink()


def remove_all(folder: Path, stage: Stage) -> None:
    """Delete everything that a preparation made."""
    open_up(folder)
    for split in SPLITS:
        for path in (folder / split).glob(_BUCKETS):
            shutil.rmtree(path)
    shutil.rmtree(folder / _OLD_FOLDER, ignore_errors=True)
    stage.clear()


def finish(folder: Path, plan: Plan, stage: Stage) -> FeatureRecord:
    """Write manifests and record, from the indexes beside the shards, and tidy up.

    What is there already stays as it is; so does a record that differs by the versions of packages
    alone.
    """
    parts: dict[Path, list[Manifest]] = collections.defaultdict(list)
    for path in plan.shards(folder):
        found = read_index(path)
        if found is None:
            raise ValueError(f"{path}: {_ALTERED}.")
        parts[path.parent].append(found[0])
    manifests = []
    for split, bucket in [(split, bucket.name) for split in SPLITS for bucket in plan.buckets]:
        place = bucket_folder(folder, split, bucket)
        manifests.append(Manifest.join(place, split, bucket, parts[place]))
        _write_if_new(place / MANIFEST_FILE, json.dumps(manifests[-1].to_dict()))
    record = _record(plan, manifests)
    with contextlib.suppress(ValueError):
        previous = read_feature_record(folder)
        if dataclasses.replace(record, packages=previous.packages) == previous:
            record = previous
    _write_if_new(folder / RECORD_FILE, json.dumps(record.to_dict(), indent=2))
    _tidy_up(folder, plan)
    stage.clear()
    return record


def _tidy_up(folder: Path, plan: Plan) -> None:
    """Delete indexes, and the folders of buckets that are no more."""
    shutil.rmtree(folder / _OLD_FOLDER, ignore_errors=True)
    kept = {f"bucket_{bucket.name}" for bucket in plan.buckets}
    for split in SPLITS:
        for path in (folder / split).glob(_BUCKETS):
            for index in path.glob(".*.tar.json"):
                index.unlink()
            if path.name not in kept:
                (path / MANIFEST_FILE).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # It has files that are not ours.
                    path.rmdir()


def _write_if_new(path: Path, text: str) -> None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)


def _record(plan: Plan, manifests: Sequence[Manifest]) -> FeatureRecord:
    packages = package_versions()
    packages["diffusers"] = importlib.metadata.version("diffusers")
    vae, visual = plan.encoders["vae"], plan.encoders["visual"]
    num = {(manifest.split, manifest.bucket): len(manifest) for manifest in manifests}
    buckets = [
        BucketRecord(
            name=bucket.name,
            width=bucket.width,
            height=bucket.height,
            latent_shape=(vae["channels"], *bucket.latent_size(vae["downsampling"])),
            patch_grid=bucket.grid(visual["patch_size"]),
            num={split: num[split, bucket.name] for split in SPLITS},
        )
        for bucket in plan.buckets
    ]
    train = [s["moments"] for m in manifests if m.split == "train" for s in m.shards]
    return FeatureRecord(
        name=plan.name,
        source_hash=plan.source_hash,
        buckets=buckets,
        validation_share=float(plan.validation_share),
        shard_size=plan.shard_size,
        **{feature: dict(plan.encoders[feature]) for feature in FEATURES},
        captions=dict(num_truncated=sum(int(m.truncated.sum()) for m in manifests)),
        statistics=statistics_of(train),
        content_hash=hash_of_shards(manifests),
        packages=packages,
    )


def hash_of_shards(manifests: Sequence[Manifest]) -> str:
    """Return the identity of all shards of manifests, in order."""
    lines = [f"{m.split} {m.bucket} {s['file']} {s['sha256']}" for m in manifests for s in m.shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def statistics_of(moments: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return count, mean and standard deviation by channel, for each of STATISTICS.

    ``moments`` are those of shards, in order; the deviation's divisor is the count.
    """
    statistics = {}
    for name in STATISTICS:
        total: dict[str, Any] = dict(count=0)
        for part in moments:
            total = merge_moments(total, part[name])
        mean, m2 = (np.asarray(total[key]) for key in ("mean", "m2"))
        std = np.sqrt(m2 / total["count"])
        statistics[name] = dict(count=total["count"], mean=mean.tolist(), std=std.tolist())
    return statistics
