"""How attention over a pack is asked of ``torch.nn.attention.varlen``, flash-attn and flex_attention.

No CPU has the first two. In their place stands what their documentation says, document by document: bounds in int32,
the longest lengths, queries that are those of the last keys, a window of so many keys before and after a query's own.
flex_attention runs here as torch's own, but not compiled, and with gradients, which torch holds back on CPUs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention import varlen as torch_s

from truetune.kernels import flex, packed_attention, varlen
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
    softcap = options.pop("softcap", None)
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
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = (-behind > after) if after >= 0 else torch.zeros_like(behind, dtype=torch.bool)
        hidden |= (behind > before) if before >= 0 else False
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs).to(query.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """What flash-attn's documentation says of the arguments that are given. causal: no key after a query's own."""
    options = {"scale": softmax_scale, "window_size": (window_size[0], 0) if causal else window_size}
    options |= {"enable_gqa": q.shape[1] > k.shape[1]} | ({"softcap": softcap} if softcap > 0 else {})
    return documented(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """flash-attn as if it were installed; tokens of each call."""
    calls: list[int] = []

    def noted(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(len(q))
        return flash_attn_varlen_func(q, *rest, **options)

    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = noted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.fixture
def flexible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in fp32, as the kernel has them."""

    def wide(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = flex_attention.flex_attention(q.float(), k.float(), v.float(), **options)
        assert isinstance(out, Tensor)
        return out.to(q.dtype)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled", lambda: wide)


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


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_flash_attn_goes_before_and_takes_caps(
    options: dict[str, Any], softcap: float | None, flash: list[int], asked: list[int], no_worse: Any
) -> None:
    tensors = packed(sum(options.get("key_lengths", LENGTHS)))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    options = options | {"softcap": softcap}
    found = outcome(packed_attention.equals["cuda"], tensors, **options)
    assert flash == [sum(varlen.QUERIES), sum(LENGTHS)] and not asked
    plain, truth = outcome(packed_attention.reference, tensors, **options), outcome(by_document, exact, **options)
    for name, ours, theirs, true in zip("oqkv", found, plain, truth, strict=True):
        no_worse(name, ours, theirs, true, torch.bfloat16)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_flex_attention_takes_caps(
    options: dict[str, Any],
    softcap: float | None,
    asked: list[int],
    flexible: None,
    no_worse: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = packed(sum(options.get("key_lengths", LENGTHS)), values=24)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    options = options | {"softcap": softcap}
    ways: list[Any] = []
    chosen = varlen.way
    monkeypatch.setattr(varlen, "way", lambda *kind: ways.append(chosen(*kind)) or ways[-1])
    found = outcome(packed_attention.equals["cuda"], tensors, **options)
    assert ways == [flex.attention if softcap else None] and not capsys.readouterr().err
    plain, truth = outcome(packed_attention.reference, tensors, **options), outcome(by_document, exact, **options)
    for name, ours, theirs, true in zip("oqkv", found, plain, truth, strict=True):
        no_worse(name, ours, theirs, true, torch.bfloat16)


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
        ({"dtype": torch.float32}, {"softcap": 2.0}),
        ({}, {"sinks_H": torch.zeros(6)}),
        ({}, {"softcap": 2.0, "dropout": 0.5}),
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
    note = "which errs more than twice as much as documents one by one"
    assert capsys.readouterr().err == f"note: attention goes without torch.nn.attention.varlen, {note}\n"


def test_flash_attn_that_errs_gives_way_to_torch_s(
    flash: list[int], asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_the_top(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        """The mask of flash-attn before 2.1, where there are more keys than queries."""
        first = [min(pair) for pair in zip(varlen.QUERIES, varlen.KEYS, strict=True)]
        k, v = (torch.cat([x[:n] for x, n in zip(t.split(list(varlen.KEYS)), first, strict=True)]) for t in (k, v))
        return flash_attn_varlen_func(q, k, v, rest[0], rest[0], rest[2], rest[2], **options)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", at_the_top)
    packed_attention.equals["cuda"](*packed(), LENGTHS, 0.3)
    assert asked == [sum(varlen.QUERIES), sum(LENGTHS)]
    assert capsys.readouterr().err.startswith("note: attention goes without flash_attn, which errs more")


def test_where_it_does_not_run_documents_go_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    varlen._holds.cache_clear()
    tensors = packed()
    found = packed_attention.equals["cuda"](*tensors, LENGTHS, 0.3)  # torch's own, on a CPU
    assert torch.equal(found, by_document(*tensors, LENGTHS, 0.3))
    note = "note: attention goes without torch.nn.attention.varlen, which does not run (NotImplementedError"
    assert capsys.readouterr().err.startswith(note)


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
