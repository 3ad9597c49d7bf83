"""How each kernel is cut into tiles, by dtype, size and target: a table, so that nothing is tried out at run time.

A row is right for every target that it is compiled for: no register spilled, shared memory under the target's limit
(``docs/kernels-compiled.md``, written by ``tools/compile_kernels.py``). No row has been timed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Configuration:
    """tiles: constants of the kernel; warps, stages: of the compiler.

    It holds for one dtype (None: any), for targets that start with ``target`` and for sizes up to ``largest`` (None:
    any). What a size is, the kernel's launch says: a width or a head size.
    """

    tiles: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    dtype: torch.dtype | None = None
    target: str = ""
    largest: int | None = None

    def fits(self, dtype: torch.dtype, target: str, size: int) -> bool:
        wide = self.largest is not None and size > self.largest
        return self.dtype in (None, dtype) and target.startswith(self.target) and not wide


Row = Configuration

CONFIGURATIONS: dict[str, tuple[Configuration, ...]] = {
    "rms_norm_forward": (
        Row({"ROWS": 4}, largest=1024),
        Row({"ROWS": 1}, largest=4096),
        Row({"ROWS": 1}, warps=8),
    ),
    "rms_norm_backward": (
        Row({"ROWS": 2}, largest=1024),
        Row({"ROWS": 1}, largest=4096, warps=8),
        Row({"ROWS": 1}, warps=16),
    ),
    "rotate": (Row({"TOKENS": 32}, largest=128), Row({"TOKENS": 16})),
    "gated_forward": (Row({"BLOCK": 1024}),),
    "gated_backward": (Row({"BLOCK": 1024}),),
    "cross_entropy_forward": (
        Row({"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_D": 64}, warps=8, dtype=torch.bfloat16),
        Row({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32}, warps=8),
    ),
    "cross_entropy_backward": (
        Row({"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_D": 64}, warps=8, dtype=torch.bfloat16),
        Row({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32}, warps=8),
    ),
}
"""Name of the kernel -> its configurations; the first that fits is taken."""


def choose(kernel: str, dtype: torch.dtype, target: str, size: int) -> Configuration:
    """Raises ValueError if no row fits."""
    for row in CONFIGURATIONS[kernel]:
        if row.fits(dtype, target, size):
            return row
    raise ValueError(f"{kernel} has no configuration for {dtype}, size {size}, on {target}; turn the kernel off")
