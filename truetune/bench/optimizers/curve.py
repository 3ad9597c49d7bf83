"""How many tokens a loss costs AdamW: the curve L(T) = E + A / T^alpha through its tuned runs of several lengths.

The form is that of Kaplan et al. 2020 (arXiv 2001.08361) with the floor of Hoffmann et al. 2022 (arXiv 2203.15556),
for one size of model. For every alpha the best E and A >= 0 are a linear problem, so only alpha is searched for. No
figure is read from the curve outside the lengths that were run: there it says "more than" or "less than".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from truetune.errors import UserError

ALPHA = (0.02, 4.0)
"""Between which the exponent is searched for."""
ROUNDS = 8
"""Grids, each within two neighbours of the last."""
LENGTHS = 3
"""That a curve of three unknowns needs, at least."""


class Speedup(NamedTuple):
    """How many times fewer tokens; bound: "more than" or "less than" where the curve is not asked further, else ""."""

    times: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound} {self.times:.2f}".strip()


class Curve(NamedTuple):
    """E, A (of tokens as a multiple of ``shortest``) and alpha; shortest, longest: tokens of the runs that it is
    through; error: root mean square of what it leaves of their losses."""

    floor: float
    scale: float
    alpha: float
    shortest: float
    longest: float
    error: float

    def loss(self, tokens: float) -> float:
        return float(self.floor + self.scale * (tokens / self.shortest) ** -self.alpha)

    def speedup(self, loss: float, tokens: float) -> Speedup:
        """Of what reaches ``loss`` with ``tokens``: the tokens that the curve asks for it, over those."""
        if not loss > self.loss(self.longest):
            return Speedup(self.longest / tokens, "more than")
        if not loss < self.loss(self.shortest):
            return Speedup(self.shortest / tokens, "less than")
        return Speedup(self.shortest * ((loss - self.floor) / self.scale) ** (-1 / self.alpha) / tokens)


def fit(tokens: Sequence[float], losses: Sequence[float]) -> Curve:
    """The curve of least squares through (tokens, loss), several of each length.

    Raises UserError for fewer lengths than ``LENGTHS``, for the loss of a failed run, and for losses that do not fall.
    """
    if len(set(tokens)) < LENGTHS:
        raise UserError(f"a curve needs runs of {LENGTHS} lengths, not {len(set(tokens))}; run the others first")
    if not all(map(math.isfinite, losses)):
        raise UserError("a tuned run of AdamW failed, so no curve goes through its losses; give the runs other tokens")
    t, wanted = np.asarray(tokens, float) / min(tokens), np.asarray(losses, float)

    def solved(alpha: float) -> tuple[float, float, float]:
        """E and A, neither below 0, and what they leave."""
        falling = t**-alpha
        floor, scale = np.linalg.lstsq(np.stack([np.ones_like(t), falling], axis=1), wanted)[0]
        if floor < 0:
            floor, scale = 0.0, falling @ wanted / (falling @ falling)
        if scale < 0:
            floor, scale = wanted.mean(), 0.0
        return float(floor), float(scale), float(np.linalg.norm(floor + scale * falling - wanted))

    low, high = ALPHA
    for _ in range(ROUNDS):  # from a grid, since the sum of squares need not have one valley alone
        grid = np.geomspace(low, high, 60)
        near = int(np.argmin([solved(alpha)[2] for alpha in grid]))
        low, high = grid[max(near - 1, 0)], grid[min(near + 1, len(grid) - 1)]
    alpha = float(grid[near])
    floor, scale, residual = solved(alpha)
    if not scale > 0:
        raise UserError("AdamW's loss does not fall with the tokens, so no curve fits it; give the runs more tokens")
    return Curve(floor, scale, alpha, min(tokens), max(tokens), residual / math.sqrt(len(t)))
