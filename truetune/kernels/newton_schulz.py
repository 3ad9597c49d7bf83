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
from truetune.kernels.product import available, compiled
from truetune.kernels.symmetric import symmetric

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Symmetric = Callable[[Tensor, Tensor | None, float, float], Tensor]


@Op
def newton_schulz(matrices_BMN: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices [B, M, N] -> nearly orthogonal ones, computed in their dtype. No gradient."""
    return iterate(matrices_BMN, steps, eps, symmetric.reference)


@newton_schulz.on("cpu")
def _one_by_one(matrices_BMN: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Each as it lies, so that a tall one is not turned, and what is multiplied stays in the cache."""
    rounds = _compiled if matrices_BMN.dtype == torch.bfloat16 and available() else _by_torch
    with torch.no_grad():
        done = [rounds((x / _norm(x, eps)).contiguous(), steps, x.shape[0] > x.shape[1]) for x in matrices_BMN]
    return done[0][None] if len(done) == 1 else torch.stack(done)


def _by_torch(x: Tensor, steps: int, tall: bool) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram_1SS = symmetric((x.mT if tall else x)[None])
        p = symmetric(gram_1SS, gram_1SS, c, b)[0]
        x = torch.addmm(x, x, p, beta=a) if tall else torch.addmm(x, p, x, beta=a)
    return x


def _compiled(x: Tensor, steps: int, tall: bool) -> Tensor:
    a, b, c = COEFFICIENTS
    gram_SS, p_SS = x.new_empty(2, min(x.shape), min(x.shape))
    other = torch.empty_like(x)
    for _ in range(steps):
        x_SL = x.mT if tall else x
        compiled([x_SL], [x_SL], None, gram_SS, symmetric=True)
        compiled([gram_SS], [gram_SS], gram_SS, p_SS, c, b, symmetric=True)
        left, right = (x, p_SS) if tall else (p_SS, x.mT)
        x, other = compiled([left], [right], x, other, beta=a), x
    return x


def _norm(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (norm + eps).to(x.dtype)


def iterate(matrices_BMN: Tensor, steps: int, eps: float, symmetric: Symmetric) -> Tensor:
    """The iterations over ``symmetric``: (X, D, alpha, beta) -> alpha X X^T + beta D."""
    a, b, c = COEFFICIENTS
    tall = matrices_BMN.shape[1] > matrices_BMN.shape[2]
    with torch.no_grad():
        x_BSL = (matrices_BMN.mT if tall else matrices_BMN).contiguous()
        x_BSL = x_BSL / _norm(x_BSL, eps)
        for _ in range(steps):
            gram_BSS = symmetric(x_BSL, None, 1.0, 0.0)
            x_BSL = torch.baddbmm(x_BSL, symmetric(gram_BSS, gram_BSS, c, b), x_BSL, beta=a)
    return x_BSL.mT if tall else x_BSL
