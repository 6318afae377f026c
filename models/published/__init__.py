"""Weights as other code publishes them: one file per layout of names, found by the family."""

import importlib

from models.published.layout import Layout

# Families of models whose published weights are read, and the modules that say how.
_MODULES = {
    "latent-diffit": "models.published.latent_diffit",
    "set-dit": "models.published.set_dit",
    "feature-dit": "models.published.feature_dit",
}


def layouts() -> dict[str, Layout]:
    """Return all layouts by the family of their models."""
    return {family: importlib.import_module(name).LAYOUT for family, name in _MODULES.items()}
