"""fid.py validate: tests a feature-conditioned model on held-out images."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import families
from commands.options import (
    CPU_MATMUL_HELP,
    PRECISION_HELP,
    PRECISIONS,
    TF32_HELP,
    check_targets,
    given_settings,
    score_command,
    split_names,
)
from data.features.config import SPLITS
from diffusion.config import DualGuidanceConfig
from dnnlib.cli import raw_value
from dnnlib.click_options import param, takes
from dnnlib.files import write_json
from evaluation.validation.config import TESTS, ValidationConfig
from sampling.config import GenerateConfig
from training.asked import GeneratorOptions
from training.config import CPU_MATMUL

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# The only test that uses each encoder.
_ENCODES = dict(visual="reconstruction", text="text_edit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateConfig(GenerateConfig):
    """The sampling protocol of a snapshot, and the settings of the tests."""

    validation: ValidationConfig = ValidationConfig()

    @classmethod
    def of_snapshot(cls, path: str | None) -> "ValidateConfig":
        """Return the protocol stored in a snapshot, or the defaults if ``path`` is None.

        Raises ValueError if the snapshot's model is not feature-conditioned.
        """
        if path is None:
            return cls(guidance=DualGuidanceConfig())
        from sampling.images import cached_snapshot

        snapshot = cached_snapshot(path)
        families.expect(snapshot, "features", "was not trained on text and visual features")
        found = super().of_snapshot(path)
        return dataclasses.replace(found, validation=snapshot.config.validation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    network: str = param(required=True, help="Snapshot of a feature-conditioned model.")
    data: str | None = param(help="Its feature folder.  [default: where it was in training]")
    split: str = param(
        default="validation",
        choices=SPLITS,
        help="Part of the images to test on; images in train were seen in training.",
    )
    tests: str = param(
        default=",".join(TESTS), help="Tests to run, separated by commas, in this order."
    )
    vae: str | None = param(help="Autoencoder.  [default: where it was in training]")
    visual: str | None = param(help="Visual encoder.  [default: where it was in training]")
    text: str | None = param(help="Text encoder.  [default: where it was in training]")
    precision: str | None = param(choices=PRECISIONS, help=PRECISION_HELP)
    tf32: bool = param(help=TF32_HELP)
    cpu_matmul: str | None = param(choices=CPU_MATMUL, help=CPU_MATMUL_HELP)
    compile: bool = param(
        "--compile/--no-compile", default=False, help="Compile the network with torch.compile."
    )
    outdir: Path = param(required=True, help="Folder for score rows and pictures.")


@score_command(base=lambda args: ValidateConfig.of_snapshot(raw_value(args, "network")))
@takes(ValidateOptions)
def command(config: ValidateConfig, options: ValidateOptions) -> None:
    """Test a feature-conditioned model on held-out images: does it use text and reference?

    Writes validation.json and a picture for each test: images reconstructed from their own features
    (scored by LPIPS and the cosine similarity of patch features), with another image's reference,
    with words of their text replaced, from their text alone, and guided by either condition. Tests
    whose weights are missing are skipped, and the report gives the reason.

    \b
    Example:
      python fid.py validate --network=network.pkl --data=photos-features --outdir=report
    """
    from evaluation.in_loop.features import describe_row
    from evaluation.validation.networks import check_used, chosen_tests
    from torch_utils import distributed
    from torch_utils.misc import allow_tf32
    from torch_utils.pictures import save_image

    chosen = chosen_tests(split_names(options.tests), option="--tests", prefix="")
    if not chosen:
        raise click.UsageError("--tests: there is nothing to do; name some.")
    check_used(given_settings(), chosen, f"--tests={','.join(chosen)}")
    for name, test in _ENCODES.items():
        if getattr(options, name) is not None and test not in chosen:
            raise click.UsageError(f"--{name}: only the test {test} uses it.")
    check_targets(outdir=options.outdir)
    device = distributed.init()
    allow_tf32(options.tf32)
    tests = dataclasses.replace(config.validation, tests=chosen)
    config = dataclasses.replace(config, validation=tests)
    rows, pictures = _validate_snapshot(config, options, device)
    if distributed.is_main():
        for row in rows:
            print("\n".join([describe_row(row), *(f"  warning: {w}" for w in row["warnings"])]))
        for name, picture in pictures.items():
            save_image(picture, options.outdir / f"{name}.png")
        write_json(options.outdir / "validation.json", {"rows": rows})
    distributed.shutdown()


def _validate_snapshot(
    config: ValidateConfig, options: ValidateOptions, device: "torch.device"
) -> "tuple[list[dict[str, Any]], dict[str, Image]]":
    """Return the score rows of all tests of a snapshot, and pictures on rank 0. Collective.

    Raises ValueError if the data's features were made by encoders other than the model's.
    """
    from data.features.dataset import FeatureDataset
    from evaluation.in_loop.features import weights_facts
    from evaluation.validation.networks import load_networks
    from evaluation.validation.validate import validate
    from sampling.images import cached_snapshot
    from sampling.requests import check_encoders

    snapshot = cached_snapshot(options.network)
    location = options.data or snapshot.data.features["path"]
    settings = dict(
        text_lengths=snapshot.config.features.text_lengths,
        validation_share=snapshot.config.data.validation_share,
    )
    dataset = FeatureDataset(location, options.split, **settings)
    check_encoders(snapshot.config.model, dataset, "--data")
    protocol = dict(sampling=config.sampling, guidance=config.guidance)
    names = ("precision", "cpu_matmul", "compile", "vae")
    protocol |= {name: getattr(options, name) for name in names}
    family, settings = families.of(snapshot.config), GeneratorOptions(**protocol)
    generator = family.load(snapshot, device, settings)
    encoders = dict(visual=options.visual, text=options.text)
    networks = load_networks(config.validation, dataset, device, **encoders)
    rows, pictures = validate(generator, dataset, config=config.validation, **vars(networks))
    facts = dict(
        network=str(snapshot.path),
        kimg=snapshot.trained_nimg / 1000,
        **weights_facts(generator, snapshot.config.training, snapshot.progress),
    )
    return [dict(row, **facts) for row in rows], pictures
