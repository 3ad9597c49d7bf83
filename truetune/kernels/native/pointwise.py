"""Norms, rotary positions and gated activations compiled for this processor (``pointwise.cpp``), for autograd.

Left out, and told by ``computes``: float64 and half precision, and second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.native.build import kernels
from truetune.kernels.op import is_on

ACTIVATIONS = ("silu", "gelu_tanh")
"""Those of ``kernels.gated`` that are compiled."""


def computes(*tensors: Tensor) -> bool:
    """Whether tensors of this one dtype can be computed here."""
    dtype = tensors[0].dtype
    known = dtype in (torch.float32, torch.bfloat16) and all(t.dtype == dtype for t in tensors)
    return known and available()


def available() -> bool:
    """Whether there is a library, which may have to be compiled first, and nobody turned it off."""
    return is_on("native_pointwise") and kernels() is not None


class RMSNorm(torch.autograd.Function):
    """``apply(x, weight_D, eps, offset, residual)`` -> (y, s), as ``kernels.rms_norm``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        flat_ND, wide_D = _rows(x), weight_D.float().contiguous()
        other_ND = None if residual is None else _rows(residual)
        y_ND, sum_ND, scales_N = _compiled().rms_norm_forward(flat_ND, wide_D, other_ND, eps, offset)
        ctx.save_for_backward(sum_ND, scales_N, weight_D)
        ctx.offset, ctx.added = offset, residual is not None
        ctx.set_materialize_grads(False)  # the sum is mostly read by nobody
        total = sum_ND.view(x.shape) if ctx.added else x.view_as(x)
        return y_ND.view(x.shape), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, None, None, None, dsum if ctx.added else None
        sum_ND, scales_N, weight_D = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        more_ND = None if dsum is None else _rows(dsum)
        wide_D = weight_D.float().contiguous()
        dx_ND, parts_BD = _compiled().rms_norm_backward(
            _rows(dy), more_ND, sum_ND, scales_N, wide_D, ctx.offset, wanted
        )
        dx = dx_ND.view(dy.shape)
        return dx, parts_BD.sum(0).to(weight_D.dtype) if wanted else None, None, None, dx if ctx.added else None


class Rope(torch.autograd.Function):
    """``apply(x_HTd, cos_TR, sin_TR)``: x cos + rotated(x) sin, with the second half of a row, negative, before its
    first. What a head has beyond the R of the tables passes through."""

    @staticmethod
    def forward(ctx: Any, x_HTd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        tables = cos_TR.float().contiguous(), sin_TR.float().contiguous()
        ctx.save_for_backward(*tables)
        out_HTd: Tensor = _compiled().rope(_inner(x_HTd), *tables, False)
        return out_HTd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_HTd: Tensor) -> tuple[Tensor | None, ...]:
        return _compiled().rope(_inner(dout_HTd), *ctx.saved_tensors, True), None, None


class Gated(torch.autograd.Function):
    """``apply(gate, up, tanh)``: SiLU, or GELU by its approximation with tanh, of the gate, times up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        out: Tensor = _compiled().gated_forward(gate, up, tanh)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *_compiled().gated_backward(dout.contiguous(), *ctx.saved_tensors, ctx.tanh), None


def _compiled() -> Any:
    return kernels()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _inner(x_HTd: Tensor) -> Tensor:
    return x_HTd if x_HTd.stride(-1) == 1 else x_HTd.contiguous()
