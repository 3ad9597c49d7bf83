"""Optimizers against numbers and equalities that are known."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from truetune.optim import OPTIMIZERS, Rule, averaged
from truetune.optim.matrix import orthogonalize

GRADIENTS = (0.1, -0.2, 0.3)
KNOWN: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "nadamw": ({"rate": 1e-3, "weight_decay": 0.01}, (0.99809000019, 0.99907515518, 0.99824394737)),
    "schedule-free-adamw": ({"rate": 0.0025}, (0.99750000025, 0.9990809017, 0.9984509245)),
    "diffgrad": ({"rate": 1e-3}, (0.9994750225, 0.9996853276, 0.9994716742)),
}
"""Rule -> options, and the weight after each step from 1 along the gradients."""


def build(name: str, parameters: list[torch.Tensor], rate: float, **options: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name]([{"params": parameters, "lr": rate, "peak": rate}], rate, **options)


@pytest.mark.parametrize("name", KNOWN)
def test_a_rule_gives_the_known_numbers(name: str) -> None:
    options, values = KNOWN[name]
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = build(name, [x], **options)
    for gradient, value in zip(GRADIENTS, values, strict=True):
        x.grad = torch.full_like(x, gradient)
        optimizer.step()
        with averaged(optimizer):
            assert x.item() == pytest.approx(value, abs=1e-10)


def test_galore_holds_a_seventh_of_adams_state() -> None:
    """Rank 128 of 1024 x 4096: 1,179,648 numbers against 8,388,608, by the formula and in memory."""
    weight = torch.nn.Parameter(torch.randn(1024, 4096) / 32)
    held = {}
    for name in ("galore", "nadamw"):
        rule = build(name, [weight], 1e-3)
        weight.grad = torch.randn(1024, 4096)
        rule.step()
        assert isinstance(rule, Rule)
        tensors = [t for key, t in rule.state[weight].items() if key != "step"]
        held[name] = sum(t.untyped_storage().nbytes() for t in tensors) // 4
        assert 4 * held[name] == rule.state_bytes()
    assert held == {"galore": 1_179_648, "nadamw": 8_388_608}


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (3, 32, 64)], ids=str)
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, dtype=torch.float64)))
    assert values.min() > 0.67 and values.max() < 1.14


def test_the_two_conventions_of_momentum_differ_by_a_scale_that_is_lost() -> None:
    """Only over time: the sum begins as the average times 1 / (1 - mu), and stays so."""
    torch.manual_seed(0)
    gradients = [torch.randn(8, 12, dtype=torch.float64) for _ in range(5)]
    ends = []
    for convention in ("average", "sum"):
        x = torch.nn.Parameter(torch.ones(8, 12, dtype=torch.float64))
        optimizer = build("muon", [x], 0.1, convention=convention, nesterov=False)
        for g in gradients:
            x.grad = g
            optimizer.step()
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)  # but for the 1e-7 beside the norm


def test_soap_whose_basis_is_frozen_is_adam_a_step_later() -> None:
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    y = torch.nn.Parameter(x.detach().clone())
    frozen = build("soap", [x], 0.01, largest=1, eps=0.0)
    adam = torch.optim.AdamW([y], 0.01, betas=(0.95, 0.95), eps=0.0, weight_decay=0.0)
    for t in range(8):
        x.grad = torch.randn_like(x)
        frozen.step()
        if t:
            y.grad = x.grad.clone()
            adam.step()
    torch.testing.assert_close(x, y)


def test_diffgrad_keeps_a_copy_of_the_gradient() -> None:
    """An alias would be the next gradient itself, and hold the friction at a half."""
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = build("diffgrad", [x], 1e-3)
    x.grad = torch.full_like(x, 0.1)
    optimizer.step()
    x.grad.fill_(-0.2)
    optimizer.step()
    assert optimizer.state[x]["before"].tolist() == pytest.approx([-0.2, -0.2])
    assert x.detach().tolist() == pytest.approx([0.9996853276] * 2, abs=1e-6)


def test_what_fira_adds_grows_by_a_hundredth_a_step_at_most() -> None:
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.randn(6, 8))
    optimizer = build("fira", [x], 1e-3, rank=2)
    lengths = []
    for t in range(6):
        x.grad = torch.randn(6, 8) * 3**t
        optimizer.step()
        lengths.append(float(optimizer.state[x]["length"]))
    assert all(after <= 1.0101 * before for before, after in pairwise(lengths))
    assert lengths[-1] > 1.04 * lengths[0]
