"""Rules that keep Adam's moments of a matrix in few dimensions: GaLore, Fira and APOLLO.

The smaller side of a matrix is projected: with m <= n and a basis Q of r columns, what is kept of G [m, n] is Q^T G [r,
n], and G Q of one that is as tall as it is wide or taller. Left out: GaLore's update within the backward pass, which
excludes clipping and accumulation, and its projections of the larger side or of both.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from truetune.devices import to_device
from truetune.optim.rule import Betas, Groups, Rule, State, decay, direction, require


def is_tall(x: Tensor) -> bool:
    return x.shape[-2] >= x.shape[-1]


def project(g: Tensor, q: Tensor) -> Tensor:
    """The coordinates of ``g`` in the columns of ``q``, on its smaller side."""
    return g @ q if is_tall(g) else q.mT @ g


def project_back(low: Tensor, q: Tensor, tall: bool) -> Tensor:
    return low @ q.mT if tall else q @ low


def subtract(x: Tensor, low: Tensor, q: Tensor, rate: float) -> None:
    """x <- x - rate * project_back(low) in one pass."""
    flat, low, q = x.view(-1, *x.shape[-2:]), low.flatten(0, -3), q.flatten(0, -3)
    flat.baddbmm_(*((low, q.mT) if is_tall(x) else (q, low)), alpha=-rate)


def singular_basis(g: Tensor, rank: int) -> Tensor:
    """The first ``rank`` singular vectors of the smaller side of ``g``, as columns."""
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    return (right.mT if is_tall(g) else left)[..., :rank].contiguous()


def limit_growth(length: Tensor, before: Tensor, growth: float = 1.01) -> Tensor:
    """Fira's limiter: what to divide by, so that a norm is at most ``growth`` times the one before, if there is one."""
    return torch.where(before > 0, (length / (before + 1e-8)).clamp_(min=growth) / growth, 1.0)


def corrected(t: int, group: dict[str, Any]) -> float:
    """The rate of a step with Adam's correction of the bias."""
    b1, b2 = group["betas"]
    return float(group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t))


class LowRank(Rule):
    """What the rules of this file share: their options, and Adam in the space of a basis."""

    takes = ("matrices",)
    adam = staticmethod(direction)

    def __init__(self, groups: Groups, rate: float, *, rank: int, gap: int, scale: float, **options: Any) -> None:
        require("rank", rank > 0, "an integer above 0")
        require("gap", gap > 0, "an integer above 0")
        require("scale", scale > 0, "a number above 0")
        super().__init__(groups, rate, rank=rank, gap=gap, scale=scale, **options)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        q = x.new_zeros(*x.shape[:-2], min(x.shape[-2:]), min(group["rank"], *x.shape[-2:]))
        low = torch.zeros_like(project(x, q))
        return {"Q": q, "m": low, "v": low.clone()}


class GaLore(LowRank):
    """Adam on the gradient's projection onto its own singular vectors (Zhao et al. 2024, arXiv 2403.03507).

    Every ``gap`` steps Q becomes the first ``rank`` singular vectors of the gradient; moments stay as they are. Then
    x <- x - rate scale Q adam(Q^T G), decayed after the step. The authors' rate is 0.01.
    State: 4*(m*r + 2*n*r) bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 0.25,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, rate, rank=rank, gap=gap, scale=scale, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        if (t - 1) % group["gap"] == 0:
            state["Q"] = singular_basis(g, state["Q"].shape[-1])
        low = self.adam(project(g, state["Q"]), state, group)
        subtract(x, low, state["Q"], corrected(t, group) * group["scale"])
        decay(x, group)


class Fira(LowRank):
    """GaLore, and what its projection leaves out, scaled as Adam scales the rest (Chen et al. 2024, arXiv 2410.01623).

    To GaLore's step comes R = phi (G - Q Q^T G), where phi is |adam(low)| / |low| of each column (row where tall), and
    |R| may grow by 1 % a step at most. ``scale`` is of the low part alone, as in the paper; in the authors' code it is
    of what is subtracted from G too, which is the same at 1, the default.
    State: 4*(m*r + 2*n*r + 1) bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 1.0,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, rate, rank=rank, gap=gap, scale=scale, betas=betas, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return super().start(x, group) | {"length": torch.zeros_like(x[..., :1, :1])}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        if (t - 1) % group["gap"] == 0:
            state["Q"] = singular_basis(g, state["Q"].shape[-1])
        q = state["Q"]
        low = project(g, q)
        psi = self.adam(low, state, group)
        axis = -1 if is_tall(g) else -2
        whole, kept = (torch.linalg.vector_norm(a, dim=axis, keepdim=True) for a in (g, low))
        phi = torch.linalg.vector_norm(psi, dim=axis, keepdim=True) / (kept + 1e-8)
        left_out = (whole + kept) * (whole - kept).clamp_(min=0)  # |G|^2 - |Q^T G|^2, of each column
        phi /= limit((phi * phi * left_out).sum((-2, -1), keepdim=True).sqrt_(), state)
        rate = corrected(t, group)
        x.addcmul_(g, phi, value=-rate)
        subtract(x, psi.mul_(group["scale"]).sub_(phi * low), q, rate)
        decay(x, group)


def limit(length: Tensor, state: State) -> Tensor:
    """What to divide matrices of this norm by, for the growth that is allowed; ``state`` keeps what is left."""
    factor = limit_growth(length, state["length"])
    state["length"] = length / factor
    return factor


class Apollo(LowRank):
    """The gradient itself, scaled by what Adam does to a random projection of it (Zhu et al. 2024, arXiv 2412.05270).

    x <- x - rate scale s G with s = |adam(low)| / |low| of each column (row where tall), or of the whole matrix with
    ``per`` "tensor"; its norm may grow by 1 % a step at most. Every ``gap`` steps there is another projection P, of
    normal numbers of variance 1 / rank; it is drawn from the number of the interval, the same for all matrices of a
    shape, so it is not kept. APOLLO-Mini is rank=1, per=tensor and a scale of sqrt(128).
    State: 4*(2*n*r + 1) bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 1.0,
        per: Literal["channel", "tensor"] = "channel",
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            groups, rate, rank=rank, gap=gap, scale=scale, per=per, betas=betas, eps=eps, weight_decay=weight_decay
        )

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        state = super().start(x, group) | {"length": torch.zeros_like(x[..., :1, :1])}
        del state["Q"]
        return state

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        side = min(g.shape[-2:])
        random = random_projection(side, min(group["rank"], side), (t - 1) // group["gap"])
        low = project(g, to_device(random.to(g.dtype), g.device))
        psi = self.adam(low, state, group)
        axes = (-2, -1) if group["per"] == "tensor" else (-1,) if is_tall(g) else (-2,)
        s = psi.norm(dim=axes, keepdim=True) / (low.norm(dim=axes, keepdim=True) + 1e-8)
        u = s * g
        factor = limit(torch.linalg.matrix_norm(u, keepdim=True), state)
        x.sub_(u.div_(factor), alpha=corrected(t, group) * group["scale"])
        decay(x, group)


def random_projection(side: int, rank: int, number: int) -> Tensor:
    """[side, rank] of normal numbers of variance 1 / rank; the same for the same arguments, on every machine."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(side, rank, generator=generator, dtype=torch.float64) / rank**0.5
