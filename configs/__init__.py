"""Presets by name."""

from configs.diffit import get_diffit_config

__all__ = ["get_diffit_config"]
