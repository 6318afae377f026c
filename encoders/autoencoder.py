"""The autoencoder of latent models: diffusers' AutoencoderKL with its normalisation."""

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models import ModelConfig, ScaledLatentConfig
from torch_utils import distributed
from torch_utils.fingerprints import weights_hash

INPUT_TRANSFORM = "x / 127.5 - 1"
PRECISIONS = ("fp32", "bf16")
_MAX_PIXELS = 16 * 256 * 256  # That a network sees at once; bounds the memory of its activations.
_CLASS_NAME = "AutoencoderKL"
# What the function depends on besides the weights and their shapes.
_SETTINGS = ("act_fn", "norm_num_groups", "down_block_types", "up_block_types")
_HINT = "Give --vae=FOLDER with config.json and diffusion_pytorch_model.safetensors."


class Autoencoder:
    """An AutoencoderKL: images to moments of raw latents, normalised latents to images.

    Networks compute in float32, with bfloat16 products if so loaded, whatever autocast the caller
    is in. They see at most 16 images of 256x256, or as many pixels of another size, at once, so
    that memory does not grow with a batch; what an image gives depends on that by rounding alone.

    Attributes:
        location: Folder or Hugging Face id that it came from.
        scale, shift: The normalised latent is (raw - shift) * scale.
        latent_channels: Channels c of a latent.
        downsampling: Pixels per latent value, in each direction.
        img_channels: Channels C of an image.
        sha256: Identity of weights, settings and normalisation.
        device: Where it computes.
    """

    def __init__(
        self, network: nn.Module, location: str, device: torch.device | str, precision: str = "fp32"
    ) -> None:
        """``network`` is a ``diffusers.AutoencoderKL``; raises ValueError if it does not fit."""
        if precision not in PRECISIONS:
            raise ValueError(f"Precision {precision!r}; accepted: {', '.join(PRECISIONS)}.")
        config = network.config
        _check_config(config, location)
        self.location = location
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0)
        self.latent_channels = config.latent_channels
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.img_channels = config.in_channels
        self.sha256 = self._identity(network)
        self.device = torch.device(device)
        self._precision = precision
        self._network = network.eval().requires_grad_(False).to(self.device)

    def _identity(self, network: nn.Module) -> str:
        settings = {name: network.config[name] for name in _SETTINGS}
        settings.update(scale=self.scale, shift=self.shift)
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(f"{text}\n{weights_hash(network.state_dict())}".encode()).hexdigest()

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return the shape [c, h, w] of the latent of a square image."""
        side = resolution // self.downsampling
        return self.latent_channels, side, side

    def check_images(self, name: str, resolution: int, img_channels: int) -> None:
        """Raise ValueError if images of this size, called ``name``, cannot be encoded."""
        if img_channels != self.img_channels:
            raise ValueError(
                f"{name}: holds images of {img_channels} channel(s), but the autoencoder "
                f"{self.location} takes {self.img_channels} (grayscale 1, RGB 3); choose data or "
                "an autoencoder of the other kind."
            )
        if resolution % self.downsampling:
            raise ValueError(
                f"{name}: holds images of {resolution}x{resolution}, but the autoencoder "
                f"{self.location} takes multiples of {self.downsampling}; convert them with "
                "dataset_tool.py convert --resolution=N."
            )

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the raw latents, float32 [N, 2c, h, w].

        ``images`` are uint8 [N, C, H, W] on any device; the result is on the autoencoder's.
        Nothing here waits for the device.
        """
        assert images.dtype == torch.uint8
        assert images.shape[1] == self.img_channels
        rest = (2 * self.latent_channels, *(size // self.downsampling for size in images.shape[2:]))
        pixels = math.prod(images.shape[2:])
        return self._in_chunks(self._encode, images, pixels, rest)

    def _encode(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32) / 127.5 - 1
        distribution = self._network.encode(x).latent_dist
        return torch.cat([distribution.mean, distribution.std], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images [N, C, H, W], float32 of about [-1, 1], of normalised latents [N, c, h, w].

        They are on the autoencoder's device, and not clipped.
        """
        assert latents.shape[1] == self.latent_channels
        size = [side * self.downsampling for side in latents.shape[2:]]
        return self._in_chunks(self._decode, latents, math.prod(size), (self.img_channels, *size))

    def _decode(self, latents: Tensor) -> Tensor:
        return self._decode_raw(latents.to(torch.float32) / self.scale + self.shift)

    @torch.no_grad()
    def decode_raw(self, raw: Tensor) -> Tensor:
        """Return images as :meth:`decode` does, of latents [N, c, h, w] that are not normalised."""
        size = [side * self.downsampling for side in raw.shape[2:]]
        rest = (self.img_channels, *size)
        return self._in_chunks(self._decode_raw, raw, math.prod(size), rest)

    def _decode_raw(self, raw: Tensor) -> Tensor:
        return self._network.decode(raw.to(torch.float32)).sample

    def _in_chunks(
        self,
        function: Callable[[Tensor], Tensor],
        values: Tensor,
        pixels: int,
        rest: tuple[int, ...],
    ) -> Tensor:
        """Return ``function`` of all rows, float32 [N, *rest], a few images at a time."""
        device, bf16 = self.device, self._precision == "bf16"
        result = torch.empty((len(values), *rest), dtype=torch.float32, device=device)
        size = max(_MAX_PIXELS // pixels, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for first in range(0, len(values), size):
                part = values[first : first + size].to(device, non_blocking=True)
                result[first : first + size] = function(part)
        return result


def normalise(
    moments: Tensor, noise: Tensor | None, scale: float, shift: float, channels: int
) -> Tensor:
    """Return the latents that a model sees, (mean + std * noise - shift) * scale, in float32.

    Args:
        moments: [N, 2c, h, w], mean then standard deviation of raw latents, or [N, c, h, w], the
            mean alone.
        noise: Standard normal values [N, c, h, w]; None for the mean, which alone takes none.
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
    location: str,
    device: torch.device | str,
    *,
    expected_hash: str | None = None,
    precision: str = "fp32",
) -> Autoencoder:
    """Return an autoencoder from a local folder or a Hugging Face id. Collective: rank 0 reads.

    Only tensors in the safetensors format are read, and no code that comes with them.

    Args:
        expected_hash: The ``sha256`` it must have, if its latents are in use already.
        precision: One of PRECISIONS, that of the networks' products.

    Raises ValueError, one sentence with the remedy, if there is none, or another one.
    """
    location = os.path.abspath(location) if os.path.isdir(location) else str(location)
    box: list[nn.Module] = []

    def read() -> dict[str, Any]:
        box.append(_read(location))
        return {"config": dict(box[0].config), "state": box[0].state_dict()}

    tree = distributed.on_main_tree(read)
    network = box[0] if box else _rebuild(tree["config"], tree["state"])
    autoencoder = Autoencoder(network, location, device, precision)
    if expected_hash is not None and autoencoder.sha256 != expected_hash:
        raise ValueError(
            f"--vae: {location} is another autoencoder ({autoencoder.sha256[:16]}...) than the one "
            f"whose latents are in use ({expected_hash[:16]}...); give that one's folder or id."
        )
    return autoencoder


def _rebuild(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    import diffusers

    # Initial values that are overwritten must not advance this rank's random numbers.
    with torch.random.fork_rng(devices=[]), _quiet():
        network = diffusers.AutoencoderKL.from_config(config)
    network.load_state_dict(state)
    return network


def _read(location: str) -> nn.Module:
    check_location(location)
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--vae: autoencoders need the package {error.name}, which is not installed: pip "
            'install diffusers, or pip install "setdiffit[latents]".'
        ) from None
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            config = diffusers.AutoencoderKL.load_config(location)
            kind = config.get("_class_name") if isinstance(config, dict) else config
            if kind != _CLASS_NAME:
                raise ValueError(f"config.json names {kind!r}, not {_CLASS_NAME}")
            network, info = diffusers.AutoencoderKL.from_pretrained(
                location,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])
                raise ValueError(f"{len(missing)} weights are missing, as {missing[0]}")
        # A missing, damaged or foreign file makes it raise what has no common base.
        except Exception as error:
            problem = "cannot be used"
            if not os.path.isdir(location):
                problem = "is no folder, and cannot be fetched from Hugging Face"
            raise ValueError(f"--vae: {location} {problem} ({_reason(error)}). {_HINT}") from error
    return network


def check_location(location: str) -> None:
    """Raise ValueError if there cannot be an autoencoder; cheap, and blind to what a file holds."""
    if not os.path.isdir(location):
        if location.count("/") != 1 or location[0] in "./~":
            raise ValueError(f"--vae: {location} is no folder and no Hugging Face id. {_HINT}")
        return
    if os.path.isfile(os.path.join(location, "config.json")):
        return
    inner = os.path.join(location, "vae")
    if os.path.isfile(os.path.join(inner, "config.json")):
        raise ValueError(f"--vae: {location} is a whole pipeline; give --vae={inner}.")
    raise ValueError(f"--vae: {location} holds no autoencoder (no config.json). {_HINT}")


def _check_config(config: Any, location: str) -> None:
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError(
            f"--vae: {location} normalises its latents by channel, which is not supported; use one "
            "with a scaling_factor alone, such as stabilityai/sd-vae-ft-ema."
        )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"--vae: {location} takes {config.in_channels} and gives {config.out_channels} "
            "channels; use one with as many of both."
        )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join(line.rstrip(".:") for line in lines[:2]) if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep reports, warnings and progress bars of the library, and of the hub, off the console."""
    from diffusers.utils import logging
    from huggingface_hub.utils import logging as hub_logging

    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if had_bars:
            logging.enable_progress_bar()


def open_autoencoder(
    model: ModelConfig, vae: str | None, device: torch.device
) -> Autoencoder | None:
    """Return the autoencoder of a latent model, or None for a model of pixels.

    ``vae`` says where it is now, if not where ``model`` has it. Raises ValueError if it is not
    there, is not the one that the latents are of, or if a model of pixels is given one.
    """
    if not isinstance(model, ScaledLatentConfig):
        if vae is not None:
            raise ValueError(f"--vae: got {vae}, but this model makes images without one.")
        return None
    location = vae or model.vae
    if location is None:
        raise ValueError("--vae is missing: name the autoencoder that decodes the latents.")
    autoencoder = load_autoencoder(location, device, expected_hash=model.vae_hash)
    check_autoencoder(model, autoencoder)
    return autoencoder


def check_autoencoder(model: ScaledLatentConfig, autoencoder: Autoencoder) -> None:
    """Raise ValueError if an autoencoder's latents or images are not those of a model."""
    for what, option, own, there in (
        ("channels of the latents", "--latent-channels", model.latent_channels, "latent_channels"),
        ("downsampling", "--latent-downsampling", model.latent_downsampling, "downsampling"),
        ("channels of the images", None, model.img_channels, "img_channels"),
        ("scale", None, model.latent_scale, "scale"),
        ("shift", None, model.latent_shift, "shift"),
    ):
        found = getattr(autoencoder, there)
        if found != own:
            remedy = "use the one that the model was made for"
            if option is not None:
                remedy += f", or train with {option}={found}"
            raise ValueError(
                f"--vae: {autoencoder.location} has {what} {found:g}, but the model has {own:g}; "
                f"{remedy}."
            )
