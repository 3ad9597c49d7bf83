"""The compiled loss on rows of logits: against float64 at every width, and on what is no ordinary number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels import linear_cross_entropy
from truetune.kernels.native import cross_entropy
from truetune.kernels.native.build import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")


def compiled(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, scale: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, hits, gradient."""
    slopes = logits.clone()
    losses, hits = torch.full((len(logits),), -1.0), torch.zeros(len(logits), dtype=torch.bool)
    cross_entropy.in_place(slopes, labels, weights, losses, hits, scale, softcap, True)
    again = logits.clone()
    only = torch.empty_like(losses)
    cross_entropy.in_place(again, labels, weights, only, torch.empty_like(hits), scale, softcap, False)
    for found, expected in ((again, logits), (only, losses)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    return losses, hits, slopes


def plain(
    logits: Tensor, labels: Tensor, weights: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    z = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    losses = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    (losses if weights is None else losses * weights).sum().backward()
    rivals = z.detach().scatter(1, labels[:, None], -math.inf).amax(1)
    assert x.grad is not None
    return losses.detach(), z.detach().gather(1, labels[:, None])[:, 0] > rivals, x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 7, 15, 16, 17, 33, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize(("scale", "softcap", "weighted"), [(1.0, 0.0, False), (0.3, 0.0, True), (1.5, 4.0, True)])
def test_no_worse_than_plain_torch(
    dtype: torch.dtype, width: int, scale: float, softcap: float, weighted: bool, no_worse: Any
) -> None:
    torch.manual_seed(width)
    logits = torch.randn(9, width).mul(6).to(dtype)
    labels = torch.randint(0, width, (9,))
    labels[:2] = torch.tensor([0, width - 1])
    weights = torch.rand(9) * 3 if weighted else None
    wide = None if weights is None else weights.double()
    found = compiled(logits, labels, weights, scale, softcap)
    own, truth = plain(logits, labels, weights, scale, softcap), plain(logits.double(), labels, wide, scale, softcap)
    no_worse("losses", found[0], own[0], truth[0], torch.float32)
    no_worse("gradient", found[2], own[2], truth[2], dtype)
    assert torch.equal(found[1], own[1])
    assert found[2].dtype == dtype


def test_a_long_sum_of_equals() -> None:
    logits = torch.zeros(1, 400_001)
    losses, hits, slopes = compiled(logits, torch.tensor([400_000]))
    assert losses.item() == pytest.approx(math.log(400_001), rel=1e-7)
    assert slopes[0, 0].item() == pytest.approx(1 / 400_001, rel=1e-6)
    assert not hits.item()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4, 18])
def test_what_is_no_number_stays_so(value: float, place: int) -> None:
    logits = torch.randn(2, 19)
    logits[0, place] = value
    losses, _, slopes = compiled(logits, torch.tensor([4, 4]))
    assert losses.isnan().tolist() == [True, False]
    assert slopes[0].isnan().all() and slopes[1].isfinite().all()


def test_classes_that_are_ruled_out() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 3.0, -math.inf]])
    losses, hits, slopes = compiled(logits, torch.tensor([2, 1]))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), 0.0])
    assert hits.tolist() == [True, True]
    assert slopes[0, 1] == 0 and not slopes[1].any()


def test_a_label_that_is_no_class() -> None:
    for label in (-100, 3):
        with pytest.raises(IndexError, match=f"label {label} is none of 3 classes"):
            compiled(torch.zeros(1, 3), torch.tensor([label]))


@pytest.mark.parametrize("threads", [1, 2])
def test_classes_that_reach_the_threshold_in_any_row_of_any_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    logits, labels = torch.zeros(8, 37), torch.full((8,), 36)
    logits[torch.arange(8), torch.arange(8) * 4] = 5.0  # of which a softmax of 0.8 is made, and 0.005 of the others
    reached = torch.ones(37, dtype=torch.bool)
    rest = torch.empty(8), torch.empty(8, dtype=torch.bool)
    cross_entropy.in_place(logits, labels, torch.zeros(8), *rest, 1.0, 0.0, True, reached, 0.1)
    assert reached.nonzero()[:, 0].tolist() == list(range(0, 32, 4))


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(cross_entropy, "in_place", lambda *args: called.append(args))
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    linear_cross_entropy(hidden, weight, labels)
    assert len(called) == 1
    linear_cross_entropy(hidden, weight, labels, smoothing=0.1)
    linear_cross_entropy(hidden, weight, labels, z_loss=0.1)
    linear_cross_entropy(hidden, weight, labels, torch.randn(5))
    monkeypatch.setenv("TRUETUNE_OFF", "native_cross_entropy")
    linear_cross_entropy(hidden, weight, labels)
    assert len(called) == 1
