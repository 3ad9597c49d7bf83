"""Warm-up, stable, decay: the rate stays at the peak, or at what the tokens so far allow, and falls at the end."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Literal

from truetune.errors import UserError
from truetune.schedules.base import (
    Plan,
    Schedule,
    Staged,
    half_cosine,
    in_steps,
    joined,
    line,
    require_positive,
    require_share,
    sampled,
)

Decay = Literal["linear", "cosine", "1-sqrt", "inverse"]

DECAYS: dict[Decay, Callable[[float, float], float]] = {
    "linear": line,
    "cosine": half_cosine,
    "1-sqrt": lambda q, minimum: 1 - (1 - minimum) * math.sqrt(q),
    "inverse": lambda q, minimum: 1 / (q / minimum + 1 - q),
}
"""(progress of the decay, minimum) -> factor: Hu et al. 2024; Loshchilov & Hutter 2016; Hägele et al. 2024, arXiv
2405.18392; inverse-proportional, the river valley's, Wen et al. 2024, arXiv 2410.05192."""


def wsd(total: int, *, decay: float = 0.1, shape: Decay = "linear", minimum: float = 0.0) -> Schedule:
    """1 until the last ``decay`` (below 1 a share, else steps), then to ``minimum`` (Hu et al. 2024, arXiv
    2404.06395); ``shape`` is how it falls.
    """
    return decayed(total, decay, shape, minimum)


def wsd_s(
    total: int,
    *,
    plan: Plan,
    budgets: tuple[float, ...] = (0.25, 0.5),
    decay: float = 0.1,
    shape: Decay = "inverse",
    minimum: float = 0.1,
) -> Schedule:
    """wsd for several budgets in one branch: each decay leaves a checkpoint, and from there the peak goes on without a
    warm-up (Wen et al. 2024, arXiv 2410.05192).

    budgets: below 1 shares of the steps after the warm-up, else steps of the run, whose end is the last budget.
    decay: of what lies between two budgets, below 1 a share, else steps. The paper's share is not known surely.
    """
    warmup = len(plan.tokens) - total
    before = [0 if budget < 1 else warmup for budget in budgets]  # steps that a budget counts and the shape does not
    ends = [in_steps("budgets", b, total + more) - more for b, more in zip(budgets, before, strict=True)]
    if ends != sorted(ends) or min(ends, default=0) < 0:
        raise UserError(f"schedule.budgets must rise, and begin after the warm-up of {warmup} steps; put them in order")
    inner = sorted(set(ends) - {0, total})
    starts = [0, *inner]
    parts = [decayed(end - start, decay, shape, minimum) for start, end in zip(starts, [*inner, total], strict=True)]

    def factor(step: int) -> float:
        number = bisect_right(inner, step)
        return parts[number](step - starts[number])

    return Staged(factor, tuple(inner))


def power(
    total: int,
    *,
    plan: Plan,
    a: float = 4.6,
    b: float = -0.51,
    decay: float = 0.1,
    shape: Decay = "linear",
    minimum: float = 0.0,
) -> Schedule:
    """min(peak, documents of a step * a * tokens^b), which needs no end, then a decay as of wsd (Shen et al. 2024,
    arXiv 2408.13359).

    The rate is for muP, the tokens are those before the step. The paper's form of the last decay is not known surely;
    it falls to ``minimum`` times where it began, and decay=0 leaves it out.
    """
    require_positive("a", a)
    if b > 0:
        raise UserError(f"schedule.b is {b:g}, so the rate would grow with the tokens; choose a number below 0")
    before = [0, *plan.tokens][-total - 1 : -1]
    end = decayed(total, decay, shape, minimum)
    start = total - in_steps("decay", decay, total)

    def stable(tokens: int) -> float:
        return min(1.0, plan.batch * a * tokens**b / plan.rate) if tokens else 1.0

    return lambda t: end(t) * stable(before[min(t, start, total - 1)])


def decayed(total: int, decay: float, shape: Decay, minimum: float) -> Schedule:
    """1, and in the last ``decay`` of ``total`` down to ``minimum``. Raises UserError for what can't be."""
    if shape == "inverse":  # of a rate of 0 there is no inverse
        require_positive("minimum", minimum, 1)
    require_share("minimum", minimum)
    start = total - in_steps("decay", decay, total)
    stable = sampled(lambda p: 1.0, start)
    return joined(stable, start, sampled(lambda q: DECAYS[shape](q, minimum), total - start))
