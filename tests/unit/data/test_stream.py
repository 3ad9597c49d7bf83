"""The order of a run: every step at any time, every document once an epoch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.data.stream import Stream
from truetune.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 50, 200).tolist()


def stream(lengths: list[int] = LENGTHS, per_step: int = 300, seed: int = 0, **stop: Any) -> Stream:
    return Stream(lengths, per_step, 64, seed, **stop)


def order_of(run: Stream) -> list[int]:
    return [i for t in range(len(run)) for i in run.step(t)]


def test_the_order_is_pinned() -> None:
    # A constant: another order under the same seed would make every earlier run irreproducible.
    run = stream([1] * 8, 4, seed=0, epochs=2.0)
    assert [run.step(t) for t in range(4)] == [[0, 2, 1, 5], [4, 3, 6, 7], [5, 3, 7, 2], [4, 1, 0, 6]]


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=40),
    per_step=st.integers(1, 400),
    seed=st.integers(0, 2**63),
    stop=st.one_of(
        st.fixed_dictionaries({"epochs": st.floats(0.01, 4)}),
        st.fixed_dictionaries({"steps": st.integers(1, 30)}),
        st.fixed_dictionaries({"tokens": st.integers(1, 3000)}),
        st.just({}),
    ),
)
def test_steps_are_the_shortest_that_reach_their_tokens(
    lengths: list[int], per_step: int, seed: int, stop: dict[str, Any]
) -> None:
    run = stream(lengths, per_step, seed, **stop)
    steps = [run.step(t) for t in range(len(run))]
    order = [i for step in steps for i in step]
    sizes = [[lengths[i] for i in step] for step in steps]
    assert all(sum(size) - size[-1] < per_step for size in sizes)
    assert all(sum(size) >= per_step for size in sizes[:-1])
    assert run.documents == len(order) and run.tokens == sum(map(sum, sizes))
    assert run.tokens_at == [sum(map(sum, sizes[: t + 1])) for t in range(len(run))]
    assert run.epochs == len(order) / len(lengths)
    for start in range(0, len(order), len(lengths)):
        epoch = order[start : start + len(lengths)]
        assert len(set(epoch)) == len(epoch)
    if "steps" in stop:
        assert len(run) == stop["steps"] and sum(sizes[-1]) >= per_step
    elif "tokens" in stop:
        assert run.tokens - lengths[order[-1]] < stop["tokens"] <= run.tokens
    else:
        assert len(order) == max(1, round(stop.get("epochs", 1.0) * len(lengths)))


def test_any_step_can_be_asked_for_at_any_time() -> None:
    run = stream(epochs=3.5)
    forwards = [run.step(t) for t in range(len(run))]
    fresh = stream(epochs=3.5)
    assert [fresh.step(t) for t in reversed(range(len(fresh)))] == forwards[::-1]
    assert stream(epochs=3.5).step(len(run) // 2) == forwards[len(run) // 2]


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    long, short = order_of(stream(epochs=2.5)), order_of(stream(epochs=1.0))
    assert long[: len(short)] == short


def test_seeds_and_epochs_have_their_own_order() -> None:
    orders = [order_of(stream(seed=seed, epochs=2.0)) for seed in range(4)]
    epochs = [tuple(order[half]) for order in orders for half in (slice(0, 200), slice(200, 400))]
    assert len(set(epochs)) == 8
    assert all(Counter(epoch) == Counter(range(200)) for epoch in epochs)


def test_a_shuffle_has_no_favourite_place() -> None:
    places = np.array([order_of(stream([1] * 5, 5, seed=seed)) for seed in range(2000)])
    counts = np.array([[np.sum(places[:, i] == d) for d in range(5)] for i in range(5)])
    assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize("t", [0, 3, 7])
def test_micro_batches_split_the_step_and_nothing_else(t: int) -> None:
    run = stream(epochs=2.0)
    packed = run.micro_batches(t)
    assert Counter(i for members in packed for i in members) == Counter(run.step(t))
    assert all(sum(LENGTHS[i] for i in members) <= 64 for members in packed)
    assert len(packed) > 1


def test_the_size_of_micro_batches_does_not_change_the_steps() -> None:
    runs = [Stream(LENGTHS, 300, size, 0, epochs=1.0) for size in (50, 300)]
    assert order_of(runs[0]) == order_of(runs[1])
    assert len(runs[0].micro_batches(0)) > len(runs[1].micro_batches(0))


def test_a_step_may_span_many_epochs() -> None:
    run = stream([2, 3], 23, steps=2)
    assert len(run.step(0)) >= 9 and run.epochs > 4


@pytest.mark.parametrize("t", [-1, 4, 100])
def test_a_step_outside_the_run_is_refused(t: int) -> None:
    with pytest.raises(IndexError, match="run of 4 steps"):
        stream(steps=4).step(t)


def test_impossible_runs_are_refused() -> None:
    with pytest.raises(UserError, match="no document is left"):
        stream([])
    with pytest.raises(UserError, match=r"document 1 has 65 tokens.*tokens_per_micro_batch"):
        stream([3, 65])
    with pytest.raises(ValueError, match="keep one"):
        stream(epochs=1.0, steps=3)


def mixed(sources: list[tuple[int, float]], per_step: int = 40, seed: int = 0, **stop: Any) -> Stream:
    lengths = np.random.default_rng(1).integers(1, 20, sum(documents for documents, _ in sources)).tolist()
    return Stream(lengths, per_step, 64, seed, sources=sources, **stop)


SOURCES = st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 3.5)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(sources=SOURCES, seed=st.integers(0, 9), epochs=st.integers(1, 5))
def test_weights_say_how_often_an_epoch_has_each_document(
    sources: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    order = np.array(order_of(mixed(sources, seed=seed, epochs=float(epochs))))
    wanted = [round(epochs * weight * documents) for documents, weight in sources]
    assert len(order) == max(1, sum(wanted))
    if not sum(wanted):
        return
    first = 0
    for (documents, _), count in zip(sources, wanted, strict=True):
        mine = order[(order >= first) & (order < first + documents)]
        assert len(mine) == count
        for start in range(0, count, documents):  # every document once before any comes twice
            assert len(set(mine[start : start + documents])) == len(mine[start : start + documents])
        first += documents


@settings(max_examples=25)
@given(sources=SOURCES, seed=st.integers(0, 9))
def test_any_step_of_several_sources_can_be_asked_for_at_any_time(sources: list[tuple[int, float]], seed: int) -> None:
    run = mixed(sources, seed=seed, epochs=3.3)
    forwards = [run.step(t) for t in range(len(run))]
    fresh = mixed(sources, seed=seed, epochs=3.3)
    assert [fresh.step(t) for t in reversed(range(len(fresh)))] == forwards[::-1]
    assert run.documents == sum(map(len, forwards)) and run.tokens == sum(
        int(run.lengths[step].sum()) for step in forwards
    )


def test_a_single_source_of_weight_one_is_no_source_at_all() -> None:
    plain = stream(epochs=2.5)
    assert order_of(plain) == order_of(stream(epochs=2.5, sources=[(len(LENGTHS), 1.0)]))
    assert plain.epochs == 2.5


def test_a_fraction_goes_on_where_the_epoch_before_it_stopped() -> None:
    run = stream([1] * 8, 1, sources=[(8, 0.25)], epochs=4.0)
    assert sorted(order_of(run)) == list(range(8)) and run.epochs == 4.0


def test_sources_take_turns_by_chance() -> None:
    order = np.array(order_of(stream([1] * 400, 8, sources=[(200, 1.0), (200, 1.0)], epochs=1.0)))
    early = np.sum(order[:200] < 200)
    assert 70 < early < 130
    assert not np.array_equal(order[order < 200], order[order >= 200] - 200)


def test_the_order_of_several_sources_is_pinned() -> None:
    run = stream([1] * 6, 3, sources=[(4, 1.0), (2, 1.5)], epochs=2.0)
    assert [run.step(t) for t in range(len(run))] == [[4, 5, 0], [4, 2, 1], [3, 3, 5], [4, 2, 1], [5, 0]]
