"""What every schedule is made of: the type, what a run tells it beforehand, the warm-up, and the checks of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truetune.errors import UserError

Schedule = Callable[[int], float]
"""Step index, from 0, to the factor of the peak rate."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a run before its first step; a schedule that has a parameter ``plan`` is given it.

    rate: the peak. tokens: trained on up to the end of each step of the whole run, warm-up included.
    batch: documents of a step, in the mean.
    """

    rate: float
    tokens: Sequence[int]
    batch: float


@dataclass(frozen=True, slots=True)
class Staged:
    """A schedule that is at its end more than once: after each of ``ends`` updates, the last one apart, the weights
    stand as a finished run's, so they are evaluated and kept. In all else it is ``factor``."""

    factor: Schedule
    ends: tuple[int, ...]

    def __call__(self, step: int) -> float:
        return self.factor(step)


def ends_of(schedule: Schedule) -> tuple[int, ...]:
    """Updates after which the schedule is at an end, its last apart."""
    return schedule.ends if isinstance(schedule, Staged) else ()


def with_warmup(shape: Callable[[int], Schedule], total: int, warmup: float, low: float = 0.0) -> Schedule:
    """A linear warm-up to where ``shape`` starts, then ``shape`` over the rest of ``total`` steps.

    Where a model is trained further this is its re-warming (Gupta et al. 2023, arXiv 2308.04014), from ``low``.

    shape: steps -> schedule, such as ``functools.partial(SCHEDULES["cosine"], minimum=0.1)``.
    warmup: below 1 a share of ``total``, rounded; else steps. low: share of the peak that it rises from, one step
    before the first.
    Raises UserError if the warm-up is negative or longer than the run, or if ``shape`` gives any step what is no
    factor of the peak.
    """
    steps = in_steps("warmup", warmup, total)
    rest = shape(total - steps)
    if not callable(rest):
        raise UserError(f"the schedule is a {type(rest).__name__}; return a function of the step from it")
    for t in range(total - steps):
        if not 0 <= (factor := rest(t)) <= 1:
            raise UserError(
                f"the schedule gives step {t + 1} of {total - steps} after the warm-up the factor {factor:g}; keep "
                "factors of the peak in 0 to 1, and raise optimizer.rate for more"
            )
    top = rest(0) if steps < total else 1.0

    def rise(t: int) -> float:
        q = (t + 1) / steps
        return low * (1 - q) + top * q

    whole = joined(rise, steps, rest)
    ends = tuple(end + steps for end in ends_of(rest))
    return Staged(whole, ends) if ends else whole


def sampled(shape: Callable[[float], float], total: int) -> Schedule:
    """``shape``, a function of the progress p = step / total, as a schedule."""

    def factor(step: int) -> float:
        # Beyond its end a shape may rise again or turn negative: no rate to train with.
        if not 0 <= step < total:
            raise ValueError(f"step {step} is outside a schedule of {total} steps; build it for more steps")
        return shape(step / total)

    return factor


def line(p: float, minimum: float) -> float:
    """From 1 straight to ``minimum``."""
    return 1 - (1 - minimum) * p


def half_cosine(p: float, minimum: float) -> float:
    """From 1 to ``minimum`` along half a period of the cosine."""
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * p)) / 2


def joined(first: Schedule, steps: int, second: Schedule) -> Schedule:
    """``first`` for so many steps, then ``second`` from its own step 0."""
    return lambda step: first(step) if 0 <= step < steps else second(step - steps)


def in_steps(name: str, value: float, total: int) -> int:
    """A length in steps, from a share of ``total`` (below 1) or from steps. Raises UserError if it is longer."""
    steps = round(value * total) if value < 1 else round(value)
    if not 0 <= steps <= total:
        raise UserError(
            f"schedule.{name} is {value:g}, which makes {steps} of {total} steps; "
            f"give a share between 0 and 1, or at most {total} steps"
        )
    return steps


def require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"schedule.{name} is {value:g}, but it is a factor of the peak; keep it in 0 to 1")


def require_positive(name: str, value: float, most: float = float("inf")) -> None:
    if not 0 < value <= most:
        bound = f" and at most {most:g}" if most < float("inf") else ""
        raise UserError(f"schedule.{name} is {value:g}; choose a number above 0{bound}")
