"""AdamW over all tensors of a group in one launch: each program updates a block of one of them.

The kernel gets a table of addresses, and finds the tensor of its block by halving the list of first blocks. So a step
costs a few small copies and one launch, however many tensors there are; torch's foreach splits them into several.
Tensors that are not contiguous are left to the reference.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from truetune.devices import to_device
from truetune.kernels import adamw as operation
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
    addresses, first_blocks, sizes, seeds, corrections, held, tensors, rate, first, second, eps, shrink,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = owner(first_blocks, tensors, program, HALVINGS)
    place = (program - tl.load(first_blocks + tensor)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(sizes + tensor)
    if held is not None:
        size = tl.where(tl.load(held) == 0.0, size, 0)
    inside = place < size
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
    correction, root = tl.load(corrections + tensor), tl.load(corrections + tensors + tensor)
    x -= rate * (mean / correction) / (tl.sqrt(variance) / root + eps)
    if seeds is not None:
        x = rounded_at_random(x, tl.load(seeds + tensor), place.to(tl.int32))
    tl.store(p, x, inside)


def table(elements: int, *lists: list[Tensor], seeds: list[int] | None = None) -> tuple[tuple[Tensor | None, ...], int]:
    """Addresses of all tensors, list by list; for those of the first list the first block of each, and the end, the
    sizes, and the seeds if they are rounded at random; and how many blocks of so many elements there are."""
    every = [t for tensors in lists for t in tensors]
    sizes = [t.numel() for t in lists[0]]
    first_blocks = [0, *accumulate(triton.cdiv(size, elements) for size in sizes)]
    addresses = torch.tensor([0 if t.is_meta else t.data_ptr() for t in every])
    tensors = (addresses, torch.tensor(first_blocks, dtype=torch.int32), torch.tensor(sizes))
    moved = [to_device(t, every[0].device) for t in tensors]
    random = seeds is not None and lists[0][0].dtype == torch.bfloat16
    return (*moved, to_device(torch.tensor(seeds), every[0].device) if random else None), first_blocks[-1]


def contiguous(*lists: list[Tensor]) -> bool:
    return all(t.is_contiguous() for tensors in lists for t in tensors)


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
    step: int | Tensor,
    seeds: list[int] | None = None,
    held: Tensor | None = None,
) -> None:
    if not contiguous(parameters, means, variances):
        options: dict[str, Any] = {"rate": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"step": step, "seeds": seeds, "held": held}
        operation.adamw.reference(parameters, gradients, means, variances, **options)
        return
    dtype, (first, second) = parameters[0].dtype, betas
    gradients = [g.contiguous() for g in gradients]
    tensors, blocks = table(ELEMENTS, parameters, gradients, means, variances, seeds=seeds)
    launch(
        adamw_many,
        lambda _: (blocks,),
        *(*tensors, _corrections(step, betas, parameters), held, len(parameters)),
        *(rate, first, second, eps, 1 - rate * weight_decay),
        dtype=dtype,
        PARAMETER=TYPES[dtype],
        GRADIENT=TYPES[gradients[0].dtype],
        HALVINGS=len(parameters).bit_length(),
        BLOCK=ELEMENTS,
    )


def _corrections(step: int | Tensor, betas: tuple[float, float], parameters: list[Tensor]) -> Tensor:
    """1 - b1^t of every parameter, then sqrt(1 - b2^t), in fp32: [2, len(parameters)]."""
    counts = torch.full((len(parameters),), step, device=parameters[0].device) if isinstance(step, int) else step
    first, second = (1 - beta ** counts.double() for beta in betas)
    return torch.stack([first, second.sqrt()]).float()
