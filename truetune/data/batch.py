"""Documents and the ragged batches made of them.

A batch is flat: its documents stand end to end, positions restart at every document, and nothing is
padding. Labels are already shifted: the label of a position is the next token of the *same* document,
so that no label ever crosses a border between documents.

Shape suffixes: T tokens of the batch, L tokens of one document.
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
class Batch:
    """Documents end to end.

    tokens:    int64 [T].
    labels:    int64 [T], shifted; ``IGNORE`` where the next token is no target.
    positions: int64 [T], restarting at 0 in every document.
    lengths:   tokens of each document, on the host; they add up to T.
    weights:   float32 [T], of the labels; 0 where there is none. None: every label counts 1.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    weights: Tensor | None = None

    @classmethod
    def of(cls, documents: Sequence[Document], device: torch.device | str = "cpu") -> Batch:
        """Lay the documents end to end on ``device``."""
        import torch  # here, since processes that make documents alone start sooner without it

        tokens = np.concatenate([d.tokens for d in documents]).astype(np.int64)
        labels = np.full(len(tokens), IGNORE, dtype=np.int64)
        weighed = any(d.weights is not None for d in documents)
        weights = np.zeros(len(tokens), dtype=np.float32) if weighed else None
        start = 0
        for d in documents:
            end = start + len(d)
            labels[start : end - 1] = np.where(d.targets[1:], d.tokens[1:], IGNORE)
            if weights is not None:
                weights[start : end - 1] = np.where(d.targets[1:], 1 if d.weights is None else d.weights[1:], 0)
            start = end
        positions = np.concatenate([np.arange(len(d), dtype=np.int64) for d in documents])
        return cls(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(labels).to(device),
            torch.from_numpy(positions).to(device),
            tuple(len(d) for d in documents),
            None if weights is None else torch.from_numpy(weights).to(device),
        )
