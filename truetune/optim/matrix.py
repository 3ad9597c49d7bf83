"""Rules that see a hidden weight as a matrix: Muon, SOAP and Shampoo. Vectors, embeddings and head are AdamW's.

A weight of three dimensions, as experts have, is so many matrices. Products are batched over all of a stack. Left out:
blocks of large matrices, merged dimensions, and preconditioners of vectors.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from truetune.devices import has_fast_bf16
from truetune.kernels.newton_schulz import newton_schulz
from truetune.kernels.symmetric import symmetric
from truetune.optim.rule import Betas, Groups, Rule, State, decay, direction, require


def orthogonalize(x: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrices with equal singular values, roughly, of [..., m, n] (``kernels.newton_schulz``).

    Of fp32, in bf16 where that is fast, as the paper's runs were: the iterations correct themselves.
    """
    flat = x.reshape(-1, *x.shape[-2:])
    flat = flat.bfloat16() if flat.dtype == torch.float32 and has_fast_bf16(flat.device) else flat
    return newton_schulz(flat, rounds).to(x.dtype).reshape(x.shape)


class Muon(Rule):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

    convention: "average", m <- mu m + (1 - mu) g, or "sum", m <- mu m + g; the scale is lost in either case, but
    Nesterov's step, mu m + (1 - mu) g or mu m + g, is the same only in proportion. scale: "rms", 0.2 sqrt(max(rows,
    columns)), whose steps are as large as AdamW's, so its rate serves; "spectral", sqrt(max(1, rows / columns)), whose
    rate is about 0.02; or "none". Decay is decoupled.
    State: 4*m*n bytes.
    """

    takes = ("matrices",)

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        convention: Literal["average", "sum"] = "average",
        scale: Literal["rms", "spectral", "none"] = "rms",
        rounds: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        require("rounds", 0 < rounds < 100, "an integer from 1 to 99")
        super().__init__(
            groups,
            rate,
            momentum=momentum,
            nesterov=nesterov,
            convention=convention,
            scale=scale,
            rounds=rounds,
            weight_decay=weight_decay,
        )

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"m": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        m, mu = state["m"], group["momentum"]
        if group["convention"] == "average":
            m.lerp_(g, 1 - mu)
            ahead = g.lerp(m, mu) if group["nesterov"] else m
        else:
            m.mul_(mu).add_(g)
            ahead = g.add(m, alpha=mu) if group["nesterov"] else m
        rows, columns = x.shape[-2:]
        scale = {"rms": 0.2 * max(rows, columns) ** 0.5, "spectral": max(1, rows / columns) ** 0.5, "none": 1.0}
        decay(x, group)
        x.sub_(orthogonalize(ahead, group["rounds"]), alpha=group["lr"] * scale[group["scale"]])


def gram(g: Tensor, side: str) -> Tensor:
    """G G^T, or G^T G for side "R"."""
    rows = g if side == "L" else g.mT
    return symmetric(rows.flatten(0, -3)).view(*g.shape[:-2], rows.shape[-2], rows.shape[-2])


def eigenbasis(a: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices as columns, by falling eigenvalue."""
    return torch.linalg.eigh(a + 1e-30 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)).eigenvectors.flip(-1)


