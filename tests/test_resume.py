"""Runs that were killed, continued, damaged or transferred, in processes of their own."""

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from helpers import ROOT, fail, succeed
from state_files import as_file
from training_runs import (
    FULL,
    TINY,
    assert_same_run,
    differences,
    final_state,
    kill_all,
    num_rows,
    only_run,
    per_tick,
    read_rows,
)

import train as train_script
from data.convert.convert import convert_images
from data.convert.sources import open_source
from dnnlib.saver import remove_state
from training import launch
from training.checkpoint import (
    find_profiles,
    find_snapshots,
    find_states,
    load_snapshot,
    load_state,
)
from training.saving import state_folder


def test_a_run_killed_twice_equals_the_uninterrupted_one(train, uninterrupted, tmp_path):
    command = (f"--outdir={tmp_path}", *FULL, "--workers=1", "--resume=auto")
    first = train(*command, warm=True)
    first.wait_until(lambda: list(tmp_path.glob("*/training_options.json")))
    time.sleep(random.uniform(0, 0.5))
    first.kill()
    second = train(*command, warm=True)
    second.wait_until(lambda: num_rows(tmp_path) >= 3)
    time.sleep(random.uniform(0, 0.1))
    second.kill()
    run_dir = only_run(tmp_path)
    assert 0 < final_state(run_dir)["progress"]["cur_nimg"] < 4000
    half_written = run_dir / ".training-state-000001.0123456789abcdef.tmp"
    half_written.mkdir()
    (half_written / ".part-00000.safetensors.k3x.tmp").write_bytes(b"half")

    output = train(*command, warm=True).finish()
    assert f"Resuming from {run_dir}/training-state-" in output
    assert "tick 0 " not in output
    assert not half_written.exists()
    assert_same_run(run_dir, uninterrupted(ranks=None))


@pytest.mark.skipif(sys.platform != "linux", reason="ranks end with torchrun on Linux only")
def test_two_ranks_killed_with_their_launcher_equal_the_uninterrupted_run(
    train, uninterrupted, tmp_path
):
    command = (f"--outdir={tmp_path}", *FULL, "--workers=0", "--resume=auto")
    first = train(*command, ranks=2)
    first.wait_until(lambda: num_rows(tmp_path) >= 3)
    time.sleep(random.uniform(0, 0.1))
    processes = first.processes()
    assert len(processes) == 5  # With a saver of each rank.
    # Nothing but torchrun itself is killed: ranks that went on would disturb the next process.
    first.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=30)
    kill_all(alive)
    assert not alive
    run_dir = only_run(tmp_path)
    assert 0 < final_state(run_dir)["progress"]["cur_nimg"] < 4000

    output = train(*command, ranks=2, warm=True).finish()
    assert output.count("Resuming from") == 1
    assert_same_run(run_dir, uninterrupted(ranks=2))


@pytest.fixture
def finished(one_cpu_thread, uninterrupted, tmp_path):
    """A copy of a finished run, to be spoilt and continued in this process."""
    source = uninterrupted(ranks=None)
    return shutil.copytree(source, tmp_path / "runs" / source.name)


def options(run_dir, digits_zip):
    return (f"--outdir={run_dir.parent}", f"--data={digits_zip}", *FULL, "--workers=0")


@pytest.mark.parametrize("rewind", [False, True])
def test_a_run_continues_by_its_folder_or_by_a_state_file(finished, uninterrupted, rewind):
    newest, previous = find_states(finished)
    if rewind:
        output = succeed(train_script, f"--resume={previous}").output
    else:
        remove_state(newest)
        output = succeed(train_script, f"--resume={finished}").output
        assert f"Resuming from {previous}" in output
    assert "tick 9 " in output
    assert "tick 0 " not in output
    assert_same_run(finished, uninterrupted(ranks=None))


