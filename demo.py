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
import torch

from data.features.dataset import FeatureDataset
from data.fewshot.sets import SetDataset
from demos.digits import SetClassifier, class_agreement, class_shares, train_autoencoder
from demos.patches import check_patches, mean_loss
from demos.photographs import write_encoders, write_photographs
from diffusion.guidance import DualGuidanceConfig
from dnnlib.cli import run
from dnnlib.text import format_time
from families.sets import open_data_of
from sampling.requests import make_feature_generator
from torch_utils.pictures import read_image
from training.checkpoint import find_snapshots, load_snapshot

MIN_CLASS_AGREEMENT = 0.90
MAX_FD_PIXELS = 0.10
IMAGES_PER_CLASS_CHECKED = 50
GUIDANCE = 2.5
SET_GUIDANCE = 2.5
# A context of tokens needs a shallower encoder than a vector does.
SET_MODES = {"film": (), "lag": ("--encoder-depth=1",)}
SAMPLES_PER_CLASS = 400
MIN_SEEN_SHARE, MAX_SEEN_CONTROL = 0.60, 0.20
FEATURE_KIMG = 8
PLAIN_GUIDANCE = DualGuidanceConfig(text_scale=1.0, visual_scale=1.0)
MAX_FEATURE_LOSS, MIN_PATCH_SHARE = 0.6, 0.90


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


def convert_digits(outdir: Path) -> Path:
    """Return the dataset of digits, made if it is not there."""
    data = outdir / "digits.zip"
    if not data.exists():
        execute("Convert", "dataset_tool.py", "convert", "--source=digits", f"--dest={data}")
    return data


def encode_digits(outdir: Path, data: Path) -> Path:
    """Return the latents of the digits, by an autoencoder that is trained if it is not there."""
    vae, latents = outdir / "digits-vae", outdir / "digits-latents"
    if not vae.exists():
        click.secho("\n== Train an autoencoder of 8x8 digits", bold=True)
        error = train_autoencoder(data, vae)
        click.echo(f"{vae}: mean squared error {error:.4f} of pixels in [-1, 1]")
    if not latents.exists():
        sources = (f"--source={data}", f"--dest={latents}", f"--vae={vae}")
        execute("Encode", "dataset_tool.py", "encode", *sources)
    return latents


def train_model(outdir: Path, *args: str) -> tuple[Path, Path]:
    """Train, and return the run folder and its last snapshot."""
    printed = execute("Train", "train.py", f"--outdir={outdir / 'runs'}", *args)
    run_dir = Path(re.search(r"Writing to (.+)", printed).group(1).strip())
    return run_dir, find_snapshots(run_dir)[0]


def check_classes(title: str, network: Path, folder: Path, *args: str) -> float:
    """Generate images of each class, and return the share that a classifier agrees with."""
    num_images = 10 * IMAGES_PER_CLASS_CHECKED
    execute(
        f"Generate {num_images} images {title}",
        "generate.py",
        *(f"--network={network}", "--class=0-9", "--batch=250"),
        *(f"--outdir={folder}", f"--seeds=0-{num_images - 1}", *args),
    )
    images = [read_image(folder / f"{seed:06d}.png").numpy() for seed in range(num_images)]
    return class_agreement(np.stack(images), np.arange(num_images) % 10)


