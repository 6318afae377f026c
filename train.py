"""Train a diffusion transformer, in one process or in many under torchrun."""

import dnnlib.launcher  # First, so that a process that torchrun starts also ends with it.

# isort: split
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import click

import families
from commands.config_file import read_config_file, read_teacher, with_config_file
from commands.prepare import prepare_data, with_named_data
from configs.presets import PRESET_OF_RESOLUTION, PRESETS, get_preset, preset_of_model
from configs.reference import find_reference
from dnnlib.cli import ConfigCommand, raw_value, settings, usage_errors
from dnnlib.click_options import param, takes
from dnnlib.config import Config
from dnnlib.errors import refusal
from dnnlib.program import run
from dnnlib.text import is_number, join_names
from training.config import RunConfig, with_absolute_data, with_one_of_each

EXAMPLES = """
  # Try it on a CPU with the digits that `make demo` prepares:
  python train.py --outdir=runs --data=demo-out/digits.zip --preset=digits

  # CIFAR-10 on four GPUs, with FID during training:
  torchrun --standalone --nproc_per_node=4 train.py --outdir=runs \\
      --data=datasets/cifar10.zip --preset=cifar10 --precision=bf16 --compile \\
      --metrics=fid10k_full

  # Show what would run; no data needed:
  python train.py --preset=ffhq64 --dry-run

  # Check whether a run with these options would resume exactly on this machine:
  torchrun --standalone --nproc_per_node=2 train.py --data=demo-out/digits.zip \\
      --preset=digits --verify-resume

  # Distil a model into students that sample in 16, 8, 4, 2 and 1 steps, with a guidance scale of 2
  # built in:
  python train.py --outdir=runs --distill=runs/00000-x/network-snapshot-000154.pkl \\
      --distill-steps=16,8,4,2,1 --distill-cfg-scale=2

  # Continue after a stop:
  python train.py --resume=runs/00000-cifar10-uncond-cifar10-ranks4-batch512-bf16
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Where a run goes and what it starts from."""

    outdir: Path | None = param(help="Folder in which run folders are created.  [default: runs]")
    config_file: Path | None = param(
        "--config",
        help="File of options in JSON or YAML, or the training_options.json of a run; the command "
        "line takes precedence.",
    )
    preset: str | None = param("--preset", "--model", help=f"What to train: {', '.join(PRESETS)}.")
    data_dir: Path | None = param(help="Folder of datasets; --dataset names one of them.")
    dataset: str | None = param(
        help="Name of a zip or folder in --data-dir: --data=DATA_DIR/NAME.zip."
    )
    prepare: bool = param(
        help="If needed, first convert the official archive of --dataset in --data-dir."
    )
    desc: str | None = param(help="Text to add to the name of the run folder.")
    resume: str | None = param(help="Run folder or state file to continue, or auto.")
    transfer: str | None = param(help="Snapshot whose weights the run starts from.")
    distill: str | None = param(
        help="Snapshot of a teacher: train students that sample in half as many steps, stage by "
        "stage. The run takes the teacher's options, except for the ones you give."
    )
    dry_run: bool = param("-n", "--dry-run", help="Print what would run, and exit.")
    verify_resume: bool = param(
        help="Train a few steps twice, once with a stop and a resume in between, report whether "
        "the results are equal bit for bit, and exit."
    )


def base_config(args: Sequence[str]) -> RunConfig | None:
    """Return the configuration that the raw arguments start from: a preset's or a run's.

    Raises ValueError if they name none, or contradict each other.
    """
    preset = raw_value(args, "preset") or raw_value(args, "model")
    resume = raw_value(args, "resume")
    distill, path = raw_value(args, "distill"), raw_value(args, "config")
    whole = None if path is None else read_config_file(path)[0]
    if whole is None and distill is not None:
        return read_teacher(distill, preset)
    if whole is not None:
        for name, value in (("preset", preset), ("resume", resume), ("distill", distill)):
            if value is not None and value != whole.preset:
                but = f"{path} holds the whole configuration of a run"
                raise refusal(f"--{name}", value, but=but, remedy="give one of them")
        return whole
    if preset is not None:
        preset = preset_of_model(preset, raw_value(args, "mode-conditioning"))
    resolution = raw_value(args, "resolution")
    if preset is None and resume not in (None, "auto"):
        from training import runs

        report = print if dnnlib.launcher.number("RANK") == 0 else lambda text: None
        return runs.read_start(runs.resume_paths(resume)[0], report)[0]
    if preset is None and resolution is not None:
        if not is_number(resolution) or int(resolution) not in PRESET_OF_RESOLUTION:
            known = join_names(f"{r} ({p})" for r, p in PRESET_OF_RESOLUTION.items())
            problem = f"--resolution: no preset for {resolution}; there is one for {known}."
            raise ValueError(f"{problem} Choose with --preset: {', '.join(PRESETS)}.")
        preset = PRESET_OF_RESOLUTION[int(resolution)]
    if preset is None and "--help" not in args:
        raise ValueError(f"Choose what to train with --preset: {', '.join(PRESETS)}.")
    return get_preset(preset or "cifar10").run


