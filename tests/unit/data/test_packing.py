"""Best fit decreasing: known packings, nothing lost, few bins, fast."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.packing import best_fit_decreasing
from truetune.errors import UserError


def lengths_of(bins: list[list[int]], lengths: list[int]) -> list[list[int]]:
    return [[lengths[i] for i in members] for members in bins]


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([7, 6, 5, 4, 3, 3, 2, 2], 10, [[7, 3], [6, 4], [5, 3, 2], [2]]),
        ([128, 256, 512, 1024, 2048], 2048, [[2048], [1024, 512, 256, 128]]),
        ([10, 10], 10, [[10], [10]]),
        ([1], 10, [[1]]),
        ([], 10, []),
    ],
)
def test_known_packings(lengths: list[int], capacity: int, expected: list[list[int]]) -> None:
    assert lengths_of(best_fit_decreasing(lengths, capacity), lengths) == expected


def test_equal_lengths_keep_their_order() -> None:
    assert best_fit_decreasing([3, 5, 3, 5, 3], 6) == [[1], [3], [0, 2], [4]]


def first_come(lengths: list[int], capacity: int) -> list[int]:
    """Fill of the bins of the same rule by a plain search over all bins."""
    fill: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, used in enumerate(fill) if used + length <= capacity]
        if fitting:
            fill[max(fitting, key=fill.__getitem__)] += length
        else:
            fill.append(length)
    return sorted(fill)


@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=60), st.just(c))))
def test_nothing_is_lost_and_the_rule_is_best_fit(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    fills = sorted(sum(members) for members in lengths_of(bins, lengths))
    assert all(0 < fill <= capacity for fill in fills)
    assert fills == first_come(lengths, capacity)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=12))
def test_at_most_eleven_ninths_of_the_optimum(rows: list[list[int]]) -> None:
    # Every bin is filled to the brim by construction, so the optimum is their number.
    capacity = max(map(sum, rows))
    full = [[*row, capacity - sum(row)] if sum(row) < capacity else row for row in rows]
    lengths = [length for row in full for length in row]
    assert len(best_fit_decreasing(lengths, capacity)) <= 11 / 9 * len(full) + 6 / 9


def test_too_long_and_empty_documents_are_refused() -> None:
    with pytest.raises(UserError, match=r"document 1 has 11 tokens.*holds 10; raise"):
        best_fit_decreasing([3, 11, 2], 10)
    with pytest.raises(ValueError, match="document 2 has no tokens"):
        best_fit_decreasing([3, 1, 0], 10)


def test_a_hundred_thousand_documents_take_less_than_a_second() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 100_000).tolist()
    start = time.process_time()
    bins = best_fit_decreasing(lengths, 2048)
    assert time.process_time() - start < 1
    assert len(bins) * 2048 < 1.01 * sum(lengths)