def pixel_demo(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train, sample and score DiffiT on pixels; tell whether the result is as expected."""
    data = convert_digits(outdir)
    run_dir, network = train_model(
        outdir, f"--data={data}", "--preset=digits", "--metrics=fd_pixels", *train_args
    )
    # Each run has folders of its own, so that nothing of an earlier one is taken for its images.
    grid = outdir / "samples.png"
    execute(
        "Generate 10 images of each class",
        "generate.py",
        *(f"--network={network}", "--class=0-9", "--batch=250"),
        *(f"--outdir={outdir / f'samples-{run_dir.name}'}", "--seeds=0-99", f"--grid={grid}"),
    )
    agreement = check_classes("to check their classes", network, outdir / f"checked-{run_dir.name}")
    score_file = outdir / "score.json"
    execute(
        "Score",
        "fid.py",
        "calc",
        *(f"--network={network}", f"--ref={data}", "--metrics=fd_pixels", f"--json={score_file}"),
    )
    score = json.loads(score_file.read_text(encoding="utf-8"))["rows"][0]
    click.secho("\n== Result", bold=True)
    click.echo(
        f"(a) class agreement: {agreement:.1%} of {10 * IMAGES_PER_CLASS_CHECKED} generated images "
        "are what was asked for, by 3 nearest neighbours (at least "
        f"{MIN_CLASS_AGREEMENT:.0%} expected)\n"
        f"(b) fd_pixels: {score['value']:.4f} over {score['num_images']} images (below "
        f"{MAX_FD_PIXELS:.2f} expected; random halves of the real digits are 0.070 apart)\n"
        f"Pictures: {grid} (generated, one column per class), {run_dir / 'reals.png'} (real), "
        f"{run_dir / 'fakes-*.png'} (during training)"
    )
    return agreement >= MIN_CLASS_AGREEMENT and score["value"] < MAX_FD_PIXELS


def latent_demo(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train latent DiffiT, sample without and with guidance; tell whether that helps."""
    data = convert_digits(outdir)
    latents = encode_digits(outdir, data)
    run_dir, network = train_model(
        outdir,
        *(f"--data={latents}", "--preset=digits-latent"),
        *("--metrics=fd_pixels", f"--metrics-ref={data}", *train_args),
    )
    plain = check_classes("without guidance", network, outdir / f"plain-{run_dir.name}")
    grid = outdir / "latent-samples.png"
    guided = check_classes(
        "with guidance",
        network,
        outdir / f"guided-{run_dir.name}",
        *(f"--cfg-scale={GUIDANCE}", f"--grid={grid}", "--columns=50"),
    )
    click.secho("\n== Result", bold=True)
    click.echo(
        f"class agreement: {plain:.1%} without guidance, {guided:.1%} with --cfg-scale={GUIDANCE} "
        f"(more, and at least {MIN_CLASS_AGREEMENT:.0%}, expected)\n"
        f"Pictures: {grid} (generated with guidance), {run_dir / 'reals.png'} (real, through the "
        f"autoencoder), {run_dir / 'fakes-*.png'} (during training)"
    )
    return guided > plain and guided >= MIN_CLASS_AGREEMENT


def sets_demo(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train on sets of the digits 0 to 7, make others too; tell whether seen ones are good."""
    data = convert_digits(outdir)
    passed, report = True, []
    for mode, options in SET_MODES.items():
        _, network = train_model(
            outdir,
            *(f"--data={data}", "--preset=fsdm-digits", f"--mode-conditioning={mode}"),
            *(*options, *train_args),
        )
        dataset = open_data_of(load_snapshot(network), str(data))
        classifier = SetClassifier(dataset)
        predictions = {}
        for split in ("seen", "unseen"):
            predictions.update(
                make_from_supports(outdir, network, dataset, mode, split, classifier)
            )
        shares = class_shares(predictions, dataset.images.class_names)
        seen = shares[: len(dataset.split.train)]
        share = sum(it.hits for it in seen) / sum(it.num for it in seen)
        control = sum(it.control_hits for it in seen) / sum(it.control_num for it in seen)
        passed &= share >= MIN_SEEN_SHARE and control <= MAX_SEEN_CONTROL
        report.append(
            f"{mode}: seen classes 0 to 7 {share:.1%}, control {control:.1%} (at least "
            f"{MIN_SEEN_SHARE:.0%} and at most {MAX_SEEN_CONTROL:.0%} expected)"
        )
        for it in shares[len(seen) :]:
            report.append(
                f"{mode}: unseen class {it.name} {it.share:.1%} of {it.num}, control "
                f"{it.control:.1%} of {it.control_num}, one-sided p {it.p_value:.2g}"
            )
    click.secho("\n== Result", bold=True)
    click.echo(
        "Share of images that 3 nearest neighbours among the real digits, turned and mirrored ones "
        "as classes of their own, take for the class of the support; control: the same seeds with "
        "supports of other classes. p takes images for independent; those of a support are "
        "alike.\n" + "\n".join(report) + f"\nPictures: {outdir / 'sets-*.png'} "
        "(supports above what was made of them)"
    )
    return passed


def features_demo(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train on text and image features, first without patches; tell whether all are used."""
    folder = outdir / "photographs"
    if not (folder / "images").exists():
        write_photographs(folder / "images")
    click.secho(
        "\n== Encoders: an autoencoder to train, random ones of texts and images", bold=True
    )
    encoders = write_encoders(folder / "encoders")
    features = folder / "features"
    execute(
        "Prepare latents and features",
        "dataset_tool.py",
        "features",
        *(f"--source={folder / 'images'}", f"--dest={features}", "--buckets=128x128,160x96"),
        *("--validation-share=0", *encoders),
    )
    settings = (f"--data={features}", "--preset=nanodit-tiny", "--text-lengths=8")
    settings = (*settings, "--ema-kimg=0.3", "--snap=100")
    run_dir, network = train_model(outdir, *settings, f"--kimg={FEATURE_KIMG}", *train_args)
    dataset = FeatureDataset(features, text_lengths=(8,))
    names = ",".join(dataset.ids[row] for row in (0, 1, len(dataset) - 2, len(dataset) - 1))
    execute(
        "Generate from stored features",
        "generate.py",
        *(f"--network={network}", f"--features={features}", f"--id={names}", "--seeds=0-3"),
        *(f"--outdir={outdir / f'stored-{run_dir.name}'}", "--columns=4"),
        f"--grid={outdir / 'features-stored.png'}",
    )
    execute(
        "Generate from a text and an image",
        "generate.py",
        *(f"--network={network}", f"--reference={folder / 'images' / '007.png'}", "--seeds=0-3"),
        *("--prompt=far wide flower middle top", "--text-scale=1.5", "--visual-scale=1.5"),
        *(f"--outdir={outdir / f'asked-{run_dir.name}'}", "--columns=4"),
        f"--grid={outdir / 'features-asked.png'}",
    )
    passed = check_features(network, dataset)
    warm, plain = train_with_added_patches(outdir, settings)
    losses = [mean_loss(load_snapshot(path), dataset) for path in (warm, plain)]
    click.echo(
        f"(d) loss {losses[0]:.3f} of a model that got its patches half-way, {losses[1]:.3f} of "
        "one that never did (at most a tenth above that expected)\n"
        f"Pictures: {outdir / 'features-*.png'} (generated), {run_dir / 'reals.png'} (real, "
        f"through the autoencoder), {run_dir / 'fakes-*.png'} (image, its features, text alone)"
    )
    return passed and losses[0] <= 1.1 * losses[1]


def check_features(network: Path, dataset: FeatureDataset) -> bool:
    """Tell whether a model has learned its images, and uses their patches and texts."""
    click.secho("\n== Does it use its conditions?", bold=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot = load_snapshot(network)
    loss, mixed = (
        mean_loss(snapshot, dataset, swapped=names, device=device) for names in ((), ("text",))
    )
    check = check_patches(
        make_feature_generator(snapshot, device, guidance=PLAIN_GUIDANCE), dataset
    )
    click.echo(
        f"(a) loss {loss:.3f} (below {MAX_FEATURE_LOSS} expected; it begins at 2)\n"
        f"(b) own patches give a smaller error than another image's for {check.share:.0%} of the "
        f"images, {check.own.mean():.4f} against {check.swapped.mean():.4f} (at least "
        f"{MIN_PATCH_SHARE:.0%} expected)\n"
        f"(c) loss {mixed:.3f} with the texts of other images (higher expected)"
    )
    return loss < min(MAX_FEATURE_LOSS, mixed) and check.share >= MIN_PATCH_SHARE


def train_with_added_patches(outdir: Path, settings: tuple[str, ...]) -> tuple[Path, Path]:
    """Train without patches, then on with and without them; return both snapshots."""
    half = FEATURE_KIMG / 2
    base_dir, base = train_model(outdir, *settings, "--no-use-dino-patches", f"--kimg={half}")
    _, warm = train_model(
        outdir,
        *(*settings, f"--transfer={base}", f"--kimg={half}"),
        *("--lr=2e-3", f"--patch-bias-kimg={half / 8}"),
    )
    _, plain = train_model(outdir, f"--resume={base_dir}", f"--kimg={FEATURE_KIMG}")
    return warm, plain


def make_from_supports(
    outdir: Path,
    network: Path,
    dataset: SetDataset,
    mode: str,
    split: str,
    classifier: SetClassifier,
) -> dict[int, np.ndarray]:
    """Make images of every class of a split, and return what the classifier takes them for."""
    size = dataset.sample_size - 1
    classes = list(dataset.held_out) if split == "seen" else list(dataset.split.test)
    num_supports = 10 if split == "unseen" else min(map(len, dataset.held_out.values())) // size
    num_images = -(-SAMPLES_PER_CLASS // num_supports)
    folder = outdir / f"{network.parent.name}-{split}"
    execute(
        f"Make {num_images} images from each of {num_supports} supports of {len(classes)} classes",
        "generate.py",
        *(f"--network={network}", f"--data={dataset.path}", f"--split={split}"),
        *(f"--episodes={num_supports * len(classes)}", f"--num={num_images}"),
        *(f"--outdir={folder}", "--batch=500", f"--cfg-scale={SET_GUIDANCE}"),
    )
    # One support of each class, with the images that it has in that folder.
    execute(
        "Show some",
        "generate.py",
        *(f"--network={network}", f"--data={dataset.path}", f"--split={split}"),
        *(f"--episodes={len(classes)}", "--num=25", "--columns=4"),
        *(f"--outdir={folder}-shown", f"--grid={outdir / f'sets-{mode}-{split}.png'}"),
        f"--cfg-scale={SET_GUIDANCE}",
    )
    found: dict[int, list[np.ndarray]] = {index: [] for index in classes}
    for episode in range(num_supports * len(classes)):
        # Supports are drawn of one class after another.
        files = [folder / f"{episode:04d}" / f"{seed:06d}.png" for seed in range(num_images)]
        images = np.stack([read_image(file).numpy() for file in files])
        found[classes[episode % len(classes)]].append(classifier(images))
    return {index: np.concatenate(parts) for index, parts in found.items()}


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@click.option("--outdir", default="demo-out", show_default=True, type=click.Path(path_type=Path))
@click.option("--latent", is_flag=True, help="Latent DiffiT instead, with guidance.")
@click.option("--sets", is_flag=True, help="Set-conditioned DiT instead: digits never trained on.")
@click.option("--features", is_flag=True, help="NanoDiT instead: photographs by text and image.")
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED)
def main(
    outdir: Path, latent: bool, sets: bool, features: bool, train_args: tuple[str, ...]
) -> int:
    """Train, sample and score a small class-conditional DiffiT on 1,797 real handwritten digits.

    TRAIN_ARGS go to train.py after those of the demo, as in

    \b
      python demo.py -- --kimg=300
      python demo.py --latent
      python demo.py --sets
      python demo.py --features
    """
    if latent + sets + features > 1:
        raise click.UsageError("Give one of --latent, --sets and --features.")
    start = time.time()
    click.echo(
        f"This prepares {'photographs' if features else 'digits'}, trains on them, generates "
        f"images and checks them. It takes {'8 to 10' if sets else '2 to 5'} minutes on two CPU "
        "cores (less on a GPU)."
    )
    chosen = pixel_demo
    for wanted, other in ((latent, latent_demo), (sets, sets_demo), (features, features_demo)):
        chosen = other if wanted else chosen
    passed = chosen(outdir, train_args)
    click.echo(
        f"Total time: {format_time(time.time() - start)}. "
        + ("As expected." if passed else "NOT as expected.")
    )
    return 0 if passed else 1


if __name__ == "__main__":
    run(main)
