"""Attention over packed documents on a GPU: all of them in one launch of torch's own (``torch.nn.attention.varlen``).

No CPU has it, so its first call on a device, for heads of a size, comes after a trial: a few documents, whose outputs
and gradients may err at most twice as much as those of documents one by one. Where they err more, or it does not
run, documents go one by one, and a line on stderr says so. Left to that way from the start: other dtypes than bf16 and
fp16, soft cap, sinks, dropout, values of another size than keys, head sizes that are no multiple of 8 or above 256.
Shape suffixes as in ``attention``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from truetune.devices import to_device
from truetune.kernels.op import no_autocast
from truetune.kernels.proof import no_worse, outcome

DTYPES = torch.bfloat16, torch.float16
LARGEST = 256
"""Size of a head, at most."""
QUERIES, KEYS, WINDOW = (40, 1, 23), (40, 6, 50), 9
"""Of the documents of the trial: some have more keys than queries; the window is shorter than they are."""


def attends(
    against: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, size: int, values: int, windowed: bool
) -> bool:
    """Whether heads of these sizes can be attended in this dtype on ``device``: as well as by ``against``, where they
    can at all, which is tried once."""
    fits = dtype in DTYPES and size == values and size <= LARGEST and size % 8 == 0
    return fits and _holds(against, device, dtype, size, windowed)


def attention(
    q_HTd: Tensor,
    k_KTd: Tensor,
    v_KTd: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """As ``kernels.attention.packed_attention``, for tensors of one dtype."""
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import

    key_lengths = key_lengths or lengths
    q_THd, k_TKd, v_TKd = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(0, 1) for x in (q_HTd, k_KTd, v_KTd))
    with no_autocast(q_HTd):
        out_THd = varlen_attn(
            *(q_THd, k_TKd, v_TKd),
            *(_bounds(lengths, q_HTd.device), _bounds(key_lengths, q_HTd.device)),
            *(max(lengths), max(key_lengths)),
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # keys that a query sees before and after its own
            enable_gqa=len(q_HTd) != len(k_KTd),
        )
    return cast(Tensor, out_THd).transpose(0, 1)


@lru_cache(maxsize=8)  # the layers of one forward have one kind
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents begin, and the last ends: int32, one more than documents."""
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


@cache
def _holds(against: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, size: int, windowed: bool) -> bool:
    with ThreadPoolExecutor(1) as other:  # a thread, which knows nothing of the caller's autocast, gradients and hooks
        fault = other.submit(_fault, against, device, dtype, size, WINDOW if windowed else None).result()
    if fault:
        print(f"note: documents are attended one by one: torch.nn.attention.varlen {fault}", file=sys.stderr)
    return not fault


def _fault(
    against: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, size: int, window: int | None
) -> str | None:
    made = torch.Generator().manual_seed(0)
    shapes = (4, sum(QUERIES), size), (2, sum(KEYS), size), (2, sum(KEYS), size)
    tensors = [torch.randn(shape, generator=made).to(device, dtype) for shape in shapes]
    asked = {"lengths": QUERIES, "scale": size**-0.5, "window": window, "key_lengths": KEYS}
    try:
        ours = outcome(partial(attention, **asked), tensors)
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        return f"does not run ({type(error).__name__} {str(error).partition(chr(10))[0][:200]})"
    truth = outcome(partial(against, **asked), [x.double() for x in tensors])
    return (
        None if no_worse(ours, outcome(partial(against, **asked), tensors), truth) else "errs more than twice as much"
    )
