"""``truetune bench optimizers``: methods compared where each is at its best, on what two users would train.

``comparison`` has the protocol; ``methods`` what is tuned, over which grid; ``descent`` the search and ``curve`` the
speed-up, both pure; ``workload`` and ``trial`` one run through a recipe, as any run is; ``table`` what came of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from truetune.bench.optimizers.comparison import TUNING, Comparison, compare, least, runs
from truetune.bench.optimizers.methods import BASELINE, METHODS, start
from truetune.bench.optimizers.table import group, notes, table
from truetune.bench.optimizers.trial import Left, Outcome, Setting, Trial, Trials, run
from truetune.bench.optimizers.workload import prepare
from truetune.bench.picture import draw
from truetune.errors import UserError
from truetune.training.patience import ended_by_signals

HOUR = 3600


class Asked(NamedTuple):
    """What the command line asked for. methods: all, if there are none. tokens: of a run. hours: after which no run is
    begun. to: the file of runs."""

    workload: str
    methods: Sequence[str]
    tokens: int | None
    hours: float | None
    to: Path | None


def optimize(asked: Asked, picture: Path | None) -> None:
    """Run what the file lacks of the comparison, and show what came of it.

    Raises UserError for a name that there is not, Interrupted after a signal.
    """
    names, to = _known(asked.methods), asked.to
    if to is None:
        raise UserError("a comparison takes hours and is kept run by run; name a file for them with --to FILE")
    ready = prepare(asked.workload, asked.tokens)

    def train(trial: Trial) -> Outcome:
        return run(ready.recipe(trial))

    until = time.monotonic() + (math.inf if asked.hours is None else asked.hours * HOUR)
    trials = Trials(to=to, train=train, until=until)
    with ended_by_signals(f"stopped; {to} has what was run, and the same command goes on from there"):
        _say_plan(ready.setting, names, trials)
        found = compare(ready.setting, names, trials)
    _show([found], trials, picture)


def show(files: Sequence[Path], methods: Sequence[str], picture: Path | None, idle: bool) -> None:
    """Show what is in ``files``; nothing is trained. Raises UserError if an option was given that is ``idle`` then."""
    if idle:
        raise UserError("--table trains nothing, so it goes with --method and --picture alone; leave out the others")
    names, trials = _known(methods), Trials(*files)
    if not trials.settings:
        raise UserError(f"{files[0]} has no runs yet; make some with --to {files[0]}")
    _show([compare(setting, names, trials) for setting in trials.settings], trials, picture)


def _known(methods: Sequence[str]) -> list[str]:
    if unknown := next((name for name in methods if name not in METHODS), None):
        raise UserError(f"{unknown} is none of the methods; choose among {', '.join(METHODS)}")
    return [name for name in METHODS if name in methods] or list(METHODS)


def _say_plan(setting: Setting, methods: Sequence[str], trials: Trials) -> None:
    """What is to come, before most of it: its cost is known from the first trial."""
    count = least(setting, methods)
    print(
        f"plan: {len(methods)} methods on {setting.workload}, {setting.tokens:,} tokens a run: at least {count:,.0f} "
        "runs, twice as many where searches move"
    )
    try:
        runs(setting, BASELINE, trials)(start(BASELINE, setting.full), TUNING)
    except Left:
        return
    known = trials.of(setting, BASELINE)
    each = setting.tokens * sum(o.cpu_seconds for o in known) / sum(o.tokens for o in known)
    spent = sum(o.cpu_seconds for o in trials.of(setting)) / HOUR
    print(
        f"plan: {each:.1f} CPU-seconds a run of AdamW, so {count * each / HOUR:.2f} to {2 * count * each / HOUR:.2f} "
        f"CPU-hours in all, of which {spent:.2f} are spent",
        flush=True,
    )


def _show(comparisons: Sequence[Comparison], trials: Trials, picture: Path | None) -> None:
    for one in comparisons:
        print(table(one, trials))
        for sentence in notes(one, trials):
            print(f"note: {sentence}")
    if picture:
        draw([group(one) for one in comparisons], picture)
        print(f"picture: {picture}")
