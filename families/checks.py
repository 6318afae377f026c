"""Checks of a run that several families share."""

from collections.abc import Collection

from dnnlib.errors import refusal
from training.config import RunConfig


def refuse_augmentation(run: RunConfig, what: str) -> None:
    """Raise ValueError if the run augments ``what``: only pixels can be augmented."""
    augment = run.training.augment.augment
    if augment > 0:
        but, remedy = f"{what} cannot be augmented", "set --augment=0 (--hflip mirrors images)"
        raise refusal("--augment", f"{augment:g}", but=but, remedy=remedy)


def refuse_reference(run: RunConfig, models: str, real: str) -> None:
    """Raise ValueError if --metrics-ref is set for ``models``, which are compared with ``real``."""
    if run.logging.metrics_ref is not None:
        but = f"has no effect on {models}, which are compared with {real}; leave it out"
        raise ValueError(f"--metrics-ref {but}.")


def unconditional(label_drop: float) -> ValueError:
    """Return the ValueError for label dropout in a model without labels."""
    but, remedy = "the model is unconditional", "add --cond, or set --label-drop=0"
    return refusal("--label-drop", label_drop, but=but, remedy=remedy)


def check_metrics(run: RunConfig, given: Collection[str], *, of_supports: bool) -> None:
    """Raise ValueError for metrics of another kind of model, and for detector options without use.

    Args:
        given: Names of the fields that were typed.
        of_supports: Whether the model generates from supports, and so needs metrics that do.
    """
    names, detectors = run.logging.metrics, set()
    if names:
        from metrics.metric import METRICS, get_metrics

        for spec in get_metrics(names):
            if spec.of_supports != of_supports:
                known = [name for name, s in METRICS.items() if s.of_supports == of_supports]
                but = f"preset {run.preset} is {'' if of_supports else 'not '}trained on sets"
                raise refusal("--metrics", spec.name, but=but, accepted=", ".join(known))
            detectors.add(spec.output.detector)
    run.detectors.check_used(given, detectors, f"--metrics={','.join(names) or 'none'}")
