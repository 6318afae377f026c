"""benchmark.py sample: what sampling costs without and with guidance, and with other code."""

import dataclasses
from collections.abc import Callable

import click
import torch

import families
from benchmarks.kinds import (
    NetworkOptions,
    describe_run,
    listed,
    measured_preset,
    measured_run,
    model_command,
)
from benchmarks.measure import (
    TIME_COLUMNS,
    Spent,
    interleave,
    median_ratio,
    median_wall,
    spent_by,
    table,
    time_cells,
    walls,
)
from benchmarks.plain import build_plain_network
from data.images.codec import PixelCodec
from diffusion.guidance import GuidanceConfig
from dnnlib.click_options import param, takes
from models import ModelConfig, build_network
from torch_utils import distributed
from training.config import RunConfig

_CFG_SCALE = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(NetworkOptions):
    against: str | None = param(
        help="What to compare guided sampling with: plain (a network without fast parts), "
        "diffusers or plain,diffusers."
    )
    steps: int | None = param(
        min=1, max=1_000_000, help="Number of sampling steps.  [default: the preset's]"
    )


@model_command
@takes(SampleOptions)
def command(config: ModelConfig, options: SampleOptions) -> None:
    """Time sampling, and guidance against one doubled batch, with random weights.

    Guidance evaluates the network on a doubled batch; it is compared with sampling twice as many
    images without it. Latents are timed without their decoding. --against=diffusers is a DiT of the
    package diffusers of the same width, depth, heads and tokens under its own scheduler.
    """
    others = () if options.against is None else _others(options.against)
    device, batch = distributed.init(), options.batch
    run = measured_run(options.preset, config)
    run = families.of(run).example_run(run, measured_preset(options.preset).num_classes)
    if options.steps is not None:
        run = run.changed("sampling", steps=options.steps)
    run = run.changed("training", precision=options.precision)
    if "diffusers" in others:
        from benchmarks.diffusers_sides import check_diffusers

        check_diffusers(run)
    click.echo(describe_run(run, device))
    plain, guided, doubled = f"batch {batch}", f"batch {batch}, guided", f"batch {2 * batch}"
    network = build_network(run.model)
    turns = {
        plain: _turn_of(run, network, device, (batch, 1.0)),
        guided: _turn_of(run, network, device, (batch, _CFG_SCALE)),
        doubled: _turn_of(run, network, device, (2 * batch, 1.0)),
        **_turns_of_others(others, run, device, batch),
    }
    times = interleave(turns, options.rounds, warm_up=True)
    rows = [["", *TIME_COLUMNS, "images/s", "speed, guided = 1"]]
    for name, spent in times.items():
        num = 2 * batch if name == doubled else batch
        speed = median_ratio(walls(times[guided]), walls(spent)) * num / batch
        rows.append([name, *time_cells(spent), f"{num / median_wall(spent):.2f}", f"{speed:.2f}"])
    sampling = run.sampling
    click.echo(f"{sampling.sampler}, {sampling.steps} steps, {options.precision}\n{table(rows)}")
    ratio = median_ratio(walls(times[guided]), walls(times[doubled]))
    click.echo(f"Guidance costs {ratio:.3f} times one doubled batch.")


def _others(text: str) -> tuple[str, ...]:
    return listed("--against", text, ("plain", "diffusers"))


def _turn_of(
    config: RunConfig, network: torch.nn.Module, device: torch.device, request: tuple[int, float]
) -> Callable[[], Spent]:
    """Return a function that times sampling of so many images with so much guidance."""
    torch.manual_seed(config.training.seed)
    num, cfg_scale = request
    network = network.eval().requires_grad_(False).to(device)
    run = dataclasses.replace(config, guidance=GuidanceConfig(cfg_scale=cfg_scale))
    family = families.of(config)
    generator = family.unprompted(family.generator(run, network, PixelCodec(), device))
    return lambda: spent_by(lambda: generator.generate(range(num)), device)


def _turns_of_others(
    others: tuple[str, ...], config: RunConfig, device: torch.device, batch: int
) -> dict[str, Callable[[], Spent]]:
    """Return what this code's guided sampling is compared with."""
    turns = {}
    if "plain" in others:
        network = build_plain_network(config.model)
        name = f"batch {batch}, guided, plain network"
        turns[name] = _turn_of(config, network, device, (batch, _CFG_SCALE))
    if "diffusers" in others:
        from benchmarks.diffusers_sides import make_sampler

        guided = dataclasses.replace(config, guidance=GuidanceConfig(cfg_scale=_CFG_SCALE))
        name, sample = make_sampler(guided, device)
        turns[f"batch {batch}, guided, {name}"] = lambda: spent_by(lambda: sample(batch), device)
    return turns
