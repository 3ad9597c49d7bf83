"""What was found, as one self-contained HTML page in the style of a run's report, whose template it extends.

No script and no network; everything that comes from data or model is escaped by jinja2's autoescape.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from truetune.errors import UserError
from truetune.inspection.facts import HELD_OUT, TRAINING, Inspection, Lengths, Part, Tally
from truetune.inspection.words import grids
from truetune.report import facts
from truetune.report.page import template
from truetune.report.plots import Axis, ticks
from truetune.training.patience import write_text
from truetune.training.sinks import clean


def write_page(found: Inspection, file: Path) -> Path:
    """Write the page to ``file``. Raises UserError where that cannot be written."""
    try:
        return write_text(file, render(found))
    except OSError as error:
        raise UserError(f"can't write {file} ({error.strerror}); name another file with --page") from error


def render(found: Inspection) -> str:
    """The page as HTML."""
    return template("inspection.html").render(
        found=found,
        visible=_visible,
        source=" + ".join(facts.called(part.report.source) for part in found.of(TRAINING)),
        model=facts.called(found.model),
        grids=list(grids(found)),
        bars=bars(found.lengths, found.max_length),
        totals=_totals(found),
        pairs=[(found.called(part), pair) for part in found.parts for pair in part.copies.examples],
    )


def _visible(token: str) -> str:
    """A token as text in which line ends are seen."""
    return clean(token).replace("\n", "↵\n")


def _totals(found: Inspection) -> list[facts.Row]:
    train, held_out = found.of(TRAINING), found.of(HELD_OUT)
    targets, tokens = sum(part.report.targets for part in train), sum(part.report.tokens for part in train)
    exact, near = (sum(tally.count for tally in some) for some in zip(*map(_copies, train), strict=True))
    both = sum(tally.count for part in held_out for tally in _copies(part))
    rows = [
        ("Rows", facts.count(sum(part.report.rows for part in train))),
        ("Documents", facts.count(sum(part.report.documents for part in train))),
        ("Tokens", facts.count(tokens)),
        ("Targets", f"{targets:,} ({facts.percent(targets / tokens if tokens else None)})"),
        ("Duplicates", f"{exact:,} exact, {near:,} near"),
        ("Held out, and trained on", f"{both:,} of {sum(part.copies.rows for part in held_out):,}"),
    ]
    return [*rows, ("Steps", facts.count(found.plan.steps))] if found.plan else rows


def _copies(part: Part) -> tuple[Tally, Tally]:
    return part.copies.exact, part.copies.near


def bars(lengths: Lengths, max_length: int) -> Markup:
    """The histogram as SVG; rows longer than max_length in another colour. The last bar has all that are longer."""
    found, high = lengths.bars, max(n for _, _, n in lengths.bars)
    gap = found[0][1] + 1 - found[0][0]
    across = Axis(found[0][0], found[-1][0] + gap)
    up = Axis(0, 1.05 * high)
    bar = Markup('<rect class="{}" x="{:.2f}%" y="{:.2f}%" width="{:.2f}%" height="{:.2f}%"><title>{}</title></rect>')
    line = Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="{:.2f}%" y2="{:.2f}%"/>')
    side = Markup('<text class="up" x="-8" y="{:.2f}%" dy=".32em">{}</text>')
    tick = Markup('<text class="across" x="{:.2f}%" y="100%" dy="1.5em">{}</text>')
    parts = []
    for value, text in ticks(up, 4):
        if value == int(value):
            y = 100 - up.place(value)
            parts += [line.format("grid", 0, 100, y, y), side.format(y, text)]
    for first, last, n in found:
        width = 100 * (min(last, first + gap - 1) + 1 - first) / (across.high - across.low)
        told = f"{first:,} to {last:,} tokens: {n:,} rows"
        kind = "longer" if first > max_length else "within"
        parts.append(bar.format(kind, across.place(first), 100 - up.place(n), 0.86 * width, up.place(n), told))
    parts += [tick.format(across.place(value), text) for value, text in ticks(across, 6) if value == int(value)]
    if across.low < max_length < across.high:
        x = across.place(max_length + 1)
        parts.append(line.format("limit", x, x, 0, 100))
    return Markup('<svg class="plot" role="img" aria-label="Lengths of the rows">{}</svg>').format(
        Markup("").join(parts)
    )
