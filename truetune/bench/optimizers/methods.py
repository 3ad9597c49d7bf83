"""The methods that are compared, where the search for each begins, and the grid that it is over: one for all.

A start is what the authors (or the AlgoPerf baseline) give, to the nearest value of the grid; since all are tuned until
no change helps, it decides how long the search is, hardly where it ends. Tuned are the rate, the decay, the betas (or
the momentum) and the rate of embeddings and vectors over that of matrices, for all but a method that finds its rate:
one for both ties embeddings to a rate that was made for matrices, and with the ratio as an axis of some methods alone
the ratio is what is compared. The betas of AdamW, where it takes what a method does not, stay at their defaults, and
so does whatever else a method has: frequencies, epsilons, scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from truetune.bench.optimizers.descent import Axis
from truetune.optim import KINDS, OPTIMIZERS

HALF_STEPS = 12
"""Factors of sqrt(2), the finer step of a rate, on both sides of where it begins; the first steps are of 2."""
DECAYS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_BETAS = (0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
SECOND_BETAS = (0.65, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995)
RATIOS = tuple(2.0**i for i in range(-6, 10))
"""Of the rate for embeddings, head and vectors, AdamW's where a method does not take them, over that for matrices."""
GAP = 50
"""Steps between two projections of the low-rank methods, which have 200 by default: here runs are that short."""


class Method(NamedTuple):
    """rate, decay, betas: where its search begins; a single beta is its momentum. low_rank: its rank is a quarter of
    the smallest side, as in its paper's runs. falls: whether its rate falls after the warm-up, as it does for all but
    a method that is made for none. source: of the start."""

    rate: float
    decay: float
    betas: tuple[float, ...]
    source: str
    low_rank: bool = False
    falls: bool = True


BASELINE = "adamw"
METHODS = {
    BASELINE: Method(1e-3, 0.01, (0.9, 0.999), "torch's defaults"),
    "nadamw": Method(1.75e-3, 0.1, (0.95, 0.995), "the AlgoPerf baseline"),
    "muon": Method(1e-3, 0.1, (0.95,), "Liu et al. 2025, whose steps have AdamW's size"),
    "soap": Method(3e-3, 0.01, (0.95, 0.95), "the authors' code"),
    "fira": Method(2.5e-3, 0.0, (0.9, 0.999), "the authors' 0.01 at a scale of 0.25", low_rank=True),
    "galore": Method(1e-2, 0.0, (0.9, 0.999), "the authors' scripts", low_rank=True),
    "schedule-free-adamw": Method(2.5e-3, 0.0, (0.9, 0.999), "the authors' code", falls=False),
    "prodigy": Method(1.0, 0.0, (0.9, 0.999), "the authors' code"),
}


def axes(name: str, rest: bool) -> list[Axis]:
    """The grid of a method; rest: whether the workload trains embeddings, a head or vectors as well as matrices."""
    method = METHODS[name]
    rates = tuple(float(f"{method.rate * 2 ** (i / 2):.3g}") for i in range(-HALF_STEPS, HALF_STEPS + 1))
    found = [Axis("rate", rates, HALF_STEPS, coarse=2), Axis("decay", DECAYS, DECAYS.index(method.decay))]
    if rest and not getattr(OPTIMIZERS[name], "finds_rate", False):
        found.append(Axis("ratio", RATIOS, RATIOS.index(1.0)))
    found.append(Axis("first", FIRST_BETAS, FIRST_BETAS.index(method.betas[0])))
    if len(method.betas) > 1:
        found.append(Axis("second", SECOND_BETAS, SECOND_BETAS.index(method.betas[1])))
    return found


def start(name: str, rest: bool) -> dict[str, float]:
    """The point of the grid where the search for a method begins."""
    return {axis.name: axis.values[axis.start] for axis in axes(name, rest)}


def options(name: str, values: dict[str, float], rank: int) -> dict[str, Any]:
    """The recipe's section ``optimizer`` for a point of the grid."""
    found: dict[str, Any] = {"name": name, "rate": values["rate"], "weight_decay": values["decay"]}
    if "second" in values:
        found["betas"] = [values["first"], values["second"]]
    else:
        found["momentum"] = values["first"]
    if "ratio" in values and (values["ratio"] != 1 or _leaves(name)):
        found["rest_rate"] = float(f"{values['rate'] * values['ratio']:.3g}")
    return found | ({"rank": rank, "gap": GAP} if METHODS[name].low_rank else {})


def _leaves(name: str) -> bool:
    """Whether AdamW takes embeddings and vectors in the method's place."""
    return "embeddings" not in getattr(OPTIMIZERS[name], "takes", KINDS)
