"""What attention costs by each way of computing it."""

import functools
import statistics
from collections.abc import Callable

import torch

from benchmarks.kinds import attention_stages
from benchmarks.measure import interleave, seconds_of, table
from benchmarks.options import AttentionOptions
from benchmarks.plain_diffit import plain_attention
from models.layers import attend, choose_attention
from sampling.images import AUTOCAST_DTYPES
from training.config import RunConfig

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def benchmark_attention(config: RunConfig, device: torch.device, options: AttentionOptions) -> str:
    """Return the time of attention, forward and backward, by each way of computing it.

    Rows are the stages of the model with their windows; the last row is all blocks of the network.
    """
    model = config.model
    attentions: dict[str, Attention] = {
        name: functools.partial(attend, attention=name) for name in ("sdpa", "flex")
    }
    attentions["plain"] = plain_attention
    notes = []
    try:
        choose_attention("flex", device, needs_grad=True)
    except ValueError:
        del attentions["flex"]
        notes.append(f"Flex attention has no backward pass on a {device.type.upper()}.")
    dtype = AUTOCAST_DTYPES[options.precision] or torch.float32

    rows = [["stage", "windows", "tokens", "blocks", *(f"{n}, ms" for n in attentions), "fastest"]]
    totals = dict.fromkeys(attentions, 0.0)
    for stage, (grid, window, width, num_blocks) in enumerate(attention_stages(config)):
        num_windows, length = options.batch * (grid // window) ** 2, window**2
        shape = (num_windows, model.num_heads, length, width // model.num_heads)
        turns = {
            name: _attention_turn(attention, shape, dtype, device, options.calls)
            for name, attention in attentions.items()
        }
        times = interleave(turns, options.rounds, warm_up=True)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        for name in totals:
            totals[name] += num_blocks * seconds[name]
        sizes = [f"{stage}: {grid}x{grid}x{width}", str(num_windows), str(length), str(num_blocks)]
        rows.append([*sizes, *_fastest(seconds)])
    rows.append(["all", "", "", "", *_fastest(totals)])
    chosen = choose_attention("auto", device, needs_grad=True)
    notes.append(f"--attention=auto means {chosen} on this device.")
    return "\n".join([table(rows), *notes])


def _attention_turn(
    attention: Attention,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    num_calls: int,
) -> Callable[[], float]:
    num_windows, heads, length, head_dim = shape
    # Three parts of one tensor, as the network has them.
    qkv = torch.randn(num_windows, 3 * heads, length, head_dim, dtype=dtype, device=device)
    inputs = [part.requires_grad_() for part in qkv.chunk(3, dim=1)]
    inputs.append(torch.randn(heads, length, length, device=device, requires_grad=True))
    grad = torch.randn(num_windows, heads, length, head_dim, dtype=dtype, device=device)

    def calls() -> None:
        for _ in range(num_calls):
            torch.autograd.grad(attention(*inputs).to(dtype), inputs, grad)

    return lambda: seconds_of(calls, device) / num_calls


def _fastest(seconds: dict[str, float]) -> list[str]:
    return [*(f"{1000 * s:.2f}" for s in seconds.values()), min(seconds, key=seconds.get)]
