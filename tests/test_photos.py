"""docs/photos.md: its commands take a folder of photographs to a model, as they are written."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, read_pixels, succeed

from configs import get_preset
from models import build_network
from torch_utils.misc import count_parameters
from training.checkpoint import find_snapshots

# What makes each command small; the options on the page come first, and are overridden.
_SMALL = ("--base-dim=8", "--hidden-dim=16", "--num-heads=2", "--time-dim=16", "--num-blocks=1")
_TINY = {
    "dataset_tool.py convert": ("--crops=20", "--workers=1"),
    "train.py": ("--kimg=0.032", "--tick=0.016", "--snap=1", *_SMALL, "--steps=2"),
    "generate.py": ("--steps=2", "--seeds=0-7"),
    "fid.py calc": ("--steps=2", "--num-images=6"),
    "fid.py neighbours": ("--steps=2", "--num-images=8"),
}


def commands_of(page):
    """Return the lines of a page's bash blocks, without comments, continued ones joined."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def run_line(line, variables):
    """Run one line as a shell would, a program of ours in this process."""
    if assigned := re.fullmatch(r"([A-Z]+)=(\S+)", line):
        variables[assigned[1]] = assigned[2]
        return
    if not line.startswith("python "):
        own = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        subprocess.run(["bash", "-ec", line], check=True, env=own, timeout=60)
        return
    for name, value in variables.items():
        line = line.replace(f"${name}", value)
    for path in re.findall(r"\S+/network-snapshot-\d+\.pkl", line):  # After fewer images here.
        run_dir = Path(path.rpartition("=")[2]).parent
        line = line.replace(path, f"{path.partition('=')[0]}={find_snapshots(run_dir)[0]}")
    script, *args = shlex.split(line)[1:]
    command = next(key for key in (f"{script} {args[0]}", script, "") if key in _TINY or not key)
    succeed(importlib.import_module(script.removesuffix(".py")), *args, *_TINY.get(command, ()))


@pytest.mark.usefixtures("one_cpu_thread")
def test_the_commands_of_the_page_lead_from_photographs_to_a_model_of_another_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    variables = {}
    for line in commands_of("photos.md"):
        run_line(line, variables)
    first, second = sorted((tmp_path / "runs").iterdir())
    assert str(first.relative_to(tmp_path)) == variables["RUN"]
    assert read_pixels("out.png").shape[2] == 3
    (row,) = json.loads((first / "score.json").read_text())["rows"]
    assert row["metric"] == "kid_pixels"
    assert row["reference"] == "photos-test"
    assert "kid_pixels" in (first / "report.html").read_text()
    assert json.loads((second / "warm-start.json").read_text())["share"] == 1
    assert (tmp_path / "neighbours" / "neighbours.png").is_file()


def test_the_preset_is_small_enough_for_a_laptop():
    run = get_preset("photos64").run
    with torch.device("meta"):
        assert count_parameters(build_network(run.model)) <= 8e6
    assert run.model.resolution == 64
    assert run.training.precision == "fp32"  # Which every CPU is fast in.
