"""Whether one computation may stand for another, tried on tensors where it will run: the rule of every fast path.

Outputs and gradients may err at most twice as much as those of what is replaced, against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

FLOOR = 1e-6
"""Relative error that is always allowed: some computations are exact by luck."""


def outcome(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output of ``function``, and the gradients of ``tensors`` for a fixed readout of it; nothing of theirs is kept."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    readout(out).backward()
    return [out.detach(), *(cast(Tensor, leaf.grad) for leaf in leaves)]


def readout(out: Tensor) -> Tensor:
    """A number that depends on all of ``out``, always in the same way."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return (out * weights.to(out)).sum()


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, and absolute where the truth is 0; infinite where something is no number."""
    size = float(truth.norm())
    distance = float((found.double() - truth).norm()) / (size or 1.0)
    return distance if math.isfinite(distance) else math.inf


def within(found: Sequence[Tensor], truth: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    pairs = zip(found, truth, bounds, strict=False)
    return len(found) == len(truth) and all(error(a, b) <= bound for a, b, bound in pairs)


def no_worse(ours: Sequence[Tensor], theirs: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
    """Whether each of ``ours`` errs at most twice as much as that of ``theirs``."""
    return within(ours, truth, [2 * error(a, b) + FLOOR for a, b in zip(theirs, truth, strict=True)])
