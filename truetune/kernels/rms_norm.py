"""Normalisation by the root mean square, with the addition to the residual stream that often comes before it.

    s = x + residual        y = s / sqrt(mean(s^2) + eps) * (weight + offset)

Zhang & Sennrich 2019, arXiv 1910.07467. Statistics and product are in at least fp32; y and s are rounded once.
Shape suffix: D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.kernels.native import pointwise
from truetune.kernels.op import Op, statistics_dtype


@Op
def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (y, s), both in x's dtype; without a residual s is x.

    offset: added to the weight (Gemma: 1). residual: of x's shape and dtype.
    """
    total = x if residual is None else x + residual
    wide = total.to(statistics_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight_D.to(wide.dtype) + offset)).to(x.dtype), total


@rms_norm.on("cpu", needs=pointwise.available)
def _native(
    x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if not pointwise.computes(x, *([] if residual is None else [residual])):
        return rms_norm.reference(x, weight_D, eps, offset, residual)
    return pointwise.RMSNorm.apply(x, weight_D, eps, offset, residual)
