"""Optimizers against numbers that are known, and against other packages that have the same rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from truetune.optim import OPTIMIZERS, averaged

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


# Other packages.

SHAPES = [(3,), (7, 5), (5, 7), (7, 5), (16, 24)]
PEERS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "sgd": ("sgd", {"weight_decay": 0.1}, lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9, weight_decay=0.1)),
    "nesterov": ("sgd", {"nesterov": True}, lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9, nesterov=True)),
    "adafactor": ("adafactor", {"weight_decay": 0.1}, lambda ps: torch.optim.Adafactor(ps, 0.01, weight_decay=0.1)),
}
"""Rule, options, and another package's of the same parameters, all at a rate of 0.01."""


@pytest.mark.parametrize("case", PEERS)
def test_a_rule_is_that_of_another_package(case: str) -> None:
    name, options, peer = PEERS[case]
    generator = torch.Generator().manual_seed(0)

    def random() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

    ours = [torch.nn.Parameter(x) for x in random()]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one, two = build(name, ours, 0.01, **options), peer(theirs)
    for _ in range(20):
        for p, q, g in zip(ours, theirs, random(), strict=True):
            p.grad, q.grad = g, g.clone()
        one.step()
        two.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
