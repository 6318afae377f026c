"""Runs that were killed, continued, damaged or transferred, in processes of their own."""

import json
import random
import shutil
import signal
import time

import psutil
import pytest
import torch
from conftest import FULL
from helpers import call, fail, succeed
from training_runs import (
    TINY,
    assert_same_run,
    differences,
    final_state,
    num_rows,
    only_run,
    per_tick,
    read_rows,
)

import train as train_script
from training.checkpoint import find_states, load_state


def test_a_run_killed_twice_equals_the_uninterrupted_one(train, uninterrupted, tmp_path):
    command = (f"--outdir={tmp_path}", *FULL, "--workers=1", "--resume=auto")
    first = train(*command)
    first.wait_until(lambda: list(tmp_path.glob("*/training_options.json")))
    time.sleep(random.uniform(0, 0.5))
    first.kill()
    second = train(*command)
    second.wait_until(lambda: num_rows(tmp_path) >= 5)
    time.sleep(random.uniform(0, 0.2))
    second.kill()
    run_dir = only_run(tmp_path)
    assert 0 < final_state(run_dir)["progress"]["cur_nimg"] < 2400
    half_written = run_dir / ".training-state-000001.pt.k3x.tmp"
    half_written.write_bytes(b"half")

    output = train(*command).finish()
    assert f"Resuming from {run_dir}/training-state-" in output
    assert "tick 0 " not in output
    assert not half_written.exists()
    assert_same_run(run_dir, uninterrupted(ranks=None))


def test_two_ranks_killed_with_their_launcher_equal_the_uninterrupted_run(
    train, uninterrupted, tmp_path
):
    command = (f"--outdir={tmp_path}", *FULL, "--workers=0", "--resume=auto")
    first = train(*command, ranks=2)
    first.wait_until(lambda: num_rows(tmp_path) >= 4)
    time.sleep(random.uniform(0, 0.2))
    processes = first.processes()
    assert len(processes) == 3
    # Nothing but torchrun itself is killed: ranks that went on would disturb the next process.
    first.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    run_dir = only_run(tmp_path)
    assert 0 < final_state(run_dir)["progress"]["cur_nimg"] < 2400

    output = train(*command, ranks=2).finish()
    assert output.count("Resuming from") == 1
    assert_same_run(run_dir, uninterrupted(ranks=2))


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of a finished run, to be spoilt."""
    source = uninterrupted(ranks=None)
    return shutil.copytree(source, tmp_path / "runs" / source.name)


def options(run_dir, digits_zip):
    return (f"--outdir={run_dir.parent}", f"--data={digits_zip}", *FULL, "--workers=0")
