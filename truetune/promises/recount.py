"""What the rows hold, counted by other means than those that made the data report: rendered without a limit of length,
and cut by the limit's definition."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from truetune.data import formats
from truetune.data.chat import Renderer
from truetune.models.load import Loaded
from truetune.recipe import Data
from truetune.rows import Part


@dataclass(frozen=True, slots=True)
class Recount:
    """A part of the data, counted from its rows: all targets they hold, and what a limit of length takes away."""

    held: int
    kept: int
    documents: int
    dropped: int
    truncated: int
    by_role: Counter[str]


def recount(part: Part, data: Data, loaded: Loaded) -> Recount:
    endless = Renderer(loaded.tokenizer, loaded.stop_ids, 1 << 62, data.targets)
    held = kept = documents = dropped = truncated = 0
    by_role: Counter[str] = Counter()
    for number, row in zip(part.rows.numbers, part.rows.rows, strict=True):
        rendered = endless.documents(formats.read(part.report.format, row, number, data.weight_column), number)
        pieces = [piece for d in rendered.documents for piece in _pieces(d.targets, data.max_length, data.too_long)]
        held += sum(d.target_count for d in rendered.documents)
        kept += sum(int(piece.sum()) for piece in pieces)
        documents += len(pieces)
        dropped += not pieces
        truncated += rendered.length > data.max_length
        if rendered.length <= data.max_length or data.too_long == "split":  # all of its targets are kept
            by_role.update(rendered.targets_by_role)
    return Recount(held, kept, documents, dropped, truncated, by_role)


def _pieces(targets: np.ndarray, limit: int, too_long: str) -> list[np.ndarray]:
    """The targets of each document that is made of one with ``targets``, where it has any."""
    if len(targets) <= limit:
        pieces = [targets]
    elif too_long == "split":  # the first token of all but the first piece is the last of the one before
        pieces = [targets[:limit], *(targets[i : i + limit - 1] for i in range(limit, len(targets), limit - 1))]
    else:
        pieces = [targets[:limit]] if too_long == "truncate" else []
    return [piece for piece in pieces if piece.any()]
