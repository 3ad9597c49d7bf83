"""Attention compiled for this processor, and the same as plain C++, against the reference."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attended import HEADS, LONG, OPTIONS, PACKS, inputs, outcome, worse
from torch import Tensor

from truetune.cache import cache_folder
from truetune.errors import UserError
from truetune.kernels import packed_attention
from truetune.kernels.native.attention import attention
from truetune.kernels.native.build import SOURCES, kernels, load

module = sys.modules["truetune.kernels.attention"]
native_only = pytest.mark.skipif(kernels() is None, reason="no native attention on this machine")


@pytest.fixture
def libraries() -> dict[str, Any]:
    if kernels() is None:
        pytest.skip("no native attention on this machine")
    return {"native": kernels(), "plain": load(SOURCES, "truetune_plain", ("-DTRUETUNE_PLAIN",))}


@pytest.fixture(params=["native", "plain"])
def library(request: pytest.FixtureRequest, libraries: dict[str, Any]) -> Any:
    return libraries[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "options"),
    [
        *((lengths, heads, {}) for lengths in PACKS for heads in HEADS),
        *((lengths, HEADS[0], options) for lengths in (*PACKS, LONG) for options in OPTIONS),
        (LONG, HEADS[0], {}),
        ((20, 1400, 5), (2, 1, 8, 8), {}),  # so long that its gradients add up from parts
        ((20, 1400, 5), (2, 1, 8, 8), {"window": 600}),
        *(((8, 20, 100), HEADS[0], options | {"key_lengths": (8, 83, 330)}) for options in ({}, *OPTIONS)),
        ((20, 700, 0), (2, 1, 8, 8), {"key_lengths": (20, 1399, 5)}),
        ((20, 201, 5), (2, 1, 8, 8), {"window": 600, "key_lengths": (620, 1400, 5)}),
    ],
    ids=str,
)
def test_no_worse_than_the_reference(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int, int],
    options: dict[str, Any],
    dtype: torch.dtype,
    libraries: dict[str, Any],
) -> None:
    assert not worse(libraries, heads, lengths, dtype, options, 1.3 * heads[2] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype, library: Any) -> None:
    tensors, dout = inputs((6, 2, 16, 24), 1460, dtype)

    def run(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        return outcome(attention, tensors, dout, (1100, 16, 44, 300), 0.3, library=library)

    one, three = run(1), run(3)
    assert all(torch.equal(one[name], three[name]) for name in one)


def _fused(x: Tensor) -> Tensor:
    """A part of a wider tensor, as one projection for queries, keys and values gives it."""
    wide = torch.full((x.shape[1], x.shape[0], 3 * x.shape[2]), torch.nan, dtype=x.dtype)
    part = wide[..., x.shape[2] : 2 * x.shape[2]]
    part.copy_(x.transpose(0, 1))
    return part.transpose(0, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "by token": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "fused": _fused,
    "last dimension apart": lambda x: x.mT.contiguous().mT,
    "odd beginning": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout: str, dtype: torch.dtype, library: Any) -> None:
    tensors, dout = inputs((6, 2, 24, 16), 90, dtype)
    expected = outcome(attention, tensors, dout, (70, 20), 0.3, library=library)
    other = [LAYOUTS[layout](t) for t in (*tensors, dout)]
    assert all(not t.is_contiguous() or layout == "odd beginning" for t in other)
    got = outcome(attention, other[:3], other[3], (70, 20), 0.3, library=library)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_gradient_that_is_one_number_everywhere(library: Any) -> None:
    tensors, dout = inputs((2, 1, 8, 8), 20, torch.float32)
    one = torch.ones(()).expand_as(dout)
    expected = outcome(attention, tensors, one.contiguous(), (20,), 0.3, library=library)
    got = outcome(attention, tensors, one, (20,), 0.3, library=library)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{}, {"window": 30}, {"softcap": 2.0}], ids=str)
def test_a_stranger_in_the_pack_changes_nothing(options: dict[str, Any], library: Any) -> None:
    tensors, dout = inputs((6, 2, 16, 16), 140, torch.float32)
    before = outcome(attention, tensors, dout, (9, 120, 11), 0.3, library=library, **options)
    for t in tensors:
        t[:, :9] *= -3
        t[:, 129:] = torch.nan
    after = outcome(attention, tensors, dout, (9, 120, 11), 0.3, library=library, **options)
    for name in before:
        assert torch.equal(before[name][:, 9:129], after[name][:, 9:129])
        assert after[name][:, 129:].isnan().all()
    assert not torch.equal(before["o"][:, :9], after["o"][:, :9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
def test_what_is_not_a_number_is_told_and_the_future_is_not_seen(
    options: dict[str, Any], dtype: torch.dtype, library: Any
) -> None:
    (q, k, v), _ = inputs((2, 1, 8, 8), 40, dtype)
    k[:, 25] = torch.nan
    out = attention(q, k, v, (40,), 0.3, library=library, **options)
    assert out[:, :25].isfinite().all()
    assert out[:, 25:].isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}], ids=str)
def test_small_and_large_scores(
    scale: float,
    options: dict[str, Any],
    dtype: torch.dtype,
    libraries: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Where one key has all the weight, D of an output in bf16 costs digits that the reference in fp32 has.
    monkeypatch.setattr(module, "SHORT", 0)
    fused = packed_attention.equals["cuda"]
    assert not worse(libraries, (2, 1, 16, 16), (150,), dtype, options, scale, against=fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_sees_one_key_has_no_gradient(dtype: torch.dtype, library: Any) -> None:
    tensors, dout = inputs((6, 2, 64, 64), 40, dtype)
    got = outcome(attention, tensors, dout, (1, 39), 0.3, window=1, library=library)
    assert not got["q"].any() and not got["k"].any()
    assert torch.equal(got["o"], tensors[2].repeat_interleave(3, 0))


@native_only
def test_one_openmp_and_that_is_torch_s() -> None:
    files = [path for path in torch.ops.loaded_libraries if Path(path).parent == cache_folder() / "native"]
    assert files
    for linked in (Path(file).read_bytes() for file in files):
        assert b"GOMP_parallel" in linked or b"__kmpc_fork_call" in linked
        assert not any(runtime in linked for runtime in (b"libgomp", b"libomp", b"libiomp"))


# Which calls it gets.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    made: list[Tensor] = []

    def spy(q: Tensor, *rest: Any) -> Tensor:
        made.append(q)
        return attention(q, *rest)

    monkeypatch.setattr(module, "attention", spy)
    return made


@native_only
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_attention_on_a_cpu_takes_it(options: dict[str, Any], calls: list[Tensor]) -> None:
    (q, k, v), _ = inputs((4, 2, 16, 8), 30, torch.bfloat16)
    out = packed_attention(q, k, v, (25, 5), 0.3, **options)
    assert len(calls) == 1
    assert torch.equal(out, attention(q, k, v, (25, 5), 0.3, **options))


@native_only
def test_under_autocast_it_computes_in_autocast_s_dtype(calls: list[Tensor]) -> None:
    (q, k, v), _ = inputs((4, 2, 16, 8), 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(q, k, v, (25, 5), 0.3)
    assert calls[0].dtype == out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("heads", "dtype", "options"),
    [
        ((4, 2, 12, 8), torch.float32, {}),
        ((4, 2, 8, 12), torch.float32, {}),
        ((1, 1, 264, 8), torch.float32, {}),
        ((4, 2, 8, 8), torch.float64, {}),
        ((4, 2, 8, 8), torch.float32, {"sinks_H": torch.ones(4)}),
        ((4, 2, 8, 8), torch.float32, {"dropout": 0.5}),
    ],
    ids=str,
)
def test_what_it_does_not_do_goes_torch_s_way(
    heads: tuple[int, int, int, int], dtype: torch.dtype, options: dict[str, Any], calls: list[Tensor]
) -> None:
    (q, k, v), _ = inputs(heads, 30, dtype)
    torch.manual_seed(1)
    out = packed_attention(q, k, v, (25, 5), 0.3, **options)
    torch.manual_seed(1)
    assert torch.equal(out, packed_attention.equals["cuda"](q, k, v, (25, 5), 0.3, **options))
    assert not calls


def test_it_can_be_turned_off(calls: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), _ = inputs((4, 2, 8, 8), 30, torch.float32)
    monkeypatch.setenv("TRUETUNE_OFF", "native_attention, ")
    packed_attention(q, k, v, (25, 5), 0.3)
    assert not calls
    monkeypatch.setenv("TRUETUNE_OFF", "native")
    with pytest.raises(UserError, match="no fast path; choose from kept_memory, native_attention"):
        packed_attention(q, k, v, (25, 5), 0.3)


def test_wrong_shapes_are_refused() -> None:
    (q, k, v), _ = inputs((4, 2, 8, 8), 12, torch.float32)
    with pytest.raises(ValueError, match="11, but there are 12 tokens"):
        packed_attention(q, k, v, (5, 6), 0.3)
    with pytest.raises(ValueError, match="2 key heads do not divide 3 query heads"):
        packed_attention(q[:3], k, v, (5, 7), 0.3)


@native_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, 1:], v), "do not fit together"),
        (lambda q, k, v: (q, k.double(), v), "differ in dtype"),
        (lambda q, k, v: (q[..., :4], k[..., :4], v), "multiple of 8"),
        (lambda q, k, v: (q[:3], k, v), "do not divide"),
    ],
)
def test_the_compiled_code_looks_at_what_it_gets(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    tensors, _ = inputs((4, 2, 8, 8), 12, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        attention(*change(*tensors), (5, 7), 0.3)
