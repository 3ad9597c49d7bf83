"""The report's plots as hand-made SVG: text stays text and lines stay thin at every width, in light and dark.

Everything is placed in percent of the plot, and only the curves live in an inner ``<svg>`` that is stretched
(``preserveAspectRatio="none"``, strokes that do not scale); so the page can be 400 or 1400 px wide and no
label changes its size. Colours are CSS classes. A value that is not finite (or not positive, on a logarithmic
axis) is a gap in its curve. Bars, interaction and more than one axis are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Curve:
    """``points`` are (step, value or None), in order. ``style`` is a CSS class; "dots" are drawn as marks."""

    name: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Plot:
    """One plot over the steps.

    log: logarithmic values. zero: the axis starts at zero. alarms: (step, what happened), drawn as lines.
    """

    title: str
    curves: Sequence[Curve]
    log: bool = False
    zero: bool = False
    alarms: Sequence[tuple[int, str]] = ()

    def svg(self) -> Markup:
        """The plot, or an empty string where no curve has a value to show."""
        curves = [Curve(c.name, c.style, thin([(x, self._place(y)) for x, y in c.points])) for c in self.curves]
        values = [y for c in curves for _, y in c.points if y is not None]
        if not values:
            return Markup("")
        steps = [x for c in curves for x, _ in c.points] + [x for x, _ in self.alarms]
        across = Axis(min(steps), max(*steps, min(steps) + 1))
        low, high = (0.0 if self.zero else min(values)), max(values)
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        up = Axis(low if self.zero else low - room, high + room)
        paths = [_path(c, across, up) for c in curves if c.style != "dots"]
        parts = [
            _rows(up, log_ticks(up) if self.log else ticks(up, 6)),
            _columns(across, self.alarms),
            Markup('<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{}</svg>').format(_joined(paths)),
            _joined(_dots(c, across, up) for c in curves if c.style == "dots"),
        ]
        frame = Markup('<svg class="plot" role="img" aria-label="{}">{}</svg>')
        return frame.format(self.title, _joined(parts))

    def shown(self) -> list[Curve]:
        """The curves that have something to show, for the legend."""
        return [c for c in self.curves if any(self._place(y) is not None for _, y in c.points)]

    def _place(self, value: float | None) -> float | None:
        if value is None or not math.isfinite(value) or (self.log and value <= 0):
            return None
        # Beyond fp32's range of norms there is nothing to tell apart, and float's own ends would overflow.
        return math.log10(min(max(value, 1e-40), 1e40)) if self.log else float(value)


@dataclass(frozen=True)
class Axis:
    low: float
    high: float

    def place(self, value: float) -> float:
        """Percent of the axis, from its low end."""
        return 100 * (value - self.low) / (self.high - self.low)


def ticks(axis: Axis, about: int) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten on the axis, about ``about`` of them, with their labels."""
    rough = (axis.high - axis.low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    gap = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(axis.low / gap - 1e-9), math.floor(axis.high / gap + 1e-9)
    return [(k * gap, label(k * gap, gap)) for k in range(first, last + 1)]


def log_ticks(axis: Axis) -> list[tuple[float, str]]:
    """Powers of ten on an axis of base-10 logarithms; 1, 2, 3 and 5 times them where it spans under two."""
    decades = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    factors = (1,) if axis.high - axis.low >= 2 else (1, 2, 3, 5)
    found = [d + math.log10(m) for d in decades for m in factors]
    found = [v for v in found if axis.low <= v <= axis.high]
    if len(found) < 2:
        return [(math.log10(v), text) for v, text in ticks(Axis(10**axis.low, 10**axis.high), 4) if v > 0]
    return [(v, label(10**v, 10**v)) for v in found[:: math.ceil(len(found) / 6)]]


def label(value: float, gap: float) -> str:
    """``value`` with the digits that a step of ``gap`` needs; very small and very large ones as ``5e-4``."""
    last = math.floor(math.log10(gap) + 1e-9)
    if -3 <= last < 6 or (last < 0 and abs(value) >= 1):
        return f"{value:,.{max(0, -last)}f}"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**power:.{max(0, power - last)}f}e{power}"


