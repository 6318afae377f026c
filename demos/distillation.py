"""Compares distilled students of few sampling steps with their teacher, on digits.

    python -m demos.distillation --preset=digits

trains a teacher (unless --network names one) and its students, generates images with each, and
prints the share that a classifier assigns to the requested class or support.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import families
from data.fewshot.sets import SetDataset
from demos.digits import class_agreement, set_classifier
from demos.images import NUM_CHECKED, encode_digits
from demos.steps import convert, heading, train_model
from dnnlib.click_options import param, takes
from dnnlib.files import check_target
from dnnlib.program import run
from evaluation.scoring import Comparison, RealImages
from families.sets import episodes_of_snapshot, open_data_of
from metrics.metric import get_metrics
from sampling.supports import SupportGenerator
from training.asked import GeneratorOptions
from training.checkpoint import Snapshot, find_snapshots, load_snapshot

# The teacher's guidance scale, as in the other demonstrations, and its sampler for 16 steps.
GUIDANCE = {"digits": 1.0, "digits-latent": 2.5, "fsdm-digits": 2.5}
SAMPLERS = {"digits": "dpmpp_2m", "digits-latent": "ddim", "fsdm-digits": "dpmpp_2m"}
# Training options besides the preset, for teachers and for students. digits-latent sets the noise
# levels because its network predicts noise: see docs/distillation.md.
TEACHERS = {"fsdm-digits": ("--kimg=400", "--lr-schedule=cosine", "--lr-rampup=20")}
TRAINING = {
    "digits": ("--lr-rampup=2",),
    "digits-latent": ("--lr-rampup=2", "--kimg=300", "--sigma-grid=karras", "--sigma-max=10"),
    "fsdm-digits": ("--lr-rampup=5", "--kimg=160", "--distill-steps=8,4,2,1"),
}
EPISODES_OF_CLASS = 4  # For seen classes, whose supports are five held-out images.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    preset: str = param(default="digits", choices=tuple(GUIDANCE), help="What to distil.")
    outdir: Path = param(default="demo-out", help="Folder for data and runs.")
    network: Path | None = param(help="Snapshot of the teacher.  [default: train one]")
    students: Path | None = param(help="Run folder of the students.  [default: train them]")


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@takes(DistillationOptions)
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED)
def main(options: DistillationOptions, train_args: tuple[str, ...]) -> None:
    """Distil a model of digits into students, and compare each with its teacher.

    TRAIN_ARGS are passed to the training of the students after the demo's own options, as in

    \b
      python -m demos.distillation --preset=digits
      python -m demos.distillation --preset=fsdm-digits -- --kimg=400
    """
    outdir, preset, scale = options.outdir, options.preset, GUIDANCE[options.preset]
    check_target("--outdir", outdir, is_folder=True)
    images = convert(outdir, "digits")
    data = encode_digits(outdir, images) if preset == "digits-latent" else images
    teacher, run_dir, took = options.network, options.students, ""
    if teacher is None:
        args = (f"--preset={preset}", *TEACHERS.get(preset, ()))
        _, teacher = train_model(outdir, f"--data={data}", *args)
    if run_dir is None:
        began = time.monotonic()
        args = (f"--distill-cfg-scale={scale}", *TRAINING[preset], *train_args)
        run_dir, _ = train_model(outdir, f"--distill={teacher}", *args)
        took = f" Training took {time.monotonic() - began:.0f} s."
    heading("Result")
    click.echo(f"Share of images of the class or support asked for, and fd_pixels.{took}")
    snapshot = load_snapshot(teacher)
    how = dict(sampler=SAMPLERS[preset], steps=16)
    show("teacher, 16 steps", measure(snapshot, images, scale, **how))
    for student in students_of(run_dir):
        steps = student.config.sampling.steps
        plain = measure(snapshot, images, scale, sampler="euler", steps=steps)
        show(f"teacher by Euler, {steps}", plain)
        show(f"student, {steps}", measure(student, images, 1.0))


def students_of(run_dir: Path) -> list[Snapshot]:
    """Return the last snapshot of each student of a run, most steps first."""
    found: dict[int, Snapshot] = {}
    for path in reversed(find_snapshots(run_dir)):
        snapshot = load_snapshot(path)
        found[snapshot.config.sampling.steps] = snapshot
    return [found[steps] for steps in sorted(found, reverse=True)]


def measure(
    snapshot: Snapshot, images: Path, scale: float, **sampling: Any
) -> tuple[float, float | None]:
    """Return the share of images that a classifier assigns as requested, and fd_pixels.

    fd_pixels also shows whether the images are as diverse as real ones, which the share does not.
    It is None for models without classes.
    """
    config = snapshot.config
    how = GeneratorOptions(
        sampling=dataclasses.replace(config.sampling, **sampling),
        guidance=dataclasses.replace(config.guidance, cfg_scale=scale),
    )
    family, device = families.of(config), torch.device("cpu")
    generator = family.load(snapshot, device, how)
    if not config.model.num_classes:
        return support_agreement(snapshot, generator, open_data_of(snapshot, str(images))), None
    labels = np.arange(NUM_CHECKED) % config.model.num_classes
    made = generator.generate(range(NUM_CHECKED), labels.tolist()).cpu().numpy()
    source = family.images(snapshot, lambda: generator, 0, 256)
    metric = Comparison(metrics=get_metrics(["fd_pixels"]), real=RealImages(str(images)), batch=256)
    return class_agreement(made, labels), metric.rows(source, device)[0]["value"]


def support_agreement(snapshot: Snapshot, generator: Any, dataset: SetDataset) -> float:
    """Return the share of images that show their support's class, for seen classes.

    The supports are held-out images.
    """
    num_classes = len(dataset.held_out)
    episodes = episodes_of_snapshot(
        snapshot, "seen", EPISODES_OF_CLASS * num_classes, data=str(dataset.path)
    )
    generator, classify = SupportGenerator.of(generator, episodes), set_classifier(dataset)
    num = -(-NUM_CHECKED // len(episodes))
    hits = [
        classify(generator.generate(range(num), [row] * num).cpu().numpy()) == index
        for row, index in enumerate(episodes.classes)
    ]
    return float(np.mean(np.concatenate(hits)))


def show(name: str, measured: tuple[float, float | None]) -> None:
    """Print one row of the result."""
    share, distance = measured
    click.echo(f"{name:<22} {share:6.1%}  {'-' if distance is None else f'{distance:.3f}'}")


if __name__ == "__main__":
    run(main)
