"""Flash attention over documents that stand end to end (Dao 2023, arXiv 2307.08691), with windows and soft caps.

Documents, causality and window are one number per query, its first visible key (the last one is itself); so a block of
queries needs no table of documents, goes over no tile that none of its queries sees, and may cross a border. For the
backward the same from the key's side: the last query that sees it. Both are made on the host, once for a pack.

Saved: the output and one fp32 log-sum-exp per query and head. With P the weights and g the slope of the soft cap:

    dv = P^T dout        ds = P (dout v^T - sum(dout out)) g        dq = scale ds k        dk = scale ds^T q

dk and dv of a key head are summed over its query heads within one program: no atomic additions, so the same result
every time. Left out, and run by torch: sinks, dropout, documents with more keys than queries, and what the table has no
row for (fp32 heads above 128 on NVIDIA, which would spill registers).
Shape suffixes: H query heads, K key heads, T tokens, d size of a query head, e of a value head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.devices import to_device
from truetune.kernels.attention import at_once, check
from truetune.kernels.op import compute_dtype
from truetune.kernels.triton.functions import tanh
from truetune.kernels.triton.launch import launch, runs


@triton.jit
def _tile(x, stride, start, tokens, size, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Rows from ``start`` on. Only their base is a wide number, which saves registers."""
    row, element = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (row < tokens - start) & (element < size)
    return tl.load(x + tl.cast(start, tl.int64) * stride + row * stride + element, inside, 0.0)


