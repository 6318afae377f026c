"""Put together averages of the weights that a run did not keep, from the compact snapshots it did.

A run trained with ``--ema-stds`` writes compact snapshots of power-function averages. A weighted
sum of them is close to the average of any other relative std. Source: EDM2 (Karras et al. 2023,
arXiv 2312.02696), Section 3.2.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib.cli import ConfigCommand, run
from dnnlib.files import check_target
from dnnlib.progress import progress
from models import build_network
from training.checkpoint import (
    Snapshot,
    find_profiles,
    load_snapshot,
    posthoc_path,
    read_header,
    save_weights,
)
from training.config import RunConfig
from training.power_ema import MAX_STD, MIN_STD, posthoc_coefficients, std_name
from training.runs import SPEED_SETTINGS

POOR_FIT = 0.05

EXAMPLES = """
  # Averages of two other widths at the end of a run, beside its snapshots:
  python -m training.posthoc_ema runs/00000-x --std=0.07,0.15

  # A sweep at kimg 100,000 into a folder of its own, to be scored with fid.py:
  python -m training.posthoc_ema runs/00000-x --std=0.06,0.08,0.10,0.12 --kimg=100000 --outdir=sweep

  # From the snapshots of one profile alone:
  python -m training.posthoc_ema runs/00000-x --std=0.07 --snapshots="*-0.050.pkl"
"""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A compact snapshot: where it is, and which average it holds."""

    path: Path
    config: RunConfig
    cur_nimg: int
    std: float


