"""A run folder as the report and the model card read it.

Every part may be missing when a run stopped early; what is missing is said in ``Run.gaps``, never guessed.
Figures come from ``run.json``; where a run never came to write them, from the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from truetune import versions
from truetune.errors import UserError
from truetune.training.record import KINDS
from truetune.training.sinks import clean

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """``facts`` is run.json ({} without one); ``records`` are those of metrics.jsonl, by kind, in order.

    In a record null means a number that was not finite. All text is ``clean``.
    """

    folder: Path
    facts: Json
    records: dict[str, list[Json]]
    recipe: str
    gaps: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises UserError where ``folder`` is no run folder or a file in it is damaged."""
        gaps = []
        facts: Json = {}
        summary, metrics, recipe = folder / "run.json", folder / "metrics.jsonl", folder / "recipe.yaml"
        if not summary.exists() and not metrics.exists():
            raise UserError(f"{folder} has neither run.json nor metrics.jsonl; give the folder of a run")
        if summary.exists():
            facts = _object(summary.read_text(encoding="utf-8"), str(summary))
            if facts.get("format") is not None:
                versions.require(summary, facts["format"], versions.RUN, facts.get("truetune"))
        else:
            gaps.append("This folder has no run.json: model, data and result of the run are not recorded.")
        records: dict[str, list[Json]] = {kind: [] for kind in KINDS}
        lines = metrics.read_text(encoding="utf-8").split("\n") if metrics.exists() else [""]
        # Every complete line ends in a newline, so what follows the last one was cut while it was written.
        if lines.pop():
            gaps.append("The last record was cut while it was written and is left out.")
        for number, line in enumerate(lines, 1):
            where = f"{metrics}:{number}"
            record = _object(line, where)
            versions.require(where, record.get("format", versions.RECORD), versions.RECORD, facts.get("truetune"))
            if record.get("kind") not in records:
                raise UserError(f"{where} is no record that this version knows; update truetune")
            records[record["kind"]].append(record)
        if not records["step"]:
            gaps.append("No training step is recorded.")
        text = clean(recipe.read_text(encoding="utf-8")) if recipe.exists() else _yaml(facts.get("recipe"))
        return cls(folder, facts, records, text, tuple(gaps))

    def get(self, path: str, default: Any = None) -> Any:
        """The fact at a dotted path; ``default`` where it is missing or null."""
        value: Any = self.facts
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def name(self) -> str:
        return self.get("name", self.folder.resolve().name)

    @property
    def steps(self) -> list[Json]:
        return self.records["step"]

    @cached_property
    def step(self) -> int:
        """The last step that was recorded, 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0

    @cached_property
    def before(self) -> Json | None:
        """The evaluation before the first step."""
        at_start = [e for e in self.records["evaluation"] if e["step"] == 0]
        return self.get("result.before") or (at_start[0] if at_start else None)

    @cached_property
    def after(self) -> Json | None:
        """The evaluation of the weights that the run ended with, else the last one after a step."""
        later = [e for e in self.records["evaluation"] if e["step"] > 0]
        return self.get("result.after") or (later[-1] if later else None)

    @cached_property
    def change(self) -> float | None:
        """Relative change of the held-out loss, negative where it fell."""
        before, after = (self.before or {}).get("loss"), (self.after or {}).get("loss")
        return after / before - 1 if before and after is not None else None

    @cached_property
    def verdicts(self) -> list[Json]:
        """Every check once, with its last verdict; those that failed first."""
        seen = [v for checks in self.records["checks"] for v in checks["verdicts"]]
        last = {v["name"]: v for v in seen + self.get("verdicts", [])}
        return sorted(last.values(), key=lambda v: bool(v["passed"]))

    @property
    def failed(self) -> list[Json]:
        return [v for v in self.verdicts if not v["passed"]]

    @cached_property
    def void(self) -> str | None:
        """Why the throughput of this run may not be quoted, None where it may."""
        if alarms := [a for a in self.records["alarm"] if a["voids"]]:
            return f"{alarms[0]['name']} at step {alarms[0]['step']:,}: {alarms[0]['message']}"
        if self.failed:
            return f"the check “{self.failed[0]['name']}” failed: {self.failed[0]['figure']}"
        return self.get("void")

    def total(self, name: str) -> float | None:
        """``tokens``, ``targets`` or ``seconds`` of the run; without a result the sum over its steps."""
        summed = sum(s[name] for s in self.steps) if self.steps else None
        return self.get(f"result.{name}", summed)

    @cached_property
    def memory(self) -> int | None:
        """Largest resident size of the process, in bytes."""
        return self.get("result.peak_memory", max((s["memory"] for s in self.steps), default=None))


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Around whatever is made from a ``Run``: facts and records of another shape than runs write become a UserError."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
        UndefinedError,
    ) as error:
        raise UserError(
            f"{folder} has a run.json or metrics.jsonl that no run wrote ({type(error).__name__}: {error}); restore "
            "them from a copy, or report this if nobody changed them"
        ) from error


def _yaml(recipe: Json | None) -> str:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(key): _cleaned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_cleaned(part) for part in value]
    return clean(value) if isinstance(value, str) else value


def _object(text: str, where: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); restore the file from a copy") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object; restore the file from a copy")
    return _cleaned(value)
