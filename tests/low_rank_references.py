"""The rules of low rank and of 8 bits once more, letter by letter from their papers (``optimizer_references``)."""

from __future__ import annotations

import math
from itertools import count

import torch
from optimizer_references import Steps, by_matrix, ema, newton_schulz
from torch import Tensor


def leading(g: Tensor, rank: int) -> Tensor:
    """P [rank, smaller side] of the first singular vectors."""
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    return vt[:rank] if g.shape[0] >= g.shape[1] else u[:, :rank].T


@by_matrix
def galore(
    x: Tensor, *, rate: float, rank=128, gap=200, scale=0.25, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0
) -> Steps:
    right = x.shape[0] >= x.shape[1]
    m = v = torch.zeros(1, dtype=x.dtype)
    for t in count(1):
        g = yield x
        if (t - 1) % gap == 0:
            p = leading(g, rank)
        low = g @ p.T if right else p @ g
        m, v = ema(m, low, betas[0]), ema(v, low**2, betas[1])
        u = m / (v.sqrt() + eps)
        u = scale * (u @ p if right else p.T @ u)
        x = x - rate * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * u
        x = x - rate * weight_decay * x


def limiter(u: Tensor, before: float | None) -> tuple[Tensor, float]:
    """Fira's: the norm is at most 1.01 times the one before."""
    norm = float(u.norm())
    factor = max(norm / (before + 1e-8), 1.01) / 1.01 if before else 1.0
    return u / factor, norm / factor


@by_matrix
def fira(
    x: Tensor, *, rate: float, rank=128, gap=200, scale=1.0, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0
) -> Steps:
    right = x.shape[0] >= x.shape[1]
    m = v = torch.zeros(1, dtype=x.dtype)
    before = None
    for t in count(1):
        g = yield x
        if (t - 1) % gap == 0:
            p = leading(g, rank)
        low = g @ p.T if right else p @ g
        m, v = ema(m, low, betas[0]), ema(v, low**2, betas[1])
        psi = m / (v.sqrt() + eps)
        residual = g - (low @ p if right else p.T @ low)
        if right:
            phi = psi.norm(dim=1) / (low.norm(dim=1) + 1e-8)
            residual, before = limiter(torch.diag(phi) @ residual, before)
        else:
            phi = psi.norm(dim=0) / (low.norm(dim=0) + 1e-8)
            residual, before = limiter(residual @ torch.diag(phi), before)
        u = scale * (psi @ p if right else p.T @ psi) + residual
        x = x - rate * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * u
        x = x - rate * weight_decay * x


