"""AdamW's curve on losses that were made by one."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from truetune.bench.optimizers.curve import Speedup, fit
from truetune.errors import UserError

TOKENS = [200_000.0, 400_000.0, 800_000.0, 1_600_000.0]


def losses(alpha: float, floor: float = 2.0, noise: float = 0.0) -> list[float]:
    drawn = np.random.default_rng(0).normal(0, noise, 4) if noise else np.zeros(4)
    return [floor + 1.5 * (t / 2e5) ** -alpha + e for t, e in zip(TOKENS, drawn, strict=True)]


@pytest.mark.parametrize(("alpha", "floor"), list(product([0.1, 0.5, 2.0], [0.0, 2.0])))
def test_a_curve_is_found_again(alpha: float, floor: float) -> None:
    curve = fit(TOKENS, losses(alpha, floor))
    assert (curve.alpha, curve.floor, curve.scale) == pytest.approx((alpha, floor, 1.5), abs=1e-4)
    assert curve.error < 1e-6 and (curve.shortest, curve.longest) == (TOKENS[0], TOKENS[-1])
    assert [curve.loss(t) for t in TOKENS] == pytest.approx(losses(alpha, floor))
    assert curve.speedup(curve.loss(600_000), 400_000).times == pytest.approx(1.5, rel=1e-4)
    assert curve.speedup(curve.loss(300_000), 400_000).times == pytest.approx(0.75, rel=1e-4)


def test_noise_moves_it_little() -> None:
    noisy, true = losses(0.5, noise=0.01), losses(0.5)
    mirrored = [2 * b - a for a, b in zip(noisy, true, strict=True)]
    curve = fit(TOKENS * 3, [*noisy, *true, *mirrored])
    assert curve.loss(400_000) == pytest.approx(true[1], abs=1e-6)  # its mean is the true one
    assert 0.001 < curve.error < 0.01
    assert fit(TOKENS, noisy).loss(400_000) == pytest.approx(true[1], abs=0.02)


def test_it_is_not_asked_beyond_its_runs() -> None:
    curve = fit(TOKENS, losses(0.5))
    assert curve.speedup(losses(0.5)[-1] - 0.01, 400_000) == Speedup(4.0, "more than")
    assert curve.speedup(1.0, 400_000) == Speedup(4.0, "more than")  # below the floor
    assert curve.speedup(losses(0.5)[0] + 0.01, 400_000) == Speedup(0.5, "less than")
    assert curve.speedup(math.inf, 400_000) == Speedup(0.5, "less than")
    assert [str(one) for one in (Speedup(4.0, "more than"), Speedup(1.234))] == ["more than 4.00", "1.23"]


def test_what_no_curve_fits_is_refused() -> None:
    with pytest.raises(UserError, match="needs runs of 3 lengths, not 2"):
        fit([1.0, 2.0, 2.0], [3.0, 2.0, 2.1])
    with pytest.raises(UserError, match="does not fall"):
        fit(TOKENS, [1.0, 1.1, 1.2, 1.3])
    with pytest.raises(UserError, match="a tuned run of AdamW failed"):
        fit(TOKENS, [*losses(0.5)[:3], math.inf])
