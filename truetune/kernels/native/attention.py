"""Attention compiled for this processor (``attention.cpp``), as a function that autograd knows.

Left out, and told by ``attends``: sinks, dropout, float64 and half precision, head sizes that are no multiple of
8 or above 256, second derivatives. As in torch's fused kernel, the backward pass reads the output in its own dtype:
where one key has nearly all the weight, gradients of q and k in bf16 carry that rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.native.build import kernels
from truetune.kernels.op import is_on

LARGEST = 256
"""Size of a head, at most."""


def available() -> bool:
    """Whether there is a library on this machine, which may have to be compiled first, and nobody turned it off."""
    return is_on("native_attention") and kernels() is not None


def attends(dtype: torch.dtype, size: int, values: int) -> bool:
    """Whether heads of these sizes can be attended in this dtype, here."""
    sizes = all(0 < n <= LARGEST and n % 8 == 0 for n in (size, values))
    return sizes and dtype in (torch.float32, torch.bfloat16) and available()


def attention(
    q_HTd: Tensor,
    k_KTd: Tensor,
    v_KTe: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_lengths: tuple[int, ...] | None = None,
    library: Any = None,
) -> Tensor:
    """``packed_attention`` of tensors of one dtype on the CPU; library: other operations than those of ``kernels``."""
    everything = max(1, k_KTd.shape[1])
    options = (lengths, key_lengths or lengths, scale, everything if window is None else window, softcap or 0.0)
    out: Tensor = _Attention.apply(library or kernels(), options, q_HTd, k_KTd, v_KTe)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: Any, options: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = compiled.attention_forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.compiled, ctx.options = compiled, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.compiled.attention_backward(dout, *ctx.saved_tensors, *ctx.options)
