"""Head, its adapter and loss in one against plain torch, in value and gradient."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels import LossTerms, linear_cross_entropy

module = sys.modules["truetune.kernels.linear_cross_entropy"]
SHAPES = [(7, 16, 100, 3), (33, 64, 515, 8)]
OPTIONS: list[dict[str, Any]] = [{}, {"bias": True, "scale": 2.0, "softcap": 5.0}]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, adapter: torch.dtype, bias: bool) -> dict[str, Tensor]:
    rows, width, vocabulary, rank = shape
    made = {
        "hidden_ND": torch.randn(rows, width).to(dtype).requires_grad_(),
        "weight_VD": torch.randn(vocabulary, width).div(width**0.5).mul(3).to(dtype),
        "labels_N": torch.randint(0, vocabulary, (rows,)),
        "low_NR": torch.randn(rows, rank).to(dtype).requires_grad_(),
        "up_VR": torch.randn(vocabulary, rank).to(adapter).requires_grad_(),
    }
    more = {"bias_V": torch.randn(vocabulary).to(dtype), "weights_N": torch.rand(rows)}
    return made | (more if bias else {})


def results(op: Callable[..., LossTerms], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    terms = op(**tensors, **options)
    trained = {n: t for n, t in tensors.items() if t.requires_grad}
    gradients = torch.autograd.grad(terms.total * 0.37, tuple(trained.values()))
    return {"losses": terms.losses} | dict(zip(trained, gradients, strict=True))


@pytest.mark.parametrize("chunks", [96 << 20, 3 * 515 * 4], ids=["one chunk", "three rows a chunk"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain_torch(
    shape: tuple[int, int, int, int],
    precision: str,
    options: dict[str, Any],
    chunks: int,
    no_worse: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunks)
    options = dict(options)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tensors = inputs(shape, dtype, torch.float32, options.pop("bias", False))
    exact = {
        n: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in tensors.items()
    }
    truth = results(linear_cross_entropy.reference, exact, **options)
    low, up = exact["low_NR"], exact["up_VR"]
    alone = results(linear_cross_entropy.reference, {n: t for n, t in exact.items() if t is not low and t is not up})
    assert (alone["losses"] - truth["losses"]).abs().max() > 0.1
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext():
        ours = results(linear_cross_entropy, tensors, **options)
        plain = results(linear_cross_entropy.reference, tensors, **options)
    for name in truth:
        assert ours[name].dtype == plain[name].dtype
        no_worse(name, ours[name], plain[name], truth[name], torch.float32 if precision == "fp32" else torch.bfloat16)


def test_the_adapter_is_a_weight_by_parts() -> None:
    """In float64: hidden through W + U A, with the chain rule of A outside of the operation."""
    tensors = inputs((9, 8, 50, 3), torch.float64, torch.float64, True)
    a = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    hidden, weight, up = (tensors[n] for n in ("hidden_ND", "weight_VD", "up_VR"))
    rest = {n: tensors[n] for n in ("labels_N", "bias_V", "weights_N")}
    parts = linear_cross_entropy(hidden, weight, **rest, low_NR=hidden @ a.T, up_VR=up, softcap=3.0)
    whole = linear_cross_entropy.reference(hidden, weight + up @ a, **rest, softcap=3.0)
    for ours, theirs in zip(
        torch.autograd.grad(parts.total, (hidden, a, up)),
        torch.autograd.grad(whole.total, (hidden, a, up)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_frozen_input_leaves_the_other_gradients_as_they_are() -> None:
    tensors = inputs((7, 16, 100, 3), torch.float32, torch.float32, False)
    tensors["low_NR"].requires_grad_(False)
    ours, plain = results(linear_cross_entropy, tensors), results(linear_cross_entropy.reference, tensors)
    assert ours.keys() == plain.keys() == {"losses", "hidden_ND", "up_VR"}
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name])


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_cross_entropy.reference], ids=["fused", "reference"])
def test_what_a_young_adapter_of_the_head_adds_is_not_rounded_away(op: Any) -> None:
    """A tenth of the step of bf16 on the label's logit lowers the mean loss by its share, (1 - p) of it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(8192, 64).bfloat16(), torch.randn(64, 64).div(8).bfloat16()
    labels, low, up = torch.full((8192,), 3), torch.ones(8192, 1).bfloat16(), torch.zeros(64, 1)
    added = 0.1 * torch.finfo(torch.bfloat16).eps * float((hidden @ weight.T)[:, 3].abs().float().mean())
    before = op(hidden, weight, labels, low_NR=low, up_VR=up.bfloat16()).losses
    up[3] = added
    after = op(hidden, weight, labels, low_NR=low, up_VR=up.bfloat16()).losses
    expected = added * float((1 - torch.exp(-before)).mean())
    assert float((before - after).mean()) == pytest.approx(expected, rel=0.2)
