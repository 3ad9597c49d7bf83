"""Rows of a tensor by ranges that may overlap, put end to end; gradients of a row that stands in several add up.

In at least fp32, whatever the tensor's dtype: a prefix that a hundred documents share gets a hundred gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.op import statistics_dtype

Ranges = tuple[tuple[int, int], ...]


def pieces(x_KTd: Tensor, ranges: Ranges) -> Tensor:
    """Rows ``first`` to before ``end`` of every range, in their order -> [K, S, d], in memory by row."""
    out: Tensor = _Pieces.apply(x_KTd, ranges)
    return out


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_KTd: Tensor, ranges: Ranges) -> Tensor:
        ctx.ranges, ctx.shape = ranges, x_KTd.shape
        rows_TKd = x_KTd.transpose(0, 1)
        return torch.cat([rows_TKd[first:end] for first, end in ranges]).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_KSd: Tensor) -> tuple[Tensor, None]:
        heads, tokens, size = ctx.shape
        dx_TKd = dout_KSd.new_zeros((tokens, heads, size), dtype=statistics_dtype(dout_KSd.dtype))
        sizes = [end - first for first, end in ctx.ranges]
        for part, (first, end) in zip(dout_KSd.transpose(0, 1).split(sizes), ctx.ranges, strict=True):
            dx_TKd[first:end] += part
        return dx_TKd.to(dout_KSd.dtype).transpose(0, 1), None
