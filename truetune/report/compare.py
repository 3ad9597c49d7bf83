"""Runs beside each other: whether they can be compared at all, what differs in their recipes, what came of them.

Made from the run folders alone, as the report is. Losses compare only over the same held-out tokens from the same
base, and speeds only on the same machine; where that does not hold, a sentence says so instead of a number hiding it.
Tests of significance are left out: two runs on the same rows differ by their seeds too, which only more runs can show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from truetune.errors import UserError
from truetune.report import facts
from truetune.report.folder import Json, Run, explained
from truetune.report.page import template
from truetune.report.plots import Curve, Plot
from truetune.training.patience import write_text
from truetune.training.sinks import clean, duration, size

COLOURS = 8
"""Runs that have a colour of their own on the page."""
_LONGEST = 200

Row = tuple[str, list[str]]
"""A label, and a cell per run."""


@dataclass(frozen=True)
class Comparison:
    """``runs`` in the order given, and what they are called: their folders' names, or paths where two are the same."""

    runs: list[Run]
    names: list[str]

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Comparison:
        """Raises UserError for fewer than two runs, the same run twice, and whatever ``Run.read`` refuses."""
        if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
            raise UserError("a comparison is of two or more different runs; give the folder of each")
        runs = [Run.read(folder) for folder in folders]
        names = [folder.resolve().name for folder in folders]
        return cls(runs, names if len(set(names)) == len(names) else [str(folder) for folder in folders])

    @cached_property
    def doubts(self) -> list[str]:
        """A sentence for everything that keeps figures of the runs from being compared with those of the first."""
        first, others = self.runs[0], list(zip(self.names[1:], self.runs[1:], strict=True))
        found = []
        for what, part, key, kept in SAME:
            missing = [n for n, run in zip(self.names, self.runs, strict=True) if key not in run.get(part, {})]
            if missing:
                found.append(f"{' and '.join(missing)} did not record {what.lower()}, so {kept} cannot be compared.")
                continue
            then = first.get(f"{part}.{key}")
            other = [name for name, run in others if run.get(f"{part}.{key}") != then]
            if other:
                found.append(
                    f"{what} of {' and '.join(other)} differ from {self.names[0]}'s, so {kept} cannot be compared."
                )
        return found

    @cached_property
    def comparable(self) -> bool:
        """Whether losses and speeds may all be compared."""
        return not self.doubts

    @cached_property
    def recipe(self) -> list[Row]:
        """The keys of the recipes that differ; the folder apart, which always does."""
        flat = [dict(_flat(run.get("recipe", {}))) for run in self.runs]
        keys = dict.fromkeys(key for part in flat for key in part if key != "output.folder")
        return [
            (key, [_spelled(part[key]) if key in part else "" for part in flat])
            for key in keys
            if any(part.get(key, ...) != flat[0].get(key, ...) for part in flat)
        ]

    @cached_property
    def results(self) -> list[Row]:
        """What came of the runs, a row per figure."""
        return [(label, [spell(run) for run in self.runs]) for label, spell in RESULTS.items()]

    def plots(self) -> list[tuple[Plot, str]]:
        """Held-out loss over steps and over tokens, each with the sentence below it."""
        curves: dict[str, list[Curve]] = {"steps": [], "tokens": []}
        for number, (name, run) in enumerate(zip(self.names, self.runs, strict=True)):
            evaluations = looks(run)
            for unit, found in curves.items():
                points = [(e[unit], e["loss"]) for e in evaluations]
                found.append(Curve(name, f"run{number % COLOURS}", points))
        return [
            (Plot(f"Held-out loss over {unit}", found), f"Nats per target token, after so many {unit} of training.")
            for unit, found in curves.items()
        ]

    def as_json(self) -> Json:
        return {
            "comparable": self.comparable,
            "doubts": self.doubts,
            "recipe": {key: dict(zip(self.names, cells, strict=True)) for key, cells in self.recipe},
            "runs": [_figures(name, run) for name, run in zip(self.names, self.runs, strict=True)],
        }


