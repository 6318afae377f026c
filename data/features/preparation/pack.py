"""Packs staged features into shards, unpacks outdated shards, and finishes feature folders."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
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
from data.resumable import map_of_ranks
from dnnlib.files import atomic_write, write_json
from torch_utils import distributed
from torch_utils.fingerprints import package_versions

_OLD_FOLDER = ".old"  # Earlier versions put shards to be replaced here.
_ALTERED = "was altered while it was in use; start the same command again"


def _glob(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match a pattern in all bucket folders, or for ``""`` these folders."""
    return sorted(p for split in SPLITS for p in (folder / split).glob(f"bucket_*/{pattern}"))


def find_shards(folder: Path) -> list[Path]:
    """Return the paths of all shards of a feature folder."""
    return sorted([*(folder / _OLD_FOLDER).glob("*.tar"), *_glob(folder, "shard-*.tar")])


# During a preparation, each shard has an index file beside it: the manifest of that shard alone.


def _index_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def _read_index(path: Path) -> Manifest:
    """Return the index beside a shard; raises ValueError if it is missing or damaged."""
    try:
        return read_json(_index_file(path), FORMAT, lambda found: Manifest.of(path.parent, found))
    except (OSError, ValueError):
        raise ValueError(f"{path}: {_ALTERED}.") from None


def _is_unchanged(path: Path, index: Manifest) -> bool:
    """Return whether a shard is unchanged, by size and date, since its index was written."""
    is_same_size = path.stat().st_size == index.shards[0]["num_bytes"]
    return is_same_size and path.stat().st_mtime_ns <= _index_file(path).stat().st_mtime_ns


def known_index(path: Path, manifests: Mapping[Path, Manifest]) -> Manifest:
    """Return the manifest of a single shard, from its folder's manifest, its index, or itself.

    ``manifests`` holds the manifests that are known, by folder.
    """
    manifest = manifests.get(path.parent)
    index = None if manifest is None else manifest.of_shard(path.name)
    if index is not None:
        return index
    with contextlib.suppress(ValueError):
        return _read_index(path)
    return recover_index(path, *_place(path))


def _place(path: Path) -> tuple[str, str]:
    """Return the split and the bucket's name in whose folder a file lies."""
    return path.parent.parent.name, path.parent.name.partition("_")[2]


def look_at_shards(
    folder: Path, plan: Plan, num_threads: int
) -> dict[Path, tuple[bool, list[Key]]]:
    """Return whether each shard is as planned, and which planned features it holds. Collective.

    A shard that has not changed since its index was written is trusted, unless the folder is
    complete. All others are read in full. Afterwards each shard has an index beside it, in which
    damaged features are marked.
    """
    paths, is_whole = distributed.on_main(lambda: (find_shards(folder), is_complete(folder)))
    planned, manifests = plan.shards(folder), {}
    for file in _glob(folder, MANIFEST_FILE):
        with contextlib.suppress(ValueError):
            manifests[file.parent] = read_manifest(folder, *_place(file))

    def look(path: Path) -> tuple[bool, list[Key]]:
        try:
            index = _read_index(path)
            is_known = not is_whole and _is_unchanged(path, index)
        except ValueError:
            is_known = False
        if not is_known:
            known = known_index(path, manifests)
            index, _ = check_shard(path, known, plan.shapes(known.bucket))
            write_json(_index_file(path), index.to_dict())
        is_right = _is_right(plan, planned.get(path, ()), index)
        return is_right, [key for _, key in _wanted_rows(plan, index)]

    found = map_of_ranks(look, paths, num_threads, "Checking shards", "shard")
    return dict(zip(paths, found, strict=True))


def _is_right(plan: Plan, images: Sequence[PlannedImage], index: Manifest) -> bool:
    """Return whether a shard holds exactly the planned samples, all of them intact."""
    if not images or not index.shards[0]["sha256"] or index.ids != [image.id for image in images]:
        return False
    for row, image in enumerate(images):
        description = plan.describe(image, bool(index.truncated[row]))
        known = {name: index.fingerprint[name][row] for name in description["fingerprint"]}
        crc32 = zlib.crc32(to_json(description))
        if known != description["fingerprint"] or crc32 != index.crc32["json"][row]:
            return False
    return True


