"""What is in a feature folder already: its shards, with indexes that are checked or trusted."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.features.preparation.manifests import index_of
from data.features.record import (
    FEATURES,
    KEYS,
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    mistyped,
    read_manifest,
)
from data.features.shards import Shapes, ShardIndex, check_shard, index_shard
from dnnlib.files import write_json
from dnnlib.progress import progress
from torch_utils import distributed

OLD_FOLDER = ".old"
_PREFIX = "bucket_"
_INDEX = dict(
    bucket=str,
    num_bytes=int,
    mtime_ns=int,
    sha256=str,
    moments={},
    ids=[str],
    offset={key: [int] for key in KEYS},
    size={key: [int] for key in KEYS},
    crc32={key: [int] for key in KEYS},
    fingerprint=dict.fromkeys(FEATURES, list),  # Of texts, and None where there is none.
    truncated=[bool],
)


def find_shards(folder: Path) -> list[Path]:
    """Return the paths of all shards of a feature folder, those set aside included."""
    places = [(folder / split).glob(f"{_PREFIX}*/shard-*.tar") for split in SPLITS]
    return sorted(
        path for place in [*places, (folder / OLD_FOLDER).glob("*.tar")] for path in place
    )


# Indexes beside shards, while a preparation is under way.


def write_index(path: Path, index: ShardIndex) -> None:
    """Write the index of a shard beside it, with the time of the shard's last change."""
    values = dataclasses.asdict(index)
    write_json(_index_file(path), dict(mtime_ns=path.stat().st_mtime_ns, **values))


def distrust_index(path: Path, index: ShardIndex) -> None:
    """Have a shard read whole and compared with its index the next time."""
    write_json(_index_file(path), dict(mtime_ns=-1, **dataclasses.asdict(index)))


def _index_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def read_index(path: Path) -> ShardIndex | None:
    """Return the index beside a shard, None if there is none."""
    found = _read_index(path)
    return None if found is None else found[0]


def _read_index(path: Path) -> tuple[ShardIndex, int] | None:
    """Return the index beside a shard, and when the shard was last changed."""
    try:
        values = json.loads(_index_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if mistyped(values, _INDEX):
        return None
    mtime_ns = values.pop("mtime_ns")
    return ShardIndex(**{name: values[name] for name in _INDEX if name != "mtime_ns"}), mtime_ns


def take_inventory(
    folder: Path,
    shapes: Callable[[str], Shapes],
    *,
    check_all: bool,
    num_threads: int,
) -> dict[Path, ShardIndex]:
    """Return the index of every shard of a feature folder. Collective: ranks share the work.

    A shard with an index beside it is trusted if it was not changed since that was written, unless
    ``check_all``. Others are read whole, and get one; what is damaged has no fingerprint in it.

    Args:
        shapes: Maps the name of a bucket to what its arrays look like.
    """
    paths = distributed.on_main(lambda: find_shards(folder))
    mine = paths[distributed.rank() :: distributed.world_size()]

    def index(path: Path) -> ShardIndex:
        stat, known = path.stat(), _read_index(path)
        if known is not None:
            known, mtime_ns = known
            same = (stat.st_size, stat.st_mtime_ns) == (known.num_bytes, mtime_ns)
            if same and not check_all:
                return known
        else:
            manifest = manifests.get(path.parent)
            known = None if manifest is None else index_of(manifest, path.name)
        if known is None:
            bucket = path.parent.name.removeprefix(_PREFIX)
            found = index_shard(path, bucket, shapes(bucket))
        else:
            found, _ = check_shard(path, known, shapes(known.bucket))
        write_index(path, found)
        return found

    manifests = _read_manifests(mine)
    found = {}
    total, is_main = len(paths), distributed.is_main()
    with (
        distributed.together(),
        ThreadPoolExecutor(num_threads) as pool,
        progress(total=total, label="Checking shards", unit="shard", disable=not is_main) as bar,
    ):
        for path, result in zip(mine, pool.map(index, mine), strict=True):
            found[path] = result
            bar.update(distributed.world_size())
    parts = distributed.gather_objects(found)
    return {path: part[path] for path in paths for part in parts if path in part}


def _read_manifests(paths: Iterable[Path]) -> dict[Path, Manifest]:
    """Return the manifests beside shards by folder, as far as they are readable."""
    manifests = {}
    for folder in {path.parent for path in paths if path.parent.name.startswith(_PREFIX)}:
        bucket = folder.name.removeprefix(_PREFIX)
        with contextlib.suppress(ValueError):
            manifests[folder] = read_manifest(folder.parent.parent, folder.parent.name, bucket)
    return manifests


# Shards that other ones will take the place of.


def set_aside(
    folder: Path, paths: Iterable[Path], indexes: Mapping[Path, ShardIndex]
) -> dict[Path, Path]:
    """Move shards to where new ones do not meet them, each with its index; return where to.

    The index goes first: a shard without one would have to be read whole.
    """
    moved = {}
    old = folder / OLD_FOLDER
    old.mkdir(exist_ok=True)
    taken = {path.name for path in old.iterdir()}
    number = 0
    for path in paths:
        while f"{number:06d}.tar" in taken:
            number += 1
        target = old / f"{number:06d}.tar"
        taken.add(target.name)
        values = dataclasses.asdict(indexes[path])
        write_json(_index_file(target), dict(mtime_ns=path.stat().st_mtime_ns, **values))
        os.replace(path, target)
        _index_file(path).unlink(missing_ok=True)
        moved[path] = target
    return moved


def remove_manifests(folder: Path) -> None:
    """Delete all manifests, whose place the indexes beside the shards have taken."""
    for split in SPLITS:
        for path in (folder / split).glob(f"{_PREFIX}*/{MANIFEST_FILE}"):
            path.unlink()


def remove_shards(folder: Path) -> None:
    """Delete all shards, those set aside included, and all manifests."""
    remove_manifests(folder)
    for split in SPLITS:
        for path in (folder / split).glob(f"{_PREFIX}*"):
            shutil.rmtree(path)
    shutil.rmtree(folder / OLD_FOLDER, ignore_errors=True)


def clear(folder: Path, buckets: Iterable[str]) -> None:
    """Delete indexes, shards set aside, and the folders of buckets that are no more."""
    for path in find_shards(folder):
        _index_file(path).unlink(missing_ok=True)
    shutil.rmtree(folder / OLD_FOLDER, ignore_errors=True)
    kept = {f"{_PREFIX}{bucket}" for bucket in buckets}
    for split in SPLITS:
        for path in (folder / split).glob(f"{_PREFIX}*"):
            if path.name not in kept:
                (path / MANIFEST_FILE).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # It has files that are not ours.
                    path.rmdir()
