"""Products that are symmetric, alpha X X^T + beta D, of many matrices at once.

On a CPU only blocks on and below the diagonal are multiplied, and the others are copies of them.
Shape suffixes: B matrices, S rows, L columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.kernels.op import Op

BLOCK = 192
"""Rows of a block: of fewer a product is slower by more than the half that is left out."""


@Op
def symmetric(x_BSL: Tensor, added_BSS: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """[B, S, L] -> alpha X X^T + beta D [B, S, S], in their dtype; D is symmetric, or none. No gradient."""
    with torch.no_grad():
        if added_BSS is None:
            return (x_BSL @ x_BSL.mT).mul_(alpha)
        return torch.baddbmm(added_BSS, x_BSL, x_BSL.mT, beta=beta, alpha=alpha)


@symmetric.on("cpu")
def _lower_blocks(x_BSL: Tensor, added_BSS: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    matrices, size, _ = x_BSL.shape
    y_BSS = x_BSL.new_empty(matrices, size, size)
    with torch.no_grad():
        for i in range(matrices):
            x, y, added = x_BSL[i], y_BSS[i], None if added_BSS is None else added_BSS[i]
            for start in range(0, size, BLOCK):
                end = min(size, start + BLOCK)
                block = y[start:, start:end]
                old = block if added is None else added[start:, start:end]
                scale = 0.0 if added is None else beta  # what is there does not count, even if it is no number
                torch.addmm(old, x[start:], x[start:end].T, beta=scale, alpha=alpha, out=block)
                y[start:end, end:] = y[end:, start:end].T
    return y_BSS
