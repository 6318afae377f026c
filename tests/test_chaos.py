"""A few of the kills of chaos.py, which see."""

import subprocess
import sys

from helpers import ROOT, quiet_environment


def test_killed_runs_of_one_and_two_ranks_equal_those_that_were_left_alone(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "chaos.py"), "--kills=4", "--per-run=2"]
    command += ["--kinds=image", "--seed=0", f"--base={tmp_path / 'runs'}"]
    done = subprocess.run(command, env=quiet_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs equal their references" in done.stdout