def _wanted_rows(plan: Plan, index: Manifest) -> Iterator[tuple[int, Key]]:
    """Yield the row and key of each planned feature that a shard holds intact."""
    for row, name in enumerate(index.ids):
        for feature, wanted in plan.fingerprints.get(name, {}).items():
            if index.fingerprint[feature][row] == wanted:
                yield row, (name, feature, wanted)


def staged_keys(plan: Plan, stage: Stage, num_threads: int) -> set[Key]:
    """Return the planned features that are staged intact; delete damaged ones. Collective."""
    buckets = {image.id: image.bucket for image in plan.images}
    wanted = {key for image in plan.images for key in plan.keys(image)}
    keys = [key for key in distributed.on_main(stage.keys) if key in wanted]

    def check(key: Key) -> bool:
        is_whole = stage.get(*key, plan.shapes(buckets[key[0]])) is not None
        if not is_whole:
            stage.remove(key)
        return is_whole

    found = map_of_ranks(check, keys, num_threads, "Checking features", "file")
    return set(itertools.compress(keys, found))


def unpack(path: Path, plan: Plan, stage: Stage, staged: Collection[Key]) -> list[Key]:
    """Stage and return the planned features of a shard not in ``staged``; delete the shard."""
    index, done = _read_index(path), []
    with open(path, "rb") as file:
        for row, key in _wanted_rows(plan, index):
            if key in staged:
                continue
            with contextlib.suppress(ValueError):  # Damaged features are made again.
                members = {k: read_member(file, index, row, k) for k in KEYS_OF[key[1]]}
                stage.put(*key, members, key[1] == "text" and bool(index.truncated[row]))
                done.append(key)
    path.unlink()
    _index_file(path).unlink(missing_ok=True)
    return done


def pack(path: Path, plan: Plan, images: Sequence[PlannedImage], stage: Stage) -> None:
    """Write a shard and its index from staged features, then delete their staged files."""

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
    for key in itertools.chain(*map(plan.keys, images)):
        stage.remove(key)


# The whole folder.


def open_up(folder: Path) -> None:
    """Delete record and manifests, so that the indexes beside the shards describe the folder."""
    for path in (folder / RECORD_FILE, *_glob(folder, MANIFEST_FILE)):
        path.unlink(missing_ok=True)


def remove_all(folder: Path, stage: Stage) -> None:
    """Delete record, shards and staged features of a feature folder."""
    (folder / RECORD_FILE).unlink(missing_ok=True)
    for path in _glob(folder, ""):
        shutil.rmtree(path)
    shutil.rmtree(folder / _OLD_FOLDER, ignore_errors=True)
    stage.clear()


def finish(folder: Path, plan: Plan, stage: Stage) -> FeatureRecord:
    """Write manifests and record from the indexes beside the shards, then delete temporary files.

    Files that would not change are not written again. A record that would differ only in the
    versions of packages is kept.
    """
    parts: dict[Path, list[Manifest]] = collections.defaultdict(list)
    for path in plan.shards(folder):
        parts[path.parent].append(_read_index(path))
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
    stage.clear()
    shutil.rmtree(folder / _OLD_FOLDER, ignore_errors=True)
    for file in _glob(folder, ".*.tar.json"):
        file.unlink()
    for path in set(_glob(folder, "")) - {manifest.folder for manifest in manifests}:
        (path / MANIFEST_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # It contains files that are not ours.
            path.rmdir()
    return record


def _write_if_new(path: Path, text: str) -> None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)


def _record(plan: Plan, manifests: Sequence[Manifest]) -> FeatureRecord:
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
    return FeatureRecord(
        name=plan.name,
        source_hash=plan.source_hash,
        buckets=buckets,
        validation_share=float(plan.validation_share),
        shard_size=plan.shard_size,
        **{feature: dict(plan.encoders[feature]) for feature in FEATURES},
        captions=dict(num_truncated=sum(int(m.truncated.sum()) for m in manifests)),
        statistics=statistics_of(
            [s["moments"] for m in manifests if m.split == "train" for s in m.shards]
        ),
        content_hash=hash_of_shards(manifests),
        packages=package_versions("diffusers"),
    )


def hash_of_shards(manifests: Sequence[Manifest]) -> str:
    """Return the identity of all shards in the manifests, in order."""
    lines = [f"{m.split} {m.bucket} {s['file']} {s['sha256']}" for m in manifests for s in m.shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def statistics_of(moments: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return count, mean [C] and standard deviation [C] for each of STATISTICS, as plain values.

    ``moments`` are those of the shards, in order. The deviation is that of the population (divisor
    N).
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
