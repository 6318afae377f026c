"""Files on web servers and in object stores, read through fsspec."""

import io
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

# The accepted schemes, and the package that fsspec needs to read each.
_PACKAGES = dict(
    http="aiohttp", https="aiohttp", s3="s3fs", gs="gcsfs", az="adlfs", hf="huggingface_hub"
)
_BUFFER_BYTES = 1 << 20
TIMEOUT_SEC = 30
_MIN_BYTES_PER_SEC = 1000
_WAITS_SEC = (1, 3, 10)  # Before each further attempt after a fault that may pass.
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
HEADERS = {"Accept-Encoding": "identity"}  # Files must come as they are stored.


class AddressError(ValueError):
    """Says why an address cannot be read, in one sentence that begins with the address."""


def is_address(location: str | os.PathLike) -> bool:
    """Return whether ``location`` is an address, with an accepted scheme or not, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", str(location)) is not None


def under(folder: str | os.PathLike, *names: str) -> Path | str:
    """Return the location of a file in a folder, which may be an address.

    The query of an http address, such as a store's signature, stays at the end.
    """
    if not is_address(folder):
        return Path(folder, *names)
    assert all(re.fullmatch(r"\w[\w.-]*", name) for name in names), names
    base, mark, query = _split(str(folder))
    return "/".join([base.rstrip("/"), *names]) + mark + query


def open_address(address: str) -> BinaryIO:
    """Return the file at an address as a stream to read from start to end, and then to close.

    If the connection breaks, it is reopened and reading goes on. Because an address may come from
    a file, only a few schemes are accepted, without fsspec's chains and commands. Raises
    AddressError, here and while reading.
    """
    return io.BufferedReader(_Stream(address), _BUFFER_BYTES)


def download(address: str, file: BinaryIO, callback: Any, max_bytes: int) -> None:
    """Write the file at an http(s) address into ``file``, reporting to an fsspec ``callback``.

    An attempt fails after 30 s in which the server is silent or sends less than 1 kB per second.
    There are at most four attempts, within about two minutes of that. Redirects stay within
    http(s), and an https address is never redirected to http. Raises AddressError, also if the file
    has more than ``max_bytes``.
    """
    store = open_store(address)

    def attempt() -> None:
        file.seek(0)
        file.truncate()
        callback.absolute_update(0)
        with store.open(address, block_size=0, size=1, headers=HEADERS) as source:
            check_response(address, source.r, max_bytes)
            started, size, declared = time.monotonic(), 0, source.r.content_length
            callback.set_size(declared)
            while data := source.read(_BUFFER_BYTES):
                size += len(data)
                elapsed = time.monotonic() - started
                if size > max_bytes:
                    raise _too_large(address, max_bytes)
                if elapsed > TIMEOUT_SEC and size < _MIN_BYTES_PER_SEC * elapsed:
                    raise TimeoutError
                file.write(data)
                callback.relative_update(len(data))
            if declared not in (None, size):
                raise EOFError

    persist(address, attempt)


def check_response(address: str, response: Any, max_bytes: int) -> None:
    """Raise AddressError for a redirect from https to http, or for more than ``max_bytes``."""
    steps = [*(step.url for step in response.history), response.url]
    if address.lower().startswith("https:") and any(step.scheme != "https" for step in steps):
        problem = "refused, because it redirects to plain http"
        raise AddressError(f"{without_query(address)}: {problem}.")
    if (response.content_length or 0) > max_bytes:
        raise _too_large(address, max_bytes)


def _too_large(address: str, max_bytes: int) -> AddressError:
    problem = f"refused, because it has over {max_bytes:,} bytes"
    return AddressError(f"{without_query(address)}: {problem}.")


class _Stream(io.RawIOBase):
    """The bytes of the file at an address; resumes where a connection broke."""

    def __init__(self, address: str) -> None:
        self._address, self._store = address, open_store(address)
        self._position, self._file = 0, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = persist(self._address, lambda: self._read(len(buffer)))
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._connect()
            return self._file.read(size)
        except Exception:
            self._disconnect()
            raise

    def _connect(self) -> None:
        if not is_http(self._address):
            self._file = self._store.open(self._address)
            self._file.seek(self._position)
            return
        part = {"Range": f"bytes={self._position}-"} if self._position else {}
        # Without a size, which may be wrong, fsspec would first ask the server for it.
        self._file = self._store.open(self._address, block_size=0, size=1, headers=HEADERS | part)
        # A server without range requests starts at the first byte.
        skipped = self._position if self._file.r.status == 206 else 0
        while skipped < self._position:
            data = self._file.read(min(self._position - skipped, _BUFFER_BYTES))
            if not data:
                raise EOFError
            skipped += len(data)

    def _disconnect(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def scheme_of(address: str) -> str:
    """Return the scheme of an address, such as ``https``; raises AddressError for any other."""
    scheme = address.partition(":")[0].lower()
    if scheme not in _PACKAGES:
        accepted = ", ".join(f"{name}://" for name in _PACKAGES)
        raise AddressError(f"{address}: not an address that can be read; accepted: {accepted}.")
    return scheme


def open_store(address: str) -> Any:
    """Return a new fsspec file system for the scheme of an address.

    Raises AddressError for an unknown scheme, or if the package that reads it is not installed.
    """
    scheme = scheme_of(address)
    import fsspec

    # Not from fsspec's cache: data loaders fork the process and must not share its connections.
    settings: dict[str, Any] = dict(skip_instance_cache=True)
    try:
        if is_http(address):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, connect=TIMEOUT_SEC, sock_read=TIMEOUT_SEC)
            settings |= dict(headers=HEADERS, client_kwargs=dict(trust_env=True, timeout=timeout))
        return fsspec.filesystem(scheme, **settings)
    except ImportError:
        package = _PACKAGES[scheme]
        raise AddressError(
            f"{without_query(address)}: is read by the package {package}, which is not installed: "
            f"pip install {package}."
        ) from None


def persist(address: str, action: Callable[[], Any], waits: Iterable[float] | None = None) -> Any:
    """Return the result of ``action``, retrying after faults that may pass.

    ``waits`` holds the seconds before each further attempt, by default 1, 3 and 10. Raises
    AddressError when no attempt is left, or at once for a fault that will not pass.
    """
    for wait in (*_WAITS_SEC, None) if waits is None else itertools.chain(waits, [None]):
        try:
            return action()
        except AddressError:
            raise
        except Exception as error:  # The packages raise many types of their own.
            status = getattr(error, "status", None)
            name = type(error).__name__
            lasts = isinstance(error, FileNotFoundError | PermissionError) or "Url" in name
            if wait is None or lasts or status not in (None, *_PASSING_STATUS):
                # Not the error's own text, which may contain the signature of an address.
                where = f"{without_query(address)}: cannot be read"
                raise AddressError(f"{where} ({_reason(error)}).") from None
        time.sleep(wait)
    raise AssertionError


def _reason(error: Exception) -> str:
    name, status = type(error).__name__, getattr(error, "status", None)
    if name == "TooManyRedirects":
        return "it redirects too often"
    if status is not None:
        # The message for a malformed response continues with what the server sent.
        return f"{status} {getattr(error, 'message', '')}".partition("\n")[0].strip(" :")[:80]
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, TimeoutError):
        return f"the server was silent or too slow for {TIMEOUT_SEC} s"
    if isinstance(error, EOFError) or name == "ClientPayloadError":
        return "the connection ended before the file"
    if "RedirectClient" in name:
        return "it redirects to an address that is not http or https"
    reason = getattr(error, "strerror", None) or name
    # asyncio replaces the system's message by one with addresses.
    return os.strerror(error.errno) if reason.startswith("Connect call failed") else reason


def is_http(address: str) -> bool:
    return address.lower().startswith(("http:", "https:"))


def without_query(address: str) -> str:
    """Return an address as messages show it: without its query, which may be a signature.

    Only http(s) addresses have a query.
    """
    return _split(address)[0]


def name_of(location: str | os.PathLike) -> str:
    """Return the last name in a path, or in an address with characters unfit for files replaced."""
    if not is_address(location):
        return Path(location).name
    return re.sub(r"[^\w.-]+", "-", without_query(str(location)).rstrip("/").rpartition("/")[2])


def _split(address: str) -> tuple[str, str, str]:
    return address.partition("?") if is_http(address) else (address, "", "")
