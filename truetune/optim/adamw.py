"""AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101): as torch has it of fp32 weights, as a rule of bf16 ones.

Either's step is the operation ``kernels.adamw``: torch's own fused step, or what was chosen in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from truetune.kernels.adamw import adamw as operation
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
    return FusedAdamW(groups, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


class FusedAdamW(torch.optim.AdamW):
    """torch's, state and all: steps are counted on the device, and one that found no number is left out there."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        held: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(4)]
            steps: list[Tensor] = []
            self._init_group(group, *lists, [], steps)  # type: ignore[call-arg]
            if steps:
                counts = torch.stack(steps) + 1
                options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
                operation(*lists, rate=group["lr"], **options, step=counts, held=held)
                torch._foreach_copy_(steps, list((counts if held is None else counts - held).unbind()))
        return loss


class AdamW(Rule):
    """The same as a rule, whose moments are fp32 and whose rounding to bf16 is stochastic.

    State: 8*m*n bytes.
    """

    def __init__(self, groups: Groups, rate: float, *, betas: Betas, eps: float, weight_decay: float) -> None:
        super().__init__(groups, rate, betas=betas, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return moments(x)

    def move(self) -> None:
        for listed in self.lists():
            adamw_step(*listed, betas=listed[-1]["betas"], eps=listed[-1]["eps"])
