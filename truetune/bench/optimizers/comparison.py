"""The order of a fair comparison: the search of each method, its ranking on fresh seeds, and AdamW's curve.

The protocol is that of Wen et al. 2025 (arXiv 2509.02046), phase 1, at one size of model: every hyper-parameter of
every method is tuned, methods meet only at the end of training, and a loss is told in tokens that tuned AdamW would
need for it. ``ask`` gives the outcome of a trial, or raises Left: the same pass runs a comparison, goes on with one
that was cut off, and reads one for its table.

A search sees one seed only, so its runs differ in nothing but the change, and far smaller changes show than seeds make:
a bound of the size of the seeds' differences ends searches at their start, each step of which may help by less. The
ranking has none of the seeds that a search saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from truetune.bench.optimizers.curve import Curve, Speedup, fit
from truetune.bench.optimizers.descent import Axis, descend
from truetune.bench.optimizers.methods import BASELINE, METHODS, axes, options
from truetune.bench.optimizers.trial import Left, Outcome, Setting, Trial
from truetune.errors import UserError

TUNING, SEEDS = 0, (1, 2, 3)
"""The seed of the searches, and those of the ranking."""
TOLERANCE = {True: 0.02, False: 0.005}
"""Nats by which a change of a hyper-parameter has to lower the held-out loss: of a model from scratch, and of LoRA,
where it falls a tenth as fast."""
BUDGETS = (0.5, 1.0, 2.0, 4.0)
"""Lengths of the runs that AdamW's curve is through; at each its rate is tuned anew."""

Ask = Callable[[Trial], Outcome]
Runs = Callable[..., Outcome]


@dataclass(frozen=True)
class Standing:
    """Where a method is. values: of its hyper-parameters, as tuned; edges: those that ended at an edge of the grid.
    finals: outcomes of ``SEEDS``, all or none. left: what is still to be done, None where nothing is."""

    method: str
    left: str | None
    values: dict[str, float] = field(default_factory=dict)
    edges: tuple[str, ...] = ()
    finals: tuple[Outcome, ...] = ()

    @property
    def loss(self) -> float:
        """Mean over the seeds; infinite before there is one."""
        return fmean(found.loss for found in self.finals) if self.finals else math.inf


@dataclass(frozen=True)
class Comparison:
    """standings: from the least loss on, those that have none last. curve: None before its trials were run."""

    setting: Setting
    standings: tuple[Standing, ...]
    curve: Curve | None = None

    def speedups(self, standing: Standing) -> list[Speedup]:
        """Of the mean loss, and of each seed's, from the least on; none without a curve or a ranking."""
        if self.curve is None or not standing.finals:
            return []
        each = sorted(self.curve.speedup(found.loss, self.setting.tokens) for found in standing.finals)
        return [self.curve.speedup(standing.loss, self.setting.tokens), *each]


def compare(setting: Setting, methods: Sequence[str], ask: Ask) -> Comparison:
    """What ``ask`` gives of it."""
    names = sorted(methods, key=lambda name: name != BASELINE)  # whose curve the others are measured by
    standings, curve = [], None
    for name in names:
        standing = _standing(name, runs(setting, name, ask), axes(name, setting.full), TOLERANCE[setting.full])
        if name == BASELINE and standing.finals:
            try:
                curve = _curve(setting, standing, runs(setting, name, ask))
            except Left:
                standing = replace(standing, left="ranked, but its curve lacks runs")
            except UserError as error:
                standing = replace(standing, left=str(error))
        standings.append(standing)
    return Comparison(setting, tuple(sorted(standings, key=lambda s: (not s.finals, s.loss))), curve)


def runs(setting: Setting, name: str, ask: Ask) -> Runs:
    """The trials of a method: what ``ask`` gives for a point of its grid, a seed and a budget."""

    def run(values: dict[str, float], seed: int, budget: float = 1.0) -> Outcome:
        return ask(Trial(setting, options(name, values, setting.rank), METHODS[name].falls, seed, budget))

    return run


def least(setting: Setting, methods: Sequence[str]) -> float:
    """Cost, in runs of budget 1, if every start proves to be the end of its search; one that moves takes more."""
    searches = sum(1 + 2 * len(axes(name, setting.full)) + len(SEEDS) for name in methods)
    curve = sum(budget * (3 + len(SEEDS)) for budget in BUDGETS if budget != 1)
    return searches + curve * (BASELINE in methods)


def _standing(name: str, run: Runs, along: Sequence[Axis], tolerance: float) -> Standing:
    try:
        found = descend(along, lambda values: run(values, TUNING).loss, tolerance)
    except Left:
        return Standing(name, "not tuned to its end")
    try:
        finals = tuple(run(found.values, seed) for seed in SEEDS)
    except Left:
        return Standing(name, "tuned, but not run on all seeds", found.values, found.edges)
    return Standing(name, None, found.values, found.edges, finals)


def _curve(setting: Setting, standing: Standing, run: Runs) -> Curve:
    """Through the tuned method's runs of all lengths. Raises Left, and UserError where no curve fits."""
    rate = next(axis for axis in axes(standing.method, setting.full) if axis.name == "rate")
    rate = rate._replace(start=rate.values.index(standing.values["rate"]), coarse=1)
    points = [(1.0, found.loss) for found in standing.finals]
    for budget in (budget for budget in BUDGETS if budget != 1):

        def loss(values: dict[str, float], budget: float = budget) -> float:
            return run(standing.values | values, TUNING, budget).loss

        values = standing.values | descend([rate], loss, TOLERANCE[setting.full]).values
        points += [(budget, run(values, seed, budget).loss) for seed in SEEDS]
    return fit([budget * setting.tokens for budget, _ in points], [found for _, found in points])
