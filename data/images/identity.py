"""The identity of a dataset: the names, lengths and contents of its files, but not their dates.

A file's content is represented by its CRC-32, which a zip stores for each file, so that a zip and
the folder that it unpacks to have the same identity. The files of a folder are read once; their
checksums are kept in the user's cache folder until a file changes.
"""

import contextlib
import hashlib
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dnnlib.files import atomic_write, cache_dir, regular_file
from dnnlib.parallel import num_usable_cores, thread_map
from dnnlib.progress import progress

VERSION = "v2-"  # Prefix of identities. Those of version 1, which used dates, have none.
_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 16
_FILES_AHEAD = 256
# Checksums of newer files are not cached, as a file can change again within one tick of the clock
# of its file system.
_MIN_AGE_NS = 3_000_000_000


def identity_of_files(
    names: Sequence[str], sizes: Sequence[int], crcs: Sequence[int], metadata: bytes | None
) -> str:
    """Return the identity of files with the given names, lengths in bytes and CRC-32s.

    ``metadata`` is the content of their dataset.json, if there is one.
    """
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape"))
    digest.update(np.asarray(sizes, "<i8").tobytes() + np.asarray(crcs, "<u4").tobytes())
    digest.update(metadata or b"")
    return VERSION + digest.hexdigest()


def checksums(root: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths in bytes, int64 [N], and CRC-32s, uint32 [N], of a folder's files."""
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    cache = cache_dir() / "checksums" / f"{key}.npz"
    known = _read_cache(cache)
    stats = np.array([_stat(root / name) for name in names], np.int64).reshape(-1, 4)
    found = [known.get((name, *stat), -1) for name, stat in zip(names, stats.tolist(), strict=True)]
    crcs = np.array(found, np.int64)
    missing = np.flatnonzero(crcs < 0)
    if len(missing):
        before_ns = time.time_ns()
        paths = [root / names[row] for row in missing]
        num_threads = min(_MAX_THREADS, 2 * num_usable_cores(), len(paths))
        label = f"Checksums of {root.name}"
        with progress(total=len(paths), label=label, transient=True) as bar:
            results = thread_map(_crc, paths, num_threads, _FILES_AHEAD)
            for row, crc in zip(missing, results, strict=True):
                crcs[row] = crc
                bar.update()
        keep = np.maximum(stats[:, 1], stats[:, 2]) < before_ns - _MIN_AGE_NS
        _write_cache(cache, names, stats, crcs, keep)
    return stats[:, 0], crcs.astype(np.uint32)


def _stat(path: Path) -> tuple[int, int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb", buffering=0, opener=regular_file) as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _read_cache(path: Path) -> dict[tuple[str, int, int, int, int], int]:
    """Return the cached CRC-32s by name, length, dates and inode; empty if there are none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            keys = zip(names, *arrays["stats"].T.tolist(), strict=False)
            return dict(zip(keys, arrays["crcs"].tolist(), strict=False))
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return {}


def _write_cache(
    path: Path, names: Sequence[str], stats: np.ndarray, crcs: np.ndarray, keep: np.ndarray
) -> None:
    kept = "\0".join(name for name, is_kept in zip(names, keep, strict=True) if is_kept)
    blob = np.frombuffer(kept.encode("utf-8", "surrogateescape"), np.uint8)
    with contextlib.suppress(OSError), atomic_write(path) as file:  # The cache is optional.
        np.savez(file, names=blob, stats=stats[keep], crcs=crcs[keep].astype(np.uint32))
