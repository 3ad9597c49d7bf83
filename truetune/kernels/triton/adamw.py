"""AdamW over all tensors of a group in one launch: each program updates a block of one of them.

The kernel gets a table of addresses, and finds the tensor of its block by halving the list of first blocks. So a step
costs one small copy and one launch, however many tensors there are; torch's foreach splits them into several.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from truetune.devices import to_device
from truetune.kernels.triton.launch import launch

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
ELEMENTS = 1024
"""Elements of a block."""


@triton.jit
def rounded_at_random(x, seed, place):
    """fp32 whose last 16 bits are 0: one of the two bf16 numbers around x, with x as the mean."""
    bits = x.to(tl.uint32, bitcast=True) + (tl.randint(seed, place).to(tl.uint32) & 0xFFFF)
    return tl.where(tl.abs(x) < float("inf"), (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)


@triton.jit
def owner(first_blocks, tensors, program, HALVINGS: tl.constexpr):
    """The tensor that the program's block belongs to."""
    low, high = tl.zeros([], tl.int32), tl.zeros([], tl.int32) + tensors
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        before = tl.load(first_blocks + middle) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def adamw_many(
    addresses, first_blocks, sizes, tensors, rate, first, second, eps, shrink, correction, root, seed,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, STOCHASTIC: tl.constexpr, HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = owner(first_blocks, tensors, program, HALVINGS)
    place = (program - tl.load(first_blocks + tensor)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.load(sizes + tensor)
    p = tl.load(addresses + tensor).to(tl.pointer_type(PARAMETER)) + place
    g = tl.load(addresses + tensors + tensor).to(tl.pointer_type(GRADIENT)) + place
    m = tl.load(addresses + 2 * tensors + tensor).to(tl.pointer_type(tl.float32)) + place
    v = tl.load(addresses + 3 * tensors + tensor).to(tl.pointer_type(tl.float32)) + place
    gradient = tl.load(g, inside, 0.0).to(tl.float32)
    mean = tl.load(m, inside, 0.0)
    mean += (gradient - mean) * (1.0 - first)
    variance = tl.load(v, inside, 0.0) * second + gradient * gradient * (1.0 - second)
    tl.store(m, mean, inside)
    tl.store(v, variance, inside)
    x = tl.load(p, inside, 0.0).to(tl.float32) * shrink
    x -= rate * (mean / correction) / (tl.sqrt(variance) / root + eps)
    if STOCHASTIC:
        x = rounded_at_random(x, seed, program * BLOCK + tl.arange(0, BLOCK))
    tl.store(p, x, inside)


def table(elements: int, *lists: list[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """Addresses of all tensors, list by list; for those of the first list the first block of each, and the end, and the
    sizes; and how many blocks of so many elements there are.

    Raises ValueError for tensors that are not contiguous.
    """
    every = [t for tensors in lists for t in tensors]
    if not all(t.is_contiguous() for t in every):
        raise ValueError("parameters and their states must be contiguous; call .contiguous() on them")
    sizes = [t.numel() for t in lists[0]]
    first_blocks = [0, *accumulate(triton.cdiv(size, elements) for size in sizes)]
    addresses = torch.tensor([0 if t.is_meta else t.data_ptr() for t in every])
    tensors = (addresses, torch.tensor(first_blocks, dtype=torch.int32), torch.tensor(sizes))
    moved = tuple(to_device(t, every[0].device) for t in tensors)
    return moved, first_blocks[-1]


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None = None,
) -> None:
    dtype = parameters[0].dtype
    gradients = [g.contiguous() for g in gradients]
    tensors, blocks = table(ELEMENTS, parameters, gradients, means, variances)
    first, second = betas
    launch(
        adamw_many,
        lambda _: (blocks,),
        *(*tensors, len(parameters), rate, first, second, eps, 1 - rate * weight_decay),
        *(1 - first**step, (1 - second**step) ** 0.5, seed or 0),
        dtype=dtype,
        PARAMETER=TYPES[dtype],
        GRADIENT=TYPES[gradients[0].dtype],
        STOCHASTIC=seed is not None and dtype == torch.bfloat16,
        HALVINGS=len(parameters).bit_length(),
        BLOCK=ELEMENTS,
    )
