"""Linear layers whose weights are trained, several of one input at once.

    y_i = x W_i^T + b_i        dx = sum over i of dy_i W_i        dW_i = dy_i^T x

In bf16 on a CPU (``kernels.product``) weights are read as they are stored, fp32 or bf16, and never copied as a whole;
dx is one sum, and the gradient of an fp32 weight is never rounded to bf16, as it is under autocast.
Shape suffixes: T rows of x, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.op import Op, autocast_dtype, no_autocast
from truetune.kernels.product import available, products


@Op
def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """x [..., I] -> [..., O] of each layer, as ``F.linear``, under autocast too."""
    return tuple(F.linear(x, weight_OI, bias_O) for weight_OI, bias_O in zip(weights, biases, strict=True))


@linears.on("cpu", needs=available)
def _compiled(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    known = {torch.float32, torch.bfloat16}
    computed = autocast_dtype(x) or x.dtype
    if computed != torch.bfloat16 or not {x.dtype, *(w.dtype for w in weights)} <= known or not available():
        return linears.reference(x, weights, biases)
    outputs: tuple[Tensor, ...] = _Linears.apply(len(weights), x.reshape(-1, x.shape[-1]), *weights, *biases)
    # Viewed out here: a view made inside a custom function can't be added to in place, as some models do.
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in outputs)


class _Linears(torch.autograd.Function):
    """``apply(count, x_TI, *weights, *biases)``."""

    @staticmethod
    def forward(ctx: Any, count: int, x_TI: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = tensors[:count], tensors[count:]
        ctx.dtype, ctx.biases = x_TI.dtype, [None if b is None else b.dtype for b in biases]
        x_TI = x_TI.bfloat16()
        for_weights = any(ctx.needs_input_grad[2 : 2 + count])
        ctx.save_for_backward(x_TI if for_weights else None, *weights)
        with no_autocast(x_TI):
            return tuple(products([x_TI], [w_OI], b_O) for w_OI, b_O in zip(weights, biases, strict=True))  # type: ignore[list-item]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *weights = ctx.saved_tensors
        _, for_x, *wanted = ctx.needs_input_grad
        for_weights, for_biases = wanted[: len(grads)], wanted[len(grads) :]
        with no_autocast(grads[0]):
            grad_x_TI = products([*grads], [w_OI.T for w_OI in weights], dtype=ctx.dtype) if for_x else None
            grad_weights = (
                products([g_TO.T], [x_TI.T], dtype=w_OI.dtype) if needed else None
                for g_TO, w_OI, needed in zip(grads, weights, for_weights, strict=True)
            )
            grad_biases = (
                g_TO.sum(0, dtype=torch.float32).to(dtype) if needed else None
                for g_TO, dtype, needed in zip(grads, ctx.biases, for_biases, strict=True)
            )
            return None, grad_x_TI, *grad_weights, *grad_biases
