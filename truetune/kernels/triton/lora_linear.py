"""A frozen linear layer with a LoRA adapter: the adapter's product is added while the large one is still in registers.

    y = x W^T + b + low up^T

Forward low = x A^T and up = s B; backward, for dx, x is dy, W is transposed, low = s dy B and up = A^T. So what torch
does in two passes over [T, O] is written once. The small products (low, dA, dB) are torch's.
Shape suffixes: T rows of x, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from truetune.kernels.lora_linear import Layer, Ways, through
from truetune.kernels.triton.launch import launch


@triton.jit
def linear_with_low(
    x, weight, bias, low, up, y, rows, inputs, outputs, rank, x_row, x_column, weight_out, weight_in, up_out, up_rank,
    R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    of_rows, of_outputs = (row < rows)[:, None], (output < outputs)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, inputs, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        tile_x = tl.load(x + row[:, None] * x_row + i[None, :] * x_column, of_rows & (i < inputs)[None, :], 0.0)
        place = output[None, :] * weight_out + i[:, None] * weight_in
        tile_w = tl.load(weight + place, of_outputs & (i < inputs)[:, None], 0.0)
        total = tl.dot(tile_x, tile_w, total, input_precision=PRECISION)
    r = tl.arange(0, R)
    tile_low = tl.load(low + row[:, None] * rank + r[None, :], of_rows & (r < rank)[None, :], 0.0)
    tile_up = tl.load(up + output[None, :] * up_out + r[:, None] * up_rank, of_outputs & (r < rank)[:, None], 0.0)
    total = tl.dot(tile_low, tile_up, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * outputs + output[None, :], total, of_rows & of_outputs)


def _product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, low_TR: Tensor, up_OR: Tensor) -> Tensor:
    (rows, inputs), (outputs, rank) = x_TI.shape, up_OR.shape
    y_TO = x_TI.new_empty(rows, outputs)
    launch(
        linear_with_low,
        lambda tiles: (triton.cdiv(rows, tiles["BLOCK_T"]), triton.cdiv(outputs, tiles["BLOCK_O"])),
        *(x_TI, weight_OI, bias_O, low_TR.contiguous(), up_OR, y_TO, rows, inputs, outputs, rank),
        *(*x_TI.stride(), *weight_OI.stride(), *up_OR.stride()),
        dtype=x_TI.dtype,
        R=max(16, triton.next_power_of_2(rank)),
    )
    return y_TO


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    return through(Ways([_product], _back), x, [Layer(weight_OI, bias_O, a_RI, b_OR, scaling)])[0]


def _back(
    grads: Sequence[Tensor], weights: Sequence[Tensor], grad_low_TR: Tensor, a_RI: Tensor, _: torch.dtype
) -> Tensor:
    return _product(grads[0], weights[0].T, None, grad_low_TR, a_RI.T)
