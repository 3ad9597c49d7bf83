"""The adapter over a base in 4 bits: packed as the paper has it, and computed as with the weights that are left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels import nf4_linear
from truetune.kernels.lora_linear import Layer, lora_linears
from truetune.kernels.nf4_linear import levels, nf4_lora_linears, pack, rounded, unpack

pytestmark = pytest.mark.skipif(not nf4_linear.available(), reason="no bitsandbytes")

SHAPES = ((1, 8, 8, 2), (7, 100, 33, 3), (13, 65, 130, 16), (5, 7, 33, 4), (50, 64, 192, 8))
"""Tokens, inputs, outputs, rank; not all weights fill their last block, or a byte."""
DTYPES = (torch.float32, torch.bfloat16)
SCALING = 1.7


def weight_of(out: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(out, width).mul(torch.rand(out, 1) * 3).to(dtype)


def test_the_levels_are_those_of_the_library() -> None:
    import bitsandbytes.functional as library

    assert torch.allclose(levels(), library.get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-6)
    assert len(levels()) == 16 and levels().tolist() == sorted(levels().tolist()) and 0.0 in levels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), [(64, 64), (32, 32), (48, 80), (33, 7), (1, 1), (1, 2), (130, 65)])
def test_weights_become_the_nearest_levels(out: int, width: int, dtype: torch.dtype) -> None:
    weight = weight_of(out, width, dtype)
    found = unpack(pack(weight), torch.float32)
    assert found.shape == weight.shape and found.dtype == torch.float32
    assert torch.allclose(found, rounded(weight), rtol=1e-5, atol=0)
    assert torch.equal(unpack(pack(weight), torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_nothing_and_one_with_an_outlier(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 64, dtype=dtype)
    weight[1, 5], weight[2] = -1000.0, 0.5
    for found in (unpack(pack(weight), torch.float32), rounded(weight)):
        assert torch.equal(found, weight.float())


@pytest.mark.parametrize("shape", [(64, 64), (33, 65)])
def test_half_a_byte_and_a_scale_for_64(shape: tuple[int, int]) -> None:
    packed = pack(torch.randn(shape).bfloat16())
    count = shape[0] * shape[1]
    assert packed.codes.nbytes == 32 * -(-count // 64) and packed.scale_N.nbytes == 4 * -(-count // 64)


def results(op: Callable[[Tensor, list[Layer]], tuple[Tensor, ...]], x: Tensor, layers: list[Layer]) -> dict[str, Any]:
    """Outputs, and gradients for a fixed readout, of layers that read x together."""
    outputs = op(x, layers)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(layers))]
    readouts = [
        torch.randn(y.shape, generator=seed).bfloat16().to(y.dtype) for y, seed in zip(outputs, seeds, strict=True)
    ]
    trained = {"x": x} | {f"{k}{i}": getattr(layer, k) for i, layer in enumerate(layers) for k in "ab"}
    gradients = torch.autograd.grad(outputs, list(trained.values()), readouts)
    return {f"y{i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(trained, gradients, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_the_formula_over_what_is_left(
    shape: tuple[int, ...], dtype: torch.dtype, autocast: bool, no_worse: Any
) -> None:
    tokens, width, out, rank = shape
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    layers = [
        Layer(
            weight_of(n, width, dtype),
            torch.randn(n).to(dtype) if bias else None,
            torch.randn(rank, width).requires_grad_(),
            torch.randn(n, rank).requires_grad_(),
            SCALING,
        )
        for n, bias in ((out, True), (2 * out, False))
    ]
    packed = [pack(layer.weight) for layer in layers]

    def over(dtype: torch.dtype) -> list[Layer]:
        """The layers with the weights that are left, in ``dtype``."""
        return [
            layer._replace(weight=unpack(p, torch.float32).to(dtype), bias=None if b is None else b.to(dtype))
            for layer, p, b in zip(layers, packed, (layer.bias for layer in layers), strict=True)
        ]

    doubled = [
        layer._replace(a=layer.a.detach().double().requires_grad_(), b=layer.b.detach().double().requires_grad_())
        for layer in over(torch.float64)
    ]
    truth = results(lora_linears.reference, x.detach().double().requires_grad_(), doubled)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        ours = results(lambda x, parts: nf4_lora_linears(x, parts, packed), x, layers)
        plain = results(lora_linears.reference, x, over(dtype))
        reference = results(lambda x, parts: nf4_lora_linears.reference(x, parts, []), x, layers)
    computed = torch.bfloat16 if autocast else dtype
    for name in truth:
        assert ours[name].dtype == plain[name].dtype
        no_worse(name, ours[name], plain[name], truth[name], computed)
        no_worse(name, reference[name], plain[name], truth[name], computed)


def test_nothing_of_the_weight_is_kept_for_the_backward() -> None:
    x, weight = torch.randn(4, 64).requires_grad_(), torch.randn(96, 64)
    layer = Layer(weight, None, torch.randn(2, 64).requires_grad_(), torch.randn(96, 2).requires_grad_(), 1.0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4_lora_linears(x, [layer], [pack(weight)])[0].sum().backward()
    assert kept and max(t.numel() for t in kept) < weight.numel()
