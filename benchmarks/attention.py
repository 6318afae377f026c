"""benchmark.py attention: what attention costs by each way of computing it."""

import functools
import statistics
from collections.abc import Callable

import click
import torch

from benchmarks.kinds import attention_stages, describe_run, measured_preset
from benchmarks.measure import interleave, seconds_of, table
from benchmarks.options import AttentionOptions
from benchmarks.plain import plain_attention
from diffusion.denoiser import AUTOCAST_DTYPES
from models.attention import attend, choose_attention
from torch_utils import distributed


def measure(options: AttentionOptions) -> None:
    """Print the table of ``benchmark.py attention``."""
    device = distributed.init()
    config = measured_preset(options.preset).run
    click.echo(f"{describe_run(config, device)}\nbatch {options.batch}, {options.precision}")
    attentions = {
        name: functools.partial(attend, attention=name) for name in ("sdpa", "explicit", "flex")
    }
    attentions["plain"] = plain_attention
    notes = []
    try:
        choose_attention("flex", device, needs_grad=True)
    except ValueError:
        del attentions["flex"]
        notes.append(f"Flex attention has no backward pass on a {device.type.upper()}.")
    rows = [["stage", "windows", "tokens", "blocks", *(f"{n}, ms" for n in attentions), "fastest"]]
    totals = dict.fromkeys(attentions, 0.0)
    for stage, (grid, window, width, num_blocks) in enumerate(attention_stages(config)):
        num_windows, length = options.batch * (grid // window) ** 2, window**2
        heads = config.model.num_heads
        call_of = _calls((num_windows, heads, length, width // heads), options, device)
        turns = {name: call_of(attention) for name, attention in attentions.items()}
        times = interleave(turns, options.rounds, warm_up=True)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        for name in totals:
            totals[name] += num_blocks * seconds[name]
        sizes = [f"{stage}: {grid}x{grid}x{width}", str(num_windows), str(length), str(num_blocks)]
        rows.append([*sizes, *_fastest(seconds)])
    rows.append(["all", "", "", "", *_fastest(totals)])
    chosen = choose_attention("auto", device, needs_grad=True)
    notes.append(f"--attention=auto means {chosen} on this device.")
    click.echo("\n".join([table(rows), *notes]))


def _calls(
    shape: tuple[int, int, int, int], options: AttentionOptions, device: torch.device
) -> Callable[[Callable[..., torch.Tensor]], Callable[[], float]]:
    """Return a function from a way of computing attention to one that times its calls."""
    num_windows, heads, length, head_dim = shape
    make = functools.partial(torch.randn, device=device)
    dtype = AUTOCAST_DTYPES[options.precision] or torch.float32
    # Three parts of one tensor, as the network has them.
    qkv = make(num_windows, 3 * heads, length, head_dim, dtype=dtype)
    inputs = [part.requires_grad_() for part in qkv.chunk(3, dim=1)]
    inputs.append(make(heads, length, length, requires_grad=True))
    grad = make(shape, dtype=dtype)

    def turn_of(attention: Callable[..., torch.Tensor]) -> Callable[[], float]:
        def calls() -> None:
            for _ in range(options.calls):
                torch.autograd.grad(attention(*inputs).to(dtype), inputs, grad)

        return lambda: seconds_of(calls, device) / options.calls

    return turn_of


def _fastest(seconds: dict[str, float]) -> list[str]:
    return [*(f"{1000 * s:.2f}" for s in seconds.values()), min(seconds, key=seconds.get)]
