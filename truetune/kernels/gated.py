"""Gated activations of a feed-forward layer: act(gate) * up (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from truetune.kernels.native import pointwise
from truetune.kernels.op import Op, statistics_dtype

Activation = Literal["silu", "gelu", "gelu_tanh"]


@Op
def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """act(gate) * up, of one shape and dtype, computed in at least fp32 and rounded once.

    activation: "silu" (SwiGLU), "gelu" by the error function or "gelu_tanh", its approximation (GEGLU).
    """
    wide = gate.to(statistics_dtype(gate.dtype))
    value = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate=_APPROXIMATE[activation])
    return (value * up.to(wide.dtype)).to(gate.dtype)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@gated.on("cpu", needs=pointwise.available)
def _native(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    if activation not in pointwise.ACTIVATIONS or not pointwise.computes(gate, up):
        return gated.reference(gate, up, activation)
    return pointwise.Gated.apply(gate, up, activation == "gelu_tanh")
