"""Between the host and a GPU without either waiting for the other.

A GPU works behind the host, which runs ahead until it asks for a value. So what goes there leaves from pinned memory,
and what comes back sets out at once and is asked for later. On a CPU there is nothing to wait for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on ``device``."""
    pinned = host.pin_memory() if torch.device(device).type == "cuda" else host
    return pinned.to(device, non_blocking=True)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware has products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(kind) for kind in ("avx512_bf16", "amx_bf16", "bf16"))


class Figures:
    """A few numbers that a device is still to compute; ``read`` waits for them, and for nothing after them."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._there = values, None
        if values.is_cuda:
            self._values = values.to("cpu", non_blocking=True)  # into pinned memory
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        if self._there:
            self._there.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


def peak_memory(device: torch.device) -> tuple[int, int] | tuple[None, None]:
    """Most bytes that tensors have taken on a CUDA device since the process began, and most that torch has reserved
    for them; elsewhere None."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
