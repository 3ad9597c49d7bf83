"""What ``truetune inspect`` finds: plain values, the same for the terminal, the page and ``--json``.

Rows are called by their number in the source, from 0. Lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from truetune.data.dataset import DataReport

TRAINING, HELD_OUT = "training", "held out"
"""The sides."""

FEW = 8
"""Rows that a tally names."""

Kind = str
"""Of a shown token: trained, context, template, or cut."""


@dataclass(slots=True)
class Tally:
    """How many rows, and the numbers of the first few."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, numbers: Sequence[int] | np.ndarray) -> None:
        self.count += len(numbers)
        self.first += map(int, numbers[: FEW - len(self.first)])


@dataclass(frozen=True, slots=True)
class Turns:
    """The trained turns: how many, how many were cut before their end, and which tokens end the others.

    endless: rows with a turn that does not end in a trained stop token.
    """

    turns: int
    cut: int
    endless: Tally
    ends: dict[str, int]


@dataclass(frozen=True, slots=True)
class Begin:
    """The token that begins a text: None where the tokenizer has none; whether the tokenizer writes it by itself."""

    token: str | None
    written: bool
    documents: int


@dataclass(frozen=True, slots=True)
class Template:
    """The chat template.

    own: whether it is the tokenizer's; else it is the default one.
    system: what it adds as a system prompt where a row has none, "" if nothing; opening: all that it writes before the
    first question.
    without_system: conversations without a system turn.
    """

    digest: str
    own: bool
    system: str
    opening: str
    without_system: int


@dataclass(frozen=True, slots=True)
class Limit:
    """What a max_length would cut: rows that are longer, their tokens beyond it, and the targets among those."""

    max_length: int
    rows: int
    tokens: int
    targets: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the rows before truncation. bars: (first length, last length, rows)."""

    shortest: int
    median: float
    mean: float
    longest: int
    bars: tuple[tuple[int, int, int], ...]
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A row, the training row that it is near, the latter's source, and the similarity; excerpts of both texts."""

    row: int
    other: int
    source: str
    similarity: float
    text: str
    other_text: str


@dataclass(frozen=True, slots=True)
class Copies:
    """Of ``rows`` that are documents, those that an earlier training row equals (exact) or is near."""

    rows: int
    exact: Tally
    near: Tally
    examples: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one source on one side ("training" or "held out"), and what became of them.

    report: that of a run on these rows, but that no documents make all of its lengths 0.
    weight: how many times an epoch has each document; None of what is held out.
    truncated: rows longer than max_length, whatever data.too_long makes of them; silent: rows with an empty answer.
    copies: rows that say the same as a training row of any source.
    """

    side: str
    name: str
    weight: float | None
    report: DataReport
    dropped: dict[str, Tally]
    truncated: Tally
    silent: Tally
    turns: Turns
    copies: Copies


@dataclass(frozen=True, slots=True)
class Fill:
    """The micro-batches at a tokens_per_micro_batch, over the ``steps_seen`` of the plan; fill: share of it in use."""

    tokens_per_micro_batch: int
    fill: float
    documents: float
    micro_batches_per_step: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of the run. last_step: tokens of the last one; own: the recipe's tokens_per_micro_batch."""

    own: int
    steps: int
    epochs: float
    tokens: int
    tokens_per_step: int
    last_step: int
    steps_seen: int
    fills: tuple[Fill, ...]


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    kind: Kind
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Shown:
    """One document of a row, before anything is cut, as tokens.

    source: as the part is called.
    targets: of the whole document; cut: those of them that are cut. fate: why the row is dropped, None if it is not.
    left: tokens in the middle that are not shown, after the first ``before``.
    """

    why: str
    source: str
    row: int
    length: int
    targets: int
    cut: int
    fate: str | None
    tokens: tuple[Token, ...]
    before: int
    left: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """The parts are those of the training side, then those held out; all else is of the former.

    left: pairs of rows that may be near duplicates and were not compared.
    refused: why a run would not start, else None.
    """

    truetune: str
    model: str
    max_length: int
    parts: tuple[Part, ...]
    begin: Begin
    template: Template | None
    lengths: Lengths
    left: int
    plan: Plan | None
    shown: tuple[Shown, ...]
    warnings: tuple[str, ...]
    refused: str | None
    seconds: float

    def of(self, side: str) -> list[Part]:
        return [part for part in self.parts if part.side == side]

    def called(self, part: Part) -> str:
        """The side of a part, with its source where there are several."""
        return f"{part.side}{self.where(part)}"

    def where(self, part: Part) -> str:
        """The end of a phrase on a part's rows: their source, where there are several."""
        return f" of {part.name}" if len(self.of(part.side)) > 1 else ""
