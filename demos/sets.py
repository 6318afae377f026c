"""Demonstration of set-conditioned DiT: digits of classes that it was never trained on."""

import dataclasses
from pathlib import Path

import click
import numpy as np

from data.fewshot.sets import SetDataset
from demos.digits import class_shares, set_classifier
from demos.steps import convert, generate, heading, train_model
from families.sets import open_data_of
from torch_utils.pictures import read_image
from training.checkpoint import load_snapshot

GUIDANCE = 2.5
# A context of tokens needs a shallower encoder than a single vector does.
MODES = {"film": (), "lag": ("--encoder-depth=1",)}
SAMPLES_PER_CLASS = 400
MIN_SEEN_SHARE, MAX_SEEN_CONTROL = 0.60, 0.20


def demo_sets(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train on sets of the digits 0 to 7, generate all ten; return whether seen ones are good."""
    data = convert(outdir, "digits")
    passed, report = True, []
    for mode, options in MODES.items():
        preset = ("--preset=fsdm-digits", f"--mode-conditioning={mode}", *options)
        _, network = train_model(outdir, f"--data={data}", *preset, *train_args)
        dataset = open_data_of(load_snapshot(network), str(data))
        predictions = {}
        for split in ("seen", "unseen"):
            grid = outdir / f"sets-{mode}-{split}.png"
            predictions.update(predict_classes(outdir, network, dataset, split, grid))
        shares = class_shares(predictions, dataset.images.class_names)
        num_seen = len(dataset.split.train)
        seen = [dataclasses.astuple(found)[1:] for found in shares[:num_seen]]
        hits, num, control_hits, control_num = map(sum, zip(*seen, strict=True))
        share, control = hits / num, control_hits / control_num
        passed &= share >= MIN_SEEN_SHARE and control <= MAX_SEEN_CONTROL
        report.append(
            f"{mode}: seen classes 0 to 7 {share:.1%}, control {control:.1%} (at least "
            f"{MIN_SEEN_SHARE:.0%} and at most {MAX_SEEN_CONTROL:.0%} expected)"
        )
        report += [f"{mode}: unseen class {found.describe()}" for found in shares[num_seen:]]
    heading("Result")
    click.echo(
        "Share of images that 3 nearest neighbours among the real digits, turned and mirrored ones "
        "as classes of their own, take for the class of the support; control: the same seeds with "
        "supports of other classes. p takes images for independent; those of a support are "
        "alike.\n" + "\n".join(report) + f"\nPictures: {outdir / 'sets-*.png'} "
        "(supports above what was made of them)"
    )
    return passed


def predict_classes(
    outdir: Path, network: Path, dataset: SetDataset, split: str, grid: Path
) -> dict[int, np.ndarray]:
    """Generate images of every class of a split, and return their predicted classes by class.

    Some of the images are shown in the picture ``grid``.
    """
    size = dataset.sample_size - 1
    classes = list(dataset.held_out) if split == "seen" else list(dataset.split.test)
    num_supports = 10 if split == "unseen" else min(map(len, dataset.held_out.values())) // size
    num_images = -(-SAMPLES_PER_CLASS // num_supports)
    folder = outdir / f"{network.parent.name}-{split}"
    common = (f"--data={dataset.path}", f"--split={split}", f"--cfg-scale={GUIDANCE}")
    supports = f"{num_supports} supports of {len(classes)} classes"
    title = f"Make {num_images} images from each of {supports}"
    args = (f"--episodes={num_supports * len(classes)}", f"--num={num_images}", "--batch=500")
    generate(title, network, folder, *common, *args)
    # One support of each class, with the same images as in that folder.
    args = (f"--episodes={len(classes)}", "--num=25", "--columns=4", f"--grid={grid}")
    generate("Show some", network, Path(f"{folder}-shown"), *common, *args)
    classify = set_classifier(dataset)
    found: dict[int, list[np.ndarray]] = {index: [] for index in classes}
    for episode in range(num_supports * len(classes)):
        # Episodes take the classes in turn.
        files = [folder / f"{episode:04d}" / f"{seed:06d}.png" for seed in range(num_images)]
        images = np.stack([read_image(file).numpy() for file in files])
        found[classes[episode % len(classes)]].append(classify(images))
    return {index: np.concatenate(parts) for index, parts in found.items()}
