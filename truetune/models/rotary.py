"""Rotary positions of a model turned by our kernel.

transformers' attention layers turn queries and keys by a function of one name in the file of their model. Where that
function is the usual one, x cos + rotated(x) sin, the layer gets its own code with ours in the function's place.
What differs (interleaved pairs, other arguments) keeps the author's. Ours is tried on the device where it will run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from truetune.kernels.proof import no_worse, outcome
from truetune.kernels.rope import rope

NAME = "apply_rotary_pos_emb"
Turn = Callable[..., tuple[Tensor, Tensor]]
TOKENS, SIZE = 3, 8
"""Of what the function is tried on."""
DTYPES = torch.float32, torch.bfloat16


def forward_with_rotary(plain: type[nn.Module], device: torch.device) -> Callable[..., Any] | None:
    """The ``forward`` of ``plain`` with our kernel; None if it turns nothing, or in another way, or ours is not right
    on ``device``, or not there."""
    forward = plain.forward
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names or not rope.has_equal(device):
        return None
    theirs = forward.__globals__.get(NAME)
    ours = _equal(theirs)
    if theirs is None or ours is None or not all(_holds(ours, theirs, dtype, device) for dtype in DTYPES):
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
        q, k = rope(q.squeeze(0), k.squeeze(0), cos[0], sin[0])
        return q[None], k[None]

    return turn


def _holds(ours: Turn, theirs: Turn, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ours errs at most twice as much as theirs there, in outputs and gradients."""
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, TOKENS, SIZE, generator=made).to(device, dtype) for heads in (2, 1))
    tables = [torch.randn(1, TOKENS, SIZE, generator=made).to(device) for _ in range(2)]

    def tried(turn: Turn, tensors: list[Tensor], tables: list[Tensor]) -> list[Tensor]:
        return outcome(lambda q, k: torch.cat(turn(q, k, *tables), 1).to(q.dtype), tensors)

    truth = tried(theirs, [q.double(), k.double()], [table.double() for table in tables])
    return no_worse(tried(ours, [q, k], tables), tried(theirs, [q, k], tables), truth)


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not (q.ndim == k.ndim == 4 and len(q) == len(k) == 1):
        return False
    width = min(cos.shape[-1], q.shape[3])
    tables = cos.shape == sin.shape == (1, q.shape[2], width) and not (cos.requires_grad or sin.requires_grad)
    return tables and q.dtype == k.dtype and q.dtype in DTYPES


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
