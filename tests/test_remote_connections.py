"""Connections to web servers that are kept: what goes over them, and what does not."""

import contextlib
import os
import socket
import threading
import time
from http.client import HTTPException

import numpy as np
import pytest
from file_server import Handler, serve

from dnnlib import addresses
from dnnlib.remote import connections, fetching, ranges
from dnnlib.remote.blocks import BLOCK_BYTES
from dnnlib.remote.connections import get_range
from dnnlib.remote.fetching import Fetcher
from dnnlib.remote.file import RemoteFile
from dnnlib.remote.files import Known

NUM_BLOCKS = 40
DATA = np.random.default_rng(0).bytes(NUM_BLOCKS * BLOCK_BYTES)


@pytest.fixture(autouse=True)
def own_blocks(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "_WAITS_SEC", (0, 0))
    monkeypatch.setattr(ranges, "_FIRST_WAIT_SEC", 0.01)
    monkeypatch.setattr(connections, "_indirect", set())
    connections._is_plain.cache_clear()


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data.bin").write_bytes(DATA)
    (folder / "a b%20é.bin").write_bytes(DATA[:1000])
    with serve(folder) as server:
        yield server


def asked(server, start, end, name="data.bin", *, limit=5.0, total=5.0):
    return get_range(f"{server.address}/{name}", start, end, limit, total)


