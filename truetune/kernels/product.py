"""Products of matrices that are added up before they are rounded: a weight's and its adapter's, or those of a sum.

    y = sum over i of x_i w_i^T + bias

On CPUs that multiply pairs of bf16 in one instruction, and have no tiles for it (AMX, on which oneDNN is faster), it is
one compiled pass (``native/product.cpp``), whose sums are fp32 and rounded once. Elsewhere it is torch's, one product
onto the other, the last pair first: there a small sum comes before a large one, which would round it away.

Shape suffixes: T rows, K columns that are contracted, of each pair its own, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.kernels.native.build import instructions, kernels
from truetune.kernels.op import Op, is_on


@Op
def products(
    x: list[Tensor],
    w: list[Tensor],
    bias_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x_i [T, K_i] and w_i [N, K_i], of one dtype, in any layout -> y [T, N]. Not differentiable.

    Where ``available``, w_i may be fp32 beside x_i in bf16, to which it is rounded.
    dtype: of y, by default x's. out: filled and returned in place of a new tensor, whose dtype is then y's.
    """
    dtype = out.dtype if out is not None else dtype or x[0].dtype
    whole = out if out is not None and dtype == x[0].dtype else None
    y_TN = torch.mm(x[-1], w[-1].T, out=whole)
    for x_TK, w_NK in zip(x[-2::-1], w[-2::-1], strict=True):
        y_TN.addmm_(x_TK, w_NK.T)
    if bias_N is not None:
        y_TN.add_(bias_N.to(y_TN.dtype))
    return y_TN.to(dtype) if out is None else out if whole is not None else out.copy_(y_TN)


@products.on("cpu")
def _of_bf16(
    x: list[Tensor],
    w: list[Tensor],
    bias_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if not (available() and all(t.dtype == torch.bfloat16 for t in x)):
        return products.reference(x, w, bias_N, dtype, out)
    if out is None:
        out = x[0].new_empty(len(x[0]), len(w[0]), dtype=dtype or x[0].dtype)
    return compiled(x, w, None if bias_N is None else bias_N.float().contiguous(), out)


def compiled(
    x: list[Tensor],
    w: list[Tensor],
    added: Tensor | None,
    out: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    symmetric: bool = False,
) -> Tensor:
    """alpha (sum over i of x_i w_i^T) + beta D in ``out`` [T, N], rounded once; x in bf16, where it is ``available``.

    added: D, [T, N] or [N] in bf16 or fp32, or none. symmetric: y and D are, and about half of y is multiplied.
    Raises RuntimeError for shapes that do not fit, and where elements of a row of D or ``out`` lie apart.
    """
    left, right = [_packed(t) for t in x], [_packed(t) for t in w]
    kernels().products(left, right, added, out, alpha, beta, symmetric)  # type: ignore[union-attr]
    return out


def available() -> bool:
    """Whether bf16 is multiplied by the library, which may have to be compiled first."""
    able = "avx512_bf16" in instructions() and "amx_bf16" not in instructions()
    return able and is_on("native_products") and kernels() is not None


def _packed(t: Tensor) -> Tensor:
    return t if 1 in t.stride() else t.contiguous()
