"""Makes reference curves from runs that differ only in their seeds."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import refusal
from dnnlib.text import join_names
from training.config import RunConfig
from training.reference_curves.bands import tolerance_band
from training.reference_curves.curves import Series, curves_of
from training.reference_curves.reference import Curve, LeftOut, Reference
from training.reference_curves.settings import DataFacts, compare_settings, deciding_settings
from training.reference_curves.titles import order_of
from training.run_report.files import Run

MIN_RUNS = 3  # Fewer runs say next to nothing about how much runs vary.
COVERAGE = 0.99


def make_reference(
    runs: Sequence[Run],
    starts: Sequence[tuple[RunConfig, Mapping[str, Any] | None]],
    *,
    coverage: float = COVERAGE,
    note: str = "",
) -> Reference:
    """Return the reference curves of runs that differ only in their seeds.

    ``starts`` has the configuration and the origin of each run. Curves that some run lacks are left
    out. Raises ValueError if runs share a seed, differ otherwise, were recorded at different
    points, distil, or are too few.
    """
    if len(runs) < MIN_RUNS:
        raise ValueError(f"Give at least {MIN_RUNS} runs, better five; got {len(runs)}.")
    configs = [config for config, _ in starts]
    _check_seeds(runs, configs)
    settings, data = deciding_settings(*starts[0]), data_facts(runs[0].options)
    for run, start in zip(runs[1:], starts[1:], strict=True):
        own = deciding_settings(*start)
        found = compare_settings(own, settings, data_facts(run.options), data)
        if found.differences or found.notes or not found.same_average:
            why = (*found.differences, *found.notes, "its weights are averaged differently")[0]
            but = f"{run.run_dir} is not a run like {runs[0].run_dir}: {why}"
            raise refusal("RUN", but=but, remedy="give runs that differ in --seed alone")
    columns = common_curves([curves_of(run.run_dir, run.history) for run in runs])
    if not columns:
        but = "they have no curve in common of more than one tick"
        raise refusal("RUN", but=but, remedy="train for longer, all with the same --tick")
    curves = with_bands(columns, coverage)
    ends = [one[0].kimg[-1] for one in columns.values() if one[0].kind == "window"]
    return Reference(
        preset=configs[0].preset,
        settings=settings,
        data=data,
        kimg=float(max(ends, default=min(run.kimg for run in runs))),
        total_kimg=configs[0].total_nimg / 1000,
        num_runs=len(runs),
        coverage=coverage,
        left_out=leave_one_out(columns, coverage),
        curves=curves,
        published=[],
        command=_command_of(runs[0].options),
        packages=_texts(runs[0].options.get("packages")),
        note=note,
    )


def _check_seeds(runs: Sequence[Run], configs: Sequence[RunConfig]) -> None:
    seeds = [config.training.seed for config in configs]
    again = [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
    if again:
        own = [str(r.run_dir) for r, seed in zip(runs, seeds, strict=True) if seed == again[0]]
        but = f"{join_names(own)} have the same seed, {again[0]}, so one of them adds nothing"
        raise refusal("RUN", but=but, remedy="give runs of different --seed")
    for run, config in zip(runs, configs, strict=True):
        if config.distillation.is_on:
            raise refusal(run.run_dir, but="students of a distillation have no reference curves")


def data_facts(options: Mapping[str, Any]) -> DataFacts:
    """Return what ``training_options.json`` says about the data of a run."""
    data = options.get("data")
    data = data if isinstance(data, dict) else {}
    names = data.get("class_names")
    return DataFacts(
        name=_of_type(str, data.get("name")),
        num_images=_of_type(int, data.get("num_images")),
        content_hash=_of_type(str, data.get("content_hash")),
        class_names=[str(name) for name in names] if isinstance(names, list) else None,
    )


def _of_type(kind: type, value: Any) -> Any:
    return value if type(value) is kind else None


def _command_of(options: Mapping[str, Any]) -> str:
    command = options.get("command")
    if not isinstance(command, list) or not command:
        return ""
    words = [Path(str(command[0])).name, *map(str, command[1:])]
    return f"python {shlex.join(words)}"


def _texts(values: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in values.items()} if isinstance(values, dict) else {}


def common_curves(runs: Sequence[Mapping[str, Series]]) -> dict[str, list[Series]]:
    """Return the curves that all runs have, cut to the shortest run's length.

    Raises ValueError if runs were recorded at different points, or scored differently.
    """
    found = {}
    for name, first in sorted(runs[0].items(), key=lambda item: order_of(item[0])):
        own = [run[name] for run in runs if name in run]
        length = min(len(one.kimg) for one in own)
        if len(own) < len(runs) or length < (2 if first.kind == "window" else 1):
            continue
        for one in own[1:]:
            same = np.allclose(one.kimg[:length], first.kimg[:length], rtol=1e-9)
            if not same or one.start != first.start or one.protocol != first.protocol:
                but = f"{name} was measured at different points, or differently, in one of the runs"
                raise refusal("RUN", but=but, remedy="train all with the same --tick and --snap")
        found[name] = [
            Series(one.kind, one.start, one.kimg[:length], one.values[:length], one.protocol)
            for one in own
        ]
    return found


def with_bands(columns: Mapping[str, Sequence[Series]], coverage: float) -> dict[str, Curve]:
    """Return curves with bands that contain all of a further run with probability ``coverage``."""
    num_points = sum(len(own[0].kimg) for own in columns.values())
    found = {}
    for name, own in columns.items():
        values = np.stack([one.values for one in own])
        band = tolerance_band(values, coverage, num_points)
        found[name] = Curve(
            kind=own[0].kind,
            start=own[0].start,
            kimg=own[0].kimg.tolist(),
            mean=band.mean.tolist(),
            spread=band.spread.tolist(),
            low=band.low.tolist(),
            high=band.high.tolist(),
            values=values.tolist(),
            protocol=own[0].protocol,
        )
    return found


def leave_one_out(columns: Mapping[str, Sequence[Series]], coverage: float) -> LeftOut | None:
    """Return how many runs lie, with all their curves, in the bands of the other runs.

    Returns None for fewer than three runs.
    """
    num_runs = len(next(iter(columns.values())))
    if num_runs < MIN_RUNS:
        return None
    num_inside = 0
    for index in range(num_runs):
        others = {k: [*own[:index], *own[index + 1 :]] for k, own in columns.items()}
        bands = with_bands(others, coverage)
        num_inside += all(
            np.all((own[index].values >= bands[k].low) & (own[index].values <= bands[k].high))
            for k, own in columns.items()
        )
    return LeftOut(num_inside, num_runs)
