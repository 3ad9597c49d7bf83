"""Layers that are computed again in the backward pass, as few as a budget of memory asks for.

Chen et al., arXiv:1604.06174: a layer keeps its input alone, and is computed once more when its gradient is due, by
the same kernels and with the same random state, so that the gradient is the same bit for bit. It costs that layer's
forward.

Which layers: the first ones. The backward pass begins with the last, so what the last ones keep is gone by the time
that the first are computed again; with the very last layer nothing would be won at all.
How many: what each layer keeps is measured, not guessed, at three lengths of one document, as ``c + l n + q n^2`` bytes
of n tokens (c: weights cast for the products; q: scores, where attention keeps any).

Left out: weights, gradients, what the loss keeps, what a layer needs for a moment while it is computed, and copies of
the keys and values that documents with a shared beginning read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from truetune.models.last import stack
from truetune.models.swap import subclass

LENGTHS = (16, 32, 64)
"""Tokens of the documents that it is measured on."""

Bytes = NDArray[np.float64]
Lengths = Sequence[int] | NDArray[np.int64]


class Budget:
    """How many of the first of ``layers`` are computed again, for micro-batches of any lengths.

    limit: bytes that all layers together may keep. own, handed: [3, layers], the coefficients of ``1, n, n^2`` of what
    each layer keeps that it made, and of what it was called with. by_document: whether every document is a call of its
    own, so that what is constant comes as often.
    """

    def __init__(self, layers: nn.ModuleList, limit: int, own: Bytes, handed: Bytes, by_document: bool) -> None:
        self.layers, self.limit, self.by_document = layers, limit, by_document
        self._own, self._handed = own, handed

    def needs(self, lengths: Lengths) -> list[int]:
        """Bytes that are kept at most with the first 0, 1, ... layers computed again: all of these but the last."""
        n = np.asarray(lengths, dtype=np.float64)
        sizes = np.array([len(n) if self.by_document else 1, n.sum(), (n * n).sum()])
        own, handed = sizes @ self._own, sizes @ self._handed
        again = handed.cumsum() + own  # while a layer is computed again; those after it are done
        return [
            round(max(handed.sum() + own[count:].sum(), again[:count].max(initial=0.0)))
            for count in range(len(self.layers))
        ]

    def recomputed(self, lengths: Lengths) -> int:
        """The fewest layers that the limit asks for; where it can't be met, as many as come nearest."""
        needs = self.needs(lengths)
        return next((count for count, need in enumerate(needs) if need <= self.limit), int(np.argmin(needs)))

    def choose(self, lengths: Lengths) -> None:
        """Let the layers do so from now on."""
        set_recomputed(self.layers, self.recomputed(lengths))


def recomputable(decoder: nn.Module) -> nn.ModuleList:
    """The layers of ``decoder``, each with an attribute ``recomputed``. Raises ValueError without one stack of them."""
    layers = stack(decoder)
    for layer in layers[:-1]:
        if not hasattr(layer, "recomputed"):
            layer.__class__ = subclass(type(layer), _again(type(layer)))
    set_recomputed(layers, 0)
    return layers


def set_recomputed(layers: nn.ModuleList, count: int) -> None:
    layer: Any
    for i, layer in enumerate(layers):
        layer.recomputed = i < count


def _again(plain: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.recomputed:
            return plain.forward(self, *args, **kwargs)
        # To its end, so that layers which compute together leave nothing behind.
        return checkpoint(partial(plain.forward, self), *args, use_reentrant=False, early_stop=False, **kwargs)

    return forward


def measured(decoder: nn.Module, run: Callable[[int], Any]) -> tuple[Bytes, Bytes]:
    """``own`` and ``handed`` of ``Budget``; run: computes one document of so many tokens, with gradients."""
    powers = np.array([[1, n, n * n] for n in LENGTHS], dtype=np.float64)
    kept = np.array([_kept(decoder, partial(run, n)) for n in LENGTHS], dtype=np.float64)  # [lengths, 2, layers]
    own, handed = (np.linalg.solve(powers, kept[:, i]).clip(min=0.0) for i in range(2))
    return own, handed


def _kept(decoder: nn.Module, run: Callable[[], Any]) -> tuple[list[int], list[int]]:
    """Bytes of distinct storages, but for the model's own, that each layer makes and keeps, and is called with."""
    layers = stack(decoder)
    own, handed = [0] * len(layers), [0] * len(layers)
    seen = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *decoder.buffers())}
    alive: list[Tensor] = []  # or else another tensor could come to stand where one stood
    within: list[int] = []

    def note(tensors: Iterable[Tensor], to: list[int], layer: int) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                alive.append(tensor.detach())
                to[layer] += storage.nbytes()

    def enter(layer: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        note(_tensors((args, kwargs)), handed, layer)
        within.append(layer)

    def pack(tensor: Tensor) -> Tensor:
        if within:
            note([tensor], own, within[-1])
        return tensor.detach()  # a tensor that holds what made it is never freed

    def leave(*_: Any) -> None:
        within.pop()

    hooks = [m.register_forward_pre_hook(partial(enter, i), with_kwargs=True) for i, m in enumerate(layers)]
    hooks += [m.register_forward_hook(leave) for m in layers]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return own, handed


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
