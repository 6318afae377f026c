"""Train a diffusion transformer, on one process or under torchrun on many."""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from configs.presets import PRESET_OF_RESOLUTION, PRESETS, get_preset, preset_of_model
from dnnlib.addresses import is_address
from dnnlib.cli import ConfigCommand, raw_value, run, settings
from dnnlib.config import Config
from dnnlib.files import atomic_write, check_target, lock_folder
from dnnlib.text import join_names
from encoders.autoencoder import AUTOENCODER, load_autoencoder
from evaluation.scoring import check_metrics, make_evaluate, real_images
from evaluation.validation.config import ValidationConfig
from evaluation.validation.networks import check_used, chosen_tests, make_validate
from metrics.metric import MetricSpec, get_metrics
from models import ScaledLatentConfig, attention_backend
from models.feature_dit import FeatureDiTConfig
from torch_utils import distributed
from torch_utils.fingerprints import package_versions
from training import runs
from training.checkpoint import load_snapshot, read_header
from training.config import RunConfig, accumulation_rounds, fit_to_device
from training.inputs import open_training_data
from training.loop import training_loop
from training.report import describe_config, describe_run
from training.telemetry import import_wandb
from training.transfer import settle_in

EXAMPLES = """
  # Try it on a CPU with the digits that `make demo` prepares:
  python train.py --outdir=runs --data=demo-out/digits.zip --preset=digits

  # CIFAR-10 on four GPUs, with FID on the way:
  torchrun --standalone --nproc_per_node=4 train.py --outdir=runs \\
      --data=datasets/cifar10.zip --preset=cifar10 --precision=bf16 --compile \\
      --metrics=fid10k_full

  # What would run, without data:
  python train.py --preset=ffhq64 --dry-run

  # Continue after a stop:
  python train.py --resume=runs/00000-cifar10-uncond-cifar10-ranks4-batch512-bf16
"""


def base_config(args: Sequence[str]) -> RunConfig | None:
    """Return the configuration that the raw arguments start from: a preset's or a run's."""
    preset = raw_value(args, "preset") or raw_value(args, "model")
    resume = raw_value(args, "resume")
    if preset is not None:
        preset = preset_of_model(preset, raw_value(args, "mode-conditioning"))
    resolution = raw_value(args, "resolution")
    if preset is None and resume not in (None, "auto"):
        report = print if int(os.environ.get("RANK", 0)) == 0 else lambda text: None
        return runs.read_options(runs.resume_paths(resume)[0], report)
    if preset is None and resolution is not None:
        if not resolution.isdigit() or int(resolution) not in PRESET_OF_RESOLUTION:
            known = join_names(f"{r} ({p})" for r, p in PRESET_OF_RESOLUTION.items())
            raise ValueError(
                f"--resolution: no preset for {resolution}; there is one for {known}. Choose with "
                f"--preset: {', '.join(PRESETS)}."
            )
        preset = PRESET_OF_RESOLUTION[int(resolution)]
    if preset is None:
        if "--help" in args:
            preset = "cifar10"
        else:
            raise ValueError(f"Choose what to train with --preset: {', '.join(PRESETS)}.")
    return get_preset(preset).run


def option_elsewhere(name: str, config: Config | None) -> str | None:
    """Return a sentence saying which presets have an option that this one lacks."""
    owners = [
        preset_name
        for preset_name, preset in PRESETS.items()
        if any(
            name in (setting.name, *setting.field.metadata["aliases"])
            for setting in settings(preset.run)
        )
    ]
    if not owners or not isinstance(config, RunConfig):
        return None
    return f"--{name}: preset {config.preset} has no such option; {join_names(owners)} has."


