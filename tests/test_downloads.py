"""Downloads: bounded, verified, kept whole, and given up where a server does not deliver."""

import http.server
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import call

import fid
from data.features import record
from dnnlib import addresses, downloads
from dnnlib.addresses import AddressError, open_address
from dnnlib.downloads import fetch
from dnnlib.files import sha256_of_file
from dnnlib.remote.file import RemoteFile
from metrics.inception import read_weights

CONTENT = b"weights" * 1000


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /NAME by the method of that name."""

    def do_GET(self):
        self.server.requests += 1
        getattr(self, self.path[1:].partition(".")[0])()

    def log_message(self, *args):
        pass

    def head(self, length=None, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def redirect(self, location):
        self.send_response(302)
        self.send_header("Location", location)
        self.end_headers()

    def good(self):
        self.head(len(CONTENT))
        self.wfile.write(CONTENT)

    def moved(self):
        self.redirect("/good.pth")

    def to_file(self):
        self.redirect("file:///etc/passwd")

    def to_ftp(self):
        self.redirect("ftp://127.0.0.1/x")

    def in_circles(self):
        self.redirect("/in_circles.pth")

    def short(self):
        self.head(len(CONTENT) + 1)
        self.wfile.write(CONTENT)

    def long(self):
        self.head(len(CONTENT) - 1)
        self.wfile.write(CONTENT)

    def declares_too_much(self):
        self.head(10**15)
        self.server.released.wait(10)

    def endless(self):
        self.head()
        while not self.server.released.is_set():
            self.wfile.write(CONTENT * 10)

    def silent(self):
        self.server.released.wait(10)

    def trickling(self):
        self.head(10**6)
        while not self.server.released.wait(0.05):
            self.wfile.write(b"x")


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "_WAITS_SEC", (0,))
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.requests, found.released, found.daemon_threads = 0, threading.Event(), True
    found.handle_error = lambda *args: None  # A client that leaves early is no error here.
    found.url = f"http://127.0.0.1:{found.server_port}"
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    found.released.set()
    found.shutdown()
    found.server_close()


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["good", "moved"])
def test_a_file_is_downloaded_once_with_its_digest_beside_it(name, server, tmp_path):
    path = fetch(f"{server.url}/{name}.pth")
    assert path.read_bytes() == CONTENT
    before = server.requests
    assert fetch(f"{server.url}/{name}.pth") == path
    assert server.requests == before
    assert cached(tmp_path) == [path.name, f"{path.name}.sha256"]
    assert path.with_name(f"{path.name}.sha256").read_text().strip() == sha256_of_file(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("to_file", "redirects to an address that is not http or https"),
        ("to_ftp", "redirects to an address that is not http or https"),
        ("in_circles", "redirects too often"),
        ("short", "the connection ended before the file"),
        ("declares_too_much", "has over 100,000 bytes"),
        ("endless", "has over 100,000 bytes"),
    ],
)
def test_what_a_server_should_not_send_is_not_kept(name, reason, server, tmp_path):
    with pytest.raises(ValueError, match=rf"/{name}\.pth: .*{reason}.*; download it elsewhere"):
        fetch(f"{server.url}/{name}.pth", max_bytes=100_000)
    assert cached(tmp_path) == []


def test_bytes_beyond_the_declared_length_are_not_taken(server, tmp_path):
    try:
        path = fetch(f"{server.url}/long.pth")
    except ValueError:  # They came in time to be noticed.
        assert cached(tmp_path) == []
    else:
        assert path.read_bytes() == CONTENT[:-1]


@pytest.mark.parametrize("name", ["silent", "trickling"])
def test_a_server_that_does_not_deliver_is_given_up(name, server, tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "TIMEOUT_SEC", 0.3)
    started = time.monotonic()
    with pytest.raises(ValueError, match="silent or too slow"):
        fetch(f"{server.url}/{name}.pth")
    assert time.monotonic() - started < 5  # Two attempts.
    assert cached(tmp_path) == []


def read_all(address):
    with open_address(address) as stream:
        return stream.read()


def read_start(address):
    return RemoteFile(address).pread(10, 0)


@pytest.mark.parametrize("read", [read_all, read_start])
def test_what_is_read_in_place_stays_within_http_too_and_does_not_hang(read, server, monkeypatch):
    assert read(f"{server.url}/moved.tar")[:10] == CONTENT[:10]
    with pytest.raises(AddressError, match="redirects to an address that is not http"):
        read(f"{server.url}/to_file.tar")
    monkeypatch.setattr(addresses, "TIMEOUT_SEC", 0.3)
    with pytest.raises(AddressError, match="silent or too slow"):
        read(f"{server.url}/silent.tar")


def test_a_description_without_end_is_not_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr(record, "_MAX_JSON_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"endless\.json: its server does not say how large it is"):
        record.read_json(f"{server.url}/endless.json", record.FORMAT, dict)
    with pytest.raises(ValueError, match="has over 100,000 bytes"):
        record.read_json(f"{server.url}/declares_too_much.json", record.FORMAT, dict)


def test_an_https_address_does_not_fall_back_to_http():
    def response(*schemes):
        *history, last = [SimpleNamespace(url=SimpleNamespace(scheme=s)) for s in schemes]
        return SimpleNamespace(history=history, url=last.url, content_length=1)

    addresses.check_response("https://a/b", response("https", "https"), 10)
    addresses.check_response("http://a/b", response("http", "https"), 10)
    for schemes in (("https", "http"), ("https", "http", "https")):
        with pytest.raises(AddressError, match="redirects to plain http"):
            addresses.check_response("https://a/b?signature=1", response(*schemes), 10)


@pytest.mark.parametrize("published", [True, False])
def test_a_poisoned_file_in_the_cache_is_noticed_and_replaced(published, server, capsys):
    url = f"{server.url}/good.pth"
    path = fetch(url)
    sha256 = sha256_of_file(path) if published else None
    if published:  # As in the cache of a version that kept no digests.
        path.with_name(f"{path.name}.sha256").unlink()
    for content in (CONTENT[:100], b"poison"):
        path.write_bytes(content)
        assert fetch(url, sha256).read_bytes() == CONTENT
        assert f"{path} is no longer what was downloaded from {url}" in capsys.readouterr().err
    fetch(url, sha256)
    assert capsys.readouterr().err == ""


def test_a_poisoned_file_is_not_used_where_it_cannot_be_replaced(server):
    url = f"{server.url}/good.pth"
    path = fetch(url)
    path.write_bytes(b"poison")
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"cannot be read .*; download it elsewhere"):
        fetch(url)


def test_a_published_file_that_is_another_one_now_is_not_kept(server, tmp_path):
    with pytest.raises(ValueError, match=r"good\.pth: its SHA-256 is .*, not 00000000"):
        fetch(f"{server.url}/good.pth", sha256="0" * 64)
    assert cached(tmp_path) == []


def test_where_weights_cannot_be_had_metrics_without_download_are_named(server, monkeypatch):
    monkeypatch.delenv("SETDIFFIT_INCEPTION", raising=False)
    monkeypatch.setattr("metrics.inception.WEIGHTS_URL", f"{server.url}/short.pth")
    with pytest.raises(ValueError, match=r"Inception needs its weights: .*kid_pixels or fd_pixels"):
        read_weights()


def test_a_refused_download_is_one_sentence_of_the_command(server):
    result = call(fid, "calc", "--metrics=fd_pixels", "--images=x", f"--ref={server.url}/to_file")
    assert result.code == 1
    assert result.error.count("\n") == 1


def test_the_bound_of_any_file_is_stated():
    assert downloads.MAX_BYTES == 16 * 2**30
