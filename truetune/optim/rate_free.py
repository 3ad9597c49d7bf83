"""Rules that find their own rate: DoG, D-Adaptation for Adam, and Prodigy.

Each estimates D, how far the weights must go, from how far they went or how gradients agree, over all parameters
together; the recipe's rate and schedule multiply what they find, so the rate to write is 1. Groups of another rate (as
under LoRA+) take their share of it. Left out: steps that are sliced to save memory.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from truetune.optim.rule import Betas, Groups, Rule, State, norms, require


class DoG(Rule):
    """SGD at the rate r / sqrt(sum of |g|^2), r the distance from the start (Ivgi, Hinder & Carmon 2023, arXiv
    2302.12022).

    r begins at ``first`` (1 + |x0|) and never falls; per "all" (DoG) or "tensor" (L-DoG). Evaluated and kept is the
    average of the weights that gives the last steps most, with gamma = 8. Decay is coupled, g + decay x.
    State: 8*m*n bytes.
    """

    averages_weights = True
    finds_rate = True

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        first: float = 1e-6,
        per: Literal["all", "tensor"] = "all",
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        require("first", first > 0, "a number above 0")
        super().__init__(groups, rate, first=first, per=per, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        state = {"x0": x.clone(), "average": torch.zeros_like(x)}
        each = {"r": x.new_zeros(len(x)), "sum": x.new_zeros(len(x))} if group["per"] == "tensor" else {}
        return state | each

    def prepare(self) -> None:
        if self.defaults["per"] == "tensor":
            return
        shared = self.shared(r=0.0, sum=0.0)
        length, moved, gradient = (torch.zeros_like(shared["r"]) for _ in range(3))
        for x, g, _, state, group in self.stacks():
            length += state["x0"].square().sum()
            moved += (x - state["x0"]).square().sum()
            gradient += g.add(x, alpha=group["weight_decay"]).square().sum()
        self._measure(shared, length.sqrt(), moved.sqrt(), gradient)

    def _measure(self, kept: State, length: Tensor, moved: Tensor, gradient: Tensor) -> None:
        """r and the sum of squares, from |x0|, |x - x0| and |g|^2."""
        begins = kept["sum"] == 0
        kept["r"].copy_(torch.where(begins, self.defaults["first"] * (1 + length), torch.maximum(kept["r"], moved)))
        kept["sum"].add_(gradient + self.defaults["eps"] * begins)

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        g = g.add(x, alpha=group["weight_decay"])
        if group["per"] == "tensor":
            own, flat = {key: state[key] for key in ("r", "sum")}, (len(x),)
            lengths = [norms(a).view(flat) for a in (state["x0"], x - state["x0"], g)]
            self._measure(own, lengths[0], lengths[1], lengths[2].square())
            rate = (own["r"] / own["sum"].sqrt()).view(-1, *[1] * (x.ndim - 1))
        else:
            shared = self.shared(r=0.0, sum=0.0)
            rate = shared["r"] / shared["sum"].sqrt()
        x.sub_(group["lr"] * rate * g)
        state["average"].lerp_(x, 9 / (t + 8))

    def averages(self) -> dict[Tensor, Tensor]:
        return {p: state["average"] for p, state in self.state.items() if "average" in state}


class DAdaptAdam(Rule):
    """Adam times an estimate of D that only grows (Defazio & Mishchenko 2023, arXiv 2301.07733).

    With d the estimate, w = d rate, b3 = sqrt(b2), all sums over all parameters: numerator <- b3 numerator + (1 - b3) w
    <g, s / (sqrt(v) + eps)>; m <- b1 m + (1 - b1) w g; v as Adam's; s <- b3 s + (1 - b3) w g; d <- max(d, min(numerator
    / ((1 - b3) |s|_1), growth d)). x <- x - m / (sqrt(v) + eps), no bias corrected. Decay is decoupled.
    State: 12*m*n bytes.
    """

    finds_rate = True

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        first: float = 1e-6,
        growth: float | None = None,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        require("first", first > 0, "a number above 0")
        require("growth", growth is None or growth > 1, "a number above 1")
        super().__init__(groups, rate, first=first, growth=growth, betas=betas, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"m": torch.zeros_like(x), "v": torch.zeros_like(x), "s": torch.zeros_like(x)}

    def prepare(self) -> None:
        (b1, b2), first = self.defaults["betas"], self.defaults["first"]
        b3 = sqrt(b2)
        shared = self.shared(d=first, before=first, numerator=0.0)
        d, numerator = shared["d"], shared["numerator"]
        shared["before"].copy_(d)
        agreement, size = torch.zeros_like(d), torch.zeros_like(d)
        for _, g, _, state, group in self.stacks():
            m, v, s, w = state["m"], state["v"], state["s"], d * group["lr"]
            agreement += w * (g * s / (v.sqrt() + group["eps"])).sum()
            m.mul_(b1).add_((1 - b1) * w * g)
            v.lerp_(g * g, 1 - b2)
            s.mul_(b3).add_((1 - b3) * w * g)
            size += s.abs().sum()
        numerator.mul_(b3).add_((1 - b3) * agreement)
        found = torch.where(size > 0, numerator / ((1 - b3) * size), d)
        d.copy_(torch.maximum(d, torch.minimum(found, d * (self.defaults["growth"] or inf))))

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        before = self.shared(before=0.0)["before"]
        x.mul_(1 - group["weight_decay"] * group["lr"] * before)
        x.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-1)


class Prodigy(Rule):
    """D-Adaptation that weighs late steps more, so that it adapts sooner (Mishchenko & Defazio 2023, arXiv 2306.06101).

    With d the estimate, d0 = ``first``, w = d rate, b3 = sqrt(b2), all sums over all parameters: numerator <- b3
    numerator + (d / d0) w <g, x0 - x>; m <- b1 m + (1 - b1) d g; v <- b2 v + (1 - b2) d^2 g^2; s <- b3 s + (d / d0) w g
    (d for w with ``safeguard``, where the warm-up is long); d <- max(d, min(coefficient numerator / |s|_1, growth d)).
    x <- x - w m / (sqrt(v) + d eps), with w of before, no bias corrected. Decay is decoupled.
    State: 16*m*n bytes.
    """

    finds_rate = True

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        first: float = 1e-6,
        coefficient: float = 1.0,
        growth: float | None = None,
        safeguard: bool = False,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        require("first", first > 0, "a number above 0")
        require("coefficient", coefficient > 0, "a number above 0")
        require("growth", growth is None or growth > 1, "a number above 1")
        super().__init__(
            groups,
            rate,
            first=first,
            coefficient=coefficient,
            growth=growth,
            safeguard=safeguard,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"x0": x.clone(), "m": torch.zeros_like(x), "v": torch.zeros_like(x), "s": torch.zeros_like(x)}

    def prepare(self) -> None:
        (b1, b2), d0 = self.defaults["betas"], self.defaults["first"]
        b3 = sqrt(b2)
        shared = self.shared(d=d0, before=d0, most=d0, numerator=0.0)
        d, numerator, most = shared["d"], shared["numerator"], shared["most"]
        shared["before"].copy_(d)
        agreement, size = torch.zeros_like(d), torch.zeros_like(d)
        for x, g, _, state, group in self.stacks():
            m, v, s, w = state["m"], state["v"], state["s"], d * group["lr"]
            agreement += d / d0 * w * (g * (state["x0"] - x)).sum()
            m.mul_(b1).add_((1 - b1) * d * g)
            v.mul_(b2).add_((1 - b2) * d * d * g * g)
            s.mul_(b3).add_(d / d0 * (d if group["safeguard"] else w) * g)
            size += s.abs().sum()
        numerator.mul_(b3).add_(agreement)
        found = torch.where(size > 0, self.defaults["coefficient"] * numerator / size, d)
        start = torch.where(d == d0, torch.maximum(d, found), d)
        most.copy_(torch.where(size > 0, torch.maximum(most, found), most))
        d.copy_(torch.minimum(most, start * (self.defaults["growth"] or inf)))

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        shared = self.shared(d=0.0, before=0.0)
        w = shared["before"] * group["lr"]
        x.mul_(1 - group["weight_decay"] * w)
        x.sub_(w * state["m"] / (state["v"].sqrt() + shared["d"] * group["eps"]))
