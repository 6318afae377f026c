"""A process that writes files from memory shared with a training process, and outlives it.

:class:`torch_utils.saver.Saver` starts it and sends it requests over a socket. It loads only the
standard library and knows nothing of tensors. When the training process ends, however it ends, the
saver completes the requests that it has received, and then ends too.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import queue
import shutil
import signal
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dnnlib.files import atomic_write, file_sizes, fsync_folder, is_locked, write_json

MANIFEST = "manifest.json"  # Completes a state: a folder without it is not one.
DEADLINE_SEC = 30 * 60.0  # How long a saver may go on writing after its process has ended.
_LENGTH = struct.Struct("<Q")
_CHUNK = 8 << 20
_ALIGNMENT = 64  # Bytes, of tensors in an archive: PyTorch maps them into memory.
# A missing part is given up once the folder has not changed for so long. The second applies where
# no process holds the lock of the part's writer either.
_STANDSTILL_SEC, _UNLOCKED_STANDSTILL_SEC = 120.0, 20.0
_HERE, _RENAME_EXCHANGE = -100, 2  # Linux's AT_FDCWD and RENAME_EXCHANGE, for renameat2.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

Region = Sequence[int]  # Index of a shared memory segment, first byte, number of bytes.


def send_message(connection: socket.socket, message: Any, descriptor: int | None = None) -> None:
    """Send a JSON value, and optionally an open file descriptor, over a local socket."""
    content = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)
    if descriptor is not None:
        socket.send_fds(connection, [b"\0"], [descriptor])


def receive_message(connection: socket.socket) -> Any:
    """Return the next message; raises EOFError if the other process has gone."""
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    return json.loads(_receive(connection, length))


def _receive(connection: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        received = connection.recv(size - len(content))
        if not received:
            raise EOFError
        content += received
    return bytes(content)


def lock_path(run_dir: Path, rank: int) -> Path:
    """Return the path of the file that a rank's saver keeps locked for as long as it lives."""
    return run_dir / f".saver-{rank:05d}.lock"


def lock_of_writer(part: Path) -> Path:
    """Return the lock file of the saver that writes ``part``, a state's ``part-RANK.*``."""
    return lock_path(part.parent.parent, int(part.stem.rpartition("-")[2]))


def sidecar_of(path: Path) -> Path:
    """Return the file that holds a part's checksum and size until the manifest records them."""
    return path.with_suffix(".json")


