"""Head and cross-entropy in one: the loss of hidden states against a classifier, without a logits matrix.

    logits = softcap * tanh(scale * (h W^T + l U^T + b) / softcap)        loss = logsumexp(logits) - logits[label]
    total = sum over rows of (weight of the row) * loss

With label smoothing a the label's logit counts 1 - a and the mean of all logits a; a z-loss c adds c logsumexp^2
(PaLM: Chowdhery et al. 2022, arXiv 2204.02311).
The second product is that of an adapter of the head (LoRA: l = h A^T, U = s B), and may be absent.

The equal goes over the rows in chunks of a fixed number of bytes and computes loss and gradients in the same
pass: the gradient of the sum is known up to one factor, grad_output, which the backward multiplies in. So
memory grows neither with the rows nor with the vocabulary. Statistics are fp32, and so are the sums of gradients over
chunks. The usual loss is one compiled pass over a chunk of logits, which become their gradient (``native/``).

Filtered, the products of the backward are made of the entries of the vocabulary that any row of a chunk has as its
label or gives a probability that would not round away; columns of the slopes and rows of the weight are gathered.
Cut cross-entropy leaves the rest out. That is small, but of one sign, so that in sums over rows it adds up where all
else cancels. Here it is merged into one more entry: D ~ r c^T / sum(r), with r and c its sums by row and by entry, both
of which stay as they are. On a GPU the host waits once a chunk for how many entries count.

Idea: chunks and gradient-in-forward as in Liger (Hsu et al. 2024, arXiv 2410.10989); cut cross-entropy
(Wijmans et al. 2024, arXiv 2411.09009), whose threshold it is, instead chunks the vocabulary. Left out:
ignored labels (the caller selects the target rows), second derivatives; the filter under z-loss and smoothing, whose
slopes may be of either sign.

Under autocast a weight of another dtype is cast once per call, as ``F.linear`` does. The gradient of a bf16
weight needs an fp32 accumulator of the weight's shape; that of an fp32 weight is its own.
Shape suffixes: N target rows, D hidden size, V vocabulary, R rank of the head's adapter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.native import cross_entropy
from truetune.kernels.op import Op, compute_dtype, no_autocast, statistics_dtype
from truetune.kernels.product import products

CHUNK_BYTES = 192 << 20
"""Most bytes that a chunk's logits and their fp32 statistics may take."""
CLASSES = 1 << 14
"""Rows of the weight's gradient that are added to at once."""
FILTERED_ROWS = 512
"""Most rows of a chunk whose gradient is filtered: the more rows, the more entries count in one of them."""
FEW = 0.5
"""Share of the vocabulary's entries from which on gathering them costs as much as leaving out the rest saves."""


class LossTerms(NamedTuple):
    """total: differentiable weighted sum, a scalar of at least fp32. losses_N: the rows' losses, unweighted, detached.
    correct_N: bool; whether the label's logit is above every other's (a tie is no hit), detached."""

    total: Tensor
    losses: Tensor
    correct: Tensor


def filter_threshold(dtype: torch.dtype) -> float:
    """The largest |softmax - onehot| that counts as none: eps / 32 of the dtype that is multiplied in."""
    return torch.finfo(dtype).eps / 32


@Op
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
) -> LossTerms:
    """Summed cross-entropy (nats) of rows of hidden states under a linear head.

    hidden_ND, weight_VD and bias_V are fp32 or bf16 of one dtype, or any under autocast; labels_N are int64
    class ids in [0, V); weights_N is float32, what each row's loss counts for (None: 1), and gets no gradient.
    low_NR and up_VR, both or neither, may have another dtype. z_loss and smoothing (c and a) are part of each row's
    loss. Without rows the total is 0 and so are its gradients.
    filtered: in the gradients of hidden, weight, low and up the equals may leave out, or merge, entries that every row
    of a block has below ``filter_threshold`` of the products' dtype, as |softmax - onehot| before anything is
    multiplied in; weights_N must then be of one sign.
    Gradients come back in the inputs' dtypes, and only for inputs that require them; the equals allow one backward per
    forward.
    Raises ValueError if the dtypes differ outside autocast.
    """
    if low_NR is None or up_VR is None:
        logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    else:  # rounded once, as in ``lora_linear``
        dtype = compute_dtype(hidden_ND, weight_VD)
        logits_NV = torch.addmm(F.linear(low_NR.to(dtype), up_VR.to(dtype)), hidden_ND, weight_VD.T)
        logits_NV = logits_NV if bias_V is None else logits_NV + bias_V.to(dtype)
    logits_NV = logits_NV.to(statistics_dtype(logits_NV.dtype)) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    losses_N = F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=smoothing)
    if z_loss:
        losses_N = losses_N + z_loss * logits_NV.logsumexp(1).square()
    index_N1 = labels_N[:, None]
    rivals_NV = logits_NV.detach().scatter(1, index_N1, -math.inf)
    correct_N = logits_NV.detach().gather(1, index_N1)[:, 0] > rivals_NV.amax(1)
    weighted_N = losses_N if weights_N is None else losses_N * weights_N.detach()
    return LossTerms(weighted_N.sum(), losses_N.detach(), correct_N)


