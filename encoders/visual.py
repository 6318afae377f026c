"""The visual encoder, from Hugging Face's transformers: DINOv3."""

import math

import torch
from torch import Tensor, nn

from encoders.loading import Device, FrozenEncoder, Pretrained, absolute, identity
from torch_utils.distributed import in_turn

VISUAL = Pretrained(option="--visual", class_name="DINOv3ViTModel", kinds=("dinov3_vit",))
# Channel statistics that visual encoders are trained with, for values in [0, 1].
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MAX_PIXELS = 16 * 1024 * 1024  # Per pass of the network; bounds the memory of activations.


class VisualEncoder(FrozenEncoder):
    """A DINOv3: maps images to their CLS token and patch tokens in one pass.

    The network returns [CLS, registers, patches] (Siméoni et al., arXiv:2508.10104); the registers
    are dropped. It processes as many images at a time as have the pixels of 16 images of 1024x1024,
    at least one.

    Attributes:
        patch_size: Side of a patch in pixels.
        num_registers: Number R of register tokens.
        dim: Width D of a token.
    """

    described = ("patch_size", "num_registers", "dim")

    def __init__(
        self, network: nn.Module, location: str, device: Device, precision: str = "fp32"
    ) -> None:
        """``network`` is a ``transformers.DINOv3ViTModel``."""
        config = network.config
        self.patch_size = int(config.patch_size)
        self.num_registers = int(config.num_register_tokens)
        self.dim = int(config.hidden_size)
        super().__init__(network, location, device, precision, identity(network))
        self._mean = torch.tensor(_IMAGENET_MEAN, device=self.device)[:, None, None]
        self._std = torch.tensor(_IMAGENET_STD, device=self.device)[:, None, None]

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return CLS tokens [N, D] and patch tokens [N, rows * columns, D], float32.

        ``images`` are uint8 [N, 3, H, W] on any device; the result is on the encoder's device.
        Images are resized to a whole number of patches, never cropped. Patches are in row-major
        order.
        """
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        grid = [num_patches(side, self.patch_size) for side in images.shape[2:]]
        sides = [num * self.patch_size for num in grid]
        total = math.prod(grid)

        def tokens(x: Tensor) -> Tensor:
            x = x.to(torch.float32)
            if list(x.shape[2:]) != sides:
                x = nn.functional.interpolate(x, sides, mode="bicubic", antialias=True)
                x = x.clamp(0, 255)
            x = (x / 255 - self._mean) / self._std
            with self._products():
                out = self._network(pixel_values=x).last_hidden_state
            assert out.shape[1] == 1 + self.num_registers + total
            return torch.cat([out[:, :1], out[:, 1 + self.num_registers :]], dim=1)

        size = _MAX_PIXELS // math.prod(sides)
        found = self._in_chunks(tokens, images, size, (1 + total, self.dim))
        return found[:, 0], found[:, 1:]


def num_patches(side: int, patch_size: int) -> int:
    """Return the number of patches along a side of an image; both arguments are in pixels.

    It is rounded to the nearest integer, half up: the image is resized to fit, never cropped.
    """
    return (2 * side + patch_size) // (2 * patch_size)


def load_visual_encoder(
    location: str, device: Device, *, expected_hash: str | None = None, precision: str = "fp32"
) -> VisualEncoder:
    """Return a visual encoder from a local folder or a Hugging Face id. Collective.

    Every rank reads it, in the order of :func:`~torch_utils.distributed.in_turn`. Only tensors in
    the safetensors format are read, never code that comes with them.

    Args:
        location: Folder or Hugging Face id.
        device: Device that it runs on.
        expected_hash: The ``sha256`` that it must have, if features of it are already in use.
        precision: Precision of matrix products and convolutions: ``fp32`` or ``bf16``.

    Raises ValueError, with a remedy, if it cannot be read or has another hash.
    """
    location = absolute(location)
    encoder = in_turn(lambda: VisualEncoder(VISUAL.read(location), location, device, precision))
    return VISUAL.checked(encoder, expected_hash)
