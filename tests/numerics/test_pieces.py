"""Rows that stand in several places: the same values, and gradients that add up without loss."""

from __future__ import annotations

import torch

from truetune.kernels.pieces import pieces


def test_values_and_gradients_are_those_of_a_concatenation() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    ranges = ((0, 9), (0, 3), (5, 6), (2, 7))
    expected = torch.cat([x[:, first:end] for first, end in ranges], 1)
    out = pieces(x, ranges)
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, x, cotangent)[0] for y in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_what_many_share_adds_up_in_fp32() -> None:
    x = torch.ones(1, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    out = pieces(x, ((0, 2),) * 1000 + ((2, 3),))
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert gradient.dtype == torch.bfloat16
    assert gradient[0, :, 0].tolist() == [1000, 1000, 1]
