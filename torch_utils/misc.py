"""Counting what a module holds and computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of parameter values of a module, on any device including meta."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(function: Callable[[], Any]) -> int:
    """Return the floating-point operations of matrix products and convolutions in a call.

    A multiply-add counts as two. Works on the meta device, without computing anything.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()
