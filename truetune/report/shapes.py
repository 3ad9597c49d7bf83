"""The schedules drawn: a line of blocks for a terminal, and a picture of all of them.

Each with its defaults and a warm-up, from the function that the trainer calls. What needs tokens is drawn for the
long run of ``PLAN``; what needs an earlier run is not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

from truetune import registry
from truetune.errors import UserError
from truetune.report.plots import Curve, Plot
from truetune.schedules import SCHEDULES, Plan, with_warmup

STEPS, WARMUP = 128, 0.1
PLAN = Plan(rate=0.02, tokens=[40_000_000 * step for step in range(1, STEPS + 1)], batch=128)
"""Of the run that is drawn: the peak and documents of a step that Power was made for, and 5 G tokens."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_ACROSS, _WIDE, _HIGH, _MARGIN = 3, 280, 110, 46
_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #6d6861 } .name { font-size: 13px; font-weight: 600; fill: #1d1b19 }
.plot { overflow: visible } .up { text-anchor: end } .across { text-anchor: middle } .grid { stroke: #e4e0d9 }
path { fill: none; stroke: #16697a; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke }
"""


def factors(name: str) -> list[float] | None:
    """Factors of the peak over ``STEPS`` steps, None of a schedule whose options must be given."""
    function = SCHEDULES[name]
    if any(option.default is Parameter.empty for option in registry.user_options("schedule", name, function).values()):
        return None
    shape = registry.bind("schedule", SCHEDULES, name, {}, plan=PLAN)
    schedule = with_warmup(shape, STEPS, WARMUP)
    return [schedule(t) for t in range(STEPS)]


def blocks(values: Sequence[float] | None, width: int = 32) -> str:
    """The values, 0 to 1, as ``width`` blocks of eight heights; each is the mean of its share of them."""
    if values is None:
        return "(as an earlier run has it)".ljust(width)
    ends = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    return "".join(_BLOCKS[min(7, int(8 * mean))] for mean in means)


def write_picture(file: Path) -> None:
    """All schedules beside each other, as SVG. Raises UserError for another format, or where it can't be written."""
    if file.suffix != ".svg":
        raise UserError(f"{file} is not SVG, the one format that the picture has; end its name in .svg")
    try:
        file.write_text(picture({name: factors(name) for name in SCHEDULES}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write {file} ({error.strerror}); name another file") from error


def picture(drawn: Mapping[str, Sequence[float] | None]) -> str:
    """One plot for each name, three in a row."""
    curves = {name: values for name, values in drawn.items() if values is not None}
    frame = Markup('<g transform="translate({} {})"><text class="name" y="-10">{}</text>{}</g>')
    size = Markup('<svg width="{}" height="{}" overflow="visible">{}</svg>')
    plots = []
    for i, (name, values) in enumerate(curves.items()):
        plot = Plot(name, [Curve(name, "smooth", list(enumerate(values, 1)))], zero=True)
        row, column = divmod(i, _ACROSS)
        place = (_MARGIN + column * (_WIDE + _MARGIN), _MARGIN + row * (_HIGH + 2 * _MARGIN))
        plots.append(frame.format(*place, name, size.format(_WIDE, _HIGH, plot.svg())))
    width = _MARGIN + _ACROSS * (_WIDE + _MARGIN)
    height = -(-len(plots) // _ACROSS) * (_HIGH + 2 * _MARGIN)
    whole = '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">'
    paper = '<rect width="100%" height="100%" fill="#fdfcfa"/>'
    return whole.format(width, height) + f"<style>{_STYLE}</style>{paper}{Markup('').join(plots)}</svg>\n"
