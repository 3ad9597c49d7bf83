"""Symmetric products and what is made of them, in blocks on a CPU: at most twice the error of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels.newton_schulz import newton_schulz
from truetune.kernels.symmetric import BLOCK, symmetric

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
ROWS = (1, BLOCK - 1, BLOCK, 2 * BLOCK + 7)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@DTYPES
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tall", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
def test_blocks_below_the_diagonal_are_the_whole_product(
    dtype: torch.dtype, rows: int, tall: bool, added: bool, no_worse: Any
) -> None:
    x = random(2, 33, rows).to(dtype).mT if tall else random(2, rows, 33).to(dtype)
    d = random(2, rows, rows)
    d = (d + d.mT).to(dtype) if added else None
    ours, plain = symmetric(x, d, 2.0, -4.0), symmetric.reference(x, d, 2.0, -4.0)
    truth = symmetric.reference(x.double(), None if d is None else d.double(), 2.0, -4.0)
    no_worse("product", ours, plain, truth, dtype)
    assert ours.dtype == dtype


@DTYPES
@pytest.mark.parametrize("shape", [(2, 7, 100), (1, 100, 7), (1, 2 * BLOCK + 7, 500), (2, 300, 2 * BLOCK + 7)], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "turned"])
@pytest.mark.parametrize("off", ["", "native_products"])
def test_newton_schulz_of_one_matrix_after_the_other(
    dtype: torch.dtype, shape: tuple[int, ...], off: str, turned: bool, no_worse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUETUNE_OFF", off)
    x = random(*shape).to(dtype)
    x = x.mT if turned else x
    truth = newton_schulz.reference(x.double())
    no_worse("matrices", newton_schulz(x), newton_schulz.reference(x), truth, dtype)
