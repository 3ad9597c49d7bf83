"""Trained linear layers of one input, against their formula."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels import product
from truetune.kernels.linear import linears
from truetune.kernels.native.build import kernels

PRECISIONS = {
    "autocast": (torch.float32, torch.float32, True),
    "autocast, bf16 x": (torch.bfloat16, torch.float32, True),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp32": (torch.float32, torch.float32, False),
}


def outcome(op: Any, x: Tensor, weights: list[Tensor], biases: list[Any], cotangents: list[Tensor]) -> list[Tensor]:
    leaves = [x, *weights, *(b for b in biases if b is not None)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    own = iter(leaves[1 + len(weights) :])
    outputs = op(leaves[0], leaves[1 : 1 + len(weights)], [None if b is None else next(own) for b in biases])
    gradients = torch.autograd.grad(outputs, leaves, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])
    return [*(y.detach() for y in outputs), *gradients]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 33)], ids=str)
def test_no_worse_than_the_formula(leading: tuple[int, ...], precision: str, no_worse: Any) -> None:
    base, stored, autocast = PRECISIONS[precision]
    x, outputs = torch.randn(*leading, 33).to(base), (65, 16)
    weights = [torch.randn(o, 33).div(33**0.5).to(stored) for o in outputs]
    biases = [torch.randn(65).to(stored), None]
    cotangents = [torch.randn(*leading, o).bfloat16() for o in outputs]
    exact = [[None if t is None else t.double() for t in group] for group in (weights, biases, cotangents)]
    truth = outcome(linears.reference, x.double(), *exact)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        ours, plain = (outcome(op, x, weights, biases, cotangents) for op in (linears, linears.reference))
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert mine.dtype == theirs.dtype
        no_worse(str(i), mine, theirs, true, torch.bfloat16 if autocast else base)


def test_the_gradient_of_an_fp32_weight_is_not_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels() is None:
        pytest.skip("nothing is compiled on this machine")
    monkeypatch.setattr(product, "instructions", lambda: {"avx512_bf16"})  # what others have in plain code
    x, weight, cotangent = torch.randn(40, 33).bfloat16(), torch.randn(65, 33), torch.randn(40, 65).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(linears, x, [weight], [None], [cotangent])[2]
    assert torch.allclose(found.double(), cotangent.double().T @ x.double(), rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, frozen, trained = torch.randn(5, 8), torch.randn(6, 8), torch.randn(4, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sum(y.float().sum() for y in linears(x, [frozen, trained], [None, None])).backward()
    assert trained.grad is not None and frozen.grad is None and x.grad is None
