"""One AdamW step whose two moments are kept in 8 bits each, by blocks of elements with a scale of their own.

Dettmers et al. 2021, arXiv 2110.02861. A moment is map[code] * scale, where scale is the block's largest magnitude. The
map holds 256 numbers in [-1, 1] (the mean) or [0, 1] (the variance): for e = 0 ... 6, the middles of 2^(6 - e) equal
parts of [0.1, 1] times 10^-e, of either sign (of twice as many parts, without sign), and 0 and 1. The step itself is
that of ``adamw``, in fp32, with the moments as they are before they are rounded again.
Shape suffixes: K tensors of equal shape, B blocks of one, E elements of a block.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.kernels.adamw import rounded
from truetune.kernels.op import Op, statistics_dtype


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
    seeds: list[int] | None = None,
) -> None:
    """Update parameters, codes and scales in place. ``step`` counts from 1.

    Codes of a parameter are uint8 [B, E], of which the last may go beyond its elements; scales fp32 [B]. Zero scales
    are zero moments. Parameters and gradients are fp32 or bf16, of one dtype each. seeds: as in ``adamw``.
    """
    first, second = betas
    states = (mean_codes, mean_scales, variance_codes, variance_scales)
    for i, (p, g, m_codes, m_scales, v_codes, v_scales) in enumerate(zip(parameters, gradients, *states, strict=True)):
        wide = p.to(statistics_dtype(p.dtype))[None]
        g = g.to(wide.dtype)[None]
        m = unpack(m_codes[None], m_scales[None], True, wide).lerp_(g, 1 - first)
        v = unpack(v_codes[None], v_scales[None], False, wide).mul_(second).addcmul_(g, g, value=1 - second)
        for x, codes, scales, signed in ((m, m_codes, m_scales, True), (v, v_codes, v_scales, False)):
            for kept, new in zip((codes, scales), pack(x, signed, codes.shape[-1]), strict=True):
                kept.copy_(new[0])
        wide = wide * (1 - rate * weight_decay)
        wide.addcdiv_(m, (v / (1 - second**step)).sqrt_().add_(eps), value=-rate / (1 - first**step))
        p.copy_(rounded(wide[0], p, None if seeds is None else seeds[i]))


@lru_cache
def dynamic_map(signed: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The 256 numbers in rising order, and the 255 middles between neighbours."""
    parts = [torch.linspace(0.1, 1, 2 ** (6 - e) * (1 if signed else 2) + 1, dtype=torch.float64) for e in range(7)]
    sizes = torch.cat([(p[1:] + p[:-1]) / 2 * 10.0**-e for e, p in enumerate(parts)])
    numbers = torch.cat([-sizes, sizes] if signed else [sizes]).tolist()
    values = torch.tensor(sorted([*numbers, 0.0, 1.0]), dtype=dtype)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def pack(x: Tensor, signed: bool, block: int) -> tuple[Tensor, Tensor]:
    """[K, ...] -> codes [K, B, E] and scales [K, B]; the last block is filled up with zeros."""
    flat = x.reshape(len(x), -1)
    blocks = F.pad(flat, (0, -flat.shape[1] % block)).view(len(x), -1, block)
    scales = blocks.abs().amax(-1)
    _, middles = dynamic_map(signed, x.device, x.dtype)
    whole = torch.where(scales > 0, scales, 1.0)
    return torch.bucketize(blocks / whole[..., None], middles).to(torch.uint8), scales


def unpack(codes_KBE: Tensor, scales_KB: Tensor, signed: bool, like: Tensor) -> Tensor:
    """The stack again, of the shape and dtype of ``like``."""
    values, _ = dynamic_map(signed, like.device, like.dtype)
    return (values[codes_KBE.int()] * scales_KB[..., None]).view(len(like), -1)[:, : like[0].numel()].view(like.shape)
