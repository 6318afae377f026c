"""Vision transformers as detectors, through Hugging Face's transformers: DINOv2 and CLIP."""

import contextlib
import math
import os
import types
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from metrics.network import NetworkDetector
from torch_utils import distributed

DINOV2_LOCATION = "facebook/dinov2-large"
DINOV2_SIZE = 224
CLIP_LOCATION = "openai/clip-vit-large-patch14-336"
# Channel statistics that the networks were trained with, of values in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"
# What features depend on that the weights do not show.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")


class _VisionTransformer(NetworkDetector):
    """A transformer that sees images resized to a square, normalised channel by channel."""

    def __init__(
        self,
        network: nn.Module,
        device: torch.device | str,
        *,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_features: int,
        precision: str = "float32",
    ) -> None:
        self.outputs = types.MappingProxyType({"features": num_features})
        self._size = size
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]
        self.preprocessing = f"antialiased bicubic to {size}, (x / 255 - mean) / std"
        settings = {setting: getattr(network.config, setting) for setting in _SETTINGS}
        identity = f"{self.name}, {self.preprocessing}, {mean}, {std}, {settings}"
        super().__init__(network, device, identity=identity, precision=precision)

    def _preprocess(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.interpolate(
            images.to(torch.float32), (self._size, self._size), mode="bicubic", antialias=True
        )
        return (x / 255 - self._mean) / self._std


class DinoV2Detector(_VisionTransformer):
    """The normalised CLS token of DINOv2 at 224x224, for FD-DINOv2.

    Sources: Oquab et al., arXiv:2304.07193 (network); Stein et al., arXiv:2306.04675 (use as a
    metric); preprocessing as in EDM2 (arXiv:2312.02696).
    """

    name = "dinov2"

    def __init__(
        self, network: nn.Module, device: torch.device | str, precision: str = "float32"
    ) -> None:
        """``network`` is a ``transformers.Dinov2Model``; its position embeddings are resized."""
        embeddings = network.embeddings
        grid = DINOV2_SIZE // network.config.patch_size
        embeddings.position_embeddings = nn.Parameter(
            resize_positions(embeddings.position_embeddings.detach(), grid)
        )
        super().__init__(
            network,
            device,
            size=DINOV2_SIZE,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_features=network.config.hidden_size,
            precision=precision,
        )

    @classmethod
    def load(
        cls, location: str | None, device: torch.device | str, precision: str = "float32"
    ) -> "DinoV2Detector":
        """Return the detector with weights from a local folder or a Hugging Face id. Collective."""
        network = _load(location or DINOV2_LOCATION, "Dinov2Model", ("dinov2",), "--dinov2")
        return cls(network, device, precision)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        return {"features": self._network(pixel_values=x).last_hidden_state[:, 0]}


class ClipDetector(_VisionTransformer):
    """CLIP's image embedding, scaled to unit length, for CMMD.

    Sources: Radford et al., arXiv:2103.00020 (network); Jayasumana et al., arXiv:2401.09603 (use as
    a metric).
    """

    name = "clip"

    def __init__(
        self, network: nn.Module, device: torch.device | str, precision: str = "float32"
    ) -> None:
        """``network`` is a ``transformers.CLIPVisionModelWithProjection``."""
        super().__init__(
            network,
            device,
            size=network.config.image_size,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            num_features=network.config.projection_dim,
            precision=precision,
        )

    @classmethod
    def load(
        cls, location: str | None, device: torch.device | str, precision: str = "float32"
    ) -> "ClipDetector":
        """Return the detector with weights from a local folder or a Hugging Face id. Collective."""
        kinds = ("clip", "clip_vision_model")
        network = _load(location or CLIP_LOCATION, "CLIPVisionModelWithProjection", kinds, "--clip")
        return cls(network, device, precision)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        embeddings = self._network(pixel_values=x).image_embeds.float()
        return {"features": nn.functional.normalize(embeddings, dim=1)}


def resize_positions(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Return position embeddings [1, 1 + n^2, D] for a grid [1, 1 + grid^2, D], the CLS one first.

    As in DINOv2's own code: bicubic, without averaging, by the scale (grid + 0.1) / n, whose offset
    once guarded against rounding. transformers resizes to the exact grid instead, which gives
    slightly different features; a published FD-DINOv2 comes from the former.
    """
    length = math.isqrt(positions.shape[1] - 1)
    if length == grid:
        return positions.clone()
    patches = positions[:, 1:].unflatten(1, (length, length)).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(
        patches.to(torch.float32), scale_factor=(grid + 0.1) / length, mode="bicubic"
    )
    assert patches.shape[2:] == (grid, grid)
    return torch.cat([positions[:, :1], patches.flatten(2).permute(0, 2, 1)], dim=1)


def _load(location: str, class_name: str, kinds: tuple[str, ...], option: str) -> nn.Module:
    """Return a pretrained network of transformers on the CPU. Collective: rank 0 reads.

    Only tensors are read from its files, and no code that comes with them.
    """
    box: list[nn.Module] = []

    def read() -> dict[str, Any]:
        box.append(_read(location, class_name, kinds, option))
        return {"config": box[0].config.to_dict(), "state": box[0].state_dict()}

    tree = distributed.on_main_tree(read)
    if box:
        return box[0]
    import transformers

    network_class = getattr(transformers, class_name)
    config = network_class.config_class.from_dict(tree["config"])
    # Initial values that are overwritten must not advance this rank's random numbers.
    with torch.random.fork_rng(devices=[]):
        network = network_class._from_config(config, attn_implementation="sdpa")
    network.load_state_dict(tree["state"])
    return network


def _read(location: str, class_name: str, kinds: tuple[str, ...], option: str) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError(
            f"{option}: this detector needs the package transformers, which is not installed: pip "
            'install transformers, or pip install "setdiffit[detectors]".'
        ) from None
    hint = f"Give a folder with config.json and weights by {option}=FOLDER."
    if not os.path.isdir(location) and (location.count("/") != 1 or location[0] in "./~"):
        raise ValueError(f"{option}: {location} is no folder and no Hugging Face id. {hint}")
    with _quiet(transformers):
        try:
            kind = transformers.PretrainedConfig.get_config_dict(location)[0].get("model_type")
            if kind not in kinds:
                raise ValueError(f"it holds a model of type {kind!r}, not {' or '.join(kinds)}")
            network, info = getattr(transformers, class_name).from_pretrained(
                location,
                # Where a folder has safetensors, those; CLIP's published one has a pickle, of which
                # only tensors are read.
                weights_only=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # They are refused below, by name.
                output_loading_info=True,
            )
            # Versions before 5 give names alone, later ones names with both shapes.
            misfits = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
            problems = {
                "have other shapes than config.json says": misfits,
                "are missing": info["missing_keys"],
            }
            for problem, keys in problems.items():
                if keys:
                    raise ValueError(
                        f"{len(keys)} weights {problem}: {', '.join(sorted(keys)[:3])}"
                    )
        # A missing, damaged or foreign file, or network, makes it raise what has no common base.
        except Exception as error:
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise ValueError(f"{option}: {location} cannot be used ({reason}). {hint}") from error
    return network


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep reports and progress bars of the library, and of its downloads, off the console."""
    from huggingface_hub.utils import logging as hub_logging

    logging = transformers.utils.logging
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    conversion = os.environ.get(_NO_CONVERSION)
    os.environ[_NO_CONVERSION] = "1"  # Else the library asks the hub to convert pickles.
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if conversion is None:
            del os.environ[_NO_CONVERSION]
        else:
            os.environ[_NO_CONVERSION] = conversion
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if had_bars:
            logging.enable_progress_bar()
