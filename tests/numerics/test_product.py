"""Sums of products: compiled for this processor, the same as plain C++, and torch's, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels import product
from truetune.kernels.native.build import SOURCES, kernels, load
from truetune.kernels.product import products

SHAPES = [
    (1, (1,), 1),
    (7, (100,), 15),
    (33, (515,), 72),
    (97, (64, 16), 130),
    (50, (33, 3, 2100), 64),
    (101, (4200, 40), 200),
    (6, (4099,), 1),
]
"""Rows, columns of each pair, outputs."""
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.T.contiguous().T,
    "a part of more": lambda t: torch.cat([t, t.new_full((len(t), 3), torch.nan)], 1)[:, : t.shape[1]],
    "neither": lambda t: torch.stack([t, t.new_full(t.shape, torch.nan)], 2)[..., 0],
}


@pytest.fixture(params=["native", "plain"])
def library(request: pytest.FixtureRequest) -> Any:
    if kernels() is None:
        pytest.skip("nothing is compiled on this machine")
    return kernels() if request.param == "native" else load(SOURCES, "truetune_plain", ("-DTRUETUNE_PLAIN",))


def operands(shape: tuple[int, tuple[int, ...], int]) -> tuple[list[Tensor], list[Tensor]]:
    rows, columns, outputs = shape
    x = [torch.randn(rows, k).bfloat16() for k in columns]
    return x, [torch.randn(outputs, k).div(k**0.5).bfloat16() for k in columns]


def exact(x: list[Tensor], w: list[Tensor], bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum in float64, and that of the terms' sizes, by which rounding is measured."""
    y = sum(a.double() @ b.double().T for a, b in zip(x, w, strict=True))
    size = sum(a.double().abs() @ b.double().abs().T for a, b in zip(x, w, strict=True))
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


@pytest.mark.parametrize("right", list(LAYOUTS)[:3])
@pytest.mark.parametrize("left", list(LAYOUTS)[:3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_rounded_once(shape: Any, left: str, right: str, library: Any) -> None:
    x, w = operands(shape)
    bias, out = torch.randn(shape[2]), torch.empty(shape[0], shape[2])
    library.products([LAYOUTS[left](t) for t in x], [LAYOUTS[right](t) for t in w], bias, out)
    truth, size = exact(x, w, bias)
    assert ((out - truth).abs() <= 2**-20 * size).all()
    rounded = torch.empty_like(out, dtype=torch.bfloat16)
    library.products(x, w, bias, rounded)
    assert ((rounded - truth).abs() <= 2**-8 * truth.abs() + 2**-20 * size).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_is_added_before_it_is_rounded(
    shape: Any, dtype: torch.dtype, out_dtype: torch.dtype, library: Any
) -> None:
    x, w = operands(shape)
    added = LAYOUTS["a part of more"](torch.randn(shape[0], shape[2]).to(dtype))
    out = LAYOUTS["a part of more"](torch.zeros(shape[0], shape[2], dtype=out_dtype))
    library.products(x, w, added, out, 2.0, -3.0)
    product, size = exact(x, w)
    truth, size = 2 * product - 3 * added.double(), 2 * size + 3 * added.double().abs()
    step = 2**-8 if out_dtype == torch.bfloat16 else 0.0
    assert ((out - truth).abs() <= step * truth.abs() + 2**-20 * size).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS)[:3])
@pytest.mark.parametrize("rows", [1, 15, 16, 63, 64, 65, 200])
def test_half_of_a_symmetric_product_is_the_whole(rows: int, layout: str, out_dtype: torch.dtype, library: Any) -> None:
    x, d = LAYOUTS[layout](torch.randn(rows, 4200).bfloat16()), torch.randn(rows, rows)
    whole, out, other = (torch.full((rows, rows), torch.nan, dtype=out_dtype) for _ in range(3))
    library.products([x], [x], d + d.T, whole, 2.0, -3.0)
    library.products([x], [x], d + d.T, out, 2.0, -3.0, True)
    assert torch.equal(out, whole)
    torch.set_num_threads(3)
    library.products([x], [x], d + d.T, other, 2.0, -3.0, True)
    assert torch.equal(out, other)
    above = torch.ones(rows, rows, dtype=torch.bool).triu(16)  # beyond any vector
    library.products([x], [x], (d + d.T).masked_fill(above, torch.nan), other, 2.0, -3.0, True)
    assert torch.equal(out, other)  # nothing is read there


