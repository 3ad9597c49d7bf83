"""The one way in which a kernel is launched: with the configuration of its table, on whatever holds the tensors.

On a GPU it runs; on a CPU it runs in Triton's interpreter (``TRITON_INTERPRET=1``). Tensors of the "meta" device hold
no values: under ``recording`` a call on them notes which kernels would be compiled, with which arguments. That nothing
on the way waits for a value of the GPU is shown by the same call, since a meta tensor has none to wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from truetune.kernels.triton.configurations import Configuration, choose

INTERPRETED = "sm_90"
"""The target whose configurations the interpreter runs."""


@dataclass(frozen=True)
class Launch:
    """kernel: the jitted function; arguments: what each of its names was given; configuration: how it is compiled."""

    kernel: Any
    arguments: dict[str, Any]
    configuration: Configuration


class _Recorder:
    target: str | None = None
    launches: list[Launch] | None = None


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Note launches, those on meta tensors too, as they would be for ``target`` ("sm_90", "gfx942")."""
    _Recorder.target, _Recorder.launches = target, []
    try:
        yield _Recorder.launches
    finally:
        _Recorder.target = _Recorder.launches = None


def launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    *arguments: Any,
    dtype: torch.dtype,
    size: int = 0,
    **constants: Any,
) -> None:
    """Launch ``kernel`` over ``grid``, which is told the tiles, unless that is empty.

    dtype, size: by which the table chooses the configuration, whose tiles are constants of the kernel like the others.
    Raises ValueError if it has none.
    """
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    chosen = choose(kernel.__name__, dtype, _target(tensor.device), size)
    if chosen is None:
        raise ValueError(f"{kernel.__name__} has no configuration for {dtype} and size {size}; turn the kernel off")
    constants |= chosen.tiles
    programs = grid(chosen.tiles)
    if 0 in programs:
        return
    if _Recorder.launches is not None:
        names = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        _Recorder.launches.append(Launch(kernel, names, chosen))
    elif tensor.is_meta:
        raise ValueError("a meta tensor holds no values to compute with; move it to a device, or record")
    if tensor.is_meta:
        return
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        kernel[programs](*arguments, **constants, num_warps=chosen.warps, num_stages=chosen.stages)


def runs(kernel: Any, tensor: Tensor, dtype: torch.dtype, size: int) -> bool:
    """Whether the table has a configuration for where ``tensor`` is."""
    return choose(kernel.__name__, dtype, _target(tensor.device), size) is not None


def _target(device: torch.device) -> str:
    if device.type == "cuda":
        return _architecture(device.index or 0)
    return _Recorder.target or INTERPRETED


@lru_cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
