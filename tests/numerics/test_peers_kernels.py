"""What other kernel libraries ask of theirs, asked of ours: their shapes, their tolerances, their rules.

Restated from their descriptions, run through a thin adapter (``WAYS``): the reference, what a processor runs, and the
Triton kernel in the interpreter.

- Liger (Hsu et al. 2024, arXiv 2410.10989): RMSNorm, SwiGLU, GEGLU and the fused linear cross-entropy in fp32, on its
  shapes and within its tolerances for outputs and all gradients. Its tolerances in bf16 (5 for a norm, 1e4 for a gate)
  no kernel could fail, and are left out: ``test_native_pointwise.py`` and ``test_triton.py`` hold those to float64.
- Apple's cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009): in bf16 no element of a gradient errs by more than
  torch's own does in bf16, plus 1e-2, both against fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreted import exact
from torch import Tensor

from truetune.kernels.gated import gated
from truetune.kernels.linear_cross_entropy import linear_cross_entropy
from truetune.kernels.op import Op
from truetune.kernels.rms_norm import rms_norm
from truetune.kernels.triton import switched_on

OPS: dict[str, Op[..., Any]] = {"rms_norm": rms_norm, "gated": gated, "linear_cross_entropy": linear_cross_entropy}
WAYS = ("reference", "processor", pytest.param("triton", marks=pytest.mark.proof))
BF16_BOUND = 1e-2


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def adapted(name: str, way: str) -> Iterator[Callable[..., Any]]:
    """The operation as it is computed in ``way``."""
    op = OPS[name]
    with contextlib.ExitStack() as stack:
        if way == "triton":
            stack.enter_context(exact())
            stack.enter_context(switched_on("cpu", name))
        yield op.reference if way == "reference" else op


def outcome(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradient of every tensor for one readout."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    readout = torch.ones_like(out) if out.ndim == 0 else torch.randn(out.shape, generator=generator).to(out.dtype)
    out.backward(readout)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def close(
    function: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: Sequence[Tensor], **by: float
) -> None:
    for ours, plain in zip(outcome(function, tensors), outcome(theirs, tensors), strict=True):
        torch.testing.assert_close(ours, plain, **by)


def no_worse(function: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
    """Apple's rule, element by element."""
    truth = outcome(theirs, [t.float() for t in tensors])
    for ours, plain, right in zip(outcome(function, tensors), outcome(theirs, tensors), truth, strict=True):
        surplus = (ours.float() - right).abs() - (plain.float() - right).abs()
        largest = min(1.0, float(right.abs().max()))  # gradients of a mean are small, and so must be their errors
        assert float(surplus.max()) <= BF16_BOUND * largest


def norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return wide.to(x.dtype) * weight if offset == 0 else (wide * (offset + weight.float())).to(x.dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(2, 128, 512), (5, 123, 123)])
def test_rms_norm_as_liger_asks(shape: tuple[int, ...], offset: float, way: str) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    with adapted("rms_norm", way) as op:
        close(
            lambda x, w: op(x, w, 1e-6, offset)[0], lambda x, w: norm(x, w, offset), [x, weight], atol=1e-4, rtol=1e-6
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"], ids=["swiglu", "geglu"])
@pytest.mark.parametrize("shape", [(2, 256, 256, 512), (6, 42, 123, 431)])
def test_a_gated_feed_forward_as_liger_asks(shape: tuple[int, int, int, int], activation: Any, way: str) -> None:
    batch, length, hidden, inner = shape
    tensors = [torch.randn(s) for s in ((batch, length, hidden), (hidden, inner), (hidden, inner), (inner, hidden))]

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g = x @ gate
        return ((F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")) * (x @ up)) @ down

    with adapted("gated", way) as op:
        close(lambda x, gate, up, down: op(x @ gate, x @ up, activation) @ down, plain, tensors, atol=1.0, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "hidden", "entries"), [(2 * 4, 512, 512), (3 * 47, 31, 123)])
def test_head_and_loss_as_liger_asks(rows: int, hidden: int, entries: int, with_bias: bool, way: str) -> None:
    labels = torch.randint(0, entries, (rows,))
    tensors = [torch.randn(rows, hidden), torch.rand(entries, hidden), *([torch.rand(entries)] if with_bias else [])]
    with adapted("linear_cross_entropy", way) as op:
        close(
            lambda h, w, b=None: op(h, w, labels, b).total / rows,
            lambda h, w, b=None: F.cross_entropy(F.linear(h, w, b), labels),
            tensors,
            atol=1e-5,
            rtol=5e-4,
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "entries", "hidden"), [(256, 512, 128), (252, 507, 128), (252, 507, 123)])
def test_head_and_loss_as_apple_asks(
    rows: int, entries: int, hidden: int, with_bias: bool, softcap: float | None, way: str
) -> None:
    """Rows of hidden states that are rows of the head, so that some probabilities are large."""
    states, head = torch.randn(rows, hidden) / hidden**0.5, torch.randn(entries, hidden)
    head[: rows // 2] = states[: rows // 2]
    labels, learned = torch.randint(0, entries, (rows,)), torch.rand(rows) < 0.8
    bias = [0.02 * torch.randn(entries)] if with_bias else []

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        logits = F.linear(h[learned], w, b)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.float(), labels[learned])

    def ours(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return op(h[learned], w, labels[learned], b, softcap=softcap).total / int(learned.sum())

    with adapted("linear_cross_entropy", way) as op:
        no_worse(ours, plain, [t.bfloat16() for t in (states, head, *bias)])