def test_fp32_weights_are_rounded_as_autocast_rounds_them(library: Any) -> None:
    x, _ = operands((33, (515,), 72))
    for weight in (torch.randn(72, 515), torch.randn(515, 72).T):
        found, expected = (torch.empty(33, 72) for _ in range(2))
        library.products(x, [weight], None, found)
        library.products(x, [weight.bfloat16()], None, expected)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
@pytest.mark.parametrize("columns", [515, 5000])
def test_neither_threads_nor_other_rows_change_a_row(columns: int, layout: str, library: Any) -> None:
    (x,), (w,) = operands((301, (columns,), 200))
    w = LAYOUTS[layout](w)
    found = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found[threads] = torch.empty(301, 200, dtype=torch.bfloat16)
        library.products([x], [w], None, found[threads])
    assert torch.equal(found[1], found[3])
    alone = torch.empty(1, 200, dtype=torch.bfloat16)
    library.products([x[250:251]], [w], None, alone)
    assert torch.equal(alone[0], found[1][250])


def test_what_is_no_number_stays_in_its_row_and_output(library: Any) -> None:
    (x,), (w,) = operands((20, (64,), 70))
    x[3, 5], w[40, 6] = torch.nan, torch.inf
    out = torch.empty(20, 70)
    library.products([x], [w], None, out)
    bad = ~out.isfinite()
    assert bad[3].all() and bad[:, 40].all() and int(bad.sum()) == 20 + 70 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operation(layout: str, dtype: torch.dtype) -> None:
    x, w = ([LAYOUTS[layout](t.to(dtype)) for t in tensors] for tensors in operands((33, (64, 16), 72)))
    bias = torch.randn(72).to(dtype)
    truth, size = exact(x, w, bias)
    step = torch.finfo(dtype).eps
    for out in (None, torch.empty(33, 72, dtype=dtype), torch.empty(33, 72)):
        for op in (products, products.reference):
            y = op(x, w, bias, out=out)
            assert y is out or out is None
            assert ((y - truth).abs() <= 4 * max(step, torch.finfo(y.dtype).eps) * size).all()
    assert products(x, w, dtype=torch.float32).dtype == torch.float32


def test_bf16_is_compiled_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels() is None:
        pytest.skip("nothing is compiled on this machine")
    monkeypatch.setattr(product, "instructions", lambda: {"avx512_bf16"})  # what others have in plain code
    x, w = operands((33, (64, 16), 72))
    once, twice = products(x, w), products.reference(x, w)
    assert not torch.equal(once, twice)  # rounded once, and twice
    monkeypatch.setenv("TRUETUNE_OFF", "native_products")
    assert torch.equal(products(x, w), twice)


def test_no_rows_no_outputs_no_columns(library: Any) -> None:
    for rows, columns, outputs in ((0, 8, 8), (8, 8, 0), (8, 0, 8)):
        out = torch.full((rows, outputs), torch.nan)
        library.products([torch.empty(rows, columns).bfloat16()], [torch.empty(outputs, columns).bfloat16()], None, out)
        assert not out.any()
    with pytest.raises(RuntimeError, match="have to be"):
        library.products([torch.zeros(2, 3).bfloat16()], [torch.zeros(2, 4).bfloat16()], None, torch.empty(2, 2))
    x, w = operands((3, (8,), 4))
    for added, out, symmetric, problem in (
        (None, torch.empty(3, 4), True, "has to be square"),
        (torch.zeros(4, 3).T, torch.empty(3, 4), False, "side by side"),
        (None, torch.empty(4, 3).T, False, "side by side"),
        (torch.zeros(3, 4).double(), torch.empty(3, 4), False, "float or bfloat16"),
        (torch.zeros(2, 4), torch.empty(3, 4), False, "expand"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            library.products(x, w, added, out, 1.0, 1.0, symmetric)
