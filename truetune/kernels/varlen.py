"""Attention over packed documents on a GPU: all of them in one launch, of a library's or of torch's own (``WAYS``).

``flash_attn`` where it is installed, then ``torch.nn.attention.varlen``, which has no soft cap; for soft caps
flex_attention is left (``flex``). No CPU has one of them, so the first call on a device, for heads of a size, comes
after a trial: a few documents, whose outputs and gradients may err at most twice as much as those of documents one by
one. A way that errs more, or does not run, is passed over, and a line on stderr says so. Where none is left documents
go one by one, as they do from the start in other dtypes than bf16 and fp16, with sinks, with dropout, and without a
soft cap with values of another size than keys and head sizes that are no multiple of 8 or above 256.
Shape suffixes as in ``attention``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truetune.devices import to_device
from truetune.kernels import flex
from truetune.kernels.proof import no_worse, outcome

DTYPES = torch.bfloat16, torch.float16
LARGEST = 256
"""Size of a head, at most."""
QUERIES, KEYS, WINDOW, SOFTCAP = (40, 1, 23), (40, 6, 50), 9, 2.0
"""Of the trial, whose documents have in part more keys than queries; the window is shorter than they are."""


class Kind(NamedTuple):
    """What decides whether a way can do it: sizes of a query's and of a value's head, and what is asked."""

    dtype: torch.dtype
    size: int
    values: int
    windowed: bool
    capped: bool


class Way(NamedTuple):
    """call: as ``kernels.attention.packed_attention``, for tensors of one dtype, without sinks and dropout."""

    name: str
    takes: Callable[[Kind], bool]
    call: Callable[..., Tensor]


def _flash_attn(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, lengths: tuple[int, ...], scale: float, window: int | None = None,
    softcap: float | None = None, *, key_lengths: tuple[int, ...],
) -> Tensor:  # fmt: skip
    from flash_attn import flash_attn_varlen_func

    capped = {} if softcap is None else {"softcap": softcap}  # which versions before 2.6 don't know
    out_THd: Tensor = flash_attn_varlen_func(
        *_rows(q_HTd, k_KTd, v_KTd),
        *_bounds(lengths, key_lengths, q_HTd.device),
        softmax_scale=scale,
        causal=True,
        window_size=_before(window),
        **capped,
    )
    return out_THd.transpose(0, 1)


def _torch_s(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, lengths: tuple[int, ...], scale: float, window: int | None = None,
    softcap: None = None, *, key_lengths: tuple[int, ...],
) -> Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import

    tensors: tuple[Any, ...] = (*_rows(q_HTd, k_KTd, v_KTd), *_bounds(lengths, key_lengths, q_HTd.device))
    out_THd = varlen_attn(
        *tensors,
        scale=scale,
        window_size=_before(window),
        enable_gqa=len(q_HTd) != len(k_KTd),
    )
    assert isinstance(out_THd, Tensor)
    return out_THd.transpose(0, 1)


def _is_plain(kind: Kind) -> bool:
    fits = kind.size == kind.values and kind.size <= LARGEST and kind.size % 8 == 0
    return fits and not kind.capped


WAYS = (
    Way("flash_attn", lambda kind: _is_plain(kind._replace(capped=False)), _flash_attn),
    Way("torch.nn.attention.varlen", _is_plain, _torch_s),
    Way("torch.nn.attention.flex_attention", lambda kind: kind.capped, flex.attention),
)
"""In the order in which they are tried."""


def way(against: Callable[..., Tensor], device: torch.device, kind: Kind) -> Callable[..., Tensor] | None:
    """How to attend that on ``device``, as well as ``against`` does; each way is tried once. None where none can."""
    if kind.dtype not in DTYPES:
        return None
    return next((by.call for by in WAYS if by.takes(kind) and _holds(by, against, device, kind)), None)


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(0, 1) for x in tensors]


def _before(window: int | None) -> tuple[int, int]:
    """Keys that a query sees before and after its own, -1 for all."""
    return -1 if window is None else window - 1, 0


def _bounds(
    lengths: tuple[int, ...], key_lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    """Where documents begin, and the last ends, in queries and in keys: int32; and the longest of both."""
    return _ends(lengths, device), _ends(key_lengths, device), max(lengths), max(key_lengths)


@lru_cache(maxsize=8)  # the layers of one forward have one kind
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


@cache
def _holds(by: Way, against: Callable[..., Tensor], device: torch.device, kind: Kind) -> bool:
    if not find_spec(by.name.partition(".")[0]):
        return False
    with ThreadPoolExecutor(1) as other:  # a thread, which knows nothing of the caller's autocast, gradients and hooks
        fault = other.submit(_fault, by, against, device, kind).result()
    if fault:
        print(f"note: attention goes without {by.name}, which {fault}", file=sys.stderr)
    return not fault


def _fault(by: Way, against: Callable[..., Tensor], device: torch.device, kind: Kind) -> str | None:
    made = torch.Generator().manual_seed(0)
    shapes = [(4, sum(QUERIES), kind.size), (2, sum(KEYS), kind.size), (2, sum(KEYS), kind.values)]
    tensors = [torch.randn(shape, generator=made).to(device, kind.dtype) for shape in shapes]
    asked: dict[str, Any] = {"window": WINDOW if kind.windowed else None, "softcap": SOFTCAP if kind.capped else None}

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return partial(function, lengths=QUERIES, scale=kind.size**-0.5, key_lengths=KEYS, **asked)

    try:
        ours = outcome(of(by.call), tensors)
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        return f"does not run ({type(error).__name__} {str(error).partition(chr(10))[0][:200]})"
    truth, theirs = (outcome(of(against), each) for each in ([x.double() for x in tensors], tensors))
    return None if no_worse(ours, theirs, truth) else "errs more than twice as much as documents one by one"
