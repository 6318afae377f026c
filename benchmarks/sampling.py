"""What sampling costs without and with guidance."""

import dataclasses
import statistics
from collections.abc import Callable

import torch

import families
from benchmarks.measure import interleave, median_ratio, seconds_of, table
from benchmarks.options import SampleOptions
from data.images.codec import PixelCodec
from diffusion.guidance import GuidanceConfig
from models import build_network
from training.config import RunConfig


def benchmark_sample(config: RunConfig, device: torch.device, options: SampleOptions) -> str:
    """Return the rate of sampling without and with guidance, and what guidance costs.

    ``config`` is of a model with a condition to be guided by. Guidance evaluates the network on a
    doubled batch; it is compared with sampling twice as many images without it.
    """
    torch.manual_seed(config.training.seed)
    family = families.of(config)
    network = build_network(config.model).eval().requires_grad_(False).to(device)

    batch = options.batch

    def make_turn(num: int, cfg_scale: float) -> Callable[[], float]:
        run = dataclasses.replace(
            config,
            guidance=GuidanceConfig(cfg_scale=cfg_scale),
            training=dataclasses.replace(config.training, precision=options.precision),
        )
        # Latents are timed without their decoding.
        generator = family.unprompted(family.generator(run, network, PixelCodec(), device))
        return lambda: seconds_of(lambda: generator.generate(range(num)), device)

    names = [f"batch {batch}", f"batch {batch}, guided", f"batch {2 * batch}"]
    turns = [make_turn(batch, 1.0), make_turn(batch, 1.5), make_turn(2 * batch, 1.0)]
    times = interleave(dict(zip(names, turns, strict=True)), options.rounds, warm_up=True)
    rows = [["", "s a batch", "images/s"]]
    for name, num in zip(names, (batch, batch, 2 * batch), strict=True):
        seconds = statistics.median(times[name])
        rows.append([name, f"{seconds:.3f}", f"{num / seconds:.2f}"])
    ratio = median_ratio(times[names[1]], times[names[2]])
    return f"{table(rows)}\nGuidance costs {ratio:.3f} times one doubled batch."
