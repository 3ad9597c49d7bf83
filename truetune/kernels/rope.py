"""Rotary positions of queries and keys (Su et al. 2021, arXiv 2104.09864).

Each pair (a, b) of a head is turned by the angle of its token's position:

    a' = a cos_a - b sin_a        b' = b cos_b + a sin_b

Pairs are (i, i + R) in the split-half layout, (2i, 2i + 1) in the interleaved one. What a head has beyond its W = 2R
rotated elements passes through. The table has a row per position, as models make it: R columns for the first elements
of the pairs and R for the second, which mostly repeat those.
Shape suffixes: H query heads, K key heads, T tokens, d head size, P positions of the table, R pairs, W rotated width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.kernels.native import pointwise
from truetune.kernels.op import Op, statistics_dtype


@Op
def rope(
    q_HTd: Tensor,
    k_KTd: Tensor,
    cos_PW: Tensor,
    sin_PW: Tensor,
    positions_T: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each token's turned by the row of the table at its position; the table gets no gradient.

    positions_T: None where row t is token t's.
    """
    tables = _rows(cos_PW, positions_T), _rows(sin_PW, positions_T)
    return tuple(_rotated(x, *tables, interleaved) for x in (q_HTd, k_KTd))  # type: ignore[return-value]


@rope.on("cpu", needs=pointwise.available)
def _native(
    q_HTd: Tensor,
    k_KTd: Tensor,
    cos_PW: Tensor,
    sin_PW: Tensor,
    positions_T: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    if interleaved or not pointwise.computes(q_HTd, k_KTd):
        return rope.reference(q_HTd, k_KTd, cos_PW, sin_PW, positions_T, interleaved)
    tables = _rows(cos_PW, positions_T), _rows(sin_PW, positions_T)
    return pointwise.Rope.apply(q_HTd, *tables), pointwise.Rope.apply(k_KTd, *tables)


def _rows(table_PW: Tensor, positions_T: Tensor | None) -> Tensor:
    table_PW = table_PW.detach()
    return table_PW if positions_T is None else table_PW[positions_T]


def _rotated(x: Tensor, cos_TW: Tensor, sin_TW: Tensor, interleaved: bool) -> Tensor:
    work = statistics_dtype(x.dtype)
    pairs = cos_TW.shape[-1] // 2
    (cos_a, cos_b), (sin_a, sin_b) = (table.to(work).split(pairs, -1) for table in (cos_TW, sin_TW))
    turned, rest = x[..., : 2 * pairs].to(work), x[..., 2 * pairs :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split(pairs, -1)
    a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
