"""Rotary positions of a model turned by our kernel.

transformers' attention layers turn queries and keys by a function of one name in the file of their model. Where that
function is the usual one, x cos + rotated(x) sin, the layer gets its own code with ours in the function's place.
What differs (interleaved pairs, other arguments) keeps the author's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from truetune.kernels.native import pointwise

NAME = "apply_rotary_pos_emb"
Turn = Callable[..., tuple[Tensor, Tensor]]
TOKENS, SIZE = 3, 8
"""Of what the function is tried on."""


@functools.cache
def forward_with_rotary(plain: type[nn.Module]) -> Callable[..., Any] | None:
    """The ``forward`` of ``plain`` with our kernel; None if it turns nothing, or in another way."""
    forward = plain.forward
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    ours = _equal(forward.__globals__.get(NAME))
    if ours is None:
        return None
    scope = {**forward.__globals__, NAME: ours}
    made = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@functools.cache
def _equal(theirs: Turn | None) -> Turn | None:
    """What turns as ``theirs`` does, by our kernel where that can; None if they are not the same function."""
    if theirs is None or not all(_is_usual(theirs, width) for width in (SIZE, SIZE // 2)):
        return None

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs or not _fits(q, k, cos, sin):
            return theirs(q, k, cos, sin, *args, **kwargs)
        tables = cos[0].detach(), sin[0].detach()
        return tuple(pointwise.Rope.apply(x.squeeze(0), *tables)[None] for x in (q, k))

    return turn


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not (q.ndim == k.ndim == 4 and len(q) == len(k) == 1):
        return False
    width = min(cos.shape[-1], q.shape[3])
    tables = cos.shape == sin.shape == (1, q.shape[2], width) and not (cos.requires_grad or sin.requires_grad)
    return tables and pointwise.computes(q, k)


def _is_usual(theirs: Turn, width: int) -> bool:
    """Whether tables of this width turn q and k as the formula does. A function may refuse narrow ones."""
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, TOKENS, SIZE, generator=made, dtype=torch.float64) for heads in (2, 1))
    cos, sin = (torch.randn(1, TOKENS, width, generator=made, dtype=torch.float64) for _ in range(2))
    try:
        found = theirs(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return width < SIZE
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    expected = [_turned(x, cos[:, None], sin[:, None]) for x in (q, k)]
    return all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.tensor_split([cos.shape[-1]], -1)
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)
