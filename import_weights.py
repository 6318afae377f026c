"""Turn weights that other code published into a snapshot for generate.py and fid.py."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import families
from configs.presets import PRESETS, PUBLISHED
from diffusion.config import GuidanceConfig, PrecondConfig, SamplingConfig
from dnnlib.cli import ConfigCommand, raw_value, show_value
from dnnlib.click_options import TextType, output_rules, overwrites, param, takes
from dnnlib.config import Config
from dnnlib.errors import refusal
from dnnlib.files import check_target, sha256_of_file
from dnnlib.program import run
from models.config import ModelConfig
from training.config import RunConfig, with_absolute_data

if TYPE_CHECKING:
    from models.published.layout import Layout
    from training.checkpoint import DataSummary

# The autoencoder with whose latents the published weights of latent DiffiT were trained.
PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"
_DEFAULT = "imagenet256"
# Keys under which a training state may hold its weights, averages first.
_PARTS = ("ema.ema_params", "ema_params", "ema", "model", "params")

EXAMPLES = """
  # Latent DiffiT:
  python import_weights.py diffit_256.safetensors --preset=imagenet256 --out=network.pkl
  python generate.py --network=network.pkl --outdir=out --seeds=0-15 --class=207 --grid=out.png

  # Few-shot diffusion models (JAX code, exported as docs/sets.md describes), with another depth:
  python import_weights.py fsdm.safetensors --preset=fsdm-cifar100-film --num-blocks=12 \\
      --out=fsdm.pkl
  python generate.py --network=fsdm.pkl --outdir=out --support=my-images --num=16 --grid=out.png

  # NanoDiT, with a folder of features that dataset_tool.py made with the same encoders:
  python import_weights.py checkpoint.pt --preset=nanodit --data=datasets/features --out=nanodit.pkl
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(Config):
    """The parts of a preset that may be changed to fit the weights, and the sampling protocol."""

    model: ModelConfig
    precond: PrecondConfig
    sampling: SamplingConfig
    guidance: Config = GuidanceConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    preset: str = param(
        required=True, choices=PUBLISHED, help="Preset of the model to which the weights belong."
    )
    out: Path = param(required=True, help="Snapshot to write.")
    data: str | None = param(
        help="For NanoDiT, a folder of features made with the same encoders. It provides the "
        "image sizes, and the statistics that normalise the features."
    )


def base_config(args: Sequence[str]) -> ImportConfig:
    """Return the model and protocol of the preset named in the raw arguments."""
    name = raw_value(args, "preset")
    chosen = PRESETS[name if name in PUBLISHED else _DEFAULT].run
    names = [field.name for field in dataclasses.fields(ImportConfig)]
    config = ImportConfig(**{name: getattr(chosen, name) for name in names})
    if name in (None, *(own for own in PUBLISHED if own.startswith("imagenet"))):
        model = dataclasses.replace(config.model, vae=PUBLISHED_VAE)
        config = dataclasses.replace(config, model=model)
    return config


