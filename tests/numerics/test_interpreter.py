"""The interpreter that kernels are tried in computes what a GPU would: casts, products of tiles, counts of bytes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpreted import exact, rounded, widened
from torch import Tensor


@triton.jit
def cast(source, target, ELEMENTS: tl.constexpr):
    place = tl.arange(0, ELEMENTS)
    tl.store(target + place, tl.load(source + place))


@triton.jit
def product(a, b, c, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    place = row * SIZE + column
    tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place), input_precision=PRECISION))


@triton.jit
def doubled(source, target, ELEMENTS: tl.constexpr):
    place = tl.arange(0, ELEMENTS)
    x = tl.load(source + place)
    tl.store(target + place, x + x)


def hard_values() -> Tensor:
    edges = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -1e-40, float("inf"), float("-inf"), float("nan")]
    return torch.cat([torch.tensor(edges), torch.randn(1014) * 10.0 ** torch.randint(-30, 30, (1014,))])


def test_casts_round_as_torch_does() -> None:
    values = hard_values()
    bf16 = torch.empty(1024, dtype=torch.bfloat16)
    back = torch.empty(1024)
    with exact():
        cast[(1,)](values, bf16, 1024)
        cast[(1,)](bf16, back, 1024)
    torch.testing.assert_close(bf16, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    assert (widened(rounded(values[:9].numpy())) == values[:9].bfloat16().float().numpy()).all()


def test_without_the_patch_casts_and_products_are_wrong() -> None:
    values = hard_values()
    bf16 = torch.empty(1024, dtype=torch.bfloat16)
    cast[(1,)](values, bf16, 1024)
    assert not torch.equal(bf16[10:], values[10:].bfloat16())


def test_products_of_tiles_are_summed_in_fp32() -> None:
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    c = torch.empty(32, 32)
    with exact() as traffic:
        product[(1,)](a, b, c, 32, "ieee")
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    assert (traffic.loaded, traffic.stored) == (2 * 32 * 32 * 2, 32 * 32 * 4)


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("ieee", 0, 1e-7), ("tf32x3", 1e-9, 1e-6), ("tf32", 1e-5, 1e-3)]
)
def test_products_of_fp32_are_as_exact_as_asked(precision: str, least: float, most: float) -> None:
    a, b = (torch.randn(32, 32) for _ in range(2))
    c = torch.empty(32, 32)
    with exact():
        product[(1,)](a, b, c, 32, precision)
    truth = a.double() @ b.double()
    assert least < (c - truth).norm() / truth.norm() < most


def test_arithmetic_on_bf16_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with exact(), pytest.raises(Exception, match="cast to fp32 first"):
        doubled[(1,)](x, x, 16)
