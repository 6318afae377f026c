"""The settings that curves depend on, and the differences that make two runs incomparable."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dnnlib.config import identity
from training.config import RunConfig

# The seed, in which the runs of a reference differ, and settings on which curves do not depend:
# further averages of the weights, and where the data are.
_FREE = ("training.seed", "training.ema_stds", "data.data")
# Made anew wherever data are prepared, and never equal to the last digit.
_MADE_ANEW = ("model.vae_hash", "model.visual_hash", "model.text_hash", "model.latent_scale")
_FIRST_WEIGHTS = "transfer"  # Hash of the weights that a run starts from, if it does.
_AVERAGE = ("training.ema_kimg", "training.ema_rampup")
# Why curves differ where a setting does, by the beginning of its name; the first match counts.
_REASONS = (
    ("precond.", "the loss is a different quantity, or covers different noise levels"),
    ("training.loss_scaling", "the gradient norm is in other units"),
    (
        "training.batch",
        "a step takes different gradients, so the same number of images has a different effect",
    ),
    ("training.lr", "it learns at a different pace"),
    ("training.kimg", "the learning rate falls over a different duration"),
    ("training.iters", "the learning rate falls over a different duration"),
    ("training.", "each step is different"),
    ("model.", "it is a different network"),
    ("data", "different data have a different loss"),
    (_FIRST_WEIGHTS, "it begins with the weights of another run"),
    ("distillation.", "students learn from a teacher, not from data"),
    ("", "the task is different"),
)


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What identifies training data; None or 0 where it is not known."""

    name: str | None = None
    num_images: int | None = None
    content_hash: str | None = None
    class_names: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the settings of a run differ from those of the reference.

    Attributes:
        differences: One clause for each difference that makes curves incomparable.
        notes: One clause for each difference that changes curves little.
        same_average: Whether weights are averaged alike: validation and scores are of averages.
    """

    differences: list[str]
    notes: list[str]
    same_average: bool = True


def deciding_settings(config: RunConfig, origin: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the settings that a run's curves depend on, except for its data, as JSON by name.

    ``origin`` is what ``training_options.json`` says about the run's first weights.
    """
    found = {name: value for name, value in identity(config).items() if name not in _FREE}
    found[_FIRST_WEIGHTS] = (origin or {}).get("transfer")
    return {name: json.dumps(_plain(value)) for name, value in found.items()}


def _plain(value: Any) -> Any:
    """Return a value in which 154.0 is 154: command lines can give a number either way."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def compare_settings(
    own: Mapping[str, str], reference: Mapping[str, str], data: DataFacts, data_there: DataFacts
) -> Comparison:
    """Return how a run differs from a reference; settings are :func:`deciding_settings`'s."""
    changed = [n for n in {**reference, **own} if own.get(n) != reference.get(n)]
    differences = [
        f"{name} is {_short(own.get(name))} here and {_short(reference.get(name))} there: "
        f"{_reason(name)}"
        for name in changed
        if name not in (*_MADE_ANEW, *_AVERAGE, "training.precision")
    ]
    notes = []
    if "training.precision" in changed:
        here, there = (_short(side.get("training.precision")) for side in (own, reference))
        notes.append(f"precision is {here} here and {there} there")
    anew = [name.partition(".")[2] for name in changed if name in _MADE_ANEW]
    if anew:
        notes.append(f"encoders were made anew ({', '.join(anew)})")
    found = _compare_data(data, data_there)
    if found:
        (differences if found.is_other else notes).append(found.text)
    return Comparison(differences, notes, not set(changed) & set(_AVERAGE))


@dataclasses.dataclass(frozen=True)
class _DataDifference:
    text: str
    is_other: bool


def _compare_data(own: DataFacts, there: DataFacts) -> _DataDifference | None:
    if own.num_images != there.num_images:
        text = f"the data hold {own.num_images or 'an unknown number of'} images here and "
        return _DataDifference(f"{text}{there.num_images} there: {_reason('data')}", True)
    if own.class_names is not None and own.class_names != there.class_names:
        text = "the data have other classes here than there"
        return _DataDifference(f"{text}: {_reason('data')}", True)
    if own.content_hash != there.content_hash:
        return _DataDifference("the data are other files, as many as there", False)
    return None


def _reason(name: str) -> str:
    return next(reason for start, reason in _REASONS if name.startswith(start))


def _short(text: str | None) -> str:
    text = "unset" if text in (None, "null") else text.strip('"')
    return text if len(text) <= 40 else f"{text[:37]}..."
