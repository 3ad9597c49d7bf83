"""The fused adapter against its formula."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.kernels import lora_linear

LEADING = [(1,), (7,), (2, 5), (3, 1, 33)]
SIZES = [(8, 8, 4), (33, 65, 5), (64, 16, 1)]
# name: dtype of x and W, dtype of the adapter, autocast
PRECISIONS = {
    "fp32": (torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16 base": (torch.bfloat16, torch.float32, False),
    "autocast": (torch.float32, torch.float32, True),
    "autocast, bf16 base": (torch.bfloat16, torch.float32, True),
}
SCALING = 1.7


def formula(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return F.linear(x, w, bias) + scaling * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def inputs(leading: tuple[int, ...], sizes: tuple[int, int, int], base: Any, adapter: Any, bias: bool) -> list:
    width, out, rank = sizes
    x = torch.randn(*leading, width).to(base).requires_grad_()
    weight = torch.randn(out, width).div(width**0.5).to(base)
    a = torch.randn(rank, width).div(width**0.5).to(adapter).requires_grad_()
    b = torch.randn(out, rank).to(adapter).requires_grad_()
    return [x, weight, torch.randn(out).to(base) if bias else None, a, b]


def results(op: Callable[..., Tensor], tensors: list, cotangent: Tensor) -> dict[str, Tensor]:
    y = op(*tensors, SCALING)
    x, _, _, a, b = tensors
    gradients = torch.autograd.grad(y, (x, a, b), cotangent.to(y.dtype))
    return dict(zip(("y", "x", "a", "b"), (y.detach(), *gradients), strict=True))


@pytest.mark.parametrize("op", [lora_linear, lora_linear.reference], ids=["fused", "reference"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_no_worse_than_the_formula(
    leading: tuple[int, ...],
    sizes: tuple[int, int, int],
    precision: str,
    bias: bool,
    op: Callable[..., Tensor],
    no_worse: Any,
) -> None:
    base, adapter, autocast = PRECISIONS[precision]
    tensors = inputs(leading, sizes, base, adapter, bias)
    cotangent = torch.randn(*leading, sizes[1]).bfloat16()
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    truth = results(formula, exact, cotangent.double())
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        ours, plain = results(op, tensors, cotangent), results(formula, tensors, cotangent)
    for name in truth:
        assert ours[name].dtype == plain[name].dtype
        no_worse(name, ours[name], plain[name], truth[name], torch.bfloat16 if autocast else base)


def test_gradients_are_the_derivatives() -> None:
    x, weight, bias, a, b = inputs((2, 3), (4, 5, 2), torch.float64, torch.float64, True)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, SCALING), (x, a, b))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_each_gradient_alone_equals_all_together(needed: tuple[int, ...]) -> None:
    tensors = inputs((6,), (8, 7, 3), torch.float32, torch.float32, True)
    trained = [tensors[0], tensors[3], tensors[4]]
    together = torch.autograd.grad(lora_linear(*tensors, SCALING).square().sum(), trained)
    for i, t in enumerate(trained):
        t.requires_grad_(i in needed)
    lora_linear(*tensors, SCALING).square().sum().backward()
    for i, (t, gradient) in enumerate(zip(trained, together, strict=True)):
        if i in needed:
            assert t.grad is not None and torch.equal(t.grad, gradient)
        else:
            assert t.grad is None


def test_a_zero_adapter_is_the_base_and_moves_b_first() -> None:
    x, weight, bias, a, b = inputs((6,), (8, 7, 3), torch.float32, torch.float32, True)
    b.data.zero_()
    y = lora_linear(x, weight, bias, a, b, SCALING)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.square().sum().backward()
    assert not a.grad.any() and b.grad.any()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("op", [lora_linear, lora_linear.reference, formula], ids=["fused", "reference", "formula"])
def test_what_a_young_adapter_adds_is_not_rounded_away(op: Callable[..., Tensor], bias: bool) -> None:
    """A tenth of the step of bf16 is there in the mean over many outputs. Two roundings lose nearly all of it."""
    x, weight, offset, a, b = inputs((2048,), (128, 128, 4), torch.bfloat16, torch.float32, bias)
    b.data.fill_(1.0)  # every output has the same size of base, and of what is added
    exact = [None if t is None else t.detach().double() for t in (x, weight, offset, a, b)]
    size = float(formula(*exact, 0.0).abs().mean())
    added = formula(*exact, 1.0) - formula(*exact, 0.0)
    scaling = 0.1 * torch.finfo(torch.bfloat16).eps * size / float(added.abs().mean())
    with torch.no_grad():
        found = (op(x, weight, offset, a, b, scaling) - op(x, weight, offset, a, b, 0.0)).double()
    share = float((found * added).sum() / (scaling * added.square().sum()))
    assert share < 0.7 if op is formula else share == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("trained", [1, 2], ids=["weight", "bias"])
@pytest.mark.parametrize("op", [lora_linear, lora_linear.reference], ids=["fused", "reference"])
def test_a_trained_base_is_refused(op: Callable[..., Tensor], trained: int) -> None:
    tensors = inputs((2,), (4, 4, 2), torch.float32, torch.float32, True)
    tensors[trained].requires_grad_()
    with pytest.raises(ValueError, match="freeze them first"):
        op(*tensors, SCALING)


def test_a_base_of_another_dtype_is_refused_without_autocast() -> None:
    x, weight, _, a, b = inputs((2,), (4, 4, 2), torch.float32, torch.float32, False)
    with pytest.raises(ValueError, match="one dtype"):
        lora_linear(x, weight.bfloat16(), None, a, b, SCALING)


def test_the_input_is_the_only_large_tensor_saved() -> None:
    x, weight, bias, a, b = inputs((100,), (64, 32, 2), torch.float32, torch.float32, True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, SCALING)
    fresh = {t.data_ptr(): t.numel() for t in saved} | {t.data_ptr(): 0 for t in (x, weight, a, b)}
    assert sum(fresh.values()) == 100 * 2 + 2 * (64 + 32)  # x A^T, and the factors in the products' dtype
