"""Turn published weights of latent DiffiT into a snapshot for generate.py and fid.py."""

import dataclasses
from pathlib import Path

import click

import families
from configs.latent_diffit import PRESETS
from dnnlib.cli import run
from dnnlib.click_options import TextType, output_rules, overwrites, param, takes
from dnnlib.files import check_target, sha256_of_file

# The autoencoder of whose latents the published weights are.
PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    preset: str = param(required=True, choices=PRESETS, help="The model that the weights are of.")
    out: Path = param(required=True, help="Snapshot to write.")
    vae: str = param(default=PUBLISHED_VAE, help="Autoencoder to decode with.")


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@click.argument("weights", metavar="WEIGHTS.safetensors", type=TextType())
@takes(ImportOptions)
@overwrites
def main(weights: str, options: ImportOptions) -> None:
    """Read WEIGHTS, a path or URL of the official state dict in safetensors, and write a snapshot.

    Every name and shape must be that of the preset's model. The snapshot carries the preset's
    sampling and guidance, which generate.py and fid.py then use by default.

    \b
    Examples:
      python import_weights.py diffit_256.safetensors --preset=imagenet256 --out=network.pkl
      python generate.py --network=network.pkl --outdir=out --seeds=0-15 --class=207 --grid=out.png
    """
    preset, out, vae = options.preset, options.out, options.vae
    from dnnlib.downloads import fetch
    from encoders.autoencoder import AUTOENCODER
    from metrics.weights import read_safetensors
    from models.published import network_of_published
    from training.checkpoint import DataSummary, read_header, save_weights

    check_target("--out", out, is_ours=read_header, **output_rules("out"))
    AUTOENCODER.check_location(vae)
    path = fetch(weights)
    chosen = PRESETS[preset]
    config = families.of(chosen.run).fit(chosen.run, None, chosen.num_classes)
    # The published samples were made in float32.
    config = config.changed("training", precision="fp32", compile=False).changed("model", vae=vae)
    tensors = read_safetensors(path, "It ought to be the official state dict.")
    try:
        network = network_of_published(tensors, config.model)
    except ValueError as error:
        raise ValueError(f"{path} with --preset={preset}: {error}") from error
    data = DataSummary(
        name="published",
        resolution=config.model.resolution,
        img_channels=config.model.img_channels,
        num_images=0,
        content_hash=sha256_of_file(path),
        class_names=tuple(map(str, range(config.model.num_classes))),
    )
    progress = dict(imported_from=path.name)
    save_weights(out, network.state_dict(), config, data, progress)
    click.echo(f"{out}: {preset} with the weights of {path.name}, {vae} as autoencoder.")


if __name__ == "__main__":
    run(main)
