"""Our own kernels for GPUs, in Triton: one file per operation, all found through one table.

A kernel is right in Triton's interpreter and compiled for real targets before it is timed. None has been timed yet, so
none is chosen on CUDA, where torch's own runs, until ``truetune bench kernels --choose`` has timed it to win on such a
GPU (``choices``). Triton is imported by the kernels' files alone, on first use: without it everything else works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from truetune.kernels.adamw import adamw
from truetune.kernels.adamw_8bit import adamw_8bit
from truetune.kernels.attention import packed_attention
from truetune.kernels.gated import gated
from truetune.kernels.linear_cross_entropy import linear_cross_entropy
from truetune.kernels.lora_linear import lora_linear
from truetune.kernels.newton_schulz import newton_schulz
from truetune.kernels.op import Op, first_tensor
from truetune.kernels.rms_norm import rms_norm
from truetune.kernels.rope import rope

KERNELS: dict[str, Op[..., Any]] = {
    "rms_norm": rms_norm,
    "rope": rope,
    "gated": gated,
    "linear_cross_entropy": linear_cross_entropy,
    "packed_attention": packed_attention,
    "lora_linear": lora_linear,
    "newton_schulz": newton_schulz,
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
}
"""Name -> the operation, whose reference the kernel must equal. Its file and function beside this one are so named."""


def equal(name: str) -> Callable[..., Any]:
    """The kernel with the operation's signature. Raises ModuleNotFoundError where Triton is not installed."""
    function: Callable[..., Any] = getattr(import_module(f"{__name__}.{name}"), name)
    return function


def install(names: Iterable[str]) -> None:
    """Put these operations' kernels in the place of torch's own on CUDA, where there is Triton to run them."""
    if find_spec("triton"):
        for name in names:
            KERNELS[name].on("cuda")(partial(_run, name))


def _run(name: str, *arguments: Any, **options: Any) -> Any:
    """The kernel, imported at its first call; in float64, in which none computes, the reference."""
    exact = first_tensor(*arguments, **options).dtype == torch.float64
    function = KERNELS[name].reference if exact else equal(name)
    return function(*arguments, **options)


@contextlib.contextmanager
def switched_on(device: str, *names: str) -> Iterator[None]:
    """Run these operations' kernels (all without a name) on ``device`` for a while: for tests and for timing."""
    chosen = names or tuple(KERNELS)
    before = {name: dict(KERNELS[name].equals) for name in chosen}
    try:
        for name in chosen:
            equal(name)  # imported, so that no timing has it
            KERNELS[name].on(device)(partial(_run, name))
        yield
    finally:
        for name in chosen:
            KERNELS[name].equals = before[name]
