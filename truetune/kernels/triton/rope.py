"""Rotary positions of queries and keys in one launch; the backward is the same kernel with the angle's sign turned.

A program turns some tokens of one head, a query's or a key's. Any strides are read, since models hand over transposed
views; what is written is laid out as [T, H, d], which attention's callers transpose back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.triton.launch import launch


@triton.jit
def _turn(
    x, y, x_head, x_token, y_head, y_token, head, token, tokens, cos_a, sin_a, cos_b, sin_b, pairs, size,
    SIGN: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, PAIRS)
    inside = (token < tokens)[:, None] & (pair < pairs)[None, :]
    first = (2 * pair if INTERLEAVED else pair)[None, :]
    apart = 1 if INTERLEAVED else pairs
    source = x + head.to(tl.int64) * x_head + token.to(tl.int64)[:, None] * x_token
    target = y + head.to(tl.int64) * y_head + token.to(tl.int64)[:, None] * y_token
    a = tl.load(source + first, inside, 0.0).to(tl.float32)
    b = tl.load(source + first + apart, inside, 0.0).to(tl.float32)
    tl.store(target + first, a * cos_a - b * sin_a * SIGN, inside)
    tl.store(target + first + apart, b * cos_b + a * sin_b * SIGN, inside)
    if REST > 0:
        element = 2 * pairs + tl.arange(0, REST)
        beyond = (token < tokens)[:, None] & (element < size)[None, :]
        tl.store(target + element[None, :], tl.load(source + element[None, :], beyond), beyond)


@triton.jit
def rotate(
    q, k, new_q, new_k, cos_table, sin_table, positions, tokens, heads, pairs, size,
    q_head, q_token, k_head, k_token, new_q_head, new_q_token, new_k_head, new_k_token,
    SIGN: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, PAIRS)
    row = token.to(tl.int64)
    if positions is not None:
        row = tl.load(positions + token, token < tokens, 0).to(tl.int64)
    inside = (token < tokens)[:, None] & (pair < pairs)[None, :]
    place = row[:, None] * 2 * pairs + pair[None, :]
    cos_a = tl.load(cos_table + place, inside, 0.0).to(tl.float32)
    cos_b = tl.load(cos_table + place + pairs, inside, 0.0).to(tl.float32)
    # The transpose of the turn, which the backward is, has each sine in the other's place.
    sin_a = tl.load(sin_table + place + (0 if SIGN > 0 else pairs), inside, 0.0).to(tl.float32)
    sin_b = tl.load(sin_table + place + (pairs if SIGN > 0 else 0), inside, 0.0).to(tl.float32)
    if head < heads:
        _turn(
            q, new_q, q_head, q_token, new_q_head, new_q_token, head, token, tokens,
            cos_a, sin_a, cos_b, sin_b, pairs, size, SIGN, INTERLEAVED, PAIRS, REST,
        )  # fmt: skip
    else:
        _turn(
            k, new_k, k_head, k_token, new_k_head, new_k_token, head - heads, token, tokens,
            cos_a, sin_a, cos_b, sin_b, pairs, size, SIGN, INTERLEAVED, PAIRS, REST,
        )  # fmt: skip


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_HTd: Tensor,
        k_KTd: Tensor,
        cos_PW: Tensor,
        sin_PW: Tensor,
        positions_T: Tensor | None,
        interleaved: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_PW, sin_PW, positions_T)
        ctx.interleaved = interleaved
        return _rotate(q_HTd, k_KTd, cos_PW, sin_PW, positions_T, interleaved, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_HTd: Tensor, dk_KTd: Tensor) -> tuple[Tensor | None, ...]:
        cos_PW, sin_PW, positions_T = ctx.saved_tensors
        dq_HTd, dk_KTd = _rotate(dq_HTd, dk_KTd, cos_PW, sin_PW, positions_T, ctx.interleaved, -1)
        return dq_HTd, dk_KTd, None, None, None, None


def _rotate(
    q_HTd: Tensor,
    k_KTd: Tensor,
    cos_PW: Tensor,
    sin_PW: Tensor,
    positions_T: Tensor | None,
    interleaved: bool,
    sign: int,
) -> tuple[Tensor, Tensor]:
    q_HTd, k_KTd = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_HTd, k_KTd))
    (heads, tokens, size), pairs = q_HTd.shape, cos_PW.shape[1] // 2
    new_q, new_k = (x.new_empty(tokens, len(x), size).transpose(0, 1) for x in (q_HTd, k_KTd))
    strides = [stride for x in (q_HTd, k_KTd, new_q, new_k) for stride in x.stride()[:2]]
    rest = size - 2 * pairs
    launch(
        rotate,
        lambda tiles: (triton.cdiv(tokens, tiles["TOKENS"]), heads + len(k_KTd)),
        *(q_HTd, k_KTd, new_q, new_k, cos_PW, sin_PW, positions_T, tokens, heads, pairs, size, *strides),
        dtype=q_HTd.dtype,
        size=size,
        SIGN=sign,
        INTERLEAVED=interleaved,
        PAIRS=triton.next_power_of_2(pairs),
        REST=triton.next_power_of_2(rest) if rest else 0,
    )
    return new_q, new_k


def rope(
    q_HTd: Tensor,
    k_KTd: Tensor,
    cos_PW: Tensor,
    sin_PW: Tensor,
    positions_T: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    positions_T = None if positions_T is None else positions_T.contiguous()
    turned: tuple[Tensor, Tensor] = _Rope.apply(
        q_HTd, k_KTd, cos_PW.contiguous(), sin_PW.contiguous(), positions_T, interleaved
    )
    return turned
