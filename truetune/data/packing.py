"""Best-fit-decreasing bin packing: documents into micro-batches, none split, none dropped.

The longest document first, each into the fullest bin that still holds it, else into a new one. At most
11/9 of the optimal number of bins, plus 6/9 (Johnson 1973; Dosa 2007 for the constant).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from truetune.errors import UserError


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices into ``lengths`` per bin, bins in the order of their opening.

    Every index is in exactly one bin. Documents of equal length keep their order.
    Raises UserError for a length above ``capacity``, ValueError for one below 1.
    """
    if len(lengths):
        require_fit(lengths, capacity)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    bins: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of by_room that have a bin, sorted: few distinct values, many bins
    for index in order:
        length = lengths[index]
        found = bisect_left(rooms, length)
        if found == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[found]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[found]
        bins[chosen].append(index)
        if left := room - length:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(chosen)
    return bins


def require_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> None:
    """Raise UserError if a document is longer than ``capacity``, ValueError if one is empty."""
    longest, shortest = int(np.argmax(lengths)), int(np.argmin(lengths))
    if lengths[longest] > capacity:
        raise UserError(
            f"document {longest} has {lengths[longest]} tokens but a micro-batch holds {capacity}; "
            "raise train.tokens_per_micro_batch or lower data.max_length"
        )
    if lengths[shortest] < 1:
        raise ValueError(f"document {shortest} has no tokens; drop it before packing")
