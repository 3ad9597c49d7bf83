"""Frozen weights in 8 bits while an adapter is trained over them (``kernels.int8_linear``).

Only linear layers under plain LoRA: embeddings, norms and the output layer stay, and so do layers whose adapter has
dropout or is DoRA's. The weights themselves stay too, in bf16: whatever is told of the model (held-out losses, answers,
checks against the author's code) and whatever leaves it is computed with them, since that is what the adapter will
stand on. The packed copies take two bytes a weight, as much again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from truetune.errors import UserError
from truetune.kernels import int8_linear
from truetune.kernels.lora_linear import Layer
from truetune.models.adapt import FusedLoraLinear, fuse


def quantize_base(model: nn.Module, head: str) -> int:
    """Give the plain LoRA layers of ``model``, but for its output layer ``head``, weights in 8 bits; how many they are.

    Raises UserError where there are none, or where no fast product of bytes can be had.
    """
    output = model.get_submodule(head)
    layers = [m for m in model.modules() if isinstance(m, FusedLoraLinear) and m is not output]
    if not layers:
        raise UserError(
            "model.base=int8 finds no linear layer under plain LoRA; adapt some, without adapter.dropout and "
            "adapter.dora, or remove it"
        )
    weights = [cast(Tensor, layer.base_layer.weight) for layer in layers]
    if not int8_linear.available(weights[0].device):
        raise UserError(
            "model.base=int8 needs a CPU that multiplies bytes (AVX-512 VNNI) and a C++ compiler; remove model.base"
        )
    for layer, weight in zip(layers, weights, strict=True):
        layer.packed = int8_linear.pack(weight.detach())
    return len(layers)


class _QuantizedLinear(nn.Linear):
    """A linear layer in 8 bits by the reference alone."""

    def forward(self, x: Tensor) -> Tensor:
        a_1I, b_O1 = self.weight.new_zeros(1, self.in_features), self.weight.new_zeros(self.out_features, 1)
        return int8_linear.int8_lora_linears.reference(x, [Layer(self.weight, self.bias, a_1I, b_O1, 1.0)], [])[0]


@contextlib.contextmanager
def reference_base(model: nn.Module) -> Iterator[None]:
    """Base layers that are packed compute in 8 bits by themselves, for a while: what plain code does with such a base.

    For ``CausalLM.as_published`` inside, whose adapters are PEFT's.
    """
    bases = [m.base_layer for m in model.modules() if isinstance(m, FusedLoraLinear) and m.packed is not None]
    for base in bases:
        base.__class__ = _QuantizedLinear
    try:
        yield
    finally:
        for base in bases:
            base.__class__ = nn.Linear
        fuse(model)  # which ``unfused`` could not, over layers of another class


@contextlib.contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Every layer computed with its own weight, for a while: as the adapter will be used."""
    packed = [(m, m.packed) for m in model.modules() if isinstance(m, FusedLoraLinear) and m.packed is not None]
    for layer, _ in packed:
        _set_packed(layer, None)
    try:
        yield
    finally:
        for layer, again in packed:
            _set_packed(layer, again)


def _set_packed(layer: FusedLoraLinear, packed: int8_linear.Packed | None) -> None:
    layer.packed = packed
    if together := getattr(layer, "together", None):  # a layer that is PEFT's own for a while has none
        together.forget()
