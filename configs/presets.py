"""Presets by name. The file that defines a preset is imported when the preset is first used."""

import collections
import dataclasses
import importlib
import math
from collections.abc import Collection

import families  # noqa: F401 (registers them)
from dnnlib.config import did_you_mean
from models import ModelConfig
from training.config import RunConfig, TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The configuration of a run, and the class count to assume before its data are opened."""

    run: RunConfig
    num_classes: int  # Of the dataset that the preset is meant for, used with --cond.
    source: str  # Where the settings come from.


class _Presets(collections.UserDict):
    """Presets by name. Each starts as the name of its file, which is imported on first use."""

    def __getitem__(self, name: str) -> Preset:
        preset = super().__getitem__(name)
        if isinstance(preset, str):
            preset = self[name] = importlib.import_module(f"configs.{preset}").PRESETS[name]
        return preset


_NAMES = {
    "diffit": ("cifar10", "cifar10-l4", "ffhq64", "photos64", "digits"),
    "latent_diffit": (
        *("imagenet256", "imagenet256-d30", "imagenet256-l", "imagenet256-b", "imagenet256-s"),
        *("imagenet512", "imagenet512-d30", "digits-latent"),
    ),
    "set_dit": (
        *("fsdm-cifar100-film", "fsdm-cifar100-lag", "fsdm-depth6", "fsdm-depth12"),
        *("fsdm-option-a", "fsdm-option-b", "fsdm-option-c", "fsdm-digits"),
        "fsdm-glyphs",
    ),
    "feature_dit": ("nanodit", "nanodit-768", "nanodit-tiny"),
}
PRESETS = _Presets({name: file for file, names in _NAMES.items() for name in names})

# Presets of model families for which other code publishes weights.
PUBLISHED = tuple(name for file, names in _NAMES.items() if file != "diffit" for name in names)

# The preset that --resolution stands for without --preset.
PRESET_OF_RESOLUTION = {32: "cifar10", 64: "ffhq64", 256: "imagenet256", 512: "imagenet512"}


def get_preset(name: str, accepted: Collection[str] = PRESETS) -> Preset:
    """Return a preset by name; raises ValueError that suggests one of ``accepted`` otherwise."""
    if name not in PRESETS:
        near = did_you_mean(name, accepted)
        raise ValueError(f"--preset: got {name!r}; accepted: {', '.join(accepted)}.{near}")
    return PRESETS[name]


def preset_of_model(name: str, mode_conditioning: str | None = None) -> str:
    """Return the preset for the name of a model in earlier code, or the name unchanged.

    ``mode_conditioning`` selects one of the presets of few-shot diffusion models.
    """
    if name.replace("-", "_") in ("vfsddpm_jax", "vfsddpm"):
        return "fsdm-cifar100-lag" if mode_conditioning == "lag" else "fsdm-depth6"
    return name


def get_diffit_config(name: str) -> ModelConfig:
    """Return the model configuration of a DiffiT preset, such as ``cifar10``.

    Raises ValueError for an unknown name.
    """
    models = {}
    for file in ("diffit", "latent_diffit"):
        models.update(importlib.import_module(f"configs.{file}").MODELS)
    if name not in models:
        near = did_you_mean(name, models)
        raise ValueError(f"Unknown DiffiT preset {name!r}; accepted: {', '.join(models)}.{near}")
    return models[name]


def get_training_config(name: str) -> TrainingConfig:
    """Return the training settings of a preset, such as ``cifar10``.

    Raises ValueError for an unknown name.
    """
    return get_preset(name).run.training


def half_life_kimg(beta: float, batch: int) -> float:
    """Return the half-life, in kimg, of an EMA with decay ``beta`` per step of ``batch`` images."""
    return batch * math.log(0.5) / math.log(beta) / 1000
