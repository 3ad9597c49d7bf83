"""Gradient filtering of cut cross-entropy is taken, is counted, changes little, and takes more in sorted order."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from interpreted import exact
from torch import Tensor

from truetune.kernels.linear_cross_entropy import filter_threshold
from truetune.kernels.triton.linear_cross_entropy import linear_cross_entropy

# The package exports the operation under the name of its module.
module = sys.modules["truetune.kernels.triton.linear_cross_entropy"]
ROWS, WIDTH, VOCABULARY = 48, 32, 1024


def confident(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A model that gives nearly all probability to one of four entries far apart, and is wrong in the first rows."""
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q[:4]
    row, entries = torch.arange(ROWS), torch.arange(4) * 256 + 5
    hidden = 6 * directions[row % 4] + 0.05 * torch.randn(ROWS, WIDTH)
    weight = torch.randn(VOCABULARY, WIDTH) * 0.1
    weight[entries] += 4 * directions
    labels = entries[(row + (row < 8)) % 4]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def gradients(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> tuple[list[Tensor], int]:
    skipped = torch.zeros(1, dtype=torch.int32)
    with exact():
        total = linear_cross_entropy(*tensors, skipped_1=skipped, **options).total
        found = torch.autograd.grad(total, tensors[:2])
    return [g.double() for g in found], int(skipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_are_skipped_and_the_error_is_bounded(dtype: torch.dtype) -> None:
    tensors = confident(dtype)
    threshold = filter_threshold(dtype)
    (exact_hidden, exact_weight), none = gradients(tensors)
    (hidden, weight), some = gradients(tensors, filtered=True, ordered=False)
    (sorted_hidden, _), most = gradients(tensors, filtered=True)
    assert none == 0 and 0 < some < most
    # What is lost is at most the threshold for each entry of the tile's other side.
    head, state = (x.detach().double().abs() for x in (tensors[1], tensors[0]))
    rounding = 4 * torch.finfo(dtype).eps
    for found in (hidden, sorted_hidden):
        assert ((found - exact_hidden).abs() <= threshold * head.sum(0) + rounding * exact_hidden.abs() + 1e-6).all()
    assert ((weight - exact_weight).abs() <= threshold * state.sum(0) + rounding * exact_weight.abs() + 1e-6).all()


def test_the_order_alone_changes_only_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "filter_threshold", lambda _: 0.0)
    tensors = confident(torch.float32)
    plain, _ = gradients(tensors)
    ordered, skipped = gradients(tensors, filtered=True)
    assert skipped == 0
    for ours, theirs in zip(ordered, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_threshold_is_what_rounds_away() -> None:
    assert filter_threshold(torch.bfloat16) == 0.0078125 / 32
    assert filter_threshold(torch.float32) == pytest.approx(3.7e-9, rel=0.01)