def option_elsewhere(name: str, config: Config | None) -> str | None:
    """Return which presets have an unknown option, or what it is called here; None if unknown."""
    owners = [
        owner
        for owner, preset in PRESETS.items()
        for option in settings(preset.run)
        if name in (option.name, *option.aliases)
    ]
    if not owners or not isinstance(config, RunConfig):
        from commands.synonyms import used_here

        return used_here(name, training=True)
    if len(owners) > 3:
        owners = [*owners[:3], f"{len(owners) - 3} more"]
    have = f"{join_names(owners)} {'have' if len(owners) > 1 else 'has'}"
    return f"--{name}: preset {config.preset} has no such option; {have}."


def expanded(args: Sequence[str]) -> list[str]:
    """Return the raw arguments preceded by those in the file of --config."""
    return with_config_file(args, raw_value(args, "config"))


@click.command(
    cls=ConfigCommand,
    base=base_config,
    elsewhere=option_elsewhere,
    expand=expanded,
    examples=EXAMPLES,
)
@takes(TrainOptions)
def main(config: RunConfig, options: TrainOptions) -> int:
    """Train the diffusion transformer of a preset on a dataset made by dataset_tool.py.

    The defaults below are those of the chosen preset: try --preset=ffhq64 --help.
    """
    # torch is needed from here on. Cheap checks still come first: nothing is opened or started
    # before they pass.
    from training.launch import Usual, launch, print_plan, verify
    from training.start import Start, check_here, check_ranks

    given = click.get_current_context().meta["given"]
    names = [field.name for field in dataclasses.fields(Start)]
    start = Start(**{name: getattr(options, name) for name in names})
    if start.outdir is None and not start.continues:
        start = dataclasses.replace(start, outdir=Path("runs"))
    with usage_errors():
        config = with_one_of_each(config, given)
        if options.data_dir is not None or options.dataset is not None:
            config = with_named_data(config, given, options.data_dir, options.dataset)
            named = options.data_dir, options.dataset, Path(config.data.data)
            if not options.dry_run:
                prepare_data(*named, convert=options.prepare)
        elif options.prepare:
            raise refusal("--prepare", but="converts what --data-dir and --dataset name")
        config = with_absolute_data(config)
        start.check(given)
    config = families.of(config).check(config, given)
    boards = set(config.logging.boards)
    if "wandb_project" in given and not boards & {"wandb", "trackio"}:
        text = "Warning: --wandb-project has no effect without --board=wandb or trackio."
        click.echo(text, err=True)
    if not options.dry_run:
        from training.boards import import_board

        for board in config.logging.boards:
            # TensorBoard is the default, but only if its package is installed.
            if board != "tensorboard" or "board" in given:
                import_board(board)
    config = start.settle_in(config, given)
    check_ranks(config, start)
    if options.dry_run:
        num_classes = get_preset(config.preset).num_classes if config.data.cond else 0
        print_plan(config, num_classes)
        return 0
    with usage_errors():
        start.check_run(config)
    check_here(config)
    if options.verify_resume:
        return verify(config, start)
    if config.preset not in PRESETS:  # The preset of a continued run may be gone.
        return launch(config, start)
    usual = Usual(PRESETS[config.preset].run, find_reference(config.preset))
    return launch(config, start, usual)


if __name__ == "__main__":
    run(main)
