"""Reconstructs weight averages that a run did not keep, from its compact snapshots.

A run trained with ``--ema-stds`` writes compact snapshots of power-function averages. A weighted
sum of them is close to the average of any other relative std. Source: EDM2 (Karras et al. 2023,
arXiv 2312.02696), Section 3.2.
"""

import dataclasses
import fnmatch
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dnnlib.config import identity
from dnnlib.errors import refusal
from dnnlib.progress import progress
from models import build_network
from training.checkpoint import (
    Snapshot,
    count_name,
    find_profiles,
    load_snapshot,
    read_header,
    save_weights,
)
from training.config import MAX_STD, MIN_STD, RunConfig, std_name
from training.power_ema import posthoc_coefficients

POOR_FIT = 0.05


@dataclasses.dataclass(frozen=True)
class Profile:
    """A compact snapshot: where it is, and which average it holds."""

    path: Path
    config: RunConfig
    cur_nimg: int
    std: float


def read_profiles(run_dir: Path, patterns: str = "*") -> list[Profile]:
    """Return the compact snapshots of a run folder in the order of training, weights not read.

    ``patterns`` are file names with wildcards, separated by commas. Raises ValueError for a file
    that is damaged, of another run, or no compact snapshot.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    profiles: list[Profile] = []
    for path in find_profiles(run_dir):
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in wanted):
            continue
        config, info = read_header(path)
        if not info.get("cur_nimg") or "ema_std" not in info or "posthoc" in info:
            raise ValueError(f"{path}: not a compact snapshot, despite its name; remove it.")
        profiles.append(Profile(path, config, info["cur_nimg"], info["ema_std"]))
        named = _difference(profiles[0].config, config)
        if named is not None:
            but = f"of another run than {profiles[0].path.name}, with another {named}"
            raise refusal(path, but=but, remedy="remove it, or choose with --snapshots")
    return sorted(profiles, key=lambda profile: (profile.cur_nimg, profile.std))


def _difference(first: RunConfig, second: RunConfig) -> str | None:
    """Return a setting that differs although it is fixed within a run, None if there is none."""
    if first.training.seed != second.training.seed:
        return "seed"
    if first.precond != second.precond:
        return "preconditioner"
    # A run that continues may change dropout and how its network is computed, but no shapes.
    own, other = identity(first), identity(second)
    names = [n for n in own | other if n.startswith("model.") and n != "model.dropout"]
    return None if all(own.get(name) == other.get(name) for name in names) else "model"


def until(profiles: Sequence[Profile], kimg: int | None) -> list[Profile]:
    """Return the profiles up to ``kimg`` (None: all); raises ValueError if none is of that kimg.

    No profile holds weights from after the last snapshot, so an average can only end at snapshots.
    """
    if kimg is None:
        return list(profiles)
    there = sorted({profile.cur_nimg // 1000 for profile in profiles})
    if kimg > there[-1]:
        raise refusal("--kimg", kimg, but=f"the last compact snapshot is of kimg {there[-1]}")
    if kimg not in there:
        nearest = ", ".join(map(str, sorted(sorted(there, key=lambda n: abs(n - kimg))[:2])))
        but = "an average ends at a compact snapshot"
        raise refusal("--kimg", kimg, but=but, remedy=f"the nearest: {nearest}")
    return [profile for profile in profiles if profile.cur_nimg // 1000 <= kimg]


def weighted_sums(
    profiles: Sequence[Profile], coefficients: np.ndarray
) -> tuple[list[dict[str, Tensor]], Snapshot]:
    """Return network states with weighted sums of the profiles' parameters, and the last snapshot.

    ``coefficients`` [M, N] has one row for each of the M resulting states, which are float32. The N
    profiles are read one by one. Buffers are constants and are taken from the last profile. Raises
    ValueError for a file that is damaged or whose weights do not fit its model.
    """
    with torch.device("meta"):
        network = build_network(profiles[0].config.model)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    sums: list[dict[str, Tensor]] = [{} for _ in coefficients]
    with progress(total=len(profiles), label="Averaging", unit="snapshots") as bar:
        for column, profile in enumerate(profiles):
            snapshot = load_snapshot(profile.path)
            if {name: value.shape for name, value in snapshot.state_dict.items()} != shapes:
                raise ValueError(f"{profile.path}: its weights are not those of its model.")
            for total, row in zip(sums, coefficients, strict=True):
                weight = float(row[column])
                for name, value in snapshot.state_dict.items():
                    if name not in parameters:
                        total[name] = value
                    elif column == 0:
                        total[name] = value * weight
                    else:
                        total[name].add_(value, alpha=weight)
            bar.update()
    return sums, snapshot


def parse_stds(text: str, option: str = "--std") -> list[float]:
    """Return the relative stds of a list such as ``0.07,0.15``; raises ValueError otherwise."""
    try:
        stds = [float(part) for part in text.split(",")]
    except ValueError:
        stds = []
    if not stds or not all(MIN_STD <= std <= MAX_STD for std in stds):
        accepted = f"numbers from {MIN_STD} to {MAX_STD}, separated by commas"
        raise refusal(option, repr(text), accepted=accepted)
    if len(set(map(std_name, stds))) < len(stds):
        raise ValueError(
            f"{option}: got {text!r}, two of which agree in their first three decimals."
        )
    return stds


def make_averages(
    profiles: Sequence[Profile], stds: Sequence[float], outdir: Path
) -> Iterator[tuple[Path, float, float]]:
    """Write a snapshot for each of ``stds``; yield its path, std and relative error."""
    cur_nimg = profiles[-1].cur_nimg
    in_nimg, in_stds = zip(*((profile.cur_nimg, profile.std) for profile in profiles), strict=True)
    solved = [posthoc_coefficients(in_nimg, in_stds, cur_nimg, std) for std in stds]
    sums, last = weighted_sums(profiles, np.stack([coefficients for coefficients, _ in solved]))
    for std, state_dict, (_, error) in zip(stds, sums, solved, strict=True):
        path = outdir / f"network-snapshot-{count_name(cur_nimg, 7)}-{std_name(std)}-posthoc.pkl"
        made = dict(stds=sorted(set(in_stds)), num_snapshots=len(profiles), error=error)
        info = dict(last.progress, ema_std=std, posthoc=made)
        save_weights(path, state_dict, last.config, last.data, info, last.packages)
        yield path, std, error


if __name__ == "__main__":
    # The command is in commands/ with the others, and keeps this module's name as well.
    runpy.run_module("commands.posthoc_ema", run_name="__main__")
