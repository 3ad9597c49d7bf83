"""Compiles the C++ of this folder for the processor that it will run on, once, and loads it.

The library is kept in the cache under a name that holds what it was made from: sources, flags, compiler, torch
and the processor's instructions. It links against torch alone, and takes OpenMP's entry points from what torch has
loaded: a second runtime beside torch's would have threads of its own.
Left out: systems other than Linux, and processors without AVX2 (where no measurement shows a gain).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from truetune.cache import cache_folder

SOURCES = Path(__file__).parent
FLAGS = ("-march=native",)
"""Of this processor; without them and with -DTRUETUNE_PLAIN the code is plain C++ for any processor."""
_COMPILE = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
_EXACT = ("-fno-math-errno", "-fno-trapping-math")  # nobody reads errno or the flags of exceptions
_LINK = ("-shared", "-Wl,-z,now")  # without -fopenmp; what torch lacks is then seen when the library is loaded


class BuildError(Exception):
    """Why there is no library, in a few words."""


@functools.cache
def kernels() -> Any | None:
    """The operations of the ``.cpp`` files beside this one, or None, with a note, where they cannot be had."""
    if sys.platform != "linux" or not {"avx2", "fma"} <= set(instructions()):
        return None
    try:
        return load(SOURCES, "truetune", FLAGS)
    except BuildError as error:
        print(f"note: kernels are torch's own, which are slower: {error}", file=sys.stderr)
        return None


def load(sources: Path, library: str, flags: tuple[str, ...]) -> Any:
    """``torch.ops.<library>`` with the operations of the ``.cpp`` files in the folder ``sources``.

    Raises BuildError if no compiler makes a library that can be loaded.
    """
    reason = "there is no C++ compiler (looked for $CXX, c++, g++, clang++); install g++"
    for compiler in _compilers():
        try:
            file = _built(sources, library, compiler, flags)
            torch.ops.load_library(str(file))
        except (BuildError, OSError) as error:
            reason = f"{shlex.join(compiler)}: {str(error.__cause__ or error).strip()[:300]}"
        else:
            return getattr(torch.ops, library)
    raise BuildError(reason)


@functools.cache
def instructions() -> frozenset[str]:
    """What the processor can do, in Linux's words; empty where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def _compilers() -> Iterator[list[str]]:
    """The user's choice, then the system's."""
    names = [shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]]
    seen = set()
    for name, *options in filter(None, names):
        path = shutil.which(name)
        if path and (real := (os.path.realpath(path), *options)) not in seen:
            seen.add(real)
            yield [path, *options]


def _built(sources: Path, library: str, compiler: list[str], flags: tuple[str, ...]) -> Path:
    """The library in the cache, compiled if it is not there."""
    options = [*_COMPILE, *_EXACT, *flags, f"-DTRUETUNE_LIBRARY={library}"]
    options.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    texts = [file.read_text(encoding="utf-8") for file in sorted(sources.iterdir()) if file.suffix in (".cpp", ".h")]
    parts = [*texts, *compiler, *options, *_LINK, torch.__version__, platform.machine(), *sorted(instructions())]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = _private(cache_folder() / "native")
    target = folder / f"kernels-{key}.so"
    if target.is_file():
        return target
    print("compiling kernels for this processor, once ...", end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(sorted(sources.glob("*.cpp")), Path(scratch), compiler, options)
            (Path(scratch) / "library.so").replace(target)  # whole or not at all, whoever else compiles it
    except BuildError:
        print("it failed", file=sys.stderr)
        raise
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return target


def _private(folder: Path) -> Path:
    """The folder, made if needed. Raises BuildError if others can write there, since what lies in it is run."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"others can write to {folder}; run chmod 700 on it, or set TRUETUNE_CACHE to a folder of yours"
        )
    return folder


def _compile(sources: list[Path], scratch: Path, compiler: list[str], options: list[str]) -> None:
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    compiled = [str(scratch / f"{source.stem}.o") for source in sources]
    commands = [
        [*compiler, *options, f"-I{include}", "-c", str(source), "-o", target]
        for source, target in zip(sources, compiled, strict=True)
    ]
    with ThreadPoolExecutor() as files:  # at once, since each takes seconds
        list(files.map(_run, commands))
    _run([*compiler, *_LINK, *compiled, "-o", str(scratch / "library.so"), f"-L{lib}", "-lc10", "-ltorch_cpu"])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"it ended with status {done.returncode}"]
        raise BuildError(next((line for line in lines if "error" in line), lines[0]))
