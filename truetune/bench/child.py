"""One side of a comparison as a process of its own: asked in single words, it answers in lines of JSON.

What the machine did meanwhile is measured here, by one clock for all: the share of all cores that the side used, and
what anything else did.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from truetune.errors import UserError

KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=268435456"
"""Lets glibc keep what is freed, rather than ask the system for the same pages at every step."""


class Child:
    """``with Child(...) as child``: the process ends with the block, however that ends."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """log: where its standard error goes. Raises UserError where the command can't be started."""
        self.name, self._log, self._program = name, log, command[0]
        try:
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, **environment},
                    encoding="utf-8",
                )
        except OSError as error:
            raise UserError(f"{name}: can't run {command[0]} ({error.strerror}); check the path") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # a word that it did not live to read
            self._process.stdin.close()
        self._process.stdout.close()

    def answer(self) -> dict[str, Any]:
        """The next line of the child. Raises UserError, one sentence, if there is none."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise UserError(self._end())
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, word: str) -> dict[str, Any]:
        """The answer to ``word``, with own_cpu and other_cpu: shares of all cores until it came."""
        assert self._process.stdin
        before = self._clocks()
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UserError(self._end()) from None
        found = self.answer()
        wall, own, busy = (b - a for a, b in zip(before, self._clocks(), strict=True))
        cores = wall * (os.cpu_count() or 1)
        # The system counts in hundredths of a second, so of very short answers a share may come out as anything.
        return found | {"own_cpu": own / cores, "other_cpu": min(1.0, max(0.0, busy - own) / cores)}

    def _clocks(self) -> tuple[float, float, float]:
        """Seconds: of the wall, of this child's cores, of all cores that did not idle."""
        own, machine = 0.0, psutil.cpu_times()
        with suppress(psutil.Error):  # it is gone, which the next answer tells
            own = sum(psutil.Process(self._process.pid).cpu_times()[:4])
        guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)  # counted as user's as well
        return time.perf_counter(), own, sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - guests

    def _end(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")[:300]
        if said.startswith("ModuleNotFoundError:"):
            module = said.partition("'")[2].partition("'")[0]
            return f"{self.name} needs {module}, which {self._program} lacks; install it there, or name another Python"
        if status < 0 and "Error" not in said:
            said = f"signal {-status}, as a system sends that is out of memory"
        return f"{self.name} ended before it was done ({said}); run it alone, or leave it out"
