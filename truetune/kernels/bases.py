"""Ways to keep the frozen weight of a linear layer under LoRA while the adapter is trained: what `model.base` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truetune.kernels import int8_linear, nf4_linear
from truetune.kernels.lora_linear import Layer
from truetune.kernels.op import Op


class Base(NamedTuple):
    """lack: what a device has not that it takes, or None; pack: a weight [O, I] -> what ``linears`` reads;
    linears: (x, layers, packed) -> outputs, by a reference that reads the layers' own weights instead;
    near: whether its losses are those of the weights themselves, but for a rounding of bf16."""

    lack: Callable[[torch.device], str | None]
    pack: Callable[[Tensor], Any]
    linears: Op[..., tuple[Tensor, ...]]
    near: bool


class Packed(NamedTuple):
    """A weight as the base of that name keeps it."""

    base: str
    weight: Any


def linears(x: Tensor, layers: Sequence[Layer], packed: Sequence[Packed]) -> tuple[Tensor, ...]:
    """What the layers give for x, with the weights ``packed``, all of one base."""
    return BASES[packed[0].base].linears(x, layers, [each.weight for each in packed])


def _no_bytes(device: torch.device) -> str | None:
    return None if int8_linear.available(device) else "a CPU that multiplies bytes (AVX-512 VNNI) and a C++ compiler"


def _no_library(_: torch.device) -> str | None:
    return None if nf4_linear.available() else "the extra: pip install 'truetune[bitsandbytes]'"


BASES = {
    "int8": Base(_no_bytes, int8_linear.pack, int8_linear.int8_lora_linears, near=True),
    "nf4": Base(_no_library, nf4_linear.pack, nf4_linear.nf4_lora_linears, near=False),
}
"""By the name that a recipe uses."""
