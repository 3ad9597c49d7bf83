"""Compiles every Triton kernel for real GPUs, without one, and writes ``docs/kernels-compiled.md``.

    python tools/compile_kernels.py            # compile, check, write the page
    python tools/compile_kernels.py --check    # compile and check; the page is left as it is

Every operation of the kernels' table is called on tensors without values, forward and backward, in every dtype and with
sizes that reach every configuration; what would be launched is compiled ahead of time for each target. Refused are
spilled registers, more shared memory than a block may have, and a configuration that nothing reaches. The bytes that a
kernel moves are counted in Triton's interpreter, in a process of their own. What none of this shows: speed, races.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truetune.kernels.triton import cases, equal
from truetune.kernels.triton.configurations import CONFIGURATIONS
from truetune.kernels.triton.launch import Launch, recording

PAGE = Path(__file__).parents[1] / "docs" / "kernels-compiled.md"
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Target -> bytes of shared memory that a block may have."""
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+)")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
SIZES: dict[str, list[dict[str, Any]]] = {
    "rms_norm": [{"width": 896}, *({"width": w, "residual": True} for w in (1024, 4096, 8192))],
    "rope": [{"head_size": 64, "positioned": False}, {"head_size": 256, "interleaved": True}],
    "packed_attention": [*({"head_size": d} for d in (64, 128, 256)), {"head_size": 96, "window": 99, "softcap": 50.0}],
    "lora_linear": [{"bias": True}],
    "newton_schulz": [{}],
    "adamw": [{"held": 0.0}, {"rounded": True}],
    "adamw_8bit": [{}, {"rounded": True}],
    "gated": [{"activation": a} for a in ("silu", "gelu", "gelu_tanh")],
    "linear_cross_entropy": [
        {},
        {"bias": True, "weighted": True, "softcap": 30.0, "smoothing": 0.1},
        {"frozen": True},
        {"filtered": True},
    ],
}
"""Operation -> options of its case, which between them reach every configuration."""
SAMPLES: dict[str, dict[str, Any]] = {
    "rms_norm": {"rows": 64, "residual": True},
    "rope": {"tokens": 64},
    "gated": {"rows": 64},
    "linear_cross_entropy": {"rows": 128, "width": 256, "vocabulary": 1024},
    "packed_attention": {"lengths": (256, 128), "heads": 2, "keys": 1},
    "lora_linear": {"rows": 256, "inputs": 256, "outputs": 256},
    "newton_schulz": {"matrices": 1, "rows": 256, "columns": 256, "steps": 1},
    "adamw": {},
    "adamw_8bit": {},
}
"""Operation -> options of a case that the interpreter can run."""


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel: registers of a thread, bytes of shared memory of a block, registers spilled."""

    kernel: str
    dtype: str
    tiles: str
    target: str
    registers: int
    shared: int
    spilled: int
    instruction: str


def launches(target: str, names: list[str]) -> Iterator[tuple[str, Launch]]:
    """(dtype, launch): one for each kernel that would be compiled, each once."""
    seen = set()
    for name, options in ((name, SIZES[name]) for name in names):
        for dtype in (torch.float32, torch.bfloat16):
            for option in options:
                with recording(target) as noted:
                    both_ways(name, getattr(cases, name)(dtype, "meta", **option))
                for launch in noted:
                    key = (launch.kernel.__name__, str(signature(launch)), launch.configuration)
                    if str(key) not in seen:
                        seen.add(str(key))
                        yield DTYPES[dtype], launch


def both_ways(name: str, case: cases.Case) -> None:
    """The operation's kernel, and its backward where it has one."""
    for argument in case.trained:
        case.arguments[argument].requires_grad_()
    outputs = equal(name)(**case.arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if case.trained:
        torch.autograd.backward([y.sum() for y in outputs if y.requires_grad])


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, constants and alignments as a call would give them to the compiler."""
    types, constants, aligned = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            types[name] = f"*{DTYPES[value.dtype]}"
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif launch.kernel.params[index].is_constexpr or value is None or (value == 1 and isinstance(value, int)):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


def build(dtype: str, launch: Launch, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, aligned = signature(launch)
    chosen = launch.configuration
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(launch.kernel, types, constants, aligned)
    made = triton.compile(source, gpu, {"num_warps": chosen.warps, "num_stages": chosen.stages})
    text = made.asm["amdgcn" if amd else "ptx"]
    registers, spilled = _counted(text) if amd else _assembled(text, gpu.arch)
    options = [f"{key} {value}" for key, value in constants.items() if value is not None and key.isupper()]
    options += [f"{chosen.warps} warps"]
    return Compiled(
        launch.kernel.__name__,
        dtype,
        ", ".join(options),
        target,
        registers,
        made.metadata.shared,
        spilled,
        ", ".join(sorted(set(TENSOR_CORES.findall(text)))) or "none",
    )


def _counted(text: str) -> tuple[int, int]:
    """Registers and spills as AMD's assembly states them."""
    of = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    return of["vgpr_count"], of["vgpr_spill_count"]


def _assembled(text: str, architecture: int) -> tuple[int, int]:
    """Registers and bytes spilled as NVIDIA's assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(text, encoding="utf-8")
        named = re.findall(r"\.target (\w+)", text)[0]
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={named}", str(file), "-o", f"{file}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return int(re.findall(r"Used (\d+) registers", said)[0]), spills


def compile_for(target: str, names: list[str]) -> tuple[list[Compiled], set[tuple[str, int]]]:
    """Everything that is launched on ``target``; (kernel, row) of the configurations that were reached."""
    built, reached = [], set()
    for dtype, launch in launches(target, names):
        built.append(build(dtype, launch, target))
        rows = CONFIGURATIONS[launch.kernel.__name__]
        reached.add((launch.kernel.__name__, rows.index(launch.configuration)))
    return built, reached


def faults(built: list[Compiled]) -> Iterator[str]:
    for c in built:
        if c.spilled:
            yield f"{c.kernel} {c.dtype} ({c.tiles}) spills {c.spilled} on {c.target}, with {c.registers} registers"
        if c.shared > SHARED[c.target]:
            yield f"{c.kernel} {c.dtype} ({c.tiles}) takes {c.shared} bytes of shared memory on {c.target}"


def unreached(reached: set[tuple[str, int]]) -> Iterator[str]:
    for kernel, rows in CONFIGURATIONS.items():
        yield from (f"{kernel}: nothing reaches row {n}" for n in range(len(rows)) if (kernel, n) not in reached)


def traffic() -> dict[str, tuple[float, float]]:
    """Operation -> bytes that its kernels move forward and backward, and the least possible, per element of its first
    tensor: each tensor that a launch is given, moved once. In the interpreter, bf16."""
    from interpreted import exact

    found = {}
    for name, options in SAMPLES.items():
        case = getattr(cases, name)(torch.bfloat16, **options)
        lists = {key: value for key, value in case.arguments.items() if isinstance(value, list)}
        first = lists["parameters"] if lists else [next(v for v in case.arguments.values() if isinstance(v, Tensor))]
        with exact() as moved, recording("sm_90") as noted:
            both_ways(name, case)
        least = sum(t.nbytes for launch in noted for t in launch.arguments.values() if isinstance(t, Tensor))
        least += sum(t.nbytes * (1 + (key in case.changed)) for key, tensors in lists.items() for t in tensors)
        elements = sum(t.numel() for t in first)
        found[name] = ((moved.loaded + moved.stored) / elements, least / elements)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write the page")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), help="operations; implies --check")
    parser.add_argument("--traffic", action="store_true", help="count bytes in the interpreter, as JSON")
    parser.add_argument("--targets", nargs="+", default=list(SHARED), choices=list(SHARED))
    options = parser.parse_args()
    if options.traffic:
        print(json.dumps(traffic()))
        return 0
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("the interpreter can't compile; unset TRITON_INTERPRET")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is where nothing is set, without a warning
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        parts = list(pool.map(compile_for, options.targets, repeat(options.only or list(SIZES))))
    built = [c for compiled, _ in parts for c in compiled]
    found = list(faults(built))
    if not options.only:
        found += unreached(set().union(*(reached for _, reached in parts)))
    print("\n".join([*found, f"{len(built)} compiled, {len(found)} faults"]))
    if not (options.check or options.only or found):
        command = [sys.executable, __file__, "--traffic"]
        counted = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
        PAGE.write_text(page(built, json.loads(counted.stdout)), encoding="utf-8")
    return bool(found)


def page(built: list[Compiled], moved: dict[str, tuple[float, float]]) -> str:
    targets = list(SHARED)
    rows: defaultdict[tuple[str, str, str], dict[str, Compiled]] = defaultdict(dict)
    for c in built:  # of several variants (a bias, no bias), the one with the most registers
        row = rows[c.kernel, c.dtype, c.tiles]
        row[c.target] = max(c, row.get(c.target, c), key=lambda x: x.registers)
    lines = [HEAD, f"| kernel | dtype | constants | {' | '.join(targets)} |", "|---" * (3 + len(targets)) + "|"]
    for (kernel, dtype, tiles), row in sorted(rows.items()):
        cells = (_cell(row[target]) if target in row else "" for target in targets)
        lines.append(f"| `{kernel}` | {dtype} | {tiles} | {' | '.join(cells)} |")
    lines += [TRAFFIC, "| operation | moved | least | ratio |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {a:,.1f} | {b:,.1f} | {a / b:.2f} |" for name, (a, b) in moved.items()]
    return "\n".join(lines) + "\n"


def _cell(c: Compiled) -> str:
    return f"{c.registers}, {c.shared / 1024:.0f} KiB, {c.instruction}"


HEAD = """# Kernels, compiled

Written by `tools/compile_kernels.py`, which compiles every Triton kernel ahead of time for four GPUs without any.
No register is spilled, and shared memory is under every target's limit: each cell has the registers of a thread, the
shared memory of a block and the tensor-core instructions. An empty cell: another row holds for that target. What this
does not show is speed; see [kernels.md](kernels.md).
"""
TRAFFIC = """
## Bytes moved

Per element of the operation's first tensor, forward and backward, in bf16, counted load by load and store by store in
the interpreter on small shapes. The least is each tensor of each launch moved once. What is read again by another
program (tiles of keys, of the head) is counted again, though a GPU's caches serve most of it.
"""

if __name__ == "__main__":
    sys.exit(main())
