"""Rows as tokens, each with what becomes of it: trained, read as context, written by the template, or cut away."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

from truetune.data.batch import Document
from truetune.data.chat import KINDS, REASONS, Renderer
from truetune.data.sources import canonical
from truetune.errors import UserError
from truetune.inspection.facts import Shown, Token
from truetune.inspection.walk import Walk

HEAD, TAIL, DOCUMENTS = 700, 200, 3
"""Tokens shown at the start and at the end of a document; documents shown of a row."""
_WHOLE = 1 << 30


def choose(walks: Sequence[Walk], wanted: Sequence[int]) -> Iterator[tuple[str, Walk, int]]:
    """(why, walk, place) of the training rows to show: those of the wanted numbers, in every source that has them; else
    of every source the first, the longest, the shortest, and one per reason why rows are dropped.

    Raises UserError for a number that no source has.
    """
    for number in wanted:
        found = [(walk, place) for walk in walks if (place := _place(walk, number)) is not None]
        if not found:
            names = ", ".join(walk.rows.name for walk in walks)
            raise UserError(
                f"row {number} is not among the {sum(len(walk.rows) for walk in walks):,} training rows of {names}: it "
                "is held out, left out by data.rows, or not there; choose another, such as --row "
                f"{walks[0].rows.numbers[0]}"
            )
        yield from (("chosen", walk, place) for walk, place in found)
    if not wanted:
        for walk in walks:
            yield from ((why, walk, place) for why, place in _usual(walk))


def _place(walk: Walk, number: int) -> int | None:
    """Where the row of a number is among the rows, whose numbers ascend."""
    place = bisect_left(walk.rows.numbers, number)
    return place if place < len(walk.rows) and walk.rows.numbers[place] == number else None


def _usual(walk: Walk) -> Iterator[tuple[str, int]]:
    told = set()
    kept = np.flatnonzero(walk.table["documents"])
    if len(kept):
        length = walk.table["length"][kept]
        for why, place in (("first", kept[0]), ("longest", kept[length.argmax()]), ("shortest", kept[length.argmin()])):
            if place not in told:
                told.add(place)
                yield why, int(place)
    for reason in walk.account.dropped:
        yield f"dropped: {reason}", int(np.argmax(walk.table["fate"] == 1 + REASONS.index(reason)))


def show(why: str, walk: Walk, place: int, renderer: Renderer) -> Iterator[Shown]:
    """The documents of a row, rendered whole; what data.too_long takes away is marked as cut."""
    given, number = next(walk.examples([place])), int(walk.rows.numbers[place])
    fate = renderer.documents(given, number).dropped
    whole = Renderer(renderer.tokenizer, renderer.stop_ids, _WHOLE, renderer.targets).documents(given, number)
    if not whole.documents:  # nothing to learn in it: there is no document to show, only what the row holds
        text = canonical(walk.rows.rows[place]).decode("utf-8", "replace")
        yield Shown(why, walk.name, number, whole.length, 0, 0, fate, (Token(text[: 4 * HEAD], "context"),), 1, 0)
    several = len(whole.documents) > 1
    for i, (document, kinds) in enumerate(zip(whole.documents[:DOCUMENTS], whole.kinds, strict=False), 1):
        named = f"{why}, document {i} of {len(whole.documents)}" if several else why
        yield _shown((named, walk.name), document, kinds, fate, renderer)


def _shown(
    called: tuple[str, str], document: Document, codes: np.ndarray, fate: str | None, renderer: Renderer
) -> Shown:
    length, limit = len(document), renderer.max_length
    if length > limit and (fate is not None or renderer.too_long in ("drop", "error")):
        limit = 0
    elif renderer.too_long == "split":
        limit = length
    kinds = np.where(codes == KINDS.index("template"), "template", "context").astype(object)
    kinds[document.targets] = "trained"
    kinds[limit:] = "cut"
    weights = np.ones(length) if document.weights is None else document.weights
    head, tail = (HEAD, length - TAIL) if length > HEAD + TAIL else (length, length)
    ids = document.tokens.tolist()
    first, last = (list(_pieces(renderer, ids[p], kinds[p], weights[p])) for p in (slice(head), slice(tail, None)))
    cut, tokens = int(document.targets[limit:].sum()), (*first, *last)
    return Shown(*called, document.row, length, document.target_count, cut, fate, tokens, len(first), tail - head)


def _pieces(renderer: Renderer, ids: list[int], kinds: np.ndarray, weights: np.ndarray) -> Iterator[Token]:
    """The text of each token; of tokens that are no character alone, together.

    A token is decoded with the one before it, since what some tokenizers make of a space depends on it.
    """

    def text(start: int, end: int) -> str:
        return str(renderer.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))

    before = start = 0
    for end in range(1, len(ids) + 1):
        known, longer = text(before, start), text(before, end)
        whole = not longer.endswith("\ufffd") or end - start >= 4 or end == len(ids)
        if whole or kinds[end] != kinds[start]:
            trained = kinds[start] == "trained"
            weight = float(weights[start]) if trained else 1.0
            yield Token(longer[len(known) :], str(kinds[start]), weight)
            before, start = start, end
