"""Demonstrations of class-conditional DiffiT on digits, in pixel space and in latent space."""

import json
from pathlib import Path

import click
import numpy as np

from demos.digits import class_agreement, train_autoencoder
from demos.steps import convert, execute, generate, heading, train_model
from torch_utils.pictures import read_image

MIN_CLASS_AGREEMENT = 0.90
MAX_FD_PIXELS = 0.10
NUM_CHECKED = 500  # Number of images to classify; they take the ten classes in turn.
GUIDANCE = 2.5


def demo_pixels(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train, sample and score DiffiT on pixels; return whether the result is as expected."""
    data = convert(outdir, "digits")
    args = (f"--data={data}", "--preset=digits", "--metrics=fd_pixels", *train_args)
    run_dir, network = train_model(outdir, *args)
    # Each run has its own folders, so that images of an earlier run are not mistaken for its own.
    grid, samples = outdir / "samples.png", outdir / f"samples-{run_dir.name}"
    args = ("--class=0-9", "--batch=250", "--seeds=0-99", f"--grid={grid}")
    generate("Generate 10 images of each class", network, samples, *args)
    agreement = check_classes("to check their classes", network, outdir / f"checked-{run_dir.name}")
    score_file = outdir / "score.json"
    args = (f"--ref={data}", "--metrics=fd_pixels", f"--json={score_file}")
    execute("Score", "fid.py", "calc", f"--network={network}", *args)
    score = json.loads(score_file.read_text(encoding="utf-8"))["rows"][0]
    heading("Result")
    click.echo(
        f"(a) class agreement: {agreement:.1%} of {NUM_CHECKED} generated images are what was "
        f"asked for, by 3 nearest neighbours (at least {MIN_CLASS_AGREEMENT:.0%} expected)\n"
        f"(b) fd_pixels: {score['value']:.4f} over {score['num_images']} images (below "
        f"{MAX_FD_PIXELS:.2f} expected; random halves of the real digits are 0.070 apart)\n"
        f"Pictures: {grid} (generated, one column per class), {run_dir / 'reals.png'} (real), "
        f"{run_dir / 'fakes-*.png'} (during training)"
    )
    return agreement >= MIN_CLASS_AGREEMENT and score["value"] < MAX_FD_PIXELS


def demo_latents(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train latent DiffiT, sample without and with guidance; return whether guidance helps."""
    data = convert(outdir, "digits")
    latents = encode_digits(outdir, data)
    args = (f"--data={latents}", "--preset=digits-latent", "--metrics=fd_pixels")
    run_dir, network = train_model(outdir, *args, f"--metrics-ref={data}", *train_args)
    plain = check_classes("without guidance", network, outdir / f"plain-{run_dir.name}")
    grid = outdir / "latent-samples.png"
    args = (f"--cfg-scale={GUIDANCE}", f"--grid={grid}", "--columns=50")
    guided = check_classes("with guidance", network, outdir / f"guided-{run_dir.name}", *args)
    heading("Result")
    click.echo(
        f"class agreement: {plain:.1%} without guidance, {guided:.1%} with --cfg-scale={GUIDANCE} "
        f"(more, and at least {MIN_CLASS_AGREEMENT:.0%}, expected)\n"
        f"Pictures: {grid} (generated with guidance), {run_dir / 'reals.png'} (real, through the "
        f"autoencoder), {run_dir / 'fakes-*.png'} (during training)"
    )
    return guided > plain and guided >= MIN_CLASS_AGREEMENT


def encode_digits(outdir: Path, data: Path) -> Path:
    """Return the folder of the digits' latents; train the autoencoder and encode if missing."""
    vae, latents = outdir / "digits-vae", outdir / "digits-latents"
    if not vae.exists():
        heading("Train an autoencoder of 8x8 digits")
        error = train_autoencoder(data, vae)
        click.echo(f"{vae}: mean squared error {error:.4f} of pixels in [-1, 1]")
    if not latents.exists():
        sources = (f"--source={data}", f"--dest={latents}", f"--vae={vae}")
        execute("Encode", "dataset_tool.py", "encode", *sources)
    return latents


def check_classes(title: str, network: Path, folder: Path, *args: str) -> float:
    """Generate images of each class, and return the share that a classifier assigns to it."""
    args = ("--class=0-9", "--batch=250", f"--seeds=0-{NUM_CHECKED - 1}", *args)
    generate(f"Generate {NUM_CHECKED} images {title}", network, folder, *args)
    images = [read_image(folder / f"{seed:06d}.png").numpy() for seed in range(NUM_CHECKED)]
    return class_agreement(np.stack(images), np.arange(NUM_CHECKED) % 10)
