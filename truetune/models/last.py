"""The last layer computed only for the rows whose hidden states are read; of the others only keys and values.

The layer's code stays its author's and runs twice: on the other rows until they are to attend, which gives their keys
and values, and on the rows that are read, whose attention sees all keys. Whatever in the layer works token by token,
as norms and feed-forward layers do, is so left out for rows that nobody reads. Whether a layer may be computed so is
for ``models.route`` to prove.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from truetune.models.swap import Swapped, subclass


class Reached(Exception):
    """The attention of rows that are not read, with its keys [K, T, d] and values: not to be gone on with."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


@dataclass(frozen=True)
class Reading:
    """rows: int64 [N], ascending, of the ``tokens`` of a batch: those whose hidden states are read.

    ahead: whether what runs is the other rows; others: their keys and values, once they are known.
    """

    rows: Tensor
    tokens: int
    ahead: bool = False
    others: tuple[Tensor, Tensor] | None = None

    @cached_property
    def rest(self) -> Tensor:
        read = torch.zeros(self.tokens, dtype=torch.int8, device=self.rows.device).index_fill(0, self.rows, 1)
        return read.argsort(stable=True)[: self.tokens - len(self.rows)]  # a GPU would be waited for by nonzero()

    def of_all(self, q_HNd: Tensor, k_KNd: Tensor, v_KNe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all tokens from those of the rows; queries that nobody reads are 0."""
        if self.ahead:
            raise Reached(k_KNd, v_KNe)
        if self.others is None:
            return q_HNd, k_KNd, v_KNe
        order = torch.cat([self.rest, self.rows]).argsort()
        k_KTd, v_KTe = (
            torch.cat([other, own], 1).index_select(1, order)
            for other, own in zip(self.others, (k_KNd, v_KNe), strict=True)
        )
        q_HTd = q_HNd.new_zeros(len(q_HNd), self.tokens, q_HNd.shape[2]).index_copy(1, self.rows, q_HNd)
        return q_HTd, k_KTd, v_KTe

    def of_rows(self, out_HTe: Tensor) -> Tensor:
        return out_HTe if self.others is None else out_HTe.index_select(1, self.rows)


def stack(decoder: nn.Module) -> nn.ModuleList:
    """The layers of ``decoder``. Raises ValueError unless they are in one list."""
    stacks = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m)]
    if len(stacks) != 1:
        raise ValueError(f"{len(stacks)} stacks of layers")
    return stacks[0]


def narrow(decoder: nn.Module) -> None:
    """Let the last layer of ``decoder`` compute only what is read, where it is told. Raises ValueError without one."""
    layer = stack(decoder)[-1]
    if not isinstance(layer, Swapped):
        layer.__class__ = subclass(type(layer), _narrowed(type(layer)))


def _narrowed(plain: Any) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, documents: Any = None, **kwargs: Any) -> Any:
        reading: Reading | None = None if documents is None else documents.reading
        if reading is None:
            more = {} if documents is None else {"documents": documents}
            return plain.forward(self, *args, **kwargs, **more)

        def run(rows: Tensor, **changes: Any) -> Any:
            now = replace(documents, reading=replace(reading, **changes))
            some, named = _at((args, kwargs), rows, reading.tokens)
            return plain.forward(self, *some, **named, documents=now)

        try:
            run(reading.rest, ahead=True)
        except Reached as reached:
            return run(reading.rows, others=(reached.keys, reached.values))
        raise ValueError("a layer attends to nothing")

    return forward


def _at(value: Any, rows: Tensor, tokens: int) -> Any:
    """``value`` with only these rows of every tensor [1, T, ...] in it."""
    if isinstance(value, Tensor):
        return value.index_select(1, rows) if value.ndim > 1 and value.shape[:2] == (1, tokens) else value
    if isinstance(value, dict):
        return {key: _at(item, rows, tokens) for key, item in value.items()}
    return tuple(_at(item, rows, tokens) for item in value) if isinstance(value, tuple | list) else value
