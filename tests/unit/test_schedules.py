"""Schedules: values, equals elsewhere, warm-up, bad options; and one lattice over the whole table."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from truetune import registry, versions
from truetune.errors import UserError
from truetune.schedules import FALLING, SCHEDULES, Plan, Schedule, ends_of, refined_from, with_warmup
from truetune.schedules.falling import cosine, linear
from truetune.schedules.refined import median, refine
from truetune.schedules.stable import power, wsd, wsd_s

RATE, TOKENS, BATCH = 1e-3, 1000, 16
"""Peak, tokens and documents of every step of the runs here."""


NEEDED: dict[str, dict[str, Any]] = {}
"""Schedule -> its options that have no default."""


@pytest.fixture(scope="module", autouse=True)
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier run whose norms fall and rise again."""
    folder = earlier_run(tmp_path_factory.mktemp("earlier"), [3 + math.cos(t / 5) for t in range(37)])
    NEEDED["refined"] = {"run": str(folder)}
    return folder


def earlier_run(folder: Path, norms: Sequence[float | None], norm: str = "gradient_norm_l1") -> Path:
    """``folder`` with the records of steps of these norms, among others."""
    records: list[dict[str, Any]] = [{"kind": "step", "step": t, norm: value} for t, value in enumerate(norms, 1)]
    records.append({"kind": "evaluation", "step": 1, "loss": 2.0})
    lines = [json.dumps(record | {"format": versions.RECORD}) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"kind": "st')
    return folder


def values(schedule: Schedule, total: int) -> list[float]:
    return [schedule(t) for t in range(total)]


def shape(name: str, whole: int, **options: Any) -> Callable[[int], Schedule]:
    """An entry of the table for a run of ``whole`` steps, made as the program makes it."""
    plan = Plan(RATE, [TOKENS * (t + 1) for t in range(whole)], BATCH)
    return registry.bind("schedule", SCHEDULES, name, NEEDED.get(name, {}) | options, plan=plan)


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


def test_a_model_that_is_trained_further_is_warmed_up_from_where_it_ended() -> None:
    """The paper's: 1 % of the run from a tenth of the peak, then the cosine to a tenth."""
    schedule = with_warmup(shape("cosine", 400, minimum=0.1), 400, 0.01, 0.1)
    assert values(schedule, 5) == pytest.approx([0.325, 0.55, 0.775, 1, 1])
    assert schedule(399) == pytest.approx(0.1, abs=1e-4) and schedule(399) > 0.1


def test_the_inverse_root_takes_the_warmup_for_its_scale() -> None:
    assert drawn("inverse-sqrt", 16, 4)[4:] == pytest.approx([math.sqrt(4 / n) for n in range(4, 16)], rel=1e-12)
    assert drawn("inverse-sqrt", 16)[15] == pytest.approx(1 / 4, rel=1e-12)


def test_steps_fall_where_they_are_said_to() -> None:
    assert drawn("step", 10, at=[3, 0.6], ratio=0.5) == [1] * 3 + [0.5] * 3 + [0.25] * 4


# Power: tokens and documents of a step in.


def test_power_has_the_rates_of_its_tokens() -> None:
    for batch, tokens, rate in [
        (128, 1e9, 0.0151345),
        (128, 1e10, 0.00467700),
        (128, 1e12, 0.000446650),
        (1024, 1e12, 0.00357320),
    ]:
        plan = Plan(0.02, [1000, int(tokens), 2 * int(tokens)], batch)
        factors = values(power(3, plan=plan, decay=0), 3)
        assert factors[:2] == [1, 1]
        assert 0.02 * factors[2] == pytest.approx(rate, rel=1e-5)
        assert factors[2] == pytest.approx(batch * 4.6 * tokens**-0.51 / 0.02, rel=1e-12)


def test_power_counts_the_tokens_of_the_warmup_and_starts_where_they_allow() -> None:
    plan = Plan(1.0, [100 * (t + 1) for t in range(12)], 2)
    factors = values(with_warmup(partial(power, plan=plan, decay=0), 12, 4), 12)
    assert factors[4:] == pytest.approx([2 * 4.6 * (100 * t) ** -0.51 for t in range(4, 12)], rel=1e-12)
    assert factors[:4] == pytest.approx([factors[4] * (t + 1) / 4 for t in range(4)], rel=1e-12)


def test_power_needs_no_total_but_for_its_decay() -> None:
    tokens = [10_000 * (t + 1) for t in range(80)]
    short, long = (values(power(n, plan=Plan(0.5, tokens[:n], 2), decay=0), n) for n in (50, 80))
    assert short == long[:50] and short[-1] < 1
    ended = values(power(50, plan=Plan(0.5, tokens[:50], 2), decay=5, shape="1-sqrt", minimum=0.1), 50)
    assert ended[:45] == short[:45]
    expected = [short[45] * (0.1 + 0.9 * (1 - math.sqrt(q / 5))) for q in range(5)]
    assert ended[45:] == pytest.approx(expected, rel=1e-12)


# WSD-S: several budgets in one branch.


def test_wsd_s_decays_before_each_budget_and_is_back_at_the_peak_at_once() -> None:
    plan = Plan(RATE, [TOKENS] * 44, BATCH)
    schedule = with_warmup(partial(wsd_s, plan=plan, budgets=(14, 0.5), decay=0.2), 44, 4)
    assert ends_of(schedule) == (14, 24)
    inverse = [1 / (1 + 9 * q) for q in (0, 0.25, 0.5, 0.75)]
    expected = [0.25, 0.5, 0.75, 1]
    for length, decay in ((10, inverse[::2]), (10, inverse[::2]), (20, inverse)):
        expected += [1] * (length - len(decay)) + decay
    assert values(schedule, 44) == pytest.approx(expected, rel=1e-12)


def test_wsd_s_of_one_budget_is_wsd() -> None:
    plan = Plan(RATE, [TOKENS] * 40, BATCH)
    once = wsd_s(40, plan=plan, budgets=(), shape="cosine", minimum=0.0)
    assert values(once, 40) == values(wsd(40, shape="cosine"), 40) and ends_of(once) == ()


# Refined: norms of an earlier run in.


@pytest.mark.parametrize(
    ("norms", "l1", "l2"),
    [
        ([3] * 5, [0.8, 0.6, 0.4, 0.2, 0], [0.8, 0.6, 0.4, 0.2, 0]),
        (
            [4, 2, 1, 1, 2],
            [0.2307692, 0.3846154, 0.4615385, 0.1538462, 0],
            [0.0609756, 0.2195122, 0.4878049, 0.0975610, 0],
        ),
    ],
)
def test_refined_is_the_closed_form(norms: list[float], l1: list[float], l2: list[float]) -> None:
    for power_of, expected in [(1, l1), (2, l2)]:
        found = refine(np.array(norms, dtype=float), power_of, 0.1)
        assert found == pytest.approx([e / max(expected) for e in expected], abs=5e-7)
        weights = [1 / n**power_of for n in norms]
        exact = [w * sum(weights[t + 1 :]) for t, w in enumerate(weights)]
        assert found == pytest.approx([e / max(exact) for e in exact], rel=1e-12)


def test_refined_from_equal_norms_is_the_linear_decay_of_any_length(tmp_path: Path) -> None:
    folder = str(earlier_run(tmp_path, [0.7] * 23))
    for total in (1, 7, 23, 60):
        assert drawn("refined", total, run=folder) == pytest.approx(drawn("linear", total), abs=1e-12)


def test_refined_takes_the_norm_that_is_asked_for_and_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    norms = [2.0, 5.0, None, 3.0, 1.0, 4.0]
    for name, norm, p in [("gradient_norm_l1", "l1", 1), ("gradient_norm", "l2", 2)]:
        folder = str(earlier_run(tmp_path, norms, name))
        expected = refine(np.array([n for n in norms if n]), p, 0)[:-1]
        assert drawn("refined", 4, run=folder, norm=norm) == pytest.approx(expected.tolist(), rel=1e-12)
    folder = str(earlier_run(tmp_path, [2.0, 0.0, 3.0, 1.0]))  # a zero stands for the smallest
    assert drawn("refined", 3, run=folder) == pytest.approx(refine(np.array([2.0, 1, 3, 1]), 1, 0)[:-1].tolist())


def test_refined_from_norms_is_refined_from_the_run_that_recorded_them(tmp_path: Path) -> None:
    norms = [2.0, 5.0, math.nan, 3.0, 0.0, 4.0]
    folder = str(earlier_run(tmp_path, [n if math.isfinite(n) else None for n in norms]))
    schedule = refined_from(4, norms, smoothing=0.5)
    assert [schedule(t) for t in range(4)] == drawn("refined", 4, run=folder, smoothing=0.5)
    assert [refined_from(4, norms, norm="l2", smoothing=0.5)(t) for t in range(4)] != [schedule(t) for t in range(4)]
    with pytest.raises(UserError, match="fewer than two of the norms are above 0"):
        refined_from(4, [1.0, 0.0, math.inf])


def test_the_median_is_of_those_around_and_mirrored_at_the_end() -> None:
    found = np.append(np.random.default_rng(0).random(40), 2.0)
    beyond = [found[0]] * 2 + list(found) + list(found[-2:-4:-1])
    assert median(found, 5).tolist() == [sorted(beyond[t : t + 5])[2] for t in range(41)]
    assert median(found, 1).tolist() == found.tolist()
    one_off = np.ones(40)
    one_off[17] = 1e6
    assert refine(one_off, 1, 0.1) == pytest.approx(np.linspace(1, 0, 40), abs=1e-12)


def test_an_earlier_run_that_says_too_little_is_refused(tmp_path: Path) -> None:
    for norms in ([], [None, 1.0], [0.0, 1.0]):
        folder = str(earlier_run(tmp_path, norms))
        with pytest.raises(UserError, match=r"fewer than two L1 norms.*older runs recorded with schedule.norm=l2"):
            drawn("refined", 4, run=folder)
    with pytest.raises(UserError, match=r"fewer than two L2 norms of gradients; name a longer run$"):
        drawn("refined", 4, run=folder, norm="l2")
    for bad in (b"[1]", b"\xff", b"{}", b'{"kind": "step", "gradient_norm_l1": "x"}', b"[" * 100_000):
        (tmp_path / "metrics.jsonl").write_bytes(bad + b"\n")
        with pytest.raises(UserError, match=r"metrics.jsonl:1 is no record of a run"):
            drawn("refined", 4, run=folder)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "format": 99}\n')
    with pytest.raises(UserError, match="has format 99"):
        drawn("refined", 4, run=folder)


