"""Orthogonalisation of many matrices at once by Newton-Schulz iterations, the heart of Muon.

    X <- X / |X|        repeat: A = X X^T,  X <- a X + (b A + c A A) X

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). The singular values end between about 0.7 and 1.2.
Shape suffixes: B matrices, M rows, N columns, S the smaller of the two, L the larger.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from truetune.kernels.op import Op

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Symmetric = Callable[[Tensor, Tensor | None, float, float], Tensor]


@Op
def newton_schulz(matrices_BMN: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices [B, M, N] -> nearly orthogonal ones, computed in their dtype. No gradient."""
    return iterate(matrices_BMN, steps, eps, _symmetric)


def iterate(matrices_BMN: Tensor, steps: int, eps: float, symmetric: Symmetric) -> Tensor:
    """The iterations over ``symmetric``: (X, D, alpha, beta) -> alpha X X^T + beta D."""
    a, b, c = COEFFICIENTS
    tall = matrices_BMN.shape[1] > matrices_BMN.shape[2]
    with torch.no_grad():
        x_BSL = (matrices_BMN.mT if tall else matrices_BMN).contiguous()
        norm_B11 = torch.linalg.matrix_norm(x_BSL, keepdim=True, dtype=torch.promote_types(x_BSL.dtype, torch.float32))
        x_BSL = x_BSL / (norm_B11 + eps).to(x_BSL.dtype)
        for _ in range(steps):
            gram_BSS = symmetric(x_BSL, None, 1.0, 0.0)
            x_BSL = torch.baddbmm(x_BSL, symmetric(gram_BSS, gram_BSS, c, b), x_BSL, beta=a)
    return x_BSL.mT if tall else x_BSL


def _symmetric(x_BSL: Tensor, added_BSS: Tensor | None, alpha: float, beta: float) -> Tensor:
    if added_BSS is None:
        return (x_BSL @ x_BSL.mT).mul_(alpha)
    return torch.baddbmm(added_BSS, x_BSL, x_BSL.mT, beta=beta, alpha=alpha)
