"""The autoencoder of latent models: diffusers' AutoencoderKL, with its normalisation of latents."""

import hashlib
import json
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.errors import refusal
from encoders.loading import Device, FrozenEncoder, Pretrained, absolute
from torch_utils.fingerprints import weights_hash

INPUT_TRANSFORM = "x / 127.5 - 1"
_MAX_PIXELS = 16 * 256 * 256  # Per pass of the network; bounds the memory of activations.
# Settings that the outputs depend on, besides the weights and their shapes.
_SETTINGS = ("act_fn", "norm_num_groups", "down_block_types", "up_block_types")


class _PretrainedAutoencoder(Pretrained):
    """Reads autoencoders of ``diffusers``, whose configurations and constructors differ."""

    def check_location(self, location: str) -> None:
        inner = os.path.join(location, "vae")
        if not os.path.isfile(os.path.join(location, "config.json")) and os.path.isfile(
            os.path.join(inner, "config.json")
        ):
            raise ValueError(
                f"{self.option}: {location} is a whole pipeline; give {self.option}={inner}."
            )
        super().check_location(location)

    def _kind(self, location: str) -> Any:
        from diffusers import AutoencoderKL

        config = AutoencoderKL.load_config(location)
        return config.get("_class_name") if isinstance(config, dict) else config

    def _arguments(self) -> dict[str, Any]:
        return dict(use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32)

    def _config(self, network: nn.Module) -> dict[str, Any]:
        return dict(network.config)

    def _build(self, network_class: Any, config: dict[str, Any]) -> nn.Module:
        return network_class.from_config(config)


AUTOENCODER = _PretrainedAutoencoder(
    option="--vae",
    noun="autoencoder",
    makes="latents",
    files="config.json and diffusion_pytorch_model.safetensors",
    extra="latents",
    library="diffusers",
    class_name="AutoencoderKL",
    kinds=("AutoencoderKL",),
)


