"""Persistent connections to web servers that read answers straight into memory.

A client of asyncio reads 256 kB at a time and takes Python's lock for each, which may take 5 ms
while a thread decodes images. Here a thread waits for the kernel alone, and takes the lock seldom
and for moments: http.client makes the connections alone, as a request through it takes half as much
time again.
"""

import contextlib
import functools
import http.client
import netrc
import os
import re
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dnnlib.addresses import HEADERS

_HEADERS = HEADERS | {"User-Agent": "SetDiffiT"}  # Some servers refuse who has no name.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: (.*))?")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_MAX_HEAD_BYTES = 1 << 16
_MAX_KEPT = 8  # Servers that a thread has connections to.
_own = threading.local()
# Servers that redirect, ask for passwords or do not say how long their answers are.
_indirect: set[str] = set()


class Reply(NamedTuple):
    """What a server answered; ``data`` are empty where they are of no use."""

    status: int
    reason: str | None
    headers: Mapping[str, str]
    data: bytes | memoryview


def get_range(address: str, start: int, end: int, limit: float, total: float) -> Reply | None:
    """Return bytes ``start`` to ``end`` (exclusive) of a file; None if this is no way to get them.

    That is so with proxies, redirects, passwords and answers of unknown length. A server may send
    the file from its begin on, with status 200; of one that ends after ``end`` there are no data.

    Args:
        limit: Seconds for which the server may be silent.
        total: Seconds for everything.

    Raises OSError and http.client.HTTPException; EOFError if the answer ends too early.
    """
    from yarl import URL  # Of aiohttp, so that both quote in the same way.

    url = URL(address)
    server = f"{url.scheme}://{url.host}:{url.port}"
    if server in _indirect or url.user is not None or not _is_plain(url.scheme, url.host):
        return None
    headers = {"Host": url.raw_authority} | _HEADERS | {"Range": f"bytes={start}-{end - 1}"}
    lines = [f"GET {url.raw_path_qs} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())]
    request = "\r\n".join([*lines, "", ""]).encode("ascii")
    most = {206: end - start, 200: end}
    asked = functools.partial(_exchange, request, most, limit, time.monotonic() + total)
    kept, reply = _kept(), None
    connection = kept.pop(server, None)
    if connection is not None:
        # A server ends what it has not been asked over for a while.
        with contextlib.suppress(ConnectionError):
            reply = asked(connection)
    if reply is None:
        connection = _connection(url.scheme, url.host, url.port, limit)
        reply = asked(connection)
    is_sized = reply.status in (200, 206) and "Content-Length" in reply.headers
    if reply.status in (401, 407) or (reply.status < 400 and not is_sized):
        _indirect.add(server)
        return None
    if connection.sock is not None:
        if len(kept) == _MAX_KEPT:
            kept.pop(next(iter(kept))).close()  # The one that was not used for the longest.
        kept[server] = connection
    return reply


def _exchange(
    request: bytes,
    most: Mapping[int, int],
    limit: float,
    deadline: float,
    connection: http.client.HTTPConnection,
) -> Reply:
    """Return what a server answers; the connection is closed unless that was read whole.

    ``most`` are the bytes that are read of an answer, by its status; of others and longer ones
    there are no data.
    """
    try:
        if connection.sock is None:
            connection.connect()
        sock = connection.sock
        sock.settimeout(limit)
        sock.sendall(request)
        head, rest = _head(sock, deadline)
        is_kept, reply = _parsed(head)
        length = reply.headers.get("Content-Length", "")
        if "Transfer-Encoding" in reply.headers or not length.isdecimal():
            length = sys.maxsize  # It comes in parts.
        if is_wanted := len(rest) <= int(length) <= most.get(reply.status, -1):
            reply = reply._replace(data=_body(sock, rest, int(length), deadline))
        if not (is_wanted and is_kept):
            connection.close()
        return reply
    except BaseException:
        connection.close()
        raise


def _head(sock: socket.socket, deadline: float) -> tuple[bytes, bytes]:
    """Return what comes before the bytes of an answer, and what came of these with it."""
    received = b""
    while True:
        end = _END_OF_HEAD.search(received)
        if end and not re.match(rb"HTTP/1\.1 1\d\d", received):
            return received[: end.start()], received[end.end() :]
        if end:  # The answer is yet to come.
            received = received[end.end() :]
            continue
        if len(received) > _MAX_HEAD_BYTES:
            raise http.client.LineTooLong("header")
        data = sock.recv(8192)
        if not data:
            raise EOFError if received else ConnectionResetError
        received += data
        if time.monotonic() > deadline:
            raise TimeoutError


def _parsed(head: bytes) -> tuple[bool, Reply]:
    """Return whether the connection stays, and the answer without its data."""
    from multidict import CIMultiDict  # Of aiohttp.

    first, *lines = re.split(rb"\r?\n", head)
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise http.client.BadStatusLine(first.decode("latin-1"))
    headers: CIMultiDict = CIMultiDict()
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip()] = value.strip()
    is_kept = found[1] == b"1" and headers.get("Connection", "").lower() != "close"
    reason = (found[3] or b"").decode("latin-1")
    return is_kept, Reply(int(found[2]), reason, headers, b"")


def _body(sock: socket.socket, begin: bytes, size: int, deadline: float) -> memoryview:
    """Return an answer of ``size`` bytes, which begins with those."""
    data = memoryview(np.empty(size, np.uint8))
    num = len(begin)
    data[:num] = begin
    while num < size:
        read = sock.recv_into(data[num:])
        if not read:
            raise EOFError
        num += read
        if time.monotonic() > deadline:
            raise TimeoutError
    return data


def _connection(scheme: str, host: str, port: int, limit: float) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=limit, context=_context())
    return http.client.HTTPConnection(host, port, timeout=limit)


def _kept() -> dict[str, http.client.HTTPConnection]:
    """Return the connections of this thread of this process, by server; a fork has none."""
    if getattr(_own, "pid", 0) != os.getpid():
        _own.pid, _own.connections = os.getpid(), {}
    return _own.connections


@functools.lru_cache(64)
def _is_plain(scheme: str, host: str) -> bool:
    """Return whether a server is asked without a proxy and without a password from ``~/.netrc``."""
    proxies = urllib.request.getproxies()
    if (proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host):
        return False
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is None
    return True


@functools.lru_cache(1)
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()