@triton.jit
def _put(x, stride, start, tokens, size, value, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row, element = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (row < tokens - start) & (element < size)
    tl.store(x + tl.cast(start, tl.int64) * stride + row * stride + element, value, inside)


@triton.jit
def _scores(q, k, query, key, seen, scale, softcap, PRECISION: tl.constexpr):
    """Scores of a tile, -inf where the query must not see the key, and their slope by scale q k^T."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    slope = tl.full(s.shape, 1.0, tl.float32)
    if softcap is not None:
        t = tanh(s / softcap)
        s = softcap * t
        slope = 1.0 - t * t
    visible = (key[None, :] <= query[:, None]) & (key[None, :] >= seen[:, None])
    return tl.where(visible, s, float("-inf")), slope


@triton.jit
def attention_forward(
    q, k, v, out, lse, first, tokens, group, d, e, scale, softcap,
    q_head, q_token, k_head, k_token, v_head, v_token, out_head, out_token,
    D: tl.constexpr, E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * QUERIES
    query = start + tl.arange(0, QUERIES)
    seen = tl.load(first + query, query < tokens, tokens)
    k += head // group * k_head
    v += head // group * v_head
    tile_q = _tile(q + head * q_head, q_token, start, tokens, d, QUERIES, D)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    weights = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, E], tl.float32)
    for begin in range(tl.min(seen, 0), tl.minimum(start + QUERIES, tokens), KEYS):
        key = begin + tl.arange(0, KEYS)
        s, _ = _scores(
            tile_q, _tile(k, k_token, begin, tokens, d, KEYS, D), query, key, seen, scale, softcap, PRECISION
        )
        above = tl.maximum(maximum, tl.max(s, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # a query that has seen no key yet
        p = tl.exp(s - shift[:, None])
        rescale = tl.exp(maximum - shift)
        tile_v = _tile(v, v_token, begin, tokens, e, KEYS, E)
        total = tl.dot(p.to(tile_v.dtype), tile_v, total * rescale[:, None], input_precision=PRECISION)
        weights = weights * rescale + tl.sum(p, 1)
        maximum = above
    weights = tl.where(weights == 0.0, 1.0, weights)  # beyond the pack
    _put(out + head * out_head, out_token, start, tokens, e, total / weights[:, None], QUERIES, E)
    tl.store(lse + head * tokens + query, maximum + tl.log(weights), query < tokens)


@triton.jit
def attention_queries(
    q, k, v, out, dout, lse, delta, dq, first, tokens, group, d, e, scale, softcap,
    q_head, q_token, k_head, k_token, v_head, v_token, out_head, out_token, dout_head, dout_token, dq_head, dq_token,
    D: tl.constexpr, E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum(dout out), which the keys' part reads."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * QUERIES
    query = start + tl.arange(0, QUERIES)
    inside = query < tokens
    seen = tl.load(first + query, inside, tokens)
    k += head // group * k_head
    v += head // group * v_head
    tile_q = _tile(q + head * q_head, q_token, start, tokens, d, QUERIES, D)
    tile_dout = _tile(dout + head * dout_head, dout_token, start, tokens, e, QUERIES, E)
    tile_out = _tile(out + head * out_head, out_token, start, tokens, e, QUERIES, E)
    sums = tl.sum(tile_dout.to(tl.float32) * tile_out.to(tl.float32), 1)
    tl.store(delta + head * tokens + query, sums, inside)
    logsumexp = tl.load(lse + head * tokens + query, inside, 0.0)
    total = tl.zeros([QUERIES, D], tl.float32)
    for begin in range(tl.min(seen, 0), tl.minimum(start + QUERIES, tokens), KEYS):
        key = begin + tl.arange(0, KEYS)
        tile_k = _tile(k, k_token, begin, tokens, d, KEYS, D)
        s, slope = _scores(tile_q, tile_k, query, key, seen, scale, softcap, PRECISION)
        dp = tl.dot(tile_dout, tl.trans(_tile(v, v_token, begin, tokens, e, KEYS, E)), input_precision=PRECISION)
        ds = tl.exp(s - logsumexp[:, None]) * (dp - sums[:, None]) * slope
        total = tl.dot(ds.to(tile_k.dtype), tile_k, total, input_precision=PRECISION)
    _put(dq + head * dq_head, dq_token, start, tokens, d, total * scale, QUERIES, D)


@triton.jit
def attention_keys(
    q, k, v, dout, lse, delta, dk, dv, first, last, tokens, group, d, e, scale, softcap,
    q_head, q_token, k_head, k_token, v_head, v_token, dout_head, dout_token, dk_head, dk_token, dv_head, dv_token,
    D: tl.constexpr, E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * KEYS
    key = start + tl.arange(0, KEYS)
    end = tl.max(tl.load(last + key, key < tokens, 0), 0) + 1
    tile_k = _tile(k + key_head * k_head, k_token, start, tokens, d, KEYS, D)
    tile_v = _tile(v + key_head * v_head, v_token, start, tokens, e, KEYS, E)
    total_k = tl.zeros([KEYS, D], tl.float32)
    total_v = tl.zeros([KEYS, E], tl.float32)
    for head in range(key_head * group, key_head * group + group):
        for begin in range(start, end, QUERIES):
            query = begin + tl.arange(0, QUERIES)
            inside = query < tokens
            seen = tl.load(first + query, inside, tokens)
            tile_q = _tile(q + head * q_head, q_token, begin, tokens, d, QUERIES, D)
            tile_dout = _tile(dout + head * dout_head, dout_token, begin, tokens, e, QUERIES, E)
            s, slope = _scores(tile_q, tile_k, query, key, seen, scale, softcap, PRECISION)
            p = tl.exp(s - tl.load(lse + head * tokens + query, inside, 0.0)[:, None])
            total_v = tl.dot(tl.trans(p.to(tile_dout.dtype)), tile_dout, total_v, input_precision=PRECISION)
            dp = tl.dot(tile_dout, tl.trans(tile_v), input_precision=PRECISION)
            ds = p * (dp - tl.load(delta + head * tokens + query, inside, 0.0)[:, None]) * slope
            total_k = tl.dot(tl.trans(ds.to(tile_q.dtype)), tile_q, total_k, input_precision=PRECISION)
    _put(dk + key_head * dk_head, dk_token, start, tokens, d, total_k * scale, KEYS, D)
    _put(dv + key_head * dv_head, dv_token, start, tokens, e, total_v, KEYS, E)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_HTd: Tensor,
        k_KTd: Tensor,
        v_KTe: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        q_HTd, k_KTd, v_KTe = (_dense(x) for x in (q_HTd, k_KTd, v_KTe))
        heads, tokens, _ = q_HTd.shape
        out_HTe = _like(q_HTd, v_KTe.shape[-1])
        lse_HT = q_HTd.new_empty(heads, tokens, dtype=torch.float32)
        bounds = _bounds(lengths, window, q_HTd.device)
        ctx.options = (float(scale), softcap)
        ctx.save_for_backward(q_HTd, k_KTd, v_KTe, out_HTe, lse_HT, *bounds)
        sizes = _sizes(q_HTd, k_KTd, v_KTe)
        launch(
            attention_forward,
            lambda tiles: (triton.cdiv(tokens, tiles["QUERIES"]), heads),
            *(q_HTd, k_KTd, v_KTe, out_HTe, lse_HT, bounds[0], *sizes, *ctx.options),
            *_strides(q_HTd, k_KTd, v_KTe, out_HTe),
            **_constants(q_HTd, v_KTe),
        )
        return out_HTe

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_HTe: Tensor) -> tuple[Tensor | None, ...]:
        q_HTd, k_KTd, v_KTe, out_HTe, lse_HT, first_T, last_T = ctx.saved_tensors
        dout_HTe = _dense(dout_HTe)
        heads, tokens, _ = q_HTd.shape
        delta_HT = torch.empty_like(lse_HT)
        dq_HTd, dk_KTd, dv_KTe = (_like(x, x.shape[-1]) for x in (q_HTd, k_KTd, v_KTe))
        inputs, sizes = (q_HTd, k_KTd, v_KTe), _sizes(q_HTd, k_KTd, v_KTe)
        launch(
            attention_queries,
            lambda tiles: (triton.cdiv(tokens, tiles["QUERIES"]), heads),
            *(*inputs, out_HTe, dout_HTe, lse_HT, delta_HT, dq_HTd, first_T, *sizes, *ctx.options),
            *_strides(*inputs, out_HTe, dout_HTe, dq_HTd),
            **_constants(q_HTd, v_KTe),
        )
        launch(
            attention_keys,
            lambda tiles: (triton.cdiv(tokens, tiles["KEYS"]), len(k_KTd)),
            *(*inputs, dout_HTe, lse_HT, delta_HT, dk_KTd, dv_KTe, first_T, last_T, *sizes, *ctx.options),
            *_strides(*inputs, dout_HTe, dk_KTd, dv_KTe),
            **_constants(q_HTd, v_KTe),
        )
        return dq_HTd, dk_KTd, dv_KTe, None, None, None, None


@lru_cache(maxsize=8)  # the layers of one forward have one or two kinds
def _bounds(lengths: tuple[int, ...], window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first key that each query sees, and the last query that sees each key."""
    length = torch.tensor(lengths, dtype=torch.int32)
    length_T, end_T = (torch.repeat_interleave(x, length) for x in (length, length.cumsum(0, dtype=torch.int32)))
    reach_T = length_T if window is None else length_T.clamp(max=window)
    token_T = torch.arange(len(length_T), dtype=torch.int32)
    first_T = torch.maximum(end_T - length_T, token_T - reach_T + 1)
    last_T = torch.minimum(end_T, token_T + reach_T) - 1
    return to_device(first_T, device), to_device(last_T, device)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor, size: int) -> Tensor:
    """An empty [heads, T, size], laid out as [T, heads, size], which is what models go on with."""
    heads, tokens, _ = x.shape
    return x.new_empty(tokens, heads, size).transpose(0, 1)


