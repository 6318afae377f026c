"""Starting a feature-conditioned model from the weights of another, strictly, with a report."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.files import write_json
from training.checkpoint import Snapshot
from training.config import RunConfig

REPORT_FILE = "warm-start.json"
# What a model without patches lacks.
_PATCH_PARAMETERS = ("conditioner.dino_patch_proj.*", "conditioner.null_dino_patch_token")
_WRAPPERS = ("module.", "_orig_mod.")
_MIN_SHARE = 0.9
_LR_FACTOR = 0.5
_BIAS_STEPS = 2000


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What became of every tensor, by name; shapes are those of the model."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    share: float  # Of the model's parameters that are loaded.
    source: str
    source_hash: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"Warm start from {self.source}: {len(self.loaded)} tensors, {self.share:.1%} of the "
            "parameters."
        ]
        for title, names in (
            ("Missing, kept as initialised", self.missing),
            ("Of another shape, kept as initialised", self.mismatched),
            ("Unexpected, not used", self.unexpected),
        ):
            if names:
                lines.append(f"  {title}: {', '.join(names)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def warm_start(
    network: torch.nn.Module,
    snapshot: Snapshot,
    *,
    allow: Sequence[str] = (),
    statistics: dict[str, Any] | None = None,
) -> WarmStart:
    """Copy the weights of a snapshot whose names and shapes are the network's; return a report.

    Parameters of patches may be missing. Names that match a pattern of ``allow`` may be missing,
    unexpected or of another shape. ``statistics`` are those that features are normalised by.

    Raises ValueError, before anything is copied, for any other difference, or if less than nine
    tenths of the parameters would be loaded.
    """
    own = network.state_dict()
    given = {_stripped(name): tensor for name, tensor in snapshot.state_dict.items()}
    loaded = tuple(name for name in own if name in given and given[name].shape == own[name].shape)
    mismatched = tuple(name for name in own if name in given and name not in loaded)
    missing = tuple(name for name in own if name not in given)
    unexpected = tuple(name for name in given if name not in own)
    refused = {
        "missing": _unmatched(missing, (*_PATCH_PARAMETERS, *allow)),
        "unexpected": _unmatched(unexpected, allow),
        "of another shape": _unmatched(mismatched, allow),
    }
    for what, names in refused.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"--transfer: {names[0]}{more} of {snapshot.path} would be {what}; give a snapshot "
                f"of the same model, or allow it with --transfer-allow='{names[0]}'."
            )
    total = sum(tensor.numel() for tensor in own.values())
    share = sum(own[name].numel() for name in loaded) / max(total, 1)
    if share < _MIN_SHARE:
        raise ValueError(
            f"--transfer: {snapshot.path} gives only {share:.0%} of the parameters of this model; "
            f"at least {_MIN_SHARE:.0%} are needed for a warm start."
        )
    network.load_state_dict({name: given[name] for name in loaded}, strict=False)
    return WarmStart(
        loaded=loaded,
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        share=share,
        source=str(snapshot.path),
        source_hash=snapshot.sha256,
        notes=tuple(_notes(network, snapshot, statistics)),
    )


def save_report(report: WarmStart, run_dir: Path) -> None:
    """Write ``warm-start.json``."""
    write_json(run_dir / REPORT_FILE, dataclasses.asdict(report))


def settle_in(config: RunConfig, source: RunConfig, given: Sequence[str]) -> RunConfig:
    """Return ``config`` with what suits a warm start from a run of ``source``.

    Half the learning rate; and where patches are new, a bias that lets them in over 2,000 steps.
    Settings in ``given`` stay.
    """
    training, features = config.training, config.features
    if "lr" not in given:
        training = dataclasses.replace(training, lr=training.lr * _LR_FACTOR)
    had_patches = getattr(source.model, "use_dino_patches", False)
    if "patch_bias_kimg" not in given and config.model.use_dino_patches and not had_patches:
        kimg = _BIAS_STEPS * training.batch / 1000
        features = dataclasses.replace(features, patch_bias_kimg=kimg)
    return dataclasses.replace(config, training=training, features=features)


def _stripped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _unmatched(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _notes(
    network: torch.nn.Module, snapshot: Snapshot, statistics: dict[str, Any] | None
) -> list[str]:
    """Return what differs besides the weights."""
    notes = []
    for name, what in (("vae", "latents"), ("visual", "visual features"), ("text", "texts")):
        hashes = [getattr(c, f"{name}_hash", None) for c in (network.config, snapshot.config.model)]
        if None not in hashes and hashes[0] != hashes[1]:
            notes.append(f"Its {what} are of another encoder.")
    there = (snapshot.data.features or {}).get("statistics")
    if statistics is not None and there is not None and there != statistics:
        notes.append("Its features were normalised by the statistics of other data.")
    return notes


def transfer_weights(network: torch.nn.Module, snapshot: Snapshot) -> str:
    """Copy every parameter whose name and shape agree, and return a report of the rest.

    Raises ValueError if nothing agrees.
    """
    own = network.state_dict()
    given = snapshot.state_dict
    loaded = [name for name in own if name in given and given[name].shape == own[name].shape]
    missing = [name for name in own if name not in given]
    mismatched = [name for name in own if name in given and name not in loaded]
    unexpected = [name for name in given if name not in own]
    if not loaded:
        raise ValueError(f"--transfer: {snapshot.path} shares no weights with this model.")
    network.load_state_dict({name: given[name] for name in loaded}, strict=False)
    lines = [f"Transfer from {snapshot.path}: {len(loaded)} of {len(own)} tensors loaded."]
    hashes = [getattr(c, "vae_hash", None) for c in (network.config, snapshot.config.model)]
    if None not in hashes and hashes[0] != hashes[1]:
        lines.append("  Its latents are of another autoencoder.")
    for title, names in (
        ("Loaded", _by_module(loaded)),
        ("Missing (kept as initialised)", missing),
        ("Mismatched shape (kept as initialised)", mismatched),
        ("Unexpected (not used)", unexpected),
    ):
        if names:
            lines.append(f"  {title}: {', '.join(names)}")
    return "\n".join(lines)


def _by_module(names: Sequence[str]) -> list[str]:
    """Return names with those of one block (three levels deep) as one, such as ``a.b.0.* (12)``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    return [
        found[0] if len(found) == 1 else f"{group}.* ({len(found)})"
        for group, found in groups.items()
    ]
