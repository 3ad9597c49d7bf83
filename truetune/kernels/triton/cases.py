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
    """arguments: of the operation, by name; trained: those of them that get a gradient; changed: lists of tensors that
    are written to, for an operation that returns nothing."""

    arguments: dict[str, Any]
    trained: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


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
    positioned: bool = True,
    interleaved: bool = False,
) -> Case:
    pairs = int(head_size * rotated) // 2
    angles = torch.outer(torch.arange((1.0 + positioned) * tokens), 10000.0 ** (-torch.arange(pairs) / pairs))
    angles = torch.cat([angles, angles + 0.3], -1).to(
        device
    )  # halves that differ, so that neither stands for the other
    q, k = (_normal(dtype, device, tokens, h, head_size).transpose(0, 1) for h in (heads, keys))
    positions = torch.randint(0, 2 * tokens, (tokens,), device=device) if positioned else None
    tables = {"cos_PW": angles.cos(), "sin_PW": angles.sin(), "positions_T": positions}
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


def packed_attention(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    lengths: tuple[int, ...] = (300, 1, 211),
    heads: int = 4,
    keys: int = 2,
    head_size: int = 64,
    value_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Case:
    sizes = {"q_HTd": (heads, head_size), "k_KTd": (keys, head_size), "v_KTe": (keys, value_size or head_size)}
    tokens = sum(lengths)
    tensors = {name: _normal(dtype, device, tokens, h, d).transpose(0, 1) for name, (h, d) in sizes.items()}
    options = {"lengths": lengths, "scale": head_size**-0.5, "window": window, "softcap": softcap}
    return Case(tensors | options, tuple(tensors))


def lora_linear(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    rows: int = 512,
    inputs: int = 896,
    outputs: int = 1024,
    rank: int = 16,
    bias: bool = False,
) -> Case:
    shapes = {"x": (rows, inputs), "weight_OI": (outputs, inputs), "a_RI": (rank, inputs), "b_OR": (outputs, rank)}
    tensors = {name: _normal(dtype, device, *shape, spread=shape[-1] ** -0.25) for name, shape in shapes.items()}
    options = {"bias_O": _normal(dtype, device, outputs) if bias else None, "scaling": 2.0}
    return Case(tensors | options, ("x", "a_RI", "b_OR"))


def newton_schulz(
    dtype: torch.dtype, device: str = "cpu", *, matrices: int = 4, rows: int = 512, columns: int = 1024, steps: int = 5
) -> Case:
    return Case({"matrices_BMN": _normal(dtype, device, matrices, rows, columns), "steps": steps})


_ADAMW = {"rate": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


def _weights(dtype: torch.dtype, device: str, sizes: tuple[int, ...]) -> dict[str, list[Tensor]]:
    """Weights so small that an update is many steps of bf16, and their gradients."""
    spreads = {"parameters": 0.01, "gradients": 1.0}
    return {name: [_normal(dtype, device, n, spread=spread) for n in sizes] for name, spread in spreads.items()}


def _seeds(sizes: tuple[int, ...]) -> list[int]:
    return [3 * i + 1 for i in range(len(sizes))]


def adamw(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    sizes: tuple[int, ...] = (4096, 1000, 1),
    step: int = 3,
    weight_decay: float = 0.1,
    rounded: bool = False,
    counted: bool = False,
    held: float | None = None,
) -> Case:
    """rounded: at random; counted: by the device, each parameter for itself; held: what the device is told."""
    means = [_normal(torch.float32, device, n, spread=0.1) for n in sizes]
    states = {"means": means, "variances": [_normal(torch.float32, device, n).square() for n in sizes]}
    options: dict[str, Any] = {"weight_decay": weight_decay, "step": step}
    if counted:
        options["step"] = torch.arange(1.0, len(sizes) + 1, device=device)
    options["seeds"] = _seeds(sizes) if rounded else None
    options["held"] = None if held is None else torch.full((), held, device=device)
    return Case(_weights(dtype, device, sizes) | states | _ADAMW | options, changed=("parameters", *states))


def adamw_8bit(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    sizes: tuple[int, ...] = (4096, 1000, 1),
    step: int = 3,
    weight_decay: float = 0.1,
    block: int = 256,
    rounded: bool = False,
) -> Case:
    states: dict[str, list[Tensor]] = {}
    for moment, spread in (("mean", 0.1), ("variance", 1.0)):
        shapes = [(-(-n // block), block) for n in sizes]
        codes = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in shapes]
        scales = [_normal(torch.float32, device, blocks, spread=spread).abs() for blocks, _ in shapes]
        states |= {f"{moment}_codes": codes, f"{moment}_scales": scales}
    options = {"weight_decay": weight_decay, "step": step, "seeds": _seeds(sizes) if rounded else None}
    return Case(_weights(dtype, device, sizes) | states | _ADAMW | options, changed=("parameters", *states))