def _sizes(q_HTd: Tensor, k_KTd: Tensor, v_KTe: Tensor) -> tuple[int, ...]:
    heads, tokens, size = q_HTd.shape
    return tokens, heads // len(k_KTd), size, v_KTe.shape[-1]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(q_HTd: Tensor, v_KTe: Tensor) -> dict[str, Any]:
    d, e = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q_HTd, v_KTe))
    return {"dtype": q_HTd.dtype, "size": max(d, e), "D": d, "E": e}


def packed_attention(
    q_HTd: Tensor,
    k_KTd: Tensor,
    v_KTe: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    dropout: float = 0.0,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    dtype = compute_dtype(q_HTd, k_KTd)
    size = max(q_HTd.shape[-1], v_KTe.shape[-1])
    ours = key_lengths is None and sinks_H is None and not dropout and runs(attention_keys, q_HTd, dtype, size)
    if not ours:
        return at_once(q_HTd, k_KTd, v_KTe, lengths, scale, window, softcap, sinks_H, dropout, key_lengths)
    check(q_HTd, k_KTd, lengths)
    q_HTd, k_KTd, v_KTe = (x.to(dtype) for x in (q_HTd, k_KTd, v_KTe))
    out_HTe: Tensor = _Flash.apply(q_HTd, k_KTd, v_KTe, lengths, scale, window, softcap)
    return out_HTe
