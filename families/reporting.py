"""Reports on the effect of conditions while a run trains, for every family."""

import torch

from training.config import RunConfig
from training.family import Evaluator, Family


def check_conditions(run: RunConfig) -> None:
    """Raise ValueError for a model without classes, which has no condition to report on."""
    if not run.model.num_classes:
        raise ValueError("This model is unconditional; there is no condition to vary.")


def reporting(
    family: Family, run: RunConfig, evaluator: Evaluator, device: torch.device
) -> Evaluator:
    """Return ``evaluator``, extended to report on conditions if the run asks for that."""
    num = run.logging.report_conditions
    if not num:
        return evaluator
    from evaluation.in_loop.conditions import ConditionsEvaluator

    return ConditionsEvaluator(evaluator, run, lambda: family.panel(run, None, num, device), device)
