"""One AdamW step whose two moments are kept in 8 bits each, by blocks of 256 elements with a scale of their own.

Dettmers et al. 2021, arXiv 2110.02861. A moment is map[code] * scale, where scale is the block's largest magnitude. The
map holds 256 numbers in [-1, 1] (the mean) or [0, 1] (the variance): for e = 0 ... 6, the middles of 2^(6 - e) equal
parts of [0.1, 1] times 10^-e, of either sign (of twice as many parts, without sign), and 0 and 1. The step itself is
that of ``adamw``, in fp32, with the moments as they are before they are rounded again.
Shape suffixes: B blocks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.kernels.op import Op, statistics_dtype

BLOCK = 256
"""Elements that share a scale."""


@Op
def adamw_8bit(
    parameters: list[Tensor],
    gradients: list[Tensor],
    mean_codes: list[Tensor],
    mean_scales: list[Tensor],
    variance_codes: list[Tensor],
    variance_scales: list[Tensor],
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update parameters, codes and scales in place. ``step`` counts from 1.

    Codes are uint8 of the parameter's number of elements, scales fp32 of one per block of 256, the last one cut short.
    Zero scales are zero moments. Parameters and gradients are fp32 or bf16, of one dtype each.
    """
    first, second = betas
    states = (mean_codes, mean_scales, variance_codes, variance_scales)
    for p, g, m_codes, m_scales, v_codes, v_scales in zip(parameters, gradients, *states, strict=True):
        g = g.flatten().to(m_scales.dtype)
        m = _decoded(m_codes, m_scales, signed=True).lerp_(g, 1 - first)
        v = _decoded(v_codes, v_scales, signed=False).mul_(second).addcmul_(g, g, value=1 - second)
        _encode(m, m_codes, m_scales, signed=True)
        _encode(v, v_codes, v_scales, signed=False)
        wide = p.flatten().to(statistics_dtype(p.dtype)) * (1 - rate * weight_decay)
        wide.addcdiv_(m, (v / (1 - second**step)).sqrt_().add_(eps), value=-rate / (1 - first**step))
        p.copy_(wide.view(p.shape))


@lru_cache
def dynamic_map(signed: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The 256 numbers in rising order, and the 255 middles between neighbours."""
    parts = [torch.linspace(0.1, 1, 2 ** (6 - e) * (1 if signed else 2) + 1, dtype=torch.float64) for e in range(7)]
    sizes = torch.cat([(p[1:] + p[:-1]) / 2 * 10.0**-e for e, p in enumerate(parts)])
    numbers = torch.cat([-sizes, sizes] if signed else [sizes]).tolist()
    values = torch.tensor(sorted([*numbers, 0.0, 1.0]), dtype=dtype)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def _blocks(x: Tensor) -> Tensor:
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def _decoded(codes: Tensor, scales_B: Tensor, signed: bool) -> Tensor:
    values, _ = dynamic_map(signed, codes.device)
    return (values.to(scales_B.dtype)[_blocks(codes).int()] * scales_B[:, None]).flatten()[: len(codes)]


def _encode(x: Tensor, codes: Tensor, scales_B: Tensor, signed: bool) -> None:
    blocks = _blocks(x)
    scales_B.copy_(blocks.abs().amax(1))
    unit = blocks / scales_B.where(scales_B > 0, 1)[:, None]
    _, middles = dynamic_map(signed, codes.device)
    codes.copy_(torch.bucketize(unit, middles.to(x.dtype)).flatten()[: len(codes)])