@by_matrix
def apollo(
    x: Tensor,
    *,
    rate: float,
    rank=128,
    gap=200,
    scale=1.0,
    per="channel",
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.0,
) -> Steps:
    tall, side = x.shape[0] >= x.shape[1], min(x.shape)
    rank = min(rank, side)
    m = v = torch.zeros(1, dtype=x.dtype)
    before = None
    for t in count(1):
        g = yield x
        torch.manual_seed((t - 1) // gap)
        p = torch.randn(side, rank, dtype=x.dtype).T / math.sqrt(rank)
        low = p @ (g.T if tall else g)
        m, v = ema(m, low, betas[0]), ema(v, low**2, betas[1])
        psi = m / (v.sqrt() + eps)
        if per == "tensor":
            s = psi.norm() / (low.norm() + 1e-8) * torch.ones(max(x.shape), dtype=x.dtype)
        else:
            s = psi.norm(dim=0) / (low.norm(dim=0) + 1e-8)
        u, before = limiter(g * (s[:, None] if tall else s), before)
        x = x - rate * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * scale * u
        x = x - rate * weight_decay * x


def eight_bits(x: Tensor, signed: bool, block: int) -> Tensor:
    """What is left of a tensor after its blocks are rounded to a dynamic 8-bit code, value by value."""
    values = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        for k in range(parts):
            middle = (0.1 + 0.9 * (k + 0.5) / parts) * 10 ** (i - 6)
            values += [middle, -middle] if signed else [middle]
    assert len(values) == 256
    code, left = torch.tensor(values, dtype=x.dtype), []
    for part in x.flatten().split(block):
        largest = part.abs().max()
        left += [largest * code[(value / largest - code).abs().argmin()] if largest > 0 else value for value in part]
    return torch.stack(left).view(x.shape)


def adamw_8bit(
    x: Tensor, *, rate: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, block=256, smallest=4096
) -> Steps:
    m = v = torch.zeros_like(x)
    for t in count(1):
        g = yield x
        m, v = ema(m, g, betas[0]), ema(v, g**2, betas[1])
        size = rate / (1 - betas[0] ** t)
        x = x * (1 - rate * weight_decay) - size * m / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        if x.numel() >= smallest:
            m, v = eight_bits(m, True, block), eight_bits(v, False, block)


def galore_8bit(
    x: Tensor,
    *,
    rate: float,
    rank=128,
    gap=200,
    scale=0.25,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.0,
    block=256,
    smallest=4096,
) -> Steps:
    """Blocks go on from one matrix of a tensor to the next, so here the tensor is whole."""
    right = x.shape[-2] >= x.shape[-1]
    m = v = torch.zeros(1, dtype=x.dtype)
    for t in count(1):
        g = yield x
        if (t - 1) % gap == 0:
            p = torch.stack([leading(part, rank) for part in g.reshape(-1, *g.shape[-2:])])
            p = p.view(*g.shape[:-2], *p.shape[-2:])
        low = g @ p.mT if right else p @ g
        m, v = ema(m, low, betas[0]), ema(v, low**2, betas[1])
        u = m / (v.sqrt() + eps)
        u = scale * (u @ p if right else p.mT @ u)
        x = x - rate * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * u
        x = x - rate * weight_decay * x
        if low.numel() >= smallest:
            m, v = eight_bits(m, True, block), eight_bits(v, False, block)


def cosine_basis(a: Tensor, rank: int) -> list[int]:
    """Indices of the columns of the cosine transform that hold most of ``a``, in L1, as its right side is read."""
    s = a @ transform(a.shape[1])
    return sorted(range(a.shape[1]), key=lambda j: -float(s[:, j].abs().sum()))[:rank]


def transform(n: int) -> Tensor:
    c = [[math.sqrt(2 / n) * math.cos(math.pi * i * (2 * j + 1) / (2 * n)) for j in range(n)] for i in range(n)]
    c[0] = [value * math.sqrt(0.5) for value in c[0]]
    return torch.tensor(c, dtype=torch.float64)


def right_side(function):
    """A rule that projects columns; a wide matrix is transposed before and after."""

    def turned(x: Tensor, **options) -> Steps:
        if x.shape[0] >= x.shape[1]:
            yield from function(x, turned=False, **options)
        inner = function(x.T, turned=True, **options)
        g = yield next(inner).T
        while True:
            g = yield inner.send(g.T).T

    return turned


@by_matrix
@right_side
def dct_adamw(
    x: Tensor,
    *,
    rate: float,
    turned: bool,
    rank=128,
    gap=1,
    feedback=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
) -> Steps:
    n = x.shape[1]
    m = v = torch.zeros_like(x)  # of every column of the transform; those that are not chosen are zero
    error, chosen = torch.zeros_like(x), []
    for t in count(1):
        g = yield x
        x = x * (1 - rate * weight_decay)
        a = g + error if feedback else g
        if t == 1 or t % gap == 0:
            now = cosine_basis(a, rank)
            stays = torch.tensor([float(j in chosen and j in now) for j in range(n)], dtype=x.dtype)
            m, v, chosen = m * stays, v * stays, now
        kept = torch.tensor([float(j in chosen) for j in range(n)], dtype=x.dtype)
        low = (a @ transform(n)) * kept
        error = a - low @ transform(n).T
        m, v = ema(m, low, betas[0]), ema(v, low**2, betas[1])
        root = math.sqrt(1 - betas[1] ** t)
        u = m / (v.sqrt() + eps * root) @ transform(n).T
        x = x - rate * root / (1 - betas[0] ** t) * u


@by_matrix
@right_side
def trion(x: Tensor, *, rate: float, turned: bool, rank=128, momentum=0.95, scale="rms", weight_decay=0.0) -> Steps:
    m = torch.zeros_like(x)
    rows, columns = (x.shape[1], x.shape[0]) if turned else x.shape
    factor = {
        "rms": 0.2 * math.sqrt(max(rows, columns)),
        "spectral": math.sqrt(max(1, rows / columns)),
        "dion": math.sqrt(rows / columns),
    }[scale]
    while True:
        g = yield x
        m = m + g
        q = transform(x.shape[1])[:, cosine_basis(m, rank)]
        low = m @ q
        m = m - (1 - momentum) * low @ q.T
        x = x * (1 - rate * weight_decay) - rate * factor * newton_schulz(low, 5) @ q.T
