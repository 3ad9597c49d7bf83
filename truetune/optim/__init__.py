"""Optimizers by name, the parameter groups that they share, and the one way to set their rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from truetune.optim.adamw import adamw
from truetune.optim.groups import parameter_groups

__all__ = ["OPTIMIZERS", "adamw", "parameter_groups", "set_rate"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw}


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
