"""benchmark.py sample: what sampling costs without and with guidance."""

import dataclasses
import statistics
from collections.abc import Callable

import click
import torch

import families
from benchmarks.kinds import describe_run, measured_preset
from benchmarks.measure import interleave, median_ratio, seconds_of, table
from benchmarks.options import SampleOptions
from data.images.codec import PixelCodec
from diffusion.config import GuidanceConfig
from models import build_network
from torch_utils import distributed


def measure(options: SampleOptions) -> None:
    """Print the table of ``benchmark.py sample``."""
    device, batch = distributed.init(), options.batch
    preset = measured_preset(options.preset)
    family = families.of(preset.run)
    config = family.example_run(preset.run, preset.num_classes)
    if options.steps is not None:
        config = config.changed("sampling", steps=options.steps)
    config = config.changed("training", precision=options.precision)
    click.echo(describe_run(config, device))
    torch.manual_seed(config.training.seed)
    network = build_network(config.model).eval().requires_grad_(False).to(device)

    def turn_of(num: int, cfg_scale: float) -> Callable[[], float]:
        run = dataclasses.replace(config, guidance=GuidanceConfig(cfg_scale=cfg_scale))
        generator = family.unprompted(family.generator(run, network, PixelCodec(), device))
        return lambda: seconds_of(lambda: generator.generate(range(num)), device)

    plain, guided, doubled = f"batch {batch}", f"batch {batch}, guided", f"batch {2 * batch}"
    turns = {
        plain: turn_of(batch, 1.0),
        guided: turn_of(batch, 1.5),
        doubled: turn_of(2 * batch, 1.0),
    }
    times = interleave(turns, options.rounds, warm_up=True)
    rows = [["", "s a batch", "images/s"]]
    for name, num in ((plain, batch), (guided, batch), (doubled, 2 * batch)):
        seconds = statistics.median(times[name])
        rows.append([name, f"{seconds:.3f}", f"{num / seconds:.2f}"])
    sampling = config.sampling
    click.echo(f"{sampling.sampler}, {sampling.steps} steps, {options.precision}\n{table(rows)}")
    ratio = median_ratio(times[guided], times[doubled])
    click.echo(f"Guidance costs {ratio:.3f} times one doubled batch.")
