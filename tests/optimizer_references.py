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


def newton_schulz(x: Tensor, rounds: int) -> Tensor:
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, rounds).T
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def by_matrix(function):
    """A rule of matrices, for tensors of three dimensions too: each of the first is a matrix of its own."""

    def joined(x: Tensor, **options) -> Steps:
        if x.ndim == 2:
            yield from function(x, **options)
        each = [function(part, **options) for part in x]
        g = yield torch.stack([next(one) for one in each])
        while True:
            g = yield torch.stack([one.send(part) for one, part in zip(each, g, strict=True)])

    return joined


@by_matrix
def muon(
    x: Tensor,
    *,
    rate: float,
    momentum=0.95,
    nesterov=True,
    convention="average",
    scale="rms",
    rounds=5,
    weight_decay=0.0,
) -> Steps:
    m = torch.zeros_like(x)
    rows, columns = x.shape
    while True:
        g = yield x
        if convention == "average":
            m = ema(m, g, momentum)
            u = ema(m, g, momentum) if nesterov else m
        else:
            m = momentum * m + g
            u = momentum * m + g if nesterov else m
        factor = {"rms": 0.2 * math.sqrt(max(rows, columns)), "spectral": math.sqrt(max(1, rows / columns)), "none": 1}
        x = x - rate * weight_decay * x - rate * factor[scale] * newton_schulz(u, rounds)


@by_matrix
def soap(
    x: Tensor,
    *,
    rate: float,
    betas=(0.95, 0.95),
    preconditioner=None,
    frequency=10,
    largest=10_000,
    eps=1e-8,
    weight_decay=0.0,
) -> Steps:
    beta = betas[1] if preconditioner is None else preconditioner
    sides = [size <= largest for size in x.shape]
    q = [torch.eye(size, dtype=x.dtype) for size in x.shape]
    g = yield x
    a = [(1 - beta) * (g @ g.T), (1 - beta) * (g.T @ g)]
    for i in (0, 1):
        if sides[i]:
            tiny = 1e-30 * torch.eye(x.shape[i], dtype=x.dtype)
            q[i] = torch.linalg.eigh(a[i] + tiny)[1].flip(1)
    m = v = torch.zeros_like(x)
    for t in count(1):
        g = yield x
        turned = q[0].T @ g @ q[1]
        m, v = ema(m, turned, betas[0]), ema(v, turned**2, betas[1])
        size = rate * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        x = x - size * (q[0] @ (m / (v.sqrt() + eps)) @ q[1].T)
        x = x - rate * weight_decay * x
        m = q[0] @ m @ q[1].T
        a = [ema(a[0], g @ g.T, beta), ema(a[1], g.T @ g, beta)]
        if t % frequency == 0:
            for i in (0, 1):
                if sides[i]:
                    order = torch.diag(q[i].T @ a[i] @ q[i]).argsort(descending=True)
                    v = v.index_select(i, order)
                    q[i] = torch.linalg.qr(a[i] @ q[i][:, order])[0]
        m = q[0].T @ m @ q[1]


@by_matrix
def shampoo(x: Tensor, *, rate: float, betas=(0.9, 0.99), frequency=10, eps=1e-6, weight_decay=0.0) -> Steps:
    m = v = torch.zeros_like(x)
    left, right = (torch.zeros(size, size, dtype=x.dtype) for size in x.shape)

    def root(a: Tensor) -> Tensor:
        values, q = torch.linalg.eigh(a)
        return q @ torch.diag((values.clamp(min=0) + eps * values.max()) ** -0.25) @ q.T

    for t in count(1):
        g = yield x
        m, v = ema(m, g, betas[0]), ema(v, g**2, betas[1])
        left, right = ema(left, g @ g.T, betas[1]), ema(right, g.T @ g, betas[1])
        if (t - 1) % frequency == 0:
            roots = [root(a / (1 - betas[1] ** t)) for a in (left, right)]
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        adam = m_hat / (v_hat.sqrt() + eps)
        u = roots[0] @ m_hat @ roots[1]
        x = x * (1 - rate * weight_decay) - rate * u * adam.norm() / u.norm()


def schedule_free(direction, x: Tensor, rate: float, beta: float, power: float, weight_decay: float) -> Steps:
    """z, its running mean x, and gradients at y between them; here y is made anew from both at every step."""
    z, total = x, 0.0
    for t in count(1):
        y = (1 - beta) * z + beta * x
        g = yield y
        z = z - rate * (direction(g, t) + weight_decay * y)
        weight = t**power * rate**2
        total += weight
        x = x + (z - x) * weight / total


def schedule_free_adamw(x: Tensor, *, rate: float, betas=(0.9, 0.999), eps=1e-8, power=0.0, weight_decay=0.0) -> Steps:
    v = torch.zeros_like(x)

    def direction(g: Tensor, t: int) -> Tensor:
        nonlocal v
        v = ema(v, g**2, betas[1])
        return g / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return schedule_free(direction, x, rate, betas[0], power, weight_decay)


def schedule_free_sgd(x: Tensor, *, rate: float, momentum=0.9, power=0.0, weight_decay=0.0) -> Steps:
    return schedule_free(lambda g, t: g, x, rate, momentum, power, weight_decay)


def norm(xs: list[Tensor]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in xs))


