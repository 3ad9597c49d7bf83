"""Cross-entropy of logits compiled for this processor (``cross_entropy.cpp``): loss and gradient in one pass.

Left out, and told by ``computes``: float64 and half precision. Of the options of ``linear_cross_entropy`` it knows
scale, soft cap and weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.kernels.native.build import kernels
from truetune.kernels.op import is_on


def computes(logits: Tensor) -> bool:
    """Whether logits of this dtype, on this device, can be computed here."""
    known = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16)
    return known and is_on("native_cross_entropy") and kernels() is not None


def in_place(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    losses_C: Tensor,
    correct_C: Tensor,
    scale: float,
    softcap: float,
    gradient: bool,
    reached_V: Tensor | None = None,
    threshold: float = 0.0,
) -> None:
    """Fill losses_C (float, unweighted) and correct_C; the logits become the gradient of the weighted sum of losses.

    softcap: 0 for none. weights_C: float. reached_V: bool; with the gradient it is told for each class whether in any
    row with another label its softmax is not below the threshold. Raises IndexError for a label that is no class.
    """
    compiled = kernels()
    assert compiled, "ask computes first"
    weights_C = None if weights_C is None else weights_C.contiguous()
    found, shape = (labels_C.contiguous(), weights_C, losses_C, correct_C), (scale, softcap, gradient)
    compiled.cross_entropy(logits_CV, *found, *shape, reached_V, threshold)
