"""The steps of the demonstrations: showing and running commands, and training small networks."""

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.progress import progress
from training.checkpoint import find_snapshots

ROOT = Path(__file__).resolve().parent.parent


def heading(title: str) -> None:
    """Print the title of a step."""
    click.secho(f"\n== {title}", bold=True)


def execute(title: str, script: str, *args: str) -> str:
    """Run one of the project's scripts, show its command and output, and return the output."""
    heading(title)
    click.echo(f"$ python {script} {shlex.join(args)}")
    command = [sys.executable, "-u", str(ROOT / script), *args]
    # OpenMP threads that soon stop spinning are several times faster when other programs run too.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    printed = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            click.echo(line, nl=False)
            printed += line
    if process.returncode:
        raise ValueError(f"{script} failed with exit code {process.returncode}.")
    return printed


def convert(outdir: Path, source: str, *args: str, name: str = "") -> Path:
    """Return the dataset ``name`` (by default ``source``) in a folder; convert it if missing."""
    data = outdir / f"{name or source}.zip"
    if not data.exists():
        args = ("convert", f"--source={source}", f"--dest={data}", *args)
        execute("Convert", "dataset_tool.py", *args)
    return data


def train_model(outdir: Path, *args: str) -> tuple[Path, Path]:
    """Train a model, and return the run folder and its last snapshot."""
    printed = execute("Train", "train.py", f"--outdir={outdir / 'runs'}", *args)
    run_dir = Path(re.search(r"Writing to (.+)", printed).group(1).strip())
    return run_dir, find_snapshots(run_dir)[0]


def generate(title: str, network: Path, folder: Path, *args: str) -> None:
    """Generate images into a folder with generate.py."""
    execute(title, "generate.py", f"--network={network}", f"--outdir={folder}", *args)


def small_autoencoder(block_out_channels: tuple[int, ...], **settings: Any) -> torch.nn.Module:
    """Return an AutoencoderKL with these block widths and no attention; needs diffusers."""
    from diffusers import AutoencoderKL

    kinds = dict(down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D")
    settings |= {name: (kind,) * len(block_out_channels) for name, kind in kinds.items()}
    settings |= dict(norm_num_groups=8, mid_block_add_attention=False)
    return AutoencoderKL(block_out_channels=block_out_channels, **settings)


def minimise(
    loss: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    label: str = "Autoencoder",
) -> None:
    """Minimise ``loss()`` for ``num_steps`` steps; the learning rate falls from 2e-3 to 0."""
    with progress(total=num_steps, label=label, unit="step") as bar:
        for step in range(num_steps):
            value = loss()
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 + math.cos(math.pi * step / num_steps)) / 2
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            bar.update()
