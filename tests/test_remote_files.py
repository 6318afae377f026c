"""Files at addresses, read at any place: faults, blocks on disk, and processes that share them."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from file_server import serve
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as registry

from dnnlib import addresses
from dnnlib.addresses import AddressError, open_address, under
from dnnlib.downloads import fetch
from dnnlib.remote import blocks as blocks_module
from dnnlib.remote import fetching, ranges, room
from dnnlib.remote.blocks import BLOCK_BYTES
from dnnlib.remote.file import RemoteFile, RemoteStream
from dnnlib.remote.files import Known, OpenFiles

NUM_BLOCKS = 21
DATA = np.random.default_rng(0).bytes((NUM_BLOCKS - 1) * BLOCK_BYTES + 1000)


@pytest.fixture(autouse=True)
def own_blocks(tmp_path, monkeypatch):
    """Every test has a cache of its own, and waits for moments alone."""
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "_WAITS_SEC", (0, 0))
    monkeypatch.setattr(ranges, "_FIRST_WAIT_SEC", 0.01)
    monkeypatch.setattr(blocks_module, "_SEGMENT_BLOCKS", 4)
    return tmp_path / "cache" / "blocks"


@pytest.fixture
def served(tmp_path):
    """A server of DATA, as ``data.bin``."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data.bin").write_bytes(DATA)
    with serve(folder) as server:
        yield server


def opened(server, *args):
    return RemoteFile(f"{server.address}/data.bin?key=secret", *args)


