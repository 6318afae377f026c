"""Half a minute of elastic.py, which see."""

import subprocess
import sys

from helpers import ROOT, fail, quiet_environment, succeed
from training_runs import TINY

import train


def test_a_run_that_loses_and_regains_nodes_equals_an_undisturbed_one():
    command = [sys.executable, str(ROOT / "tests" / "elastic.py"), "--minutes=0.2", "--steps=120"]
    command += ["--pause=2:4", "--seed=4"]
    done = subprocess.run(command, env=quiet_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs equal the undisturbed one" in done.stdout


def test_a_run_that_continues_takes_the_ranks_that_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = (*TINY, "--dry-run", "--batch-gpu=16")
    assert "--batch: got 64, which 3 ranks cannot share evenly" in fail(train, *args)
    output = succeed(train, *args, "--resume=auto").output
    assert "64 images per optimizer step on 3 rank(s), in 2 pass(es) of at most 11 each" in output
    message = fail(train, *args, "--resume=auto", "--batch-gpu=1")
    assert (
        "--batch-gpu: got 1, but --batch 64 over 3 ranks gives some ranks one row more" in message
    )
    monkeypatch.setenv("WORLD_SIZE", "65")
    assert "--batch: got 64, too small for each of 65 ranks to have a part" in fail(train, *args)