def read_profiles(run_dir: Path, patterns: str = "*") -> list[Profile]:
    """Return the compact snapshots of a run folder in the order of training, without weights.

    ``patterns`` are file names with wildcards, separated by commas. Raises ValueError for a file
    that is damaged, of another run, or no compact snapshot.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    paths = [
        path
        for path in find_profiles(run_dir)
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in wanted)
    ]
    profiles: list[Profile] = []
    for path in paths:
        config, info = read_header(path)
        if not info.get("cur_nimg") or "ema_std" not in info or "posthoc" in info:
            raise ValueError(f"{path}: not a compact snapshot, whatever its name says; remove it.")
        profiles.append(Profile(path, config, info["cur_nimg"], info["ema_std"]))
        named = _difference(profiles[0].config, config)
        if named is not None:
            raise ValueError(
                f"{path}: of another run than {paths[0].name}, with another {named}; remove it, or "
                "choose with --snapshots."
            )
    return sorted(profiles, key=lambda profile: (profile.cur_nimg, profile.std))


def _difference(first: RunConfig, second: RunConfig) -> str | None:
    """Return the name of a setting that one run cannot have two values of, None if all agree."""
    if first.training.seed != second.training.seed:
        return "seed"
    if first.precond != second.precond:
        return "preconditioner"
    # A run that continues may change how its network is computed, but no shapes.
    free = ("dropout", *SPEED_SETTINGS["model"])
    models = [
        {k: v for k, v in dataclasses.asdict(config.model).items() if k not in free}
        for config in (first, second)
    ]
    same = type(first.model) is type(second.model) and models[0] == models[1]
    return None if same else "model"


def until(profiles: Sequence[Profile], kimg: int | None) -> list[Profile]:
    """Return those of the profiles up to ``kimg`` (None: all); raises ValueError if none is there.

    Weights after the last snapshot are in none, so that an average can end at snapshots only.
    """
    if kimg is None:
        return list(profiles)
    there = sorted({profile.cur_nimg // 1000 for profile in profiles})
    if kimg > there[-1]:
        raise ValueError(
            f"--kimg: got {kimg}, but the last compact snapshot is of kimg {there[-1]}."
        )
    if kimg not in there:
        nearest = sorted(sorted(there, key=lambda other: abs(other - kimg))[:2])
        raise ValueError(
            f"--kimg: got {kimg}, but an average ends at a compact snapshot; the nearest: "
            f"{', '.join(map(str, nearest))}."
        )
    return [profile for profile in profiles if profile.cur_nimg // 1000 <= kimg]


def weighted_sums(
    profiles: Sequence[Profile], coefficients: np.ndarray
) -> tuple[list[dict[str, torch.Tensor]], Snapshot]:
    """Return network states with weighted sums of the profiles' parameters, and the last snapshot.

    Args:
        profiles: N of them, read one after the other.
        coefficients: [M, N], one row for each of the M results.

    Sums are float32. Buffers, which are constants, are those of the last profile. Raises
    ValueError for a file that is damaged or whose weights do not fit its model.
    """
    with torch.device("meta"):
        network = build_network(profiles[0].config.model)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    sums: list[dict[str, torch.Tensor]] = [{} for _ in coefficients]
    with progress(total=len(profiles), label="Averaging", unit="snapshots") as bar:
        for column, profile in enumerate(profiles):
            snapshot = load_snapshot(profile.path)
            if {name: value.shape for name, value in snapshot.state_dict.items()} != shapes:
                raise ValueError(f"{profile.path}: its weights are not those of its model.")
            for total, row in zip(sums, coefficients, strict=True):
                for name, value in snapshot.state_dict.items():
                    if name not in parameters:
                        total[name] = value
                    elif column == 0:
                        total[name] = value * float(row[column])
                    else:
                        total[name].add_(value, alpha=float(row[column]))
            bar.update()
    return sums, snapshot


def parse_stds(text: str) -> list[float]:
    """Return the relative stds of a list such as ``0.07,0.15``; raises ValueError otherwise."""
    accepted = f"numbers from {MIN_STD} to {MAX_STD}, separated by commas"
    try:
        stds = [float(part) for part in text.split(",")]
    except ValueError:
        stds = []
    if not stds or not all(MIN_STD <= std <= MAX_STD for std in stds):
        raise ValueError(f"--std: got {text!r}; accepted: {accepted}.")
    if len(set(map(std_name, stds))) < len(stds):
        raise ValueError(f"--std: got {text!r}, of which two agree in their first three decimals.")
    return stds


@click.command(cls=ConfigCommand, base=lambda args: None, examples=EXAMPLES)
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--std", "stds", required=True, help="Relative stds to make, such as 0.07,0.15.")
@click.option("--kimg", type=click.IntRange(0), help="Where the averages end. [default: the last]")
@click.option("--outdir", type=click.Path(path_type=Path), help="[default: RUN_DIR]")
@click.option(
    "--snapshots",
    default="*",
    show_default=True,
    help="File names of the snapshots to use, with wildcards, separated by commas.",
)
def main(
    config: None, run_dir: Path, stds: str, kimg: int | None, outdir: Path | None, snapshots: str
) -> None:
    """Make averages of a run's weights with other widths than it was trained with.

    RUN_DIR holds compact snapshots, network-snapshot-KIMG-STD.pkl, as written by a run with
    --ema-stds=0.05,0.10. A width is the standard deviation of the average over training time,
    relative to that time: 0.05 is a short one, 0.25 is nearly uniform. Results are snapshots for
    generate.py and fid.py, network-snapshot-KIMG-STD-posthoc.pkl.
    """
    outdir = outdir or run_dir
    out_stds = parse_stds(stds)
    check_target("--outdir", outdir, is_folder=True)
    profiles = read_profiles(run_dir, snapshots)
    profiles = until(profiles, kimg) if profiles else []
    if len(profiles) < 2:
        raise ValueError(
            f"{run_dir}: holds {len(profiles)} compact snapshots to use, but two are needed; train "
            "with --ema-stds=0.05,0.10 and a smaller --snap."
        )
    cur_nimg = profiles[-1].cur_nimg
    in_nimg, in_stds = zip(*((profile.cur_nimg, profile.std) for profile in profiles), strict=True)
    solved = [posthoc_coefficients(in_nimg, in_stds, cur_nimg, std) for std in out_stds]
    sums, last = weighted_sums(profiles, np.stack([coefficients for coefficients, _ in solved]))
    for std, state_dict, (_, error) in zip(out_stds, sums, solved, strict=True):
        path = posthoc_path(outdir, cur_nimg, std)
        made: dict[str, Any] = dict(
            stds=sorted(set(in_stds)), num_snapshots=len(profiles), error=error
        )
        info = dict(last.progress, ema_std=std, posthoc=made)
        save_weights(path, state_dict, last.config, last.data, info)
        click.echo(f"{path}: std {std:g} from {len(profiles)} snapshots, error {error:.2%}")
        if error > POOR_FIT:
            click.echo(
                f"Warning: no sum of these snapshots is close to std {std:g}; those of more ticks "
                "or of nearer stds would be.",
                err=True,
            )


if __name__ == "__main__":
    run(main)
