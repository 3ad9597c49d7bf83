"""Packs, heads and options that attention is tried on, and whether a compiled library is worse than the reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from truetune.kernels import packed_attention
from truetune.kernels.native.attention import attention

PACKS = [(1,), (13,), (1, 1, 8, 8), (150, 3)]
LONG = (256, 3, 700)
HEADS = [(6, 2, 64, 64), (9, 3, 80, 80), (14, 2, 96, 64), (8, 8, 128, 8), (2, 1, 8, 256), (2, 1, 256, 8)]
"""Query heads, key heads, size of a query head, of a value head."""
OPTIONS: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 16},
    {"window": 300},
    {"softcap": 2.0},
    {"window": 16, "softcap": 2.0},
]


def inputs(
    heads: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, behind: int = 0
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, and a gradient of the output; behind: tokens that have a key alone."""
    queries, keys, size, values = heads
    every = tokens + behind
    shapes = [(queries, tokens, size), (keys, every, size), (keys, every, values), (queries, tokens, values)]
    *tensors, dout = (torch.randn(*shape).to(dtype) for shape in shapes)
    return tensors, dout


def outcome(
    op: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor, *args: Any, **options: Any
) -> dict[str, Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = op(*leaves, *args, **options)
    return dict(zip("oqkv", (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=True))


def worse(
    libraries: dict[str, Any],
    heads: tuple[int, int, int, int],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
    scale: float,
    against: Callable[..., Tensor] = packed_attention.reference,
) -> list[str]:
    """What has more than twice the error of ``against`` to float64, by the measure of numerics/conftest.py."""
    tensors, dout = inputs(heads, sum(lengths), dtype, sum(options.get("key_lengths", lengths)) - sum(lengths))
    exact = [t.double() for t in tensors]
    truth = outcome(packed_attention.equals["cuda"], exact, dout.double(), lengths, scale, **options)
    plain = outcome(against, tensors, dout, lengths, scale, **options)
    found = []
    for library, operations in libraries.items():
        ours = outcome(attention, tensors, dout, lengths, scale, library=operations, **options)
        for name in truth:
            error, allowed = ((x[name].double() - truth[name]).norm().item() for x in (ours, plain))
            step = torch.finfo(dtype).eps / 2 * truth[name].norm().item()
            zero = 4 * torch.finfo(torch.float32).eps * truth[name].numel() ** 0.5
            assert ours[name].dtype == dtype and truth[name].isfinite().all()
            if not error <= 2 * allowed + step + zero:
                found.append(f"{library} {name}: {error:.3g}, allowed {allowed:.3g}, step {step:.3g}")
    return found