class SOAP(Rule):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321).

    L and R decay averages of G G^T and G^T G, Q their eigenvectors, from the first gradient, at which nothing moves.
    Then m and v are those of G' = Q_L^T G Q_R, and x <- x - rate Q_L (m / sqrt(v)) Q_R^T, decayed after the step. m
    stays in the basis; every ``frequency`` steps Q <- qr(L Q), columns and v sorted by their eigenvalue. As the
    authors' code, less its options for vectors and for normalised gradients.
    preconditioner: the beta of L and R, that of v by default. largest: a longer side keeps its own basis.
    State: 4*(2*m*n + 2*m*m + 2*n*n) bytes.
    """

    takes = ("matrices",)
    waits = 1

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        betas: Betas = (0.95, 0.95),
        preconditioner: float | None = None,
        frequency: int = 10,
        largest: int = 10_000,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        require("preconditioner", preconditioner is None or 0 <= preconditioner < 1, "a number from 0 to below 1")
        require("frequency", frequency > 0, "an integer above 0")
        require("largest", largest > 0, "an integer above 0")
        super().__init__(
            groups,
            rate,
            betas=betas,
            preconditioner=preconditioner,
            frequency=frequency,
            largest=largest,
            eps=eps,
            weight_decay=weight_decay,
        )

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        state = {"m": torch.zeros_like(x), "v": torch.zeros_like(x)}
        for side, size in zip("LR", x.shape[-2:], strict=True):
            if size <= group["largest"]:
                for name in (side, f"Q{side}"):
                    state[name] = x.new_zeros(*x.shape[:-2], size, size)
        return state

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        if t == 1:
            self._gather(g, state, group)
            state |= {f"Q{side}": eigenbasis(state[side]) for side in "LR" if side in state}
            return
        adam = direction(_rotate(g, state), state, group)
        rate = group["lr"] * (1 - b2 ** (t - 1)) ** 0.5 / (1 - b1 ** (t - 1))
        x.sub_(_rotate_back(adam, state), alpha=rate)
        decay(x, group)
        self._gather(g, state, group)
        if (t - 1) % group["frequency"] == 0:
            still = _rotate_back(state["m"], state)
            self._refresh(state)
            state["m"] = _rotate(still, state)

    def _gather(self, g: Tensor, state: State, group: dict[str, Any]) -> None:
        beta = group["betas"][1] if group["preconditioner"] is None else group["preconditioner"]
        for side in "LR":
            if side in state:
                state[side].lerp_(gram(g, side), 1 - beta)

    def _refresh(self, state: State) -> None:
        """One step of the power iteration; the eigenvalues' order decides that of columns, and v goes with them."""
        for side, axis in (("L", -2), ("R", -1)):
            if side in state:
                a, q = state[side], state[f"Q{side}"]
                a = a @ q
                order = (q * a).sum(-2).argsort(dim=-1, descending=True, stable=True)
                state["v"] = state["v"].take_along_dim(order[..., None] if axis == -2 else order[..., None, :], axis)
                state[f"Q{side}"] = torch.linalg.qr(a.take_along_dim(order[..., None, :], -1)).Q


def _rotate(g: Tensor, state: State) -> Tensor:
    g = state["QL"].mT @ g if "QL" in state else g
    return g @ state["QR"] if "QR" in state else g


def _rotate_back(g: Tensor, state: State) -> Tensor:
    g = state["QL"] @ g if "QL" in state else g
    return g @ state["QR"].mT if "QR" in state else g


class Shampoo(Rule):
    """L^-1/4 M R^-1/4, as long as Adam's step (Gupta, Koren & Singer 2018, arXiv 1802.09568; Shi et al. 2023,
    arXiv 2309.06497).

    L and R decay averages of G G^T and G^T G, M of G, each over 1 - beta^t; the roots are taken anew every
    ``frequency`` steps. Each matrix of the update is scaled to the norm that Adam's would have (grafting). Decay is
    decoupled. eps: what is added to eigenvalues, as a share of the largest, since an absolute one has no scale; and to
    Adam's root.
    State: 4*(2*m*n + 2*m*m + 2*n*n) bytes.
    """

    takes = ("matrices",)

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        betas: Betas = (0.9, 0.99),
        frequency: int = 10,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        require("frequency", frequency > 0, "an integer above 0")
        super().__init__(groups, rate, betas=betas, frequency=frequency, eps=eps, weight_decay=weight_decay)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        sizes = dict(zip("LR", x.shape[-2:], strict=True))
        square = {
            name + side: x.new_zeros(*x.shape[:-2], size, size) for side, size in sizes.items() for name in ("", "root")
        }
        return {"m": torch.zeros_like(x), "v": torch.zeros_like(x)} | square

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        (b1, b2), m, v, eps = group["betas"], state["m"], state["v"], group["eps"]
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        for side in "LR":
            state[side].lerp_(gram(g, side), 1 - b2)
            if t % group["frequency"] == 1 % group["frequency"]:
                state[f"root{side}"] = fourth_root(state[side] / (1 - b2**t), eps)
        mean = m / (1 - b1**t)
        adam = mean / ((v / (1 - b2**t)).sqrt_() + eps)
        u = state["rootL"] @ mean @ state["rootR"]
        decay(x, group)
        x.sub_(u * (_length(adam) / _length(u).clamp_(min=1e-30)), alpha=group["lr"])


def fourth_root(a: Tensor, eps: float) -> Tensor:
    """(A + eps max(eigenvalues) I)^-1/4 of symmetric matrices; of zeros, the identity."""
    values, q = torch.linalg.eigh(a)
    values = values.clamp(min=0) + eps * values[..., -1:]
    values = torch.where(values > 0, values, 1.0)
    # Roots are rounded the same wherever an element lies; powers, on some processors, not.
    return (q / values.sqrt().sqrt()[..., None, :]) @ q.mT


def _length(a: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a, keepdim=True)