def test_resuming_a_finished_run_changes_nothing_but_makes_up_for_a_missing_score(
    finished, digits_zip, uninterrupted
):
    watched = [
        *finished.glob("training-state-*/*"),
        *finished.glob("network-*"),
        finished / "stats.jsonl",
    ]
    before = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in watched]
    scores = finished / "metric-fd_pixels.jsonl"
    *kept, last = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(kept) + last[:40])  # As a kill in the middle of the row leaves it.
    superfluous = finished / "training-state-000002"  # And one between two states.
    shutil.copytree(find_states(finished)[1], superfluous)

    output = succeed(train_script, *options(finished, digits_zip), "--resume=auto").output
    assert "Complete at kimg 4.0" in output
    assert "tick " not in output
    assert [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in watched] == before
    assert only_run(finished.parent) == finished
    assert_same_run(finished, uninterrupted(ranks=None))

    output = succeed(train_script, *options(finished, digits_zip), "--resume=auto").output
    assert "fd_pixels" not in output
    assert not superfluous.exists()
    assert len(read_rows(scores)) == len(kept) + 1


def part_of(state):
    return state / "part-00000.safetensors"


def flip_bytes(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4] = bytes(byte ^ 0xFF for byte in data[middle : middle + 4])
    path.write_bytes(data)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("spoil", [flip_bytes, cut_off])
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    finished, digits_zip, uninterrupted, spoil
):
    newest, previous = find_states(finished)
    spoil(part_of(newest))
    assert str(newest) in fail(train_script, f"--resume={newest}")
    output = succeed(train_script, *options(finished, digits_zip), "--resume=auto").output
    assert f"Skipped: {part_of(newest)}: damaged" in output
    assert f"Resuming from {previous}" in output
    assert_same_run(finished, uninterrupted(ranks=None))


def test_a_run_without_a_readable_state_starts_again_in_its_folder(finished, uninterrupted):
    for path in find_states(finished):
        flip_bytes(part_of(path))
    # A state of an earlier position than the damaged ones must outlive the first pruning.
    output = succeed(train_script, f"--resume={finished}", "--keep-states=1", "--kimg=1.5").output
    assert output.count("Skipped: ") == 2
    assert "holds no readable training state: starting from the beginning" in output
    assert "tick 0 " in output
    assert [path.name for path in find_states(finished)] == ["training-state-000001"]
    found, expected = (per_tick(path, "Loss/loss") for path in (finished, uninterrupted(None)))
    assert found[:4] == expected[:4]
    succeed(train_script, f"--resume={finished}", "--kimg=4")
    states = [final_state(path) for path in (finished, uninterrupted(ranks=None))]
    assert differences(*[{k: s[k] for k in ("net", "ema", "optimizer")} for s in states]) == []


