"""Where records go: a JSONL file, TensorBoard, the console. A sink reads records and nothing else.

Text that comes from the data or the model is made safe before it is shown: without control characters and
without rich's markup, so that no row can drive the terminal. TensorBoard gets the scalars only.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from truetune import versions
from truetune.errors import UserError
from truetune.training.patience import patiently, write_text
from truetune.training.record import (
    Alarm,
    Checks,
    Evaluation,
    Record,
    Sample,
    Samples,
    Saved,
    Step,
    Verdict,
    as_json,
)

# C0 and C1 controls but newline and tab, line separators, and the characters that turn the direction of text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SHOWN = 400

TARGETS = re.compile("⟦([^⟦⟧]*)⟧")
"""A run of target tokens in ``Checks.shown``."""


class Sink(Protocol):
    """Takes the records of a run in order; ``close`` may be called once, also after an error."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def clean(text: str, limit: int | None = None) -> str:
    """``text`` safe to show: valid Unicode, no control or direction characters, at most ``limit`` characters.

    What ``limit`` cuts is counted at the end.
    """
    text = _UNSAFE.sub("", text).encode("utf-8", "replace").decode()
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: ``8.1 s``, ``12 min 3 s``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, unit, part in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small} {part}"
    return f"{whole} s"


def size(count: float) -> str:
    """Bytes in binary units: ``812 MiB``, ``1.43 GiB``, ``128 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} GiB" if count >= 100 else f"{count:.3g} GiB"


def _kept(path: Path, last: int) -> Iterable[str]:
    """The complete lines of an earlier session up to step ``last``. A crash may have cut the final line."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, form = record["step"], record.get("format", versions.RECORD)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number} is not a record, so the run cannot be continued in it; move the file away"
            ) from error
        versions.require(f"{path}:{number}", form, versions.RECORD)
        if step <= last:
            yield line


