"""Output streams that outlive their reader."""

import errno
import os
from collections.abc import Callable
from typing import Any


class Stream:
    """An output stream that drops what is written to it once its reader has gone.

    Args:
        stream: The stream that is wrapped; it must have a file descriptor.
        on_closed: Called when a write finds that the reader has gone.
    """

    def __init__(self, stream: Any, on_closed: Callable[[], None]) -> None:
        self._stream, self._on_closed = stream, on_closed

    def write(self, text: str) -> int:
        return self._attempt(lambda: self._stream.write(text)) or 0

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: a closed terminal.
                raise
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        self._on_closed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
