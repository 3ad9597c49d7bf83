"""MoMo: momentum whose step is as long as a model of the loss allows (Schaipp et al. 2023, arXiv 2305.07583).

Averages d of the gradients g, f of the losses and c of <g, x> make a linear model of the loss, and no loss is lower
than ``lower_bound``. With w the decay, D the preconditioner and rho the sum of an average's weights, the step is tau =
min(rate / rho, n / <d, d / D>), where n = (1 + rate w) (f - rho lower_bound - c) + <d, x>, or 0 if that is negative;
and x <- (x - tau d / D) / (1 + rate w). The rate is thus a cap. Sums are over all parameters. Left out: the authors'
running estimate of the lower bound, which hangs on the order of the groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truetune.optim.rule import Betas, Groups, Rule, State, require


class ModelBased(Rule):
    """What both share: the sums that the model is made of, and the step that it allows."""

    sees_loss = True

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"d": torch.zeros_like(x), "c": torch.zeros(len(x), dtype=torch.float64, device=x.device)}

    def fresh(self, t: int | Tensor) -> Any:
        """Share of step ``t``, a number or a tensor, in an average."""
        raise NotImplementedError

    def rho(self, t: Tensor) -> Tensor:
        """Sum of the shares of all steps so far."""
        raise NotImplementedError

    def gather(self, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        """What else is averaged."""

    def preconditioned(self, t: int, state: State, group: dict[str, Any]) -> Tensor:
        """d / D."""
        return state["d"]

    def model(self) -> State:
        """t, f, and the sums over all parameters of <d, x>, c and <d, d / D>."""
        return self.shared(steps=0.0, f=0.0, ahead=0.0, c=0.0, size=0.0)

    def prepare(self) -> None:
        if self.loss is None:
            raise TypeError(f"{type(self).__name__} needs the loss; call step with a function that returns it")
        model = self.model()
        model["f"].lerp_(torch.as_tensor(self.loss).detach().to(model["f"]), self.fresh(model["steps"].add_(1)))
        for sum_ in (model["ahead"], model["c"], model["size"]):
            sum_.zero_()
        for x, g, t, state, group in self.stacks():
            state["d"].lerp_(g, self.fresh(t))
            state["c"].lerp_(products(g, x), self.fresh(t))
            self.gather(g, t, state, group)
            model["ahead"] += products(state["d"], x).sum()
            model["c"] += state["c"].sum()
            model["size"] += products(state["d"], self.preconditioned(t, state, group)).sum()

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        model, grown = self.model(), 1 + group["lr"] * group["weight_decay"]
        rho = self.rho(model["steps"])
        n = grown * (model["f"] - rho * group["lower_bound"] - model["c"]) + model["ahead"]
        allowed = torch.where(model["size"] > 0, n.clamp(min=0) / model["size"], 0.0)
        x.sub_(torch.minimum(allowed, group["lr"] / rho) * self.preconditioned(t, state, group)).div_(grown)


def products(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each tensor of two stacks, [K], in float64: small differences of large sums are what is asked for."""
    return (a * b).reshape(len(a), -1).sum(1, dtype=torch.float64)


class MoMo(ModelBased):
    """SGD with momentum, as far as a linear model of the loss allows (Schaipp et al. 2023, arXiv 2305.07583).

    Averages begin with the first gradient, so rho is 1. The rate, a cap, is 1 with the authors.
    State: 4*m*n + 8 bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        momentum: float = 0.9,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        require("lower_bound", lower_bound >= 0, "0 or a positive number")
        super().__init__(groups, rate, momentum=momentum, lower_bound=lower_bound, weight_decay=weight_decay)

    def fresh(self, t: int | Tensor) -> Any:
        later = 1 - self.defaults["momentum"]
        if isinstance(t, Tensor):
            return torch.full_like(t, later).masked_fill_(t == 1, 1.0)
        return 1.0 if t == 1 else later

    def rho(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class MoMoAdam(ModelBased):
    """Adam, as far as a linear model of the loss allows (Schaipp et al. 2023, arXiv 2305.07583).

    D = sqrt(v / (1 - b2^t)) + eps; averages begin with 0, so rho is 1 - b1^t. The authors' rate, a cap, is
    0.01.
    State: 4*(2*m*n) + 8 bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        require("lower_bound", lower_bound >= 0, "0 or a positive number")
        super().__init__(groups, rate, betas=betas, eps=eps, lower_bound=lower_bound, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return super().start(x, group) | {"v": torch.zeros_like(x)}

    def fresh(self, t: int | Tensor) -> Any:
        return 1 - self.defaults["betas"][0]

    def rho(self, t: Tensor) -> Tensor:
        return 1 - self.defaults["betas"][0] ** t

    def gather(self, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        state["v"].lerp_(g * g, 1 - self.defaults["betas"][1])

    def preconditioned(self, t: int, state: State, group: dict[str, Any]) -> Tensor:
        root = (state["v"] / (1 - self.defaults["betas"][1] ** t)).sqrt_()
        return state["d"] / root.add_(self.defaults["eps"])
