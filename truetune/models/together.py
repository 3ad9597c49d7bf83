"""Linear layers that read the same input, as queries, keys and values do, computed by whichever is called first.

The model's code stays as it is: it calls one layer after the other, and those after the first find their output made.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truetune.kernels.op import autocast_dtype
from truetune.models.targets import forward_once


class Together:
    """Layers of one input. compute: (x, layers) -> their outputs in order.

    Outputs wait for x itself, unchanged, and for the parameters that they were computed with.
    """

    def __init__(self, layers: Sequence[Any], compute: Callable[[Tensor, Sequence[Any]], Sequence[Tensor]]) -> None:
        self.layers, self.compute = tuple(layers), compute
        self._state: tuple[Any, ...] = ()
        self._x: Tensor | None = None
        self._waiting: dict[Any, Tensor] = {}

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """Of ``layer``, which is one of ``layers``, for x."""
        tensors = (x, *(p for owned in self._owners for p in owned.values() if p is not None))
        state = (torch.is_grad_enabled(), autocast_dtype(x), *(0 if t.is_inference() else t._version for t in tensors))
        if self._x is not x or self._state != state or layer not in self._waiting:
            self._x, self._state = x, state
            self._waiting = dict(zip(self.layers, self.compute(x, self.layers), strict=True))
        y = self._waiting.pop(layer)
        if not self._waiting:
            self._x = None
        return y

    @functools.cached_property
    def _owners(self) -> list[dict[str, Any]]:
        """Where the layers' modules hold their parameters, which need not be looked for at each call."""
        return [module._parameters for layer in self.layers for module in layer.modules()]

    def forget(self) -> None:
        """Give nothing out that was computed before."""
        self._x, self._waiting = None, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        """Of copies of the layers, with nothing waiting."""
        made = memo[id(self)] = Together((), self.compute)
        made.layers = copy.deepcopy(self.layers, memo)
        return made


def of_one_input(model: PreTrainedModel) -> list[list[str]]:
    """Names of the linear layers within one module that a forward of ``model`` calls with the very same tensor."""
    read: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, args: read.update({name: args[0]} if args else {})

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    hooks = [m.register_forward_pre_hook(note(n)) for n, m in linears]
    forward_once(model, hooks)
    groups = defaultdict(list)
    for name, x in read.items():
        groups[name.rpartition(".")[0], id(x)].append(name)
    return [names for names in groups.values() if len(names) > 1]
