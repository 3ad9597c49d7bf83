"""Schedules: values, equals elsewhere, warm-up, bad options; and one lattice over the whole table."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from truetune import registry
from truetune.errors import UserError
from truetune.schedules import FALLING, SCHEDULES, Plan, Schedule, with_warmup
from truetune.schedules.falling import cosine, linear
from truetune.schedules.stable import wsd

RATE, TOKENS, BATCH = 1e-3, 1000, 16
"""Peak, tokens and documents of every step of the runs here."""


def values(schedule: Schedule, total: int) -> list[float]:
    return [schedule(t) for t in range(total)]


def shape(name: str, whole: int, **options: Any) -> Callable[[int], Schedule]:
    """An entry of the table for a run of ``whole`` steps, made as the program makes it."""
    plan = Plan(RATE, [TOKENS * (t + 1) for t in range(whole)], BATCH)
    return registry.bind("schedule", SCHEDULES, name, options, plan=plan)


def drawn(name: str, total: int, warmup: float = 0, **options: Any) -> list[float]:
    """All the factors of a run."""
    return values(with_warmup(shape(name, total, **options), total, warmup), total)


PUBLISHED = [
    ("rex", {}, {0: 1, 0.25: 0.857143, 0.5: 0.666667, 0.75: 0.4, 0.9: 0.181818}),
    ("rex", {"bend": 0.9}, {0.25: 0.967742, 0.5: 0.909091, 0.75: 0.769231, 0.9: 0.526316}),
    ("uba", {"phi": 0.25}, {0.25: 0.979004, 0.5: 0.888889, 0.75: 0.578518}),
    ("uba", {}, {0.25: 0.958871, 0.5: 0.8, 0.75: 0.406983}),
    ("uba", {"phi": 1}, {0.25: 0.920991, 0.5: 0.666667, 0.75: 0.255479}),
    ("uba", {"phi": 2}, {0.25: 0.853553, 0.5: 0.5, 0.75: 0.146447}),
    ("uba", {"phi": 5}, {0.25: 0.699823, 0.5: 0.285714, 0.75: 0.064222}),
    (
        "wsd",
        {"decay": 100, "minimum": 0.1, "shape": "inverse"},
        {0: 1, 0.25: 0.307692, 0.5: 0.181818, 0.75: 0.129032},
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), PUBLISHED)
def test_reference_numbers(name: str, options: dict[str, Any], expected: dict[float, float]) -> None:
    """By progress."""
    factors = drawn(name, 100, **options)
    assert {p: factors[round(100 * p)] for p in expected} == pytest.approx(expected, abs=5e-7)


Q = [t / 40 for t in range(40)]
EQUATIONS: list[tuple[str, dict[str, Any], Callable[[float], float]]] = [
    ("linear", {"minimum": 0.2}, lambda p: 0.2 + 0.8 * (1 - p)),
    ("cosine", {"minimum": 0.1}, lambda p: 0.1 + 0.9 * math.cos(math.pi * p / 2) ** 2),
    ("polynomial", {"power": 3, "minimum": 0.1}, lambda p: 0.9 * (1 - p) ** 3 + 0.1),
    ("exponential", {"minimum": 0.05}, lambda p: math.exp(p * math.log(0.05))),
    ("inverse-sqrt", {"timescale": 8}, lambda p: (1 + 40 * p / 8) ** -0.5),
    ("rex", {"bend": 0.5}, lambda p: (1 - p) / (1 - p / 2)),
    ("uba", {"phi": 0.7, "minimum": 0.1}, lambda p: 0.9 / (1 + 0.7 * math.tan(math.pi * p / 2) ** 2 / 2) + 0.1),
    ("uba", {"phi": 2, "minimum": 0.1}, lambda p: 0.1 + 0.9 * math.cos(math.pi * p / 2) ** 2),
    ("cosine-restarts", {"cycles": 4, "minimum": 0.2}, lambda p: 0.6 + 0.4 * math.cos(math.pi * (4 * p % 1))),
    ("wsd", {"decay": 40}, lambda p: 1 - p),
    ("wsd", {"decay": 40, "shape": "cosine", "minimum": 0.1}, lambda p: 0.55 + 0.45 * math.cos(math.pi * p)),
    ("wsd", {"decay": 40, "shape": "1-sqrt", "minimum": 0.1}, lambda p: 0.1 + 0.9 * (1 - p**0.5)),
    ("wsd", {"decay": 40, "shape": "inverse", "minimum": 0.1}, lambda p: 1 / (9 * p + 1)),
]


@pytest.mark.parametrize(("name", "options", "equation"), EQUATIONS)
def test_equations_to_the_last_digit(name: str, options: dict[str, Any], equation: Callable[[float], float]) -> None:
    """Each in another form than the code's."""
    assert drawn(name, 40, **options) == pytest.approx([equation(p) for p in Q], rel=1e-12, abs=1e-12)


