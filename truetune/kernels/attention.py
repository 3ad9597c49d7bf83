"""Attention over documents that stand end to end: causal inside each, nothing between them.

Packed without padding and without a [T, T] mask: each document is attended on its own, so isolation is
structural, not numerical. On a CPU a kernel of our own (``native/``) does what it can, on a GPU one launch of torch's
or of flash-attn's for all documents (``varlen``). Else the plain case runs torch's fused attention (flash on CPU and
GPU, grouped-query without repeated keys). A sliding window goes over blocks of queries, each with only the keys it can
see; soft cap (Gemma 2) and sinks (GPT-OSS) run as explicit fp32 softmax.

Left out: bidirectional and chunked attention, keys from a cache.
Shape suffixes: H query heads, K key heads (K divides H), T tokens of the pack, B of one block of queries, S keys that
a block can see, d size of a query head, e of a value head. Where documents have more keys than queries, T of keys and
values is their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.kernels import varlen
from truetune.kernels.native.attention import attends, attention
from truetune.kernels.op import Op, compute_dtype, no_autocast, statistics_dtype

SHORT = 256
"""Queries below which a CPU attends in fp32: torch's bf16 kernel took 1.2 to 2.3 times as long on 32 to 300 tokens
(forward and backward, three head layouts, 2 cores of an AMD Zen 4), and less from about 600 on."""
SMALLEST_BLOCK = 128
"""Queries per block under a sliding window, at least."""


@Op
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
    """softmax(scale q k^T) v within each of the documents of ``lengths`` -> out_HTe.

    window: query i sees keys i - window + 1 to i (transformers' ``sliding_window``).
    softcap: scores become softcap * tanh(score / softcap).
    sinks_H: one more logit per head in the softmax's denominator, which carries no value.
    dropout: probability with which an attention weight is zeroed (the rest is scaled up).
    key_lengths: keys of each document, where it has more of them than queries, which then are of its last tokens.
    Raises ValueError if lengths do not add up to T, a document has more queries than keys, or K does not divide H.
    """
    check(q_HTd, k_KTd, lengths, key_lengths)
    key_lengths = key_lengths or lengths
    ends = torch.tensor(key_lengths).cumsum(0)
    first_T = torch.repeat_interleave(ends - torch.tensor(key_lengths), torch.tensor(lengths))  # key that a query sees
    last_T = torch.cat([torch.arange(end - n, end) for end, n in zip(ends.tolist(), lengths, strict=True)])
    if window is not None:
        first_T = torch.maximum(first_T, last_T - window + 1)
    key_T = torch.arange(sum(key_lengths))
    seen_TT = (first_T[:, None] <= key_T) & (key_T <= last_T[:, None])
    return _explicit(q_HTd, k_KTd, v_KTe, seen_TT.to(q_HTd.device), scale, softcap, sinks_H, dropout)


@packed_attention.on("cpu")
def _native(
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
    if sinks_H is not None or dropout or not attends(dtype, q_HTd.shape[-1], v_KTe.shape[-1]):
        return by_document(q_HTd, k_KTd, v_KTe, lengths, scale, window, softcap, sinks_H, dropout, key_lengths)
    check(q_HTd, k_KTd, lengths, key_lengths)
    return attention(q_HTd.to(dtype), k_KTd.to(dtype), v_KTe.to(dtype), lengths, scale, window, softcap, key_lengths)


@packed_attention.on("cuda")
def at_once(
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
    """All documents in one launch, where there is one that holds here."""
    dtype = compute_dtype(q_HTd, k_KTd)
    kind = varlen.Kind(dtype, q_HTd.shape[-1], v_KTe.shape[-1], window is not None, softcap is not None)
    attend = None if sinks_H is not None or dropout else varlen.way(by_document, q_HTd.device, kind)
    if attend is None:
        return by_document(q_HTd, k_KTd, v_KTe, lengths, scale, window, softcap, sinks_H, dropout, key_lengths)
    check(q_HTd, k_KTd, lengths, key_lengths)
    q_HTd, k_KTd, v_KTe = (x.to(dtype) for x in (q_HTd, k_KTd, v_KTe))
    with no_autocast(q_HTd):
        return attend(q_HTd, k_KTd, v_KTe, lengths, scale, window, softcap, key_lengths=key_lengths or lengths)


def by_document(
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
    """The same by torch's own, one document after another."""
    check(q_HTd, k_KTd, lengths, key_lengths)
    key_lengths = key_lengths or lengths
    if sinks_H is not None:  # so that the parts of its gradient, one per block, add up in fp32
        sinks_H = sinks_H.to(statistics_dtype(sinks_H.dtype))

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        if softcap is None and sinks_H is None:
            return _fused(q, k, v, window, scale, dropout)
        seen_BS = _seen(q.shape[1], k.shape[1], window, q.device)
        return _explicit(q, k, v, seen_BS, scale, softcap, sinks_H, dropout)

    outputs = []
    # split, not slices: its backward joins the gradients once instead of padding each to the whole pack.
    parts = zip((q_HTd, k_KTd, v_KTe), (lengths, key_lengths, key_lengths), strict=True)
    for q, k, v in zip(*(x.split(n, dim=1) for x, n in parts), strict=True):
        length = k.shape[1]
        before = length - q.shape[1]
        if window is None or window >= length:
            outputs.append(attend(q, k, v))
            continue
        block = max(window, SMALLEST_BLOCK)
        for start in range(before, length, block):
            first, end = max(0, start - window + 1), min(start + block, length)
            outputs.append(attend(q[:, start - before : end - before], k[:, first:end], v[:, first:end], window))
    return torch.cat(outputs, dim=1)


def check(q_HTd: Tensor, k_KTd: Tensor, lengths: tuple[int, ...], key_lengths: tuple[int, ...] | None = None) -> None:
    """Raises ValueError for shapes that do not fit."""
    heads = len(q_HTd)
    key_lengths = key_lengths or lengths
    for tokens, found in ((q_HTd.shape[1], lengths), (k_KTd.shape[1], key_lengths)):
        if sum(found) != tokens:
            raise ValueError(f"lengths add up to {sum(found)}, but there are {tokens} tokens; pass both in full")
    if len(lengths) != len(key_lengths) or any(n > s for n, s in zip(lengths, key_lengths, strict=True)):
        raise ValueError("a document has more queries than keys; its queries are those of its last keys")
    if heads % k_KTd.shape[0]:
        raise ValueError(f"{k_KTd.shape[0]} key heads do not divide {heads} query heads; check the shapes")


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last queries of a document of that many keys see: bool [B, S]."""
    key_S = torch.arange(keys, device=device)
    behind_BS = key_S[keys - queries :, None] - key_S
    return behind_BS >= 0 if window is None else (behind_BS >= 0) & (behind_BS < window)


def _fused(q_HBd: Tensor, k_KSd: Tensor, v_KSe: Tensor, window: int | None, scale: float, dropout: float) -> Tensor:
    """Torch's fused attention, which wants one head size: zeros change neither scores nor kept values."""
    values = v_KSe.shape[-1]
    missing = q_HBd.shape[-1] - values
    if missing > 0:
        v_KSe = F.pad(v_KSe, (0, missing))
    elif missing < 0:
        q_HBd, k_KSd = F.pad(q_HBd, (0, -missing)), F.pad(k_KSd, (0, -missing))
    queries, keys = q_HBd.shape[1], k_KSd.shape[1]
    # Without a mask torch lets the first query see the first key alone.
    mask = None if window is None and queries == keys else _seen(queries, keys, window, q_HBd.device)
    dtype = compute_dtype(q_HBd, k_KSd)
    short = dtype == torch.bfloat16 and q_HBd.device.type == "cpu" and q_HBd.shape[1] < SHORT
    q_HBd, k_KSd, v_KSe = (x.to(torch.float32 if short else dtype) for x in (q_HBd, k_KSd, v_KSe))
    with no_autocast(q_HBd):
        out = F.scaled_dot_product_attention(
            q_HBd[None], k_KSd[None], v_KSe[None], mask, dropout, mask is None, scale=scale, enable_gqa=True
        )
    return out[0, ..., :values].to(dtype)


def _explicit(
    q_HBd: Tensor,
    k_KSd: Tensor,
    v_KSe: Tensor,
    seen_BS: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    dropout: float,
) -> Tensor:
    """The same from its equations, in at least fp32."""
    heads, queries, _ = q_HBd.shape
    dtype = compute_dtype(q_HBd, k_KSd, v_KSe)
    work = statistics_dtype(dtype)
    with no_autocast(q_HBd):
        # Heads of one key head as one longer sequence of queries: keys and values need no copy.
        q_KGd = q_HBd.to(work).reshape(len(k_KSd), -1, q_HBd.shape[-1])
        scores_HBS = (q_KGd @ k_KSd.to(work).mT).view(heads, queries, -1) * scale
        if softcap is not None:
            scores_HBS = softcap * torch.tanh(scores_HBS / softcap)
        scores_HBS = scores_HBS.masked_fill(~seen_BS, -torch.inf)
        if sinks_H is None:
            weights_HBS = scores_HBS.softmax(-1)
        else:
            sinks_HB1 = sinks_H.to(work)[:, None, None].expand(heads, queries, 1)
            weights_HBS = torch.cat([scores_HBS, sinks_HB1], -1).softmax(-1)[..., :-1]
        if dropout:
            weights_HBS = F.dropout(weights_HBS, dropout)
        weights_KGS = weights_HBS.reshape(len(v_KSe), -1, weights_HBS.shape[-1])
        return (weights_KGS @ v_KSe.to(work)).view(heads, queries, -1).to(dtype)
