"""Atomic writes, verified downloads, progress, and text for people."""

import errno
import http.server
import io
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import ROOT

from dnnlib import progress as progress_module
from dnnlib import safe_pickle
from dnnlib.downloads import fetch
from dnnlib.files import (
    atomic_write,
    cache_dir,
    check_target,
    lock_folder,
    sha256_of_file,
    write_json,
)
from dnnlib.progress import progress
from dnnlib.remote.files import OpenFiles
from dnnlib.text import format_count, format_time, join_names
from metrics.rows import read_rows


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path, "w") as file:
        file.writelines(["half", None])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_write_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"


@pytest.fixture
def server(tmp_path):
    """A web server on the loopback address that counts its requests."""
    root = tmp_path / "www"
    root.mkdir()
    (root / "weights.pth").write_bytes(b"weights")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def do_GET(self):
            httpd.requests += 1
            super().do_GET()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests = 0
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


def test_a_download_happens_once_and_is_verified(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    digest = sha256_of_file(tmp_path / "www" / "weights.pth")
    first = fetch(url, sha256=digest[:8])
    assert first.read_bytes() == b"weights"
    assert fetch(url, sha256=digest) == first
    assert server.requests == 1


def test_a_download_with_a_wrong_checksum_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(url, sha256="00000000")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_a_failed_download_says_where_to_place_the_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"absent\.pth: cannot be read \(not found\);.* place it at"
    ):
        fetch(f"http://127.0.0.1:{server.server_port}/absent.pth")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_a_long_job_reports_itself_on_a_line_of_its_own_in_a_log(monkeypatch, capsys):
    with progress(total=4, label="Short") as bar:
        bar.update(4)
    monkeypatch.setattr(progress_module, "_LINE_INTERVAL_SEC", 1e-3)
    for disable in (False, True):
        with progress(total=4, label="Long", unit="step", disable=disable, initial=1) as bar:
            for _ in range(3):
                time.sleep(2e-3)
                bar.update()
    out, err = capsys.readouterr()
    assert out == ""
    *lines, last = err.splitlines()
    assert [re.search(r"(\d)/4 \[", line)[1] for line in lines] == ["2", "3", "4"]
    assert all(line.startswith("Long: ") and "step/s" in line for line in lines)
    assert "100%" in last


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_transient_bar_is_erased_on_a_terminal(monkeypatch):
    for transient in (False, True):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        with progress(total=4, label="Making", transient=transient) as bar:
            bar.update(4)
        screen = terminal.getvalue()
        assert "Making:   0%" in screen
        assert ("Making: 100%" in screen.split("\r")[-1]) == (not transient)
        assert screen.endswith("\r" if transient else "\n")


def test_a_folder_on_a_file_system_without_locks_is_written_without(tmp_path, monkeypatch):
    error = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.lockf", mock.Mock(side_effect=error))
    with lock_folder(tmp_path, "busy"), lock_folder(tmp_path, "busy"):
        pass


def test_a_folder_is_locked_until_the_block_ends(tmp_path):
    attempt = "import pathlib, sys; from dnnlib.files import lock_folder; "
    attempt += "lock_folder(pathlib.Path(sys.argv[1]), 'busy')"
    command = [sys.executable, "-c", attempt, str(tmp_path)]
    with lock_folder(tmp_path, "busy"):
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "ValueError: busy; wait until it ends, or stop it." in refused.stderr
    subprocess.run(command, cwd=ROOT, check=True)


def test_a_missing_local_file_is_named():
    with pytest.raises(ValueError, match=r"absent\.pth: no such file"):
        fetch("absent.pth")


def test_durations_counts_and_lists_read_well():
    assert [format_time(s) for s in (5, 125, 7620, 100_000)] == ["5s", "2m 05s", "2h 07m", "1d 03h"]
    assert [format_count(n) for n in (12, 4200, 15_930_000)] == ["12", "4.20k", "15.93M"]
    assert [join_names(n) for n in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]


class ForgedArray:
    """Asks NumPy for an array of Python objects over chosen addresses."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), b"\x10\x00\x00\x00\x00\x00\x00\x00")


class ForgedState:
    """Asks for an array of objects by way of an array's own restoring function."""

    def __reduce__(self):
        reconstruct, args, _ = np.empty(0).__reduce__()
        return reconstruct, args, (1, (1,), np.dtype("O"), False, [1])


