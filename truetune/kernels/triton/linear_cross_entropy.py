"""Head and cross-entropy without a logits matrix in either pass: cut cross-entropy.

Forward: each program keeps a running maximum and sum of exponentials over its part of the vocabulary, tile by tile; the
parts are joined afterwards. Saved: the log-sum-exp of each row, and the inputs. Backward: each (rows x vocabulary) tile
of logits is computed again, and with S its softmax, y the label, a the smoothing and c the weight of the z-loss

    d = S (1 + 2 c lse) - (1 - a) onehot(y) - a / V        dz = d (weight of the row) (slope of scale and soft cap)

is multiplied into the gradients, which are summed in fp32 by atomic additions: their order, and so their last bits, may
change from run to run. Every product is on tensor cores in the inputs' dtype, sums are fp32.

Filtered, a tile in which every |d| is below ``filter_threshold`` is skipped, which changes no gradient by more than
that times the factors that d has. Entries in the order of their mean logit make skippable ones lie together.

Wijmans et al. 2024, arXiv 2411.09009. Left out: a head with an adapter, which torch's own does.
Shape suffixes: N target rows, D hidden size, V vocabulary, S parts of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.linear_cross_entropy import LossTerms, chunked, filter_threshold
from truetune.kernels.op import compute_dtype
from truetune.kernels.triton.functions import tanh
from truetune.kernels.triton.launch import launch

PROGRAMS = 256
"""Programs that the forward is split into at least, where there are enough tiles: rows alone may be too few."""


@triton.jit
def _logits(
    hidden, weight, bias, row, entry, rows, vocabulary, width, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of logits as the loss sees them, and their derivative by h W^T + b; -inf beyond the vocabulary."""
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row[:, None] * width + d[None, :], (row < rows)[:, None] & (d < width)[None, :], 0.0)
        w = tl.load(
            weight + entry[None, :] * width + d[:, None], (entry < vocabulary)[None, :] & (d < width)[:, None], 0.0
        )
        z = tl.dot(h, w, z, input_precision=PRECISION)
    if bias is not None:
        z += tl.load(bias + entry, entry < vocabulary, 0.0).to(tl.float32)[None, :]
    z *= scale
    slope = tl.zeros_like(z) + scale
    if softcap is not None:
        t = tanh(z / softcap)
        z = softcap * t
        slope *= 1.0 - t * t
    return tl.where((entry < vocabulary)[None, :], z, float("-inf")), slope


