"""Copies files from a web server using only sockets: python bare_transfer.py FOLDER ADDRESS TARGET.

The server at ADDRESS serves the files of FOLDER; all their bytes go into the file TARGET. The
program prints a line when it is ready, and starts copying when it reads one.
"""

import collections
import concurrent.futures
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

NUM_THREADS = 8
REQUEST_BYTES = 1 << 22


class Piece(NamedTuple):
    """A range of bytes of a file, and its offset in the target file."""

    path: str
    first: int
    size: int
    target: int


def pieces(folder: Path) -> collections.deque[Piece]:
    """Return the pieces to request, which cover all bytes of the files in a folder."""
    found, target = collections.deque(), 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path, size = "/" + quote(file.relative_to(folder).as_posix()), file.stat().st_size
        for first in range(0, size, REQUEST_BYTES):
            found.append(Piece(path, first, min(size - first, REQUEST_BYTES), target + first))
        target += size
    return found


def copy(wanted: collections.deque[Piece], address: str, target: int) -> None:
    """Copy pieces into the file with descriptor ``target`` until none is left in ``wanted``."""
    server, data = urlsplit(address), memoryview(bytearray(REQUEST_BYTES))
    with (
        socket.create_connection((server.hostname, server.port)) as sock,
        sock.makefile("rb", buffering=4096) as answer,
        contextlib.suppress(IndexError),
    ):
        while True:
            piece = wanted.popleft()
            asked = f"bytes={piece.first}-{piece.first + piece.size - 1}"
            lines = [f"GET {piece.path} HTTP/1.1", f"Host: {server.netloc}", f"Range: {asked}"]
            sock.sendall("\r\n".join([*lines, "", ""]).encode())
            while answer.readline() not in (b"\r\n", b""):
                pass
            if answer.readinto(data[: piece.size]) != piece.size:
                raise EOFError(piece.path)
            os.pwrite(target, data[: piece.size], piece.target)


def main(folder: str, address: str, target: str) -> None:
    """Copy the files of a folder from a server, once a line is read from standard input."""
    wanted = pieces(Path(folder))
    file = os.open(target, os.O_WRONLY | os.O_CREAT)
    print("ready", flush=True)
    sys.stdin.readline()
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for copied in [pool.submit(copy, wanted, address, file) for _ in range(NUM_THREADS)]:
            copied.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
