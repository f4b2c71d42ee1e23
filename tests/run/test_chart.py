"""Charts hold for any curve: well-formed, inside their frame, with round ticks, and small."""

from __future__ import annotations

import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slimtune.run.chart import Line, Mark, line_chart, nice_ticks, short_number
from slimtune.run.history import Curve

WIDTH, HEIGHT = 440, 240
values = st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e-9, 2e-4, 1.5, 1e6]))
curves = st.lists(st.tuples(st.integers(1, 100_000), values), max_size=60, unique_by=lambda point: point[0]).map(sorted)


def draw(curve: Curve, **more: object) -> ElementTree.Element:
    text = line_chart([Line(curve, "smooth", label_last=True)], title="Loss", width=WIDTH, height=HEIGHT, **more)  # type: ignore[arg-type]
    return ElementTree.fromstring(text)


def coordinates(svg: ElementTree.Element) -> list[tuple[float, float]]:
    found = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in svg.iter("circle")]
    for path in svg.iter("path"):
        if "mark" not in path.get("class", "") and "nonfinite" not in path.get("class", ""):
            found += [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path.get("d", ""))]
    return found


@settings(deadline=None)
@given(curve=curves, zero=st.booleans())
@example(curve=[(1, 5e-324), (2, 1.0)], zero=False)
@example(curve=[(1, 5e-324), (2, 0.0)], zero=False)
def test_any_curve_stays_inside_its_frame(curve: Curve, zero: bool) -> None:
    if all(value is None for _, value in curve):
        assert line_chart([Line(curve, "smooth")], title="", width=WIDTH, height=HEIGHT, zero=zero) == ""
        return
    svg = draw(curve, zero=zero)
    assert coordinates(svg)
    for x, y in coordinates(svg):
        assert 46 - 0.1 <= x <= WIDTH - 54 + 0.1
        assert 12 - 0.1 <= y <= HEIGHT - 26 + 0.1
    texts = [text for text in svg.iter("text") if text.get("class") == "tick"]
    assert 2 <= len(texts) <= 20


def test_one_step_is_a_point() -> None:
    svg = draw([(1, 2.5)])
    assert not list(svg.iter("path"))
    assert [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"] == ["1"]
    assert [text.text for text in svg.iter("text") if text.get("class") == "last smooth"] == ["2.5"]


def test_a_gap_cuts_the_line() -> None:
    svg = draw([(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, 2.0)])
    assert next(svg.iter("path")).get("d", "").count("M") == 2


def test_five_thousand_steps_stay_small_and_keep_their_extremes() -> None:
    generator = random.Random(0)
    curve: Curve = [(step, 2.0 + generator.random()) for step in range(1, 5001)]
    curve[1234], curve[4000] = (1235, 9.5), (4001, 0.25)
    svg = draw(curve)
    assert len(ElementTree.tostring(svg)) < 15_000
    heights = [y for _, y in coordinates(svg)]
    ticks = [float(text.get("y", "")) for text in svg.iter("text") if text.get("class") == "tick" and text.text == "10"]
    assert min(heights) == pytest.approx(ticks[0] - 3.5 + 0.5 / 10 * (HEIGHT - 38), abs=0.2)
    assert max(heights) == pytest.approx(HEIGHT - 26 - 0.25 / 10 * (HEIGHT - 38), abs=0.2)


def test_values_of_many_sizes_get_a_logarithmic_axis() -> None:
    svg = draw([(step, 10.0 ** (1 - step)) for step in range(1, 8)])
    lows = [y for _, y in coordinates(svg)][:7]
    gaps = [after - before for before, after in itertools.pairwise(lows)]
    assert max(gaps) - min(gaps) < 0.2


def test_marks_say_what_they_are() -> None:
    marks = [Mark(2, "resume", "resumed <here>"), Mark(3, "nonfinite", "step 3")]
    svg = draw([(1, 1.0), (4, 2.0)], marks=marks)
    assert [title.text for title in svg.iter("title")][:2] == ["resumed <here>", "step 3"]


def test_last_values_do_not_cover_each_other() -> None:
    lines = [Line([(1, 3.0), (2, 1.0)], "smooth", True), Line([(2, 1.001)], "eval", True)]
    svg = ElementTree.fromstring(line_chart(lines, title="", width=WIDTH, height=HEIGHT))
    first, second = (
        float(text.get("y", "")) for text in svg.iter("text") if (text.get("class") or "").startswith("last")
    )
    assert abs(first - second) >= 12


@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9), count=st.integers(2, 12))
def test_ticks_are_round_even_and_few(low: float, span: float, count: int) -> None:
    high = low + span
    if span < 1e-9 * abs(low):
        return
    ticks = nice_ticks(low, high, count)
    assert len(ticks) <= count + 2
    for tick in ticks:
        assert low - 1e-6 * span - 1e-9 * abs(low) <= tick <= high + 1e-6 * span + 1e-9 * abs(high)
    if len(ticks) > 1:
        each = ticks[1] - ticks[0]
        leading = each / 10 ** math.floor(math.log10(each) + 1e-6)
        assert min(abs(leading - round_one) for round_one in (1, 2, 5, 10)) < 1e-2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2e-4, "2e-4"),
        (1.5441, "1.544"),
        (0.0312, "0.0312"),
        (1024, "1,024"),
        (12_500, "12.5k"),
        (3.1e6, "3.1M"),
        (-2.0, "-2"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text
