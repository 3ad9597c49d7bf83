"""Frozen weights in 8 or 4 bits while an adapter is trained over them (``kernels.bases``).

Only linear layers under plain LoRA: embeddings, norms and the output layer stay, and so do layers whose adapter has
dropout or is DoRA's. Whatever is told of the model (held-out losses, answers, checks against the author's code) and
whatever leaves it is computed with the weights themselves, since that is what the adapter will stand on. Meanwhile
these rest in the file that they were read from, mapped into memory, and are put in place where they are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from truetune.errors import UserError
from truetune.kernels.bases import BASES, Packed
from truetune.kernels.lora_linear import Layer
from truetune.kernels.native.memory import release_memory
from truetune.models.adapt import FusedLoraLinear


def require_able(base: str, device: torch.device) -> None:
    """Raise UserError where ``device`` can't have the base."""
    if lack := BASES[base].lack(device):
        raise UserError(f"model.base={base} needs {lack}; without it, remove model.base")


def quantize_base(model: nn.Module, head: str, base: str, resting: nn.Module | None = None) -> int:
    """Let the plain LoRA layers of ``model``, but for its output layer ``head``, compute with weights in ``base``; how
    many they are.

    resting: the model once more, without adapters, whose weights stand for those of the layers until they are needed,
    where and in what dtype they are; without it they stay. Raises UserError where there are no such layers.
    """
    output = model.get_submodule(head)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FusedLoraLinear) and m is not output}
    if not layers:
        raise UserError(
            f"model.base={base} finds no linear layer under plain LoRA; adapt some, without adapter.dropout and "
            "adapter.dora, or remove it"
        )
    for name, layer in layers.items():
        weight = _weight(layer)
        layer.packed = Packed(base, BASES[base].pack(weight.detach()))
        layer.whole = weight.device, weight.dtype
        if resting:
            weight.data = cast(Tensor, resting.get_submodule(name).weight).data
    release_memory()
    return len(layers)


def _weight(layer: FusedLoraLinear) -> Tensor:
    return cast(Tensor, layer.base_layer.weight)


def _packed(model: nn.Module) -> list[FusedLoraLinear]:
    return [m for m in model.modules() if isinstance(m, FusedLoraLinear) and m.packed is not None]


class _QuantizedLinear(nn.Linear):
    """A linear layer with its weight in ``base``, by the reference alone."""

    base: str

    def forward(self, x: Tensor) -> Tensor:
        a_1I = x.new_zeros(1, self.in_features, dtype=self.weight.dtype)
        b_O1 = x.new_zeros(self.out_features, 1, dtype=self.weight.dtype)
        linears = BASES[self.base].linears.reference
        return linears(x, [Layer(self.weight, self.bias, a_1I, b_O1, 1.0)], [])[0]


@contextlib.contextmanager
def reference_base(model: nn.Module) -> Iterator[None]:
    """Base layers that are packed compute with such weights by themselves, for a while: what plain code does with them.

    For ``CausalLM.as_published`` inside, whose adapters are PEFT's.
    """
    bases: list[Any] = []
    for layer in _packed(model):
        bases.append(layer.base_layer)
        bases[-1].base, bases[-1].__class__ = cast(Packed, layer.packed).base, _QuantizedLinear
    try:
        yield
    finally:
        for base in bases:
            base.__class__ = nn.Linear
            del base.base


def judged_base(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The weights that plain code must have to come to the losses of training: the base's, where it is not near."""
    far = any(not BASES[cast(Packed, layer.packed).base].near for layer in _packed(model))
    return reference_base(model) if far else contextlib.nullcontext()


@contextlib.contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Every layer computed with its own weight, for a while: as the adapter will be used."""
    layers = [(layer, layer.packed, _weight(layer).data) for layer in _packed(model)]
    for layer, _, resting in layers:
        _set(layer, None, resting if resting.dtype == torch.float64 else resting.to(*layer.whole))
    try:
        yield
    finally:
        for layer, packed, resting in layers:
            _set(layer, packed, resting)
        if any(layer.whole != (resting.device, resting.dtype) for layer, _, resting in layers):
            release_memory()


def _set(layer: FusedLoraLinear, packed: Packed | None, weight: Tensor) -> None:
    layer.packed, _weight(layer).data = packed, weight
    if together := getattr(layer, "together", None):  # a layer that is PEFT's own for a while has none
        together.forget()
