"""The encoders of features, through Hugging Face's transformers: DINOv3 for images, T5 for text."""

import torch
from torch import Tensor, nn

from data.features.buckets import Bucket
from encoders.loading import _absolute, _check_precision, _checked, _identity, _in_turn, _read

# Channel statistics that visual encoders are trained with, of values in [0, 1].
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MAX_PIXELS = 16 * 1024 * 1024  # That a network sees at once; bounds the memory of activations.


class VisualEncoder:
    """A DINOv3: images to their CLS token and patch tokens, both of one pass.

    The output of the network is [CLS, registers, patches] (Siméoni et al., arXiv:2508.10104); the
    registers are left out. It computes in float32, with bfloat16 products if so loaded, whatever
    autocast the caller is in, and sees at most 16 images of 1024x1024 at once.

    Attributes:
        location: Folder or Hugging Face id that it came from.
        patch_size: Sides of a patch in pixels.
        num_registers: Number R of register tokens.
        dim: Channels D of a token.
        sha256: Identity of weights and configuration.
        device: Where it computes.
    """

    def __init__(
        self, network: nn.Module, location: str, device: torch.device | str, precision: str = "fp32"
    ) -> None:
        """``network`` is a ``transformers.DINOv3ViTModel``."""
        _check_precision(precision)
        config = network.config
        self.location = location
        self.patch_size = int(config.patch_size)
        self.num_registers = int(config.num_register_tokens)
        self.dim = int(config.hidden_size)
        self.sha256 = _identity(network)
        self.device = torch.device(device)
        self._precision = precision
        # In training mode it would jitter the coordinates of its position embedding.
        self._network = network.eval().requires_grad_(False).to(self.device)
        self._mean = torch.tensor(_IMAGENET_MEAN, device=self.device)[:, None, None]
        self._std = torch.tensor(_IMAGENET_STD, device=self.device)[:, None, None]

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return CLS tokens [N, D] and patch tokens [N, rows * columns, D], float32.

        ``images`` are uint8 [N, 3, H, W] of one bucket on any device; the result is on the
        encoder's. Images are resized to whole patches, never cropped, and rows of patches come one
        after another.
        """
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        bucket = Bucket(images.shape[3], images.shape[2])
        rows, columns = bucket.grid(self.patch_size)
        num, num_patches = len(images), rows * columns
        cls = torch.empty((num, self.dim), dtype=torch.float32, device=self.device)
        patches = torch.empty((num, num_patches, self.dim), dtype=torch.float32, device=self.device)
        width, height = bucket.input_size(self.patch_size)
        size = max(_MAX_PIXELS // (width * height), 1)
        bf16 = self._precision == "bf16"
        for first in range(0, num, size):
            x = images[first : first + size].to(self.device, non_blocking=True).to(torch.float32)
            if (width, height) != bucket.size:
                x = nn.functional.interpolate(
                    x, (height, width), mode="bicubic", antialias=True
                ).clamp(0, 255)
            x = (x / 255 - self._mean) / self._std
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                out = self._network(pixel_values=x).last_hidden_state
            assert out.shape[1] == 1 + self.num_registers + num_patches
            cls[first : first + size] = out[:, 0]
            patches[first : first + size] = out[:, 1 + self.num_registers :]
        return cls, patches


def load_visual_encoder(
    location: str,
    device: torch.device | str,
    *,
    expected_hash: str | None = None,
    precision: str = "fp32",
) -> VisualEncoder:
    """Return a visual encoder from a local folder or a Hugging Face id. Collective: every rank
    reads, the first one before the others.

    Only tensors in the safetensors format are read, and no code that comes with them.

    Args:
        expected_hash: The ``sha256`` it must have, if its features are in use already.
        precision: ``fp32`` or ``bf16``, that of the network's products.

    Raises ValueError, one sentence with the remedy, if there is none, or another one.
    """
    location = _absolute(location)

    def read() -> VisualEncoder:
        network = _read(location, "DINOv3ViTModel", ("dinov3_vit",), "--visual")
        return VisualEncoder(network, location, device, precision)

    return _checked(_in_turn(read), expected_hash, "--visual")
