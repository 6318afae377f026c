"""benchmark.py attention: the time that each attention implementation takes."""

import functools
from collections.abc import Callable

import click
import torch

from benchmarks.kinds import attention_stages, describe_run
from benchmarks.measure import (
    Spent,
    interleave,
    median_wall,
    spent_by,
    table,
    time_cells,
)
from benchmarks.options import AttentionOptions, measured_run
from benchmarks.plain import plain_attention
from diffusion.denoiser import AUTOCAST_DTYPES
from models import ModelConfig
from models.attention import attend, choose_attention
from torch_utils import cpu_matmul, distributed


def measure(config: ModelConfig, options: AttentionOptions) -> None:
    """Print the table of ``benchmark.py attention``."""
    device = distributed.init()
    cpu_matmul.agree(options.cpu_matmul, None, device)
    config = measured_run(options.preset, config)
    click.echo(f"{describe_run(config, device)}\nbatch {options.batch}, {options.precision}")
    attentions = {
        name: functools.partial(attend, attention=name) for name in ("sdpa", "explicit", "flex")
    }
    attentions["plain"], notes = plain_attention, []
    if not options.bias:
        attentions = {name: attentions[name] for name in ("sdpa", "explicit")}
        attentions["auto"] = attend
    elif device.type == "cpu":
        del attentions["flex"]
        notes.append("Flex attention has no backward pass on a CPU.")
    rows = [["stage", "windows", "tokens", "blocks", *(f"{n}, ms" for n in attentions), "fastest"]]
    totals = {name: [Spent(0.0, 0.0)] * options.rounds for name in attentions}
    for stage, (grid, window, width, num_blocks) in enumerate(attention_stages(config)):
        num_windows, length = options.batch * (grid // window) ** 2, window**2
        heads = config.model.num_heads
        call_of = _calls((num_windows, heads, length, width // heads), options, device)
        turns = {name: call_of(attention) for name, attention in attentions.items()}
        times = interleave(turns, options.rounds, warm_up=True)
        for name, spent in times.items():
            totals[name] = [
                Spent(so_far.wall + num_blocks * turn.wall, so_far.cpu + num_blocks * turn.cpu)
                for so_far, turn in zip(totals[name], spent, strict=True)
            ]
        seconds = {name: median_wall(spent) for name, spent in times.items()}
        sizes = [f"{stage}: {grid}x{grid}x{width}", str(num_windows), str(length), str(num_blocks)]
        cells = (f"{1000 * value:.2f}" for value in seconds.values())
        rows.append([*sizes, *cells, min(seconds, key=seconds.get)])
    summary = [["all blocks", "wall, ms", "at least", "CPU, ms", "at least"]]
    summary += [[name, *time_cells(spent, 1000)] for name, spent in totals.items()]
    if options.bias:
        chosen = choose_attention("auto", device, needs_grad=True)
        notes.append(f"--attention=auto means {chosen} on this device.")
    click.echo("\n".join([table(rows), table(summary), *notes]))


def _calls(
    shape: tuple[int, int, int, int], options: AttentionOptions, device: torch.device
) -> Callable[[Callable[..., torch.Tensor]], Callable[[], Spent]]:
    """Return a function that maps an attention implementation to a function that times its calls.

    ``shape`` is [windows, heads, tokens, head_dim]. The times are those of one call, forward and
    backward.
    """
    num_windows, heads, length, head_dim = shape
    make = functools.partial(torch.randn, device=device)
    dtype = AUTOCAST_DTYPES[options.precision] or torch.float32
    # Queries, keys and values are views of one tensor, as in the network.
    qkv = make(num_windows, 3 * heads, length, head_dim, dtype=dtype)
    inputs = [part.requires_grad_() for part in qkv.chunk(3, dim=1)]
    if options.bias:
        inputs.append(make(heads, length, length, requires_grad=True))
    grad = make(shape, dtype=dtype)

    def turn_of(attention: Callable[..., torch.Tensor]) -> Callable[[], Spent]:
        def calls() -> None:
            for _ in range(options.calls):
                torch.autograd.grad(attention(*inputs).to(dtype), inputs, grad)

        def turn() -> Spent:
            wall, cpu = spent_by(calls, device)
            return Spent(wall / options.calls, cpu / options.calls)

        return turn

    return turn_of
