"""What all neural-network detectors share: batching, arithmetic and identity."""

import contextlib
import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import nn

from metrics.detectors import Detector


class NetworkDetector(Detector):
    """A detector that runs a network; subclasses preprocess images and extract the outputs."""

    _max_batch = 64  # Bounds the memory of activations, whatever the caller's batch size.

    def __init__(
        self, network: nn.Module, device: torch.device | str, identity: str, precision: str
    ) -> None:
        """``identity`` names network and preprocessing exactly; it is hashed with the weights.

        Raises ValueError for a ``precision`` other than ``float32`` and ``bfloat16``.
        """
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"Precision {precision!r} of a detector; accepted: float32, bfloat16.")
        self.precision = precision
        self.hash = network_hash(network, f"{identity}, {precision}")
        self._network = network.eval().requires_grad_(False).to(device)

    def _preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Return the network's input, float32, for uint8 images [N, C, H, W], C being 1 or 3."""
        raise NotImplementedError

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Return each of ``outputs`` [N, D] for the network's input ``x``."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(
        self, images: torch.Tensor, outputs: Collection[str] = ("features",)
    ) -> dict[str, torch.Tensor]:
        """Return float32 vectors [N, D] of uint8 images [N, C, H, W] for each of ``outputs``.

        C is 1 or 3; a single channel is repeated three times. Raises ValueError for other images.
        """
        assert set(outputs) <= set(self.outputs), outputs
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            got = f"{images.dtype} images of shape {list(images.shape)}"
            expected = "expected uint8 [N, C, H, W] with 1 or 3 channels"
            raise ValueError(f"The {self.name} detector got {got}; {expected}.")
        result = {
            name: torch.empty(len(images), self.outputs[name], device=images.device)
            for name in outputs
        }
        for start in range(0, len(images), self._max_batch):
            rows = slice(start, start + self._max_batch)
            with arithmetic(images.device, "float32"):
                x = self._preprocess(images[rows]).expand(-1, 3, -1, -1)
                x = x.contiguous(memory_format=torch.channels_last)
            with arithmetic(images.device, self.precision):
                found = self._extract(x, outputs)
            for name in outputs:
                result[name][rows] = found[name]
        return result


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Compute in this precision without TF32, which a run may allow but would change scores."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def network_hash(network: nn.Module, identity: str) -> str:
    """Return the hexadecimal SHA-256 of a network's weights and of the text ``identity``."""
    digest = hashlib.sha256(identity.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
