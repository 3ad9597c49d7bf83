"""Runs as processes of their own, to be killed, traced and starved. They are forked from one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from truetune.training.checkpoint import Checkpoints

WAIT = 0.2
"""Seconds that a run waits for room, in place of the usual."""


def start(*arguments: str, printed: Path, held: bool = False) -> BaseProcess:
    """``truetune`` with ``arguments``; what it prints is appended to ``printed``.

    held: it waits until a file ``printed`` + ".go" is there.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server imports this module by its name
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes", "truetune.run", "truetune.cli"])
    process = context.Process(target=_command, args=(arguments, printed, held), daemon=True)
    process.start()
    return process


def _command(arguments: tuple[str, ...], printed: Path, held: bool) -> None:
    from truetune.cli import app
    from truetune.training import patience

    with printed.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    patience.WAIT = WAIT
    while held and not printed.with_suffix(".go").exists():
        time.sleep(0.01)
    app(list(arguments), prog_name="truetune")


def newest(folder: Path) -> int:
    """The last step that has a checkpoint, 0 without one; no file is read."""
    return max(Checkpoints(folder / "checkpoints").steps(), default=0)


def until(condition: Callable[[], bool], process: BaseProcess, seconds: float = 120) -> None:
    """Wait for ``condition``, at most until the process ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() or condition(), "the run ended too early"
        assert time.monotonic() < end, f"it did not come within {seconds} s"
        time.sleep(0.001)


def ended(process: BaseProcess, seconds: float = 120) -> int:
    """The exit status, once the process has ended; negative for a signal."""
    process.join(seconds)
    assert process.exitcode is not None, "the run does not end"
    return process.exitcode


def users_of(folder: Path) -> list[int]:
    """Processes that have a file in ``folder`` open."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(folder in Path(f.path).parents for f in process.open_files()):
                found.append(process.pid)
        except psutil.Error:  # it ended in between
            continue
    return found


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes at ``place``."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.fail(f"a full disk can't be made here ({mounted.stderr.strip()}); run this as root, e.g. in a container")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def trace(process: BaseProcess, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """strace with ``options`` attached to ``process``."""
    try:
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", str(log), *options, "-p", str(process.pid)])
    except FileNotFoundError:
        pytest.fail("strace is missing; apt-get install strace")
    until(lambda: "TracerPid:\t0" not in Path(f"/proc/{process.pid}/status").read_text(), process)
    return tracer