def with_one_of_each(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Return ``config`` with the one of two options that was typed, where one stands for both.

    Raises UsageError if both were.
    """
    pairs = (
        ("training", "kimg", "iters"),
        ("logging", "tick", "log_interval"),
        ("logging", "snap", "save_interval"),
    )
    for section, kimg_option, step_option in pairs:
        values = getattr(config, section)
        if getattr(values, step_option) is None or kimg_option not in given:
            continue
        if step_option in given:
            names = [name.replace("_", "-") for name in (kimg_option, step_option)]
            raise click.UsageError(f"Give --{names[0]} or --{names[1]}, not both.")
        values = dataclasses.replace(values, **{step_option: None})
        config = dataclasses.replace(config, **{section: values})
    return config


def with_named_data(
    config: RunConfig, given: Collection[str], data_dir: Path | None, dataset: str | None
) -> RunConfig:
    """Return ``config`` with the data that ``--data-dir`` and ``--dataset`` name, if they do."""
    if data_dir is None and dataset is None:
        return config
    if data_dir is None or dataset is None or "data" in given:
        raise click.UsageError("Give --data, or --data-dir and --dataset together.")
    path = data_dir / dataset
    if not path.exists():
        path = data_dir / f"{dataset.removesuffix('.zip')}.zip"
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=str(path)))


def with_fewshot_fid(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Return ``config`` with the metric that ``--compute-fid`` asks for, or without it."""
    if config.sets is None or "compute_fid" not in given:
        return config
    metrics = dict.fromkeys((*config.logging.metrics, "fewshot_fid"))
    if not config.sets.compute_fid:
        del metrics["fewshot_fid"]
    return dataclasses.replace(
        config, logging=dataclasses.replace(config.logging, metrics=tuple(metrics))
    )


def check_scores(
    config: RunConfig, given: Collection[str]
) -> tuple[list[MetricSpec], tuple[str, ...]]:
    """Return the metrics of a run, or the tests of a model of features.

    Raises ValueError for a metric that the model has not, and for an option without effect.
    """
    names = config.logging.metrics
    choice = f"--metrics={','.join(names) or 'none'}"
    specs, tests = [], ()
    if config.features is None:
        specs = check_metrics(get_metrics(names), config)
    else:
        tests = chosen_tests(names, option="--metrics")
        check_used(given, tests, choice)
        if config.logging.metrics_ref is not None:
            raise ValueError(
                "--metrics-ref has no effect on models of features, which are compared with "
                "held-out images; leave it out."
            )
    config.detectors.check_used(given, {spec.output.detector for spec in specs}, choice)
    return specs, tests


@click.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere, examples=EXAMPLES)
@click.option("--outdir", type=click.Path(path_type=Path), help="Where run folders are made.")
@click.option("--preset", "--model", help=f"What to train: {', '.join(PRESETS)}.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="With --dataset, for --data.")
@click.option("--dataset", help="Name of a zip or folder in --data-dir: --data=DATA_DIR/NAME.zip.")
@click.option("--desc", help="Text to add to the name of the run folder.")
@click.option("--resume", help="Run folder or state file to continue, or auto.")
@click.option("--transfer", type=click.Path(path_type=Path), help="Snapshot to start from.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would run, and stop.")
def main(
    config: RunConfig,
    outdir: Path | None,
    preset: str | None,
    data_dir: Path | None,
    dataset: str | None,
    desc: str | None,
    resume: str | None,
    transfer: Path | None,
    dry_run: bool,
) -> int:
    """Train the diffusion transformer of a preset on a dataset made by dataset_tool.py.

    Options below show the values of the chosen preset: try --preset=ffhq64 --help.
    """
    # Cheap checks first: nothing is opened or started before they pass.
    given = click.get_current_context().meta["given"]
    config = with_one_of_each(config, given)
    config = with_named_data(config, given, data_dir, dataset)
    config = with_fewshot_fid(config, given)
    explicit_resume = resume not in (None, "auto")
    if explicit_resume and transfer is not None:
        raise click.UsageError("Give --resume or --transfer, not both.")
    specs, tests = check_scores(config, given)
    if config.logging.wandb and not dry_run:
        import_wandb()
    if transfer is not None and config.features is not None and transfer.is_file():
        config = settle_in(config, read_header(transfer)[0], given)
    if transfer is not None and "ema_rampup" not in given:
        # The weights are good from the start: the average need not forget its first steps.
        training = dataclasses.replace(config.training, ema_rampup=None)
        config = dataclasses.replace(config, training=training)
    if getattr(config.model, "vae", None) is not None:
        AUTOENCODER.check_location(config.model.vae)
    if transfer is not None and not transfer.is_file():
        raise click.UsageError(f"--transfer: {transfer}: no such file.")
    if desc is not None and not re.fullmatch(r"[\w.,=+-]+", desc):
        raise click.UsageError(f"--desc: got {desc!r}; accepted: letters, digits and . , = + - _")
    if outdir is not None:
        check_target("--outdir", outdir, is_folder=True)
    if dry_run:
        note = ""
        data = config.data.data
        if data and (is_address(data) or Path(data).exists()):
            config = runs.fit_to_data(config, open_training_data(config))
        else:
            num_classes = get_preset(config.preset).num_classes if config.data.cond else 0
            config = runs.with_data_facts(config, config.model.img_channels, num_classes)
            if config.data.data:
                note = f"\n{config.data.data} is not there: assuming the preset's usual data."
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = fit_to_device(config, device.type)
        description = describe_run(config, world_size, device)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{describe_config(config)}\n{description}{note}")
        return 0
    if not config.data.data:
        raise click.UsageError("Give the training data with --data (see dataset_tool.py).")
    run_dir, exact_state = None, None
    if outdir is None and not explicit_resume:
        raise click.UsageError("Give the folder for runs with --outdir.")
    if explicit_resume:
        run_dir, exact_state = runs.resume_paths(resume)
        if desc is not None:
            raise click.UsageError("--desc names a new run folder; --resume continues one.")
        if outdir is not None and outdir.resolve() != run_dir.resolve().parent:
            raise click.UsageError(
                f"--outdir: got {outdir}, but --resume continues in {run_dir}; leave --outdir out."
            )

    # Start processes, open the data, fit the model to it.
    device = distributed.init()
    stop_signal = click.get_current_context().with_resource(distributed.StopSignal())
    accumulation_rounds(config.training, distributed.world_size())
    attention_backend(config.model, device)
    data = open_training_data(config)
    config = fit_to_device(runs.fit_to_data(config, data), device.type)
    autoencoder = None
    if isinstance(config.model, FeatureDiTConfig):
        model = config.model
        autoencoder = load_autoencoder(model.vae, device, expected_hash=model.vae_hash)
    elif isinstance(config.model, ScaledLatentConfig):
        model = config.model
        autoencoder = load_autoencoder(model.vae, device, expected_hash=model.vae_hash)
        config = runs.fit_to_autoencoder(config, autoencoder)
    evaluate = None
    if specs:
        real = real_images(config, data, specs)
        evaluate = make_evaluate(specs, config.detectors, real, config.model, device)
    elif tests:
        validation = dataclasses.replace(config.validation or ValidationConfig(), tests=tests)
        evaluate = make_validate(validation, data.of_split("validation"), device)

    # Find or make the run folder.
    snapshot = load_snapshot(transfer) if transfer is not None else None
    origin = runs.origin_of(snapshot, desc)
    if resume == "auto":
        run_dir = distributed.on_main(lambda: runs.find_same_run(outdir, config, origin, print))
    is_new = run_dir is None
    if is_new:
        run_dir = runs.make_run_dir(outdir, runs.describe(config, data, desc))
    locks: list[Any] = []
    distributed.on_main(
        lambda: locks.append(lock_folder(run_dir, f"{run_dir}: another process is training here"))
    )
    state = None
    if not is_new:
        distributed.on_main(lambda: runs.clear_leftovers(run_dir))
        state = runs.load_resume_state(
            run_dir, exact_state, config, data.content_hash, distributed.print0
        )
    if distributed.is_main():
        facts = dict(command=sys.argv, world_size=distributed.world_size(), device=str(device))
        facts["origin"] = runs.stored_origin(run_dir) if explicit_resume else origin
        runs.write_options(run_dir, config, {**facts, "packages": package_versions()})
        print(f"Training on {data.name}: {data.num_images} images. Writing to {run_dir}")
        print(describe_run(config, distributed.world_size(), device), flush=True)

    finished = training_loop(
        config,
        run_dir,
        data,
        device,
        autoencoder=autoencoder,
        resume_state=state,
        transfer=snapshot if state is None else None,
        evaluate=evaluate,
        stop_signal=stop_signal,
    )
    for held in filter(None, locks):
        held.close()
    if not finished and distributed.is_main():
        with atomic_write(run_dir / runs.REQUEUE_FILE, "w") as file:
            file.write(f"{time.time():.0f}\n")
    distributed.shutdown()
    return 0 if finished else runs.REQUEUE_EXIT_CODE


if __name__ == "__main__":
    run(main)
