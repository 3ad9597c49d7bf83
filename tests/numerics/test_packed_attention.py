"""Attention over a pack against each document's attention, written out."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import sliding_window_causal_mask_function

from truetune.kernels import packed_attention

module = sys.modules["truetune.kernels.attention"]

PACKS = [(1,), (13,), (1, 1, 1), (5, 1, 17), (40, 3)]
HEADS = [(1, 1, 8, 8), (6, 2, 16, 16), (4, 4, 24, 16), (4, 1, 8, 12)]  # H, K, d, e
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 4},
    {"window": 16},
    {"softcap": 2.0},
    {"sinks": True},
    {"window": 4, "softcap": 2.0, "sinks": True},
]
SCALE = 0.3


@pytest.fixture(autouse=True)
def _torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUETUNE_OFF", "native_attention")  # it has tests of its own


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One document, one head and one matrix product after another, as models' own eager code has it."""
    group = len(q) // len(k)
    heads = []
    for h in range(len(q)):
        documents, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            start += length
            scores = q[h, part] @ k[h // group, part].T * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            behind = [[i - j for j in range(length)] for i in range(length)]
            hidden = [[d < 0 or (window is not None and d >= window) for d in row] for row in behind]
            scores = scores.masked_fill(torch.tensor(hidden), -torch.inf)
            if sinks_H is not None:
                scores = torch.cat([scores, sinks_H[h].to(scores.dtype).expand(length, 1)], -1)
            wide = torch.promote_types(scores.dtype, torch.float32)
            weights = torch.softmax(scores, -1, dtype=wide).to(v.dtype)[:, :length]
            documents.append(weights @ v[h // group, part])
        heads.append(torch.cat(documents))
    return torch.stack(heads)


def inputs(heads: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, sinks: bool) -> list[Tensor]:
    queries, keys, width, values = heads
    shapes = [(queries, tokens, width), (keys, tokens, width), (keys, tokens, values)]
    tensors = [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]
    return [*tensors, torch.randn(queries).to(dtype).requires_grad_()] if sinks else tensors


def results(
    op: Callable[..., Tensor],
    tensors: list[Tensor],
    lengths: tuple[int, ...],
    cotangent: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    q, k, v, *sinks = tensors
    out = op(q, k, v, lengths, SCALE, sinks_H=sinks[0] if sinks else None, **options)
    gradients = torch.autograd.grad(out, tensors, cotangent.to(out.dtype))
    return dict(zip(("out", "q", "k", "v", "sinks"), (out.detach(), *gradients), strict=False))


@pytest.mark.parametrize("op", [packed_attention, packed_attention.reference], ids=["fast", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_no_worse_than_eager_document_by_document(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    op: Callable[..., Tensor],
    no_worse: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SMALLEST_BLOCK", 6)
    options = dict(options)
    tensors = inputs(heads, sum(lengths), dtype, options.pop("sinks", False))
    cotangent = torch.randn(heads[0], sum(lengths), heads[3]).bfloat16()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = results(eager, exact, lengths, cotangent.double(), **options)
    plain = results(eager, tensors, lengths, cotangent, **options)
    ours = results(op, tensors, lengths, cotangent, **options)
    for name in truth:
        assert ours[name].dtype == dtype
        no_worse(name, ours[name], plain[name], truth[name], dtype)


@pytest.mark.parametrize("op", [packed_attention, packed_attention.reference], ids=["fast", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fewer_queries_than_keys_are_the_last_of_their_documents(
    options: dict[str, Any], op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALLEST_BLOCK", 6)
    options = dict(options)
    key_lengths, lengths = (7, 33, 1, 18), (7, 14, 1, 1)
    asked = torch.cat([torch.arange(s) >= s - n for s, n in zip(key_lengths, lengths, strict=True)])
    tensors = inputs((6, 2, 16, 16), len(asked), torch.float64, options.pop("sinks", False))
    cotangent = torch.randn(6, int(asked.sum()), 16).double()
    whole = torch.zeros(6, len(asked), 16).double()
    whole[:, asked] = cotangent
    truth = results(eager, tensors, key_lengths, whole, **options)
    fewer = [tensors[0].detach()[:, asked].requires_grad_(), *tensors[1:]]
    ours = results(op, fewer, lengths, cotangent, key_lengths=key_lengths, **options)
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected[:, asked] if name in ("out", "q") else expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stranger_in_the_pack_changes_nothing(options: dict[str, Any]) -> None:
    options = dict(options)
    tensors = inputs((6, 2, 16, 16), 40, torch.float32, options.pop("sinks", False))
    lengths, middle = (9, 20, 11), slice(9, 29)
    cotangent = torch.randn(6, 40, 16)
    before = results(packed_attention, tensors, lengths, cotangent, **options)
    with torch.no_grad():
        for t in tensors[:3]:
            t[:, :9] *= -3
            t[:, 29:] = 1e4
    after = results(packed_attention, tensors, lengths, cotangent, **options)
    for name in ("out", "q", "k", "v"):
        assert torch.equal(before[name][:, middle], after[name][:, middle])
    assert not torch.equal(before["out"][:, :9], after["out"][:, :9])


def test_a_window_is_that_of_transformers() -> None:
    window, tokens = 3, 8
    sees = sliding_window_causal_mask_function(window)
    # Values that name their key: a query's output is not zero exactly at the keys that it sees.
    values = torch.eye(tokens)[None]
    zeros = torch.zeros(1, tokens, tokens)
    place = torch.arange(tokens)
    expected = [[sees(0, 0, i, j).item() for j in place] for i in place]
    for op in (packed_attention, packed_attention.reference):
        out = op(zeros, zeros, values, (tokens,), 1.0, window=window)
        assert (out[0] > 0).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 2.0}], ids=str)
def test_dropout_drops_weights_and_keeps_their_sum_on_average(options: dict[str, Any]) -> None:
    queries, values = torch.randn(4, 600, 8), torch.ones(4, 600, 8)
    whole = packed_attention(queries, queries, values, (200, 400), 0.1, **options)
    torch.testing.assert_close(whole, values)
    dropped = packed_attention(queries, queries, values, (200, 400), 0.1, dropout=0.25, **options)
    assert dropped[:, [0, 200]].unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
def test_under_autocast_it_answers_in_autocast_s_dtype(options: dict[str, Any]) -> None:
    tensors = inputs((4, 2, 8, 8), 12, torch.float32, False)
    for op in (packed_attention, packed_attention.reference):
        with torch.autocast("cpu", torch.bfloat16):
            out = op(*tensors, (5, 7), SCALE, **options)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), eager(*tensors, (5, 7), SCALE, **options), atol=0.03, rtol=0.03)


def test_no_matrix_over_the_pack_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    for name in ("_explicit", "_fused"):
        inner = getattr(module, name)

        def spy(q: Tensor, k: Tensor, *rest: Any, inner: Any = inner) -> Tensor:
            sizes.append(q.shape[1] * k.shape[1])
            return inner(q, k, *rest)

        monkeypatch.setattr(module, name, spy)
    tensors = inputs((1, 1, 8, 8), 1000, torch.float32, False)
    packed_attention(*tensors, (700, 300), SCALE, window=8)
    assert max(sizes) <= 128 * (128 + 7)
    assert sum(sizes) < 1000 * (128 + 7)
    packed_attention(*tensors, (700, 300), SCALE, window=8, softcap=1.0)
    assert max(sizes) <= 128 * (128 + 7)


@pytest.mark.parametrize("op", [packed_attention, packed_attention.reference], ids=["fast", "reference"])
def test_wrong_shapes_are_refused(op: Callable[..., Tensor]) -> None:
    q, k, v = inputs((4, 2, 8, 8), 12, torch.float32, False)
    with pytest.raises(ValueError, match="11, but there are 12 tokens"):
        op(q, k, v, (5, 6), SCALE)
    with pytest.raises(ValueError, match="2 key heads do not divide 3 query heads"):
        op(q[:3], k, v, (5, 7), SCALE)
    with pytest.raises(ValueError, match="11, but there are 12 tokens"):
        op(q, k, v, (5, 7), 0.3, key_lengths=(5, 6))
    with pytest.raises(ValueError, match="more queries than keys"):
        op(q, k, v, (5, 7), 0.3, key_lengths=(7, 5))