@pytest.mark.parametrize("fault", ["disk", "version"])
def test_a_state_that_cannot_be_read_now_stays_and_the_run_does_not_go_on(
    finished, monkeypatch, fault
):
    newest = find_states(finished)[0]
    if fault == "disk":

        def fail_to_read(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        monkeypatch.setattr(state_folder, "sha256_of_file", fail_to_read)
    else:
        monkeypatch.setattr(state_folder, "FORMAT_VERSION", 1)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    message = fail(train_script, f"--resume={finished}", "--kimg=9")
    reason = {"disk": "cannot be read now (Input/output error)", "version": "format version 2"}
    assert f"{newest}: " in message
    assert reason[fault] in message
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


def test_a_missing_or_damaged_snapshot_is_named_and_written_again(finished, digits_zip):
    for newest, spoil in itertools.product(
        (find_snapshots(finished)[0], find_profiles(finished)[0]),
        (flip_bytes, lambda path: path.unlink()),
    ):
        ema = load_snapshot(newest).state_dict
        spoil(newest)
        output = succeed(train_script, *options(finished, digits_zip), "--resume=auto").output
        assert f"{newest}: " in output
        assert "Written again from the training state." in output
        assert differences(load_snapshot(newest).state_dict, ema) == []


def test_unfit_resume_requests_are_refused_with_a_sentence(finished, digits_zip, tmp_path):
    newest = find_states(finished)[0]
    snapshot = find_snapshots(finished)[0]
    assert "does not exist" in fail(train_script, f"--resume={tmp_path / 'nowhere'}")
    assert "not a run folder" in fail(train_script, f"--resume={tmp_path}")
    assert f"{snapshot} is not a training state" in fail(train_script, f"--resume={snapshot}")
    message = fail(train_script, f"--resume={newest}", "--base-dim=32")
    assert "base_dim 16 there, 32 here" in message
    for stds, shown in (("none", "none"), ("0.05", "0.05"), ("0.05,0.1,0.15", "0.05,0.1,0.15")):
        message = fail(train_script, f"--resume={newest}", f"--ema-stds={stds}")
        assert f"averages of --ema-stds=0.05,0.1, not of {shown}, and none can start" in message
    assert "--resume or --transfer" in fail(
        train_script, f"--resume={newest}", f"--transfer={snapshot}"
    )


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_without_its_options_a_run_goes_on_by_those_in_its_state(
    damage, finished, digits_zip, tmp_path
):
    options_file = finished / "training_options.json"
    whole = options_file.read_text()
    for resume in ("auto", finished):
        if damage == "missing":
            options_file.unlink()
        else:
            options_file.write_text(whole[:100])
        args = options(finished, digits_zip) if resume == "auto" else ()
        result = succeed(train_script, *args, f"--resume={resume}", "--kimg=0.064")
        reason = "is missing" if damage == "missing" else "cannot be read"
        assert f"{options_file}: {reason}" in result.output
        assert "the configuration in training-state-" in result.output
        assert "Resuming from" in result.output
        found, expected = (json.loads(text)["config"] for text in (options_file.read_text(), whole))
        assert found["model"] == expected["model"]
        assert found["training"]["seed"] == expected["training"]["seed"]
    assert len(list(finished.parent.iterdir())) == 1
    # Without any state there is nothing to go by.
    for path in find_states(finished):
        remove_state(path)
    options_file.write_text(whole[:100])
    assert f"{options_file}: cannot be read" in fail(train_script, f"--resume={finished}")


def test_other_data_are_reported_and_another_process_is_kept_out(
    finished, digits_zip, tmp_path, monkeypatch
):
    other = tmp_path / "other.zip"
    convert_images(open_source("digits"), other, max_images=150, num_workers=1)
    result = succeed(train_script, f"--resume={finished}", f"--data={other}", "--kimg=0.064")
    assert "The training data are not those that the run began with" in result.output
    hold = "import pathlib, sys; from dnnlib.files import lock_folder; "
    hold += "held = lock_folder(pathlib.Path(sys.argv[1]), ''); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(finished)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_LOCK_PATIENCE_SEC", 0.3)
            message = fail(train_script, f"--resume={finished}")
        assert "another process is training here" in message
        # Another one that ends in time is waited for.
        threading.Timer(0.5, process.kill).start()
        succeed(train_script, f"--resume={finished}")


