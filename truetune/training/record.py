"""What a run says about itself: one small dataclass per kind of event, the same for every reader.

The trainer yields records; the console, the JSONL file, TensorBoard, the report and the checks all read
these and nothing else. ``as_json`` is the spelling in ``metrics.jsonl``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from truetune import versions


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check: its name, whether it held, its figure with the bound, and what to do if it did not."""

    name: str
    passed: bool
    figure: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A greedy answer to a held-out prompt. ``stopped`` says that the model ended it by itself."""

    prompt: str
    reference: str
    answer: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Checks:
    """The preflight's verdicts, before the first step, and the targets of one document decoded."""

    kind: ClassVar[str] = "checks"
    step: int
    verdicts: tuple[Verdict, ...]
    shown: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    loss is the mean over the step's target tokens, weighted where they have weights, before the update (nats);
    gradient_norm and gradient_norm_l1 the L2 and the L1 norm before clipping (older records have no L1);
    rate the learning rate of the group that is furthest from its plan (else of the
    fastest), as the optimizer used it, and planned what
    the schedule says it should be; seconds the wall time of the step;
    memory the resident bytes of the process; gpu_memory and gpu_reserved the most bytes so far that tensors took on a
    GPU and that torch reserved for them (None without one);
    tokens and targets are those of the step's documents, tokens_once and
    targets_once the same with shared prefixes counted once, as they were computed (None in older records, which shared
    nothing); tokens_per_second counts tokens_once (nothing is padding) and is None once a check has failed;
    router_loss is what the objective adds to ``loss`` for the balance of experts, None where it adds nothing.
    """

    kind: ClassVar[str] = "step"
    step: int
    loss: float
    rate: float
    planned: float
    gradient_norm: float
    tokens: int
    targets: int
    documents: int
    micro_batches: int
    seconds: float
    memory: int
    tokens_per_second: float | None
    router_loss: float | None = None
    gradient_norm_l1: float | None = None
    tokens_once: int | None = None
    targets_once: int | None = None
    gpu_memory: int | None = None
    gpu_reserved: int | None = None

    @property
    def computed(self) -> int:
        return self.tokens if self.tokens_once is None else self.tokens_once


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out loss per target token (nats), perplexity, and accuracy of the greedy next token.

    Every target counts once, whatever its weight: weights say what to learn, not how well it was learned.

    error is the standard error of the loss over the ``documents`` that were held out (nats), None for fewer than two:
    how far the loss of other documents like these may lie from it. Two evaluations of one run see the same
    documents, so their difference is far surer than that.

    by_source: the loss of each source's held-out rows alone, where there are several.
    """

    kind: ClassVar[str] = "evaluation"
    step: int
    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    targets: int
    seconds: float
    best: bool = False
    documents: int | None = None
    error: float | None = None
    by_source: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Samples:
    kind: ClassVar[str] = "samples"
    step: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was completed; ``reason`` is "schedule", "time", "best", "budget", "end" or "interrupted"."""

    kind: ClassVar[str] = "saved"
    step: int
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something is wrong with the run. ``voids`` says that its throughput can no longer be quoted."""

    kind: ClassVar[str] = "alarm"
    step: int
    name: str
    message: str
    voids: bool


BEST_LOST = "best weights lost"
"""Name of the alarm of a run that ends with its last weights, because those of its best evaluation are damaged."""

Record = Checks | Step | Evaluation | Samples | Saved | Alarm
KINDS: dict[str, type] = {c.kind: c for c in (Checks, Step, Evaluation, Samples, Saved, Alarm)}


def as_json(record: Record) -> dict[str, Any]:
    """The record as a JSON object; ``kind`` names its class. JSON has no NaN and no infinity: they become null."""
    return {"kind": record.kind, "format": versions.RECORD, **_finite(asdict(record))}


def from_json(values: dict[str, Any]) -> Record:
    """The record that ``as_json`` spelled so; a number that was not finite stays None."""
    fields = {key: value for key, value in values.items() if key not in ("kind", "format")}
    for key, part in (("verdicts", Verdict), ("samples", Sample)):
        if key in fields:
            fields[key] = tuple(part(**values) for values in fields[key])
    record: Record = KINDS[values["kind"]](**fields)
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
