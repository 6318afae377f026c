"""What sampling costs without and with guidance."""

import functools
import statistics
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import (
    interleave,
    median_ratio,
    seconds_of,
    table,
)
from data.fewshot.episodes import Episodes
from diffusion.guidance import GuidanceConfig
from diffusion.precond import make_precond
from diffusion.samplers import SamplingConfig
from models import build_network
from models.set_dit import SetDiTConfig
from sampling.images import AUTOCAST_DTYPES, ImageGenerator
from sampling.supports import SupportGenerator
from training.config import RunConfig


def benchmark_sample(
    config: RunConfig,
    device: torch.device,
    *,
    precision: str,
    batch: int,
    sampling: SamplingConfig,
    num_rounds: int,
) -> str:
    """Return the rate of sampling without and with guidance, and what guidance costs.

    ``config`` is of a class-conditional model. Guidance evaluates the network on a doubled batch;
    it is compared with sampling twice as many images without it.
    """
    assert config.model.num_classes > 0 or config.sets is not None
    torch.manual_seed(config.training.seed)
    network = build_network(config.model).eval().requires_grad_(False).to(device)

    def make_turn(num: int, cfg_scale: float) -> Callable[[], float]:
        make = ImageGenerator
        if isinstance(config.model, SetDiTConfig):
            make = functools.partial(SupportGenerator, episodes=_random_support(config.model))
        generator = make(
            network=network,
            precond=make_precond(config.precond),
            model=config.model,
            sampling=sampling,
            guidance=GuidanceConfig(cfg_scale=cfg_scale),
            device=device,
            autocast_dtype=AUTOCAST_DTYPES[precision],
        )
        return lambda: seconds_of(lambda: generator.generate(range(num)), device)

    names = [f"batch {batch}", f"batch {batch}, guided", f"batch {2 * batch}"]
    turns = [make_turn(batch, 1.0), make_turn(batch, 1.5), make_turn(2 * batch, 1.0)]
    for turn in turns:
        turn()
    times = interleave(dict(zip(names, turns, strict=True)), num_rounds)
    rows = [["", "s a batch", "images/s"]]
    for name, num in zip(names, (batch, batch, 2 * batch), strict=True):
        seconds = statistics.median(times[name])
        rows.append([name, f"{seconds:.3f}", f"{num / seconds:.2f}"])
    ratio = median_ratio(times[names[1]], times[names[2]])
    return f"{table(rows)}\nGuidance costs {ratio:.3f} times one doubled batch."


def _random_support(model: SetDiTConfig) -> Episodes:
    """Return one support of noise, as many images as in training."""
    size = model.context_size
    return Episodes(
        supports=torch.randint(256, (1, size, *model.input_shape), dtype=torch.uint8),
        classes=np.zeros(1, np.int64),
        class_names=("noise",),
        labels=torch.tensor([model.num_classes]),
        indices=np.full((1, size), -1),
        counts=(1,),
        reals=np.empty(0, np.int64),
        source="noise",
    )