class JsonLines:
    """``metrics.jsonl``: one ``as_json(record)`` per line, whole or not there, NaN and infinities as null.

    ``resume_at`` is the step of the checkpoint that the run continues from: records of later steps, and a
    last line that a crash cut, are dropped, because those steps will be taken again. Without it the file
    starts anew.
    Waits while the disk is full. Raises UserError where the file to be continued holds something else than records.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        lines = [] if resume_at is None else list(_kept(path, resume_at))
        text = "".join(f"{line}\n" for line in lines)
        patiently(lambda: write_text(path, text), path, len(text.encode()))
        self._path = path
        self._file = path.open("ab", buffering=0)  # a buffer would keep the torn part of a line for later

    def write(self, record: Record) -> None:
        line = json.dumps(as_json(record), allow_nan=False).encode() + b"\n"
        patiently(lambda: self._append(line), self._path, len(line))

    def _append(self, line: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except BaseException:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """The scalars of steps and evaluations as TensorBoard events in ``folder``.

    Raises UserError where the extra is not installed.
    """

    def __init__(self, folder: Path, resume_at: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard is missing; pip install 'truetune[tensorboard]' or set output.tensorboard=false"
            ) from error
        purge = None if resume_at is None else resume_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, record: Record) -> None:
        names: tuple[str, ...]
        match record:
            case Step():
                names = ("loss", "rate", "gradient_norm", "tokens_per_second", "memory")
            case Evaluation():
                names = ("loss", "perplexity", "accuracy")
            case _:
                return
        for name in names:
            value = getattr(record, name)
            if value is not None:
                self._writer.add_scalar(f"{record.kind}/{name}", value, record.step)

    def close(self) -> None:
        self._writer.close()


class Console:
    """The run as a person watches it.

    On a terminal one live line (step, loss, rate, gradient norm, tokens/s, time left with the finishing
    clock time, memory); elsewhere a plain line about every 5 % of the ``total_steps``. All other records are
    printed as lines above it. ``quiet`` leaves only alarms and checks that failed.
    """

    def __init__(self, total_steps: int, quiet: bool = False, file: TextIO | None = None) -> None:
        self._total = max(1, total_steps)
        self._quiet = quiet
        self._terminal = Terminal(file=file, highlight=False)
        self._live: Live | None = None
        if self._terminal.is_terminal and not self._terminal.is_dumb_terminal and not quiet:
            self._live = Live(console=self._terminal, auto_refresh=False)
            self._live.start()
        self._drawn = 0.0
        self._began: tuple[float, int] | None = None
        self._first: Evaluation | None = None
        self._before: Samples | None = None

    def write(self, record: Record) -> None:
        match record:
            case Step():
                self._step(record)
            case Evaluation():
                self._evaluation(record)
            case Samples():
                self._samples(record)
            case Checks():
                self._checks(record)
            case Saved():
                self._say(f"saved      step {record.step:,} ({record.reason}): {record.path}")
            case Alarm():
                voids = "; throughput is not quoted from here on" if record.voids else ""
                alarm = f"ALARM      step {record.step:,}, {record.name}: {record.message}{voids}"
                self._say(alarm, "bold red", always=True)

    def verdicts(self, verdicts: Iterable[Verdict]) -> None:
        """Print a line per verdict: those of the ``Checks`` record, and whatever is checked after the run."""
        for verdict in verdicts:
            mark = "ok" if verdict.passed else "FAILED"
            advice = f"; {verdict.advice}" if verdict.advice and not verdict.passed else ""
            line = f"{mark:<10} {verdict.name}: {verdict.figure}{advice}"
            self._say(line, "" if verdict.passed else "bold red", always=not verdict.passed)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _text(self, text: str, style: str = "") -> Text:
        # Rich reads no markup in a Text. What the terminal cannot spell must not stop the training.
        encoding = self._terminal.encoding
        return Text(clean(text).encode(encoding, "replace").decode(encoding), style=style)

    def _say(self, text: str, style: str = "", always: bool = False) -> None:
        if always or not self._quiet:
            self._terminal.print(self._text(text, style), soft_wrap=True)

    def _step(self, record: Step) -> None:
        now = time.monotonic()
        first = self._began is None
        if self._began is None:
            self._began = (now - record.seconds, record.step - 1)
        last = record.step >= self._total
        if self._live is not None:
            # Drawing costs about a millisecond: ten times a second is enough.
            if last or now - self._drawn >= 0.1:
                self._drawn = now
                line = self._text(self._progress(record, now))
                line.no_wrap, line.overflow = True, "ellipsis"
                self._live.update(line, refresh=True)
        elif first or last or record.step * 20 // self._total != (record.step - 1) * 20 // self._total:
            self._say(self._progress(record, now))

    def _progress(self, record: Step, now: float) -> str:
        assert self._began is not None
        began, before = self._began
        left = (now - began) / (record.step - before) * max(0, self._total - record.step)
        done = datetime.now() + timedelta(seconds=left)
        clock = f"{done:%H:%M}" if done.date() == datetime.now().date() else f"{done:%a %d %b %H:%M}"
        speed = record.tokens_per_second
        parts = (
            f"step {record.step:,}/{self._total:,}",
            f"loss {record.loss:.3f}",
            f"lr {record.rate:.2e}",
            f"grad {record.gradient_norm:.3g}",
            "tokens/s not quoted" if speed is None else f"{speed:,.0f} tokens/s",
            f"{duration(left)} left, done {clock}" if left else "done",
            size(record.memory),
        )
        return " · ".join(parts)

    def _evaluation(self, record: Evaluation) -> None:
        first, self._first = self._first, self._first or record
        change = ""
        if first is not None and first.loss > 0:
            percent = 100 * (record.loss / first.loss - 1)
            change = f" ({percent:+.1f} % since step {first.step:,})"
        best = ", best so far" if record.best and first is not None else ""
        self._say(
            f"held out   step {record.step:,}: loss {record.loss:.4f}{change}, "
            f"perplexity {record.perplexity:.4g}, accuracy {100 * record.accuracy:.1f} %{best}",
            "bold",
        )

    def _checks(self, record: Checks) -> None:
        self.verdicts(record.verdicts)
        if record.shown and not self._quiet:
            self._say("learned    one document, its targets between ⟦ and ⟧:")
            document = self._text(clean(record.shown, _SHOWN))
            document.highlight_regex(TARGETS, "bold green")
            self._terminal.print(document, soft_wrap=True)

    def _samples(self, record: Samples) -> None:
        before, self._before = self._before, self._before or record
        if self._quiet:
            return
        self._say(f"samples    step {record.step:,}")
        for index, sample in enumerate(record.samples):
            table = Table.grid(padding=(0, 2))
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            rows = [("prompt", clean(sample.prompt, _SHOWN)), ("reference", clean(sample.reference, _SHOWN))]
            if before is not None and index < len(before.samples):
                rows.append((f"step {before.step:,}", _answer(before.samples[index])))
            rows.append((f"step {record.step:,}", _answer(sample)))
            for name, text in rows:
                table.add_row(self._text(name, "dim"), self._text(text))
            self._terminal.print(table)
            self._say("")


def _answer(sample: Sample) -> str:
    return clean(sample.answer, _SHOWN) + ("" if sample.stopped else "  [did not stop]")
