"""Schedule-free AdamW and SGD (Defazio et al. 2024, arXiv 2405.15682): an average of the weights in place of a decay.

Gradients are taken at y, between the fast weights z and their average x: y = (1 - b) z + b x. Parameters hold y while
they are trained; evaluation and what is kept is x = y + (z - y) (1 - 1 / b). Each step is weighted by t^power times the
square of the largest rate so far, so a warm-up counts for little. The schedule should be constant after its warm-up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truetune.optim.rule import Betas, Groups, Rule, State, over, require, wide


class ScheduleFree(Rule):
    """What both share: z, its average, and the weights of the steps."""

    averages_weights = True

    def __init__(self, groups: Groups, rate: float, *, power: float, **options: Any) -> None:
        require("power", power >= 0, "0 or a positive number")
        super().__init__(groups, rate, power=power, **options)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"z": x.clone(), "largest": x.new_zeros(len(x)), "sum": x.new_zeros(len(x))}

    def average(self, y: Tensor, direction: Tensor, t: int, state: State, group: dict[str, Any], b: float) -> None:
        """z <- z - rate direction; c, the step's share of the average; y follows both."""
        z, rate = state["z"], group["lr"]
        largest = state["largest"].clamp_(min=rate)
        weight = t ** group["power"] * largest**2
        state["sum"].add_(weight)
        c = over(torch.where(state["sum"] > 0, weight / state["sum"], 0.0), y)
        y.lerp_(z, c).add_(direction * (rate * (b * (1 - c) - 1)))
        z.sub_(direction, alpha=rate)

    @staticmethod
    def between(group: dict[str, Any]) -> float:
        """b, the share of the average in y."""
        raise NotImplementedError

    def averages(self) -> dict[Tensor, Tensor]:
        return {
            y: wide(y).lerp(self.state[y]["z"], 1 - 1 / self.between(group))
            for group in self.param_groups
            for y in group["params"]
            if "z" in self.state[y]
        }


class ScheduleFreeAdamW(ScheduleFree):
    """AdamW without a schedule, by averaging its weights (Defazio et al. 2024, arXiv 2405.15682).

    The direction is g / (sqrt(v / (1 - b2^t)) + eps), and decay is of y. b1 takes momentum's place, above 0. The rate
    is one to ten times AdamW's.
    State: 4*(2*m*n + 2) bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        power: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        require("betas", betas[0] > 0, "two numbers below 1, the first above 0")
        super().__init__(groups, rate, power=power, betas=betas, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return super().start(x, group) | {"v": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        (b1, b2), v = group["betas"], state["v"]
        v.lerp_(g * g, 1 - b2)
        direction = g / ((v / (1 - b2**t)).sqrt_().add_(group["eps"]))
        self.average(x, direction.add_(x, alpha=group["weight_decay"]), t, state, group, b1)

    @staticmethod
    def between(group: dict[str, Any]) -> float:
        return float(group["betas"][0])


class ScheduleFreeSGD(ScheduleFree):
    """SGD without a schedule, by averaging its weights (Defazio et al. 2024, arXiv 2405.15682).

    The direction is g and the decay of y; ``momentum``, above 0, is the share of the average where gradients are taken.
    State: 4*(m*n + 2) bytes.
    """

    def __init__(
        self, groups: Groups, rate: float, *, momentum: float = 0.9, power: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        require("momentum", momentum > 0, "a number above 0 and below 1")
        super().__init__(groups, rate, power=power, momentum=momentum, weight_decay=weight_decay)

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        self.average(x, g.add(x, alpha=group["weight_decay"]), t, state, group, group["momentum"])

    @staticmethod
    def between(group: dict[str, Any]) -> float:
        return float(group["momentum"])
