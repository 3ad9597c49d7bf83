"""The adapter over a base in 8 bits: whole numbers exactly, the rest within the quantisation's own step of float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels import int8_linear
from truetune.kernels.int8_linear import GROUP, Packed, int8_lora_linears, pack, quantize, quantize_weight
from truetune.kernels.lora_linear import Layer
from truetune.kernels.native.build import SOURCES, kernels, load

pytestmark = pytest.mark.skipif(
    not int8_linear.available(torch.device("cpu")), reason="no compiled products of bytes on this machine"
)

SHAPES = ((1, 8, 8, 2), (7, 100, 33, 3), (13, 65, 130, 16), (50, 64, 192, 8), (3, 700, 70, 1))
"""Tokens, inputs, outputs, rank."""
DTYPES = (torch.float32, torch.bfloat16)
SCALING = 1.7


@pytest.fixture(params=["native", "plain"])
def compiled(request: pytest.FixtureRequest) -> Any:
    return kernels() if request.param == "native" else load(SOURCES, "truetune_plain", ("-DTRUETUNE_PLAIN",))


def compiled_op(x: Tensor, *parts: Any) -> Tensor:
    """One layer: weight, bias, a, b, scaling, packed."""
    return int8_lora_linears(x, [Layer(*parts[:-1])], parts[-1:])[0]


def reference(x: Tensor, *parts: Any) -> Tensor:
    return int8_lora_linears.reference(x, [Layer(*parts[:-1])], parts[-1:])[0]


def inputs(tokens: int, width: int, out: int, rank: int, dtype: torch.dtype, bias: bool = True) -> list[Any]:
    x = torch.randn(tokens, width).mul(torch.rand(tokens, 1) * 3).to(dtype).requires_grad_()
    weight = torch.randn(out, width).mul(torch.rand(out, 1)).to(dtype)
    a, b = torch.randn(rank, width).requires_grad_(), torch.randn(out, rank).requires_grad_()
    return [x, weight, torch.randn(out).to(dtype) if bias else None, a, b]


def results(op: Callable[..., Tensor], tensors: list[Any]) -> dict[str, Tensor]:
    """Output, and gradients for a fixed readout."""
    y = op(*tensors, SCALING, pack(tensors[1]))
    x, _, _, a, b = tensors
    readout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(y, (x, a, b), readout.to(y.dtype))
    return dict(zip(("y", "x", "a", "b"), (y.detach(), *gradients), strict=True)) | {"readout": readout}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 100), (40, 576), (3, 15)])
def test_rows_are_quantised_as_the_reference_does(
    tokens: int, width: int, weighted: bool, dtype: torch.dtype, compiled: Any
) -> None:
    x = torch.randn(tokens, width).mul(3).to(dtype)
    x[0] = 0
    columns = torch.rand(width) + 0.5 if weighted else None
    values, scales, sums = compiled.int8_quantize(x, columns)
    known, known_scales = quantize(x, columns)
    assert torch.equal(values[:, :width].double(), known) and not values[:, width:].any()
    groups = torch.nn.functional.pad(known, (0, -width % GROUP)).view(tokens, -1, GROUP)
    assert torch.equal(scales, known_scales) and torch.equal(sums.double(), groups.sum(2))
    assert groups.abs().amax(2).tolist() == [[127 * (row > 0)] * groups.shape[1] for row in range(tokens)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_multiplied_exactly(shape: tuple[int, ...], compiled: Any) -> None:
    tokens, width, out, _ = shape
    values = torch.randint(-127, 128, (tokens, -(-width // 4) * 4), dtype=torch.int8)
    values[:, width:] = 0
    weight = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    packed = compiled.int8_pack(weight)
    up = torch.zeros(packed.shape[0] * packed.shape[2], 0, dtype=torch.int32)
    sums = torch.nn.functional.pad(values, (0, -values.shape[1] % GROUP)).view(tokens, -1, GROUP).sum(2).int()
    low = torch.zeros(tokens, 0, dtype=torch.int32)
    y = compiled.int8_product(values, torch.ones_like(sums).float(), sums, packed, out, None, None, low, up, False)
    assert torch.equal(y.double(), values[:, :width].double() @ weight.double().T)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference_and_float64_within_a_step(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    tensors = inputs(*shape, dtype, bias)
    ours, plain = results(compiled_op, tensors), results(reference, tensors)
    for name, truth in plain.items():
        assert ours[name].dtype == truth.dtype and ours[name].shape == truth.shape
        step = torch.finfo(dtype).eps * float(truth.abs().max()) if truth.numel() else 0
        assert torch.allclose(ours[name].double(), truth.double(), rtol=0, atol=2 * step), name
    x, weight, bias_O, a, b = (None if t is None else t.detach().double() for t in tensors)
    y = x @ weight.T + (0 if bias_O is None else bias_O) + SCALING * x @ a.T @ b.T
    # Each factor is off by at most half of its row's step, and the adapter's parts by roundings of dtype.
    of_x, of_weight = (t.abs().amax(1) / 127 for t in (x, weight))
    sums_T, sums_O = x.abs().sum(1), weight.abs().sum(1)
    allowed = of_x[:, None] / 2 * sums_O + of_weight / 2 * (sums_T + shape[1] * of_x / 2)[:, None]
    size = x.abs() @ weight.abs().T + SCALING * x.abs() @ a.abs().T @ b.abs().T + 4
    off = (ours["y"].double() - y).abs()
    assert (off <= allowed + 4 * torch.finfo(dtype).eps * size).all()
    assert off.norm() > 1e-5 * y.norm(), "some of it is lost"


@pytest.mark.parametrize("op", [compiled_op, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_so(strange: float, op: Callable[..., Tensor]) -> None:
    x, weight, _, a, b = inputs(9, 40, 20, 2, torch.bfloat16)
    with torch.no_grad():
        x[4, 7] = strange
        a[:, 7] = 0
    y = op(x, weight, None, a, b, SCALING, pack(weight))
    assert y.isnan().any(1).tolist() == y.isnan().all(1).tolist() == [row == 4 for row in range(9)]
    dy = torch.ones_like(y)
    dy[2, 3] = strange
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.isnan().all(1)[2] and dx.isfinite().all(1)[[0, 1, 3, 5]].all()


@pytest.mark.parametrize("op", [compiled_op, reference], ids=["compiled", "reference"])
def test_an_outlier_costs_its_own_token_alone(op: Callable[..., Tensor]) -> None:
    x, weight, _, a, b = inputs(5, 64, 32, 2, torch.float32)
    before = op(x, weight, None, a, b, SCALING, pack(weight))
    with torch.no_grad():
        x[3, 5] = 1e30
        x[1] = 0
    after = op(x, weight, None, a, b, SCALING, pack(weight))
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]]) and not after[1].any() and after.isfinite().all()
    alone = x.detach()[3, 5].double() * (weight[:, 5].double() + SCALING * (b @ a[:, 5]).detach().double())
    assert torch.allclose(after[3].detach().double(), alone, rtol=0, atol=1e-2 * float(alone.abs().max()))


def test_an_outlier_costs_its_own_group_alone(compiled: Any) -> None:
    x = torch.randn(3, 3 * GROUP)
    before, *_ = compiled.int8_quantize(x, None)
    x[:, GROUP + 5] = 1e4
    after, *_ = compiled.int8_quantize(x, None)
    same = (before == after).view(3, 3, GROUP).all(2)
    assert same.tolist() == [[True, False, True]] * 3 and after[:, GROUP : 2 * GROUP].count_nonzero() == 3


def test_a_weight_of_zeros_and_tiny_rows_are_zero() -> None:
    x, weight, _, a, b = inputs(3, 16, 8, 2, torch.float32)
    values, scale = quantize_weight(torch.zeros_like(weight))
    assert not values.any() and not scale.any()
    with torch.no_grad():
        x.copy_(torch.full_like(x, 1e-39))
    assert not compiled_op(x, weight, None, a * 0, b, SCALING, pack(weight)).any()


def test_two_threads_and_a_batch_change_nothing() -> None:
    tensors = inputs(300, 96, 200, 4, torch.bfloat16)
    one = results(compiled_op, tensors)
    torch.set_num_threads(2)
    two = results(compiled_op, tensors)
    assert all(torch.equal(one[name], two[name]) for name in one)
    x, *rest = tensors
    shaped = compiled_op(x.view(2, 150, 96), *rest, SCALING, pack(rest[0]))
    assert shaped.shape == (2, 150, 200) and torch.equal(shaped.view(300, 200), one["y"])


@pytest.mark.parametrize("op", [int8_lora_linears, int8_lora_linears.reference], ids=["compiled", "reference"])
def test_layers_of_one_input_are_each_as_alone(op: Any) -> None:
    x, *first = inputs(9, 300, 70, 3, torch.float32)
    layers = [Layer(*first, SCALING)] + [Layer(*inputs(9, 300, n, 2, torch.float32)[1:], 0.5) for n in (40, 130)]
    together = op(x, layers, [pack(layer.weight) for layer in layers])
    alone = [op(x, [layer], [pack(layer.weight)])[0] for layer in layers]
    wanted = [x, *(f for layer in layers for f in (layer.a, layer.b))]
    readouts = [torch.randn_like(y) for y in alone]
    ours, theirs = ([*ys, *torch.autograd.grad(ys, wanted, readouts)] for ys in (together, alone))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.detach().abs().max()))


def test_a_trained_base_is_refused() -> None:
    tensors = inputs(2, 8, 8, 2, torch.float32)
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="freeze them first"):
        compiled_op(*tensors, SCALING, Packed(*pack(tensors[1].detach())))