@triton.jit
def cross_entropy_forward(
    hidden, weight, bias, labels, lse, label_logit, rival, total, rows, vocabulary, width, part, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    label = tl.load(labels + row, inside, -1)
    maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    exponentials = tl.zeros([BLOCK_N], tl.float32)
    logits = tl.zeros([BLOCK_N], tl.float32)
    own = tl.zeros([BLOCK_N], tl.float32)
    first = tl.program_id(1).to(tl.int64) * part
    last = tl.minimum(first + part, vocabulary)
    for start in range(first, last, BLOCK_V):
        entry = start + tl.arange(0, BLOCK_V).to(tl.int64)
        z, _ = _logits(
            hidden, weight, bias, row, entry, rows, vocabulary, width, scale, softcap,
            BLOCK_N, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        above = tl.maximum(maximum, tl.max(z, 1))
        exponentials = exponentials * tl.exp(maximum - above) + tl.sum(tl.exp(z - above[:, None]), 1)
        maximum = above
        is_label = label[:, None] == entry[None, :]
        own += tl.sum(tl.where(is_label, z, 0.0), 1)
        highest = tl.maximum(highest, tl.max(tl.where(is_label, float("-inf"), z), 1))
        if total is not None:
            logits += tl.sum(tl.where((entry < vocabulary)[None, :], z, 0.0), 1)
    place = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(lse + place, maximum + tl.log(exponentials), inside)
    tl.store(rival + place, highest, inside)
    tl.store(label_logit + row, own, inside & (label >= first) & (label < last))
    if total is not None:
        tl.store(total + place, logits, inside)


@triton.jit
def cross_entropy_backward(
    hidden, weight, bias, labels, order, lse, weights, grad_total, dhidden, dweight, dbias, skipped,
    rows, vocabulary, width, scale, softcap, z_loss, smoothing, threshold,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    if order is not None:
        entry = tl.load(order + entry, entry < vocabulary, vocabulary)
    inside = (row < rows)[:, None] & (entry < vocabulary)[None, :]
    z, slope = _logits(
        hidden, weight, bias, row, entry, rows, vocabulary, width, scale, softcap,
        BLOCK_N, BLOCK_V, BLOCK_D, PRECISION,
    )  # fmt: skip
    logsumexp = tl.load(lse + row, row < rows, 0.0)[:, None]
    is_label = tl.load(labels + row, row < rows, -1)[:, None] == entry[None, :]
    d = tl.exp(z - logsumexp) * (1.0 + 2.0 * z_loss * logsumexp)
    d -= tl.where(is_label, 1.0 - smoothing, 0.0) + smoothing / vocabulary
    d = tl.where(inside, d, 0.0)
    if tl.max(tl.max(tl.abs(d), 1), 0) < threshold:
        tl.atomic_add(skipped, 1)
    else:
        upstream = tl.load(grad_total)
        if weights is not None:
            upstream *= tl.load(weights + row, row < rows, 0.0)[:, None]
        dz = d * slope * upstream
        if dbias is not None:
            tl.atomic_add(dbias + entry, tl.sum(dz, 0), entry < vocabulary)
        dz = dz.to(weight.dtype.element_ty)
        for start in range(0, width, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            by_row = row[:, None] * width + column[None, :]
            of_rows = (row < rows)[:, None] & (column < width)[None, :]
            by_entry = entry[:, None] * width + column[None, :]
            of_entries = (entry < vocabulary)[:, None] & (column < width)[None, :]
            if dhidden is not None:
                w = tl.load(weight + by_entry, of_entries, 0.0)
                tl.atomic_add(dhidden + by_row, tl.dot(dz, w, input_precision=PRECISION), of_rows)
            if dweight is not None:
                h = tl.load(hidden + by_row, of_rows, 0.0)
                tl.atomic_add(dweight + by_entry, tl.dot(tl.trans(dz), h, input_precision=PRECISION), of_entries)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor | None,
        options: tuple[float, float | None, float, float, float, bool, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, softcap, z_loss, smoothing, *_ = options
        dtype = compute_dtype(hidden_ND, weight_VD)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        hidden_ND, weight_VD = (x.to(dtype).contiguous() for x in (hidden_ND, weight_VD))
        (rows, width), vocabulary = hidden_ND.shape, len(weight_VD)
        part = _part(rows, vocabulary)
        parts = triton.cdiv(vocabulary, part)
        lse_SN, rival_SN, sum_SN = (hidden_ND.new_empty(parts, rows, dtype=torch.float32) for _ in range(3))
        # A label beyond the vocabulary is in nobody's part: its loss stays NaN.
        label_N = hidden_ND.new_full((rows,), torch.nan, dtype=torch.float32)
        launch(
            cross_entropy_forward,
            lambda tiles: (triton.cdiv(rows, tiles["BLOCK_N"]), parts),
            *(hidden_ND, weight_VD, bias_V, labels_N, lse_SN, label_N, rival_SN, sum_SN if smoothing else None),
            *(rows, vocabulary, width, part, float(scale), softcap),
            dtype=dtype,
        )
        lse_N = lse_SN.logsumexp(0)
        losses_N = lse_N - (1 - smoothing) * label_N + z_loss * lse_N.square()
        if smoothing:
            losses_N -= smoothing / vocabulary * sum_SN.sum(0)
        correct_N = label_N > rival_SN.amax(0)
        ctx.options = options
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, weights_N, lse_N)
        ctx.mark_non_differentiable(losses_N, correct_N)
        return (losses_N if weights_N is None else losses_N * weights_N).sum(), losses_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, labels_N, weights_N, lse_N = ctx.saved_tensors
        scale, softcap, z_loss, smoothing, threshold, ordered, skipped_1 = ctx.options
        (rows, width), vocabulary = hidden_ND.shape, len(weight_VD)
        wanted = zip(ctx.needs_input_grad, (hidden_ND, weight_VD, bias_V), strict=False)
        sums = [torch.zeros_like(x, dtype=torch.float32) if needed else None for needed, x in wanted]
        order_V = _by_mean_logit(hidden_ND, weight_VD, bias_V) if ordered else None
        skipped_1 = lse_N.new_zeros(1, dtype=torch.int32) if skipped_1 is None else skipped_1
        launch(
            cross_entropy_backward,
            lambda tiles: (triton.cdiv(rows, tiles["BLOCK_N"]), triton.cdiv(vocabulary, tiles["BLOCK_V"])),
            *(hidden_ND, weight_VD, bias_V, labels_N, order_V, lse_N, weights_N, grad_total, *sums, skipped_1),
            *(rows, vocabulary, width, float(scale), softcap, float(z_loss), float(smoothing), float(threshold)),
            dtype=hidden_ND.dtype,
        )
        dtypes = (*ctx.dtypes, None if bias_V is None else bias_V.dtype)
        gradients = (None if g is None else g.to(d) for g, d in zip(sums, dtypes, strict=True))
        return (*gradients, None, None, None)


def _part(rows: int, vocabulary: int) -> int:
    """Entries of the vocabulary that one program of the forward goes over: so many that about PROGRAMS take part."""
    parts = max(1, PROGRAMS * 64 // max(rows, 64))
    return max(128, 128 * triton.cdiv(triton.cdiv(vocabulary, parts), 128))


def _by_mean_logit(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Entries by falling mean logit over the rows; the mean of products is the product with the mean."""
    mean_V = weight_VD @ hidden_ND.mean(0, dtype=torch.float32).to(weight_VD.dtype)
    return (mean_V if bias_V is None else mean_V + bias_V).argsort(descending=True)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    weights_N: Tensor | None = None,
    low_NR: Tensor | None = None,
    up_VR: Tensor | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    filtered: bool = False,
    *,
    ordered: bool = True,
    skipped_1: Tensor | None = None,
) -> LossTerms:
    """The operation, and two options of its filter.

    ordered: tiles are of entries in the order of their mean logit. skipped_1: int32, to which the number of skipped
    tiles is added.
    """
    if low_NR is not None or up_VR is not None:
        tensors, factors = (hidden_ND, weight_VD, labels_N, bias_V), (scale, softcap)
        return chunked(*tensors, *factors, weights_N, low_NR, up_VR, z_loss, smoothing, filtered)
    threshold = filter_threshold(compute_dtype(hidden_ND, weight_VD)) if filtered else 0.0
    options = (scale, softcap, z_loss, smoothing, threshold, filtered and ordered, skipped_1)
    bias_V, weights_N = (x if x is None else x.contiguous() for x in (bias_V, weights_N))
    return LossTerms(*_Cut.apply(hidden_ND, weight_VD, bias_V, labels_N.contiguous(), weights_N, options))
