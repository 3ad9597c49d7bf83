"""One operation: a reference in plain torch, and per device type a faster equal.

The equal is chosen at each call by the device of the first tensor argument (of a list, its first), so a model may
move between devices. ``TRUETUNE_REFERENCE=1`` forces the reference everywhere: the first thing to try when a figure
looks wrong. A device without an equal runs the reference. ``TRUETUNE_OFF=name,name`` turns off single fast paths.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from truetune.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

FAST_PATHS = {
    "kept_memory": "memory of freed tensors kept for the next step, and few prepared products",
    "native_attention": "attention compiled for this processor; without it torch's own",
    "native_cross_entropy": "the loss of a chunk of logits, and its gradient, in one compiled pass",
    "native_pointwise": "norms, rotary positions and gated activations compiled for this processor",
    "native_products": "products of bf16 matrices, several added up in one, compiled for this processor",
    "narrow_last_layer": "the last layer computed only where its output is read",
    "step_by_parts": "weights moved within the backward pass, where nothing asks for the whole gradient first",
    "shared_prefixes": "tokens with which several documents of a step begin, computed once for all of them",
}
"""Name of what ``TRUETUNE_OFF`` can turn off -> what it is."""


def is_on(fast_path: str) -> bool:
    """Whether ``TRUETUNE_OFF`` leaves it on. Raises UserError if that names what is no fast path."""
    return fast_path not in _named(os.environ.get("TRUETUNE_OFF", ""))


@functools.cache
def _named(value: str) -> frozenset[str]:
    off = frozenset(name.strip() for name in value.split(",")) - {""}
    if unknown := sorted(off - FAST_PATHS.keys()):
        known = ", ".join(FAST_PATHS)
        raise UserError(f"TRUETUNE_OFF names {unknown[0]}, which is no fast path; choose from {known}, or unset it")
    return off


class Op(Generic[P, R]):
    """Decorate the reference with ``Op``, then each equal with ``@op.on("cuda")``."""

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.equals: dict[str, Callable[P, R]] = {}
        self._needs: dict[Callable[P, R], Callable[[], bool]] = {}

    def on(self, *devices: str, needs: Callable[[], bool] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function as the equal on these device types ("cpu", "cuda").

        needs: whether what it is computed with is there; where it is not, the equal runs the reference itself.
        """

        def register(equal: Callable[P, R]) -> Callable[P, R]:
            self.equals.update(dict.fromkeys(devices, equal))
            if needs:
                self._needs[equal] = needs
            return equal

        return register

    def has_equal(self, device: torch.device) -> bool:
        """Whether ``device`` has more than the reference: reason to call this in place of a model's own code."""
        equal = self.equals.get(device.type)
        return equal is not None and (equal not in self._needs or self._needs[equal]())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if os.environ.get("TRUETUNE_REFERENCE") == "1":
            return self.reference(*args, **kwargs)
        device = first_tensor(*args, **kwargs).device.type
        return self.equals.get(device, self.reference)(*args, **kwargs)


def first_tensor(*args: Any, **kwargs: Any) -> Tensor:
    """The first among arguments, of a list its first."""
    given = (a[0] if isinstance(a, list) else a for a in (*args, *kwargs.values()))
    return next(a for a in given if isinstance(a, Tensor))


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast, for which not every device ("meta", where kernels are tried) has a name."""
    device = tensor.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Autocast's dtype where ``tensor`` is, None where it is off or there is none."""
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would multiply these: autocast's where it is on, else their own.

    Raises ValueError if autocast is off and they differ.
    """
    first = tensors[0]
    if first.dtype != torch.float64 and (dtype := autocast_dtype(first)):
        return dtype
    if any(t.dtype != first.dtype for t in tensors):
        found = ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors)
        raise ValueError(f"cannot multiply {found}; give them one dtype, or call under torch.autocast")
    return first.dtype


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, maxima and exponentials: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
