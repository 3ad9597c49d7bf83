"""Triton's interpreter, made exact in bf16, and what it loads and stores counted.

As published it keeps bf16 as the integers of its bits: products of bf16 tiles and roundings to bf16 come out wrong, and
sums of bf16 are sums of integers. Here casts round to the nearest even. Products of tiles are taken in fp32, of parts
of 10 bits where a kernel asks for those ("tf32", "tf32x3"). Arithmetic on bf16 that was not cast up is an error: a GPU
would round after each step. These are private names of one version of Triton, which ``constraints.txt`` pins;
``test_interpreter.py`` tests the patch itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

CASTS = (
    *("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui"),
    *("create_fp_ext", "create_fp_trunc", "create_fp_to_fp", "cast_impl"),
)


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 as its bits -> fp32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of the nearest bf16, the even one of two."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _plain(handle: TensorHandle) -> np.ndarray:
    return widened(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _cast(self: InterpreterBuilder, source: TensorHandle, target: Any, *_: Any) -> TensorHandle:
    data = _plain(source)
    if target.scalar == tl.bfloat16:
        return TensorHandle(rounded(data.astype(np.float32)), tl.bfloat16)
    return TensorHandle(data.astype(_get_np_dtype(target)), target.scalar)


def tf32(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to the 10 bits of mantissa that tensor cores multiply."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(self: InterpreterBuilder, a: Any, b: Any, d: Any, precision: Any, *_: Any) -> TensorHandle:
    x, y = _plain(a), _plain(b)
    if x.dtype == np.float32 and precision != ir.INPUT_PRECISION.IEEE and a.dtype.scalar != tl.bfloat16:
        x_high, y_high = tf32(x), tf32(y)
        product = x_high @ y_high
        if precision == ir.INPUT_PRECISION.TF32x3:
            product = product + (x_high @ tf32(y - y_high) + tf32(x - x_high) @ y_high)
    else:
        product = np.matmul(x, y, dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _refusing(operation: Any) -> Any:
    def checked(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if any(isinstance(o, TensorHandle) and o.dtype.scalar == tl.bfloat16 for o in operands):
            raise TypeError("arithmetic on bf16 rounds after each step; cast to fp32 first")
        return operation(self, *operands)

    return checked


class Traffic:
    """Bytes that kernels loaded and stored, each element as often as it was."""

    loaded = stored = 0


@contextlib.contextmanager
def exact() -> Iterator[Traffic]:
    """The interpreter with the patch in place, for a while."""
    traffic, builder = Traffic(), InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> TensorHandle:
        traffic.loaded += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    changed: dict[str, Any] = dict.fromkeys(CASTS, _cast) | {"create_dot": _dot}
    changed |= {"create_masked_load": counted_load, "create_masked_store": counted_store}
    changed |= {name: _refusing(getattr(builder, name)) for name in ("binary_op", "unary_op", "create_fabs")}
    with mock.patch.multiple(builder, **changed), np.errstate(over="ignore"):
        yield traffic
