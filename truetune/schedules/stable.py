"""Warm-up, stable, decay: the rate stays at the peak, and falls only at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from truetune.schedules.base import Schedule, in_steps, joined, require_positive, require_share, sampled

Decay = Literal["linear", "cosine", "1-sqrt", "inverse"]

DECAYS: dict[Decay, Callable[[float, float], float]] = {
    "linear": lambda q, minimum: 1 - (1 - minimum) * q,
    "cosine": lambda q, minimum: minimum + (1 - minimum) * (1 + math.cos(math.pi * q)) / 2,
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


def decayed(total: int, decay: float, shape: Decay, minimum: float) -> Schedule:
    """1, and in the last ``decay`` of ``total`` down to ``minimum``. Raises UserError for what can't be."""
    if shape == "inverse":  # of a rate of 0 there is no inverse
        require_positive("minimum", minimum, 1)
    require_share("minimum", minimum)
    start = total - in_steps("decay", decay, total)
    stable = sampled(lambda p: 1.0, start)
    return joined(stable, start, sampled(lambda q: DECAYS[shape](q, minimum), total - start))
