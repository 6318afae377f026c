"""Weights that other code publishes: one file per layout of names, found by the model's family."""

import importlib

from models.published.layout import Layout

# Families of models whose published weights can be read, and the modules of their layouts.
_MODULES = {
    "latent-diffit": "models.published.latent_diffit",
    "set-dit": "models.published.set_dit",
    "feature-dit": "models.published.feature_dit",
}


def layouts() -> dict[str, Layout]:
    """Return all layouts, by the family of their models."""
    return {family: importlib.import_module(name).LAYOUT for family, name in _MODULES.items()}
