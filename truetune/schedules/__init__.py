"""Learning-rate schedules: step -> factor of the peak rate. Pure functions, so a planner can integrate them.

A run has ``total`` updates, t = 0 ... total - 1. A shape is a function of the progress p = t / total, and
most have shape(0) = 1. So the first update runs at the peak, and ``minimum`` is what update ``total``, the first
that is not made, would have: no update is spent at a rate of 0, and a run of one step runs at the peak.
Warm-up comes before: update t of w has (t + 1) / w, so the first is not 0 and the last reaches the shape's start.

A schedule that must know more of the run than its steps has a parameter ``plan``, which the program supplies.
"""

from __future__ import annotations

from collections.abc import Callable

from truetune.schedules.base import Plan, Schedule, Staged, ends_of, with_warmup
from truetune.schedules.falling import (
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    polynomial,
    rex,
    step,
    uba,
)
from truetune.schedules.refined import refined, refined_from
from truetune.schedules.rising import cosine_restarts, one_cycle
from truetune.schedules.stable import power, wsd, wsd_s

FALLING: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "exponential": exponential,
    "step": step,
    "inverse-sqrt": inverse_sqrt,
    "rex": rex,
    "uba": uba,
    "wsd": wsd,
    "power": power,
}
"""Schedules that start at the peak, or at what they allow instead of it, and never rise."""

RISING: dict[str, Callable[..., Schedule]] = {
    "cosine-restarts": cosine_restarts,
    "one-cycle": one_cycle,
    "wsd-s": wsd_s,
    "refined": refined,
}
"""Schedules that start below the peak, or come back to it."""

SCHEDULES = FALLING | RISING

__all__ = ["FALLING", "RISING", "SCHEDULES", "Plan", "Schedule", "Staged", "ends_of", "refined_from", "with_warmup"]
