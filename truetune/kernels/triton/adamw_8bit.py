"""AdamW with 8-bit moments over all tensors in one launch: a program decodes, updates and encodes one block.

Codes are found in the map by halving, eight comparisons with the middles between its numbers. Nothing of fp32 but one
scale per block and moment is kept: 6 bytes of state less per weight than ``adamw``. Left to the reference: tensors that
are not contiguous, and blocks of no power of two.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from truetune.kernels import adamw_8bit as operation
from truetune.kernels.triton.adamw import TYPES, contiguous, owner, rounded_at_random, table
from truetune.kernels.triton.launch import launch


@triton.jit
def _encoded(x, codes, scales, block, place, middles, BLOCK: tl.constexpr):
    scale = tl.max(tl.abs(x), 0)
    unit = x / tl.where(scale > 0.0, scale, 1.0)
    code = tl.zeros([BLOCK], tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(unit > tl.load(middles + code + (128 >> bit) - 1), 128 >> bit, 0)
    tl.store(codes + place, code.to(tl.uint8))
    tl.store(scales + block, scale)


@triton.jit
def _decoded(codes, scales, block, place, inside, values):
    code = tl.load(codes + place).to(tl.int32)
    return tl.where(inside, tl.load(values + code) * tl.load(scales + block), 0.0)


@triton.jit
def adamw_8bit_many(
    addresses, first_blocks, sizes, seeds, mean_values, mean_middles, variance_values, variance_middles, tensors, rate,
    first, second, eps, shrink, correction, root,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = owner(first_blocks, tensors, program, HALVINGS)
    block = (program - tl.load(first_blocks + tensor)).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.load(sizes + tensor)
    p = tl.load(addresses + tensor).to(tl.pointer_type(PARAMETER)) + place
    g = tl.load(addresses + tensors + tensor).to(tl.pointer_type(GRADIENT)) + place
    m_codes = tl.load(addresses + 2 * tensors + tensor).to(tl.pointer_type(tl.uint8))
    m_scales = tl.load(addresses + 3 * tensors + tensor).to(tl.pointer_type(tl.float32))
    v_codes = tl.load(addresses + 4 * tensors + tensor).to(tl.pointer_type(tl.uint8))
    v_scales = tl.load(addresses + 5 * tensors + tensor).to(tl.pointer_type(tl.float32))
    gradient = tl.load(g, inside, 0.0).to(tl.float32)
    mean = _decoded(m_codes, m_scales, block, place, inside, mean_values)
    mean += (gradient - mean) * (1.0 - first)
    variance = _decoded(v_codes, v_scales, block, place, inside, variance_values) * second
    variance += gradient * gradient * (1.0 - second)
    _encoded(mean, m_codes, m_scales, block, place, mean_middles, BLOCK)
    _encoded(variance, v_codes, v_scales, block, place, variance_middles, BLOCK)
    x = tl.load(p, inside, 0.0).to(tl.float32) * shrink
    x -= rate * (mean / correction) / (tl.sqrt(variance) / root + eps)
    if seeds is not None:
        x = rounded_at_random(x, tl.load(seeds + tensor), place.to(tl.int32))
    tl.store(p, x, inside)


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
    states = (mean_codes, mean_scales, variance_codes, variance_scales)
    block = mean_codes[0].shape[-1]
    if block & (block - 1) or not contiguous(parameters, *states):
        options: dict[str, Any] = {"rate": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        operation.adamw_8bit.reference(parameters, gradients, *states, **options, step=step, seeds=seeds)
        return
    gradients = [g.contiguous() for g in gradients]
    tensors, blocks = table(block, parameters, gradients, *states, seeds=seeds)
    device, (first, second) = parameters[0].device, betas
    maps = (operation.dynamic_map(signed, device) for signed in (True, False))
    launch(
        adamw_8bit_many,
        lambda _: (blocks,),
        *(*tensors, *(part for of in maps for part in of), len(parameters)),
        *(rate, first, second, eps, 1 - rate * weight_decay, 1 - first**step, (1 - second**step) ** 0.5),
        dtype=parameters[0].dtype,
        PARAMETER=TYPES[parameters[0].dtype],
        GRADIENT=TYPES[gradients[0].dtype],
        HALVINGS=len(parameters).bit_length(),
        BLOCK=block,
    )
