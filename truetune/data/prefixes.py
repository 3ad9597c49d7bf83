"""Prefixes that documents of a step share, and micro-batches that bring those together.

In the order of their tokens, a document shares its longest prefix with the one before it: what two documents have in
common is the least that neighbours between them have (as in a suffix array; Manber and Myers 1990). So one sort finds
the whole tree of prefixes, and each document adds to a batch only what the one before it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from truetune.data.batch import Document
from truetune.data.packing import best_fit_decreasing

PAYS = 0.05
"""Share of a step's tokens that sharing has to save."""
KEYS = 4
"""A micro-batch's documents have at most so many times its tokens, shared ones counted for each: every layer keeps a
key and a value for each of them."""


def packed_by_prefix(documents: Sequence[Document], capacity: int) -> list[list[int]] | None:
    """Indices of the documents per micro-batch of at most ``capacity`` tokens, each shared one counted once.

    In a micro-batch a document stands behind the one that it shares most with, as ``Batch.of`` needs it. None where
    sharing would save less than ``PAYS``.
    """
    order = _by_tokens(documents)
    groups: list[list[int]] = []
    tokens: list[int] = []
    keys: list[int] = []
    saved = 0
    for place, i in enumerate(order):
        length = len(documents[i])
        common = documents[i].common(documents[order[place - 1]]) if place else 0
        if common and max(tokens[-1] + length - common, _held(keys[-1] + length)) <= capacity:
            groups[-1].append(i)
            tokens[-1] += length - common
            keys[-1] += length
            saved += common
        else:
            groups.append([i])
            tokens.append(length)
            keys.append(length)
    if saved < PAYS * sum(map(len, documents)):
        return None
    held = [max(n, _held(k)) for n, k in zip(tokens, keys, strict=True)]
    return [[i for group in members for i in groups[group]] for members in best_fit_decreasing(held, capacity)]


def sharing_pairs(documents: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Neighbours in the order of their tokens that have a prefix in common."""
    order = [documents[i] for i in _by_tokens(documents)]
    return [pair for pair in pairwise(order) if pair[1].common(pair[0])]


def _by_tokens(documents: Sequence[Document]) -> list[int]:
    return sorted(range(len(documents)), key=lambda i: documents[i].tokens.astype(">i4").tobytes())


def _held(keys: int) -> int:
    """Tokens that so many keys count for."""
    return -(-keys // KEYS)
