import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.report.plots import Axis, Curve, Plot, log_ticks, moving, thin, ticks

finite = st.floats(-1e6, 1e6)
values = st.lists(st.none() | finite, max_size=300)


def drawn(points, **changes) -> ET.Element:
    return ET.fromstring(Plot("title", [Curve("curve", "smooth", points)], **changes).svg())


@given(values, st.booleans())
def test_every_run_gives_a_well_formed_plot_inside_its_frame(ys, log):
    plot = Plot("title", [Curve("a", "raw", list(enumerate(ys))), Curve("b", "dots", list(enumerate(ys)))], log=log)
    svg = plot.svg()
    shows = any(y is not None and (y > 0 or not log) for y in ys)
    assert bool(svg) == shows == bool(plot.shown())
    if svg:
        path = ET.fromstring(svg).find("svg/path").get("d")
        assert all(0 <= float(number) <= 1000 for number in re.findall(r"[\d.-]+", path))


def test_a_gap_in_the_values_is_a_gap_in_the_curve():
    path = drawn([(1, 1.0), (2, 2.0), (3, None), (4, math.nan), (5, 3.0)]).find("svg/path").get("d")
    assert path.count("M") == 2, "two strokes, the second a lone point"


def test_a_logarithmic_axis_leaves_out_zero():
    svg = drawn([(1, 0.0), (2, 0.1), (3, 1.0), (4, 100.0)], log=True)
    assert svg.find("svg/path").get("d").count("M") == 1
    assert [t.text for t in svg.findall("text[@class='up']")] == ["0.1", "1", "10", "100"]


def test_an_axis_that_starts_at_zero():
    svg = drawn([(1, 700.0), (2, 800.0)], zero=True)
    assert svg.find("text[@class='up']").text == "0"


def test_a_short_run_has_whole_steps():
    svg = drawn([(0, 1.0), (1, 2.0), (2, 1.0)])
    assert [t.text for t in svg.findall("text[@class='across']")] == ["0", "1", "2"]


def test_an_exploding_norm_is_drawn():
    svg = drawn([(1, 5e-324), (2, 1.0), (3, 1.7e308)], log=True)
    assert len(svg.findall("text[@class='up']")) >= 3


def test_text_from_outside_stays_text():
    hostile = "</title></svg><script>alert(1)</script>\"'&"
    svg = drawn([(1, 1.0), (2, 2.0)], alarms=[(2, hostile)])
    assert svg.find("line[@class='alarm']/title").text == hostile
    assert not list(svg.iter("script"))


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 5e-4, ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4"]),
        (2.6, 3.7, ["2.6", "2.8", "3.0", "3.2", "3.4", "3.6"]),
        (4e-4, 21e-4, ["5e-4", "1.0e-3", "1.5e-3", "2.0e-3"]),
        (10, 10.002, ["10.0000", "10.0005", "10.0010", "10.0015", "10.0020"]),
        (0, 5e7, ["0", "1e7", "2e7", "3e7", "4e7", "5e7"]),
        (0, 2500, ["0", "500", "1,000", "1,500", "2,000", "2,500"]),
        (-0.1, 0.1, ["-0.10", "-0.05", "0.00", "0.05", "0.10"]),
    ],
)
def test_ticks(low, high, labels):
    assert [text for _, text in ticks(Axis(low, high), 6)] == labels


@given(st.floats(-12, 12), st.floats(1e-3, 20))
def test_ticks_lie_on_the_axis_and_are_told_apart(low, span):
    axis = Axis(low, low + span)
    for found in (log_ticks(axis), ticks(axis, 5)):
        assert 1 <= len(found) <= 12
        assert all(axis.low - 1e-6 * span <= value <= axis.high + 1e-6 * span for value, _ in found)
        assert len({text for _, text in found}) == len(found)


@given(st.lists(st.none() | finite, min_size=60, max_size=300), st.integers(10, 50))
def test_thin_keeps_the_outline(ys, limit):
    points = list(enumerate(ys))
    kept = thin(points, limit)
    assert len(kept) <= 1.5 * limit + 3
    assert set(kept) <= set(points) and [x for x, _ in kept] == sorted(x for x, _ in kept)
    seen, left = ([y for _, y in some if y is not None] for some in (points, kept))
    assert (min(seen), max(seen)) == (min(left), max(left)) if seen else not left
    assert (None in ys) == (None in [y for _, y in kept])


@given(st.lists(st.tuples(st.none() | st.floats(-100, 100), st.floats(1, 100)), max_size=40), st.integers(1, 9))
def test_moving_is_the_weighted_mean_of_the_window(pairs, window):
    points = [(step, value, weight) for step, (value, weight) in enumerate(pairs)]
    for end, (step, mean) in enumerate(moving(points, window), 1):
        part = [(v, w) for _, v, w in points[max(0, end - window) : end] if v is not None]
        assert step == end - 1
        if not part:
            assert mean is None
        else:
            assert mean == pytest.approx(sum(v * w for v, w in part) / sum(w for _, w in part), abs=1e-6)