@pytest.mark.parametrize("spoilt", ["part", "manifest", "file of before"])
def test_a_state_with_any_damage_is_named_or_loads_as_it_was(finished, spoilt):
    state = find_states(finished)[0]
    expected = load_state(state)
    if spoilt == "file of before":
        path = state = as_file(state)
        loaded = load_state(path)
        assert differences({name: loaded[name] for name in expected}, expected) == []
        expected = loaded
    else:
        path = state / "manifest.json" if spoilt == "manifest" else part_of(state)
    data = path.read_bytes()
    generator = random.Random(0)
    named = []
    for trial in range(60):
        damaged = bytearray(data)
        # The last tenth of an archive holds the names and sizes of its members.
        first = 0 if trial % 2 else len(data) * 9 // 10
        damaged[generator.randrange(first, len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged if trial % 5 else damaged[: generator.randrange(len(data))])
        try:
            loaded = load_state(state)
        except ValueError as error:
            named.append(str(state) in str(error))
        else:
            assert differences(loaded, expected) == []
    assert all(named)
    assert len(named) > 30


def test_auto_starts_a_run_of_its_own_for_another_command(finished, digits_zip):
    args = (*options(finished, digits_zip), "--resume=auto", "--seed=1", "--kimg=0.064")
    assert "Resuming" not in succeed(train_script, *args).output
    assert sorted(path.name[:5] for path in finished.parent.iterdir()) == ["00000", "00001"]


def test_auto_starts_a_run_of_its_own_for_other_first_weights_and_another_description(
    finished, digits_zip, tmp_path
):
    snapshot = find_snapshots(finished)[0]
    outdir = tmp_path / "auto"
    args = (f"--outdir={outdir}", f"--data={digits_zip}", *TINY, "--workers=0", "--iters=1")
    args += ("--resume=auto", "--augment=0")

    def num_runs(*more):
        succeed(train_script, *args, *more)
        return len(list(outdir.iterdir()))

    assert num_runs() == 1
    assert num_runs("--desc=a") == 2
    assert num_runs(f"--transfer={snapshot}") == 3
    assert num_runs(f"--transfer={snapshot}") == 3
    assert num_runs("--desc=a") == 3
    succeed(train_script, f"--resume={max(outdir.iterdir())}", "--iters=2")
    assert num_runs(f"--transfer={snapshot}") == 3
    assert num_runs("--desc=b") == 4


def test_transfer_reports_what_it_loaded_and_what_not(finished, digits_zip, tmp_path):
    snapshot = find_snapshots(finished)[0]
    outdir = tmp_path / "new"
    # Two blocks instead of one, no augmentation labels, another attention window.
    args = (f"--outdir={outdir}", f"--data={digits_zip}", *TINY, "--num-blocks=2", "--window=8")
    args += ("--workers=0", "--lr-rampup=1", f"--transfer={snapshot}", "--resume=auto")
    args += ("--transfer-allow=*",)
    output = succeed(train_script, *args, "--iters=1").output
    report = re.search(
        r"Transfer from (.*): (\d+) of (\d+) tensors loaded, [\d.]+% of the parameters.\n"
        r"  Loaded: (.*)\n"
        r"  Missing \(kept as initialised\): (.*)\n"
        r"  Mismatched shape \(kept as initialised\): (.*)\n"
        r"  Unexpected \(not used\): (.*)\n",
        output,
    )
    assert report[1] == str(snapshot)
    missing, mismatched, unexpected = (set(report[n].split(", ")) for n in (5, 6, 7))
    assert "backbone." in report[4]

    # The first step of a ramp has learning rate 0: the weights are those that were loaded.
    given, net = load_snapshot(snapshot).state_dict, final_state(only_run(outdir))["net"]
    assert missing == net.keys() - given.keys() != set()
    assert unexpected == given.keys() - net.keys() != set()
    shared = net.keys() & given.keys()
    assert mismatched == {name for name in shared if net[name].shape != given[name].shape} != set()
    assert (int(report[2]), int(report[3])) == (len(shared - mismatched), len(net))
    assert all(torch.equal(net[name], given[name]) for name in shared - mismatched)

    output = succeed(train_script, *args, "--iters=2").output
    assert "Resuming from" in output
    assert "Transfer" not in output


def test_a_run_continues_from_another_folder(digits_zip, tmp_path, monkeypatch, one_cpu_thread):
    """The path of its data is stored absolute; where they have moved to, --data says."""
    data = tmp_path / "here" / "digits.zip"
    data.parent.mkdir()
    shutil.copy(digits_zip, data)
    monkeypatch.chdir(data.parent)
    options = ("--outdir=runs", "--data=digits.zip", *TINY, "--batch=8", "--workers=0")
    succeed(train_script, *options, "--iters=1")
    run_dir = only_run(data.parent / "runs")
    monkeypatch.chdir(tmp_path)
    assert "Resuming from" in succeed(train_script, f"--resume={run_dir}", "--iters=2").output
    moved = data.rename(tmp_path / "moved.zip")
    message = fail(train_script, f"--resume={run_dir}", "--iters=3")
    assert f"--data: {data} does not exist; say where the data are." in message
    succeed(train_script, f"--resume={run_dir}", f"--data={moved}", "--iters=3")
