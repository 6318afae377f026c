"""Decoded images in memory that the processes of a rank share."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class SharedCache:
    """Images [N, C, H, W] in shared memory with a flag for each that is there."""

    def __init__(self, shape: tuple[int, int, int, int], label: Path) -> None:
        num_bytes = int(np.prod(shape, dtype=np.int64))
        self._check_space(num_bytes, label)
        self._images = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self._filled = torch.zeros(shape[0], dtype=torch.bool).share_memory_()

    @staticmethod
    def _check_space(num_bytes: int, label: Path) -> None:
        # Writing more than the file system holds would kill the process with a bus error.
        if os.path.isdir("/dev/shm"):
            stat = os.statvfs("/dev/shm")
            free = stat.f_bavail * stat.f_frsize
            if num_bytes > 0.9 * free:
                raise ValueError(
                    f"{label}: --cache needs {num_bytes / 1e9:.2f} GB of shared memory, but "
                    f"/dev/shm has {free / 1e9:.2f} GB free; train without --cache, or enlarge it "
                    "(docker run --shm-size)."
                )

    def fetch(
        self, indices: np.ndarray, read: Callable[[np.ndarray], torch.Tensor]
    ) -> torch.Tensor:
        """Return images by index, calling ``read(missing_indices)`` for those not there yet.

        Processes may fill the same entry twice, with the same pixels.
        """
        wanted = torch.from_numpy(indices)
        missing = wanted[~self._filled[wanted]]
        if len(missing):
            self._images[missing] = read(missing.numpy())
            self._filled[missing] = True
        return self._images[wanted]
