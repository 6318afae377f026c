"""How frozen networks are loaded from Hugging Face ids and folders."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from encoders.autoencoder import PRECISIONS
from torch_utils import distributed
from torch_utils.fingerprints import weights_hash

# What in a configuration has no influence on what a network computes.
_BOOKKEEPING = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


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
