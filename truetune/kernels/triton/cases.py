"""Arguments for each operation that has a kernel: what tests, the compiler and timing call it with.

A function per operation, of its name, from sizes and options to a ``Case``. Tensors are random, on whichever device is
asked for; on "meta" they have shapes alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from truetune.kernels.gated import Activation


class Case(NamedTuple):
    """arguments: of the operation, by name; trained: those of them that get a gradient."""

    arguments: dict[str, Any]
    trained: tuple[str, ...] = ()


def _normal(dtype: torch.dtype, device: str, *shape: int, spread: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * spread).to(dtype)


def rms_norm(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    rows: int = 512,
    width: int = 1024,
    residual: bool = False,
    offset: float = 0.0,
) -> Case:
    x, weight = _normal(dtype, device, rows, width), _normal(dtype, device, width)
    other = _normal(dtype, device, rows, width) if residual else None
    arguments = {"x": x, "weight_D": weight, "eps": 1e-6, "offset": offset, "residual": other}
    return Case(arguments, ("x", "weight_D", *(["residual"] if residual else [])))


def rope(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    tokens: int = 512,
    heads: int = 8,
    keys: int = 2,
    head_size: int = 64,
    rotated: float = 1.0,
    interleaved: bool = False,
) -> Case:
    pairs = int(head_size * rotated) // 2
    angles = torch.outer(torch.arange(2.0 * tokens), 10000.0 ** (-torch.arange(pairs) / pairs)).to(device)
    q, k = (_normal(dtype, device, tokens, h, head_size).transpose(0, 1) for h in (heads, keys))
    positions = torch.randint(0, 2 * tokens, (tokens,), device=device)
    tables = {"cos_PR": angles.cos(), "sin_PR": angles.sin(), "positions_T": positions}
    return Case({"q_HTd": q, "k_KTd": k, **tables, "interleaved": interleaved}, ("q_HTd", "k_KTd"))


def gated(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    rows: int = 512,
    width: int = 1024,
    activation: Activation = "silu",
) -> Case:
    gate, up = _normal(dtype, device, rows, width, spread=3.0), _normal(dtype, device, rows, width)
    return Case({"gate": gate, "up": up, "activation": activation}, ("gate", "up"))


def linear_cross_entropy(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    rows: int = 512,
    width: int = 896,
    vocabulary: int = 4096,
    bias: bool = False,
    weighted: bool = False,
    frozen: bool = False,
    **options: float,
) -> Case:
    """frozen: the head gets no gradient; options: those of the operation."""
    hidden, head = _normal(dtype, device, rows, width), _normal(dtype, device, vocabulary, width, spread=3 / width**0.5)
    arguments = {
        "hidden_ND": hidden,
        "weight_VD": head,
        "labels_N": torch.randint(0, vocabulary, (rows,), device=device),
        "bias_V": _normal(dtype, device, vocabulary) if bias else None,
        "weights_N": torch.rand(rows, device=device) * 3 if weighted else None,
    }
    trained = ("hidden_ND",) if frozen else ("hidden_ND", "weight_VD", *(["bias_V"] if bias else []))
    return Case(arguments | options, trained)
