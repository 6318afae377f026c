"""Presets by name. A family's file is imported when one of its presets is asked for."""

import importlib
from collections.abc import Iterator, Mapping, MutableMapping

import families  # noqa: F401 (registers them)
from configs.preset import Preset
from dnnlib.config import did_you_mean
from models import ModelConfig
from training.config import TrainingConfig


class _Presets(MutableMapping[str, Preset]):
    """Presets in the order of their files; names are known without importing these."""

    def __init__(self, files: Mapping[str, tuple[str, ...]]) -> None:
        self._file_of = {name: file for file, names in files.items() for name in names}
        self._added: dict[str, Preset] = {}

    def __getitem__(self, name: str) -> Preset:
        if name in self._added:
            return self._added[name]
        return importlib.import_module(f"configs.{self._file_of[name]}").PRESETS[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._file_of, **self._added})

    def __len__(self) -> int:
        return len({*self._file_of, *self._added})

    def __setitem__(self, name: str, preset: Preset) -> None:
        self._added[name] = preset

    def __delitem__(self, name: str) -> None:
        del self._added[name]


PRESETS = _Presets(
    {
        "diffit": ("cifar10", "cifar10-l4", "ffhq64", "digits"),
        "latent_diffit": (
            *("imagenet256", "imagenet256-d30", "imagenet256-l", "imagenet256-b", "imagenet256-s"),
            *("imagenet512", "imagenet512-d30", "digits-latent"),
        ),
        "set_dit": (
            *("fsdm-cifar100-film", "fsdm-cifar100-lag", "fsdm-depth6", "fsdm-depth12"),
            *("fsdm-option-a", "fsdm-option-b", "fsdm-option-c", "fsdm-digits"),
        ),
        "feature_dit": ("nanodit", "nanodit-768", "nanodit-tiny"),
    }
)

# What --resolution alone means.
PRESET_OF_RESOLUTION = {32: "cifar10", 64: "ffhq64", 256: "imagenet256", 512: "imagenet512"}


def get_preset(name: str) -> Preset:
    """Return a preset; raises ValueError that suggests the nearest name."""
    if name not in PRESETS:
        raise ValueError(
            f"--preset: got {name!r}; accepted: {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]


def preset_of_model(name: str, mode_conditioning: str | None = None) -> str:
    """Return the preset that a name stands for: its own, or that of a model of earlier code.

    ``mode_conditioning`` decides between those of few-shot diffusion models.
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
        raise ValueError(
            f"Unknown DiffiT preset {name!r}; accepted: {', '.join(models)}."
            f"{did_you_mean(name, models)}"
        )
    return models[name]


def get_training_config(name: str) -> TrainingConfig:
    """Return the training settings of a preset, such as ``cifar10``."""
    return get_preset(name).run.training
