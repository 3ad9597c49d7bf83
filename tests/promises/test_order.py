"""The order of a run is followed by the proof whatever the length of the run, and a false one is seen."""

from __future__ import annotations

import numpy as np
import pytest

from truetune.data import stream as streams
from truetune.data.stream import Stream
from truetune.promises.rows import faults_of_order, lasting

LENGTHS = [7] * 9 + [5] * 4 + [3] * 6
SOURCES = [(9, 0.5), (4, 2.0), (6, 1.25)]


def stream(**length: float) -> Stream:
    return Stream(LENGTHS, 20, 40, 3, sources=SOURCES, **length)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [{"steps": 1}, {"epochs": 0.3}, {"epochs": 1}, {"epochs": 3.5}, {"tokens": 600}])
def test_an_order_by_the_weights_has_no_fault(length: dict[str, float]) -> None:
    asked = stream(**length)
    whole = lasting(asked)
    assert faults_of_order(whole) == []
    assert whole.epochs >= 2 and [whole.step(t) for t in range(len(asked) - 1)] == [
        asked.step(t) for t in range(len(asked) - 1)
    ]


def test_a_source_that_comes_too_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """One document of the first source gives its place to one of the last."""
    real = streams._order

    def unfair(seed: int, epoch: int, sources: tuple[tuple[int, float], ...]) -> np.ndarray:
        order = real(seed, epoch, sources).copy()
        order[order < 9] = np.where(order[order < 9] == order[order < 9][0], 18, order[order < 9])
        return order

    monkeypatch.setattr(streams, "_order", unfair)
    told = "; ".join(faults_of_order(lasting(stream(steps=1))))
    assert "documents of 2 epochs are of a source that should have 9" in told


def test_a_document_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = streams._order
    monkeypatch.setattr(streams, "_order", lambda *given: np.where(real(*given) == 10, 9, real(*given)))
    assert "document 9 comes twice" in "; ".join(faults_of_order(lasting(stream(steps=1))))
