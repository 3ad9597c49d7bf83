"""Attention over packed documents by torch's flex_attention, which torch.compile makes a kernel of: soft caps too.

Blocks that no query sees are left out. Sinks are: taken from the output afterwards, by the logarithm of the softmax's
denominator, their gradient erred more than twice as much as that of documents one by one.
Shape suffixes as in ``attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from truetune.devices import to_device


def attention(
    q_HTd: Tensor,
    k_KTd: Tensor,
    v_KTe: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    key_lengths: tuple[int, ...],
) -> Tensor:
    """As ``kernels.attention.packed_attention``, for tensors of one dtype, without sinks and dropout."""
    out: Tensor = compiled()(
        *(x[None] for x in (q_HTd, k_KTd, v_KTe)),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=_seen(lengths, key_lengths, window, q_HTd.device),
        scale=scale,
        enable_gqa=len(q_HTd) != len(k_KTd),
    )
    return out[0]


@cache
def compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # takes seconds to import

    return torch.compile(flex_attention, dynamic=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score(s: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(s / softcap)

    return score


@lru_cache(maxsize=4)  # the layers of one forward have few kinds
def _seen(lengths: tuple[int, ...], key_lengths: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    counts, ends = torch.tensor(lengths), torch.tensor(key_lengths).cumsum(0)
    first_T = (ends - torch.tensor(key_lengths)).repeat_interleave(counts)
    last_T = torch.cat([torch.arange(end - n, end) for end, n in zip(ends.tolist(), lengths, strict=True)])
    if window is not None:
        first_T = torch.maximum(first_T, last_T - window + 1)
    first, last = (to_device(x, device) for x in (first_T, last_T))

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[query] <= key) & (key <= last[query])

    return create_block_mask(sees, None, None, sum(lengths), sum(key_lengths), device=str(device))
