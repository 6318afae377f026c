"""The encoders of features, through Hugging Face's transformers: DINOv3 for images, T5 for text."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils import distributed
from training.autoencoder import PRECISIONS
from training.buckets import Bucket
from training.checkpoint import weights_hash

MAX_TOKENS = 512  # Of a caption, the end of sequence included.
# Channel statistics that visual encoders are trained with, of values in [0, 1].
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MAX_PIXELS = 16 * 1024 * 1024  # That a network sees at once; bounds the memory of activations.
_MAX_BATCH_TOKENS = 16 * MAX_TOKENS  # Likewise, padding included.
# What in a configuration has no influence on what a network computes.
_BOOKKEEPING = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


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


class TextEncoder:
    """The encoder half of a T5 with its tokenizer: captions to hidden states (arXiv:1910.10683).

    It computes in float32, or with the matrices and products in bfloat16 if so loaded, which also
    halves its memory.

    Attributes:
        location: Folder or Hugging Face id that it came from.
        dim: Channels T of a hidden state.
        max_tokens: Most tokens of a caption, the end of sequence included.
        sha256: Identity of weights, configuration and tokenizer.
        device: Where it computes.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        location: str,
        device: torch.device | str,
        precision: str = "fp32",
    ) -> None:
        """``network`` is a ``transformers.T5EncoderModel``; raises ValueError if both do not fit.

        ``tokenizer`` is a fast tokenizer of transformers.
        """
        _check_precision(precision)
        if not tokenizer.is_fast:
            raise ValueError(
                f"--text: {location} has no fast tokenizer; add its tokenizer.json to the folder."
            )
        if len(tokenizer) > network.config.vocab_size:
            raise ValueError(
                f"--text: {location} has a tokenizer of {len(tokenizer)} tokens, but the network "
                f"knows {network.config.vocab_size}; put the tokenizer of this network there."
            )
        self.location = location
        self.dim = int(network.config.d_model)
        self.max_tokens = MAX_TOKENS
        self.sha256 = _identity(network, tokenizer.backend_tokenizer.to_str())
        self.device = torch.device(device)
        self._precision = precision
        self._tokenizer = tokenizer
        self._network = network.eval().requires_grad_(False)
        if precision == "bf16":
            for module in network.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self._network.to(self.device)

    def tokenize(self, captions: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the tokens of each caption, and whether it had more than are kept.

        Of those that had, the last token is the end of sequence, if the tokenizer adds one.
        Raises ValueError for a caption without any token.
        """
        if not len(captions):
            return [], []
        rows = self._tokenizer(list(captions), truncation=False, padding=False)["input_ids"]
        truncated = [len(row) > self.max_tokens for row in rows]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(
                    f"--text: the tokenizer of {self.location} gives no token for the caption "
                    f"{captions[index]!r}; use one that adds an end of sequence."
                )
            if truncated[index]:
                end = row[-1:] if row[-1] == self._tokenizer.eos_token_id else []
                rows[index] = row[: self.max_tokens - len(end)] + end
        return rows, truncated

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Return hidden states [N, L, T], float32, a mask [N, L] of them, and a number.

        L is the largest number of tokens among the captions. The mask is True where there is a
        token; other hidden states are zero. The number is of the captions that were cut to
        ``max_tokens``.
        """
        rows, truncated = self.tokenize(captions)
        longest = max(map(len, rows), default=0)
        ids = torch.zeros((len(rows), longest), dtype=torch.int64)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        ids, mask = ids.to(self.device), mask.to(self.device)
        shape = (*ids.shape, self.dim)
        hidden = torch.empty(shape, dtype=torch.float32, device=self.device)
        size = max(_MAX_BATCH_TOKENS // max(longest, 1), 1)
        bf16 = self._precision == "bf16"
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            # With bfloat16, sums and norms between the matrices are in float32 all the same.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                out = self._network(input_ids=ids[part], attention_mask=mask[part].long())
            hidden[part] = out.last_hidden_state
        return hidden.masked_fill_(~mask[:, :, None], 0), mask, sum(truncated)


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


def load_text_encoder(
    location: str,
    device: torch.device | str,
    *,
    expected_hash: str | None = None,
    precision: str = "fp32",
) -> TextEncoder:
    """Return a text encoder and its tokenizer, as :func:`load_visual_encoder`. Collective."""
    location = _absolute(location)

    def read() -> TextEncoder:
        network = _read(location, "T5EncoderModel", ("t5",), "--text")
        return TextEncoder(network, _read_tokenizer(location), location, device, precision)

    return _checked(_in_turn(read), expected_hash, "--text")


def check_location(location: str, option: str) -> None:
    """Raise ValueError if there cannot be an encoder; cheap, and blind to what a file holds."""
    if os.path.isdir(location):
        if not os.path.isfile(os.path.join(location, "config.json")):
            raise ValueError(
                f"{option}: {location} holds no encoder (no config.json). {_hint(option)}"
            )
    elif location.count("/") != 1 or location[0] in "./~":
        raise ValueError(
            f"{option}: {location} is no folder and no Hugging Face id. {_hint(option)}"
        )


def _hint(option: str) -> str:
    files = "config.json and model.safetensors"
    if option == "--text":
        files = "config.json, model.safetensors and tokenizer.json"
    return f"Give {option}=FOLDER with {files}."


def _absolute(location: str) -> str:
    return os.path.abspath(location) if os.path.isdir(location) else str(location)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"Precision {precision!r}; accepted: {', '.join(PRECISIONS)}.")


def _in_turn(read: Callable[[], Any]) -> Any:
    """Return what ``read`` gives on this rank; rank 0 fetches what the others find on the disk."""
    box = []
    for turn in (True, False):
        with distributed.together():
            if distributed.is_main() == turn:
                box.append(read())
    return box[0]


def _checked(encoder: Any, expected_hash: str | None, option: str) -> Any:
    if expected_hash is not None and encoder.sha256 != expected_hash:
        raise ValueError(
            f"{option}: {encoder.location} is another encoder ({encoder.sha256[:16]}...) than the "
            f"one whose features are in use ({expected_hash[:16]}...); give that one's folder or "
            "id."
        )
    return encoder


def _identity(network: nn.Module, *others: str) -> str:
    config = {k: v for k, v in network.config.to_dict().items() if k not in _BOOKKEEPING}
    text = json.dumps(config, sort_keys=True, default=str)
    parts = (type(network).__name__, text, weights_hash(network.state_dict()), *others)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(location: str, class_name: str, kinds: tuple[str, ...], option: str) -> nn.Module:
    check_location(location, option)
    transformers = _import(option)
    with _unusable(location, option), _quiet(transformers):
        kind = transformers.PretrainedConfig.get_config_dict(location)[0].get("model_type")
        if kind not in kinds:
            raise ValueError(f"it holds a model of type {kind!r}, not {' or '.join(kinds)}")
        # Initial values that are overwritten must not advance this rank's random numbers.
        with torch.random.fork_rng(devices=[]):
            network, info = getattr(transformers, class_name).from_pretrained(
                location,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa" if class_name.startswith("DINO") else "eager",
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
                raise ValueError(f"{len(keys)} weights {problem}: {', '.join(sorted(keys)[:3])}")
    return network


def _read_tokenizer(location: str) -> Any:
    transformers = _import("--text")
    with _unusable(location, "--text"), _quiet(transformers):
        return transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=False)


def _import(option: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option}: encoders need the package {error.name}, which is not installed: pip "
            'install transformers, or pip install "setdiffit[features]".'
        ) from None
    return transformers


@contextlib.contextmanager
def _unusable(location: str, option: str) -> Iterator[None]:
    try:
        yield
    # A missing, damaged or foreign file makes the library raise what has no common base.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        problem = "cannot be used"
        if not os.path.isdir(location):
            problem = "is no folder, and cannot be fetched from Hugging Face"
        raise ValueError(f"{option}: {location} {problem} ({reason}). {_hint(option)}") from error


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
