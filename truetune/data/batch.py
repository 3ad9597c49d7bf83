"""Documents and the ragged batches made of them.

A batch is flat: its documents stand end to end, positions restart at every document, and nothing is
padding. Labels are already shifted: the label of a position is the next token of the *same* document,
so that no label ever crosses a border between documents.

Documents that begin alike may share rows: a token stands in the batch once for all that have the same tokens up to it
and the same one after it. Its row has one hidden state and one label for all of them; weights add up.

Shape suffixes: T tokens (rows) of the batch, L tokens of one document, S tokens of all documents, shared ones counted
for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100
"""Label of a position that has nothing to learn (the value that torch's losses ignore)."""
SHORTEST = 16
"""Tokens that a shared prefix has at least: below, the bookkeeping is not worth it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One tokenised row, or a piece or a turn of one.

    tokens:  int32 [L].
    targets: bool [L]; token i is to be predicted from the tokens before it. ``targets[0]`` is False.
    row:     index of the row in its source, for reports.
    ends:    positions of the last token of every trained turn that was not truncated.
    weights: float32 [L]; what each target counts for, above 0 (elsewhere without meaning). None: 1.
    """

    tokens: np.ndarray
    targets: np.ndarray
    row: int = 0
    ends: tuple[int, ...] = field(default=())
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def target_count(self) -> int:
        return int(self.targets.sum())

    def common(self, other: Document) -> int:
        """Positions, from the first on, at which both have the same token before the same next one, or the same end;
        0 for fewer than ``SHORTEST``."""
        shorter = min(len(self), len(other))
        differs = self.tokens[:shorter] != other.tokens[:shorter]
        same = int(differs.argmax()) if differs.any() else shorter
        same -= not len(self) == len(other) == same
        return same if same >= SHORTEST else 0

    def part(self, start: int, stop: int) -> Document:
        """The tokens from ``start`` to before ``stop`` as a document; its first token can be no target."""
        targets = self.targets[start:stop].copy()
        targets[:1] = False
        return Document(
            self.tokens[start:stop],
            targets,
            self.row,
            tuple(end - start for end in self.ends if start < end < stop),
            None if self.weights is None else self.weights[start:stop],
        )


@dataclass(frozen=True, slots=True)
class Shared:
    """Which rows of a batch its documents share.

    rows:    int64 [S]; where the tokens of the documents stand, document after document.
    lengths: tokens of each document, shared ones among them; they add up to S.
    times:   int64 [T]; how many documents have the label of a row among their targets.
    """

    rows: np.ndarray
    lengths: tuple[int, ...]
    times: np.ndarray


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents end to end.

    tokens:    int64 [T].
    labels:    int64 [T], shifted; ``IGNORE`` where the next token is no target.
    positions: int64 [T], those of the documents alone.
    lengths:   rows that each document adds, on the host; they add up to T. All of its tokens, unless it shares some.
    learned:   int64 [N], ascending; the rows that have a label. The host knows them, and a GPU need not be asked.
    total:     what all labels count for together, a number of the host.
    weights:   float32 [T], of the labels; 0 where there is none. None: every label counts 1.
    shared:    None: no row belongs to two documents.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    learned: Tensor
    total: float
    weights: Tensor | None = None
    shared: Shared | None = None

    @classmethod
    def of(cls, documents: Sequence[Document], device: torch.device | str = "cpu", shares: bool = False) -> Batch:
        """Lay the documents end to end on ``device``; shares: what each has in common with the one before it, once."""
        import torch  # here, since processes that make documents alone start sooner without it

        from truetune.devices import to_device

        places: list[np.ndarray] = []  # the rows of each document
        lengths, size = [], 0
        for i, d in enumerate(documents):
            common = d.common(documents[i - 1]) if shares and i else 0
            own = np.arange(size, size + len(d) - common)
            places.append(np.concatenate([places[-1][:common], own]) if common else own)
            lengths.append(len(own))
            size += len(own)
        tokens, positions, times = (np.zeros(size, dtype=np.int64) for _ in range(3))
        labels, weights = np.full(size, IGNORE, dtype=np.int64), np.zeros(size, dtype=np.float32)
        for d, rows in zip(documents, places, strict=True):
            tokens[rows], positions[rows] = d.tokens, np.arange(len(d))
            learned, targets = rows[:-1][d.targets[1:]], d.targets[1:]
            labels[learned] = d.tokens[1:][targets]
            weights[learned] += 1 if d.weights is None else d.weights[1:][targets]
            times[learned] += 1
        weighed = any(d.weights is not None for d in documents) or bool((times > 1).any())
        every, learned = np.concatenate(places), np.flatnonzero(labels != IGNORE)
        weight = torch.from_numpy(weights)
        return cls(
            to_device(torch.from_numpy(tokens), device),
            to_device(torch.from_numpy(labels), device),
            to_device(torch.from_numpy(positions), device),
            tuple(lengths),
            to_device(torch.from_numpy(learned), device),
            float(weight.double().sum()) if weighed else float(len(learned)),
            to_device(weight, device) if weighed else None,
            None if len(every) == size else Shared(every, tuple(map(len, documents)), times),
        )

    @property
    def token_count(self) -> int:
        """Tokens of the documents; a shared one counts for each."""
        return len(self.tokens) if self.shared is None else len(self.shared.rows)

    @property
    def target_count(self) -> int:
        """Tokens that the documents are to predict; a shared one counts for each."""
        return len(self.learned) if self.shared is None else int(self.shared.times.sum())

    @property
    def targets(self) -> Tensor:
        """Those tokens, int64; a shared one stands here for each."""
        import torch

        if self.shared is None:
            return self.labels[self.learned]
        return self.labels.repeat_interleave(torch.from_numpy(self.shared.times).to(self.labels.device))
