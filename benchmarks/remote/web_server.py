"""A slow web server for the files of a folder: python web_server.py FOLDER DELAY.

It prints its address, and delays every answer by DELAY seconds.
"""

import contextlib
import http.server
import re
import socket
import sys
import time
from pathlib import Path
from urllib.parse import unquote


class FileHandler(http.server.BaseHTTPRequestHandler):
    """Answers GET with all or part of a file in ``server.folder``, after ``server.delay_sec``."""

    protocol_version = "HTTP/1.1"  # Keeps connections open.

    def setup(self) -> None:
        super().setup()
        # Otherwise a header that is sent alone waits until the previous packet is acknowledged.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        time.sleep(self.server.delay_sec)
        path = self.server.folder / unquote(self.path.partition("?")[0]).lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        stat = path.stat()
        first, last = self.asked_range(stat.st_size)
        if first > last:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{stat.st_size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        is_part = (first, last) != (0, stat.st_size - 1)
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {first}-{last}/{stat.st_size}")
        self.send_header("ETag", f'"{stat.st_size:x}-{stat.st_mtime_ns:x}"')
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.flush()
        with open(path, "rb") as file, contextlib.suppress(ConnectionError):
            self.send_part(file, first, last + 1 - first)

    def asked_range(self, size: int) -> tuple[int, int]:
        """Return the first and the last requested byte of a file of ``size`` bytes."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        if found is None:  # A server may ignore a range.
            return 0, size - 1
        return int(found[1]), min(int(found[2] or size), size - 1)

    def send_part(self, file, first: int, size: int) -> None:
        """Send ``size`` bytes of a file, starting at offset ``first``."""
        self.connection.sendfile(file, first, size)

    def log_message(self, *args: object) -> None:
        pass


class FileServer(http.server.ThreadingHTTPServer):
    """Serves a folder on the loopback address, at ``address``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, delay_sec: float, handler: type = FileHandler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder, self.delay_sec = folder, delay_sec
        self.address = f"http://127.0.0.1:{self.server_port}"


if __name__ == "__main__":
    server = FileServer(Path(sys.argv[1]), float(sys.argv[2]))
    print(server.address, flush=True)
    server.serve_forever()
