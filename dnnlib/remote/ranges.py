"""Byte ranges of remote files, read through fsspec or plain connections."""

import functools
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from dnnlib import addresses
from dnnlib.addresses import (
    HEADERS,
    AddressError,
    check_response,
    is_http,
    open_store,
    persist,
    scheme_of,
    without_query,
)
from dnnlib.remote.connections import Reply, get_range

PATIENCE_SEC = 300.0  # How long a range is requested again after faults that may pass.
_FIRST_WAIT_SEC, _LONGEST_WAIT_SEC = 0.25, 30.0
_TELL_AFTER_SEC = 10.0
_MIN_BYTES_PER_SEC = 100_000
# Keys under which object stores give the version of a file.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "blob_id", "generation", "LastModified", "created")
_random = random.Random()  # The global one's draws belong to other code.
_last_told = [-60.0]


class Answer(NamedTuple):
    """A range of a file, and what its server says about the file.

    Attributes:
        data: The bytes; None if the server sends only whole files.
        size: Size of the whole file in bytes; None if unknown.
        version: Text that changes with the content of the file; empty if the server gives none.
    """

    data: bytes | memoryview | None
    size: int | None
    version: str


class StatusError(OSError):
    """An error response from a server; its HTTP ``status`` shows whether the fault may pass."""

    def __init__(self, status: int, message: str | None) -> None:
        super().__init__()
        self.status, self.message = status, message or ""


class NoRangesError(Exception):
    """A server sends only whole files; ``answer`` holds what it says about this one."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("no ranges")
        self.answer = answer


def ask(address: str, start: int, end: int) -> Answer:
    """Return bytes ``start`` to ``end`` (exclusive) of the file at an address, fewer at its end.

    Meant as the first request to a server: it gives up after four attempts. Raises AddressError,
    and NoRangesError.
    """
    return _answered(persist(address, lambda: _attempt(address, start, end, is_first=True)))


def ask_patiently(address: str, start: int, end: int) -> Answer:
    """Return what :func:`ask` does, but retry for up to five minutes, with growing pauses.

    After ten seconds it prints that it is waiting, at most once a minute.
    """
    return _answered(persist(address, lambda: _attempt(address, start, end), patience(address)))


def patience(address: str) -> Iterator[float]:
    """Yield the seconds to wait before each further attempt, doubling up to half a minute."""
    started, wait = time.monotonic(), _FIRST_WAIT_SEC
    while (elapsed := time.monotonic() - started) < PATIENCE_SEC:
        if elapsed > _TELL_AFTER_SEC and time.monotonic() > _last_told[0] + 60:
            _last_told[0] = time.monotonic()
            text = f"Waiting for {without_query(address)}, for up to {PATIENCE_SEC / 60:g} minutes."
            print(text, file=sys.stderr, flush=True)
        # Jitter: clients that were refused together should not return together.
        yield min(wait, max(PATIENCE_SEC - elapsed, 0)) * _random.uniform(0.5, 1)
        wait = min(2 * wait, _LONGEST_WAIT_SEC)


def _answered(answer: Answer) -> Answer:
    if answer.data is None:
        raise NoRangesError(answer)
    return answer


def _attempt(address: str, start: int, end: int, *, is_first: bool = False) -> Answer:
    if not is_http(address):
        return _of_store(_store(os.getpid(), scheme_of(address)), address, start, end)
    limit = addresses.TIMEOUT_SEC
    total = limit + (end - start) / _MIN_BYTES_PER_SEC
    # The first request goes through fsspec, which handles faulty addresses, proxies and passwords.
    reply = None if is_first else get_range(address, start, end, limit, total)
    if reply is not None:
        return _answer(address, start, end, reply)
    from aiohttp import ClientTimeout
    from fsspec.asyn import sync

    store = _store(os.getpid(), scheme_of(address))
    timeout = ClientTimeout(total=total, connect=limit, sock_read=limit)
    return sync(store.loop, _get, store, address, start, end, timeout)


@functools.lru_cache(8)
def _store(pid: int, scheme: str) -> Any:
    """Return the file system of a scheme, one per process: forks cannot share connections."""
    return open_store(f"{scheme}://")


def _of_store(store: Any, address: str, start: int, end: int) -> Answer:
    facts = _facts(os.getpid(), address)
    if store.async_impl:
        data = store.cat_file(address, start=start, end=min(end, facts.size))
    else:
        # Without fsspec's cache, which would read ahead.
        with store.open(address, cache_type="none") as file:
            file.seek(start)
            data = file.read(end - start)
    if len(data) != max(min(end, facts.size) - start, 0):
        raise EOFError
    return facts._replace(data=data)


@functools.lru_cache(4096)
def _facts(pid: int, address: str) -> Answer:
    """Return what an object store says about a file; a process asks once."""
    info = _store(pid, scheme_of(address)).info(address)
    versions = [str(info[key]) for key in _VERSION_KEYS if info.get(key)]
    return Answer(b"", int(info["size"]), versions[0] if versions else "")


async def _get(store: Any, address: str, start: int, end: int, timeout: Any) -> Answer:
    session = await store.set_session()
    headers = HEADERS | {"Range": f"bytes={start}-{end - 1}"}
    settings = {**store.kwargs, "headers": headers, "timeout": timeout}
    async with session.get(store.encode_url(address), **settings) as response:
        check_response(address, response, sys.maxsize)
        status, length = response.status, response.content_length
        is_wanted = status == 206 or (status < 400 and length is not None and length <= end)
        data = await response.read() if is_wanted else b""
        reply = Reply(status, response.reason, response.headers, data)
        return _answer(address, start, end, reply)


def _answer(address: str, start: int, end: int, reply: Reply) -> Answer:
    """Return the answer in a server's reply, or raise the error that it reports."""
    status, headers, data = reply.status, reply.headers, reply.data
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", ""))
    size = int(found[2]) if found and found[2] != "*" else None
    if status == 404:
        raise FileNotFoundError(address)
    if status == 416:  # The file ends before the range.
        return Answer(b"", size, version)
    if status >= 400:
        raise StatusError(status, reply.reason)
    if status != 206:
        length = headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        return Answer(None if size is None or size > end else data[start:], size, version)
    if found is None or found[1] != str(start):
        problem = "its server gives other ranges than were asked for"
        raise AddressError(f"{without_query(address)}: {problem}.")
    if len(data) != (end if size is None else min(end, size)) - start:
        raise EOFError
    return Answer(data, size, version)
