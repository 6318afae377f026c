"""Subsets of a model's timesteps, in the notation of published samplers. Needs no torch.

Improved DDPM (arXiv 2102.09672, section 4) and the DDIM runs of guided diffusion (arXiv
2105.05233) visit such subsets; the published code of later models uses the same names.
"""

import itertools
import re

from dnnlib.errors import refusal

_ACCEPTED = (
    "ddim and a number of steps, such as ddim50, or numbers of steps, such as 250 or 10,10,5"
)
_NEAREST = 6  # How many possible numbers of steps an error message lists.


def num_steps(name: str) -> int:
    """Return the number of timesteps in a subset; raises ValueError for a malformed name."""
    return sum(_parse(name)[1])


def respaced(name: str, num_timesteps: int) -> list[int]:
    """Return the timesteps of a subset of 0 to ``num_timesteps`` - 1, ascending.

    Args:
        name: ``ddimN`` takes every k-th timestep from 0, for the integer k that gives N of them:
            ``ddim50`` of 1,000 is 0, 20, ..., 980. Any other name lists numbers of steps, separated
            by commas. The timesteps are then cut into as many sections of equal length (the first
            ones are longer by one if there is a remainder). Each section contributes its number of
            timesteps, spread evenly from its first to its last and rounded; a single one is its
            first.
        num_timesteps: Number of timesteps of the model.

    Raises ValueError for a malformed name, for an N that no integer stride gives, and for more
    steps than a section has timesteps.
    """
    is_strided, counts = _parse(name)
    if is_strided:
        return _strided(counts[0], num_timesteps)
    length, longer = divmod(num_timesteps, len(counts))
    found, start = [], 0
    for index, count in enumerate(counts):
        size = length + (index < longer)
        if count > size:
            but = f"a section of {size} timesteps has no {count}"
            remedy = f"give {len(counts)} numbers of at most {size}, or fewer sections"
            raise refusal("--respacing", name, but=but, remedy=remedy)
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Accumulated as in the published code; index * stride would round some the other way.
        positions = itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0)
        found += [start + round(position) for position in positions]
        start += size
    return found


def _strided(count: int, num_timesteps: int) -> list[int]:
    strides = {-(-num_timesteps // stride): stride for stride in range(num_timesteps - 1, 0, -1)}
    if count not in strides:
        near = sorted(sorted(strides, key=lambda other: abs(other - count))[:_NEAREST])
        but = f"no integer stride over {num_timesteps} timesteps takes {count} steps"
        accepted = ", ".join(f"ddim{other}" for other in near)
        accepted = f"{accepted} and others further off, or {count} for a stride that is no integer"
        raise refusal("--respacing", f"ddim{count}", but=but, accepted=accepted)
    return list(range(0, num_timesteps, strides[count]))


def _parse(name: str) -> tuple[bool, list[int]]:
    """Return whether a subset has an integer stride, and the number of steps of each section."""
    if not re.fullmatch(r"ddim[0-9]{1,6}|[0-9]{1,6}(, ?[0-9]{1,6})*", name):
        raise refusal("--respacing", repr(name), accepted=_ACCEPTED)
    counts = [int(count) for count in name.removeprefix("ddim").split(",")]
    if 0 in counts:
        raise refusal("--respacing", repr(name), accepted=f"{_ACCEPTED}, each at least 1")
    return name.startswith("ddim"), counts
