"""Stochastic rounding of fp32 to bf16 (Gupta et al. 2015, arXiv 1502.02551).

An update below half a step of bf16 is lost by rounding to the nearest. Here the upper neighbour is taken with the
probability that keeps the mean, so that of many such updates the right share arrives. What bf16 holds stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic(wide: Tensor, seed: int) -> Tensor:
    """fp32 -> bf16 by adding 16 random bits below the last that is kept, and cutting off; the same for one ``seed``."""
    generator = torch.Generator(wide.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, generator=generator, device=wide.device)
    cut = noise.add_(wide.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    return torch.where(wide.isfinite(), cut, wide).to(torch.bfloat16)