class Autoencoder(FrozenEncoder):
    """An AutoencoderKL: maps images to moments of raw latents, and normalised latents to images.

    It processes as many images at a time as have the pixels of 16 images of 256x256, at least one,
    so that memory does not grow with the batch. This affects results through rounding alone.

    Attributes:
        scale, shift: The normalised latent is (raw - shift) * scale.
        latent_channels: Number c of channels of a latent.
        downsampling: Ratio of the sides of an image to those of its latent.
        img_channels: Number C of channels of an image.
    """

    described = ("downsampling", "scale", "shift")

    def __init__(
        self, network: nn.Module, location: str, device: Device, precision: str = "fp32"
    ) -> None:
        """``network`` is a ``diffusers.AutoencoderKL``; raises ValueError if it is not supported.

        That is one that normalises latents per channel, or with more or fewer output than input
        channels.
        """
        config = network.config
        _check_config(config, location)
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0)
        self.latent_channels = config.latent_channels
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.img_channels = config.in_channels
        settings = {name: config[name] for name in _SETTINGS}
        settings.update(scale=self.scale, shift=self.shift)
        text = f"{json.dumps(settings, sort_keys=True)}\n{weights_hash(network.state_dict())}"
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        super().__init__(network, location, device, precision, sha256)

    def facts(self) -> dict[str, Any]:
        """Return the facts that records store, with the number of latent channels."""
        return dict(super().facts(), channels=self.latent_channels)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of the latent of a square image."""
        side = resolution // self.downsampling
        return self.latent_channels, side, side

    def check_images(self, name: str, resolution: int, img_channels: int) -> None:
        """Raise ValueError if images of this size, from the data ``name``, cannot be encoded."""
        takes = f"but the autoencoder {self.location} takes"
        if img_channels != self.img_channels:
            problem = f"holds images of {img_channels} channel(s), {takes} {self.img_channels}"
            remedy = "choose data or an autoencoder of the other kind"
            raise refusal(name, but=f"{problem} (grayscale 1, RGB 3)", remedy=remedy)
        if resolution % self.downsampling:
            problem = f"holds images of {resolution}x{resolution}, {takes} multiples of"
            remedy = "convert them with dataset_tool.py convert --resolution=N"
            raise refusal(name, but=f"{problem} {self.downsampling}", remedy=remedy)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the raw latents, float32 [N, 2c, h, w].

        ``images`` are uint8 [N, C, H, W] on any device; the result is on the autoencoder's device.
        Does not synchronise with the device.
        """
        assert images.dtype == torch.uint8
        assert images.shape[1] == self.img_channels
        height, width = images.shape[2:]
        rest = 2 * self.latent_channels, height // self.downsampling, width // self.downsampling
        with self._products():
            return self._in_chunks(self._encode, images, _MAX_PIXELS // (height * width), rest)

    def _encode(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32) / 127.5 - 1
        distribution = self._network.encode(x).latent_dist
        return torch.cat([distribution.mean, distribution.std], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images [N, C, H, W] from normalised latents [N, c, h, w].

        They are float32 on the autoencoder's device, about in [-1, 1] but not clipped.
        """
        assert latents.shape[1] == self.latent_channels
        return self.decode_raw(latents.to(self.device, torch.float32) / self.scale + self.shift)

    @torch.no_grad()
    def decode_raw(self, raw: Tensor) -> Tensor:
        """Return images like :meth:`decode`, from latents [N, c, h, w] that are not normalised."""
        size = [side * self.downsampling for side in raw.shape[2:]]
        rest = (self.img_channels, *size)
        with self._products():
            return self._in_chunks(self._decode, raw, _MAX_PIXELS // math.prod(size), rest)

    def _decode(self, raw: Tensor) -> Tensor:
        return self._network.decode(raw.to(torch.float32)).sample


def normalise(
    moments: Tensor, noise: Tensor | None, scale: float, shift: float, channels: int
) -> Tensor:
    """Return normalised latents (mean + std * noise - shift) * scale, float32 [N, c, h, w].

    Args:
        moments: Mean, then standard deviation, of raw latents, [N, 2c, h, w]; or the mean alone,
            [N, c, h, w].
        noise: Standard normal values [N, c, h, w], or None to use the mean. It must be None if
            ``moments`` is the mean alone.
        scale, shift: The autoencoder's normalisation.
        channels: Number c of channels of a latent.
    """
    moments = moments.to(torch.float32)
    assert moments.shape[1] in (channels, 2 * channels)
    raw = moments[:, :channels]
    if noise is not None:
        assert moments.shape[1] == 2 * channels, "Latents of the mean alone take no noise."
        raw = raw + moments[:, channels:] * noise
    return (raw - shift) * scale


def load_autoencoder(
    location: str, device: Device, *, expected_hash: str | None = None, precision: str = "fp32"
) -> Autoencoder:
    """Return an autoencoder from a local folder or a Hugging Face id. Collective: rank 0 reads.

    Only tensors in the safetensors format are read, never code that comes with them.

    Args:
        location: Folder or Hugging Face id.
        device: Device that it runs on.
        expected_hash: The ``sha256`` that it must have, if latents of it are already in use.
        precision: Precision of matrix products and convolutions: ``fp32`` or ``bf16``.

    Raises ValueError, with a remedy, if it cannot be read or has another hash.
    """
    location = absolute(location)
    autoencoder = Autoencoder(AUTOENCODER.load(location), location, device, precision)
    return AUTOENCODER.checked(autoencoder, expected_hash)


def _check_config(config: Any, location: str) -> None:
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        problem = f"{location} normalises its latents by channel, which is not supported"
        remedy = "use one with a scaling_factor alone, such as stabilityai/sd-vae-ft-ema"
        raise refusal("--vae", but=problem, remedy=remedy)
    if config.in_channels != config.out_channels:
        takes = f"{location} takes {config.in_channels} and gives {config.out_channels} channels"
        raise refusal("--vae", but=takes, remedy="use one with as many of both")
