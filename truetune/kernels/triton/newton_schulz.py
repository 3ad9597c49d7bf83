"""The symmetric products of Newton-Schulz iterations, alpha X X^T + beta D: only half of the tiles are computed.

A A is such a product too, since A is symmetric. The remaining product of an iteration, B X, is torch's.
Shape suffixes: B matrices, S rows, L columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from truetune.kernels.newton_schulz import iterate
from truetune.kernels.triton.launch import launch


@triton.jit
def symmetric_product(
    x, added, y, rows, columns, alpha, beta, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, PRECISION: tl.constexpr
):
    if tl.program_id(0) <= tl.program_id(1):
        matrix = tl.program_id(2).to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        other = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        x += matrix * rows * columns
        y += matrix * rows * rows
        total = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
        for start in range(0, columns, BLOCK_L):
            column = start + tl.arange(0, BLOCK_L)
            within = column < columns
            left = tl.load(x + row[:, None] * columns + column[None, :], (row < rows)[:, None] & within[None, :], 0.0)
            right = tl.load(
                x + other[None, :] * columns + column[:, None], (other < rows)[None, :] & within[:, None], 0.0
            )
            total = tl.dot(left, right, total, input_precision=PRECISION)
        inside = (row < rows)[:, None] & (other < rows)[None, :]
        place = row[:, None] * rows + other[None, :]
        total *= alpha
        if added is not None:
            total += beta * tl.load(added + matrix * rows * rows + place, inside, 0.0).to(tl.float32)
        tl.store(y + place, total, inside)
        if tl.program_id(0) < tl.program_id(1):
            tl.store(y + other[None, :] * rows + row[:, None], total, inside)


def _symmetric(x_BSL: Tensor, added_BSS: Tensor | None, alpha: float, beta: float) -> Tensor:
    matrices, rows, columns = x_BSL.shape
    y_BSS = x_BSL.new_empty(matrices, rows, rows)

    def grid(tiles: dict[str, int]) -> tuple[int, ...]:
        blocks = triton.cdiv(rows, tiles["BLOCK_S"])
        return blocks, blocks, matrices

    arguments = (x_BSL, added_BSS, y_BSS, rows, columns, float(alpha), float(beta))
    launch(symmetric_product, grid, *arguments, dtype=x_BSL.dtype)
    return y_BSS


def newton_schulz(matrices_BMN: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    return iterate(matrices_BMN, steps, eps, _symmetric)
