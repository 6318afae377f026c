"""Presets by name."""

from configs.presets import PRESETS, get_diffit_config, get_preset, get_training_config

__all__ = ["PRESETS", "get_diffit_config", "get_preset", "get_training_config"]
