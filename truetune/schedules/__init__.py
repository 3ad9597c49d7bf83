"""Learning-rate schedules: step -> factor of the peak rate. Pure functions, so a planner can integrate them.

A run has ``total`` updates, t = 0 ... total - 1. Every shape is a function of the progress p = t / total,
with shape(0) = 1. So the first update runs at the peak, and ``minimum`` is what update ``total``, the first
that is not made, would have: no update is spent at a rate of 0, and a run of one step runs at the peak.
Warm-up comes before: update t of w has (t + 1) / w, so the first is not 0 and the last reaches the peak.

Linear decay to zero: Defazio et al. 2023, arXiv 2310.07831. Cosine: Loshchilov & Hutter 2016, arXiv
1608.03983, one period. Warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395, here with a linear decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from truetune.errors import UserError

Schedule = Callable[[int], float]
"""Step index, from 0, to the factor of the peak rate."""


def constant(total: int) -> Schedule:
    """1 at every step."""
    return _sampled(lambda p: 1.0, total)


def linear(total: int, *, minimum: float = 0.0) -> Schedule:
    """From 1 straight to ``minimum`` (Defazio et al. 2023, arXiv 2310.07831)."""
    _require_share("minimum", minimum)
    return _sampled(lambda p: 1 - (1 - minimum) * p, total)


def cosine(total: int, *, minimum: float = 0.0) -> Schedule:
    """From 1 to ``minimum`` along half a period of the cosine (Loshchilov & Hutter 2016, arXiv 1608.03983)."""
    _require_share("minimum", minimum)
    return _sampled(lambda p: minimum + (1 - minimum) * (1 + math.cos(math.pi * p)) / 2, total)


def wsd(total: int, *, decay: float = 0.1, minimum: float = 0.0) -> Schedule:
    """1 until the last ``decay`` (below 1 a share, else steps), then straight to ``minimum`` (Hu et al. 2024, arXiv
    2404.06395).
    """
    _require_share("minimum", minimum)
    start = total - _steps("decay", decay, total)
    return _joined(constant(start), start, linear(total - start, minimum=minimum))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}


def with_warmup(shape: Callable[[int], Schedule], total: int, warmup: float) -> Schedule:
    """A linear warm-up, then ``shape`` over the rest of ``total`` steps.

    shape: steps -> schedule, such as ``functools.partial(SCHEDULES["cosine"], minimum=0.1)``.
    warmup: below 1 a share of ``total``, rounded; else steps.
    Raises UserError if the warm-up is negative or longer than the run, or if ``shape`` gives any step what is no
    factor of the peak.
    """
    steps = _steps("warmup", warmup, total)
    rest = shape(total - steps)
    if not callable(rest):
        raise UserError(f"the schedule is a {type(rest).__name__}; return a function of the step from it")
    for t in range(total - steps):
        if not 0 <= (factor := rest(t)) <= 1:
            raise UserError(
                f"the schedule gives step {t + 1} of {total - steps} after the warm-up the factor {factor:g}; keep "
                "factors of the peak in 0 to 1, and raise optimizer.rate for more"
            )
    return _joined(lambda t: (t + 1) / steps, steps, rest)


def _sampled(shape: Callable[[float], float], total: int) -> Schedule:
    def factor(step: int) -> float:
        # Beyond its end a shape may rise again or turn negative: no rate to train with.
        if not 0 <= step < total:
            raise ValueError(f"step {step} is outside a schedule of {total} steps; build it for more steps")
        return shape(step / total)

    return factor


def _joined(first: Schedule, steps: int, second: Schedule) -> Schedule:
    return lambda step: first(step) if 0 <= step < steps else second(step - steps)


def _steps(name: str, value: float, total: int) -> int:
    """A length in steps, from a share of the run (below 1) or from steps."""
    steps = round(value * total) if value < 1 else round(value)
    if not 0 <= steps <= total:
        raise UserError(
            f"schedule.{name} is {value:g}, which makes {steps} of the run's {total} steps; "
            f"give a share between 0 and 1, or at most {total} steps"
        )
    return steps


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"schedule.{name} is {value:g}, but it is a factor of the peak; keep it in 0 to 1")
