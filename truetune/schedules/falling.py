"""Shapes that start at the peak and never rise: functions of the progress p alone, but for the inverse square root.

Left out: momentum that moves against the rate (REX has none), and UBA's several phases, which no source at hand states
surely.
"""

from __future__ import annotations

import math

from truetune.errors import UserError
from truetune.schedules.base import (
    Plan,
    Schedule,
    half_cosine,
    in_steps,
    line,
    require_positive,
    require_share,
    sampled,
)


def constant(total: int) -> Schedule:
    """1 at every step."""
    return sampled(lambda p: 1.0, total)


def linear(total: int, *, minimum: float = 0.0) -> Schedule:
    """From 1 straight to ``minimum`` (Defazio et al. 2023, arXiv 2310.07831)."""
    require_share("minimum", minimum)
    return sampled(lambda p: line(p, minimum), total)


def cosine(total: int, *, minimum: float = 0.0) -> Schedule:
    """From 1 to ``minimum`` along half a period of the cosine (Loshchilov & Hutter 2016, arXiv 1608.03983)."""
    require_share("minimum", minimum)
    return sampled(lambda p: half_cosine(p, minimum), total)


def polynomial(total: int, *, power: float = 2.0, minimum: float = 0.0) -> Schedule:
    """From 1 to ``minimum`` as (1 - p)^power; 1 is linear, more falls sooner."""
    require_positive("power", power)
    require_share("minimum", minimum)
    return sampled(lambda p: minimum + (1 - minimum) * (1 - p) ** power, total)


def exponential(total: int, *, minimum: float = 0.01) -> Schedule:
    """From 1 to ``minimum`` by the same ratio at every step: minimum^p."""
    require_positive("minimum", minimum, 1)
    return sampled(lambda p: minimum**p, total)


def step(total: int, *, at: tuple[float, ...] = (0.3, 0.6, 0.9), ratio: float = 0.1) -> Schedule:
    """Times ``ratio`` after each place in ``at`` (below 1 a share, else steps): 30-60-90, usual for images."""
    require_positive("ratio", ratio, 1)
    if any(not value > 0 for value in at):
        raise UserError("schedule.at has a place that is not above 0; leave it out, or lower optimizer.rate instead")
    places = [max(1, in_steps("at", value, total)) for value in at]
    within = sampled(lambda p: 1.0, total)
    return lambda t: within(t) * ratio ** sum(place <= t for place in places)


def inverse_sqrt(total: int, *, plan: Plan, timescale: float | None = None) -> Schedule:
    """1 / sqrt(1 + t / timescale), t steps after the warm-up; knows no end (Vaswani et al. 2017, arXiv 1706.03762).

    timescale: steps; the default, the warm-up's own length, makes it the sqrt(warm-up / step) of the paper.
    """
    scale = max(1, len(plan.tokens) - total) if timescale is None else timescale
    require_positive("timescale", scale)
    return sampled(lambda p: 1 / math.sqrt(1 + p * total / scale), total)


def rex(total: int, *, bend: float = 0.5) -> Schedule:
    """(1 - p) / (1 - bend p): linear at first, late and steep at the end (Chen et al. 2021, arXiv 2107.04197).

    bend: 0 is linear; 0.5 the paper's; 0.9, as some trainers have it, is another schedule.
    """
    if not 0 <= bend < 1:
        raise UserError(f"schedule.bend is {bend:g}; choose a number from 0 to below 1, where 0 is linear")
    return sampled(lambda p: (1 - p) / ((1 - bend) + bend * (1 - p)), total)


def uba(total: int, *, phi: float = 0.5, minimum: float = 0.0) -> Schedule:
    """From 1 to ``minimum``, later for a small ``phi``: 2 is the cosine (Tang et al. 2025, Stepsize anything).

    phi: the more the curvature varies the larger; about 0.5 for AdamW and 5 for SGD is a third party's word and was
    not tried here. The paper's several phases are left out.
    """
    require_positive("phi", phi)
    require_share("minimum", minimum)

    def factor(p: float) -> float:
        c = 1 + math.cos(math.pi * p)
        return minimum + (1 - minimum) * 2 * c / (2 * phi + (2 - phi) * c)

    return sampled(factor, total)
