"""Shapes that rise on purpose after their first step."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from truetune.errors import UserError
from truetune.schedules.base import Schedule, half_cosine, require_positive, require_share, sampled


def cosine_restarts(total: int, *, cycles: int = 4, growth: float = 1.0, minimum: float = 0.0) -> Schedule:
    """The cosine ``cycles`` times, back at 1 after each, each ``growth`` times as long (SGDR, arXiv 1608.03983)."""
    if cycles < 1:
        raise UserError(f"schedule.cycles is {cycles}; choose at least 1")
    require_positive("growth", growth)
    require_share("minimum", minimum)
    lengths = [growth**i for i in range(cycles)]
    ends = [0.0, *(end / sum(lengths) for end in accumulate(lengths))]

    def factor(p: float) -> float:
        cycle = min(bisect_right(ends, p), cycles) - 1
        q = (p - ends[cycle]) / (ends[cycle + 1] - ends[cycle])
        return half_cosine(q, minimum)

    return sampled(factor, total)


def one_cycle(total: int, *, rise: float = 0.3, start: float = 0.04, minimum: float = 4e-6) -> Schedule:
    """From ``start`` up to 1 in the share ``rise`` of the run, then down to ``minimum`` (Smith & Topin 2017, arXiv
    1708.07120), both along a cosine; the momentum stays.
    """
    require_positive("start", start, 1)
    require_share("minimum", minimum)
    if not 0 < rise < 1:
        raise UserError(f"schedule.rise is {rise:g}; choose a share of the run between 0 and 1")

    def between(first: float, last: float, q: float) -> float:
        return last + (first - last) * half_cosine(q, 0)

    return sampled(
        lambda p: between(start, 1, p / rise) if p < rise else between(1, minimum, (p - rise) / (1 - rise)), total
    )