def dog(xs: list[Tensor], *, rate: float, first=1e-6, per="all", eps=1e-8, weight_decay=0.0) -> JointSteps:
    if per == "tensor":
        each = [dog([x], rate=rate, first=first, eps=eps, weight_decay=weight_decay) for x in xs]
        gs = yield [next(one)[0] for one in each]
        while True:
            gs = yield [one.send([g])[0] for one, g in zip(each, gs, strict=True)]
    start, total, r = xs, eps, first * (1 + norm(xs))
    while True:
        gs = yield xs
        gs = [g + weight_decay * x for g, x in zip(gs, xs, strict=True)]
        r = max(r, norm([x - a for x, a in zip(xs, start, strict=True)]))
        total += norm(gs) ** 2
        xs = [x - rate * r / math.sqrt(total) * g for x, g in zip(xs, gs, strict=True)]


def dot(xs: list[Tensor], ys: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))


def l1(xs: list[Tensor]) -> float:
    return sum(float(x.abs().sum()) for x in xs)


def dadapt_adam(
    xs: list[Tensor], *, rate: float, first=1e-6, growth=None, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
) -> JointSteps:
    d, weighted, root = first, 0.0, math.sqrt(betas[1])
    m = v = s = [torch.zeros_like(x) for x in xs]
    while True:
        gs = yield xs
        w = d * rate
        numerator = w * dot(gs, [a / (b.sqrt() + eps) for a, b in zip(s, v, strict=True)])
        m = [ema(a, w * g, betas[0]) for a, g in zip(m, gs, strict=True)]
        v = [ema(a, g**2, betas[1]) for a, g in zip(v, gs, strict=True)]
        s = [ema(a, w * g, root) for a, g in zip(s, gs, strict=True)]
        weighted = root * weighted + (1 - root) * numerator
        d = max(d, min(weighted / ((1 - root) * l1(s)), d * (growth or math.inf)))
        xs = [x * (1 - weight_decay * w) - a / (b.sqrt() + eps) for x, a, b in zip(xs, m, v, strict=True)]


def prodigy(
    xs: list[Tensor],
    *,
    rate: float,
    first=1e-6,
    coefficient=1.0,
    growth=None,
    safeguard=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
) -> JointSteps:
    d, most, numerator, root, start = first, first, 0.0, math.sqrt(betas[1]), xs
    m = v = s = [torch.zeros_like(x) for x in xs]
    while True:
        gs = yield xs
        w = d * rate
        numerator = root * numerator + d / first * w * dot(gs, [a - x for a, x in zip(start, xs, strict=True)])
        m = [ema(a, d * g, betas[0]) for a, g in zip(m, gs, strict=True)]
        v = [ema(a, (d * g) ** 2, betas[1]) for a, g in zip(v, gs, strict=True)]
        s = [root * a + d / first * (d if safeguard else w) * g for a, g in zip(s, gs, strict=True)]
        found = coefficient * numerator / l1(s)
        d = max(d, found) if d == first else d
        most = max(most, found)
        d = min(most, d * (growth or math.inf))
        xs = [x * (1 - weight_decay * w) - w * a / (b.sqrt() + d * eps) for x, a, b in zip(xs, m, v, strict=True)]


def momo(xs: list[Tensor], *, rate: float, momentum=0.9, lower_bound=0.0, weight_decay=0.0) -> JointSteps:
    """The loss is half of the sum of the squares of the gradients."""
    averages: list[list] = []
    for t in count(1):
        gs = yield xs
        loss = sum(float((g**2).sum()) for g in gs) / 2
        new = [[g, float((g * x).sum())] for g, x in zip(gs, xs, strict=True)]
        if t == 1:
            f, averages = loss, new
        f = momentum * f + (1 - momentum) * loss
        averages = [
            [ema(d, g, momentum), momentum * c + (1 - momentum) * p]
            for (d, c), (g, p) in zip(averages, new, strict=True)
        ]
        h = (1 + rate * weight_decay) * (f - lower_bound - sum(c for _, c in averages))
        h += sum(float((d * x).sum()) for (d, _), x in zip(averages, xs, strict=True))
        tau = min(rate, max(h, 0.0) / sum(float((d**2).sum()) for d, _ in averages))
        xs = [(x - tau * d) / (1 + rate * weight_decay) for x, (d, _) in zip(xs, averages, strict=True)]


def momo_adam(
    xs: list[Tensor], *, rate: float, betas=(0.9, 0.999), eps=1e-8, lower_bound=0.0, weight_decay=0.0
) -> JointSteps:
    ds = vs = [torch.zeros_like(x) for x in xs]
    f = c = 0.0
    for t in count(1):
        gs = yield xs
        loss = sum(float((g**2).sum()) for g in gs) / 2
        ds = [ema(d, g, betas[0]) for d, g in zip(ds, gs, strict=True)]
        vs = [ema(v, g**2, betas[1]) for v, g in zip(vs, gs, strict=True)]
        f = betas[0] * f + (1 - betas[0]) * loss
        c = betas[0] * c + (1 - betas[0]) * sum(float((g * x).sum()) for g, x in zip(gs, xs, strict=True))
        roots = [(v / (1 - betas[1] ** t)).sqrt() + eps for v in vs]
        rho, grown = 1 - betas[0] ** t, 1 + rate * weight_decay
        h = grown * (f - rho * lower_bound - c) + sum(float((d * x).sum()) for d, x in zip(ds, xs, strict=True))
        size = sum(float((d**2 / root).sum()) for d, root in zip(ds, roots, strict=True))
        tau = min(rate / rho, max(h, 0.0) / size)
        xs = [(x - tau * d / root) / grown for x, d, root in zip(xs, ds, roots, strict=True)]
