"""A web server for tests, which serves a folder and has faults."""

import contextlib
import socket
import struct
import threading

from benchmarks.remote.web_server import FileHandler, FileServer


class Handler(FileHandler):
    """Serves files as FileHandler does, after the next of ``server.faults``, then ``always``.

    A fault is a status, the number of bytes after which the connection ends, "reset" (it ends at
    once, without a good-bye), "stall" (nothing comes until the server ends) or None.
    """

    def do_GET(self):  # noqa: N802
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Range")))
            faults = self.server.faults
            self.fault = faults.pop(0) if faults else self.server.always
        if self.fault == "stall":
            self.server.released.wait(30)
            self.close_connection = True
        elif self.fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        elif isinstance(self.fault, tuple):
            self.send_error(*self.fault)
        else:
            super().do_GET()

    def asked_range(self, size):
        return super().asked_range(size) if self.server.knows_parts else (0, size - 1)

    def send_part(self, file, first, size):
        if isinstance(self.fault, int):
            size, self.close_connection = min(size, self.fault), True
        if size:
            super().send_part(file, first, size)


class Server(FileServer):
    def handle_error(self, request, client_address):
        """Say nothing: clients that leave, and resets, are no errors here."""


@contextlib.contextmanager
def serve(folder, *, knows_parts=True, delay_sec=0.0):
    """Serve a folder; yield the server, with ``address``, ``requests``, ``faults``, ``always``."""
    server = Server(folder, delay_sec, Handler)
    server.knows_parts, server.requests, server.faults, server.always = knows_parts, [], [], None
    server.lock, server.released = threading.Lock(), threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
