"""Low-rank rules whose subspace is a choice among the columns of a cosine transform (Modoranu et al. 2025).

The transform C of the smaller side is orthogonal and fixed, so a basis is r indices, and finding it is one product: S =
G C (C^T G of a wide matrix), of whose columns (rows) those of the largest L1 norm are taken. By L2 it would be the best
choice that C allows; L1 is the paper's. Left out: the fast transform, and error feedback that is quantised.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from truetune.optim.low_rank import is_tall, project, project_back, subtract
from truetune.optim.matrix import orthogonalize
from truetune.optim.rule import Betas, Groups, Rule, State, decay, direction, require


def cosines(g: Tensor) -> Tensor:
    """The transform of the smaller side of ``g``, in its dtype and on its device."""
    return _cosines(min(g.shape[-2:]), g.dtype, g.device)


@cache
def _cosines(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """C_ij = sqrt(2 / n) cos(pi i (2j + 1) / (2n)), row 0 times sqrt(1/2)."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    c = math.sqrt(2 / n) * torch.cos(math.pi * i * (2 * j + 1) / (2 * n))
    c[0] *= math.sqrt(0.5)
    return c.to(device, dtype)


def choose(g: Tensor, rank: int) -> Tensor:
    """Which columns of C, [..., rank]."""
    s = project(g, cosines(g))
    return s.abs().sum(-2 if is_tall(g) else -1).topk(rank).indices


def columns(g: Tensor, chosen: Tensor) -> Tensor:
    """The basis [..., smaller side, rank]."""
    return cosines(g).mT[chosen].mT


class DCTAdamW(Rule):
    """Adam in a cosine subspace that follows the gradient (Modoranu et al. 2025, DCT-AdamW).

    Every ``gap`` steps the columns are chosen anew; moments of those that stay stay, others begin at 0. Then m and v of
    the low part, and x <- x - rate C_r adam. feedback: what the projection drops is added to the next gradient, at the
    price of another matrix. Decay is decoupled, before the step.
    State: 8*n*r + 8*r bytes.
    """

    takes = ("matrices",)

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        rank: int = 128,
        gap: int = 1,
        feedback: bool = False,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        require("rank", rank > 0, "an integer above 0")
        require("gap", gap > 0, "an integer above 0")
        super().__init__(
            groups, rate, rank=rank, gap=gap, feedback=feedback, betas=betas, eps=eps, weight_decay=weight_decay
        )

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        rank = min(group["rank"], *x.shape[-2:])
        low = torch.zeros_like(x[..., :rank] if is_tall(x) else x[..., :rank, :])
        chosen = torch.zeros(*x.shape[:-2], rank, dtype=torch.int64, device=x.device)
        return {"m": low, "v": low.clone(), "chosen": chosen} | (
            {"E": torch.zeros_like(x)} if group["feedback"] else {}
        )

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        (b1, b2), tall = group["betas"], is_tall(g)
        decay(x, group)
        g = g + state["E"] if group["feedback"] else g
        if t == 1 or t % group["gap"] == 0:
            self._turn(choose(g, state["chosen"].shape[-1]), tall, state)
        q = columns(g, state["chosen"])
        low = project(g, q)
        if group["feedback"]:
            state["E"] = g - project_back(low, q, tall)
        root = (1 - b2**t) ** 0.5
        u = direction(low, state, group | {"eps": group["eps"] * root})
        subtract(x, u, q, group["lr"] * root / (1 - b1**t))

    @staticmethod
    def _turn(chosen: Tensor, tall: bool, state: State) -> None:
        """Moments go where their columns went: by Q_before^T Q_after, which holds zeros and ones."""
        same = (state["chosen"][..., :, None] == chosen[..., None, :]).to(state["m"])
        for name in ("m", "v"):
            state[name] = state[name] @ same if tall else same.mT @ state[name]
        state["chosen"] = chosen


class Trion(Rule):
    """Muon in a cosine subspace of its momentum, the rest kept for later (Modoranu et al. 2025, Trion).

    M <- M + G; the low part of M in its chosen columns, orthogonalised, is the update; M loses 1 - ``momentum`` of that
    part. scale: "rms", 0.2 sqrt(max(rows, columns)); "spectral", sqrt(max(1, rows / columns)); "dion", sqrt(rows /
    columns); or "none". Decay is decoupled.
    State: 4*m*n bytes.
    """

    takes = ("matrices",)

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        rank: int = 128,
        momentum: float = 0.95,
        scale: Literal["rms", "spectral", "dion", "none"] = "rms",
        weight_decay: float = 0.0,
    ) -> None:
        require("rank", rank > 0, "an integer above 0")
        super().__init__(groups, rate, rank=rank, momentum=momentum, scale=scale, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"m": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        m, tall = state["m"].add_(g), is_tall(g)
        q = columns(m, choose(m, min(group["rank"], *m.shape[-2:])))
        low = project(m, q)
        m.sub_(project_back(low, q, tall), alpha=1 - group["momentum"])
        rows, wide = x.shape[-2:]
        scale = {
            "rms": 0.2 * max(rows, wide) ** 0.5,
            "spectral": max(1, rows / wide) ** 0.5,
            "dion": (rows / wide) ** 0.5,
            "none": 1.0,
        }
        decay(x, group)
        subtract(x, orthogonalize(low), q, group["lr"] * scale[group["scale"]])
