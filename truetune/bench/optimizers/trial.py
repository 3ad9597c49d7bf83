"""One trial: a whole run of the product, from a recipe, and what came of it; and the file of trials, which only grows.

A trial is known by its content, so that a comparison which was cut off, or is asked for again, finds what it has. Each
one is assembled and checked as any run is (``truetune.assembly``), keeps no checkpoint, and ends with its last weights.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from truetune import versions
from truetune.assembly import assemble
from truetune.bench.kernels import machine
from truetune.errors import UserError
from truetune.optim import state_bytes
from truetune.recipe import Recipe
from truetune.training.gradient import NonFinite
from truetune.training.record import Evaluation, Step
from truetune.training.trainer import CheckFailed

FORMAT = 1


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison train. data: digest of model, rows, and all of the recipe that they share.
    tokens: of a run of budget 1. full: whether every weight is trained, or LoRA. rank: of the low-rank methods."""

    workload: str
    data: str
    tokens: int
    full: bool
    rank: int


@dataclass(frozen=True)
class Trial:
    """options: the recipe's section ``optimizer``. falls: whether the rate falls after the warm-up. budget: the length
    of the run, as a multiple of the setting's."""

    setting: Setting
    options: dict[str, Any]
    falls: bool
    seed: int
    budget: float = 1.0

    @property
    def method(self) -> str:
        return str(self.options["name"])

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """loss: held out, after the last step; infinite where the run ``failed``, which says why. course: (tokens, loss) on
    the way. seconds: of the steps alone, and the median step. cpu_seconds: of the process in the whole trial."""

    loss: float
    course: tuple[tuple[int, float], ...]
    tokens: int
    steps: int
    seconds: float
    step_seconds: float
    cpu_seconds: float
    state_bytes: int
    failed: str | None = None


def run(recipe: Recipe) -> Outcome:
    """Train. A run whose loss or gradient is no number, or which a check ends, is a result; all else is raised."""
    before = time.process_time()
    trainer = assemble(recipe).trainer
    course: list[tuple[int, float]] = []
    seconds: list[float] = []
    tokens, failed = 0, None
    try:
        for record in trainer.steps():
            if isinstance(record, Step):
                tokens += record.tokens
                seconds.append(record.seconds)
            elif isinstance(record, Evaluation):
                course.append((tokens, record.loss))
    except (NonFinite, CheckFailed) as error:
        failed = str(error)
    if not failed and not math.isfinite(course[-1][1]):
        failed = "the held-out loss is no number"
    return Outcome(
        loss=math.inf if failed else course[-1][1],
        course=tuple((t, loss) for t, loss in course if math.isfinite(loss)),
        tokens=tokens,
        steps=len(seconds),
        seconds=sum(seconds),
        step_seconds=median(seconds) if seconds else 0.0,
        cpu_seconds=time.process_time() - before,
        state_bytes=state_bytes(trainer.optimizer),
        failed=failed,
    )


class Left(Exception):
    """A trial that was not run: there was no time, or nothing was to be trained."""


class Trials:
    """Those of some files, and the new ones, each of which is written at once to ``to``.

    train: what runs a trial; without it none is. until: the time, by ``time.monotonic``, after which none is begun.
    Raises UserError for a file that can't be read or is no such file.
    """

    def __init__(
        self, *files: Path, to: Path | None = None, train: Callable[[Trial], Outcome] | None = None, until: float = 0.0
    ) -> None:
        self.known: dict[str, tuple[Trial, Outcome]] = {}
        self._to, self._train, self._until = to, train, until
        for file in files:
            self.known |= {trial.key: (trial, outcome) for trial, outcome in _read(file)}
        if to:
            _begin(to)
            self.known |= {trial.key: (trial, outcome) for trial, outcome in _read(to)}

    def __call__(self, trial: Trial) -> Outcome:
        """What came of it. Raises Left if it was not run, and is not now."""
        if trial.key not in self.known:
            if self._train is None or time.monotonic() >= self._until:
                raise Left
            outcome = self._train(trial)
            self.known[trial.key] = (trial, outcome)
            if self._to:
                _append(self._to, trial, outcome)
            print(_told(trial, outcome), flush=True)
        return self.known[trial.key][1]

    def of(self, setting: Setting, method: str | None = None) -> list[Outcome]:
        """All that were run in a setting, of one method or of all."""
        known = self.known.values()
        return [found for trial, found in known if trial.setting == setting and method in (None, trial.method)]

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(trial.setting for trial, _ in self.known.values()))


def _told(trial: Trial, outcome: Outcome) -> str:
    options = "  ".join(f"{key} {value}" for key, value in trial.options.items() if key != "name")
    loss = f"{outcome.loss:.4f}" if not outcome.failed else f"failed: {outcome.failed}"
    length = "" if trial.budget == 1 else f"  {trial.budget:g} times as long"
    return f"{trial.method}  {options}  seed {trial.seed}{length}: {loss}  ({outcome.cpu_seconds:.1f} CPU-s)"


def _begin(file: Path) -> None:
    """Make ``file``, or cut off a last line that was not written whole. Raises UserError where it can't be written."""
    try:
        with file.open("ab+") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
    except OSError as error:
        raise UserError(f"can't write {file} ({error.strerror}); name another file") from error


def _append(file: Path, trial: Trial, outcome: Outcome) -> None:
    values = asdict(outcome) | {"loss": outcome.loss if math.isfinite(outcome.loss) else None}
    line = {"format": FORMAT, "trial": asdict(trial), "outcome": values, "machine": machine()}
    with file.open("a", encoding="utf-8", newline="\n") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _read(file: Path) -> Iterator[tuple[Trial, Outcome]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"can't read {file} ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no result of truetune bench optimizers; name one that it wrote") from error
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            versions.require(file, found["format"], FORMAT, found["machine"]["truetune"])
            trial, values = found["trial"], found["outcome"]
            course = tuple((tokens, loss) for tokens, loss in values["course"])
            loss = math.inf if values["loss"] is None else float(values["loss"])
            yield (
                Trial(**trial | {"setting": Setting(**trial["setting"])}),
                Outcome(**values | {"course": course, "loss": loss}),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: line {number} is no trial of truetune bench optimizers; remove the line, or name another file"
            ) from error
