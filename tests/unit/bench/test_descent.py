"""Coordinate descent on functions whose minimum is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.bench.optimizers.descent import Axis, Found, descend
from truetune.bench.optimizers.methods import METHODS, axes, options, start

RATE = Axis("rate", tuple(2 ** (i / 2) for i in range(-12, 13)), 12, coarse=2)
DECAY = Axis("decay", (0.0, 0.01, 0.1, 1.0), 0)


class Bowl:
    """log2(rate)^2 and the place of the decay, squared, around a minimum; it remembers what it was asked."""

    def __init__(self, rate: float = 0.0, decay: float = 0.0, fails_above: float = math.inf) -> None:
        self.rate, self.decay, self.fails_above = rate, decay, fails_above
        self.asked: list[dict[str, float]] = []

    def __call__(self, values: dict[str, float]) -> float:
        self.asked.append(values)
        if values["rate"] > self.fails_above:
            return math.nan
        place = DECAY.values.index(values["decay"])
        return (math.log2(values["rate"]) - self.rate) ** 2 + (place - self.decay) ** 2


@given(st.integers(-12, 12), st.integers(0, 3))
def test_the_minimum_is_found_from_anywhere_and_nothing_is_asked_twice(rate: int, decay: int) -> None:
    bowl = Bowl(rate / 2, decay)
    found = descend([RATE, DECAY], bowl, 0.0)
    assert found.values == {"rate": RATE.values[rate + 12], "decay": DECAY.values[decay]}
    assert found.loss == pytest.approx(0, abs=1e-20)
    assert len(bowl.asked) == len({tuple(values.items()) for values in bowl.asked}) <= 30
    assert ("rate" in found.edges) == (abs(rate) == 12) and ("decay" in found.edges) == (decay in (0, 3))
    again = Bowl(rate / 2, decay)
    assert descend([RATE, DECAY], again, 0.0) == found and again.asked == bowl.asked


def test_every_neighbour_of_the_end_was_looked_at() -> None:
    bowl = Bowl(1.5, 2)
    found = descend([RATE, DECAY], bowl, 0.0)
    rate, decay = RATE.values.index(found.values["rate"]), DECAY.values.index(found.values["decay"])
    for values in (
        {"rate": RATE.values[rate + 1], "decay": DECAY.values[decay]},
        {"rate": RATE.values[rate - 1], "decay": DECAY.values[decay]},
        {"rate": RATE.values[rate], "decay": DECAY.values[decay + 1]},
        {"rate": RATE.values[rate], "decay": DECAY.values[decay - 1]},
    ):
        assert values in bowl.asked


def test_what_helps_by_no_more_than_the_tolerance_is_not_taken() -> None:
    assert descend([RATE, DECAY], Bowl(1.0), 0.9).values["rate"] == 2.0  # a step of 2 helps by 1
    bowl = Bowl(1.0)
    assert descend([RATE, DECAY], bowl, 1.0).values["rate"] == 1.0
    assert [values["rate"] for values in bowl.asked[:3]] == [1.0, 0.5, 2.0]  # coarse steps come first
    assert math.sqrt(2) in [pytest.approx(values["rate"]) for values in bowl.asked]


def test_a_diverged_trial_is_worse_than_every_other() -> None:
    bowl = Bowl(3.0, 2, fails_above=4.0)
    assert descend([RATE, DECAY], bowl, 0.0) == Found({"rate": 4.0, "decay": 0.1}, 1.0, ())
    assert descend([RATE, DECAY], Bowl(-3.0, fails_above=0.6), 0.0).loss == 0  # where the start itself diverges
    assert descend([RATE], lambda _: math.nan, 0.0).loss == math.inf


def test_a_bound_that_is_none_is_refused() -> None:
    for tolerance in (-1.0, math.nan):
        with pytest.raises(ValueError, match="is no bound"):
            descend([RATE], lambda _: 0.0, tolerance)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("full", [True, False])
def test_every_point_of_a_grid_is_a_recipe_of_its_method(name: str, full: bool) -> None:
    for axis in axes(name, full):
        assert len(set(axis.values)) == len(axis.values) and list(axis.values) == sorted(axis.values)
    chosen = options(name, start(name, full), 8)
    assert chosen["rate"] == METHODS[name].rate and chosen["weight_decay"] == METHODS[name].decay
    assert chosen.get("betas", [chosen.get("momentum")]) == list(METHODS[name].betas)
    assert ("rest_rate" in chosen) == (full and name in ("muon", "soap", "fira", "galore"))  # else by default
    assert ("ratio" in start(name, full)) == (full and name != "prodigy")
    if "ratio" in start(name, full):
        assert options(name, start(name, full) | {"ratio": 4.0}, 8)["rest_rate"] == pytest.approx(4 * chosen["rate"])
    assert ("rank" in chosen) == (name in ("fira", "galore"))
