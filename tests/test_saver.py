"""States and snapshots that a process of its own writes: exactly, and whatever is killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from helpers import fail, succeed
from state_files import empty_state
from training_runs import FULL, assert_same_run, only_run

from dnnlib import saver as saver_process
from dnnlib.files import is_locked, sha256_of_file
from dnnlib.saver import MANIFEST, SaverProcess, lock_path, sidecar_of
from torch_utils import saver as client
from torch_utils.saver import Saver, memory_order
from training.checkpoint import find_states
from training.saving import state_folder
from training.saving import wait as wait_script
from training.saving import writer as writing
from training.saving.archive import Archive
from training.saving.state_folder import part_header, read_part, sorted_for_part
from training.saving.writer import Writer

TENSORS = {
    "weights": torch.randn(7, 5),
    "convolution": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "strided": torch.randn(6, 4)[:, ::2],
    "transposed": torch.randn(3, 5).T,
    "half": torch.randn(3).half(),
    "brain": torch.randn(3, 1).bfloat16(),
    "sum": torch.randn(3, dtype=torch.float64),
    "step": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
}


def assert_equal(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def write_part(saver, path, tensors):
    tensors = sorted_for_part(tensors)
    regions = [saver.stage(part_header(tensors))]
    saver.write_file(path, [*regions, *map(saver.stage, tensors.values())])


def test_a_part_and_an_archive_hold_what_was_staged(tmp_path):
    part, file = tmp_path / "part-00000.safetensors", tmp_path / "archive.pkl"
    with Saver() as saver:
        for number in range(3):  # In the same memory.
            tensors = {name: tensor + tensor * number for name, tensor in TENSORS.items()}
            saver.begin()
            write_part(saver, part, tensors)
            archive = Archive(saver.stage)
            members = {name: archive.add(tensor) for name, tensor in tensors.items()}
            tree = dict(ema=members, progress=dict(kimg=1.5, names=["a", None]))
            saver.write_archive(file, archive.members(tree))
            saver.wait()
            assert_equal(read_part(part), tensors)
            loaded = torch.load(file, weights_only=True)
            assert_equal(loaded["ema"], tensors)
            assert loaded["progress"] == tree["progress"]
    assert loaded["ema"]["convolution"].is_contiguous(memory_format=torch.channels_last)
    assert_equal(torch.load(file, weights_only=True, mmap=True)["ema"], tensors)
    # Others read it, too; what lies otherwise in memory has its dimensions in that order.
    others = safetensors.torch.load_file(part)
    assert others["convolution"].shape == (4, 2, 2, 3)
    assert torch.equal(others["strided"], tensors["strided"])
    assert list(tmp_path.glob(".*")) == []


def test_dimensions_are_ordered_as_they_lie_in_memory():
    assert memory_order(TENSORS["convolution"]) == [0, 2, 3, 1]
    assert memory_order(TENSORS["transposed"]) == [1, 0]
    assert memory_order(TENSORS["strided"]) == [0, 1]


def test_what_was_kept_is_copied_once(tmp_path):
    with Saver() as saver:
        saver.begin()
        kept = saver.stage(TENSORS["weights"], keep=True)
        assert saver.stage(TENSORS["weights"].detach()) == kept
        assert saver.stage(TENSORS["weights"][:3]) != kept
        saver.begin()
        other = saver.stage(TENSORS["weights"] + 1)
        assert saver.stage(TENSORS["weights"] + 1) != other


def test_a_saver_writes_no_faster_than_it_may(tmp_path):
    with Saver(rate=4) as saver:
        write_part(saver, tmp_path / "part-00000.safetensors", dict(a=torch.zeros(10**6)))
        began = time.monotonic()
        assert saver.is_busy
        saver.wait()
        assert time.monotonic() - began > 0.6
        assert not saver.is_busy


def test_what_cannot_be_written_is_an_error_of_the_next_call(tmp_path):
    (tmp_path / "file").touch()
    with Saver() as saver:
        write_part(saver, tmp_path / "file" / "part-00000.safetensors", TENSORS)
        with pytest.raises(OSError, match=r"File exists: .*/file") as caught:
            saver.wait()
        assert caught.value.errno == errno.EEXIST
        saver.wait()  # Told once.
        write_part(saver, tmp_path / "part-00000.safetensors", TENSORS)
        saver.wait()
        saver._process.kill()
        saver._process.wait()
        with pytest.raises(OSError, match="writes states and snapshots was killed"):
            saver.hold(tmp_path / "lock")


def test_a_saver_ends_at_its_deadline_once_nobody_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "DEADLINE_SEC", 0.2)
    lock = tmp_path / "lock"
    with Saver(rate=1e-3) as saver:
        saver.hold(lock)
        saver.wait()
        assert is_locked(lock)
        write_part(saver, tmp_path / "part-00000.safetensors", dict(a=torch.zeros(10**6)))
    assert os.waitstatus_to_exitcode(os.waitpid(saver._process.pid, 0)[1]) == 1
    assert not (tmp_path / "part-00000.safetensors").exists()
    assert not is_locked(lock)


def test_a_saver_ends_with_a_process_that_was_killed_between_a_message_and_its_file(tmp_path):
    lock = tmp_path / "lock"
    with Saver() as saver:
        saver.hold(lock)
        saver.wait()
        client.send_message(saver._connection, dict(kind="segment"))
        saver._connection.close()
        saver._process.wait(timeout=20)
    assert not is_locked(lock)


def test_a_stop_before_the_process_is_told_leaves_nothing_to_wait_for(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with Saver() as saver:
        monkeypatch.setattr(client, "send_message", stop)
        with pytest.raises(KeyboardInterrupt):
            saver.hold(tmp_path / "lock")
        assert not saver.is_busy
        saver.wait()
    client._Segment.__new__(client._Segment).__del__()  # Of memory that a stop kept from being.


def test_a_manifest_waits_for_parts_until_none_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(saver_process, "_STANDSTILL_SEC", 1.0)
    monkeypatch.setattr(saver_process, "_UNLOCKED_STANDSTILL_SEC", 0.2)
    process = SaverProcess(None, 1.0, None)
    folder = tmp_path / "state"
    folder.mkdir()
    parts = [folder / f"part-0000{rank}.safetensors" for rank in range(2)]
    sidecar_of(parts[0]).write_text('{"size": 1}')
    sidecar_of(parts[1]).write_text('{"size"')  # Is just being written.
    with pytest.raises(OSError, match=r"part-00001\.safetensors did not arrive"):
        process._wait_for(parts)
    with Saver() as saver:  # Of the rank that is waited for: it lives.
        saver.hold(lock_path(tmp_path, 1))
        saver.wait()
        began = time.monotonic()
        with pytest.raises(OSError, match="did not arrive"):
            process._wait_for(parts)
        assert time.monotonic() - began > 0.9
    sidecar_of(parts[1]).write_text('{"size": 1}')
    assert process._wait_for(parts) == [{"size": 1}] * 2


def test_files_that_others_rename_while_a_manifest_waits_are_no_error(tmp_path, monkeypatch):
    part = tmp_path / "part-00000.safetensors"
    half_written = tmp_path / ".part-00000.json.abc.tmp"
    half_written.write_text('{"size": 1}')
    list_folder = Path.iterdir

    def list_before_the_rename(folder):
        found = list(list_folder(folder))
        half_written.replace(sidecar_of(part))
        return found

    monkeypatch.setattr(Path, "iterdir", list_before_the_rename)
    assert SaverProcess(None, 1.0, None)._wait_for([part]) == [{"size": 1}]


def test_a_saver_whose_own_part_is_missing_keeps_its_lock(tmp_path, monkeypatch):
    part = tmp_path / "training-state-000001.tmp" / "part-00000.safetensors"
    part.parent.mkdir()
    process = SaverProcess(None, 1.0, None)
    process._take_lock(str(lock_path(tmp_path, 0)))
    monkeypatch.setattr(saver_process, "_UNLOCKED_STANDSTILL_SEC", 0.05)
    with pytest.raises(OSError, match="did not arrive"):
        process._wait_for([part])
    code = "import sys; from pathlib import Path; from dnnlib.files import is_locked; "
    code += "sys.exit(not is_locked(Path(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", code, lock_path(tmp_path, 0)], check=True)
    process._drop_lock()


def test_the_command_that_waits_ends_when_all_is_written(tmp_path, monkeypatch):
    run_dir, part = tmp_path / "00000-x", tmp_path / "00000-x" / "part-00000.safetensors"
    run_dir.mkdir()
    with Saver(rate=1.6) as saver:
        saver.hold(lock_path(run_dir, 0))
        write_part(saver, part, dict(a=torch.zeros(10**6)))
        while not is_locked(lock_path(run_dir, 0)):  # As a run's is long before it ends.
            time.sleep(0.05)
    for folder in (tmp_path, run_dir):
        result = succeed(wait_script, folder)
        assert part.is_file()
        told = "Waiting for the state that an earlier process is still writing" in result.output
        assert told == (folder == tmp_path)
    mistyped = succeed(wait_script, tmp_path / "rums").output
    assert "rums is not a folder: there is nothing to wait for." in mistyped
    monkeypatch.setattr(wait_script, "DEADLINE_SEC", -60.0)
    with Saver(rate=1e-3) as saver:
        saver.hold(lock_path(run_dir, 0))
        saver.wait()
        assert "a process that is writing a state has not ended" in fail(wait_script, run_dir)


def test_a_state_that_takes_the_name_of_one_that_is_read_is_read_instead(tmp_path, monkeypatch):
    place, other = tmp_path / "training-state-000001", tmp_path / "other"
    empty_state(place, "old")
    empty_state(other, "new")
    calls = []

    def checksum(file):
        calls.append(file)
        if len(calls) == 1:
            assert saver_process._exchange(other, place)
        return sha256_of_file(file)

    monkeypatch.setattr(state_folder, "sha256_of_file", checksum)
    assert state_folder.load(place, lazily=False)["config"] == dict(text="new")
    assert len(calls) == 2
    (place / "part-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        state_folder.load(place, lazily=False)


def test_what_is_written_at_once_takes_other_memory(tmp_path):
    parts = [tmp_path / f"part-0000{number}.safetensors" for number in range(3)]
    with Saver(rate=4) as saver:
        saver.begin()
        write_part(saver, parts[0], dict(a=torch.zeros(10**6)))
        assert saver.begin(lambda: True) < 0.6
        write_part(saver, parts[1], dict(a=torch.ones(10**6)))
        assert saver.begin() > 0.2
        num_segments = len(saver._segments)
        write_part(saver, parts[2], dict(a=torch.ones(10**5)))
        assert len(saver._segments) == num_segments
        saver.wait()
    assert [read_part(part)["a"].mean() for part in parts] == [0, 1, 1]


def test_ranks_share_the_work_and_those_that_see_no_folder_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_who_sees", lambda run_dir: (0, 2))
    monkeypatch.setattr(writing.distributed, "world_size", lambda: 3)
    tree = dict(ema=dict(a=torch.zeros(100)), net=dict(a=torch.zeros(60), b=torch.zeros(40)))
    found = {}
    for rank in range(3):
        monkeypatch.setattr(writing.distributed, "rank", lambda rank=rank: rank)
        with Saver() as saver:
            settings = dict(keep_states=2, is_sharded=False)
            writer = Writer(saver, tmp_path, None, None, **settings)
            found[rank] = writing.take_apart(tree, writer._writers, rank)[1].keys()
            saver.wait()
            assert lock_path(tmp_path, rank).exists() == (rank != 1)
    assert found == {0: {"/ema/a"}, 1: set(), 2: {"/net/a", "/net/b"}}
    with Saver() as saver, pytest.raises(ValueError, match="ranks 1 do not see it"):
        Writer(saver, tmp_path, None, None, keep_states=2, is_sharded=True)


# A state in 1.5 seconds.
SLOW = (*(word for word in FULL if "ema-stds" not in word), "--save-rate=0.15", "--workers=0")


@pytest.mark.parametrize("ranks", [None, 2], ids=["python", "torchrun"])
def test_a_state_outlives_the_kill_of_all_but_its_saver(train, uninterrupted, tmp_path, ranks):
    command = (f"--outdir={tmp_path}", *FULL, "--workers=0", "--resume=auto")
    first = train(*command, "--save-rate=0.08", ranks=ranks, warm=True)
    begun = lambda: list(tmp_path.glob("*/.training-state-000000.064.*/.part-*"))  # noqa: E731
    first.wait_until(lambda: len(begun()) == (ranks or 1))
    time.sleep(0.7)  # Until every rank knows that of the others.
    savers, others = [], []
    for process in first.processes():
        is_saver = "dnnlib.saver" in " ".join(process.cmdline())
        (savers if is_saver else others).append(process)
    assert len(savers) == (ranks or 1)
    for group in {os.getpgid(process.pid) for process in others} - {os.getpgid(0)}:
        os.killpg(group, signal.SIGKILL)
    for process in savers:  # As a scheduler would.
        process.send_signal(signal.SIGTERM)
    (folder,) = {path.parent for path in begun()}
    assert not (folder / MANIFEST).exists()
    name = folder.name.removeprefix(".").rsplit(".", 2)[0]

    output = train(*command, ranks=ranks, warm=True).finish()
    run_dir = only_run(tmp_path)
    assert "Waiting for the state that an earlier process is still writing" in output
    assert f"Resuming from {run_dir / name}" in output
    psutil.wait_procs(savers, timeout=5)
    assert not list(run_dir.glob(".saver-*"))
    assert_same_run(run_dir, uninterrupted(ranks))


def test_a_run_that_is_faster_than_its_disk_says_so(train, tmp_path):
    output = train(f"--outdir={tmp_path}", *SLOW, "--kimg=0.9", warm=True).finish()
    assert "Training paused for " in output
    assert "Write states less often with --dump" in output
    assert len(find_states(only_run(tmp_path))) == 2
