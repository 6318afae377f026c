"""The identity of data: names, lengths and contents of files, and never their dates.

Contents stand for themselves by their CRC-32, which a zip stores beside each file, so that a zip
and the folder that it is unpacked to are the same data. Files of a folder are read once; what was
found is kept in the user's cache folder for as long as a file stays as it is.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dnnlib.files import atomic_write, cache_dir
from dnnlib.parallel import num_usable_cores
from dnnlib.progress import progress

VERSION = "v2-"  # Identities of version 1, of a folder's dates, have no such mark.
_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 16
_FILES_A_TURN = 256
# A file can change again within a tick of the clock of its file system: too new ones are not kept.
_MIN_AGE_NS = 3_000_000_000


def identity_of_files(
    names: Sequence[str], sizes: Sequence[int], crcs: Sequence[int], metadata: bytes | None
) -> str:
    """Return the identity of files with these names, lengths in bytes and CRC-32s.

    ``metadata`` is the content of their dataset.json, if there is one.
    """
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape"))
    digest.update(np.asarray(sizes, "<i8").tobytes() + np.asarray(crcs, "<u4").tobytes())
    digest.update(metadata or b"")
    return VERSION + digest.hexdigest()


def checksums(root: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths int64 [N] and CRC-32s uint32 [N] of a folder's files."""
    cache = cache_dir() / "checksums" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()}"
    known = _read_cache(cache.with_suffix(".npz"))
    stats = np.array([_stat(root / name) for name in names], np.int64).reshape(-1, 4)
    crcs = np.zeros(len(names), np.uint32)
    missing = []
    for row, name in enumerate(names):
        found = known.get(name)
        if found is not None and found[0] == stats[row].tolist():
            crcs[row] = found[1]
        else:
            missing.append(row)
    if missing:
        before_ns = time.time_ns()
        _read_missing(root, names, missing, crcs)
        keep = np.maximum(stats[:, 1], stats[:, 2]) < before_ns - _MIN_AGE_NS
        _write_cache(cache.with_suffix(".npz"), names, stats, crcs, keep)
    return stats[:, 0], crcs


def _read_missing(root: Path, names: Sequence[str], rows: list[int], crcs: np.ndarray) -> None:
    num_threads = min(_MAX_THREADS, 2 * num_usable_cores(), len(rows))
    with (
        concurrent.futures.ThreadPoolExecutor(num_threads) as executor,
        progress(total=len(rows), label=f"Checksums of {root.name}", transient=True) as bar,
    ):
        for start in range(0, len(rows), _FILES_A_TURN):
            part = rows[start : start + _FILES_A_TURN]
            crcs[part] = list(executor.map(lambda row: _crc(root / names[row]), part))
            bar.update(len(part))


def _stat(path: Path) -> tuple[int, int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _read_cache(path: Path) -> dict[str, tuple[list[int], int]]:
    """Return what is known of each file: its length, dates and inode, and its CRC-32."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            stats, crcs = arrays["stats"].tolist(), arrays["crcs"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return {}
    return {name: (stat, crc) for name, stat, crc in zip(names, stats, crcs, strict=False)}


def _write_cache(
    path: Path, names: Sequence[str], stats: np.ndarray, crcs: np.ndarray, keep: np.ndarray
) -> None:
    kept = "\0".join(name for name, is_kept in zip(names, keep, strict=True) if is_kept)
    blob = np.frombuffer(kept.encode("utf-8", "surrogateescape"), np.uint8)
    with contextlib.suppress(OSError), atomic_write(path) as file:  # A cache is not needed.
        np.savez(file, names=blob, stats=stats[keep], crcs=crcs[keep])
