"""AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101): torch's own fused step on fp32 weights, ours on bf16 ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truetune.optim.rule import Betas, Groups, Rule, State, adamw_step, moments


def adamw(
    groups: list[dict[str, Any]],
    rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101), torch's own fused step.

    ``rate`` and ``weight_decay`` hold where one of ``groups`` has none of its own. Where any weight is bf16, it is
    ``AdamW`` instead: torch's step rounds those to the nearest.
    State: 8*m*n bytes.
    """
    if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return AdamW(groups, rate, betas=betas, eps=eps, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


class AdamW(Rule):
    """The same as a rule, whose moments are fp32 and whose rounding to bf16 is stochastic.

    State: 8*m*n bytes.
    """

    def __init__(self, groups: Groups, rate: float, *, betas: Betas, eps: float, weight_decay: float) -> None:
        super().__init__(groups, rate, betas=betas, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return moments(x)

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        adamw_step(x, g, t, state, group, group["betas"], group["eps"])
