"""The order of a run as a pure function of its lengths, weights, portions and seed.

Documents may come from several sources. Each source is an endless sequence: one permutation of its documents after
another, drawn from (seed, source, repetition), so that every document comes once before any comes twice. An epoch
takes ``weight`` times its number of documents from each, going on where the epoch before it stopped, and shuffles
which source is next; within a source the sequence decides. Epochs stand end to end. A step takes the next documents
until it has ``tokens_per_step``, the document that crosses included, so neither packing nor memory can change what a
step learns from. Any step can be asked for at any time: a resume needs only its number. Left out: curricula, ranks.
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
    sources: (documents, weight) of each source, whose documents stand end to end in ``lengths``; without it they are
    one source of weight 1.
    One of epochs (a share is allowed, rounded to documents), steps and tokens (reached, the crossing
    document included) ends the run; the default is one epoch. The last step of a run by epochs or tokens
    may be short.

    Attributes: ``tokens`` and ``documents`` of the whole run, ``epochs`` as a fraction; ``tokens_at``, the tokens of
    the run up to the end of each step.
    Raises UserError if there is no document or one does not fit a micro-batch, ValueError if more than one
    of epochs, steps and tokens is given or the sources are not of these lengths.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        tokens_per_step: int,
        tokens_per_micro_batch: int,
        seed: int,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        tokens: int | None = None,
        sources: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        if sum(x is not None for x in (epochs, steps, tokens)) > 1:
            raise ValueError("epochs, steps and tokens each set the length of the run; keep one")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens_per_step = tokens_per_step
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.seed = seed
        self.sources = tuple(sources or [(len(self.lengths), 1.0)])
        if sum(documents for documents, _ in self.sources) != len(self.lengths):
            raise ValueError("the sources have other documents than there are lengths")
        if not len(self.lengths):
            raise UserError("no document is left to train on; check data.source and data.format")
        require_fit(self.lengths, tokens_per_micro_batch)
        limit = None
        if steps is None and tokens is None:
            limit = max(1, self._before(1.0 if epochs is None else epochs))
        self._ends, self.tokens_at = self._lay_out(steps, limit, tokens)
        self.tokens = self.tokens_at[-1]
        self.documents = self._ends[-1]
        self.epochs = self.documents / self._rate

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._ends)

    def step(self, t: int) -> list[int]:
        """Indices of the documents of step ``t``, in the order of the run. Raises IndexError."""
        if not 0 <= t < len(self):
            raise IndexError(f"step {t} is outside a run of {len(self)} steps")
        position, end = self._ends[t - 1] if t else 0, self._ends[t]
        indices: list[int] = []
        epoch = self._epoch_of(position)
        while position < end:
            first = self._before(epoch)
            taken = self._order(epoch)[position - first : end - first]
            indices += taken.tolist()
            position += len(taken)
            epoch += 1
        return indices

    def micro_batches(self, t: int) -> list[list[int]]:
        """The documents of step ``t``, packed into micro-batches of at most tokens_per_micro_batch."""
        step = self.step(t)
        bins = best_fit_decreasing(self.lengths[step].tolist(), self.tokens_per_micro_batch)
        return [[step[i] for i in members] for members in bins]

    @property
    def _rate(self) -> float:
        """Documents of an epoch, which may be a fraction."""
        return sum(documents * weight for documents, weight in self.sources)

    def _before(self, epoch: float) -> int:
        """Documents of the run before a time that is counted in epochs."""
        return sum(_taken(*source, epoch) for source in self.sources)

    def _epoch_of(self, position: int) -> int:
        epoch = int(position / self._rate)
        while self._before(epoch) > position:
            epoch -= 1
        while self._before(epoch + 1) <= position:
            epoch += 1
        return epoch

    def _order(self, epoch: int) -> np.ndarray:
        return _order(self.seed, epoch, self.sources)

    def _lay_out(self, steps: int | None, limit: int | None, tokens: int | None) -> tuple[list[int], list[int]]:
        """Documents and tokens of the run up to the end of each step, until so many steps, documents or tokens."""
        ends: list[int] = []
        counts: list[int] = []
        reached = before = first = epoch = 0
        while True:
            totals = before + self.lengths[self._order(epoch)].cumsum()
            documents = len(totals)
            if tokens is not None and documents and totals[-1] >= tokens:
                limit = first + int(np.searchsorted(totals, tokens)) + 1
            while True:
                last = int(np.searchsorted(totals, reached + self.tokens_per_step))
                if limit is not None and first + min(last + 1, documents) >= limit:
                    return [*ends, limit], [*counts, int(totals[limit - first - 1])]
                if last == documents:  # the step runs on into the next epoch
                    break
                ends.append(first + last + 1)
                reached = int(totals[last])
                counts.append(reached)
                if len(ends) == steps:
                    return ends, counts
            before = int(totals[-1]) if documents else before
            first += documents
            epoch += 1


def _taken(documents: int, weight: float, epochs: float) -> int:
    """How far the sequence of a source has been followed after so many epochs."""
    return round(epochs * weight * documents)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, sources: tuple[tuple[int, float], ...]) -> np.ndarray:
    """The documents of one epoch in their order. Of a single source it is that of its sequence."""
    drawn, first = [], 0
    for number, (documents, weight) in enumerate(sources):
        begin, end = (_taken(documents, weight, e) for e in (epoch, epoch + 1))
        drawn.append(first + _sequence(seed, number, documents, begin, end))
        first += documents
    turns = np.repeat(np.arange(len(drawn)), [len(d) for d in drawn])
    turns = turns[_permutation(seed, len(sources), epoch, len(turns))]
    order = np.empty(len(turns), dtype=np.int64)
    for number, documents_of_source in enumerate(drawn):
        order[turns == number] = documents_of_source
    order.setflags(write=False)
    return order


def _sequence(seed: int, number: int, documents: int, begin: int, end: int) -> np.ndarray:
    """Places ``begin`` to ``end`` of a source's endless sequence."""
    parts = [np.empty(0, dtype=np.int64)]
    while begin < end:
        repetition, offset = divmod(begin, documents)
        parts.append(_permutation(seed, number, repetition, documents)[offset : offset + end - begin])
        begin += len(parts[-1])
    return np.concatenate(parts)


def _permutation(seed: int, number: int, repetition: int, size: int) -> np.ndarray:
    """``number`` is a source's, or the number of sources, for the shuffle of their turns."""
    # NumPy keeps the raw output of its bit generators for ever, but not what Generator makes of it.
    key = np.array([seed, repetition], dtype=np.uint64)
    counter = np.array([0, 0, 0, number], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(size), kind="stable")
