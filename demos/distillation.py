"""How well students of few sampling steps do what their teacher does, on digits.

    python -m demos.distillation --preset=digits

trains the teacher, unless --network names it, and its students; it makes images with each, and
writes which share of them a classifier takes for what was asked for.
"""

import dataclasses
import time
from pathlib import Path

import click
import numpy as np

from demos.images import check_classes, encode_digits
from demos.sets import predict_classes
from demos.steps import convert_digits, heading, train_model
from dnnlib.cli import run
from dnnlib.click_options import param, takes
from dnnlib.files import check_target
from families.sets import open_data_of
from training.checkpoint import find_snapshots, load_snapshot

# Scale of the teacher's guidance; how it is sampled in 16 steps.
GUIDANCE = 2.5
SIXTEEN = {
    "digits": ("--sampler=dpmpp_2m", "--steps=16"),
    "digits-latent": ("--sampler=ddim", "--steps=16"),
    "fsdm-digits": ("--sampler=dpmpp_2m", "--steps=16"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    preset: str = param(default="digits", choices=tuple(SIXTEEN), help="What to distil.")
    outdir: Path = param(default="demo-out", help="Folder for data, runs and images.")
    network: Path | None = param(help="Snapshot of the teacher.  [default: train one]")
    students: Path | None = param(help="Run folder of its students.  [default: train them]")


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@takes(DistillationOptions)
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED)
def main(options: DistillationOptions, train_args: tuple[str, ...]) -> None:
    """Train students of a model of digits, and measure each beside its teacher.

    TRAIN_ARGS go to the training of the students after those of the demonstration, as in

    \b
      python -m demos.distillation --preset=digits
      python -m demos.distillation --preset=fsdm-digits -- --kimg=400
    """
    outdir, preset = options.outdir, options.preset
    check_target("--outdir", outdir, is_folder=True)
    images = convert_digits(outdir)
    data = encode_digits(outdir, images) if preset == "digits-latent" else images
    teacher = options.network
    if teacher is None:
        _, teacher = train_model(outdir, f"--data={data}", f"--preset={preset}")
    run_dir, seconds = options.students, None
    if run_dir is None:
        began = time.monotonic()
        guided = f"--distill-cfg-scale={GUIDANCE}"
        run_dir, _ = train_model(outdir, f"--distill={teacher}", guided, *train_args)
        seconds = time.monotonic() - began
    guided = (*SIXTEEN[preset], f"--cfg-scale={GUIDANCE}")
    rows = {"teacher, 16 steps": agreement(outdir, preset, images, teacher, guided)}
    for network, steps in students_of(run_dir):
        rows[f"student, {steps} steps"] = agreement(outdir, preset, images, network)
    heading("Result")
    took = "" if seconds is None else f" The students took {seconds:.0f} s."
    click.echo(f"Share of images that are of the class asked for.{took}")
    for name, share in rows.items():
        click.echo(f"{name:<20} {share:.1%}")


def students_of(run_dir: Path) -> list[tuple[Path, int]]:
    """Return the last snapshot of each student of a run, with its sampling steps, most first."""
    found: dict[int, Path] = {}
    for path in reversed(find_snapshots(run_dir)):
        found[load_snapshot(path).config.sampling.steps] = path
    return [(path, steps) for steps, path in sorted(found.items(), reverse=True)]


def agreement(
    outdir: Path, preset: str, images: Path, network: Path, sampling: tuple[str, ...] = ()
) -> float:
    """Return the share of a network's images that are of the class, or support, asked for."""
    name = f"{network.parent.name}-{network.stem}"
    folder = outdir / "distilled" / name
    if preset != "fsdm-digits":
        return check_classes(f"by {name}", network, folder, *sampling)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = open_data_of(load_snapshot(network), str(images))
    grid = folder / "seen.png"
    found = predict_classes(folder, network, dataset, "seen", grid, sampling)
    return float(np.mean(np.concatenate([own == index for index, own in found.items()])))


if __name__ == "__main__":
    run(main)
