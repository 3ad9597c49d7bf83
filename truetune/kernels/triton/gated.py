"""SwiGLU and GEGLU in one pass each way; only gate and up are saved, the activation is computed again.

y = act(gate) up        dup = dy act(gate)        dgate = dy up act'(gate)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.gated import Activation
from truetune.kernels.triton.launch import launch


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative, in fp32."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        slope = gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "gelu":
        gate = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = gate + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:  # 0.5 (1 + tanh u) is sigmoid(2 u), here of u = sqrt(2 / pi) (x + 0.044715 x^3)
        gate = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * gate, slope


@triton.jit
def gated_forward(gate, up, y, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    value, _ = _activation(tl.load(gate + place, inside, 0.0).to(tl.float32), ACTIVATION)
    tl.store(y + place, value * tl.load(up + place, inside, 0.0).to(tl.float32), inside)


@triton.jit
def gated_backward(dy, gate, up, dgate, dup, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    upstream = tl.load(dy + place, inside, 0.0).to(tl.float32)
    value, slope = _activation(tl.load(gate + place, inside, 0.0).to(tl.float32), ACTIVATION)
    tl.store(dup + place, upstream * value, inside)
    tl.store(dgate + place, upstream * slope * tl.load(up + place, inside, 0.0).to(tl.float32), inside)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        y = torch.empty_like(gate)
        _elementwise(gated_forward, activation, gate, up, y)
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _elementwise(gated_backward, ctx.activation, dy.contiguous(), gate, up, dgate, dup)
        return dgate, dup, None


def _elementwise(kernel: Any, activation: str, *tensors: Tensor) -> None:
    elements = tensors[0].numel()
    launch(
        kernel,
        lambda tiles: (triton.cdiv(elements, tiles["BLOCK"]),),
        *(*tensors, elements),
        dtype=tensors[0].dtype,
        ACTIVATION=activation,
    )


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    y: Tensor = _Gated.apply(gate.contiguous(), up.contiguous(), activation)
    return y
