"""Random numbers as functions of (seed, position), never of rank, batch size or device."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

# Streams of a training step: each kind of randomness has its own generator, so that an additional
# draw from one leaves the others unchanged.
STREAM_DATA, STREAM_NOISE, STREAM_AUGMENT, STREAM_CONDITION, STREAM_MODEL, STREAM_INIT = range(6)
STREAM_POSTERIOR, STREAM_CONTEXT, STREAM_BUCKET, STREAM_ROLLBACK, STREAM_LEVEL = range(6, 11)
STREAM_VALIDATION = 11


def mix(*values: int) -> int:
    """Return a well-mixed 63-bit integer that depends on every one of ``values``."""
    sequence = np.random.SeedSequence([value % 2**64 for value in values])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def seed_after(seed: int, num_rollbacks: int) -> int:
    """Return the seed of the steps after ``num_rollbacks`` rollbacks, for other data and noise."""
    return mix(seed, STREAM_ROLLBACK, num_rollbacks) if num_rollbacks else seed


def step_generator(
    seed: int, cur_nimg: int, stream: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator for the global batch at ``cur_nimg``.

    Every rank draws for the whole global batch and keeps its own rows.
    """
    return torch.Generator(device).manual_seed(mix(seed, cur_nimg, stream))


@dataclasses.dataclass(frozen=True)
class Step:
    """What the randomness of one optimizer step depends on, whatever the number of ranks."""

    seed: int  # Seed of the run, after its rollbacks so far.
    cur_nimg: int  # Training images before the step.
    batch: int  # Rows of the global batch, over all ranks and passes.
    shape: tuple[int, int, int]  # Channels, height and width of what the network denoises.
    device: torch.device  # Where random numbers are drawn.

    def generator(self, stream: int) -> torch.Generator:
        """Return the generator of one kind of randomness, such as ``STREAM_NOISE``."""
        return step_generator(self.seed, self.cur_nimg, stream, self.device)


def epoch_permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return a permutation of ``range(length)``, int64, that depends only on (seed, epoch)."""
    return np.random.default_rng([seed % 2**64, STREAM_DATA, epoch]).permutation(length)


class SeededNoise:
    """One random generator per image, so that an image depends only on its own seed.

    Numbers are drawn on the CPU, so that they are the same for every device. Each call continues
    every image's stream: initial noise first, then class, then the noise of a stochastic sampler.

    Args:
        seeds: N seeds, one per image; taken modulo 2^32.
        device: Where the numbers are returned.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generators = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return standard normal numbers [N, *shape] of type ``dtype``, drawn in float32."""
        draws = torch.stack([torch.randn(*shape, generator=g) for g in self._generators])
        return draws.to(self.device, dtype)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Return standard normal numbers with the shape [N, ...] and type of ``x``."""
        return self.randn(x.shape[1:], x.dtype)

    def randint(self, high: int) -> torch.Tensor:
        """Return integers [N], int64, in [0, high)."""
        draws = [torch.randint(high, [], generator=g) for g in self._generators]
        return torch.stack(draws).to(self.device)