class ForgedBuffer:
    """Asks for the same by way of what protocol 5 calls."""

    def __reduce__(self):
        function = np.empty(1).__reduce_ex__(5)[0]
        return function, (bytes(8), np.dtype("O"), (1,), "C")


@pytest.mark.parametrize("forged", [ForgedArray(), ForgedState(), ForgedBuffer()])
def test_a_pickle_cannot_forge_arrays_of_objects(forged):
    with pytest.raises(ValueError, match=r"not a readable pickle|would run an array of"):
        safe_pickle.load(io.BytesIO(pickle.dumps([forged], protocol=2)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">f4", "?"])
def test_arrays_and_containers_are_read_as_they_were_written(protocol, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    turned = np.arange(24).reshape(2, 3, 4).astype(dtype).transpose(1, 0, 2)
    content = {"a": [array, (1.5, None)], "b": np.asfortranarray(array), "c": turned}
    read = safe_pickle.load(io.BytesIO(pickle.dumps(content, protocol=protocol)))
    np.testing.assert_array_equal(read["a"][0], array)
    np.testing.assert_array_equal(read["b"], array)
    np.testing.assert_array_equal(read["c"], turned)
    assert read["a"][0].dtype == array.dtype
    assert read["a"][1] == (1.5, None)


class TestCheckTarget:
    def test_takes_new_and_existing_files_and_folders(self, tmp_path):
        check_target("--json", tmp_path / "a" / "b.json")
        check_target("--outdir", tmp_path / "a" / "b", is_folder=True)
        check_target("--outdir", tmp_path, is_folder=True)

    def test_refuses_what_could_not_be_written(self, tmp_path):
        file = tmp_path / "file"
        file.touch()
        check_target("--json", file)
        with pytest.raises(ValueError, match=r"--json: .* is a folder; give the name of a file"):
            check_target("--json", tmp_path)
        for path in (file, file / "deeper"):
            with pytest.raises(ValueError, match=rf"--outdir: .* because {file} is a file"):
                check_target("--outdir", path, is_folder=True)
        with pytest.raises(ValueError, match=rf"--json: .* because {file} is a file"):
            check_target("--json", file / "a.json")

    def test_replaces_only_what_the_command_itself_made(self, tmp_path):
        rows, other = tmp_path / "rows.json", tmp_path / "other.json"
        write_json(rows, {"rows": [dict(metric="fd_pixels", value=1.0)]})
        write_json(other, {"precious": True})
        check_target("--json", rows, is_ours=read_rows)
        check_target("--json", tmp_path / "new.json", is_ours=read_rows)
        with pytest.raises(
            ValueError, match=r"other\.json exists and was not made by this command"
        ):
            check_target("--json", other, is_ours=read_rows)


def test_a_file_system_without_fsync_or_modes_takes_files_all_the_same(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    write_json(tmp_path / "a.json", [1])
    assert (tmp_path / "a.json").read_text() == "[\n  1\n]"


def test_a_full_disk_is_an_error_with_the_name_of_the_file(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'"):
        write_json(tmp_path / "a.json", [1])
    assert not list(tmp_path.iterdir())


def test_files_kept_open_are_read_by_any_number_of_threads_and_copies(tmp_path):
    paths = [tmp_path / str(index) for index in range(300)]  # More than stay open.
    for index, path in enumerate(paths):
        path.write_bytes(b"%03d" % index)
    files = OpenFiles()
    copied = pickle.loads(pickle.dumps(files))
    with ThreadPoolExecutor(8) as pool:
        for opened in (files, copied):
            many = [path for path in paths for _ in range(3)]
            parts = list(pool.map(opened.pread, many, [2] * 900, [1] * 900))
            assert parts == [path.read_bytes()[1:] for path in many]


def test_an_empty_variable_names_no_cache_and_no_home_is_needed_where_one_does(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("SETDIFFIT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/setdiffit")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ValueError, match="HOME: there is no home folder"):
        cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_dir() == Path("/cache/setdiffit")
    monkeypatch.setenv("SETDIFFIT_CACHE", "/own")
    assert cache_dir() == Path("/own")
