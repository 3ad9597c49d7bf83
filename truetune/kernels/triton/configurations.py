"""How each kernel is cut into tiles, by dtype, size and target: a table, so that nothing is tried out at run time.

fp32 products are exact ("ieee"); on NVIDIA's tensor cores three products of parts of 10 bits are nearly so ("tf32x3").
A row is right for every target that it is compiled for: no register spilled, shared memory under the target's limit
(``docs/kernels-compiled.md``, written by ``tools/compile_kernels.py``). No row has been timed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Configuration:
    """tiles: constants of the kernel; warps, stages: of the compiler.

    It holds for one dtype (None: any), for targets that start with ``target`` and for sizes up to ``largest`` (None:
    any). What a size is, the kernel's launch says: a width or a head size.
    """

    tiles: dict[str, Any] = field(default_factory=dict)
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
        Row({"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_D": 64, "PRECISION": "ieee"}, warps=8, dtype=torch.bfloat16),
        Row({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "PRECISION": "ieee"}, target="gfx"),
        Row({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "PRECISION": "tf32x3"}, warps=8),
    ),
    "cross_entropy_backward": (
        Row({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "PRECISION": "ieee"}, target="gfx"),
        Row({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "PRECISION": "ieee"}, target="sm_100", dtype=torch.bfloat16),
        Row({"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_D": 32, "PRECISION": "ieee"}, warps=8, dtype=torch.bfloat16),
        Row({"BLOCK_N": 32, "BLOCK_V": 64, "BLOCK_D": 32, "PRECISION": "tf32x3"}, warps=8),
    ),
    "attention_forward": (
        Row({"QUERIES": 64, "KEYS": 64, "PRECISION": "ieee"}, dtype=torch.bfloat16, largest=128),
        Row({"QUERIES": 64, "KEYS": 32, "PRECISION": "ieee"}, warps=8, dtype=torch.bfloat16, largest=256),
        Row({"QUERIES": 16, "KEYS": 16, "PRECISION": "ieee"}, target="gfx", largest=256),
        Row({"QUERIES": 32, "KEYS": 32, "PRECISION": "tf32x3"}, warps=8, largest=128),
    ),
    "attention_queries": (
        Row({"QUERIES": 64, "KEYS": 32, "PRECISION": "ieee"}, dtype=torch.bfloat16, largest=128),
        Row({"QUERIES": 32, "KEYS": 32, "PRECISION": "ieee"}, dtype=torch.bfloat16, largest=256),
        Row({"QUERIES": 16, "KEYS": 16, "PRECISION": "ieee"}, target="gfx", largest=256),
        Row({"QUERIES": 16, "KEYS": 16, "PRECISION": "tf32x3"}, largest=128),
    ),
    "attention_keys": (
        Row({"QUERIES": 16, "KEYS": 32, "PRECISION": "ieee"}, target="gfx", dtype=torch.bfloat16, largest=256),
        Row({"QUERIES": 32, "KEYS": 64, "PRECISION": "ieee"}, warps=8, dtype=torch.bfloat16, largest=128),
        Row({"QUERIES": 16, "KEYS": 32, "PRECISION": "ieee"}, warps=8, dtype=torch.bfloat16, largest=256),
        Row({"QUERIES": 16, "KEYS": 16, "PRECISION": "ieee"}, target="gfx", largest=256),
        Row({"QUERIES": 16, "KEYS": 32, "PRECISION": "tf32x3"}, warps=8, largest=128),
    ),
    "linear_with_low": (
        Row({"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_I": 32, "PRECISION": "ieee"}, warps=8, dtype=torch.bfloat16),
        Row({"BLOCK_T": 64, "BLOCK_O": 64, "BLOCK_I": 32, "PRECISION": "ieee"}, target="gfx"),
        Row({"BLOCK_T": 64, "BLOCK_O": 64, "BLOCK_I": 32, "PRECISION": "tf32x3"}, warps=8),
    ),
    "symmetric_product": (
        Row({"BLOCK_S": 128, "BLOCK_L": 32, "PRECISION": "ieee"}, warps=8, dtype=torch.bfloat16),
        Row({"BLOCK_S": 64, "BLOCK_L": 32, "PRECISION": "ieee"}, target="gfx"),
        Row({"BLOCK_S": 64, "BLOCK_L": 32, "PRECISION": "ieee"}, warps=8),  # five rounds add up what "tf32x3" leaves
    ),
    "adamw_many": (Row(),),
    "adamw_8bit_many": (Row(warps=2),),
}
"""Name of the kernel -> its configurations; the first that fits is taken."""


def choose(kernel: str, dtype: torch.dtype, target: str, size: int) -> Configuration | None:
    """The first row that fits, or None: then the kernel must not run."""
    return next((row for row in CONFIGURATIONS[kernel] if row.fits(dtype, target, size)), None)
