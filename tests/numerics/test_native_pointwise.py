"""The compiled norms, rotations and gates against float64: at most twice the error of plain torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.errors import UserError
from truetune.kernels.gated import gated
from truetune.kernels.native import pointwise
from truetune.kernels.native.build import kernels
from truetune.kernels.rms_norm import rms_norm
from truetune.kernels.rope import rope

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 8), (7, 100), (2, 33, 15), (70, 576), (0, 16))
HEADS = ((1, 1, 1, 64, 32), (6, 2, 37, 64, 32), (3, 1, 70, 80, 20), (2, 2, 33, 96, 48), (4, 1, 0, 64, 32))


def outcome(function: Callable[..., Any], tensors: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs, and the gradient of every tensor for a fixed random readout."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    found = function(*tensors)
    outputs = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator().manual_seed(seed)
    sum((o.double() * torch.randn(o.shape, generator=generator)).sum() for o in outputs).backward()
    return [o.detach() for o in outputs] + [t.grad for t in tensors if t.grad is not None]


def compare(op: Any, tensors: list[Tensor], no_worse: Any, *options: Any) -> None:
    ours = outcome(lambda *t: op(*t, *options), tensors)
    plain = outcome(lambda *t: op.reference(*t, *options), tensors)
    truth = outcome(lambda *t: op.reference(*t, *options), [t.double() for t in tensors])
    assert len(ours) == len(plain) == len(truth)
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.dtype == b.dtype
        no_worse(f"tensor {i}", a, b, c, tensors[0].dtype)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which compiled operations were called."""
    calls: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(kernels(), name)

    monkeypatch.setattr(pointwise, "_compiled", Spy)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("offset", "added"), [(0.0, False), (1.0, False), (0.0, True)])
def test_rms_norm(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float, added: bool, no_worse: Any, taken: list[str]
) -> None:
    x, residual = (torch.randn(shape).mul(3).to(dtype) for _ in range(2))
    weight = torch.rand(shape[-1]) + 0.5

    class Norm:
        def __call__(self, x: Tensor, weight: Tensor, *residual: Tensor) -> Any:
            y, s = rms_norm(x, weight, 1e-5, offset, *residual)
            return (y, s) if added else y

        def reference(self, x: Tensor, weight: Tensor, *residual: Tensor) -> Any:
            y, s = rms_norm.reference(x, weight, 1e-5, offset, *residual)
            return (y, s) if added else y

    compare(Norm(), [x, weight, *([residual] if added else [])], no_worse)
    assert taken == ["rms_norm_forward", "rms_norm_backward"]


@pytest.mark.parametrize("residual", [None, torch.ones(3, 8)])
@pytest.mark.parametrize("read", [0, 1])
def test_an_output_that_nobody_reads(read: int, residual: Tensor | None) -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    ours, plain = (
        torch.autograd.grad(op(x, weight, 1e-5, 0.0, residual)[read].sin().sum(), (x, weight), allow_unused=True)
        for op in (rms_norm, rms_norm.reference)
    )
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(shape: tuple[int, ...], dtype: torch.dtype, activation: str, no_worse: Any, taken: list[str]) -> None:
    compare(gated, [torch.randn(shape).mul(4).to(dtype) for _ in range(2)], no_worse, activation)
    assert taken == ["gated_forward", "gated_backward"]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_far_out(activation: str) -> None:
    far = torch.tensor([-1e30, -3e4, -200.0, -130.0, 130.0, 3e4, 1e30])
    value, by_gate, by_up = outcome(lambda gate, up: gated(gate, up, activation), [far, torch.ones(7)])
    readout = torch.randn(7, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(value, far.clamp(min=0))
    assert torch.allclose(by_gate, readout * (far > 0)) and torch.allclose(by_up, readout * far.clamp(min=0))
    value, *_ = outcome(lambda gate: gated(gate, torch.ones(2), activation), [torch.tensor([float("nan"), 1.0])])
    assert value.isnan().tolist() == [True, False], "what is no number stays so"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "keys", "tokens", "size", "pairs"), HEADS)
@pytest.mark.parametrize("by_token", [True, False])
def test_rope(
    heads: int, keys: int, tokens: int, size: int, pairs: int, by_token: bool, dtype: torch.dtype, no_worse: Any
) -> None:
    shapes = ((tokens, n, size) if by_token else (n, tokens, size) for n in (heads, keys))
    q, k = (torch.randn(shape).to(dtype) for shape in shapes)
    angles = torch.rand(50, 2 * pairs) * 7
    positions = torch.randint(0, 50, (tokens,))

    class Turned:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __call__(self, q: Tensor, k: Tensor) -> Any:
            q, k = (x.transpose(0, 1) if by_token else x for x in (q, k))
            return self.function(q, k, angles.cos(), angles.sin(), positions)

        def reference(self, q: Tensor, k: Tensor) -> Any:
            return Turned(rope.reference)(q, k)

    compare(Turned(rope), [q, k], no_worse)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(200, 72), torch.rand(72)
    gate, up = torch.randn(2, 40_000)
    torch.set_num_threads(1)
    one = [*outcome(lambda x, w: rms_norm(x, w, 1e-5)[0], [x, weight]), *outcome(gated, [gate, up])]
    torch.set_num_threads(threads)
    more = [*outcome(lambda x, w: rms_norm(x, w, 1e-5)[0], [x, weight]), *outcome(gated, [gate, up])]
    assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    monkeypatch.setenv("TRUETUNE_OFF", "native_pointwise")
    x = torch.randn(3, 8)
    gated(x, x)
    rms_norm(x, x[0], 1e-5)
    rope(x[None], x[None], x[:, :4], x[:, :4], torch.arange(3))
    assert not taken
    monkeypatch.setenv("TRUETUNE_OFF", "native_pointwize")
    with pytest.raises(UserError, match="no fast path"):
        gated(x, x)


def test_what_it_can_not_do_is_the_references(taken: list[str]) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    gated(x, x)
    rms_norm(x, x[0], 1e-5)
    gated(x.float(), x.float(), "gelu")
    gated(x.float(), x.bfloat16())
    assert not taken


def test_what_a_rotation_keeps_is_autograds_to_count() -> None:
    """Or else what layers keep (``models.recompute``) is measured wrongly."""
    kept: list[int] = []
    x, tables = torch.randn(2, 5, 8, requires_grad=True), [torch.randn(5, 8, dtype=torch.bfloat16) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        pointwise.Rope.apply(x, *tables)
    assert kept == [5 * 8 * 4] * 2