@click.command(cls=ConfigCommand, base=base_config, examples=EXAMPLES)
@click.argument("weights", metavar="WEIGHTS", type=TextType())
@takes(ImportOptions)
@overwrites
def main(weights: str, config: ImportConfig, options: ImportOptions) -> None:
    """Read WEIGHTS, a path or URL, and write a snapshot.

    WEIGHTS is a safetensors or torch.save file with the parameter names of latent DiffiT's official
    state dict, of the JAX code of few-shot diffusion models, or of NanoDiT's own code. Every name
    and shape must match the preset's model, which you can change with the options below. From a
    training state, the averaged weights are taken. The snapshot stores the preset's sampling and
    guidance settings, which generate.py and fid.py then use by default.
    """
    from dnnlib.downloads import fetch
    from encoders.autoencoder import AUTOENCODER
    from metrics.weights import read_checkpoint
    from models.published import layouts
    from models.published.layout import network_of_published
    from training.checkpoint import read_header, save_weights

    check_target("--out", options.out, is_ours=read_header, **output_rules("out"))
    given = click.get_current_context().meta["given"]
    if "vae" in given and config.model.vae is not None:
        AUTOENCODER.check_location(config.model.vae)
    layout = layouts()[config.model.family]
    if layout.needs_data != (options.data is not None):
        raise _data_refusal(layout, options)
    path = fetch(weights)
    tensors = read_checkpoint(path, "It should hold the published weights.", _PARTS)
    try:
        _check_layout(tensors, layout)
        tensors = {layout.rename(name): tensor for name, tensor in tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        fitted, data = _fit(config, options, layout.settings(shapes), given)
        network = network_of_published(layout, tensors, fitted.model)
    except ValueError as error:
        raise ValueError(f"{path} with --preset={options.preset}: {error}") from error
    if data is None:
        data = _published_data(fitted, path)
    else:
        data = dataclasses.replace(data, features=layout.features(data.features))
    progress = dict(imported_from=path.name, cur_nimg=0)
    save_weights(options.out, network.state_dict(), fitted, data, progress)
    decoder = "" if fitted.model.encoder_hashes == {} else f", {fitted.model.vae} as autoencoder"
    click.echo(f"{options.out}: {options.preset} with the weights of {path.name}{decoder}.")


def _data_refusal(layout: "Layout", options: ImportOptions) -> ValueError:
    if layout.needs_data:
        but = f"weights of {layout.title} contain neither sizes nor statistics"
        remedy = "give a folder that dataset_tool.py features made with the same encoders"
        return refusal("--data is missing", but=but, remedy=remedy)
    but = f"weights of {layout.title} need no data"
    return refusal("--data", options.data, but=but, remedy="leave it out")


def _check_layout(names: Collection[str], layout: "Layout") -> None:
    """Raise ValueError if the parameter names belong to the code of another model."""
    from models.published import layouts
    from models.published.layout import layout_of

    known = layouts()
    family = layout_of(names, known)
    if family is not None and known[family] is not layout:
        theirs = known[family]
        presets = [n for n in PUBLISHED if known[PRESETS[n].run.model.family] is theirs]
        names = f"the names are those of {theirs.title}"
        raise ValueError(f"{names}; choose one of its presets: {', '.join(presets)}.")
    if family is None and any(name.startswith("generative_model.") for name in names):
        raise ValueError(
            "the weights are of few-shot diffusion models in PyTorch, whose generative model is a "
            "U-Net, which no model here has."
        )


def _fit(
    config: ImportConfig, options: ImportOptions, settings: dict[str, Any], given: Collection[str]
) -> tuple[RunConfig, "DataSummary | None"]:
    """Return the run that the weights belong to, and a summary of --data, or None without it.

    Args:
        settings: Model settings that the weights imply.
        given: Names of the fields that were typed.
    """
    from training.checkpoint import summarise

    chosen = PRESETS[options.preset]
    fitted = dataclasses.replace(chosen.run, **vars(config))
    # The model has to compute what the weights were trained for, even if the preset now differs.
    # No published weights have query-key normalisation.
    settings = {"qk_norm": False, **settings}
    for name, value in settings.items():
        own = getattr(fitted.model, name)
        if name in given and own != value:
            option = f"--{name.replace('_', '-')}"
            but = f"the weights are of a model with {show_value(value)}"
            raise refusal(option, show_value(own), but=but, remedy="leave it out")
    fitted = fitted.changed("model", **settings)
    # The published samples were generated in float32.
    fitted = fitted.changed("training", precision="fp32", compile=False)
    family, data = families.of(fitted), None
    if options.data is not None:
        fitted = with_absolute_data(fitted.changed("data", data=options.data))
        data = family.open_data(fitted)
    num_classes = chosen.num_classes if fitted.data.cond else 0
    fitted = family.fit(fitted, data, num_classes)
    return fitted, None if data is None else summarise(data)


def _published_data(config: RunConfig, path: Path) -> "DataSummary":
    from training.checkpoint import DataSummary

    return DataSummary(
        name="published",
        resolution=config.model.resolution,
        img_channels=config.model.img_channels,
        num_images=0,
        content_hash=sha256_of_file(path),
        class_names=tuple(map(str, range(config.model.num_classes))),
    )


if __name__ == "__main__":
    run(main)