@linear_cross_entropy.on("cpu", "cuda")
def chunked(
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
) -> LossTerms:
    inputs = (hidden_ND, weight_VD, bias_V, low_NR, up_VR)
    shape = _Shape(scale, softcap, z_loss, smoothing)
    return LossTerms(*_Chunked.apply(*inputs, labels_N, weights_N, shape, filtered, torch.is_grad_enabled()))


class _Shape(NamedTuple):
    """What the loss is a function of, beside its tensors."""

    scale: float
    softcap: float | None
    z_loss: float
    smoothing: float


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        low_NR: Tensor | None,
        up_VR: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor | None,
        shape: _Shape,
        filtered: bool,
        gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (hidden_ND, weight_VD, bias_V, low_NR, up_VR)
        wanted = tuple(gradients and needed for needed in ctx.needs_input_grad[: len(inputs)])
        dtype = compute_dtype(hidden_ND, weight_VD)
        with no_autocast(hidden_ND):
            up_VR = None if up_VR is None else up_VR.to(dtype)
            merges = filtered and any(wanted) and not (shape.z_loss or shape.smoothing)
            sweep = _Sweep(weight_VD.to(dtype), bias_V, up_VR, shape, len(hidden_ND), merges)
            losses_N, correct_N, found = sweep(hidden_ND, low_NR, labels_N, weights_N, wanted)
        pairs = zip(found, inputs, strict=True)
        ctx.save_for_backward(*(None if g is None or x is None else g.to(x.dtype) for g, x in pairs))
        ctx.mark_non_differentiable(losses_N, correct_N)
        weighted_N = losses_N if weights_N is None else losses_N * weights_N
        return weighted_N.sum(), losses_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the weight's gradient can be the largest tensor of a run. Autograd's version
        # counter makes a second backward through the same graph an error rather than a wrong gradient.
        scaled = (None if g is None else g.mul_(grad_total) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


class _Sweep:
    """One pass over the rows with buffers that are allocated once."""

    def __init__(
        self,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        up_VR: Tensor | None,
        shape: _Shape,
        rows: int,
        merges: bool,
    ) -> None:
        self.weight_VD, self.bias_V, self.up_VR = weight_VD, bias_V, up_VR
        self.scale, self.softcap, self.z_loss, self.smoothing = shape
        dtype, work = weight_VD.dtype, statistics_dtype(weight_VD.dtype)
        usual = bias_V is None and not (self.z_loss or self.smoothing)
        self.compiled = usual and cross_entropy.computes(weight_VD)
        vocabulary = len(weight_VD)
        apart = dtype != work and not self.compiled
        copies = work.itemsize * (apart + (self.softcap is not None and not self.compiled))
        most = max(1, CHUNK_BYTES // (vocabulary * (dtype.itemsize + copies)))
        chunks = math.ceil(rows / (min(most, FILTERED_ROWS) if merges else most))
        self.rows = math.ceil(rows / max(1, chunks))
        self.reached_V = weight_VD.new_empty(vocabulary, dtype=torch.bool) if merges else None
        self.threshold = filter_threshold(dtype)
        chunk = (self.rows, vocabulary)
        self.logits_CV = weight_VD.new_empty(chunk)
        self.work_CV = weight_VD.new_empty(chunk, dtype=work) if apart else self.logits_CV
        self.slope_CV = None
        if self.softcap is not None and not self.compiled:
            self.slope_CV = weight_VD.new_empty(chunk, dtype=work)

    def __call__(
        self,
        hidden_ND: Tensor,
        low_NR: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Losses, hits, and the gradients of hidden, weight, bias, low and up that are wanted."""
        for_hidden, for_weight, for_bias, for_low, for_up = wanted
        rows, dtype, work = len(hidden_ND), self.weight_VD.dtype, statistics_dtype(self.weight_VD.dtype)
        losses_N = hidden_ND.new_empty(rows, dtype=work)
        correct_N = hidden_ND.new_empty(rows, dtype=torch.bool)
        grad_hidden_ND = torch.empty_like(hidden_ND) if for_hidden else None
        grad_weight_VD = torch.zeros_like(self.weight_VD, dtype=work) if for_weight else None
        grad_bias_V = self.weight_VD.new_zeros(len(self.weight_VD), dtype=work) if for_bias else None
        grad_low_NR = torch.empty_like(low_NR) if low_NR is not None and for_low else None
        grad_up_VR = torch.zeros_like(self.up_VR, dtype=work) if self.up_VR is not None and for_up else None
        for start in range(0, rows, max(1, self.rows)):
            part = slice(start, start + self.rows)
            hidden_CD = hidden_ND[part].to(dtype)
            low_CR = None if low_NR is None else low_NR[part].to(dtype)
            weights_C = None if weights_N is None else weights_N[part]
            found = losses_N[part], correct_N[part]
            slopes_CV = self._slopes(hidden_CD, low_CR, labels_N[part], weights_C, *found, any(wanted))
            if grad_bias_V is not None:
                grad_bias_V += slopes_CV.sum(0, dtype=work)
            if not any(wanted):
                continue
            slopes = self._merged(slopes_CV, labels_N[part])
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = slopes.times(self.weight_VD, grad_hidden_ND.dtype)
            if grad_low_NR is not None and self.up_VR is not None:
                grad_low_NR[part] = slopes.times(self.up_VR, grad_low_NR.dtype)
            if grad_weight_VD is not None:
                slopes.add_transposed(grad_weight_VD, hidden_CD)
            if grad_up_VR is not None and low_CR is not None:
                slopes.add_transposed(grad_up_VR, low_CR)
        return losses_N, correct_N, (grad_hidden_ND, grad_weight_VD, grad_bias_V, grad_low_NR, grad_up_VR)

    def _merged(self, slopes_CV: Tensor, labels_C: Tensor) -> _Slopes:
        """The slopes that products are made of: all, or those that count and the rest as one entry."""
        if self.reached_V is None:
            return _Slopes(slopes_CV)
        self.reached_V[labels_C] = True
        kept_K = self.reached_V.nonzero()[:, 0]
        if len(kept_K) > FEW * len(self.reached_V):
            return _Slopes(slopes_CV)
        rest_C1 = slopes_CV @ (~self.reached_V)[:, None].to(slopes_CV.dtype)
        sums_V = (slopes_CV.new_ones(1, len(slopes_CV)) @ slopes_CV)[0].masked_fill_(self.reached_V, 0)
        total = rest_C1.sum()
        share_V = sums_V / torch.where(total == 0, 1, total)
        return _Slopes(torch.cat([slopes_CV.index_select(1, kept_K), rest_C1], 1), kept_K, share_V)

    def _slopes(
        self,
        hidden_CD: Tensor,
        low_CR: Tensor | None,
        labels_C: Tensor,
        weights_C: Tensor | None,
        losses_C: Tensor,
        correct_C: Tensor,
        wanted: bool,
    ) -> Tensor:
        """Fill losses_C and correct_C; the gradient of the summed loss by h W^T + b, in the products' dtype, if wanted.

        It stands in the buffer of the logits."""
        logits_CV = self.logits_CV[: len(hidden_CD)]
        if low_CR is not None and self.up_VR is not None:
            products([hidden_CD, low_CR], [self.weight_VD, self.up_VR], out=logits_CV)
        else:
            products([hidden_CD], [self.weight_VD], out=logits_CV)
        if self.compiled:
            shape = (self.scale, self.softcap or 0.0)
            filtering = (self.reached_V, self.threshold)
            cross_entropy.in_place(logits_CV, labels_C, weights_C, losses_C, correct_C, *shape, wanted, *filtering)
            return logits_CV
        labels_C1 = labels_C[:, None]
        work_CV, lse_C1 = self._softmax(logits_CV, labels_C1, losses_C, correct_C)
        if wanted:
            self._to_gradient(work_CV, lse_C1, labels_C1)
            if weights_C is not None:
                work_CV.mul_(weights_C[:, None])
            if logits_CV.dtype != work_CV.dtype:
                logits_CV.copy_(work_CV)
        return logits_CV

    def _softmax(
        self, logits_CV: Tensor, labels_C1: Tensor, losses_C: Tensor, correct_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fill losses_C and correct_C; return the softmax, which stands in the work buffer, and the log-sum-exp."""
        work_CV = self.work_CV[: len(logits_CV)]
        if logits_CV.dtype != work_CV.dtype:
            work_CV.copy_(logits_CV)
        if self.bias_V is not None:
            work_CV.add_(self.bias_V)
        if self.scale != 1.0:
            work_CV.mul_(self.scale)
        if self.softcap is not None and self.slope_CV is not None:
            work_CV.div_(self.softcap).tanh_()
            torch.mul(work_CV, work_CV, out=self.slope_CV[: len(work_CV)]).neg_().add_(1)
            work_CV.mul_(self.softcap)
        label_C1 = work_CV.gather(1, labels_C1)
        rival_C1 = work_CV.scatter_(1, labels_C1, -math.inf).amax(1, keepdim=True)
        work_CV.scatter_(1, labels_C1, label_C1)
        mean_C1 = work_CV.mean(1, keepdim=True) if self.smoothing else label_C1
        torch.softmax(work_CV, 1, out=work_CV)
        # The largest probability is 1 / sum exp(z - max z), at least 1/V: its logarithm never overflows,
        # whereas that of the label's probability would.
        logsumexp_C1 = torch.maximum(label_C1, rival_C1) - work_CV.amax(1, keepdim=True).log()
        losses_C.copy_((logsumexp_C1 - label_C1.lerp(mean_C1, self.smoothing))[:, 0])
        if self.z_loss:
            losses_C += self.z_loss * logsumexp_C1[:, 0].square()
        correct_C.copy_((label_C1 > rival_C1)[:, 0])
        return work_CV, logsumexp_C1

    def _to_gradient(self, work_CV: Tensor, lse_C1: Tensor, labels_C1: Tensor) -> None:
        """Turn the softmax, in place, into the gradient of the summed loss by h W^T + b."""
        if self.reached_V is not None:
            torch.lt(work_CV.amax(0), self.threshold, out=self.reached_V).logical_not_()  # what is no number is reached
        if self.z_loss:
            work_CV.mul_(1 + 2 * self.z_loss * lse_C1)
        if self.smoothing:
            work_CV.sub_(self.smoothing / work_CV.shape[1])
        work_CV.scatter_add_(1, labels_C1, work_CV.new_full((1, 1), self.smoothing - 1).expand_as(labels_C1))
        if self.slope_CV is not None:
            work_CV.mul_(self.slope_CV[: len(work_CV)])
        if self.scale != 1.0:
            work_CV.mul_(self.scale)


class _Slopes(NamedTuple):
    """slopes [C, V] as columns: all, or those of the entries kept_K and one more, which is spread over all entries by
    share_V."""

    columns_CK: Tensor
    kept_K: Tensor | None = None
    share_V: Tensor | None = None

    def times(self, x_VD: Tensor, dtype: torch.dtype) -> Tensor:
        """slopes @ x, in ``dtype``."""
        if self.kept_K is None or self.share_V is None:
            return products([self.columns_CK], [x_VD.T], dtype=dtype)
        merged_KD = torch.cat([x_VD.index_select(0, self.kept_K), self.share_V[None] @ x_VD])
        return products([self.columns_CK], [merged_KD.T], dtype=dtype)

    def add_transposed(self, sum_VD: Tensor, x_CD: Tensor) -> None:
        """sum += slopes^T @ x. A part of the classes at a time, since each takes a copy, but for all in one dtype."""
        columns_CK, kept_K, share_V = self
        if kept_K is None and sum_VD.dtype == columns_CK.dtype:
            sum_VD.addmm_(columns_CK.T, x_CD)
            return
        if kept_K is not None and share_V is not None:
            columns_CK, rest_C = columns_CK[:, :-1], columns_CK[:, -1]
            sum_VD.addr_(share_V.to(sum_VD.dtype), (rest_C @ x_CD).to(sum_VD.dtype))
        for start in range(0, columns_CK.shape[1], CLASSES):
            part = slice(start, start + CLASSES)
            place = part if kept_K is None else kept_K[part]
            sum_VD[place] += products([columns_CK[:, part].T], [x_CD.T], dtype=sum_VD.dtype)
