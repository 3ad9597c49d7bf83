"""Schedules: values, ends, warm-up, bad options."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from truetune.errors import UserError
from truetune.schedules import SCHEDULES, Schedule, cosine, linear, with_warmup, wsd


def values(schedule: Schedule, total: int) -> list[float]:
    return [schedule(t) for t in range(total)]


def test_linear_starts_at_the_peak_and_ends_one_step_above_the_minimum() -> None:
    assert values(linear(5), 5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert values(linear(5, minimum=0.5), 5) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])


def test_cosine_is_half_a_period() -> None:
    assert values(cosine(4), 4) == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert values(cosine(4, minimum=0.5), 4) == pytest.approx([1, 0.926777, 0.75, 0.573223], abs=1e-6)


def test_wsd_decays_at_the_end() -> None:
    assert values(wsd(10, decay=0.4), 10) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert values(wsd(10, decay=4, minimum=0.2), 10) == pytest.approx([1] * 7 + [0.8, 0.6, 0.4])
    assert values(wsd(10, decay=0.0), 10) == [1] * 10


def test_warmup_rises_to_the_peak_then_the_shape_has_the_rest() -> None:
    expected = [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert values(with_warmup(linear, 8, 4), 8) == pytest.approx(expected)
    assert values(with_warmup(linear, 8, 0.5), 8) == pytest.approx(expected)
    assert values(with_warmup(linear, 4, 4), 4) == pytest.approx(expected[:4])
    assert values(with_warmup(partial(linear, minimum=0.5), 4, 0), 4) == pytest.approx([1, 0.875, 0.75, 0.625])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(linear, get_linear_schedule_with_warmup), (cosine, get_cosine_schedule_with_warmup)],
)
def test_decays_are_those_of_transformers(ours: Callable[[int], Schedule], theirs: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = theirs(optimizer, 3, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = with_warmup(ours, 20, 3)
    assert values(schedule, 20)[3:] == pytest.approx(rates[3:])
    # theirs wastes the first update at a rate of 0
    assert values(schedule, 20)[:3] == pytest.approx([r + 1 / 3 for r in rates[:3]])


@pytest.mark.parametrize("name", SCHEDULES)
@given(total=st.integers(1, 300), warmup=st.one_of(st.floats(0, 0.999), st.integers(0, 300)))
def test_every_rate_is_positive_and_at_most_the_peak(name: str, total: int, warmup: float) -> None:
    factors = values(with_warmup(SCHEDULES[name], total, min(warmup, total)), total)
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == 1
    peak = factors.index(1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_runs_at_the_peak(name: str) -> None:
    for warmup in (0, 0.05, 0.9, 1):
        assert with_warmup(SCHEDULES[name], 1, warmup)(0) == 1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [-1, 8, 100])
def test_a_step_outside_the_run_has_no_rate(name: str, step: int) -> None:
    with pytest.raises(ValueError, match="outside a schedule"):
        with_warmup(SCHEDULES[name], 8, 2)(step)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: with_warmup(linear, 10, 11), r"schedule.warmup is 11.*at most 10 steps"),
        (lambda: with_warmup(linear, 10, -0.5), r"schedule.warmup is -0.5"),
        (lambda: wsd(10, decay=20), r"schedule.decay is 20"),
        (lambda: linear(10, minimum=1.5), r"schedule.minimum is 1.5"),
        (lambda: cosine(10, minimum=-0.1), r"schedule.minimum is -0.1"),
        (lambda: wsd(10, minimum=2.0), r"schedule.minimum is 2"),
    ],
)
def test_impossible_options_are_refused(build: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan"), float("inf")])
def test_every_factor_is_looked_at_before_the_run(bad: float) -> None:
    """Only the last of the steps after the warm-up is wrong."""
    with pytest.raises(UserError, match=rf"step 7 of 7 after the warm-up the factor {bad:g}; keep factors"):
        with_warmup(lambda total: lambda t: bad if t == total - 1 else 1.0, 10, 3)


def test_a_schedule_that_is_no_function_of_the_step() -> None:
    with pytest.raises(UserError, match="the schedule is a float; return a function of the step"):
        with_warmup(lambda total: 1 / total, 10, 3)  # type: ignore[arg-type,return-value]
