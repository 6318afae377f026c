"""Demonstration of NanoDiT: photographs conditioned on text, style and layout."""

from pathlib import Path

import click
import torch

import families
from data.features.dataset import FeatureDataset
from demos.patches import check_patches, mean_loss
from demos.photographs import write_encoders, write_photographs
from demos.steps import execute, generate, heading, train_model
from diffusion.config import DualGuidanceConfig
from training.asked import GeneratorOptions
from training.checkpoint import load_snapshot

KIMG = 8
PLAIN_GUIDANCE = DualGuidanceConfig(text_scale=1.0, visual_scale=1.0)
MAX_LOSS, MIN_PATCH_SHARE = 0.6, 0.90


def demo_features(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train, sample and check NanoDiT, then add patches half-way; return whether checks pass."""
    images, features = outdir / "photographs/images", outdir / "photographs/features"
    prepare_features(images, features)
    settings = (f"--data={features}", "--preset=nanodit-tiny", "--text-lengths=8")
    settings = (*settings, "--ema-kimg=0.3", "--snap=100")
    run_dir, network = train_model(outdir, *settings, f"--kimg={KIMG}", *train_args)
    dataset = FeatureDataset(features, text_lengths=(8,))
    names = ",".join(dataset.ids[row] for row in (0, 1, len(dataset) - 2, len(dataset) - 1))
    stored = (f"--features={features}", f"--id={names}")
    asked = (f"--reference={images / '007.png'}", "--prompt=far wide flower middle top")
    asked = (*asked, "--text-scale=1.5", "--visual-scale=1.5")
    for title, name, args in (
        ("Generate from stored features", "stored", stored),
        ("Generate from a text and an image", "asked", asked),
    ):
        grid = ("--seeds=0-3", "--columns=4", f"--grid={outdir / f'features-{name}.png'}")
        generate(title, network, outdir / f"{name}-{run_dir.name}", *args, *grid)
    passed = check_conditions(network, dataset)
    warm, plain = train_with_added_patches(outdir, settings)
    losses = [mean_loss(load_snapshot(path), dataset) for path in (warm, plain)]
    click.echo(
        f"(d) loss {losses[0]:.3f} of a model that got its patches half-way, {losses[1]:.3f} of "
        "one that never did (at most a tenth above that expected)\n"
        f"Pictures: {outdir / 'features-*.png'} (generated), {run_dir / 'reals.png'} (real, "
        f"through the autoencoder), {run_dir / 'fakes-*.png'} (image, its features, text alone)"
    )
    return passed and losses[0] <= 1.1 * losses[1]


def prepare_features(images: Path, features: Path) -> None:
    """Write photographs, encoders, and the features of the photographs, keeping existing files."""
    if not images.exists():
        write_photographs(images)
    heading("Encoders: an autoencoder to train, random ones of texts and images")
    encoders = write_encoders(images.parent / "encoders")
    args = (f"--source={images}", f"--dest={features}", "--buckets=128x128,160x96")
    args = (*args, "--validation-share=0", *encoders)
    execute("Prepare latents and features", "dataset_tool.py", "features", *args)


def check_conditions(network: Path, dataset: FeatureDataset) -> bool:
    """Return whether a model has learned its training images, and uses their patches and texts."""
    heading("Does it use its conditions?")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot = load_snapshot(network)
    loss = mean_loss(snapshot, dataset, device=device)
    mixed = mean_loss(snapshot, dataset, swapped=("text",), device=device)
    options = GeneratorOptions(guidance=PLAIN_GUIDANCE)
    generator = families.of(snapshot.config).load(snapshot, device, options)
    check = check_patches(generator, dataset)
    click.echo(
        f"(a) loss {loss:.3f} (below {MAX_LOSS} expected; it begins at 2)\n"
        f"(b) own patches give a smaller error than another image's for {check.share:.0%} of the "
        f"images, {check.own.mean():.4f} against {check.swapped.mean():.4f} (at least "
        f"{MIN_PATCH_SHARE:.0%} expected)\n"
        f"(c) loss {mixed:.3f} with the texts of other images (higher expected)"
    )
    return loss < min(MAX_LOSS, mixed) and check.share >= MIN_PATCH_SHARE


def train_with_added_patches(outdir: Path, settings: tuple[str, ...]) -> tuple[Path, Path]:
    """Train without patches, then continue with and without them; return both snapshots."""
    half = KIMG / 2
    base_dir, base = train_model(outdir, *settings, "--no-use-dino-patches", f"--kimg={half}")
    transfer = (f"--transfer={base}", f"--kimg={half}", f"--patch-bias-kimg={half / 8}")
    _, warm = train_model(outdir, *settings, *transfer, "--lr=2e-3")
    _, plain = train_model(outdir, f"--resume={base_dir}", f"--kimg={KIMG}")
    return warm, plain
