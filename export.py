"""Export a snapshot for other programs: safetensors with a model card, or torch.export."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

import families  # noqa: F401 (registers them)
from dnnlib.cli import is_given
from dnnlib.click_options import output_rules, overwrites, param, takes
from dnnlib.errors import refusal
from dnnlib.files import check_target
from dnnlib.program import run

if TYPE_CHECKING:
    from training.checkpoint import Snapshot

FORMATS = ("safetensors", "torch-export", "snapshot")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    network: str = param(required=True, help="Snapshot, run folder, export, URL, or hf://ORG/NAME.")
    dest: Path = param(
        required=True, help="Folder for safetensors; a .pt2 or .pkl file for the other formats."
    )
    format: str = param(default="safetensors", choices=FORMATS, help="What to write.")
    size: str | None = param(
        help="Image size of the exported program, such as 1216x832.  [default: the model's first]"
    )
    push: str | None = param(
        metavar="ORG/NAME", help="Repository of the Hugging Face hub to upload the folder to."
    )
    private: bool = param(help="Make the repository private if --push creates it.")


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@takes(ExportOptions)
@overwrites
def main(options: ExportOptions) -> None:
    """Write a snapshot in a format that other programs read.

    safetensors: a folder with the weights, their configuration as JSON, and a model card with
    samples and the scores that the run folder holds. Every --network option of this project accepts
    it, and --push uploads it.

    torch-export: the denoiser as a torch.export program, x0 = program(x, sigma, cond), for batches
    of any size. It runs without this project.

    snapshot: a .pkl file, as train.py writes it.

    \b
    Examples:
      python export.py --network=runs/00000-x --dest=export
      python export.py --network=runs/00000-x --dest=export --push=my-org/my-model
      python export.py --network=hf://my-org/my-model --dest=denoiser.pt2 --format=torch-export
      python export.py --network=export --dest=network.pkl --format=snapshot
    """
    is_folder = options.format == "safetensors"
    for name in ("push", "private"):
        if is_given(name) and not is_folder:
            raise refusal(f"--{name}", but="applies to --format=safetensors", remedy="leave it out")
    if options.private and options.push is None:
        raise refusal("--private", but="has no effect without --push", remedy="leave it out")
    if options.size is not None and options.format != "torch-export":
        raise refusal("--size", but="applies to --format=torch-export", remedy="leave it out")
    suffix = {"torch-export": ".pt2", "snapshot": ".pkl"}.get(options.format)
    if suffix is not None and options.dest.suffix != suffix:
        accepted = f"a file that ends in {suffix}"
        raise refusal("--dest", options.dest, accepted=accepted)
    from training.checkpoint import save_weights
    from training.portable import open_snapshot, split_hub_name

    if options.push is not None:
        split_hub_name(options.push)

    _check_dest(options)
    snapshot = open_snapshot(options.network)
    if options.format == "snapshot":
        about = (snapshot.config, snapshot.data, snapshot.progress, snapshot.packages)
        save_weights(options.dest, snapshot.state_dict, *about)
    elif options.format == "torch-export":
        _export_program(snapshot, options)
    else:
        from evaluation.model_card import write_export

        write_export(
            snapshot,
            options.dest,
            location=f"hf://{options.push}" if options.push else str(options.dest),
        )
    click.echo(f"{options.dest}: {options.format} of {snapshot.path}")
    if options.push is not None:
        from training.portable import push

        click.echo(push(options.dest, options.push, private=options.private))


def _check_dest(options: ExportOptions) -> None:
    """Raise ValueError if the result cannot, or should not, be written to --dest."""
    from evaluation.model_card import check_export_folder
    from sampling.traced import is_program
    from training.checkpoint import read_header

    rules = output_rules("dest")
    if options.format == "safetensors":
        check_target("--dest", options.dest, is_folder=True)
        check_export_folder(options.dest, options.network, rules["overwrite"])
    else:
        is_ours = read_header if options.format == "snapshot" else is_program
        check_target("--dest", options.dest, is_ours=is_ours, **rules)


def _export_program(snapshot: "Snapshot", options: ExportOptions) -> None:
    """Write a snapshot's denoiser as a program for one image size. Raises ValueError for others."""
    from dnnlib.config import to_dict
    from sampling.traced import HASH_NAME, save_program, trace_denoiser

    sizes = {"x".join(map(str, size)): size for size in snapshot.config.model.image_sizes}
    if options.size is not None and options.size not in sizes:
        raise refusal("--size", options.size, accepted=", ".join(sizes))
    size = sizes[options.size or next(iter(sizes))]
    program = trace_denoiser(snapshot, size)
    about = {"config.json": json.dumps(to_dict(snapshot.config)), HASH_NAME: snapshot.sha256}
    save_program(program, options.dest, about)


if __name__ == "__main__":
    run(main)