def asked_blocks(server):
    """Return how many times each block was asked for."""
    counts = Counter()
    for _, asked in server.requests:
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
        counts.update(range(first // BLOCK_BYTES, last // BLOCK_BYTES + 1))
    return counts


def test_any_place_is_read_and_each_block_comes_once(served):
    file = opened(served)
    for offset, size in ((0, 10), (BLOCK_BYTES - 5, 10), (700_000, 600_000), (len(DATA) - 3, 9)):
        assert file.pread(size, offset) == DATA[offset : offset + size]
    assert file.pread(10, len(DATA)) == b""
    assert file.pread(len(DATA) + 1, 0) == DATA
    assert asked_blocks(served) == dict.fromkeys(range(NUM_BLOCKS), 1)
    num_before = len(served.requests)
    again = opened(served)  # As after a restart: the server is asked for the version alone.
    stream = RemoteStream(again)
    assert stream.seek(-1000, os.SEEK_END) == len(DATA) - 1000
    assert stream.read() == DATA[-1000:]
    assert again.pread(len(DATA), 0) == DATA
    assert len(served.requests) == num_before + 1


def test_a_server_that_knows_no_parts_has_its_file_copied_once(
    tmp_path, served, capsys, monkeypatch
):
    served.knows_parts = False
    served.faults = [None, 2_000_000]  # The copy breaks, and is begun again.
    assert opened(served).pread(99, 3_000_000) == DATA[3_000_000:3_000_099]
    assert "gives whole files only; copying it" in capsys.readouterr().err
    assert opened(served).pread(len(DATA), 0) == DATA
    assert len(served.requests) == 4
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("SETDIFFIT_CACHE_GB", "0.004")
    with pytest.raises(AddressError, match=r"5\.24 ?MB \$SETDIFFIT_CACHE_GB allows 4"):
        opened(served).pread(1, 5_000_000)


@pytest.mark.parametrize("fault", [(503,), (429,), 100_000, 0, "reset", "stall"])
def test_faults_that_pass_are_waited_for(served, monkeypatch, fault):
    if fault == "stall":
        monkeypatch.setattr(addresses, "TIMEOUT_SEC", 0.2)
    served.faults = [fault]
    file = opened(served)
    served.faults = [fault, None, fault, fault]
    assert file.pread(len(DATA), 0) == DATA
    assert not served.faults


def test_patience_ends_in_one_sentence_and_other_faults_at_once(served, monkeypatch):
    monkeypatch.setattr(ranges, "PATIENCE_SEC", 0.3)
    file = opened(served)
    served.always = (503,)
    started = time.monotonic()
    with pytest.raises(AddressError, match=r"/data\.bin: cannot be read \(503 Service") as error:
        file.pread(10, 3 * BLOCK_BYTES)
    assert 0.2 < time.monotonic() - started < 3
    assert "secret" not in str(error.value)
    assert 3 < len(served.requests) < 40
    for status, reason in ((403, "403 Forbidden"), (404, "not found")):
        served.always, num_before = (status,), len(served.requests)
        for read in (lambda: file.pread(10, 3 * BLOCK_BYTES), lambda: opened(served)):
            with pytest.raises(AddressError, match=rf"cannot be read \({reason}"):
                read()
        assert len(served.requests) == num_before + 2
    served.always = None
    assert file.pread(10, 3 * BLOCK_BYTES) == DATA[3 * BLOCK_BYTES :][:10]


def test_a_long_outage_is_told(served, monkeypatch, capsys):
    monkeypatch.setattr(ranges, "_TELL_AFTER_SEC", 0)
    monkeypatch.setattr(ranges, "_last_told", [-60.0 - time.monotonic()])
    file = opened(served)
    served.faults = [(503,)] * 3
    assert file.pread(1, 600_000) == DATA[600_000:600_001]
    assert capsys.readouterr().err == (
        f"Waiting for {served.address}/data.bin, for up to 5 minutes.\n"
    )


def test_a_file_that_has_changed_is_noticed(served):
    path = served.folder / "data.bin"
    file = opened(served)
    os.utime(path, (1, 1))  # Another version of the same size.
    with pytest.raises(
        AddressError, match=r"has changed since it was opened .* \(another version\)"
    ):
        file.pread(1, 600_000)
    file = opened(served)
    path.write_bytes(DATA[:-1])
    with pytest.raises(AddressError, match=r"\(5243879 bytes instead of 5243880\)"):
        file.pread(1, 600_000)
    new = DATA[::-1]
    path.write_bytes(new)
    assert opened(served).pread(len(DATA), 0) == new


def test_a_recorded_file_is_not_asked_for_its_size_and_is_known_by_its_checksum(served):
    known = Known(len(DATA), "abc")
    assert opened(served, known).pread(9, 0) == DATA[:9]
    assert len(served.requests) == 1
    # A copy elsewhere is the same file.
    other = served.folder / "other.bin"
    other.write_bytes(DATA)
    name = f"{served.address}/other.bin"
    assert RemoteFile(name, known).pread(9, 0) == DATA[:9]
    assert len(served.requests) == 1
    with pytest.raises(AddressError, match=r"\(5243880 bytes instead of 99999999\)"):
        opened(served, Known(99_999_999, "abd")).pread(9, 0)


def sizes(folder):
    """Return what each file takes on the disk, as segments are sparse."""
    return [512 * path.stat().st_blocks for path in folder.rglob("[!.]*") if path.is_file()]


def test_the_cache_is_bounded_and_gives_up_what_was_used_least_recently(
    served, own_blocks, monkeypatch
):
    monkeypatch.setenv("SETDIFFIT_CACHE_GB", "0.0022")  # Of 21 blocks, 8.
    file = opened(served)
    for number in (*range(NUM_BLOCKS), 0, 5):
        assert file.pread(50, number * BLOCK_BYTES) == DATA[number * BLOCK_BYTES :][:50]
        assert sum(sizes(own_blocks)) <= 2_200_000
        time.sleep(0.002)
    assert file.pread(len(DATA), 0) == DATA  # More than there is room for.
    (own_blocks / ".used").unlink()  # As if people had tidied up.
    file.pread(9, 0)
    assert sum(sizes(own_blocks)) <= 2_200_000
    for text in ("no", "0", "nan", "-1"):
        monkeypatch.setenv("SETDIFFIT_CACHE_GB", text)
        with pytest.raises(ValueError, match=rf"^\$SETDIFFIT_CACHE_GB: got {text}; accepted: a nu"):
            room.cache_limit()


def test_blocks_that_are_used_stay(served, own_blocks, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE_GB", "0.0022")
    monkeypatch.setattr(blocks_module, "_DATE_SEC", 0)
    file = opened(served)
    for number in range(4, NUM_BLOCKS):
        file.pread(50, number * BLOCK_BYTES)
        if number % 2:
            blocks_module.close_blocks()  # As if many other files were read.
        file.pread(50, 0)
        time.sleep(0.002)
    assert asked_blocks(served)[0] == 1


def test_a_cache_that_has_no_room_for_a_block_serves_all_the_same(served, own_blocks, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE_GB", "0.0001")
    file = opened(served)
    assert file.pread(len(DATA), 0) == DATA
    assert sum(sizes(own_blocks)) < 100_000


def test_what_a_kill_or_a_power_failure_leaves_does_no_harm(served, own_blocks):
    file = opened(served)
    assert file.pread(len(DATA), 0) == DATA
    assert asked_blocks(served) == dict.fromkeys(range(NUM_BLOCKS), 1)
    unmarked, lost, empty, cut, *_ = sorted(own_blocks.rglob("[!.]*.blocks"))
    with open(unmarked, "r+b") as segment:  # Killed between the bytes and their mark.
        segment.write(b"\0")
    for path, size in ((lost, 4096 + BLOCK_BYTES), (empty, 0), (cut, 4096 + 3 * BLOCK_BYTES + 9)):
        before = path.stat().st_size
        os.truncate(path, size)
        if path != cut:
            os.truncate(path, before)
        os.utime(path, (1, 1))  # From before the machine started.
    leftover = unmarked.with_name(".123.tmp")
    leftover.write_bytes(b"x" * 99)
    blocks_module.close_blocks()
    assert file.pread(len(DATA), 0) == DATA
    assert sorted(asked_blocks(served).values()) == [1] * (NUM_BLOCKS - 13) + [2] * 13
    os.utime(leftover, (1, 1))
    room.evict(own_blocks, 10**9)
    assert not leftover.exists()


def test_bytes_are_counted_seldom_and_from_the_disk_when_a_process_begins(tmp_path, monkeypatch):
    def counted():
        return int.from_bytes((tmp_path / ".used").read_bytes(), "little")

    monkeypatch.setenv("SETDIFFIT_CACHE_GB", "1")
    (tmp_path / "1.blocks").write_bytes(bytes(1 << 20))
    assert not room.count(tmp_path, 5)
    assert counted() == 1 << 20
    for _ in range(3):
        room.count(tmp_path, 9_000_000)
        assert counted() == 1 << 20
    assert not room.count(tmp_path, 9_000_000)
    assert counted() == (1 << 20) + 36_000_000
    monkeypatch.setenv("SETDIFFIT_CACHE_GB", "0.0001")
    monkeypatch.setattr(room, "_uncounted", {})  # As of a process that begins.
    assert room.count(tmp_path, 5)
    assert not (tmp_path / "1.blocks").exists()


def test_a_file_of_blocks_that_another_process_deletes_is_made_anew_at_once(served):
    file = opened(served)
    file.pread(9, 0)
    shutil.rmtree(file.blocks._folder)
    assert file.pread(9, 0) == DATA[:9]  # It is still open.
    for number in (1, 2, 0):
        assert file.pread(9, number * BLOCK_BYTES) == DATA[number * BLOCK_BYTES :][:9]
    counts = asked_blocks(served)
    assert (counts[0], counts[1], counts[2]) == (2, 1, 1)


def test_a_full_disk_is_one_sentence(served, monkeypatch):
    def full(path, place, data):
        raise OSError(28, "No space left on device")

    file = opened(served)
    monkeypatch.setattr(blocks_module, "_write", full)
    with pytest.raises(ValueError, match=r"be kept here \(No space left on device\); make r"):
        file.pread(1, 600_000)


def in_processes(num, target, *args):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=args) for _ in range(num)]
    for process in processes:
        process.start()
    return processes


def read_everything(file):
    rng = np.random.default_rng(os.getpid())
    for offset in rng.permutation(range(0, len(DATA), 70_000)).tolist():
        assert file.pread(90_000, offset) == DATA[offset : offset + 90_000]


def test_processes_share_blocks_and_each_comes_once(served):
    file = opened(served)
    read_everything(file)  # Threads and connections, which a fork must not use.
    shutil.rmtree(file.blocks._folder)
    blocks_module.close_blocks()
    served.requests.clear()
    served.delay_sec = 0.01
    processes = in_processes(4, read_everything, file)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert asked_blocks(served) == dict.fromkeys(range(NUM_BLOCKS), 1)


def test_a_process_that_is_killed_or_stopped_holds_up_no_other(served, monkeypatch):
    file = opened(served)
    served.faults = ["stall"] * 8
    monkeypatch.setattr(fetching, "_MAX_WAIT_SEC", 0.5)
    killed, stopped = in_processes(2, file.pread, 10, 900_000)
    while len(served.requests) < 2:
        time.sleep(0.01)
    served.faults.clear()
    os.kill(stopped.pid, signal.SIGSTOP)
    os.kill(killed.pid, signal.SIGKILL)
    assert file.pread(10, 900_000) == DATA[900_000:900_010]
    os.kill(stopped.pid, signal.SIGKILL)
    for process in (killed, stopped):
        process.join()


def test_a_process_that_is_forked_while_bytes_are_counted_keeps_nobody_out(tmp_path):
    """It has the same opening of the file, and with it the lock."""
    with open(tmp_path / ".used", "a+b") as file, room._locked(file):
        sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        sleeper.start()
    counting = threading.Thread(target=room.make_room, args=(tmp_path, 1), daemon=True)
    counting.start()
    counting.join(10)
    is_kept_out = counting.is_alive()
    sleeper.kill()
    sleeper.join()
    assert not is_kept_out


def test_blocks_are_fetched_ahead_and_many_at_once(served):
    file = opened(served)
    served.delay_sec = 0.2
    started = time.monotonic()
    file.prefetch(np.arange(1, NUM_BLOCKS, 2) * BLOCK_BYTES, 1)
    assert time.monotonic() - started < 0.1
    while not all(n in file.blocks for n in range(1, NUM_BLOCKS, 2)):
        time.sleep(0.01)
    assert time.monotonic() - started < 1  # Ten after another take two seconds.
    served.always = (503,)
    assert file.pread(5, BLOCK_BYTES) == DATA[BLOCK_BYTES:][:5]


def test_threads_that_read_the_same_do_not_fetch_it_twice(served):
    file = opened(served)
    served.delay_sec = 0.05
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(file.pread(len(DATA), 0) == DATA))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert max(asked_blocks(served).values()) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(served, monkeypatch):
    monkeypatch.setattr(addresses, "_WAITS_SEC", (0,) * 4)
    address = f"{served.address}/data.bin"
    for served.knows_parts in (True, False):
        served.requests.clear()
        served.faults = [(503,), 2_000_000, 3_500_000, (500,)]
        if served.knows_parts:
            served.faults[2] = 1_000_000
        with open_address(address) as stream:
            assert stream.read() == DATA
        assert len(served.requests) == 5
        starts = [int(part[6:-1]) for _, part in served.requests[2:] if part is not None]
        assert starts == sorted(starts)
        assert all(start > 1_000_000 for start in starts)
        served.faults = [(503,), 1_500_000]
        assert fetch(f"{address}?{served.knows_parts}").read_bytes() == DATA


class Store(MemoryFileSystem):
    """An object store within this process, of addresses of s3 and gs."""

    protocol = ("s3", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.partition("://")[2] or path)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_packages_of_stores_read_their_addresses(served, monkeypatch, scheme):
    package = {"s3": "s3fs", "gs": "gcsfs"}[scheme]
    address = f"{scheme}://bucket/data.bin"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}, which is not installed: pip install "):
        RemoteFile(address)
    monkeypatch.setitem(registry, scheme, Store)
    Store().put(str(served.folder), "bucket", recursive=True)
    file = RemoteFile(address)
    assert file.pread(len(DATA), 0) == DATA
    with OpenFiles().stream(address) as stream:
        assert stream.read(100) == DATA[:100]
    with pytest.raises(AddressError, match=r"none: cannot be read \(not found"):
        RemoteFile(f"{scheme}://bucket/none")


def test_no_address_is_a_command(tmp_path):
    for address in (f"pipe:touch {tmp_path}/made", "file:///etc/passwd", "ftp://host/x"):
        with pytest.raises(
            AddressError, match="accepted: http://, https://, s3://, gs://, "
        ) as error:
            RemoteFile(address)
        assert str(error.value).startswith(f"{address}: not an address")
    assert not (tmp_path / "made").exists()
    assert under("s3://a/b?c", "d", "e.tar") == "s3://a/b?c/d/e.tar"
    assert under("https://a/b/?c", "d") == "https://a/b/d?c"
