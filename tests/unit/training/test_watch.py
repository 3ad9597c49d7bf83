"""The alarms, from records alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from truetune.training.record import Alarm, Checks, Record, Step, Verdict
from truetune.training.watch import HISTORY, watch


def stream(count: int = 2 * HISTORY) -> list[Step]:
    return [
        Step(t, 2.0, 1e-3, 1e-3, 1.5, 1000, 400, 8, 1, 0.5, 1 << 20, 2000.0) for t in range(1, count + 1)
    ]  # fmt: skip


def alarms(found: list[Record]) -> list[tuple[int, str]]:
    return [(r.step, r.name) for r in found if isinstance(r, Alarm)]


def quoted(found: list[Record]) -> list[bool]:
    return [r.tokens_per_second is not None for r in found if isinstance(r, Step)]


def test_a_healthy_run_has_no_alarm_and_passes_unchanged() -> None:
    found: list[Record] = [Checks(0, (Verdict("x", True, ""),)), *stream()]
    assert list(watch(found)) == found


@pytest.mark.parametrize(
    ("harm", "name", "voids"),
    [
        ({"gradient_norm": 0.0}, "zero gradient", True),
        ({"rate": 1.1e-3}, "wrong rate", True),
        ({"rate": 0.0}, "wrong rate", True),
        ({"planned": 0.0}, "wrong rate", True),
        ({"seconds": 1.6}, "throughput collapsed", False),
        ({"targets": 90}, "targets collapsed", False),
    ],
)
def test_what_is_silently_wrong_is_named_once_and_at_once(harm: dict[str, float], name: str, voids: bool) -> None:
    found = stream()
    for t in (14, 15, 16):
        found[t] = replace(found[t], **harm)
    seen = list(watch(found))
    assert alarms(seen) == [(15, name)]
    assert next(r for r in seen if isinstance(r, Alarm)).voids == voids
    assert seen.index(next(r for r in seen if isinstance(r, Alarm))) == 14  # before its step
    assert quoted(seen) == [True] * 14 + [not voids] * 6
    assert [r.step for r in seen if isinstance(r, Step)] == [s.step for s in found]


def test_an_alarm_that_comes_back_is_named_again() -> None:
    found = stream()
    for t in (3, 9):
        found[t] = replace(found[t], gradient_norm=0.0)
    assert alarms(list(watch(found))) == [(4, "zero gradient"), (10, "zero gradient")]


@pytest.mark.parametrize("harm", [{"seconds": 1.4}, {"targets": 110}, {"tokens": 400, "targets": 160, "seconds": 0.2}])
def test_what_is_merely_uneven_is_no_alarm(harm: dict[str, Any]) -> None:
    found = stream()
    found[15] = replace(found[15], **harm)
    assert not alarms(list(watch(found)))


def test_a_collapse_needs_a_history() -> None:
    found = stream(HISTORY)
    found[-1] = replace(found[-1], seconds=50.0, targets=1)
    assert not alarms(list(watch(found)))


def test_no_speed_after_a_failed_check() -> None:
    found: list[Record] = [*stream(3), Checks(3, (Verdict("x", False, ""),)), *stream(3)]
    assert quoted(list(watch(found))) == [True] * 3 + [False] * 3
    assert quoted(list(watch(stream(3), void=True))) == [False] * 3