def test_a_connection_is_kept_until_the_server_ends_it(served, monkeypatch):
    opened = []
    connect = connections.http.client.HTTPConnection.connect

    def counted(connection):
        opened.append(connection)
        connect(connection)

    monkeypatch.setattr(connections.http.client.HTTPConnection, "connect", counted)
    for start in (0, 5, 2_000_000):
        reply = asked(served, start, start + 1_000_000)
        assert reply.status == 206
        assert bytes(reply.data) == DATA[start : start + 1_000_000]
    assert len(opened) == 1
    opened[0].sock.shutdown(2)  # As servers do after a while.
    assert bytes(asked(served, 7, 9).data) == DATA[7:9]
    assert len(opened) == 2
    # Errors have no bytes that another answer could begin with.
    served.faults = [(503,), None]
    assert asked(served, 0, 9).status == 503
    assert bytes(asked(served, 0, 9).data) == DATA[:9]
    child = os.fork()
    if child == 0:
        found = asked(served, 3, 9)
        os._exit(0 if bytes(found.data) == DATA[3:9] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(asked(served, 4, 9).data) == DATA[4:9]
    assert len(opened) == 3


def test_a_server_that_does_not_speak_tls_is_told_as_such(served):
    secure = served.address.replace("http:", "https:") + "/a.bin"
    with pytest.raises(addresses.AddressError, match=r"a.bin: cannot be read \(\[SSL"):
        addresses.persist(secure, lambda: get_range(secure, 0, 9, 5, 5), waits=())
    with pytest.raises(addresses.AddressError, match=r"a.bin: cannot be read \(\[SSL"):
        addresses.persist(secure, lambda: addresses.open_store(secure).cat_file(secure), waits=())


def test_names_are_quoted_as_the_package_does(served):
    name = "a b%2520é.bin"
    assert bytes(asked(served, 0, 1000, name).data) == DATA[:1000]
    assert RemoteFile(f"{served.address}/{name}").pread(1000, 0) == DATA[:1000]


def test_a_server_may_send_a_file_whole(served):
    served.knows_parts = False
    reply = asked(served, 10, 999_999)
    assert (reply.status, len(reply.data)) == (200, 0)
    reply = asked(served, 10, len(DATA) + 5)
    assert (reply.status, bytes(reply.data)) == (200, DATA)
    known = Known(len(DATA), "abc")
    file = RemoteFile(f"{served.address}/data.bin", known)
    assert file.pread(99, 700_000) == DATA[700_000:700_099]


def test_an_answer_that_is_silent_slow_or_too_short_is_an_error(served, monkeypatch):
    served.faults = ["stall"]
    with pytest.raises(TimeoutError):
        asked(served, 0, 9, limit=0.1)
    served.faults = [1000]
    with pytest.raises(EOFError):
        asked(served, 0, 9999)

    def trickle(handler, file, first, size):
        for _ in range(40):
            handler.wfile.write(b"x")
            time.sleep(0.02)

    monkeypatch.setattr(Handler, "send_part", trickle)
    with pytest.raises(TimeoutError):
        asked(served, 0, 9999, total=0.2)


HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-2/9\r\n"


@pytest.mark.parametrize(
    ("answer", "data", "is_kept"),
    [
        (HEAD + b"content-length: 3\r\n\r\nabc", b"abc", True),
        (
            b"HTTP/1.1 103 Soon\r\nLink: x\r\n\r\n" + HEAD + b"Content-Length:3\r\n\r\nabc",
            b"abc",
            True,
        ),
        ((HEAD + b"Content-Length: 3\r\n\r\n").replace(b"\r", b"") + b"abc", b"abc", True),
        (HEAD + b"Connection: Close\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
        (HEAD.replace(b"/1.1", b"/1.0") + b"Content-Length: 3\r\n\r\nabc", b"abc", False),
        (HEAD + b"Content-Length: 2\r\n\r\nabc", b"", False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", None, False),
        (b"220 mail ready\r\n\r\n", HTTPException, False),
        (b"HTTP/1.1 206 Partial", EOFError, False),
        (b"x" * 70_000, HTTPException, False),
    ],
)
def test_answers_are_read_as_servers_may_write_them(answer, data, is_kept):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve_once():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.recv(9999)
                for part in (answer[:50], answer[50:75], answer[75:]):
                    connection.sendall(part)
                    time.sleep(0.01)

        thread = threading.Thread(target=serve_once)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/file"
        if isinstance(data, type):
            with pytest.raises(data):
                get_range(address, 0, 3, 5.0, 5.0)
        else:
            reply = get_range(address, 0, 3, 5.0, 5.0)
            assert (reply and bytes(reply.data)) == data
        assert (address.removesuffix("/file") in connections._kept()) == is_kept
        thread.join()


@pytest.mark.parametrize("way", ["redirect", "proxy", "password", "netrc"])
def test_what_is_not_for_a_plain_connection_is_left_to_the_package(
    served, monkeypatch, tmp_path, way
):
    address = f"{served.address}/data.bin"
    known = Known(len(DATA), "abc")
    if way == "redirect":
        target, direct = address, Handler.do_GET

        def moved(handler):
            if handler.path != "/old.bin":
                direct(handler)
                return
            handler.send_response(302)
            handler.send_header("Location", target)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        monkeypatch.setattr(Handler, "do_GET", moved)
        address = f"{served.address}/old.bin"
    elif way == "proxy":
        # The server takes the place of a proxy, which is asked for whole addresses.
        monkeypatch.setenv("http_proxy", served.address)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setattr(connections, "_exchange", None)
        (served.folder / "http:" / "example.com").mkdir(parents=True)
        (served.folder / "data.bin").rename(served.folder / "http:" / "example.com" / "data.bin")
        address = "http://example.com/data.bin"
    elif way == "netrc":
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setattr(connections, "_exchange", None)
    else:
        address = address.replace("://", "://user:secret@")
        monkeypatch.setattr(connections, "_exchange", None)
    assert RemoteFile(address, known).pread(99, 700_000) == DATA[700_000:700_099]
    assert get_range(address, 0, 9, 5.0, 5.0) is None


@pytest.mark.parametrize("num_waiting", [0, 1])
def test_jobs_become_one_request_with_their_neighbours_unless_somebody_waits(
    served, monkeypatch, num_waiting
):
    monkeypatch.setattr(fetching, "NUM_THREADS", 1)
    own = Fetcher()
    monkeypatch.setattr(fetching, "_fetcher", lambda pid: own)
    file = RemoteFile(f"{served.address}/data.bin", Known(len(DATA), "abc"))
    entered, left = threading.Event(), threading.Event()

    class Gate:
        blocks = RemoteFile(f"{served.address}/gate", Known(BLOCK_BYTES, "gate")).blocks

        def fetch(self, first, end):
            entered.set()
            left.wait(10)

    own.want(Gate(), [0])
    assert entered.wait(10)
    for number in (9, 30, 7, 8, 10, 6, 29, 11):
        own.want(file, [number])
    own._num_waiting = num_waiting
    left.set()
    deadline = time.monotonic() + 10
    while (
        not all(n in file.blocks for n in (*range(6, 12), 29, 30)) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    for first, num in ((6, 6), (29, 2)):
        data = file.pread(num * BLOCK_BYTES, first * BLOCK_BYTES)
        assert data == DATA[first * BLOCK_BYTES : (first + num) * BLOCK_BYTES]
    places = [part for _, part in served.requests]
    sizes = [int(part.split("-")[1]) + 1 - int(part[6:].split("-")[0]) for part in places]
    assert sizes == [num * BLOCK_BYTES for num in ([1] * 8 if num_waiting else [6, 2])]
