"""The run as a person watches it: on a terminal one live line, elsewhere (a file, CI, a notebook) plain lines.

Text that comes from the data or the model is shown without control characters and without rich's markup, so that no
row can drive the terminal.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from truetune.training.record import Alarm, Checks, Evaluation, Record, Sample, Samples, Saved, Step, Verdict
from truetune.training.sinks import TARGETS, clean, duration, size

FEW = 30
"""Held-out documents below which a loss is said to be rough: its standard error is itself too rough to go by."""
PAUSE = 60.0
"""Seconds after which a plain line is due, however few steps were taken: silence looks like a run that hangs."""
_WIDE = 120
"""Columns where there is no terminal to ask."""
_SHOWN = 400


class Console:
    """Steps as one live line (step, loss, rate, gradient norm, tokens/s, time left with the finishing clock time,
    memory) that is folded between its parts where the terminal is narrower; without a terminal a plain line about
    every 5 % of the ``total_steps``, and at least every minute. All other records are lines above it.

    earlier: records of the session that this one continues: evaluations and samples are compared with its first.
    quiet: only alarms and checks that failed. file: standard output unless given.
    """

    def __init__(
        self, total_steps: int, quiet: bool = False, file: TextIO | None = None, earlier: Iterable[Record] = ()
    ) -> None:
        self._total = max(1, total_steps)
        self._quiet = quiet
        # A notebook shows plain text as it is; as HTML every line would be a block of its own.
        self._terminal = Terminal(file=file, highlight=False, force_jupyter=False)
        if not self._terminal.is_terminal and not os.environ.get("COLUMNS"):
            self._terminal.width = _WIDE
        self._live: Live | None = None
        # Colours may be forced upon a file, but a line that is drawn again and again can only be read on a screen.
        drawable = self._terminal.is_terminal and not self._terminal.is_dumb_terminal and self._terminal.file.isatty()
        if drawable and not quiet:
            self._live = Live(console=self._terminal, auto_refresh=False)
            self._live.start()
        self._drawn = 0.0
        self._began: tuple[float, int] | None = None
        earlier = list(earlier)
        self._first = next((r for r in earlier if isinstance(r, Evaluation)), None)
        self._before = next((r for r in earlier if isinstance(r, Samples)), None)
        self._asked = False
        self._warned = False

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
                self._live.update(self._text(folded(self._progress(record, now), self._terminal.width)), refresh=True)
            return
        twentieth = record.step * 20 // self._total != (record.step - 1) * 20 // self._total
        if first or last or twentieth or now - self._drawn >= PAUSE:
            self._drawn = now
            self._say(" · ".join(self._progress(record, now)))

    def _progress(self, record: Step, now: float) -> tuple[str, ...]:
        assert self._began is not None
        began, before = self._began
        left = (now - began) / (record.step - before) * max(0, self._total - record.step)
        done = datetime.now() + timedelta(seconds=left)
        clock = f"{done:%H:%M}" if done.date() == datetime.now().date() else f"{done:%a %d %b %H:%M}"
        speed = record.tokens_per_second
        return (
            f"step {record.step:,}/{self._total:,}",
            f"loss {record.loss:.3f}",
            *([] if record.router_loss is None else [f"router {record.router_loss:.3g}"]),
            f"lr {record.rate:.2e}",
            f"grad {record.gradient_norm:.3g}",
            "tokens/s not quoted" if speed is None else f"{speed:,.0f} tokens/s",
            f"{duration(left)} left, done {clock}" if left else "done",
            size(record.gpu_memory or record.memory),
        )

    def _evaluation(self, record: Evaluation) -> None:
        first, self._first = self._first, self._first or record
        change = ""
        if first is not None and first.loss:
            percent = 100 * (record.loss / first.loss - 1)
            change = f" ({percent:+.1f} % since step {first.step:,})"
        best = ", best so far" if record.best and first is not None else ""
        error = "" if record.error is None else f" ± {record.error:.2g}"
        self._say(
            f"held out   step {record.step:,}: loss {record.loss:.4f}{error}{change}, "
            f"perplexity {record.perplexity:.4g}, accuracy {100 * record.accuracy:.1f} %{best}",
            "bold",
        )
        for name, loss in record.by_source.items():
            self._say(f"           {name}: loss {loss:.4f}")
        if record.documents is not None and record.documents < FEW and not self._warned:
            self._warned = True
            self._say(
                f"few        only {record.documents:,} documents ({record.targets:,} targets) are held out, so others "
                f"may give another loss; hold out {FEW} or more with evaluation.rows or evaluation.fraction",
                "yellow",
            )

    def _checks(self, record: Checks) -> None:
        for verdict in record.verdicts:
            self._verdict(verdict)
        if record.shown and not self._quiet:
            self._say("learned    one document, its targets between ⟦ and ⟧:")
            document = self._text(clean(record.shown, _SHOWN))
            document.highlight_regex(TARGETS, "bold green")
            self._terminal.print(document, soft_wrap=True)

    def _verdict(self, verdict: Verdict) -> None:
        mark = "ok" if verdict.passed else "FAILED"
        advice = f"; {verdict.advice}" if verdict.advice and not verdict.passed else ""
        line = f"{mark:<10} {verdict.name}: {verdict.figure}{advice}"
        self._say(line, "" if verdict.passed else "bold red", always=not verdict.passed)

    def _samples(self, record: Samples) -> None:
        if self._quiet:
            return
        rounds = [record]
        if not self._asked and self._before is not None:  # this session has not shown them yet
            rounds.insert(0, self._before)
        self._say(f"samples    step {record.step:,}")
        for index, sample in enumerate(record.samples):
            table = Table.grid(padding=(0, 2))
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            rows = []
            if not self._asked:
                rows += [("prompt", clean(sample.prompt, _SHOWN)), ("reference", clean(sample.reference, _SHOWN))]
            rows += [(f"step {r.step:,}", _answer(r.samples[index])) for r in rounds if index < len(r.samples)]
            for place, (name, text) in enumerate(rows):
                number = "" if place else str(index + 1)
                table.add_row(self._text(f"{number:<3}{name}", "dim"), self._text(text))
            self._terminal.print(table)
        self._asked = True
        self._say("")


def folded(parts: Iterable[str], width: int) -> str:
    """The parts on as few lines of ``width`` columns as they need; none is broken but one that is wider."""
    # A space that does not break keeps together what belongs together.
    line = "\u00a0· ".join(part.replace(" ", "\u00a0") for part in parts)
    return "\n".join(textwrap.wrap(line, max(1, width))).replace("\u00a0", " ")


def _answer(sample: Sample) -> str:
    return clean(sample.answer, _SHOWN) + ("" if sample.stopped else "  [did not stop]")
