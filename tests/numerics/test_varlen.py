"""How attention over a pack is asked of ``torch.nn.attention.varlen``, which no CPU has.

In its place stands what its documentation says, document by document: bounds in int32, the longest lengths, queries
that are those of the last keys, a window of so many keys before and after a query's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_s

from truetune.kernels import packed_attention, varlen
from truetune.kernels.attention import by_document

ASKED = set(inspect.signature(torch_s.varlen_attn).parameters)
OPTIONS: list[dict[str, Any]] = [{}, {"window": 1}, {"window": 4}, {"window": 99}, {"key_lengths": (9, 1, 30)}]
OPTIONS.append({"window": 5, "key_lengths": (9, 1, 30)})
LENGTHS = (5, 1, 17)


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> Tensor:
    assert options.keys() <= ASKED and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.dtype == key.dtype == value.dtype in (torch.bfloat16, torch.float16)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and not torch.is_autocast_enabled("cpu")
    assert (max_q, max_k) == tuple(int(bounds.diff().max()) for bounds in (cu_seq_q, cu_seq_k))
    before, after = options["window_size"]
    group = query.shape[1] // key.shape[1]
    assert options["enable_gqa"] == (group > 1)
    outputs = []
    pairs = zip(
        cu_seq_q.tolist()[:-1], cu_seq_q.tolist()[1:], cu_seq_k.tolist()[:-1], cu_seq_k.tolist()[1:], strict=True
    )
    for first, last, start, end in pairs:
        q, k, v = query[first:last], key[start:end], value[start:end]
        k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q.float(), k) * options["scale"]
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = (-behind > after) if after >= 0 else torch.zeros_like(behind, dtype=torch.bool)
        hidden |= (behind > before) if before >= 0 else False
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs).to(query.dtype)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each call; the trial's own come first."""
    calls: list[int] = []

    def noted(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(len(query))
        return documented(query, *rest, **options)

    monkeypatch.setattr(torch_s, "varlen_attn", noted)
    varlen._holds.cache_clear()
    yield calls
    varlen._holds.cache_clear()


def packed(
    keys: int = sum(LENGTHS), dtype: torch.dtype = torch.bfloat16, size: int = 16, values: int = 16
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(6, sum(LENGTHS), size), (2, keys, size), (2, keys, values)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def outcome(op: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    out = op(*tensors, LENGTHS, 0.3, **options)
    readout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * readout.to(out)).sum(), tensors)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_asked_for_what_the_reference_computes(
    options: dict[str, Any], dtype: torch.dtype, asked: list[int], no_worse: Any
) -> None:
    tensors = packed(sum(options.get("key_lengths", LENGTHS)), dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    found = outcome(packed_attention.equals["cuda"], tensors, **options)
    assert asked == [sum(varlen.QUERIES), sum(LENGTHS)]
    outcome(packed_attention.equals["cuda"], tensors, **options)
    assert len(asked) == 3, "the trial is made once"
    plain, truth = outcome(packed_attention.reference, tensors, **options), outcome(by_document, exact, **options)
    for name, ours, theirs, true in zip("oqkv", found, plain, truth, strict=True):
        no_worse(name, ours, theirs, true, dtype)


def test_under_autocast_it_computes_in_its_dtype(asked: list[int]) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = packed_attention.equals["cuda"](*packed(dtype=torch.float32), LENGTHS, 0.3)
    assert out.dtype == torch.bfloat16 and len(asked) == 2


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"dtype": torch.float32}, {}),
        ({"size": 12, "values": 12}, {}),
        ({"size": 264, "values": 264}, {}),
        ({"size": 24}, {}),
        ({}, {"softcap": 2.0}),
        ({}, {"sinks_H": torch.zeros(6)}),
        ({}, {"dropout": 0.5}),
    ],
)
def test_what_it_does_not_take_goes_document_by_document(
    given: dict[str, Any], options: dict[str, Any], asked: list[int]
) -> None:
    torch.manual_seed(1)
    found = packed_attention.equals["cuda"](*packed(**given), LENGTHS, 0.3, **options)
    torch.manual_seed(1)
    tensors = packed(**given)
    torch.manual_seed(1)
    assert found.shape == by_document(*tensors, LENGTHS, 0.3, **options).shape and not asked


@pytest.mark.parametrize("wrong", ["output", "gradient", "window"])
def test_one_that_errs_is_not_used(
    wrong: str, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def errs(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        if wrong == "window":
            return documented(query, *rest, **options | {"window_size": (options["window_size"][0] + 1, 0)})
        scaled = 1.1 * query
        out = documented(query if wrong == "output" else query + (scaled - scaled.detach()), *rest, **options)
        return 1.05 * out if wrong == "output" else out

    monkeypatch.setattr(torch_s, "varlen_attn", errs)
    tensors = packed()
    for _ in range(2):
        found = packed_attention.equals["cuda"](*tensors, LENGTHS, 0.3, window=4)
        assert torch.equal(found, by_document(*tensors, LENGTHS, 0.3, window=4))
    note = "note: documents are attended one by one: torch.nn.attention.varlen errs more than twice as much\n"
    assert capsys.readouterr().err == note


def test_where_it_does_not_run_documents_go_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    varlen._holds.cache_clear()
    tensors = packed()
    found = packed_attention.equals["cuda"](*tensors, LENGTHS, 0.3)  # torch's own, on a CPU
    assert torch.equal(found, by_document(*tensors, LENGTHS, 0.3))
    assert "one by one: torch.nn.attention.varlen does not run (NotImplementedError" in capsys.readouterr().err


def test_the_trial_leaves_no_trace(asked: list[int]) -> None:
    tensors = packed()
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        packed_attention.equals["cuda"](*tensors, LENGTHS, 0.3)
        first = list(kept)
        kept.clear()
        packed_attention.equals["cuda"](*tensors, LENGTHS, 0.3)
    assert first == kept and all(t.grad is None for t in tensors) and len(asked) == 3
