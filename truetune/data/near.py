"""Rows that say nearly the same: MinHash and locality-sensitive hashing, with every pair that is told compared exactly.

From Broder 1997, On the resemblance and containment of documents, and Leskovec, Rajaraman & Ullman, Mining of Massive
Datasets, chapter 3. A text is the set of its shingles, which are every ``SHINGLE`` consecutive bytes of it (UTF-8,
lower case, one space for any white space); two texts are near duplicates if the Jaccard similarity of their sets is at
least ``THRESHOLD``. A signature has ``BANDS * DEPTH`` minima of hashed shingles, and is kept as one hash for each band.
Two texts of similarity s share a band with probability 1 - (1 - s^DEPTH)^BANDS.

Nothing is told that was not compared. What is missed: pairs that share no band (``missed``); a row whose neighbours
within a band are all near neither the first nor the last one before it there; what stands beyond the first ``LONGEST``
bytes; and pairs beyond the first ``COMPARISONS``, whose number is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE, BANDS, DEPTH, THRESHOLD = 8, 8, 4, 0.8
LONGEST = 1 << 16
COMPARISONS = 50_000

_AT_ONCE, _PAIRS = 1 << 20, 256
_draw = np.random.Generator(np.random.PCG64(20)).integers
_SEEDS = _draw(0, 1 << 64, BANDS * DEPTH, dtype=np.uint64, endpoint=False)
_ODD = _draw(0, 1 << 64, BANDS * DEPTH, dtype=np.uint64, endpoint=False) | np.uint64(1)
_NEVER = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Near:
    """Near duplicates that are no exact ones.

    of: int64 [rows], for every row the place of an earlier one that is near it, else -1; similarity: float32 [rows].
    left: pairs that share a band and were not compared, as there were too many.
    """

    of: np.ndarray
    similarity: np.ndarray
    left: int


def missed(similarity: float) -> float:
    """Probability that two texts of this Jaccard similarity share no band."""
    return float((1 - similarity**DEPTH) ** BANDS)


def normal(text: str) -> bytes:
    """What is compared of a text; at least ``SHINGLE`` bytes."""
    return (
        re.sub(r"\s+", " ", text[:LONGEST]).strip().lower().encode("utf-8", "replace")[:LONGEST].ljust(SHINGLE, b"\0")
    )


def shingles(text: str) -> np.ndarray:
    """The set of shingles of a text: uint64, sorted."""
    ordered = np.sort(_windows(normal(text)))
    return ordered[np.append(True, ordered[1:] != ordered[:-1])]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared elements of two sets (sorted, without repetition), as a share of all."""
    both = np.sort(np.concatenate([a, b]))
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def bands(texts: Sequence[str]) -> np.ndarray:
    """uint32 [texts, BANDS]: the hash of each band of each signature."""
    found, group, size = [], [], 0
    for text in texts:
        group.append(normal(text))
        size += len(group[-1])
        if size >= _AT_ONCE:
            found.append(_bands(group))
            group, size = [], 0
    return np.concatenate([*found, _bands(group)]) if group or not found else np.concatenate(found)


def _windows(text: bytes) -> np.ndarray:
    """uint64: a view of every ``SHINGLE`` consecutive bytes, which are as many as fit its 64 bits."""
    return np.ndarray(len(text) - SHINGLE + 1, np.uint64, text, strides=(1,))


def _bands(texts: list[bytes]) -> np.ndarray:
    if not texts:
        return np.zeros((0, BANDS), np.uint32)
    ends = np.cumsum([len(text) for text in texts])
    starts = ends - [len(text) for text in texts]
    mixed = _mix(_windows(b"".join(texts)))
    across = (ends[:-1, None] - np.arange(1, SHINGLE)).ravel()  # windows that hold bytes of two texts
    found = np.zeros((len(texts), BANDS), np.uint32)
    for band in range(BANDS):
        total = np.full(len(texts), band, np.uint64)
        for seed, odd in zip(*(part.reshape(BANDS, DEPTH)[band] for part in (_SEEDS, _ODD)), strict=True):
            values = (mixed ^ seed) * odd
            values[across] = _NEVER
            total = _mix(total ^ np.minimum.reduceat(values, starts))
        found[:, band] = total >> np.uint64(32)
    return found


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all: two rounds of multiply and shift."""
    for odd in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(odd)
    return values ^ (values >> np.uint64(31))


def find(
    hashes: np.ndarray,
    digests: np.ndarray,
    training: int,
    texts: Callable[[Sequence[int]], Iterable[str]],
    most: int = COMPARISONS,
) -> Near:
    """For every row an earlier training row that is near it, where there is one.

    hashes: of ``bands`` [rows, BANDS]; digests: [rows], equal for rows that are exact duplicates, which are not
    compared; training: so many rows at the start are training rows; the others are compared with those alone.
    texts: of the rows at places, which ascend.
    """
    of = np.full(len(hashes), -1, np.int64)
    similarity = np.zeros(len(hashes), np.float32)
    compared = left = 0
    for band in range(BANDS):
        for earlier, rows in _candidates(hashes[:, band], training):
            unknown = np.flatnonzero((of[rows] < 0) & (digests[rows] != digests[earlier]))
            some = unknown[: most - compared]
            compared, left = compared + len(some), left + len(unknown) - len(some)
            for begin in range(0, len(some), _PAIRS):
                block = some[begin : begin + _PAIRS]
                alike = _similarities(earlier[block], rows[block], texts)
                near = alike >= THRESHOLD
                of[rows[block][near]], similarity[rows[block][near]] = earlier[block][near], alike[near]
    return Near(of, similarity, left)


def _similarities(a: np.ndarray, b: np.ndarray, texts: Callable[[Sequence[int]], Iterable[str]]) -> np.ndarray:
    """The Jaccard similarities of the rows at places ``a`` with those at ``b``: float32 [pairs]."""
    places, pairs = np.unique(np.stack([a, b]), return_inverse=True)
    sets = list(map(shingles, texts(places.tolist())))
    return np.array([jaccard(sets[i], sets[j]) for i, j in pairs.reshape(2, -1).T.tolist()], np.float32)


def _candidates(hashes: np.ndarray, training: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (earlier training rows, rows) of equal hash: for every row the first such one, then the last before it."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    places = np.arange(len(order))
    opens = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)]
    first = np.maximum.accumulate(np.where(opens, places, 0))
    trained = np.concatenate([[0], np.cumsum(order < training)])
    last = np.minimum(places - 1, first + trained[places + 1] - trained[first] - 1)
    some, more = last >= first, last > first
    yield order[first[some]], order[some]
    yield order[last[more]], order[more]
