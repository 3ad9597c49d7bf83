"""One AdamW step of many tensors (Loshchilov & Hutter 2017, arXiv 1711.05101), rounded stochastically in bf16.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p (1 - rate decay) - rate m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

fp32 weights are torch's own fused step's. What a rounding takes (``kernels.rounding``) differs between reference and
kernel, whose random numbers differ; both repeat for the same seeds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused

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
    step: int | Tensor,
    seeds: list[int] | None = None,
    held: Tensor | None = None,
) -> None:
    """Update parameters, means and variances in place.

    Parameters and gradients are fp32 or bf16, of one dtype each; means and variances fp32. step: counted from 1; of all
    parameters, or of each [len(parameters)] on their device. seeds: one for each; bf16 parameters are rounded
    stochastically. None: to the nearest. held: a scalar of the device; unless it is 0 there, nothing is changed.
    """
    first, second = betas
    for i, (p, g, m, v) in enumerate(zip(parameters, gradients, means, variances, strict=True)):
        t = step if isinstance(step, int) else step[i].double()
        before = [] if held is None else [(x, x.clone(), held.bool()) for x in (p, m, v)]
        g = g.to(m.dtype)
        m.lerp_(g, 1 - first)
        v.mul_(second).addcmul_(g, g, value=1 - second)
        denominator = (v / (1 - second**t)).sqrt_().add_(eps).mul_(1 - first**t)
        wide = p.to(statistics_dtype(p.dtype)) * (1 - rate * weight_decay)
        wide.addcdiv_(m, denominator, value=-rate)
        p.copy_(rounded(wide, p, None if seeds is None else seeds[i]))
        for x, old, stays in before:
            x.copy_(torch.where(stays, old, x))


@adamw.on("cpu", "cuda")
def _torch_s(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    seeds: list[int] | None = None,
    held: Tensor | None = None,
) -> None:
    options: dict[str, Any] = {"eps": eps, "weight_decay": weight_decay}
    if parameters[0].dtype == torch.bfloat16:
        options |= {"rate": rate, "betas": betas, "step": step, "seeds": seeds, "held": held}
        adamw.reference(parameters, gradients, means, variances, **options)
        return
    if isinstance(step, int):
        step = torch.full((len(parameters),), float(step), device=parameters[0].device)
    options |= {"lr": rate, "beta1": betas[0], "beta2": betas[1], "amsgrad": False, "maximize": False}
    counts = list((step - 1).unbind())
    fused(parameters, gradients, means, variances, [], counts, fused=True, found_inf=held, **options)


def rounded(wide: Tensor, like: Tensor, seed: int | None) -> Tensor:
    """In the dtype of ``like``, to bf16 stochastically where there is a seed."""
    return wide if seed is None or like.dtype != torch.bfloat16 else stochastic(wide, seed)
