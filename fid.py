"""Score images against real ones: reference statistics, metrics, and comparisons of scores."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.cli import ConfigCommand, is_given, raw_value, run
from dnnlib.files import atomic_write
from dnnlib.progress import progress
from metrics.features import Detector, get_detector
from metrics.metric import METRICS, get_metrics, score
from metrics.reference import Reference, load_reference, reference_for
from metrics.rows import compare_rows, read_rows
from torch_utils import distributed
from training.checkpoint import package_versions
from training.dataset import ImageDataset
from training.generation import (
    AUTOCAST_DTYPES,
    GenerateConfig,
    cached_snapshot,
    generate_for_rank,
    make_generator,
    passport,
)
from training.sampler import iterate_images

EXAMPLES = """
  # Score a snapshot, generating on the fly, against the data that it was trained on:
  torchrun --standalone --nproc_per_node=8 fid.py calc --network=network.pkl \\
      --ref=datasets/cifar10.zip --metrics=fid50k_full --json=score.json

  # Score a folder of images against published statistics:
  python fid.py calc --images=out --ref=cifar10-32x32.npz --metrics=fid50k_full
"""


def base_config(args: Sequence[str]) -> GenerateConfig | None:
    """Return the sampling protocol of the snapshot named in the raw arguments, if one is."""
    network = raw_value(args, "network")
    if network is None and "--help" not in args:
        return None
    return GenerateConfig.of_snapshot(network)


def option_elsewhere(name: str, config: GenerateConfig | None) -> str | None:
    """Return a sentence for a sampling option without a snapshot to sample from."""
    if config is None:
        return f"--{name} describes sampling and needs --network; images are scored as they are."
    return None


@click.group(context_settings=dict(help_option_names=["-h", "--help"]))
def main() -> None:
    """Score images: `ref` keeps the statistics of real images, `calc` scores images or a snapshot
    against them, `compare` prints scores side by side.
    """


@main.command()
@click.option("--data", required=True, help="Folder or zip of real images.")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="The .npz to write.")
@click.option("--detector", default="inception", show_default=True, help="inception or pixels.")
@click.option("--weights", help="Path or URL of the detector's weights.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(1), help="Per rank.")
def ref(data: str, dest: Path, detector: str, weights: str | None, batch: int) -> None:
    """Write the statistics of real images: mean and covariance of a detector's features.

    Example: python fid.py ref --data=datasets/cifar10.zip --dest=cifar10.npz
    """
    device = distributed.init()
    dataset = ImageDataset(data)
    network = load_detector(detector, weights, dataset, device)
    reference = data_reference(dataset, network, batch, device)
    if distributed.is_main():
        reference.save(dest)
        print(f"Statistics of {reference.count} images ({detector}) written to {dest}")
    distributed.shutdown()


@main.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere, examples=EXAMPLES)
@click.option("--network", help="Snapshot to generate images from.")
@click.option("--images", help="Folder or zip of generated images, instead of --network.")
@click.option("--ref", required=True, help="Real images (folder or zip), or statistics (.npz).")
@click.option("--metrics", required=True, help=f"Comma-separated: {', '.join(METRICS)}.")
@click.option("--guide", help="Second snapshot, to guide away from with weight --cfg-scale.")
@click.option("--num-images", type=click.IntRange(2), help="Instead of the metric's number.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first image.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(1), help="Per rank.")
@click.option("--precision", type=click.Choice(list(AUTOCAST_DTYPES)), help="As in training.")
@click.option("--weights", help="Path or URL of the detector's weights.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the rows.")
def calc(
    config: GenerateConfig | None,
    network: str | None,
    images: str | None,
    ref: str,
    metrics: str,
    guide: str | None,
    num_images: int | None,
    seed: int,
    batch: int,
    precision: str | None,
    weights: str | None,
    json_path: Path | None,
) -> None:
    """Score the images of a snapshot, folder or zip against real ones.

    Nothing is written but the rows asked for; a snapshot's images never touch the disk.
    """
    specs = get_metrics(name.strip() for name in metrics.split(","))
    if (network is None) == (images is None):
        raise click.UsageError("Give either --network or --images.")
    for name in ("seed", "precision", "guide"):
        if images is not None and is_given(name):
            raise click.UsageError(option_elsewhere(name, None))
    names = dict.fromkeys(spec.detector for spec in specs)
    if weights is not None and "inception" not in names:
        raise click.UsageError(f"--weights has no effect with --metrics={metrics}; leave it out.")
    device = distributed.init()
    scored = None if images is None else ImageDataset(images)
    real = None if ref.endswith(".npz") else ImageDataset(ref)
    shape_of = real or scored
    origin: dict[str, Any] = dict(images=images, packages=package_versions())
    if network is not None:
        snapshot = cached_snapshot(network)
        shape_of = shape_of or snapshot.config.model
        generator = make_generator(
            snapshot,
            device,
            sampling=config.sampling,
            guidance=config.guidance,
            precision=precision,
            guide=None if guide is None else cached_snapshot(guide),
        )
        origin = dict(
            network=network, **passport(generator, snapshot.data.class_counts, first_seed=seed)
        )
    elif num_images is None:
        num_images = len(scored)
    detectors = {
        name: load_detector(name, weights if name == "inception" else None, shape_of, device)
        for name in names
    }
    references = {
        name: load_reference(ref) if real is None else data_reference(real, detector, batch, device)
        for name, detector in detectors.items()
    }

    def generate(indices: range) -> Iterable[torch.Tensor]:
        rank, world_size = distributed.rank(), distributed.world_size()
        if scored is not None:
            yield from iterate_images(
                scored,
                rank=rank,
                world_size=world_size,
                batch_size=batch,
                indices=indices,
                label="Scoring",
            )
            return
        with progress(total=len(indices), label="Generating", disable=rank != 0) as bar:
            yield from generate_for_rank(
                generator,
                indices,
                batch=batch,
                first_seed=seed,
                class_counts=snapshot.data.class_counts,
                on_batch=bar.update,
            )

    rows = score(specs, generate, references, detectors, device, num_images=num_images)
    rows = [{**row, **origin} for row in rows]
    if distributed.is_main():
        for row in rows:
            print(f"{row['metric']} {row['value']:.6g} ({row['num_images']} images)")
            for warning in row["warnings"]:
                print(f"  warning: {warning}")
        if json_path is not None:
            with atomic_write(json_path, "w", encoding="utf-8") as file:
                json.dump({"rows": rows}, file, indent=2)
    distributed.shutdown()


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def compare(files: tuple[Path, ...]) -> None:
    """Print score rows (.jsonl of a run, .json of calc) side by side, and where protocols differ.

    Example: python fid.py compare runs/00000-a/metric-fid50k_full.jsonl score.json
    """
    print(compare_rows([row for path in files for row in read_rows(path)]))


def load_detector(name: str, weights: str | None, shape_of: Any, device: torch.device) -> Detector:
    """Return a detector for the images of a dataset or model configuration."""
    shape = (shape_of.img_channels, shape_of.resolution, shape_of.resolution)
    return get_detector(name, device, image_shape=shape, weights=weights)


def data_reference(
    dataset: ImageDataset, detector: Detector, batch: int, device: torch.device
) -> Reference:
    """Return the statistics of all images of a dataset, from the cache if possible. Collective."""
    rank, world_size = distributed.rank(), distributed.world_size()
    return reference_for(
        lambda: iterate_images(
            dataset, rank=rank, world_size=world_size, batch_size=batch, label="Reference"
        ),
        dataset.content_hash,
        detector,
        device,
        num_images=len(dataset),
        source=dataset.name,
    )


if __name__ == "__main__":
    run(main)
