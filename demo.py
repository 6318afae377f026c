"""The whole chain on real data that needs no download: digits, from files to a score.

Runs the same commands as a user would, shows them, and checks the result in two ways.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from dnnlib.cli import run
from dnnlib.text import format_time
from training.checkpoint import find_snapshots
from training.pictures import read_image

MIN_CLASS_AGREEMENT = 0.90
MAX_FD_PIXELS = 0.10
IMAGES_PER_CLASS_CHECKED = 50


def execute(title: str, script: str, *args: str) -> str:
    """Run one of the project's scripts, show its command and output, and return the output."""
    click.secho(f"\n== {title}", bold=True)
    click.echo(f"$ python {script} {shlex.join(args)}")
    command = [sys.executable, "-u", str(Path(__file__).resolve().parent / script), *args]
    # Threads that soon stop spinning: several times faster where something else runs beside them.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stdout:
            click.echo(line, nl=False)
            lines.append(line)
    if process.returncode:
        raise ValueError(f"{script} failed with exit code {process.returncode}.")
    return "".join(lines)


def class_agreement(folder: Path, num_images: int) -> float:
    """Return the share of images in which a 3-nearest-neighbour classifier sees the asked class.

    The classifier is fitted on the real digits; image ``seed`` was asked to be of class seed % 10.
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    digits = load_digits()
    classifier = KNeighborsClassifier(n_neighbors=3).fit(digits.data, digits.target)
    images = [read_image(folder / f"{seed:06d}.png").numpy() for seed in range(num_images)]
    features = np.stack(images).reshape(num_images, -1) * (16 / 255)
    return float(np.mean(classifier.predict(features) == np.arange(num_images) % 10))


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@click.option("--outdir", default="demo-out", show_default=True, type=click.Path(path_type=Path))
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED)
def main(outdir: Path, train_args: tuple[str, ...]) -> int:
    """Train, sample and score a small class-conditional DiffiT on 1,797 real handwritten digits.

    TRAIN_ARGS go to train.py after those of the demo, as in

    \b
      python demo.py -- --kimg=300
    """
    start = time.time()
    click.echo(
        "This converts the digits, trains on them, generates images and scores them. It takes "
        "2 to 5 minutes on two CPU cores (less on a GPU)."
    )
    data = outdir / "digits.zip"
    if not data.exists():
        execute("Convert", "dataset_tool.py", "convert", "--source=digits", f"--dest={data}")
    trained = execute(
        "Train",
        "train.py",
        f"--outdir={outdir / 'runs'}",
        f"--data={data}",
        "--preset=digits",
        "--metrics=fd_pixels",
        *train_args,
    )
    run_dir = Path(re.search(r"Writing to (.+)", trained).group(1).strip())
    network = find_snapshots(run_dir)[0]

    # Each run has folders of its own, so that nothing of an earlier one is taken for its images.
    samples, checked = outdir / f"samples-{run_dir.name}", outdir / f"checked-{run_dir.name}"
    grid = outdir / "samples.png"
    sample = ("generate.py", f"--network={network}", "--class=0-9", "--batch=250")
    execute(
        "Generate 10 images of each class",
        *sample,
        f"--outdir={samples}",
        "--seeds=0-99",
        f"--grid={grid}",
    )
    num_checked = 10 * IMAGES_PER_CLASS_CHECKED
    execute(
        f"Generate {num_checked} images to check their classes",
        *sample,
        f"--outdir={checked}",
        f"--seeds=0-{num_checked - 1}",
    )
    score_file = outdir / "score.json"
    execute(
        "Score",
        "fid.py",
        "calc",
        f"--network={network}",
        f"--ref={data}",
        "--metrics=fd_pixels",
        f"--json={score_file}",
    )
    score = json.loads(score_file.read_text(encoding="utf-8"))["rows"][0]
    agreement = class_agreement(checked, num_checked)

    passed = agreement >= MIN_CLASS_AGREEMENT and score["value"] < MAX_FD_PIXELS
    click.secho("\n== Result", bold=True)
    click.echo(
        f"(a) class agreement: {agreement:.1%} of {num_checked} generated images are what was "
        f"asked for, by 3 nearest neighbours (at least {MIN_CLASS_AGREEMENT:.0%} expected)\n"
        f"(b) fd_pixels: {score['value']:.4f} over {score['num_images']} images (below "
        f"{MAX_FD_PIXELS:.2f} expected; random halves of the real digits are 0.070 apart)\n"
        f"Pictures: {grid} (generated, one column per class), {run_dir / 'reals.png'} (real), "
        f"{run_dir / 'fakes-*.png'} (during training)\n"
        f"Total time: {format_time(time.time() - start)}. "
        + ("Both as expected." if passed else "NOT as expected.")
    )
    return 0 if passed else 1


if __name__ == "__main__":
    run(main)
