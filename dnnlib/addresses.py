"""Files of object stores, read as streams and in parts: addresses of http, https, s3 and gs."""

import io
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

_ACCEPTED = "http://, https://, s3:// and gs://"
_BUFFER_BYTES = 1 << 20
_TIMEOUT_SEC = 60
_WAITS_SEC = (1, 3, 10)  # Before each further attempt of what may pass by itself.
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


class AddressError(ValueError):
    """Why an address cannot be read: one sentence that begins with it."""


def is_address(location: str | os.PathLike) -> bool:
    """Tell whether ``location`` is an address of any kind, accepted or not, rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", str(location)) is not None


def under(folder: str | os.PathLike, *names: str) -> Path | str:
    """Return where a file in a folder lies; the folder may be an address.

    What follows ``?`` in an http address, such as the signature of a store, stays at its end.
    """
    if not is_address(folder):
        return Path(folder, *names)
    assert all(re.fullmatch(r"\w[\w.-]*", name) for name in names), names
    base, mark, query = _split(str(folder))
    return "/".join([base.rstrip("/"), *names]) + mark + query


def open_address(address: str) -> BinaryIO:
    """Return the file at an address as a stream, to be read from begin to end and closed.

    An http or https address is asked again where the connection breaks. The command line tools of
    the stores, ``aws`` and ``gsutil``, read s3 and gs addresses, with whatever account and
    settings they have. Nothing else is accepted; above all no command, because an address may
    come from a file. Raises AddressError, also while reading.
    """
    return _open(address, 0, None)


def read_range(address: str, start: int, size: int) -> bytes:
    """Return ``size`` bytes of the file at an address from byte ``start`` on; fewer at its end.

    Raises AddressError.
    """
    if _scheme(address) == "s3":
        return _read_with_aws(address, start, start + size)
    with _open(address, start, start + size) as stream:
        return stream.read(size)


def _split(address: str) -> tuple[str, str, str]:
    is_http = address.lower().startswith(("http:", "https:"))
    return address.partition("?") if is_http else (address, "", "")


def _scheme(address: str) -> str:
    return address.partition(":")[0].lower()


def _shown(address: str) -> str:
    return _split(address)[0]


def _open(address: str, start: int, stop: int | None) -> BinaryIO:
    scheme = _scheme(address)
    if scheme in ("http", "https"):
        raw: io.RawIOBase = _HttpStream(address, start, stop)
    elif scheme == "s3":
        raw = _CommandStream(["aws", "s3", "cp", address, "-"], address)
    elif scheme == "gs":
        part = [] if stop is None else ["-r", f"{start}-{stop - 1}"]
        raw = _CommandStream(["gsutil", "-q", "cat", *part, address], address)
    else:
        raise AddressError(f"{address}: not an address that can be read; accepted: {_ACCEPTED}.")
    return io.BufferedReader(raw, _BUFFER_BYTES)


def _read_with_aws(address: str, start: int, stop: int) -> bytes:
    bucket, _, key = address.partition("://")[2].partition("/")
    command = ["aws", "s3api", "get-object", f"--bucket={bucket}", f"--key={key}"]
    command.append(f"--range=bytes={start}-{stop - 1}")
    # To a file, because it prints a description of the object.
    with tempfile.NamedTemporaryFile() as file:
        with io.BufferedReader(_CommandStream([*command, file.name], address)) as printed:
            printed.read()
        return Path(file.name).read_bytes()


class _HttpStream(io.RawIOBase):
    """Bytes of a file on a web server; goes on where a connection broke."""

    def __init__(self, address: str, start: int, stop: int | None) -> None:
        self._address, self._position, self._stop = address, start, stop
        self._response = None
        self._end: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        import requests
        import urllib3

        for wait in (*_WAITS_SEC, None):
            try:
                if self._response is None:
                    self._connect()
                data = self._response.raw.read(len(buffer))
                if data or self._end in (None, self._position):
                    self._position += len(data)
                    buffer[: len(data)] = data
                    return len(data)
                reason = "the connection ended early"
            except requests.HTTPError as error:
                status = error.response.status_code
                reason = f"{status} {error.response.reason}".strip()
                if status not in _PASSING_STATUS:
                    wait = None
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                reason = type(error).__name__
            self._disconnect()
            if wait is None:
                break
            time.sleep(wait)
        raise AddressError(f"{_shown(self._address)}: cannot be read ({reason}).")

    def _connect(self) -> None:
        import requests

        # A tar must come as it is stored, not compressed on the way.
        headers = {"Accept-Encoding": "identity"}
        if self._position or self._stop is not None:
            last = "" if self._stop is None else self._stop - 1
            headers["Range"] = f"bytes={self._position}-{last}"
        response = requests.get(self._address, headers=headers, stream=True, timeout=_TIMEOUT_SEC)
        self._response = response
        response.raise_for_status()
        first = self._position if response.status_code == 206 else 0
        length = response.headers.get("Content-Length")
        self._end = None if length is None else first + int(length)
        while first < self._position:  # The server knows no parts.
            skipped = len(response.raw.read(min(self._position - first, _BUFFER_BYTES)))
            if not skipped:
                raise requests.ConnectionError("ended early")
            first += skipped

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None

    def close(self) -> None:
        self._disconnect()
        super().close()


class _CommandStream(io.RawIOBase):
    """What a program, which no shell interprets, prints."""

    def __init__(self, command: list[str], address: str) -> None:
        self._process: subprocess.Popen | None = None
        self._name, self._address = command[0], address
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
            )
        except FileNotFoundError:
            raise AddressError(
                f"{address}: is read by the program {self._name}, which is not installed."
            ) from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        num = self._process.stdout.readinto(buffer)
        if not num and self._process.wait():
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1].strip() if lines else f"code {self._process.returncode}"
            raise AddressError(
                f"{self._address}: cannot be read ({self._name}: {reason.rstrip('.')})."
            )
        return num

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
        self._errors.close()
        super().close()
