"""benchmark.py train: the cost of a training step, against plain code and diffusers."""

import functools
import statistics

import click
import torch

import families
from benchmarks.kinds import dataset_of, describe_run
from benchmarks.measure import (
    device_name,
    interleave,
    median_ratio,
    median_wall,
    table,
    time_cells,
    walls,
)
from benchmarks.options import TrainOptions, listed, measured_run
from benchmarks.steps import PARTS, PlainTrainingSteps, TrainingSteps
from models import ModelConfig
from torch_utils import cpu_matmul, distributed
from torch_utils.misc import allow_tf32, count_parameters, peak_flops
from training.config import RunConfig
from training.family import TrainingData

_OWN = "this code"


def measure(config: ModelConfig, options: TrainOptions) -> None:
    """Print the table of ``benchmark.py train``."""
    others = listed("--against", options.against, ("plain", "diffusers"))
    device, batch = distributed.init(), options.batch_gpu
    cpu_matmul.agree(options.cpu_matmul, None, device)
    same = dict(compile=options.compile, tf32=options.tf32)
    run = measured_run(options.preset, config)
    run = run.changed("training", batch=batch, batch_gpu=batch, **same)
    if options.workers is not None:
        run = run.changed("logging", workers=options.workers)
    if "diffusers" in others:
        from benchmarks.diffusers_sides import check_diffusers

        check_diffusers(run)
    with dataset_of(run, options.data) as dataset:
        run = families.of(run).fit(run, dataset)
        click.echo(describe_run(run, device))
        sides = _build_sides(run, dataset, device, (others, options.precision))
        rows = _benchmark_steps(sides, device, options)
    compiled, tf32 = ", compiled" * options.compile, ", TF32" * options.tf32
    click.echo(f"batch {batch}{compiled}{tf32}\n{table(rows)}")


def _build_sides(
    config: RunConfig, dataset: TrainingData, device: torch.device, chosen: tuple[tuple, str]
) -> dict[str, TrainingSteps]:
    """Return the training steps to compare, by name.

    ``config`` is a run fitted to the data, whose batch is that of one pass. ``chosen`` is the other
    sides and the precision. The other sides are always eager, and the plain one always in fp32.
    """
    others, precision = chosen
    precisions = ("fp32", "bf16") if precision == "both" else (precision,)
    torch.backends.cudnn.benchmark = config.training.cudnn_benchmark
    allow_tf32(config.training.tf32)
    sides: dict[str, TrainingSteps] = {}
    eager = config.changed("training", compile=False)
    if "plain" in others:
        plain = eager.changed("training", precision="fp32")
        sides["baseline fp32"] = PlainTrainingSteps(plain, dataset, device)
    if "diffusers" in others:
        from benchmarks.diffusers_sides import DiffusersTrainingSteps

        for name in precisions:
            other = eager.changed("training", precision=name)
            sides[f"diffusers {name}"] = DiffusersTrainingSteps(other, dataset, device)
    for name in precisions:
        own = config.changed("training", precision=name)
        sides[f"{_OWN} {name}"] = TrainingSteps(own, dataset, device)
    return sides


def _benchmark_steps(
    sides: dict[str, TrainingSteps], device: torch.device, options: TrainOptions
) -> list[list[str]]:
    """Return a table with the cost of a step on each side."""
    on_gpu = device.type == "cuda"
    num_steps = options.steps or (20 if on_gpu else 1)
    peaks = [side.peak_memory(5 if on_gpu else 1) for side in sides.values()]
    times = interleave(
        {name: functools.partial(side.time, num_steps) for name, side in sides.items()},
        options.rounds,
    )
    spent = {name: [turn.spent for turn in turns] for name, turns in times.items()}
    images = {name: side.config.step_nimg for name, side in sides.items()}
    seconds = {name: median_wall(turns) for name, turns in spent.items()}
    rates = {n: 3 * s.forward_flops() * images[n] / seconds[n] for n, s in sides.items()}

    rows = [["", *sides]]
    for part in PARTS:
        medians = [
            statistics.median(turn.parts[part] for turn in turns) for turns in times.values()
        ]
        rows.append([f"{part}, ms", *(f"{1000 * median:.1f}" for median in medians)])
    titles = ("step, ms", "  at least", "CPU of a step, ms", "  at least")
    columns = [time_cells(turns, 1000) for turns in spent.values()]
    rows += [[title, *cells] for title, *cells in zip(titles, *columns, strict=True)]
    rows += [
        ["images/s", *(f"{images[name] / s:.1f}" for name, s in seconds.items())],
        ["peak memory, MiB", *peaks],
        ["parameters, M", *(f"{count_parameters(s.network) / 1e6:.2f}" for s in sides.values())],
        ["TFLOP/s of the model", *(f"{rate / 1e12:.3f}" for rate in rates.values())],
        ["model-FLOPs utilisation", *(_share(sides[name], rates[name]) for name in sides)],
    ]
    for reference in (name for name in sides if not name.startswith(_OWN)):
        base = walls(spent[reference])
        ratios = [f"{median_ratio(base, walls(turns)):.2f}" for turns in spent.values()]
        rows.append([f"speed, {reference} = 1", *ratios])
    return rows


def _share(side: TrainingSteps, rate: float) -> str:
    """Return the FLOP/s ``rate`` as a share of the device's peak, or "unknown"."""
    peak = peak_flops(device_name(side.device), side.config.training.arithmetic)
    return "unknown" if peak is None else f"{100 * rate / peak:.1f}%"
