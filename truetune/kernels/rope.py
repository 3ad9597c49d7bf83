"""Rotary positions of queries and keys (Su et al. 2021, arXiv 2104.09864).

Each pair (a, b) of a head is turned by the angle of its token's position:

    a' = a cos - b sin        b' = b cos + a sin

Pairs are (i, i + R) in the split-half layout, (2i, 2i + 1) in the interleaved one. What a head has beyond its 2R
rotated elements passes through. Shape suffixes: H query heads, K key heads, T tokens, d head size, P positions of the
table, R pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.kernels.native import pointwise
from truetune.kernels.op import Op, statistics_dtype


@Op
def rope(
    q_HTd: Tensor, k_KTd: Tensor, cos_PR: Tensor, sin_PR: Tensor, positions_T: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each token's turned by the row of the table at its position; the table gets no gradient."""
    return tuple(_rotated(x, cos_PR[positions_T], sin_PR[positions_T], interleaved) for x in (q_HTd, k_KTd))  # type: ignore[return-value]


@rope.on("cpu")
def _native(
    q_HTd: Tensor, k_KTd: Tensor, cos_PR: Tensor, sin_PR: Tensor, positions_T: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    if interleaved or not pointwise.computes(q_HTd, k_KTd):
        return rope.reference(q_HTd, k_KTd, cos_PR, sin_PR, positions_T, interleaved)
    tables = [table.detach()[positions_T].repeat(1, 2) for table in (cos_PR, sin_PR)]
    return pointwise.Rope.apply(q_HTd, *tables), pointwise.Rope.apply(k_KTd, *tables)


def _rotated(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    work = statistics_dtype(x.dtype)
    pairs = cos_TR.shape[-1]
    cos_TR, sin_TR = cos_TR.detach().to(work), sin_TR.detach().to(work)
    turned, rest = x[..., : 2 * pairs].to(work), x[..., 2 * pairs :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split(pairs, -1)
    a, b = a * cos_TR - b * sin_TR, b * cos_TR + a * sin_TR
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