def test_uba_is_constant_for_a_small_phi_and_falls_sooner_for_a_larger() -> None:
    """What is known of phi; which suits an optimizer is not tried here."""
    assert drawn("uba", 40, phi=1e-9)[:35] == pytest.approx([1] * 35, abs=1e-6)
    tables = [drawn("uba", 40, phi=phi) for phi in (0.1, 0.5, 2, 5, 50)]
    for slow, fast in pairwise(tables):
        assert all(later > sooner for later, sooner in zip(slow[1:], fast[1:], strict=True))


def rates(scheduler: Callable[[torch.optim.Optimizer], Any], total: int) -> list[float]:
    """What a scheduler of theirs sets, from a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs, found = scheduler(optimizer), []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    return found


TORCH: list[tuple[str, dict[str, Any], Callable[[torch.optim.Optimizer], Any]]] = [
    ("linear", {}, lambda o: lr_scheduler.LinearLR(o, 1, 0, 20)),
    ("cosine", {"minimum": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, 20, 0.1)),
    ("polynomial", {"power": 1.5}, lambda o: lr_scheduler.PolynomialLR(o, 20, 1.5)),
    ("exponential", {"minimum": 0.05}, lambda o: lr_scheduler.ExponentialLR(o, 0.05 ** (1 / 20))),
    ("step", {}, lambda o: lr_scheduler.MultiStepLR(o, [6, 12, 18], 0.1)),
    ("step", {"at": [5, 0.5], "ratio": 0.3}, lambda o: lr_scheduler.MultiStepLR(o, [5, 10], 0.3)),
    ("cosine-restarts", {"minimum": 0.1}, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 1, 0.1)),
    ("cosine-restarts", {"cycles": 2, "growth": 3}, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 3)),
    # Theirs has its peak and its end on the last step of each part, so one step more makes the parts as long as ours.
    ("one-cycle", {}, lambda o: lr_scheduler.OneCycleLR(o, 1.0, 21, pct_start=7 / 21, cycle_momentum=False)),
]


@pytest.mark.parametrize(("name", "options", "theirs"), TORCH)
def test_the_same_as_torch(name: str, options: dict[str, Any], theirs: Callable[[torch.optim.Optimizer], Any]) -> None:
    assert drawn(name, 20, **options) == pytest.approx(rates(theirs, 20), rel=1e-9, abs=1e-12)


TRANSFORMERS: list[tuple[str, dict[str, Any], Callable[[torch.optim.Optimizer], Any]]] = [
    ("linear", {}, lambda o: transformers.get_linear_schedule_with_warmup(o, 3, 20)),
    ("cosine", {}, lambda o: transformers.get_cosine_schedule_with_warmup(o, 3, 20)),
    (
        "cosine",
        {"minimum": 0.1},
        lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, 3, 20, min_lr_rate=0.1),
    ),
    (
        "cosine-restarts",
        {"cycles": 2},
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 3, 20, 2),
    ),
    (
        "polynomial",
        {"minimum": 0.2},
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, 3, 20, lr_end=0.2, power=2.0),
    ),
    ("inverse-sqrt", {}, lambda o: transformers.get_inverse_sqrt_schedule(o, 3)),
    ("inverse-sqrt", {"timescale": 7}, lambda o: transformers.get_inverse_sqrt_schedule(o, 3, timescale=7)),
    *(
        (
            "wsd",
            {"decay": 6, "shape": kind, "minimum": 0.1},
            lambda o, kind=kind: transformers.get_wsd_schedule(o, 3, 6, 20, decay_type=kind, min_lr_ratio=0.1),
        )
        for kind in ("linear", "cosine", "1-sqrt")
    ),
]


@pytest.mark.parametrize(("name", "options", "theirs"), TRANSFORMERS)
def test_the_same_as_transformers(
    name: str, options: dict[str, Any], theirs: Callable[[torch.optim.Optimizer], Any]
) -> None:
    """After the warm-up, whose first update theirs wastes at a rate of 0, or of their minimum."""
    factors = drawn(name, 20, 3, **options)
    assert factors[3:] == pytest.approx(rates(theirs, 20)[3:], rel=1e-9)
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])


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


def test_warmup_rises_to_where_the_shape_starts() -> None:
    factors = drawn("one-cycle", 24, 4, start=0.2)
    assert factors[:5] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])


def test_the_inverse_root_takes_the_warmup_for_its_scale() -> None:
    assert drawn("inverse-sqrt", 16, 4)[4:] == pytest.approx([math.sqrt(4 / n) for n in range(4, 16)], rel=1e-12)
    assert drawn("inverse-sqrt", 16)[15] == pytest.approx(1 / 4, rel=1e-12)


def test_steps_fall_where_they_are_said_to() -> None:
    assert drawn("step", 10, at=[3, 0.6], ratio=0.5) == [1] * 3 + [0.5] * 3 + [0.25] * 4


# The lattice: every entry of the table.


@pytest.mark.parametrize("name", SCHEDULES)
@given(total=st.integers(1, 300), warmup=st.one_of(st.floats(0, 0.999), st.integers(0, 300)))
def test_every_rate_is_above_zero_and_at_most_the_peak(name: str, total: int, warmup: float) -> None:
    steps = min(total, round(warmup * total) if warmup < 1 else round(warmup))
    factors = drawn(name, total, min(warmup, total))
    assert all(0 < f <= 1 for f in factors)
    assert factors[: steps + 1] == sorted(factors[: steps + 1])
    if name in FALLING:
        assert max(factors) == 1 and factors[steps:] == sorted(factors[steps:], reverse=True)


def test_what_rises_is_said_to_rise() -> None:
    rising = {name for name in SCHEDULES if (f := drawn(name, 100)) != sorted(f, reverse=True)}
    assert rising == set(SCHEDULES) - set(FALLING)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_runs_at_the_start_of_the_shape(name: str) -> None:
    for warmup in (0, 0.05, 0.9, 1):
        (factor,) = drawn(name, 1, warmup)
        assert factor == 1 or (name not in FALLING and 0 < factor <= 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_factor_depends_on_nothing_but_the_step(name: str) -> None:
    """So a run that is resumed, or asked in any order, has the rates of one that went through."""
    schedule, again = (with_warmup(shape(name, 60), 60, 6) for _ in range(2))
    assert [schedule(t) for t in reversed(range(60))] == values(again, 60)[::-1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [-1, 8, 100])
def test_a_step_outside_the_run_has_no_rate(name: str, step: int) -> None:
    with pytest.raises(ValueError, match="outside a schedule"):
        with_warmup(shape(name, 8), 8, 2)(step)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("wsd", {"decay": 20}, "schedule.decay is 20.*at most 10 steps"),
    ("wsd", {"minimum": 2}, "schedule.minimum is 2, but it is a factor"),
    ("wsd", {"shape": "inverse"}, "schedule.minimum is 0; choose a number above 0"),
    ("wsd", {"shape": "sqrt"}, 'schedule.shape is "sqrt", but must be'),
    ("linear", {"minimum": 1.5}, "schedule.minimum is 1.5"),
    ("cosine", {"minimum": -0.1}, "schedule.minimum is -0.1"),
    ("polynomial", {"power": 0}, "schedule.power is 0"),
    ("polynomial", {"minimum": 1.5}, "schedule.minimum is 1.5"),
    ("exponential", {"minimum": 0}, "schedule.minimum is 0; choose a number above 0 and at most 1"),
    ("exponential", {"minimum": 1.1}, "schedule.minimum is 1.1"),
    ("step", {"ratio": 0}, "schedule.ratio is 0"),
    ("step", {"ratio": 2}, "schedule.ratio is 2"),
    ("step", {"at": [0]}, "schedule.at has a place that is not above 0"),
    ("step", {"at": [11]}, "schedule.at is 11"),
    ("inverse-sqrt", {"timescale": 0}, "schedule.timescale is 0"),
    ("inverse-sqrt", {"plan": 1}, 'has no option "plan"'),
    ("rex", {"bend": 1}, "schedule.bend is 1"),
    ("uba", {"phi": 0}, "schedule.phi is 0"),
    ("uba", {"minimum": 1.5}, "schedule.minimum is 1.5"),
    ("cosine-restarts", {"cycles": 0}, "schedule.cycles is 0"),
    ("cosine-restarts", {"growth": 0}, "schedule.growth is 0"),
    ("cosine-restarts", {"minimum": 1.5}, "schedule.minimum is 1.5"),
    ("one-cycle", {"rise": 0}, "schedule.rise is 0"),
    ("one-cycle", {"rise": 1}, "schedule.rise is 1"),
    ("one-cycle", {"start": 0}, "schedule.start is 0"),
    ("one-cycle", {"minimum": -1}, "schedule.minimum is -1"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        drawn(name, 10, **options)
    assert "\n" not in str(caught.value)


def test_every_option_is_refused_somewhere() -> None:
    tried = {(name, option) for name, options, _ in BAD for option in options}
    there = {(n, o) for n, function in SCHEDULES.items() for o in registry.user_options("schedule", n, function)}
    assert there <= tried


@pytest.mark.parametrize(("warmup", "message"), [(11, "is 11.*at most 10 steps"), (-0.5, "is -0.5")])
def test_an_impossible_warmup_is_refused(warmup: float, message: str) -> None:
    with pytest.raises(UserError, match=rf"schedule.warmup {message}"):
        drawn("linear", 10, warmup)


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan"), float("inf")])
def test_every_factor_is_looked_at_before_the_run(bad: float) -> None:
    """Only the last of the steps after the warm-up is wrong."""
    with pytest.raises(UserError, match=rf"step 7 of 7 after the warm-up the factor {bad:g}; keep factors"):
        with_warmup(lambda total: lambda t: bad if t == total - 1 else 1.0, 10, 3)


def test_a_schedule_that_is_no_function_of_the_step() -> None:
    with pytest.raises(UserError, match="the schedule is a float; return a function of the step"):
        with_warmup(lambda total: 1 / total, 10, 3)  # type: ignore[arg-type,return-value]
