"""Results drawn as bars: a group for each result, a bar for each of its sides, as long as its figure.

The longest bar of a group is as wide as the picture, since figures of different results share no scale; the line upon
a bar goes from its low to its high, such as the quartiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from truetune.bench.table import OURS, figures, title
from truetune.errors import UserError
from truetune.training.patience import write_text

_NAMES, _WIDE, _VALUES, _BAR, _GAP, _MARGIN = 110, 420, 190, 18, 8, 24
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1d1b19 } .title { font-weight: 600 } .name { text-anchor: end }
.ours { fill: #16697a } .peer { fill: #c9c2b8 } line { stroke: #1d1b19; stroke-width: 1.5 }
"""


class Bar(NamedTuple):
    """said: beside the bar. marked: whether it has the colour that one of a group has."""

    name: str
    middle: float
    low: float
    high: float
    said: str
    marked: bool


class Group(NamedTuple):
    title: str
    bars: Sequence[Bar]


def speeds(result: dict[str, Any]) -> Group:
    """The sides of a result of ``truetune bench training``, by their useful tokens/s."""
    bars = []
    for f in figures(result):
        ratio = f", ours {f.ratio.middle:.2f} times as fast" if f.ratio else ""
        bars.append(Bar(f.side, *f.useful, f"{f.useful.middle:,.0f}{ratio}", f.side == OURS))
    return Group(f"{title(result)}: useful tokens per second", bars)


def draw(groups: Sequence[Group], file: Path) -> None:
    """Write the picture. Raises UserError for another format, or where it can't be written."""
    if file.suffix != ".svg":
        raise UserError(f"{file} is not SVG, the one format that the picture has; end its name in .svg")
    try:
        write_text(file, picture(groups))
    except OSError as error:
        raise UserError(f"can't write {file} ({error.strerror}); name another file") from error


def picture(groups: Sequence[Group]) -> str:
    """The groups below each other, as SVG."""
    parts, top = [], _MARGIN
    for one in groups:
        group, height = _drawn(one)
        parts.append(Markup('<g transform="translate({} {})">{}</g>').format(_MARGIN, top, group))
        top += height + _MARGIN
    width = 2 * _MARGIN + _NAMES + _WIDE + _VALUES
    whole = '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">'
    paper = '<rect width="100%" height="100%" fill="#fdfcfa"/>'
    return whole.format(width, top) + f"<style>{_STYLE}</style>{paper}{Markup('').join(parts)}</svg>\n"


def _drawn(group: Group) -> tuple[Markup, int]:
    """The bars of one group, and how high they stand together."""
    scale = _WIDE / max((bar.high for bar in group.bars), default=1.0)
    parts = [Markup('<text class="title" y="12">{}</text>').format(group.title)]
    drawn = Markup(
        '<text class="name" x="{names}" y="{text}">{name}</text>'
        '<rect class="{style}" x="{left}" y="{top}" width="{wide:.1f}" height="{high}"/>'
        '<line x1="{low:.1f}" x2="{upper:.1f}" y1="{middle}" y2="{middle}"/>'
        '<text x="{value:.1f}" y="{text}">{said}</text>'
    )
    for i, bar in enumerate(group.bars):
        top, left = 24 + i * (_BAR + _GAP), _NAMES + 8
        parts.append(
            drawn.format(
                names=_NAMES,
                name=bar.name,
                style="ours" if bar.marked else "peer",
                left=left,
                top=top,
                wide=scale * bar.middle,
                high=_BAR,
                low=left + scale * bar.low,
                upper=left + scale * bar.high,
                middle=top + _BAR / 2,
                text=top + _BAR - 5,
                value=left + scale * bar.high + 6,
                said=bar.said,
            )
        )
    return Markup("").join(parts), 24 + len(group.bars) * (_BAR + _GAP)
