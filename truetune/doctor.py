"""What this machine has for training, and what it lacks: `truetune doctor`.

Looks at installed packages, processor, memory, disk, GPU and compiler. It opens no connection: Truetune needs
none once the files are there, so whether the hub can be reached says nothing about whether it works.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

PYTHON = (3, 11)

PACKAGES = {
    "torch": ("2.13", "2.13"),
    "transformers": ("5", "5"),
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
    "gguf": "models in GGUF files",
}
"""Optional package, which is also the name of its extra -> what it is for."""


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
    disk = shutil.disk_usage(Path.cwd())
    yield Finding("ok", "disk", f"{_gigabytes(disk.free)} free in {Path.cwd()}")
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


def _machine() -> Iterator[Finding]:
    """What torch and psutil see; only where all packages are there."""
    import psutil
    import torch

    features = torch.cpu.get_capabilities()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if features.get(name)]
    in_bf16 = f"bf16 in hardware ({', '.join(bf16)})" if bf16 else "no bf16 in hardware, so fp32 is faster"
    name = features.get("cpu_name") or platform.processor() or platform.machine()
    kernels = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok" if bf16 else "note", "processor", f"{name}, {kernels}, {in_bf16}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    yield Finding("ok", "cores", f"{physical} physical, {usable} usable, torch uses {torch.get_num_threads()}")
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{_gigabytes(memory.available)} free of {_gigabytes(memory.total)}")
    if not torch.cuda.is_available():
        yield Finding("note", "gpu", "none that torch can use; training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("ok", "gpu", f"{device.name}, {_gigabytes(device.total_memory)}")


def _compiler() -> Finding:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return Finding("ok", "compiler", path)
    return Finding("note", "compiler", "none; everything works, in plain torch")


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
