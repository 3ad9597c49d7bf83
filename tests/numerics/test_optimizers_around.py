"""What goes around a rule: each is its definition, resumes, takes the memory it says, and the rule within sees nothing.

Mechanic's reference follows its authors' JAX version (optax 0.2.8), with which rule and reference were compared over
sixty steps (8e-12), and of which the known numbers are.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.optim import EMA, OPTIMIZERS, Growth, Mechanic, NaP, Rule, averaged, set_rate, take_step

SHAPES = [(3,), (7, 5), (2, 3, 4), (7, 5), (1, 6), (16, 16)]
BASE = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}

Wrap = Callable[[torch.optim.Optimizer, list[Tensor]], Rule]
AROUND: dict[str, Wrap] = {
    "mechanic": lambda inner, _: Mechanic(inner),
    "ema": lambda inner, _: EMA(inner, 0.9),
    "nap": lambda inner, ps: NaP(inner, [p for p in ps if p.ndim > 1]),
    "growth": lambda inner, _: Growth(inner, 1.05),
    "all": lambda inner, _: Growth(EMA(Mechanic(inner), 0.7), 1.2),
}


def random(t: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def build(around: str, parameters: list[Any], rate: float = 0.05, rule: str = "adamw", **options: Any) -> Rule:
    halves = [{"params": part, "lr": rate, "peak": rate} for part in (parameters[:2], parameters[2:]) if part]
    return AROUND[around](OPTIMIZERS[rule](halves, rate, **options), parameters)


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(x.to(dtype)) for x in random(0)]


def descend(optimizer: torch.optim.Optimizer, ps: list[torch.nn.Parameter], steps: range) -> None:
    """Down |x|^2 / 2 with noise that grows; of one parameter there is no gradient in every third step."""
    for t in steps:
        for i, (p, n) in enumerate(zip(ps, random(1000 + t, 0.1 * (1 + t)), strict=True)):
            p.grad = None if t % 3 == 1 and i in (1, 4) else p.detach() + n.to(p.dtype)
        take_step(optimizer, torch.zeros(()))


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def test_mechanic_is_its_paper() -> None:
    """Beside a twin of the rule, whose own movement is what is scaled."""
    ps = parameters()
    optimizer, twins = build("mechanic", ps, 1.0, **BASE), [torch.nn.Parameter(p.detach().clone()) for p in ps]
    inner = torch.optim.AdamW(twins, 1.0, **BASE)  # type: ignore[arg-type]
    x0, xs = random(0), random(0)
    s, m, v, r = [1e-6] * 6, [0.0] * 6, [0.0] * 6, [0.0] * 6
    for t in range(30):
        gs = [x + n for x, n in zip(xs, random(1000 + t, 0.3), strict=True)]
        for p, q, x, g in zip(ps, twins, xs, gs, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
            q.data.copy_(x)
        optimizer.step()
        inner.step()
        before = [(a - x) / (sum(s) + 1e-8) for a, x in zip(x0, xs, strict=True)]
        pull = 1e-2 * sum(s) * dot(gs, gs) ** 0.5 / (dot(xs, xs) ** 0.5 + 1e-8)
        h = dot([g + pull * x for g, x in zip(gs, xs, strict=True)], before)
        deltas = [d - (q.detach() - x) for d, q, x in zip(before, twins, xs, strict=True)]
        for i in range(6):
            b = 1 - 0.1 ** (i + 1)
            r[i] = b * r[i] + max(-m[i], min(h, m[i])) * s[i]
            m[i] = max(b * m[i], abs(h) + 1e-8)
            v[i] = b**2 * v[i] + h**2
            s[i] = (1e-6 / 6 * m[i] + max(0.0, r[i])) / (v[i] ** 0.5 + 1e-8)
        xs = [a - sum(s) * d for a, d in zip(x0, deltas, strict=True)]
        for p, x in zip(ps, xs, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-10)
    assert sum(s) > 1e-3, "a scale that never grew would show nothing"


def test_the_average_is_the_mean_of_all_steps_by_their_age() -> None:
    ps = parameters()
    optimizer, seen = build("ema", ps), []
    for t in range(12):
        descend(optimizer, ps, range(t, t + 1))
        seen.append([p.detach().clone() for p in ps])
        shares = [0.9 ** (t - i) for i in range(t + 1)]
        with averaged(optimizer):
            for k, p in enumerate(ps):
                mean = sum((c * xs[k] for c, xs in zip(shares, seen, strict=True)), torch.zeros(())) / sum(shares)
                torch.testing.assert_close(p.detach(), mean, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(p, x) for p, x in zip(ps, seen[-1], strict=True))


def test_matrices_keep_their_lengths_and_vectors_do_not() -> None:
    ps, bare = parameters(), parameters()
    optimizer, plain = build("nap", ps), build("growth", bare).inner
    lengths = [p.detach().norm(dim=(-2, -1)) if p.ndim > 1 else None for p in ps]
    for t in range(8):
        descend(optimizer, ps, range(t, t + 1))
        for p, q, length in zip(ps, bare, lengths, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
            if length is not None:
                torch.testing.assert_close(p.detach().norm(dim=(-2, -1)), length, rtol=1e-12, atol=0)
        plain.step()
        for p, q, length in zip(ps, bare, lengths, strict=True):
            back = 1 if length is None else (length / q.detach().norm(dim=(-2, -1)))[..., None, None]
            q.data.mul_(back)
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert not torch.equal(ps[0].detach(), random(0)[0])


def test_in_bf16_lengths_and_averages_are_kept_in_the_mean() -> None:
    """A norm is brought back by less than a step of bf16 at a time; an average is kept in fp32."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(200, 200, generator=generator).bfloat16())
    length = float(p.detach().float().norm())
    nap = build("nap", [p], 1e-4)
    for _ in range(60):
        p.grad = -p.detach()
        nap.step()
    grown = 1 + 60 * 1e-4 * 0.8  # without it
    assert abs(float(p.detach().float().norm()) / length - 1) < 0.1 * (grown - 1)
    ema = build("ema", [p], 1e-4)
    p.grad = torch.ones_like(p)
    ema.step()
    (average,) = ema.averages().values()
    assert average.dtype == torch.float32
    with averaged(ema):
        assert torch.equal(p.detach(), average.bfloat16())