def thin(points: Sequence[Point], limit: int = 600) -> list[Point]:
    """About ``limit`` points at most, of the same outline: the least and the largest value of every bucket.

    A bucket that has a gap keeps one.
    """
    if len(points) <= limit:
        return list(points)
    width = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), width):
        bucket = points[start : start + width]
        finite = [(y, x) for x, y in bucket if y is not None]
        chosen: list[Point] = [point for point in bucket if point[1] is None][:1]
        chosen += [(x, y) for y, x in ({min(finite), max(finite)} if finite else ())]
        kept += sorted(chosen, key=lambda point: point[0])
    return kept


def moving(points: Sequence[tuple[float, float | None, float]], window: int) -> list[Point]:
    """Weighted mean over the last ``window`` of (step, value, weight); a missing value weighs nothing."""
    weights = [0.0 if v is None else w for _, v, w in points]
    sums = [0.0, *accumulate((v or 0.0) * w for (_, v, _), w in zip(points, weights, strict=True))]
    totals = [0.0, *accumulate(weights)]
    means: list[Point] = []
    for end, (x, _, _) in enumerate(points, 1):
        start = max(0, end - window)
        weight = totals[end] - totals[start]
        means.append((x, (sums[end] - sums[start]) / weight if weight else None))
    return means


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _rows(up: Axis, found: list[tuple[float, str]]) -> Markup:
    row = Markup(
        '<line class="grid" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
        '<text class="up" x="-8" y="{y:.2f}%" dy=".32em">{text}</text>'
    )
    return _joined(row.format(y=100 - up.place(value), text=text) for value, text in found)


def _columns(across: Axis, alarms: Sequence[tuple[int, str]]) -> Markup:
    tick = Markup('<text class="across" x="{:.2f}%" y="100%" dy="1.5em">{}</text>')
    alarm = Markup('<line class="alarm" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"><title>{text}</title></line>')
    # A step is whole: a short run has no tick at half a step.
    whole = [value for value, _ in ticks(across, 5) if value == int(value)]
    return _joined(
        [tick.format(across.place(value), f"{value:,.0f}") for value in whole]
        + [alarm.format(x=across.place(step), text=text) for step, text in alarms]
    )


def _path(curve: Curve, across: Axis, up: Axis) -> Markup:
    words, drawing = [], False
    for x, y in curve.points:
        if y is not None:
            spot = f"{10 * across.place(x):.1f} {1000 - 10 * up.place(y):.1f}"
            # A line begins with one of no length: its round caps show a value that stands alone.
            words.append(f"L{spot}" if drawing else f"M{spot}L{spot}")
        drawing = y is not None
    return Markup('<path class="{}" d="{}"/>').format(curve.style, "".join(words))


def _dots(curve: Curve, across: Axis, up: Axis) -> Markup:
    """Marks, the first and the last with its value beside it."""
    dot = Markup('<circle class="dots" cx="{:.2f}%" cy="{:.2f}%" r="4"><title>{}</title></circle>')
    value = Markup('<text class="value {}" x="{:.2f}%" y="{:.2f}%" dx="{}" dy="-.8em">{:.4g}</text>')
    seen = [(x, y) for x, y in curve.points if y is not None]
    marks = []
    for index, (x, y) in enumerate(seen):
        left, top = across.place(x), 100 - up.place(y)
        marks.append(dot.format(left, top, f"{curve.name} at step {x:,.0f}: {y:.4g}"))
        if index in (0, len(seen) - 1):
            side, shift = ("end", 4) if left > 50 else ("start", -4)
            marks.append(value.format(side, left, top, shift, y))
    return _joined(marks)
