"""Every rule once more: slow, in float64, letter by letter from its paper, and without a line of the package.

A reference is a generator of one tensor: it yields the weights, is sent the gradient there, and so on. Rules whose
parameters decide something together take a list of tensors and are sent a list.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from itertools import count

import torch
from torch import Tensor

Steps = Generator[Tensor, Tensor, None]
JointSteps = Generator[list[Tensor], list[Tensor], None]


def ema(old: Tensor, new: Tensor, beta: float) -> Tensor:
    return beta * old + (1 - beta) * new


def adamw(x: Tensor, *, rate: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> Steps:
    m = v = torch.zeros_like(x)
    for t in count(1):
        g = yield x
        m, v = ema(m, g, betas[0]), ema(v, g**2, betas[1])
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        x = x - rate * weight_decay * x - rate * m_hat / (v_hat.sqrt() + eps)


def nadamw(x: Tensor, *, rate: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> Steps:
    m = v = torch.zeros_like(x)
    for t in count(1):
        g = yield x
        x = x * (1 - rate * weight_decay)
        m, v = ema(m, g, betas[0]), ema(v, g**2, betas[1])
        m_hat = betas[0] * m + (1 - betas[0]) * g
        x = x - rate / (1 - betas[0] ** t) * m_hat / (v.sqrt() / math.sqrt(1 - betas[1] ** t) + eps)


def sgd(x: Tensor, *, rate: float, momentum=0.9, nesterov=False, weight_decay=0.0) -> Steps:
    b = torch.zeros_like(x)
    while True:
        g = yield x
        g = g + weight_decay * x
        b = momentum * b + g
        x = x - rate * (g + momentum * b if nesterov else b)


def lion(x: Tensor, *, rate: float, betas=(0.9, 0.99), weight_decay=0.0) -> Steps:
    m = torch.zeros_like(x)
    while True:
        g = yield x
        x = x - rate * (torch.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * x)
        m = ema(m, g, betas[1])


def diffgrad(x: Tensor, *, rate: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> Steps:
    m = v = before = torch.zeros_like(x)
    for t in count(1):
        g = yield x
        g = g + weight_decay * x
        m, v = ema(m, g, betas[0]), ema(v, g**2, betas[1])
        f = 1 / (1 + torch.exp(-(before - g).abs()))
        x = x - rate * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * (m * f) / (v.sqrt() + eps)
        before = g


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def adafactor(x: Tensor, *, rate: float, power=0.8, threshold=1.0, weight_decay=0.0) -> Steps:
    v = torch.zeros_like(x)
    rows, columns = torch.zeros(x.shape[:-1]).to(x), torch.zeros(x.shape[:-2] + x.shape[-1:]).to(x)
    tiny = torch.finfo(x.dtype).eps
    for t in count(1):
        g = yield x
        beta = 1 - t**-power
        if x.ndim == 1:
            v = ema(v, g**2, beta)
            estimate = v
        else:
            rows, columns = ema(rows, (g**2).mean(-1), beta), ema(columns, (g**2).mean(-2), beta)
            mean = rows.mean(-1).clamp(min=tiny)
            estimate = torch.einsum("...i,...j->...ij", rows, columns) / mean[..., None, None]
        u = g / estimate.sqrt().clamp(min=tiny)
        u = u / max(1.0, rms(u) / threshold)
        x = x * (1 - rate * weight_decay) - rate * max(1e-3, rms(x)) * u
