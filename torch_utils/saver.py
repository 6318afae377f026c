"""Writes tensors to files while training continues, and after it ends."""

import contextlib
import ctypes
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib.saver import DEADLINE_SEC, Region, receive_message, send_message

_ALIGNMENT = 64
_SMALLEST_SEGMENT = 4 << 20
_POPULATE_STEP = 64 << 20
_MADV_POPULATE_WRITE = 23
_START = "import sys; sys.path.insert(0, sys.argv[1]); from dnnlib.saver import main; "
_START += "main(int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]) or None)"


class Saver:
    """Copies tensors to shared memory, from where a separate process writes them to files.

    The process runs in its own session, so signals to this process, and killing it or its launcher,
    do not reach the writer, which completes the requests that it has received.

    Usage: call :meth:`begin`, :meth:`stage` everything, then the ``write_`` methods. Errors of the
    process are raised as OSError by the next :meth:`check`, :meth:`begin` or :meth:`wait`.

    Args:
        rate: Most MB (10^6 bytes) to write per second; None does not limit them.
    """

    def __init__(self, rate: float | None = None) -> None:
        self._connection, other = socket.socketpair()
        root, bytes_per_sec = Path(__file__).resolve().parent.parent, (rate or 0) * 1e6
        numbers = (str(other.fileno()), str(DEADLINE_SEC), str(bytes_per_sec))
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _START, str(root), *numbers],
                pass_fds=[other.fileno()],
                start_new_session=True,
                cwd="/",
                **quiet,
            )
        self._segments: list[_Segment] = []
        self._staged: dict[tuple, tuple[Tensor, Region]] = {}
        self._num_pending = 0
        self._is_copying = False  # Whether copies from a GPU may still be in progress.

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exc: object) -> None:
        """Disconnect from the process, which ends by itself when its work is done."""
        self._connection.close()
        if exc[0] is None and not self._num_pending:
            self._process.wait()
        self._process.returncode = 0  # It may still run; without this, Popen warns about that.

    @property
    def is_busy(self) -> bool:
        """Whether any request may still be unfinished; raises OSError as :meth:`check` does."""
        self.check()
        return self._num_pending > 0

    def hold(self, path: Path) -> None:
        """Make the process lock a file for as long as it lives, and then delete it."""
        self._tell(kind="lock", path=str(path.absolute()))

    def reserve(self, num_bytes: int, *, is_pinned: bool = False) -> None:
        """Allocate shared memory for ``num_bytes`` in total, and populate it in the background.

        ``is_pinned`` locks its pages, for copies from a GPU.
        """
        missing = num_bytes - sum(len(segment.memory) for segment in self._segments)
        if missing > 0:
            self._segments[self._add_segment(missing, is_pinned)].populate()

    def begin(self, is_urgent: Callable[[], bool] = lambda: False) -> float:
        """Wait until everything is written, so that its memory can be reused; return the seconds.

        Once ``is_urgent`` returns True, the wait ends, and new memory is used where necessary.
        """
        began = time.monotonic()
        while self.is_busy and not is_urgent():
            select.select([self._connection], [], [], 0.1)
        is_busy = self.is_busy
        for segment in self._segments:
            segment.used = len(segment.memory) if is_busy else 0
        self._staged.clear()
        return time.monotonic() - began

    def stage(self, content: Tensor | bytes, *, keep: bool = False) -> Region:
        """Copy a tensor (in its memory order) or bytes to shared memory; return the region.

        A tensor staged with ``keep`` since :meth:`begin` is not copied again.
        """
        if isinstance(content, bytes):
            content = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        content = content.detach()
        key = (content.data_ptr(), content.dtype, content.shape, content.stride())
        if key in self._staged:
            return self._staged[key][1]
        dense = content.permute(memory_order(content))
        number, start = self._find_room(content.nbytes, content.is_cuda)
        if content.nbytes:
            memory = self._segments[number].memory[start : start + content.nbytes]
            memory.view(content.dtype).view(dense.shape).copy_(dense, non_blocking=True)
            self._is_copying |= content.is_cuda
        region = (number, start, content.nbytes)
        if keep:
            self._staged[key] = content, region
        return region

    def write_file(self, path: Path, regions: Sequence[Region]) -> None:
        """Have the concatenated regions written to a file, and their checksum beside it."""
        self._tell(kind="file", path=str(path.absolute()), regions=regions)

    def write_archive(self, path: Path, members: Mapping[str, Region]) -> None:
        """Have the regions written, by member name, as an archive that ``torch.load`` reads."""
        self._tell(kind="archive", path=str(path.absolute()), members=list(members.items()))

    def write_manifest(
        self,
        path: Path,
        final: Path,
        content: Mapping[str, Any],
        parts: Sequence[tuple[str, Any]],
        remove: Sequence[Path],
    ) -> None:
        """Have the folder ``path`` completed by its manifest once all of its parts exist.

        The folder is then renamed to ``final``, and the states ``remove`` are deleted.

        Args:
            content: What the manifest holds besides the list of parts.
            parts: Name of each part of any rank, and the first rows of its tensors.
        """
        old = [str(path.absolute()) for path in remove]
        about = dict(final=str(final.absolute()), content=content, parts=parts, remove=old)
        self._tell(kind="manifest", path=str(path.absolute()), **about)

    def check(self) -> None:
        """Raise OSError if something could not be written, without waiting."""
        self._connection.setblocking(False)
        try:
            while self._num_pending:
                try:
                    self._connection.recv(1, socket.MSG_PEEK)
                except BlockingIOError:
                    return
                self._connection.setblocking(True)
                self._hear()
                self._connection.setblocking(False)
        finally:
            self._connection.setblocking(True)

    def wait(self) -> None:
        """Wait until everything is written; raises OSError if something could not be."""
        while self._num_pending:
            self._hear()

    def _hear(self) -> None:
        try:
            error = receive_message(self._connection)
        except (EOFError, OSError):
            self._num_pending = 0
            raise OSError(_LOST) from None
        self._num_pending -= 1
        if error is not None:
            raise OSError(*error)

    def _tell(self, **job: Any) -> None:
        if self._is_copying:
            torch.cuda.synchronize()
            self._is_copying = False
        try:
            send_message(self._connection, job)
        except OSError:
            self._num_pending = 0
            raise OSError(_LOST) from None
        self._num_pending += 1  # Only now: no answer comes if a stop interrupts the sending.

    def _find_room(self, size: int, is_pinned: bool) -> tuple[int, int]:
        rooms = (i for i, seg in enumerate(self._segments) if seg.used + size <= len(seg.memory))
        number = next(rooms, None)
        if number is None:
            held = sum(len(segment.memory) for segment in self._segments)
            number = self._add_segment(max(size, held // 4, _SMALLEST_SEGMENT), is_pinned)
        segment = self._segments[number]
        start = segment.used
        segment.used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return number, start

    def _add_segment(self, size: int, is_pinned: bool) -> int:
        segment = _Segment(size, is_pinned)
        self._segments.append(segment)
        try:
            send_message(self._connection, dict(kind="segment"), segment.descriptor)
        except OSError:
            raise OSError(_LOST) from None
        return len(self._segments) - 1


_LOST = "The process that writes states and snapshots was killed"


class _Segment:
    """Memory shared with the writing process."""

    descriptor = -1  # For __del__, if a stop interrupts __init__.

    def __init__(self, size: int, is_pinned: bool) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("setdiffit-states")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self.used = 0
        if is_pinned:
            torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 0)

    def populate(self) -> None:
        """Make the system allocate all of its pages now, in the background.

        That takes longer than copying, and would delay the first state.
        """
        if sys.platform == "linux":
            threading.Thread(target=self._populate, daemon=True).start()

    def _populate(self) -> None:
        madvise = ctypes.CDLL(None).madvise
        start = self.memory.data_ptr()
        for first in range(0, len(self.memory), _POPULATE_STEP):
            length = min(_POPULATE_STEP, len(self.memory) - first)
            address, size = ctypes.c_void_p(start + first), ctypes.c_size_t(length)
            if madvise(address, size, _MADV_POPULATE_WRITE):
                return  # Linux before 5.14 does not support it.

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def memory_order(tensor: Tensor) -> list[int]:
    """Return a tensor's dimensions in the order of their strides, outermost first.

    For a tensor that is not dense in memory, such as every second column of another, the usual
    order.
    """
    usual = list(range(tensor.ndim))
    if tensor.is_contiguous():
        return usual
    order = sorted(usual, key=lambda dim: -tensor.stride(dim))
    return order if tensor.permute(order).is_contiguous() else usual
