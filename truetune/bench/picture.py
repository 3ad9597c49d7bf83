"""Results of ``truetune bench training`` drawn as bars: a group for each result, a bar for each side.

A bar is the median of useful tokens/s as a share of the fastest side of its group, the line upon it from quartile to
quartile, since tokens/s of different models share no scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from truetune.bench.table import OURS, figures, title
from truetune.errors import UserError
from truetune.training.patience import write_text

_NAMES, _WIDE, _VALUES, _BAR, _GAP, _MARGIN = 110, 420, 190, 18, 8, 24
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1d1b19 } .title { font-weight: 600 } .name { text-anchor: end }
.ours { fill: #16697a } .peer { fill: #c9c2b8 } line { stroke: #1d1b19; stroke-width: 1.5 }
"""


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Write the picture. Raises UserError for another format, or where it can't be written."""
    if file.suffix != ".svg":
        raise UserError(f"{file} is not SVG, the one format that the picture has; end its name in .svg")
    try:
        write_text(file, picture(results))
    except OSError as error:
        raise UserError(f"can't write {file} ({error.strerror}); name another file") from error


def picture(results: Sequence[dict[str, Any]]) -> str:
    """The results below each other, as SVG."""
    parts, top = [], _MARGIN
    for result in results:
        group, height = _group(result)
        parts.append(Markup('<g transform="translate({} {})">{}</g>').format(_MARGIN, top, group))
        top += height + _MARGIN
    width = 2 * _MARGIN + _NAMES + _WIDE + _VALUES
    whole = '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">'
    paper = '<rect width="100%" height="100%" fill="#fdfcfa"/>'
    return whole.format(width, top) + f"<style>{_STYLE}</style>{paper}{Markup('').join(parts)}</svg>\n"


def _group(result: dict[str, Any]) -> tuple[Markup, int]:
    """The bars of one result, and how high they stand together."""
    found = figures(result)
    scale = _WIDE / max(f.useful.high for f in found)
    parts = [Markup('<text class="title" y="12">{}: useful tokens per second</text>').format(title(result))]
    bar = Markup(
        '<text class="name" x="{names}" y="{text}">{name}</text>'
        '<rect class="{style}" x="{left}" y="{top}" width="{wide:.1f}" height="{high}"/>'
        '<line x1="{low:.1f}" x2="{upper:.1f}" y1="{middle}" y2="{middle}"/>'
        '<text x="{value:.1f}" y="{text}">{said}</text>'
    )
    for i, f in enumerate(found):
        top, left = 24 + i * (_BAR + _GAP), _NAMES + 8
        ratio = f", ours {f.ratio.middle:.2f} times as fast" if f.ratio else ""
        parts.append(
            bar.format(
                names=_NAMES,
                name=f.side,
                style="ours" if f.side == OURS else "peer",
                left=left,
                top=top,
                wide=scale * f.useful.middle,
                high=_BAR,
                low=left + scale * f.useful.low,
                upper=left + scale * f.useful.high,
                middle=top + _BAR / 2,
                text=top + _BAR - 5,
                value=left + scale * f.useful.high + 6,
                said=f"{f.useful.middle:,.0f}{ratio}",
            )
        )
    return Markup("").join(parts), 24 + len(found) * (_BAR + _GAP)
