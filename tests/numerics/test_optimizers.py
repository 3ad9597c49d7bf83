"""One lattice over the table of optimizers: each is its paper, resumes, minimises, and takes the memory it says, with
weights in fp32 and in bf16.

The paper is ``optimizer_references`` and ``low_rank_references``, in float64.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
import re
from collections.abc import Callable
from typing import Any

import low_rank_references
import optimizer_references
import pytest
import torch
from torch import Tensor

from truetune import registry
from truetune.errors import UserError
from truetune.optim import OPTIMIZERS, SHARED, Rule, averaged, set_rate, take_step

STEPS = 20
SHAPES = [(1,), (3,), (7, 5), (5, 7), (1, 6), (6, 1), (2, 3, 4), (7, 5), (5, 7), (3,), (16, 16), (7, 5)]
"""Vectors, wide and tall, of one row, of one column, of three dimensions; several of equal shape."""

RULES = {name: rule for name, rule in OPTIMIZERS.items() if not getattr(rule, "probes", False)}
"""Those that take gradients; the others are in ``test_zeroth``."""

LOW_RANK = {"rank": 2, "gap": 7, "scale": 0.5, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
OTHERS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}],
    "nadamw": [{"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}],
    "sgd": [{"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}],
    "lion": [{"betas": (0.8, 0.95), "weight_decay": 0.1}],
    "adafactor": [{"power": 0.5, "threshold": 0.5, "weight_decay": 0.1}],
    "diffgrad": [{"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}],
    "muon": [
        {"momentum": 0.5, "convention": "sum", "scale": "spectral", "rounds": 3, "weight_decay": 0.1},
        {"nesterov": False, "scale": "none"},
    ],
    "soap": [
        {"betas": (0.8, 0.9), "preconditioner": 0.7, "frequency": 7, "eps": 1e-3, "weight_decay": 0.1},
        {"largest": 5},
    ],
    "shampoo": [{"betas": (0.8, 0.9), "frequency": 1, "eps": 1e-3, "weight_decay": 0.1}],
    "galore": [LOW_RANK],
    "fira": [LOW_RANK],
    "schedule-free-adamw": [{"betas": (0.8, 0.95), "eps": 1e-3, "power": 1.5, "weight_decay": 0.1}],
    "schedule-free-sgd": [{"momentum": 0.6, "power": 1.5, "weight_decay": 0.1}],
    "dog": [{"first": 1e-3, "eps": 1e-3, "weight_decay": 0.1}, {"first": 1e-3, "per": "tensor"}],
    "dadapt-adam": [{"first": 1e-4, "growth": 1.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}],
    "prodigy": [
        {"first": 1e-4, "growth": 1.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        {"first": 1e-2, "coefficient": 0.5, "safeguard": True},
    ],
    "momo": [{"momentum": 0.6, "lower_bound": 60.0, "weight_decay": 0.1}],
    "momo-adam": [{"betas": (0.8, 0.95), "eps": 1e-3, "lower_bound": 60.0, "weight_decay": 0.1}],
    "adamw-8bit": [{"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "block": 8, "smallest": 4}],
    "galore-8bit": [LOW_RANK | {"block": 8, "smallest": 4}],
    "dct-adamw": [
        {"rank": 2, "gap": 3, "feedback": True, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        {"rank": 3},
    ],
    "trion": [{"rank": 2, "momentum": 0.6, "scale": "dion", "weight_decay": 0.1}, {"rank": 3, "scale": "spectral"}],
    "apollo": [LOW_RANK | {"per": "tensor"}, {"rank": 3}],
}
"""Rule -> options other than the defaults that the reference is tried with; every option is among them."""

RATES: dict[str, float] = {
    "adafactor": 0.1,
    "muon": 0.2,
    "trion": 0.2,
    "galore": 0.2,
    "galore-8bit": 0.2,
    "momo": 1.0,
    "momo-adam": 0.5,
    **{name: 1.0 for name, rule in OPTIMIZERS.items() if getattr(rule, "finds_rate", False)},
}
"""Rule -> a rate that moves weights of size 1 well; 0.05 where there is none."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

CASES = [(name, options) for name in RULES for options in ({}, *OTHERS[name])]
NAMES = [f"{name}{i if i else ''}" for name in RULES for i in range(1 + len(OTHERS[name]))]


def weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def build(name: str, *parts: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    """As the program does, each part of the parameters a group, and vectors left to AdamW by a rule of matrices."""
    rate = RATES.get(name, 0.05)
    rest = "vectors" not in getattr(OPTIMIZERS[name], "takes", ("vectors",))
    groups = [
        {"params": chosen, "lr": rate, "peak": rate} | ({"rest": True} if left else {})
        for part in parts
        for left in (False, True)
        if (chosen := [p for p in part if (rest and p.ndim < 2) == left])
    ]
    return registry.bind("optimizer", OPTIMIZERS, name, options)(groups, rate)


def noise(t: int, shapes: list[tuple[int, ...]] = SHAPES, scale: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + t)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def taken(name: str) -> list[int]:
    """Places of the shapes that the rule is for: a rule of matrices leaves vectors to AdamW."""
    whole = "vectors" in getattr(OPTIMIZERS[name], "takes", ("vectors",))
    return [i for i, shape in enumerate(SHAPES) if whole or len(shape) > 1]


def expected(name: str, xs: list[Tensor], options: dict[str, Any]) -> Callable[[list[Tensor]], list[Tensor]]:
    """The reference as a function of gradients; the gradient of a step is that of |x|^2 / 2, and noise."""
    called = name.replace("-", "_")
    function = getattr(low_rank_references, called, None) or getattr(optimizer_references, called)
    known = {"rate": RATES.get(name, 0.05)} | options
    if "xs" in inspect.signature(function).parameters:
        joint = function(xs, **known)
        next(joint)
        return joint.send
    each = [function(x, **known) for x in xs]
    for one in each:
        next(one)
    return lambda gs: [one.send(g) for one, g in zip(each, gs, strict=True)]


def step(optimizer: torch.optim.Optimizer) -> None:
    """A step whose loss is half of |g|^2, as the references have it."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    take_step(optimizer, sum((g.double().square().sum() / 2 for g in gradients), torch.zeros(()).double()))


def diagonal(g: Tensor) -> Tensor:
    """A first gradient of which all products are exact, and so all eigenvectors: which basis of its null space a rule
    begins with must not hang on a rounding."""
    return g if g.ndim < 2 else torch.eye(*g.shape[-2:]).to(g) * torch.arange(1, g.shape[-1] + 1) + 0 * g


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_a_rule_is_its_paper(name: str, options: dict[str, Any]) -> None:
    xs = [weights()[i] for i in taken(name)]
    parameters = [torch.nn.Parameter(x.clone()) for x in xs]
    optimizer, reference = build(name, parameters, **options), expected(name, xs, options)
    for t in range(STEPS):
        gs = [x + noise(t)[i] for x, i in zip(xs, taken(name), strict=True)]
        gs = [diagonal(g) for g in gs] if t == 0 and name == "soap" else gs
        for p, g in zip(parameters, gs, strict=True):
            p.grad = g.clone()
        step(optimizer)
        xs = reference(gs)
        for p, x, g in zip(parameters, xs, gs, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-10)
            assert torch.equal(p.grad, g), "the gradient is the trainer's"


@pytest.mark.parametrize("name", RULES)
def test_every_option_is_tried(name: str) -> None:
    options = registry.user_options("optimizer", name, OPTIMIZERS[name])
    assert set(options) == set().union(*(other.keys() for other in OTHERS[name]))


def descend(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: range, scale: float = 0.3) -> None:
    """Steps down |x|^2 / 2 with noise; of two parameters there is no gradient in every third step."""
    for t in steps:
        for i, (p, n) in enumerate(zip(parameters, noise(t, [tuple(p.shape) for p in parameters], scale), strict=True)):
            p.grad = None if t % 3 == 1 and i in (2, 7) else p.detach() + n.to(p.dtype)
        step(optimizer)


@DTYPES
@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_a_rule_resumes_bit_for_bit(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """From any step, by torch's own state_dict, into an optimizer that has seen nothing."""
    straight = [torch.nn.Parameter(x) for x in weights(dtype)]
    optimizer = build(name, straight, **options)
    kept = {}
    for t in range(6):
        descend(optimizer, straight, range(t, t + 1))
        kept[t + 1] = copy.deepcopy((optimizer.state_dict(), straight))
    for stop in (1, 4):
        state, resumed = copy.deepcopy(kept[stop])
        torch.rand(1)  # a step draws nothing that another may have drawn
        other = build(name, resumed, **options)
        other.load_state_dict(state)
        descend(other, resumed, range(stop, 6))
        assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
        assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


def same(a: dict[int, dict[str, Tensor]], b: dict[int, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[i].keys() == b[i].keys() and all(torch.equal(a[i][key], b[i][key]) for key in a[i]) for i in a
    )


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_the_order_of_parameters_and_groups_does_not_matter(name: str, options: dict[str, Any]) -> None:
    ordered = [torch.nn.Parameter(x) for x in weights()]
    shuffled = [torch.nn.Parameter(x) for x in weights()]
    one = build(name, ordered, **options)
    order = random.Random(1).sample(range(len(SHAPES)), len(SHAPES))
    two = build(name, *([shuffled[i] for i in half] for half in (order[:5], order[5:])), **options)
    for t in range(6):
        for a, b, n in zip(ordered, shuffled, noise(t), strict=True):
            a.grad, b.grad = a.detach() + n, a.detach() + n
        step(one)
        step(two)
    for a, b in zip(ordered, shuffled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@DTYPES
@pytest.mark.parametrize("name", RULES)
def test_a_rule_minimises(name: str, dtype: torch.dtype) -> None:
    """|x|^2 / 2 falls tenfold, at a rate that falls linearly, in the weights that the rule would keep."""
    parameters = [torch.nn.Parameter(x) for x in weights(dtype)[:6]]
    optimizer = build(name, parameters, **({"first": 1e-3} if name == "dog" else {}))  # it takes long to leave 1e-6
    before = sum(float(p.detach().square().sum()) for p in parameters)
    for t in range(150):
        set_rate(optimizer, 1 - t / 150)
        descend(optimizer, parameters, range(t, t + 1), scale=0.0)
    with averaged(optimizer):
        assert sum(float(p.detach().square().sum()) for p in parameters) < 0.1 * before


@DTYPES
@pytest.mark.parametrize("name", RULES)
def test_at_rate_zero_nothing_moves(name: str, dtype: torch.dtype) -> None:
    parameters = [torch.nn.Parameter(x) for x in weights(dtype)]
    optimizer = build(name, parameters, **OTHERS[name][0])
    set_rate(optimizer, 0.0)
    descend(optimizer, parameters, range(2))
    assert all(torch.equal(p, x) for p, x in zip(parameters, weights(dtype), strict=True))


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_in_bf16_a_rule_stays_near_its_course(name: str, options: dict[str, Any]) -> None:
    """From the same weights, under the same gradients, as near as so many roundings of one step of bf16 leave it; state
    and weights have their dtypes."""
    begin = [x.bfloat16() for x in weights()]
    low, full = ([torch.nn.Parameter(x.to(dtype)) for x in begin] for dtype in (torch.bfloat16, torch.float32))
    optimizers = [build(name, parameters, **options) for parameters in (low, full)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 0.1
    for t in range(6):
        for p, q, n in zip(low, full, noise(t), strict=True):
            g = (q.detach() + n).bfloat16()
            g = diagonal(g) if t == 0 and name == "soap" else g
            p.grad, q.grad = g, g.float()
        for optimizer in optimizers:
            step(optimizer)
    assert all(p.dtype == torch.bfloat16 for p in low)
    x, y = (torch.cat([p.detach().float().flatten() for p in parameters]) for parameters in (low, full))
    far = (x - y).abs() / y.abs().clamp(min=1.0)
    assert float(far.max()) < 6 * 2**-7 and float(far.mean()) < 2**-7
    for state in optimizers[0].state.values():
        assert not any(tensor.dtype == torch.bfloat16 for tensor in state.values())


@pytest.mark.parametrize("weight", [0.75, -0.75])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_updates_below_half_a_step_of_bf16_arrive_in_the_mean(name: str, weight: float) -> None:
    """Together a step of bf16 in a weight of 0.75, a fortieth at a time: to the nearest, nothing would ever move."""
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.nn.Parameter(torch.full((96, 96), weight, dtype=dtype))
        optimizer = build(name, [x])
        for group in optimizer.param_groups:
            group |= {"lr": 1e-4 / (0.2 * 96**0.5 if name == "muon" else 1), "weight_decay": 0.0}
            group |= {"momentum": 0.0} if name == "sgd" else {}
        for _ in range(40):
            x.grad = torch.ones_like(x) if name != "muon" else torch.eye(96, dtype=dtype)
            step(optimizer)
        ends.append((x.detach().double() - weight).sum().item())
    count = 96 * 96 if name != "muon" else 96
    assert abs(ends[0] - ends[1]) < 4 * count**0.5 * 2**-9 and abs(ends[1]) > 0.5 * count * 2**-8


@pytest.mark.parametrize("name", RULES)
def test_an_unknown_option_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=f'optimizer "{name}" has no option "momentun"'):
        build(name, [torch.nn.Parameter(torch.ones(2, 2))], momentun=0.9)


CHOICES = ("nesterov", "convention", "per", "safeguard", "feedback")
"""Options that the registry knows all values of."""


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        (name, option, value)
        for name in RULES
        if name != "adamw"
        for option in registry.user_options("optimizer", name, OPTIMIZERS[name])
        for value in [({"betas": (0.9, 1.0), "momentum": 1.0} | dict.fromkeys(CHOICES)).get(option, -1)]
        if value is not None and (name, option) not in (("muon", "scale"), ("trion", "scale"))
    ],
)
def test_an_option_out_of_its_range_is_refused_in_one_sentence(name: str, option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"optimizer\.{option} is out of its range; choose"):
        build(name, [torch.nn.Parameter(torch.ones(2, 2))], **{option: value})


def formula(name: str) -> str:
    (found,) = re.findall(r"State: (.+) bytes\.", inspect.getdoc(OPTIMIZERS[name]) or "")
    return str(found)


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state, less its counts of steps and the numbers shared by all."""
    return sum(
        tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key != "step" and not key.startswith(SHARED)
    )


@DTYPES
@pytest.mark.parametrize("shape", [(72, 100), (100, 72), (64, 64)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_the_state_takes_the_bytes_that_its_docstring_says(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of one matrix m x n, m <= n, as held in memory after two steps."""
    parameter = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer = build(name, [parameter], **({"rank": 64} if "r" in re.findall(r"\w+", formula(name)) else {}))
    for _ in range(2):
        parameter.grad = torch.randn(shape, dtype=dtype)
        step(optimizer)
    m, n = sorted(shape)
    assert held(optimizer) == eval(formula(name), {"m": m, "n": n, "r": 64, "ceil": math.ceil})
    if isinstance(optimizer, Rule):
        assert held(optimizer) == optimizer.state_bytes()
