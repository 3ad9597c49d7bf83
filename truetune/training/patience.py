"""Writing on a disk that may be full: no file is left half written, and a run waits until there is room.

Full means ENOSPC or EDQUOT. Every other error is raised, and nothing is tried again.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from truetune.errors import UserError

WAIT = 5.0
"""Seconds between two attempts."""
FULL = (errno.ENOSPC, errno.EDQUOT)

Written = TypeVar("Written")


class Interrupted(UserError):
    """A signal ended the run, and what it had saved is intact; the message says where it stopped."""


class _Signalled(BaseException):
    """What a handler raises in the midst of anything. No Exception, so that nothing on its way out takes it for a fault
    of the model or of the data."""


def patiently(write: Callable[[], Written], place: Path, need: int = 0) -> Written:
    """What ``write`` returns, which is called again for as long as it meets a full disk.

    write: to be called any number of times; it leaves nothing half done when it raises.
    place: what is written; need: how many bytes, 0 if that is not known.
    Raises Interrupted after SIGINT or SIGTERM while it waits, and whatever else ``write`` raises.
    """
    try:
        return write()
    except OSError as error:
        if error.errno not in FULL:
            raise
        wanted = f" and {need / 1e6:,.1f} MB are needed there" if need else ""
        print(
            f"paused     {error.strerror} at {place}{wanted}; free some space and the run goes on by itself, or end "
            "it with Ctrl-C: everything up to the last checkpoint is kept",
            file=sys.stderr,
        )
    with ended_by_signals(f"stopped while the disk of {place} was full"):
        while True:
            time.sleep(WAIT)
            if shutil.disk_usage(existing(place)).free < need:
                continue
            try:
                written = write()
            except OSError as error:
                if error.errno not in FULL:
                    raise
            else:
                print(f"goes on    there is room at {place}", file=sys.stderr)
                return written


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handler`` for SIGINT and SIGTERM within the block; only in the main thread, since no other may set one."""
    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def ended_by_signals(sentence: str) -> Iterator[None]:
    """SIGINT or SIGTERM within the block raises Interrupted(sentence)."""

    def end(_: int, __: FrameType | None) -> None:
        raise _Signalled

    try:
        with on_signals(end):
            yield
    except _Signalled:
        raise Interrupted(sentence) from None


@contextmanager
def halted_by_signals(halt: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM within the block calls ``halt``; a second one raises KeyboardInterrupt."""
    seen: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        name = signal.Signals(number).name
        print(f"\n{name}: stopping, and saving at a step boundary; again to stop at once", file=sys.stderr)
        halt()

    with on_signals(stop):
        yield


def write_text(file: Path, text: str) -> Path:
    """Write ``text`` as UTF-8 under a temporary name and rename it to ``file``, which holds the old or the new."""
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        return scratch.replace(file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def as_os_error(error: Exception, place: Path) -> OSError | None:
    """The OSError of ``place`` that ``error`` is or, from a library written in Rust, tells of; else None."""
    if isinstance(error, OSError):
        number = error.errno
    else:
        told = re.search(r"\(os error (\d+)\)$", str(error))
        number = int(told[1]) if told else None
    return OSError(number, os.strerror(number), str(place)) if number else None


def existing(place: Path) -> Path:
    """``place``, or the nearest folder above it that is there."""
    return next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
