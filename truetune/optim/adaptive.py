"""Rules that look at each element by itself, and Adafactor, which sums up rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truetune.optim.rule import Betas, Groups, Rule, State, decay, norms, require


class NadamW(Rule):
    """Adam with Nesterov's step ahead and decoupled decay (Dozat 2016; Dahl et al. 2023, AlgoPerf, arXiv 2306.07179).

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; step along (b1 m + (1 - b1) g) / (1 - b1^t). torch's NAdam is
    another: its momentum has a schedule of its own.
    State: 8*m*n bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, rate, betas=betas, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"m": torch.zeros_like(x), "v": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        (b1, b2), m, v = group["betas"], state["m"], state["v"]
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        ahead = m.lerp(g, 1 - b1) / (1 - b1**t)
        decay(x, group)
        x.addcdiv_(ahead, (v / (1 - b2**t)).sqrt_().add_(group["eps"]), value=-group["lr"])


class SGD(Rule):
    """Stochastic gradient descent with momentum and coupled decay (Polyak 1964; Sutskever et al. 2013).

    g <- g + decay x; b <- momentum b + g; x <- x - rate b, or rate (g + momentum b) with ``nesterov``: torch's SGD.
    State: 4*m*n bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, rate, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"momentum": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        b, mu = state["momentum"], group["momentum"]
        g = g.add(x, alpha=group["weight_decay"])
        b.mul_(mu).add_(g)
        x.sub_(g.add_(b, alpha=mu) if group["nesterov"] else b, alpha=group["lr"])


class Lion(Rule):
    """The sign of an interpolated momentum, with decoupled decay (Chen et al. 2023, arXiv 2302.06675).

    x <- x - rate sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g. Every element moves by the rate, so it wants a
    third to a tenth of AdamW's rate, and as much more decay.
    State: 4*m*n bytes.
    """

    def __init__(self, groups: Groups, rate: float, *, betas: Betas = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(groups, rate, betas=betas, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"m": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        (b1, b2), m = group["betas"], state["m"]
        decay(x, group)
        x.sub_(m.lerp(g, 1 - b1).sign_(), alpha=group["lr"])
        m.lerp_(g, 1 - b2)


class DiffGrad(Rule):
    """Adam, slower where the gradient no longer changes: friction 1 / (1 + exp(-|g' - g|)) (Dubey et al. 2019, arXiv
    1909.11015).

    The friction lies in 0.5 to 1; g' is the gradient of the step before, 0 at first. Decay is coupled, g + decay x.
    State: 12*m*n bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, rate, betas=betas, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"m": torch.zeros_like(x), "v": torch.zeros_like(x), "before": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        (b1, b2), m, v, before = group["betas"], state["m"], state["v"], state["before"]
        g = g.add(x, alpha=group["weight_decay"])
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        friction = before.sub_(g).abs_().sigmoid()
        before.copy_(g)
        rate = group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t)
        x.addcdiv_(friction.mul_(m), v.sqrt().add_(group["eps"]), value=-rate)


class Adafactor(Rule):
    """Adam's second moment from sums of rows and columns, no first, updates clipped (Shazeer & Stern 2018, arXiv
    1804.04235).

    V = R C / mean(R), with R and C the means of g^2 along each of the last two dimensions, decaying as b2 = 1 -
    t^-0.8; U = g / sqrt(V), scaled down to an RMS of ``threshold``; x <- x - rate max(0.001, RMS(x)) U. So the rate is
    a share of the weights' size: 0.01 is the paper's. Its own fall of the rate, min(rate, 1 / sqrt(t)), is left to the
    schedule; else this is torch's Adafactor. Decay is decoupled.
    State: 4*(m + n) bytes.
    """

    def __init__(
        self, groups: Groups, rate: float, *, power: float = 0.8, threshold: float = 1.0, weight_decay: float = 0.0
    ) -> None:
        require("power", 0 < power <= 1, "a number above 0 and at most 1")
        require("threshold", threshold > 0, "a number above 0")
        super().__init__(groups, rate, power=power, threshold=threshold, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        if x.ndim < 3:
            return {"v": torch.zeros_like(x)}
        return {"rows": torch.zeros_like(x[..., :1]), "columns": torch.zeros_like(x[..., :1, :])}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        new, tiny = t ** -group["power"], torch.finfo(x.dtype).eps
        size = x[0].numel() ** 0.5
        rate = group["lr"] * (norms(x) / size).clamp_(min=1e-3)
        decay(x, group)
        square = g * g
        if "v" in state:
            v = state["v"].lerp_(square, new).clone()
        else:
            rows = state["rows"].lerp_(square.mean(-1, keepdim=True), new)
            columns = state["columns"].lerp_(square.mean(-2, keepdim=True), new)
            v = rows / rows.mean(-2, keepdim=True).clamp_(min=tiny) * columns
        u = v.clamp_(min=tiny**2).rsqrt_().mul_(g)
        x.sub_(rate * u / (norms(u) / size / group["threshold"]).clamp_(min=1))