class SaverProcess:
    """Executes requests in order, and answers each with None or a description of its error."""

    def __init__(self, connection: socket.socket, deadline_sec: float, rate: float | None) -> None:
        self._connection, self._deadline, self._rate = connection, deadline_sec, rate
        self._segments: list[mmap.mmap] = []
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lock: IO | None = None
        self._lock_path = ""
        self._kinds: dict[str, Callable[..., None]] = dict(
            lock=self._take_lock, file=self._write_file, archive=self._write_archive
        )
        self._kinds["manifest"] = self._complete

    def run(self) -> None:
        """Execute requests until the other process has gone and none is left."""
        threading.Thread(target=self._listen, daemon=True).start()
        while (job := self._jobs.get()) is not None:
            kind = job.pop("kind")
            try:
                self._kinds[kind](**job)
                error = None
            except OSError as caught:
                known = caught.errno, caught.strerror, caught.filename
                error = [str(caught)] if caught.errno is None else known
            except Exception as caught:
                error = [f"{type(caught).__name__}: {caught}"]
            with contextlib.suppress(OSError):  # The other process has gone.
                send_message(self._connection, error)
        self._drop_lock()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                job = receive_message(self._connection)
                if job["kind"] == "segment":
                    _, found, *_ = socket.recv_fds(self._connection, 1, 1)
                    if not found:  # The other process ended before it could send one.
                        break
                    self._segments.append(mmap.mmap(found[0], 0, prot=mmap.PROT_READ))
                    os.close(found[0])
                else:
                    self._jobs.put(job)
        self._jobs.put(None)
        time.sleep(self._deadline)
        os._exit(1)

    def _drop_lock(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._lock_path)
            self._lock.close()

    def _take_lock(self, path: str) -> None:
        self._drop_lock()
        hidden = f"{path}.{os.getpid()}.tmp"
        self._lock = open(hidden, "w")
        with contextlib.suppress(OSError):  # Some network file systems have no locks.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Renamed only once locked: a process that tests the lock takes it for a moment.
        os.replace(hidden, path)
        self._lock_path = path

    def _chunks(self, regions: Sequence[Region]) -> Iterator[memoryview]:
        """Yield the content of memory regions in chunks, no faster than the write rate allows."""
        began, num_bytes = time.monotonic(), 0
        for segment, first, size in regions:
            with memoryview(self._segments[segment]) as content:
                for start in range(first, first + size, _CHUNK):
                    chunk = content[start : min(start + _CHUNK, first + size)]
                    yield chunk
                    num_bytes += len(chunk)
                    chunk.release()
                    if self._rate is not None:
                        time.sleep(max(began + num_bytes / self._rate - time.monotonic(), 0))

    def _write_file(self, path: str, regions: Sequence[Region]) -> None:
        """Write the concatenated regions to ``path``, then their checksum to its sidecar file."""
        digest = hashlib.sha256()
        with atomic_write(path) as file:
            for chunk in self._chunks(regions):
                file.write(chunk)
                digest.update(chunk)
        about = dict(sha256=digest.hexdigest(), size=sum(region[2] for region in regions))
        write_json(sidecar_of(Path(path)), about)

    def _write_archive(self, path: str, members: Sequence[tuple[str, Region]]) -> None:
        """Write regions as the members of a zip archive laid out as ``torch.save`` does it."""
        with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, region in members:
                info = zipfile.ZipInfo(name)
                info.file_size = region[2]
                header = file.tell() + 30 + len(name.encode()) + 4
                if region[2] * 1.05 > zipfile.ZIP64_LIMIT:
                    header += 20
                padding = -header % _ALIGNMENT
                info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
                with archive.open(info, "w") as member:
                    for chunk in self._chunks([region]):
                        member.write(chunk)
                info.external_attr = 0  # A snapshot's check takes file modes for damage.

    def _complete(
        self,
        path: str,
        final: str,
        content: dict[str, Any],
        parts: Sequence[tuple[str, Any]],
        remove: Sequence[str],
    ) -> None:
        """Once every part of a state exists, write its manifest and rename the folder to ``final``.

        Then delete the states ``remove``, which it makes superfluous.
        """
        folder = Path(path)
        found = self._wait_for([folder / name for name, _ in parts])
        listed = [
            dict(name=name, sha256=about["sha256"], size=about["size"], first_rows=first_rows)
            for (name, first_rows), about in zip(parts, found, strict=True)
        ]
        content = dict(content, parts=listed)
        for name, _ in parts:
            sidecar_of(folder / name).unlink()
        write_json(folder / MANIFEST, dict(content, checksum=manifest_checksum(content)))
        _replace_folder(folder, Path(final))
        for old in map(Path, remove):
            remove_state(old)

    def _wait_for(self, parts: Sequence[Path]) -> list[dict[str, Any]]:
        """Return the contents of the parts' sidecars, waiting for those still being written.

        Raises OSError if a part has not arrived and its writer seems to have gone.
        """
        seen, since = None, 0.0
        while True:
            found = [_read_sidecar(part) for part in parts]
            pairs = zip(parts, found, strict=True)
            missing = [part.name for part, about in pairs if about is None]
            if not missing:
                return found
            folder = parts[0].parent
            sizes = file_sizes(folder)
            now = time.monotonic()
            if sizes != seen:
                seen, since = sizes, now
            elif now > since + _UNLOCKED_STANDSTILL_SEC:
                # To test its own lock, a process would release it; its own part was tried already.
                locks = {str(lock_of_writer(folder / name)) for name in missing}
                is_alive = any(map(is_locked, map(Path, locks - {self._lock_path})))
                if not is_alive or now > since + _STANDSTILL_SEC:
                    raise OSError(f"{folder}: {', '.join(missing)} did not arrive")
            time.sleep(0.02)


def manifest_checksum(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's ``content``, which excludes the checksum itself."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _replace_folder(folder: Path, final: Path) -> None:
    """Rename ``folder`` to ``final`` and delete what had that name.

    If the system can exchange two names at once, ``final`` never goes missing in between.
    """
    old = folder
    if not (final.is_dir() and _exchange(folder, final)):
        old = folder.with_suffix(".old.tmp")
        with contextlib.suppress(FileNotFoundError):
            final.rename(old)
        folder.rename(final)
    fsync_folder(final.parent)
    remove_state(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders atomically; return False if the system cannot do so."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(first), os.fsencode(second)
    return rename is not None and rename(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE) == 0


def _read_sidecar(part: Path) -> dict[str, Any] | None:
    try:
        return json.loads(sidecar_of(part).read_text())
    except (OSError, ValueError):
        return None


def remove_state(path: Path) -> None:
    """Delete a state, a file or a folder; the manifest goes first, so that no partial state counts.

    A state that does not exist is no error.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink()


def main(descriptor: int, deadline_sec: float, rate: float | None) -> None:
    """Serve the process at the other end of the socket ``descriptor``.

    Args:
        deadline_sec: How long to go on writing after that process has ended.
        rate: Most bytes written per second; None does not limit them.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # Training goes first.
    with socket.socket(fileno=descriptor) as connection:
        SaverProcess(connection, deadline_sec, rate).run()
