"""The order of a run as a pure function of its lengths, portions and seed.

Each epoch is a permutation of the documents drawn from (seed, epoch); epochs stand end to end. A step takes
the next documents until it has ``tokens_per_step``, the document that crosses included, so neither packing
nor memory can change what a step learns from. Any step can be asked for at any time: a resume needs only its
number. Left out: mixtures of sources, curricula, ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from truetune.data.packing import best_fit_decreasing, require_fit
from truetune.errors import UserError


class Stream:
    """Steps of a run over documents of ``lengths`` (tokens each).

    tokens_per_micro_batch: most tokens of a micro-batch.
    One of epochs (a share is allowed, rounded to documents), steps and tokens (reached, the crossing
    document included) ends the run; the default is one epoch. The last step of a run by epochs or tokens
    may be short.

    Attributes: ``tokens`` and ``documents`` of the whole run, ``epochs`` as a fraction.
    Raises UserError if there is no document or one does not fit a micro-batch, ValueError if more than one
    of epochs, steps and tokens is given.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_step: int,
        tokens_per_micro_batch: int,
        seed: int,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        tokens: int | None = None,
    ) -> None:
        if sum(x is not None for x in (epochs, steps, tokens)) > 1:
            raise ValueError("epochs, steps and tokens each set the length of the run; keep one")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens_per_step = tokens_per_step
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.seed = seed
        if not len(self.lengths):
            raise UserError("no document is left to train on; check data.source and data.format")
        require_fit(self.lengths, tokens_per_micro_batch)
        if tokens is not None:
            limit = self._documents_until(tokens)
        elif steps is not None:
            limit = None
        else:
            limit = max(1, round((1.0 if epochs is None else epochs) * len(self.lengths)))
        self._ends = self._lay_out(steps, limit)
        self.documents = self._ends[-1]
        self.epochs = self.documents / len(self.lengths)
        self.tokens = self._tokens_of(self.documents)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._ends)

    def step(self, t: int) -> list[int]:
        """Indices of the documents of step ``t``, in the order of the run. Raises IndexError."""
        if not 0 <= t < len(self):
            raise IndexError(f"step {t} is outside a run of {len(self)} steps")
        position, end = self._ends[t - 1] if t else 0, self._ends[t]
        indices: list[int] = []
        while position < end:
            epoch, offset = divmod(position, len(self.lengths))
            taken = self._order(epoch)[offset : offset + end - position]
            indices += taken.tolist()
            position += len(taken)
        return indices

    def micro_batches(self, t: int) -> list[list[int]]:
        """The documents of step ``t``, packed into micro-batches of at most tokens_per_micro_batch."""
        step = self.step(t)
        bins = best_fit_decreasing(self.lengths[step].tolist(), self.tokens_per_micro_batch)
        return [[step[i] for i in members] for members in bins]

    def _order(self, epoch: int) -> np.ndarray:
        return _permutation(self.seed, epoch, len(self.lengths))

    def _tokens_of(self, documents: int) -> int:
        """Tokens of the first documents of the run."""
        epochs, rest = divmod(documents, len(self.lengths))
        return epochs * int(self.lengths.sum()) + int(self.lengths[self._order(epochs)[:rest]].sum())

    def _documents_until(self, tokens: int) -> int:
        """The least number of documents, from the start of the run, that have so many tokens."""
        epochs, rest = divmod(tokens, int(self.lengths.sum()))
        if not rest:
            return epochs * len(self.lengths)
        totals = self.lengths[self._order(epochs)].cumsum()
        return epochs * len(self.lengths) + int(np.searchsorted(totals, rest)) + 1

    def _lay_out(self, steps: int | None, limit: int | None) -> list[int]:
        """Documents of the run before the end of each step, until so many steps or documents."""
        documents = len(self.lengths)
        ends: list[int] = []
        reached = before = first = 0
        while True:
            totals = before + self.lengths[self._order(first // documents)].cumsum()
            while True:
                last = int(np.searchsorted(totals, reached + self.tokens_per_step))
                if limit is not None and first + min(last + 1, documents) >= limit:
                    return [*ends, limit]
                if last == documents:  # the step runs on into the next epoch
                    break
                ends.append(first + last + 1)
                if len(ends) == steps:
                    return ends
                reached = int(totals[last])
            before = int(totals[-1])
            first += documents


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, documents: int) -> np.ndarray:
    # NumPy keeps the raw output of its bit generators for ever, but not what Generator makes of it.
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(documents)
    order = np.argsort(raw, kind="stable")
    order.setflags(write=False)
    return order