def test_the_norm_of_all_gradients_grows_by_the_factor_at_most() -> None:
    ps = parameters()
    optimizer, before = build("growth", ps), 0.0
    for t, scale in enumerate((1.0, 1.02, 5.0, 6.0, 0.3, 0.31, 9.0)):
        gs = [scale * g for g in random(7)]
        for p, g in zip(ps, gs, strict=True):
            p.grad = g.clone()
        optimizer.step()
        length = dot(gs, gs) ** 0.5
        allowed = min(length, 1.05 * before) if t else length
        for p, g in zip(ps, gs, strict=True):
            torch.testing.assert_close(p.grad, g * (allowed / length), rtol=1e-6, atol=0)
        before = allowed


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("rule", ["adamw", "muon", "adamw-8bit", "adamw in bf16"])
def test_it_resumes_bit_for_bit(around: str, rule: str) -> None:
    rule, _, low = rule.partition(" in ")
    dtype = torch.bfloat16 if low else torch.float32
    if rule == "muon":
        made = [p for p in parameters(dtype) if p.ndim > 1]
        shapes = [i for i, shape in enumerate(SHAPES) if len(shape) > 1]
    else:
        made, shapes = parameters(dtype), list(range(len(SHAPES)))

    def go(optimizer: torch.optim.Optimizer, ps: list[torch.nn.Parameter], steps: range) -> None:
        for t in steps:
            noise = random(1000 + t)
            for p, i in zip(ps, shapes, strict=True):
                p.grad = None if t % 3 == 1 and i in (1, 4) else p.detach() + noise[i].to(dtype)
            optimizer.step()

    optimizer = build(around, made, rule=rule)
    go(optimizer, made, range(2))
    state, resumed = copy.deepcopy((optimizer.state_dict(), made))
    go(optimizer, made, range(2, 6))
    other = build(around, resumed, rule=rule)
    other.load_state_dict(state)
    go(other, resumed, range(2, 6))
    assert all(torch.equal(a, b) for a, b in zip(made, resumed, strict=True))
    one, two = (o.state_dict()["state"] for o in (optimizer, other))
    assert one.keys() == two.keys()
    assert all(one[i].keys() == two[i].keys() and all(torch.equal(one[i][k], two[i][k]) for k in one[i]) for i in one)


