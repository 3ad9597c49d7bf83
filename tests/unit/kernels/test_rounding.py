"""Stochastic rounding to bf16 keeps the mean, and what bf16 holds."""

from __future__ import annotations

import torch

from truetune.kernels.rounding import stochastic


def test_the_mean_of_many_roundings_is_the_number() -> None:
    x = torch.tensor([1.0 + 2**-10, -1.0 - 2**-12, 0.3, 1e-20, -3e30])
    mean = torch.stack([stochastic(x.expand(4096, -1), seed) for seed in range(4)]).double().mean((0, 1))
    gap = x.double().abs() * 2**-7
    assert float(((mean - x) / gap).abs().max()) < 4 * 0.5 / (4 * 4096) ** 0.5
    assert torch.equal(x[:2].bfloat16().abs(), torch.ones(2, dtype=torch.bfloat16))  # what the nearest would make of it


def test_it_takes_a_neighbour_and_keeps_what_needs_no_rounding() -> None:
    x = torch.randn(10_000)
    off = (stochastic(x, 0).float() - x).abs() / x.abs()
    assert 2**-8 < float(off.max()) <= 2**-7
    held = torch.cat([x.bfloat16().float(), torch.tensor([0.0, float("inf"), -float("inf")])])
    assert torch.equal(stochastic(held, 1).float(), held)
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert stochastic(odd, 2).isnan().all()


def test_a_seed_gives_the_same_bits_and_another_does_not() -> None:
    x = torch.randn(1000)
    assert torch.equal(stochastic(x, 5), stochastic(x, 5)) and not torch.equal(stochastic(x, 5), stochastic(x, 6))
