"""A frozen linear layer with a LoRA adapter, forward and backward without a full-size temporary.

    y = x W^T + bias + s (x A^T) B^T        dx = dy W + s (dy B) A
    dA = s (dy B)^T x                       dB = s dy^T (x A^T)

LoRA: Hu et al. 2021, arXiv 2106.09685. The two products of size [T, O] and [T, I] that the adapter adds are
added in place, and only x and the small x A^T are saved. Left out: adapter dropout, DoRA, a trained base.

Shape suffixes: T rows of x, I inputs, O outputs, R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.op import Op, compute_dtype, no_autocast

Product = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]


@Op
def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """x [..., I] -> [..., O] through a frozen weight and bias and the adapter scaling * B A.

    Computes in autocast's dtype where it is on, else in the dtype of x and weight, which then must be equal;
    the adapter may have another (fp32 over a bf16 base), and its gradients come back in it.
    Raises ValueError if weight or bias requires a gradient, or if the dtypes do not fit.
    """
    _require_frozen(weight_OI, bias_O)
    dtype = compute_dtype(x, weight_OI)
    low = F.linear(x, a_RI.to(dtype))
    return F.linear(x, weight_OI, bias_O) + scaling * F.linear(low, b_OR.to(dtype))


@lora_linear.on("cpu", "cuda")
def _fused(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    return through(_product, x, weight_OI, bias_O, a_RI, b_OR, scaling)


def _product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, low_TR: Tensor, up_OR: Tensor) -> Tensor:
    return F.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, up_OR.T)


def through(
    product: Product,
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
) -> Tensor:
    """The operation over ``product``: (x, W, b, low, up) -> x W^T + b + low up^T, all of one dtype."""
    _require_frozen(weight_OI, bias_O)
    x_TI = x.reshape(-1, x.shape[-1])
    # Viewed out here: a view made inside a custom function can't be added to in place, as some models do.
    return _LoRALinear.apply(x_TI, weight_OI, bias_O, a_RI, b_OR, scaling, product).view(*x.shape[:-1], -1)


def _require_frozen(weight_OI: Tensor, bias_O: Tensor | None) -> None:
    if weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad):
        raise ValueError("lora_linear has no gradient for its weight and bias; freeze them first")


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        product: Product,
    ) -> Tensor:
        ctx.scaling, ctx.product, ctx.dtype = scaling, product, x_TI.dtype
        dtype = compute_dtype(x_TI, weight_OI)
        x_TI = x_TI.to(dtype)
        with no_autocast(x_TI):
            low_TR = x_TI @ a_RI.to(dtype).T
            bias_O = None if bias_O is None else bias_O.to(dtype)
            y_TO = product(x_TI, weight_OI.to(dtype), bias_O, low_TR, (b_OR * scaling).to(dtype))
        _, _, _, for_a, for_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x_TI if for_a else None, weight_OI, a_RI, b_OR, low_TR if for_b else None)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        for_x, _, _, for_a, for_b, *_ = ctx.needs_input_grad
        dtype = grad_TO.dtype
        grad_x_TI = grad_a_RI = grad_b_OR = None
        with no_autocast(grad_TO):
            if for_x or for_a:
                grad_low_TR = grad_TO @ (b_OR * ctx.scaling).to(dtype)
            if for_x:
                grad_x_TI = ctx.product(grad_TO, weight_OI.to(dtype).T, None, grad_low_TR, a_RI.to(dtype).T).to(
                    ctx.dtype
                )
            if for_a:
                grad_a_RI = (grad_low_TR.T @ x_TI).to(a_RI.dtype)
            if for_b:
                grad_b_OR = (grad_TO.T @ low_TR).to(b_OR.dtype).mul_(ctx.scaling)
        return grad_x_TI, None, None, grad_a_RI, grad_b_OR, None, None
