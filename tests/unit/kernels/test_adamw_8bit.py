"""The map of 8-bit moments, and that a model trained with them ends near one trained with 32."""

from __future__ import annotations

import pytest
import torch

from truetune.kernels.adamw import adamw
from truetune.kernels.adamw_8bit import adamw_8bit, dynamic_map

CPU = torch.device("cpu")
OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@pytest.mark.parametrize(("signed", "least"), [(True, 1e-6 * 0.55), (False, 1e-6 * 0.325)])
def test_the_map_has_256_numbers_that_end_at_one(signed: bool, least: float) -> None:
    values, middles = dynamic_map(signed, CPU)
    assert len(values) == 256 and len(middles) == 255 and (values.diff() > 0).all()
    assert 0 in values and values[-1] == 1 and (values[0] < -0.99 if signed else values[0] == 0)
    assert values[values > 0][0] == pytest.approx(least)


def test_a_quadratic_is_learned_as_with_32_bits() -> None:
    scales = torch.logspace(-2, 1, 600)
    target = torch.randn(600, generator=torch.Generator().manual_seed(0))
    ours, theirs = [torch.zeros(600)], [torch.zeros(600)]
    states = [
        [torch.zeros(3, 256, dtype=torch.uint8)],
        [torch.zeros(3)],
        [torch.zeros(3, 256, dtype=torch.uint8)],
        [torch.zeros(3)],
    ]
    moments = [[torch.zeros(600)], [torch.zeros(600)]]
    for step in range(1, 301):
        rate = 0.05 * (1 - step / 301)
        adamw_8bit(ours, [scales * (ours[0] - target)], *states, rate=rate, step=step, **OPTIONS)
        adamw(theirs, [scales * (theirs[0] - target)], *moments, rate=rate, step=step, **OPTIONS)
    assert (theirs[0] - target).norm() < 0.1 * target.norm()
    assert (ours[0] - theirs[0]).norm() < 0.02 * target.norm()
