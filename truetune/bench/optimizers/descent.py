"""Coordinate descent over a grid: from a start, one coordinate at a time, until no neighbour helps.

The protocol of Wen et al. 2025 (Fantastic Pretraining Optimizers, arXiv 2509.02046), phase 1: a change counts only if
it lowers the loss by more than a tolerance, the same for all that are compared. Where it ends, every neighbour has
been looked at, and none is better by more than that. Pure: what a point's loss is, it asks; left out are all steps
along more than one coordinate, so a narrow valley that runs across them can end it early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Point = tuple[int, ...]
"""A place on every axis."""


class Axis(NamedTuple):
    """values: in their order, of which neighbours differ by one step. start: the place where the search begins.
    coarse: places that a step of the first pass is wide; in the second it is one."""

    name: str
    values: tuple[float, ...]
    start: int
    coarse: int = 1


class Found(NamedTuple):
    """The end of a search; edges: names of the axes at whose first or last value it is."""

    values: dict[str, float]
    loss: float
    edges: tuple[str, ...]


def descend(axes: Sequence[Axis], loss: Callable[[dict[str, float]], float], tolerance: float) -> Found:
    """The point that no neighbour betters by more than ``tolerance``.

    loss: of a value for each axis; asked once for each point. What is no finite number is worse than all that is.
    Raises ValueError for a tolerance that is negative or no number.
    """
    if not tolerance >= 0:
        raise ValueError(f"the tolerance is {tolerance}, which is no bound")
    seen: dict[Point, float] = {}

    def at(point: Point) -> float:
        if point not in seen:
            found = loss(_values(axes, point))
            seen[point] = found if math.isfinite(found) else math.inf
        return seen[point]

    best = tuple(axis.start for axis in axes)
    for coarse in (True, False):
        unmoved, turn = 0, 0
        while unmoved < len(axes):
            place = turn % len(axes)
            moved = _along(axes[place], place, best, at, tolerance, axes[place].coarse if coarse else 1)
            unmoved, turn, best = (unmoved + 1 if moved == best else 0), turn + 1, moved
    edges = tuple(a.name for a, i in zip(axes, best, strict=True) if i in (0, len(a.values) - 1))
    return Found(_values(axes, best), at(best), edges)


def _along(axis: Axis, place: int, best: Point, at: Callable[[Point], float], tolerance: float, width: int) -> Point:
    """As far along one axis as every step helps, to the better side first."""
    steps: tuple[int, ...] = (-width, width)
    while True:
        here = at(best)
        near = [_moved(best, place, step) for step in steps]
        near = [point for point in near if 0 <= point[place] < len(axis.values)]
        better = min(near, key=at, default=best)
        if not here - at(better) > tolerance:
            return best
        steps, best = (better[place] - best[place],), better


def _moved(point: Point, place: int, step: int) -> Point:
    return (*point[:place], point[place] + step, *point[place + 1 :])


def _values(axes: Sequence[Axis], point: Point) -> dict[str, float]:
    return {axis.name: axis.values[i] for axis, i in zip(axes, point, strict=True)}
