"""Persistent connections to web servers that read responses straight into memory.

An asyncio client reads 256 kB at a time and acquires the GIL for each piece, which may take 5 ms
while another thread decodes images. Here a thread waits only for the kernel, and acquires the GIL
rarely and briefly. http.client only opens the connections, because a request through it would take
half as long again.
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

_HEADERS = HEADERS | {"User-Agent": "SetDiffiT"}  # Some servers refuse requests without one.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: (.*))?")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_MAX_HEAD_BYTES = 1 << 16
_MAX_KEPT = 8  # Servers that one thread keeps connections to.
_own = threading.local()
# Servers that redirect, ask for passwords or omit the length of their responses.
_indirect: set[str] = set()


class Reply(NamedTuple):
    """A server's response; ``data`` is empty if it was not wanted."""

    status: int
    reason: str | None
    headers: Mapping[str, str]
    data: bytes | memoryview


def get_range(address: str, start: int, end: int, limit: float, total: float) -> Reply | None:
    """Return bytes ``start`` to ``end`` (exclusive) of a file, or None if they need another client.

    They do with proxies, redirects, passwords and responses of unknown length. A server may send
    the whole file instead, with status 200; ``data`` is empty if that is longer than ``end`` bytes.

    Args:
        limit: Seconds for which the server may be silent.
        total: Seconds for the whole request.

    Raises OSError and http.client.HTTPException; EOFError if the response ends too early.
    """
    from yarl import URL  # aiohttp uses it, so both quote addresses in the same way.

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
        # The server closes a connection that has been idle for a while.
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
            kept.pop(next(iter(kept))).close()  # The least recently used one.
        kept[server] = connection
    return reply


def _exchange(
    request: bytes,
    most: Mapping[int, int],
    limit: float,
    deadline: float,
    connection: http.client.HTTPConnection,
) -> Reply:
    """Return a server's response; the connection is closed unless it was read to its end.

    ``most`` maps a status to the largest body that is read. With any other status, or if the body
    is longer, the reply has no data.
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
            length = sys.maxsize  # Chunked, or of unknown length.
        if is_wanted := len(rest) <= int(length) <= most.get(reply.status, -1):
            reply = reply._replace(data=_body(sock, rest, int(length), deadline))
        if not (is_wanted and is_kept):
            connection.close()
        return reply
    except BaseException:
        connection.close()
        raise


def _head(sock: socket.socket, deadline: float) -> tuple[bytes, bytes]:
    """Return the head of a response, and the part of its body that was received with it."""
    received = b""
    while True:
        end = _END_OF_HEAD.search(received)
        if end and not re.match(rb"HTTP/1\.1 1\d\d", received):
            return received[: end.start()], received[end.end() :]
        if end:  # An interim response: the final one is yet to come.
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
    """Return whether the server keeps the connection open, and the reply without its data."""
    from multidict import CIMultiDict  # Comes with aiohttp.

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
    """Return a body of ``size`` bytes, of which ``begin`` has been received already."""
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
    """Return this thread's connections by server; a forked process starts without any."""
    if getattr(_own, "pid", 0) != os.getpid():
        _own.pid, _own.connections = os.getpid(), {}
    return _own.connections


@functools.lru_cache(64)
def _is_plain(scheme: str, host: str) -> bool:
    """Return whether a server needs neither a proxy nor a password from ``~/.netrc``."""
    proxies = urllib.request.getproxies()
    if (proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host):
        return False
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is None
    return True


@functools.lru_cache(1)
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()