@pytest.mark.parametrize("around", AROUND)
def test_the_order_of_parameters_and_groups_does_not_matter(around: str) -> None:
    one, two = parameters(), parameters()
    first, second = build(around, one, **BASE), build(around, two[::-1], **BASE)
    for t in range(6):
        for a, b, n in zip(one, two, random(1000 + t), strict=True):
            a.grad, b.grad = a.detach() + n, a.detach() + n
        first.step()
        second.step()
    with averaged(first), averaged(second):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("around", AROUND)
def test_at_rate_zero_nothing_moves_and_elsewhere_it_does(around: str) -> None:
    ps = parameters(torch.float32)
    optimizer = build(around, ps, rule="nadamw")
    set_rate(optimizer, 0.0)
    descend(optimizer, ps, range(2))
    assert all(torch.equal(p, x.float()) for p, x in zip(ps, random(0), strict=True))
    set_rate(optimizer, 1.0)
    descend(optimizer, ps, range(2, 32))
    assert not any(torch.allclose(p, x.float(), rtol=1e-6, atol=0) for p, x in zip(ps, random(0), strict=True))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("shape", [(72, 100), (3, 8, 4)], ids=str)
def test_the_state_takes_the_bytes_that_are_said(around: str, shape: tuple[int, ...]) -> None:
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = build(around, [parameter], rule="nadamw")
    for _ in range(2):
        parameter.grad = torch.randn(shape)
        optimizer.step()
    state = optimizer.state[parameter]
    held = sum(t.nbytes for key, t in state.items() if key != "step" and not key.startswith("shared_"))
    assert held == optimizer.state_bytes()
    if around != "all" and len(shape) == 2:
        (formula,) = re.findall(r"State: (.+) bytes\.", inspect.getdoc(type(optimizer)) or "")
        assert held == 8 * 72 * 100 + eval(formula, {"m": 72, "n": 100})


def test_mechanic_finds_a_rate_that_minimises() -> None:
    ps = parameters(torch.float32)
    optimizer, before = build("mechanic", ps, 1.0), sum(float(x.square().sum()) for x in random(0))
    for t in range(200):
        set_rate(optimizer, 1 - t / 200)
        for p in ps:
            p.grad = p.detach().clone()
        optimizer.step()
    assert sum(float(p.detach().square().sum()) for p in ps) < 0.1 * before


def test_mechanic_gives_the_known_numbers() -> None:
    """Of optax 0.2.8 in float64: its mechanize(sgd(1.0)) from 1 along the weight itself, after 20, 30 and 40 steps."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Mechanic(torch.optim.SGD([x], 1.0))
    found = []
    for _ in range(40):
        x.grad = x.detach().clone()
        optimizer.step()
        found.append(x.item())
    known = (0.9968392820998859, 0.9380256464587923, 0.24867315009916413)
    assert [found[19], found[29], found[39]] == pytest.approx(known, abs=1e-10)


def test_a_matrix_that_began_at_zero_may_grow() -> None:
    ps = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.ones(3, 4))]
    optimizer = build("nap", ps)
    for _ in range(2):
        for p in ps:
            p.grad = torch.arange(12.0).view(3, 4)
        optimizer.step()
    assert float(ps[0].norm()) > 0 and float(ps[1].norm()) == pytest.approx(12**0.5)
