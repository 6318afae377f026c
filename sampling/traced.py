"""A snapshot's denoiser as a torch.export program, which runs without this project."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.precond import make_precond
from dnnlib.files import atomic_write
from models.network import Network
from training.checkpoint import Snapshot

HASH_NAME = "weights_hash"  # Of the text beside the graph by which a program is recognised.
_MAX_BATCH = 65_536

Size = tuple[int, int]


class TraceableDenoiser(nn.Module):
    """``forward(x, sigma, cond) -> x0 estimate``, float32, for images of one size.

    Args:
        network: The network, in evaluation mode.
        snapshot: The snapshot that it was built from.
        size: One of the image sizes (H, W) of its model.
    """

    def __init__(self, network: Network, snapshot: Snapshot, size: Size) -> None:
        super().__init__()
        self.network, self._size = network, size
        config = snapshot.config
        self._takes_size = "size" in config.model.example_cond()
        self._fixed = config.cond_after(snapshot.trained_nimg, config.model.shape_of(size))
        self._denoiser = Denoiser(network, make_precond(config.precond))

    def forward(self, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Return the x0 estimate [N, C, h, w] from noisy x [N, C, h, w] at noise levels sigma [N].

        ``cond`` holds the conditions [N, ...] by name.
        """
        given: dict[str, Any] = dict(cond)
        given |= {name: x.new_full((x.shape[0],), value) for name, value in self._fixed.items()}
        if self._takes_size:
            given["size"] = self._size
        return self._denoiser(x, sigma, self.network.context(given, num=x.shape[0]))


def example_inputs(
    snapshot: Snapshot, num: int, size: Size
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return example inputs (x, sigma, cond) for ``num`` images to a snapshot's denoiser.

    They are x [num, C, h, w], sigma [num], and the conditions [num, ...] by name.
    """
    model = snapshot.config.model
    cond = {
        name: _random_like(value, num)
        for name, value in model.example_cond(size).items()
        if name != "size"
    }
    return torch.randn(num, *model.shape_of(size)), torch.linspace(0.5, 2, num), cond


def _random_like(value: Tensor, num: int) -> Tensor:
    if value.is_floating_point():
        return torch.randn(num, *value.shape[1:])
    return value[:1].expand(num, *value.shape[1:]).clone()


@torch.no_grad()
def trace_denoiser(snapshot: Snapshot, size: Size) -> torch.export.ExportedProgram:
    """Return the program of a snapshot's denoiser, for batches of up to 65,536 images.

    ``size`` is one of the image sizes of its model.
    """
    module = TraceableDenoiser(snapshot.build(), snapshot, size)
    x, sigma, cond = example_inputs(snapshot, 2, size)
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    shapes = ({0: batch}, {0: batch}, {name: {0: batch} for name in cond})
    return torch.export.export(module, (x, sigma, cond), dynamic_shapes=shapes)


def save_program(
    program: torch.export.ExportedProgram, path: Path, about: Mapping[str, str]
) -> None:
    """Write a program atomically to a ``.pt2`` file, with the texts ``about`` beside the graph."""
    # In memory first: PyTorch's writer aborts the process if it cannot write a file's last bytes.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=dict(about))
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def is_program(path: Path) -> bool:
    """Return whether a file is a program of a snapshot's denoiser."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/extra/{HASH_NAME}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
