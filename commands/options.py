"""Options that several commands of fid.py share, and the code that acts on them."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import families  # noqa: F401 (registers them)
from commands.synonyms import used_here
from diffusion.config import PRECISIONS
from dnnlib.cli import ConfigCommand, is_given, raw_value, settings
from dnnlib.click_options import output_rules, param
from dnnlib.files import check_target
from evaluation.config import ScoreConfig
from metrics.config import DetectorConfig
from metrics.metric import METRICS, MetricSpec, get_metrics
from metrics.rows import read_rows
from sampling.config import GenerateConfig
from training.asked import HOW
from training.config import CPU_MATMUL

if TYPE_CHECKING:
    import torch

    from evaluation.images import ImageSource, Making

AnyConfig = ScoreConfig | DetectorConfig

BATCH_HELP = "Number of images that each rank processes at a time."
PRECISION_HELP = "Arithmetic of the network.  [default: as in training]"
_OF_SNAPSHOTS = ("seed", "precision", "guide", "vae", "tf32", "cpu_matmul", "compile")
TF32_HELP = "Allow TF32 matrix products on NVIDIA GPUs."
CPU_MATMUL_HELP = "Library for float32 matrix products on CPUs.  [default: as in training]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotOptions:
    """How a snapshot makes the images that a command looks at, beside its sampling protocol."""

    network: str | None = param(help="Snapshot to generate images with.")
    guide: str | None = param(help="Second snapshot, to guide away from with --cfg-scale.")
    vae: str | None = param(
        help="Autoencoder of a latent model.  [default: where it was in training]"
    )
    tf32: bool = param(help=TF32_HELP)
    seed: int = param(default=0, min=0, max=2**32 - 1, help="Seed of the first generated image.")
    batch: int = param(default=64, min=1, max=1_000_000, help=BATCH_HELP)
    precision: str | None = param(choices=PRECISIONS, help=PRECISION_HELP)
    cpu_matmul: str | None = param(choices=CPU_MATMUL, help=CPU_MATMUL_HELP)
    compile: bool = param(
        "--compile/--no-compile", default=False, help="Compile the network with torch.compile."
    )

    def start(self) -> "tuple[Making, torch.device]":
        """Start the processes, and return how images are made and this rank's device."""
        from evaluation.images import Making
        from torch_utils import distributed
        from torch_utils.misc import allow_tf32

        device = distributed.init()
        allow_tf32(self.tf32)
        same = {name: getattr(self, name) for name in ("batch", *HOW)}
        return Making(first_seed=self.seed, **same), device


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions(SnapshotOptions):
    """The images that a command looks at: those of files, or those that a snapshot makes."""

    images: str | None = param(
        help="Folder, zip or .npz of generated images, in place of --network."
    )

    def open(
        self, config: AnyConfig, *, shuffled: bool = False
    ) -> "tuple[ImageSource, torch.device]":
        """Start the processes, and return the images and this rank's device.

        Raises UsageError unless one source of images is given, with options that it has.
        """
        if (self.network is None) == (self.images is None):
            raise click.UsageError("Give either --network or --images.")
        for name in _OF_SNAPSHOTS:
            if self.images is not None and is_given(name):
                raise click.UsageError(option_elsewhere(name, config))
        from evaluation.images import open_image_source

        making, device = self.start()
        location, protocol = self.images or self.network, config if self.network else None
        source = open_image_source(location, protocol, device, making, shuffled=shuffled)
        return source, device


def base_config(args: Sequence[str]) -> AnyConfig:
    """Return the detectors, and the sampling protocol of the snapshot if one is named."""
    network = raw_value(args, "network")
    if network is None and "--help" not in args:
        return DetectorConfig()
    return ScoreConfig.of_snapshot(network)


def option_elsewhere(name: str, config: AnyConfig | None) -> str | None:
    """Return a sentence for a sampling option without a snapshot, or one of another program."""
    if isinstance(config, DetectorConfig) and name in _of_sampling():
        return f"--{name} describes sampling and needs --network; images are scored as they are."
    return used_here(name)


def _of_sampling() -> set[str]:
    return {*_OF_SNAPSHOTS, *(own.name for own in settings(GenerateConfig()))}


def score_command(**given: Any) -> Callable[[Callable], click.Command]:
    """Return the decorator of a command with the options of detectors and sampling.

    ``given`` is what :class:`ConfigCommand` takes, and ``cls`` for a class that derives from it.
    """
    own = dict(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere)
    return click.command(**own | given)


def parse_metrics(text: str, *, of_supports: bool = False) -> list[MetricSpec]:
    """Return the metrics of a comma-separated list.

    Raises UsageError for one of images made from supports among others, and the reverse.
    """
    specs = get_metrics(name.strip() for name in text.split(","))
    problem = "not of images made from supports" if of_supports else "for fid.py fewshot"
    for spec in specs:
        if spec.of_supports != of_supports:
            raise click.UsageError(f"--metrics: {spec.name} is {problem}.")
    return specs


def split_names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def metric_names(*, of_supports: bool) -> str:
    """Return the names of the metrics of images made from supports, or of the others."""
    return ", ".join(name for name, spec in METRICS.items() if spec.of_supports == of_supports)


def used_detectors(config: AnyConfig, names: Collection[str], choice: str) -> DetectorConfig:
    """Return the options of the detectors; raises ValueError for one that none of them has."""
    detectors = config if isinstance(config, DetectorConfig) else config.detectors
    detectors.check_used(given_settings(), names, choice)
    return detectors


def given_settings() -> set[str]:
    """Return the fields of the running command's configuration that were typed."""
    return click.get_current_context().meta["given"]


def check_targets(**targets: Path | None) -> None:
    """Raise ValueError if the paths given by options of these names cannot, or may not, be written.

    ``outdir`` is a folder, the others are files.
    """
    from metrics.reference import read_references
    from torch_utils.pictures import check_picture_target

    is_ours = dict(json=read_rows, jsonl=read_rows, dest=read_references)
    for name, path in targets.items():
        if path is not None and name == "out":
            check_picture_target("--out", path, **output_rules(name))
        elif path is not None:
            kind = dict(is_folder=True) if name == "outdir" else dict(is_ours=is_ours[name])
            check_target(f"--{name}", path, **kind, **output_rules(name))
