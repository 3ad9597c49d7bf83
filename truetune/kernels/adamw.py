"""One AdamW step of many tensors (Loshchilov & Hutter 2017, arXiv 1711.05101), rounded stochastically in bf16.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p (1 - rate decay) - rate m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

What a rounding takes (``kernels.rounding``) differs between reference and kernel, whose random numbers differ; both
repeat for the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.kernels.op import Op, statistics_dtype
from truetune.kernels.rounding import stochastic


@Op
def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None = None,
) -> None:
    """Update parameters, means and variances in place. ``step`` counts from 1.

    Parameters and gradients are fp32 or bf16, of one dtype each; means and variances fp32. seed: rounds bf16 parameters
    stochastically; None: to the nearest.
    """
    first, second = betas
    for number, (p, g, m, v) in enumerate(zip(parameters, gradients, means, variances, strict=True)):
        g = g.to(m.dtype)
        m.lerp_(g, 1 - first)
        v.mul_(second).addcmul_(g, g, value=1 - second)
        denominator = (v / (1 - second**step)).sqrt_().add_(eps)
        wide = p.to(statistics_dtype(p.dtype)) * (1 - rate * weight_decay)
        wide.addcdiv_(m, denominator, value=-rate / (1 - first**step))
        p.copy_(wide if seed is None or p.dtype != torch.bfloat16 else stochastic(wide, seed + number))