# The lattice: every entry of the table.


@pytest.mark.parametrize("name", SCHEDULES)
@given(
    total=st.integers(1, 300),
    warmup=st.one_of(st.floats(0, 0.999), st.integers(0, 300)),
    low=st.one_of(st.just(0.0), st.floats(0, 0.99)),
)
def test_every_rate_is_above_zero_and_at_most_the_peak(name: str, total: int, warmup: float, low: float) -> None:
    steps = min(total, round(warmup * total) if warmup < 1 else round(warmup))
    factors = values(with_warmup(shape(name, total), total, min(warmup, total), low), total)
    assert all(0 < f <= 1 for f in factors)
    top = factors[steps] if steps < total else 1
    rise = [low, *factors[:steps], top]
    assert rise == pytest.approx([*np.linspace(low, top, steps + 1).tolist(), top], rel=1e-12)
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
    ("power", {"a": 0}, "schedule.a is 0"),
    ("power", {"b": 0.5}, "schedule.b is 0.5, so the rate would grow"),
    ("power", {"decay": 20}, "schedule.decay is 20"),
    ("power", {"shape": "sqrt"}, 'schedule.shape is "sqrt"'),
    ("power", {"minimum": 2}, "schedule.minimum is 2"),
    ("refined", {"run": "nowhere"}, "schedule.run is nowhere, where there is no metrics.jsonl"),
    ("refined", {"run": 3}, "schedule.run is 3, but must be text"),
    ("refined", {"norm": "l3"}, 'schedule.norm is "l3"'),
    ("refined", {"smoothing": 1}, "schedule.smoothing is 1"),
    ("wsd-s", {"budgets": [0.5, 0.25]}, "schedule.budgets must rise, and begin after the warm-up of 0 steps"),
    ("wsd-s", {"budgets": [11]}, "schedule.budgets is 11"),
    ("wsd-s", {"decay": 6}, "schedule.decay is 6.*at most 2 steps"),
    ("wsd-s", {"shape": "sqrt"}, 'schedule.shape is "sqrt"'),
    ("wsd-s", {"minimum": 0}, "schedule.minimum is 0"),
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


def test_a_budget_within_the_warmup_is_refused() -> None:
    with pytest.raises(UserError, match="begin after the warm-up of 4 steps"):
        drawn("wsd-s", 10, 4, budgets=[3])


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
