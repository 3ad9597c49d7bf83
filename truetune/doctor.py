"""What this machine has for training, what it lacks and what for, and the command that mends it: `truetune doctor`.

Looks at installed packages, processor, memory, disk, GPU and compiler. It opens no connection: Truetune needs
none once the files are there, so whether the hub can be reached says nothing about whether it works.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

PYTHON = (3, 11)

PACKAGES = {
    "torch": ("2.13", "2.13"),
    "transformers": ("5.1.0", "5"),
    "peft": ("0.21", "0.21"),
    "tokenizers": ("0.22", "0.23"),
    "datasets": ("4", "5"),
    "safetensors": ("0.6", "0.8"),
    "huggingface_hub": ("1", "2"),
    "pydantic": ("2.11", "2"),
    "pyyaml": ("6", "6"),
    "rich": ("14", "15"),
    "typer": ("0.20", "0.29"),
    "jinja2": ("3.1", "3"),
    "numpy": ("2", "2"),
    "psutil": ("6", "7"),
}
"""Required package -> (least version, newest tested one, as exactly as it matters)."""

EXTRAS = {
    "tensorboard": "scalars for TensorBoard (output.tensorboard)",
    "wandb": "runs on Weights & Biases (output.wandb)",
    "gguf": "models in GGUF files",
    "bitsandbytes": "LoRA over a base in 4 bits (model.base=nf4)",
}
"""Optional package, which is also the name of its extra -> what it is for."""


ROOM = 5e9
"""Bytes that should be free: a small model, its checkpoints and its export."""
SIDE = 512
"""Of the matrices that are multiplied to time a dtype, in a hundredth of a second."""


class Finding(NamedTuple):
    """``missing`` means that training does not work without it."""

    state: Literal["ok", "note", "warning", "missing"]
    name: str
    text: str


def examine() -> Iterator[Finding]:
    """Everything that was looked at, in the order to read it in."""
    version = platform.python_version()
    enough = sys.version_info >= PYTHON
    needed = ".".join(map(str, PYTHON))
    yield Finding("ok" if enough else "missing", "python", version if enough else f"{version}, needs {needed}")
    usable = True
    for name, (least, tested) in PACKAGES.items():
        finding = _package(name, least, tested)
        usable &= finding.state != "missing"
        yield finding
    for name, purpose in EXTRAS.items():
        found = _version(name)
        absent = f'not installed; for {purpose}: pip install "truetune[{name}]"'
        yield Finding("ok", name, f"{found}: {purpose}") if found else Finding("note", name, absent)
    yield _disk(Path.cwd())
    yield _compiler()
    if usable:
        yield from _machine()


def _package(name: str, least: str, tested: str) -> Finding:
    found = _version(name)
    if found is None:
        return Finding("missing", name, f'not installed; run pip install "{name}>={least}"')
    if _numbers(found) < _numbers(least):
        return Finding("missing", name, f'{found} is too old; run pip install "{name}>={least}"')
    if _numbers(found)[: len(_numbers(tested))] > _numbers(tested):
        return Finding("warning", name, f"{found} is newer than the tested {tested}; if anything fails, install that")
    return Finding("ok", name, found)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    told = f"{_gigabytes(free)} free in {folder}"
    if free >= ROOM:
        return Finding("ok", "disk", told)
    advice = "run elsewhere with output.folder=FOLDER, or write less with truetune train laptop"
    return Finding("warning", "disk", f"{told}; models and checkpoints take gigabytes: {advice}")


def _machine() -> Iterator[Finding]:
    """What torch and psutil see; only where all packages are there."""
    import psutil
    import torch

    features = torch.cpu.get_capabilities()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if features.get(name)]
    name = features.get("cpu_name") or platform.processor() or platform.machine()
    yield Finding("ok", "processor", f"{name}, {torch.backends.cpu.get_cpu_capability()}")
    yield _bf16(bf16)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    yield Finding("ok", "cores", f"{physical} physical, {usable} usable, torch uses {torch.get_num_threads()}")
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{_gigabytes(memory.available)} free of {_gigabytes(memory.total)}")
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("ok", "gpu", f"{device.name}, {_gigabytes(device.total_memory)}")


def _bf16(instructions: list[str]) -> Finding:
    """How fast products are in bf16 beside fp32, measured: instructions alone do not say."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(SIDE, SIDE, dtype=dtype)
        seconds[dtype] = min(_timed(partial(torch.mm, a, a)) for _ in range(4))
    factor = seconds[torch.float32] / seconds[torch.bfloat16]
    told = f"products take {1 / factor:.2g} of the time of fp32 ({', '.join(instructions) or 'no instructions for it'})"
    if instructions and factor < 1:
        return Finding("warning", "bf16", f"{told}; if nothing else runs here, set model.precision=fp32")
    return Finding("ok" if instructions else "note", "bf16", told)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _no_gpu(cuda: str | None) -> Finding:
    """Why torch uses none. cuda: the version that it was built for."""
    if not shutil.which("nvidia-smi"):
        return Finding("note", "gpu", "none that torch can use; training runs on the CPU")
    if cuda is None:
        mend = "pip install --force-reinstall torch, from the index that https://pytorch.org/get-started/locally names"
        return Finding("warning", "gpu", f"there is one, but this torch is built for the CPU alone; {mend}")
    return Finding("warning", "gpu", f"torch is built for CUDA {cuda} but sees no device; look at nvidia-smi's driver")


def _compiler() -> Finding:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return Finding("ok", "compiler", path)
    mend = {"darwin": "xcode-select --install", "win32": "winget install LLVM.LLVM"}.get(
        sys.platform, "apt install g++"
    )
    return Finding("note", "compiler", f"none; attention on a CPU is then torch's own, which is slower: {mend}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(number) for number in re.sub(r"[^\d.].*", "", version).split(".") if number)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
