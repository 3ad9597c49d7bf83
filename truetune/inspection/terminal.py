"""What was found, for a terminal: tables, a bar per length, rows in colour.

Where there are no colours, targets stand between ⟦ and ⟧, and what is cut between ⟪ and ⟫.
Text of the data is made safe as everywhere (``clean``), and rich reads no mark-up in it.
"""

from __future__ import annotations

from itertools import groupby
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from truetune.inspection.facts import Inspection, Pair, Shown, Token
from truetune.inspection.words import Grid, grids
from truetune.training.sinks import clean

STYLES = {"trained": "bold green", "context": "", "template": "dim", "cut": "red strike"}
_MARKS = {"trained": "⟦{}⟧", "cut": "⟪{}⟫"}
_WIDTH, _BARS, _ROW = 120, 24, 2000


def write(found: Inspection, file: TextIO | None = None) -> None:
    """Print all of it."""
    terminal = Console(file=file, highlight=False)
    if not terminal.is_terminal:
        terminal.width = _WIDTH
    for grid in grids(found):
        _grid(terminal, grid)
        if grid.title == "Lengths":
            _bars(terminal, found)
        if grid.title == "Duplicates":
            for part in found.parts:
                for pair in part.copies.examples:
                    _pair(terminal, found.called(part), pair)
    _say(terminal, "\nRows", "bold")
    legend = Text("  ").join(_colored(terminal, [Token(kind, kind)]) for kind in STYLES)
    terminal.print(legend)
    for row in found.shown:
        _row(terminal, row)
    _say(terminal, f"\n{len(found.warnings)} warning{'s' * (len(found.warnings) != 1)}", "bold")
    for warning in found.warnings:
        _say(terminal, f"- {warning}", "yellow")


def _say(terminal: Console, text: str, style: str = "") -> None:
    terminal.print(_text(terminal, text, style), soft_wrap=True)


def _text(terminal: Console, text: str, style: str = "") -> Text:
    # What the terminal cannot spell must not stop the command.
    return Text(clean(text).encode(terminal.encoding, "replace").decode(terminal.encoding), style=style)


def _grid(terminal: Console, grid: Grid) -> None:
    _say(terminal, f"\n{grid.title}", "bold")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(grid.head):
        table.add_column(name, justify="left" if place < grid.left else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(_text(terminal, cell) for cell in row))
    terminal.print(table)
    if grid.note:
        _say(terminal, grid.note, "dim")


def _bars(terminal: Console, found: Inspection) -> None:
    """A line for every other bar; the one with max_length is marked."""
    bars = found.lengths.bars
    joined = [(a[0], b[1], a[2] + (b[2] if a is not b else 0)) for a, b in _twos(bars)]
    most = max(n for _, _, n in joined)
    for first, last, n in joined:
        mark = "  <- max_length" if first <= found.max_length <= last else ""
        bar = "#" * max(round(60 * n / most), n > 0)
        _say(terminal, f"{first:>7,} - {last:<7,} {n:>8,}  {bar}{mark}".rstrip())


def _twos(bars: tuple[tuple[int, int, int], ...]) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    wide = len(bars) > _BARS
    return [(bars[i], bars[min(i + wide, len(bars) - 1)]) for i in range(0, len(bars), 1 + wide)]


def _pair(terminal: Console, called: str, pair: Pair) -> None:
    _say(
        terminal,
        f"{called}: row {pair.row}, and row {pair.other} of {pair.source}, similarity {pair.similarity:.2f}",
        "dim",
    )
    for text in (pair.text, pair.other_text):
        _say(terminal, "  " + " ".join(clean(text, 200).split()))


def _row(terminal: Console, row: Shown) -> None:
    fate = f", {row.cut:,} of them cut" if row.cut else ""
    fate += f"; dropped: {row.fate}" if row.fate else ""
    _say(
        terminal,
        f"\n{row.why}: row {row.row} of {row.source}, {row.length:,} tokens, {row.targets:,} targets{fate}",
        "bold",
    )
    terminal.print(_colored(terminal, row.tokens[: row.before]), soft_wrap=True)
    if row.left:
        _say(terminal, f"... {row.left:,} tokens ...", "dim")
        terminal.print(_colored(terminal, row.tokens[row.before :]), soft_wrap=True)


def _colored(terminal: Console, tokens: tuple[Token, ...] | list[Token]) -> Text:
    line = Text()
    for kind, run in groupby(tokens, lambda token: token.kind):
        text = "".join(token.text for token in run)
        if terminal.color_system is None:
            text = _MARKS.get(kind, "{}").replace("{}", text)
        line.append_text(_text(terminal, text, STYLES[kind]))
    return line