def compare(folders: Sequence[Path], to: Path | None = None) -> tuple[Comparison, Path]:
    """Compare the runs, and write the page to ``to``, else as ``compare.html`` into the folder of the first."""
    target = to or folders[0] / "compare.html"
    with explained(folders[0]):
        found = Comparison.read(folders)
        text = template("compare.html").render(comparison=found, plots=found.plots())
    return found, write_text(target, text)


def looks(run: Run) -> list[Json]:
    """Every evaluation as {steps, tokens trained until then, loss}; a later one of the same step replaces it."""
    steps = run.steps
    tokens = dict(zip((s["step"] for s in steps), accumulate(s["tokens"] for s in steps), strict=True)) | {0: 0}
    found = {e["step"]: e["loss"] for e in run.records["evaluation"]}
    return [{"steps": s, "tokens": tokens[s], "loss": loss} for s, loss in sorted(found.items()) if s in tokens]


def _figures(name: str, run: Run) -> Json:
    return {
        "name": name,
        "folder": str(run.folder),
        "status": run.get("status"),
        "before": (run.before or {}).get("loss"),
        "after": (run.after or {}).get("loss"),
        "error": (run.after or {}).get("error"),
        "change": run.change,
        "steps": run.step,
        "tokens": run.total("tokens"),
        "targets": run.total("targets"),
        "seconds": run.total("seconds"),
        "tokens_per_second": None if run.void else run.get("result.tokens_per_second"),
        "void": run.void,
        "peak_memory": run.memory,
        "peak_gpu_memory": run.get("result.peak_gpu_memory"),
        "evaluations": looks(run),
    }


def _loss(evaluation: Json | None) -> str:
    if evaluation is None:
        return "not measured"
    error = evaluation.get("error")
    return facts.number(evaluation["loss"]) + (f" ± {error:.2g}" if error else "")


def _spoken(value: float | None, spell: Any) -> str:
    return "not recorded" if value is None else spell(value)


def _memory(run: Run) -> str:
    gpu = run.get("result.peak_gpu_memory")
    return _spoken(run.memory, size) + (f", of the GPU {size(gpu)}" if gpu else "")


RESULTS = {
    "Status": lambda run: run.get("status", "not recorded"),
    "Held-out loss before": lambda run: _loss(run.before),
    "Held-out loss after": lambda run: _loss(run.after),
    "Change": lambda run: "" if run.change is None else facts.percent(run.change, signed=True),
    "Checks that failed": lambda run: str(len(run.failed)),
    "Steps": lambda run: facts.count(run.step),
    "Tokens trained": lambda run: facts.count(run.total("tokens")),
    "Target tokens": lambda run: facts.count(run.total("targets")),
    "Time in steps": lambda run: _spoken(run.total("seconds"), duration),
    "Throughput": lambda run: "not quoted" if run.void else facts.throughput(run).partition(", ")[0],
    "Peak memory": _memory,
}
"""Label -> what a run says of it."""

SAME = (
    ("The held-out rows", "data.evaluation", "digest", "losses"),
    ("The tokens of the held-out rows", "data.evaluation", "document_digest", "losses"),
    ("The chat templates", "data.evaluation", "template", "losses"),
    ("The weights of the base", "model", "sha256", "losses"),
    ("The processors", "environment", "cpu", "speeds"),
    ("The devices", "environment", "device", "speeds"),
    ("The numbers of threads", "environment", "threads", "speeds"),
)
"""What must be the same, where run.json has it, and which figures rest on it."""


def _flat(part: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            value = {str(number): part for number, part in enumerate(value)}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _spelled(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return clean(", ".join(map(_spelled, value)), _LONGEST)
    return clean(str(value).lower() if isinstance(value, bool) else str(value), _LONGEST)
