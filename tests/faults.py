"""Faults made on purpose, and what must be true of a run once it has met them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import STEPS, facts, records, same_file
from safetensors import SafetensorError

from truetune.training import checkpoint, patience, sinks

CALLS = ("fsync", "replace", "rename", "line", "tensors")


def assert_same_end(folder: Path, straight: Path, steps: int = STEPS) -> None:
    """The run ended as the one that nothing disturbed, bit for bit, with every step on record once."""
    assert facts(folder)["status"] == "finished"
    last = f"checkpoints/step-{steps:08d}"
    exports = [p.relative_to(straight) for p in straight.glob("[am]*/*model.safetensors")]
    assert exports
    for file in (*exports, *(f"{last}/{name}.safetensors" for name in ("weights", "optimizer", "random"))):
        assert same_file(folder / file, straight / file), file
    figures = ("step", "loss", "rate", "gradient_norm", "tokens", "targets", "documents")
    mine, other = ([[r[k] for k in figures] for r in records(f) if r["kind"] == "step"] for f in (folder, straight))
    assert mine == other and [row[0] for row in mine] == list(range(1, steps + 1))
    evaluations = [
        [(r["step"], r["loss"], r["best"]) for r in records(f) if r["kind"] == "evaluation"] for f in (folder, straight)
    ]
    assert evaluations[0] == evaluations[1]
    mine, other = facts(folder)["result"], facts(straight)["result"]
    assert all(mine[name] == other[name] for name in ("steps", "tokens", "targets"))
    assert all(mine[name]["loss"] == other[name]["loss"] for name in ("before", "after"))
    assert mine["seconds"] == pytest.approx(sum(r["seconds"] for r in records(folder) if r["kind"] == "step"))
    assert not leftovers(folder)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and folders, by any name that the program or a library gives them."""
    return [p for p in folder.rglob("*") if p.name.startswith(".") or p.suffix in (".tmp", ".new", ".old")]


def fail_at(patch: pytest.MonkeyPatch, name: str, at: int, number: int, times: int = 1) -> list[int]:
    """Let the ``at``-th call (from 1) that writes, and the ``times - 1`` after it, fail with errno ``number``.

    name: one of CALLS. Returns a list that has one entry for every call that failed.
    """
    seen, failed = 0, []

    def due() -> bool:
        nonlocal seen
        seen += 1
        if at <= seen < at + times:
            failed.append(seen)
            return True
        return False

    def wrapped(real: Callable[..., Any], error: Callable[[], Exception]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if due():
                raise error()
            return real(*arguments, **options)

        return call

    if name == "line":
        tear_lines(patch, due, number)
    elif name == "tensors":
        told = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        patch.setattr(checkpoint, "save_file", wrapped(checkpoint.save_file, lambda: SafetensorError(told)))
    else:
        patch.setattr(os, name, wrapped(getattr(os, name), lambda: OSError(number, os.strerror(number))))
    return failed


def tear_lines(patch: pytest.MonkeyPatch, due: Callable[[], bool], number: int) -> None:
    """Write 300 bytes at a time to metrics.jsonl; when ``due``, write 10 and then fail."""

    class Torn:
        def __init__(self, file: Any) -> None:
            self.file, self.fails = file, False

        def write(self, line: bytes) -> int:
            if self.fails:
                self.fails = False
                raise OSError(number, os.strerror(number))
            self.fails = due()
            return self.file.write(line[: 10 if self.fails else 300])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = sinks.JsonLines.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self._file = Torn(self._file)

    patch.setattr(sinks.JsonLines, "__init__", init)


def while_paused(patch: pytest.MonkeyPatch, act: Callable[[], None] = lambda: None) -> list[float]:
    """Call ``act`` instead of waiting for room; the waits that were asked for are in the list."""
    waits: list[float] = []

    class Clock:
        @staticmethod
        def sleep(seconds: float) -> None:
            waits.append(seconds)
            act()

    patch.setattr(patience, "time", Clock)
    return waits
