"""RMSNorm with the residual addition in one pass each way.

Saved: s and one fp32 scalar r = 1 / sqrt(mean(s^2) + eps) per row. With n = s r and g = dy (weight + offset):

    ds = r (g - n mean(g n)) + (the gradient that reaches s from elsewhere)        dweight = sum over rows of dy n

The backward's programs each go over many rows and keep one partial dweight, so that no atomics are needed and the
result is the same every time. Shape suffixes: N rows, D width, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.triton.launch import launch

PROGRAMS = 256
"""Programs of the backward at most, and so rows of the partial sums of dweight."""


@triton.jit
def rms_norm_forward(
    x, residual, weight, y, total, r, rows, width, eps, offset, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    s = tl.load(x + place, inside, 0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + place, inside, 0.0).to(tl.float32)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + place, rounded, inside)
        s = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, 1) / width + eps)
    tl.store(r + row, scale, row < rows)
    w = tl.load(weight + column, column < width, 0.0).to(tl.float32) + offset
    tl.store(y + place, s * scale[:, None] * w[None, :], inside)


@triton.jit
def rms_norm_backward(
    dy, dtotal, total, weight, r, ds, dweight, rows, width, offset, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, column < width, 0.0).to(tl.float32) + offset
    sums = tl.zeros([WIDTH], tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        scale = tl.load(r + row, row < rows, 0.0)[:, None]
        upstream = tl.load(dy + place, inside, 0.0).to(tl.float32)
        n = tl.load(total + place, inside, 0.0).to(tl.float32) * scale
        sums += tl.sum(upstream * n, 0)
        g = upstream * w[None, :]
        gradient = scale * (g - n * (tl.sum(g * n, 1) / width)[:, None])
        if dtotal is not None:
            gradient += tl.load(dtotal + place, inside, 0.0).to(tl.float32)
        tl.store(ds + place, gradient, inside)
    tl.store(dweight + program * width + column, sums, column < width)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, offset: float, residual_ND: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        rows, width = x_ND.shape
        y_ND = torch.empty_like(x_ND)
        total_ND = None if residual_ND is None else torch.empty_like(x_ND)
        r_N = x_ND.new_empty(rows, dtype=torch.float32)
        launch(
            rms_norm_forward,
            lambda tiles: (triton.cdiv(rows, tiles["ROWS"]),),
            *(x_ND, residual_ND, weight_D, y_ND, total_ND, r_N, rows, width, eps, offset),
            dtype=x_ND.dtype,
            size=width,
            WIDTH=triton.next_power_of_2(width),
        )
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_ND if total_ND is None else total_ND, weight_D, r_N)
        return y_ND, total_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor | None, dtotal_ND: Tensor | None) -> tuple[Tensor | None, ...]:
        total_ND, weight_D, r_N = ctx.saved_tensors
        dy_ND = torch.zeros_like(total_ND) if dy_ND is None else dy_ND.contiguous()
        dtotal_ND = None if dtotal_ND is None else dtotal_ND.contiguous()
        rows, width = total_ND.shape
        ds_ND = torch.empty_like(total_ND)
        dweight_PD = r_N.new_empty(min(PROGRAMS, rows), width)
        launch(
            rms_norm_backward,
            lambda _: (len(dweight_PD),),
            *(dy_ND, dtotal_ND, total_ND, weight_D, r_N, ds_ND, dweight_PD, rows, width, ctx.offset),
            dtype=total_ND.dtype,
            size=width,
            WIDTH=triton.next_power_of_2(width),
        )
        return ds_ND, dweight_PD.sum(0).to(weight_D.dtype), None, None, ds_ND if ctx.needs_input_grad[4] else None


def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows_of = [t if t is None else t.reshape(-1, width).contiguous() for t in (x, residual)]
    y_ND, total_ND = _RMSNorm.apply(rows_of[0], weight_D.contiguous(), eps, offset, rows_of[1])
    return y_ND.view(x.shape), x if total_ND is None else total_ND.view(x.shape)
