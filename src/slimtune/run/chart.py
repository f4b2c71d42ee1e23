"""Line charts as inline SVG: no scripts, no fonts, no files. The page's CSS classes colour them, in dark mode too.

Drawn here rather than by a plotting library, which would weigh tens of megabytes and know nothing of that CSS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from slimtune.run.history import Curve

__all__ = ["Line", "Mark", "line_chart", "nice_ticks", "short_number"]

LEFT, RIGHT, TOP, BOTTOM = 46.0, 64.0, 12.0, 26.0
"""Room in pixels around the plot: value labels, the last value, nothing, step labels."""
_LABEL_HEIGHT = 14.0
_HOVER_POINTS = 60
"""Most points that get a hover text of their own."""
_LEAST = 1e-100
"""Smaller values are drawn as 0."""
_LOG_FROM = 100.0
"""Values that span more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    """One curve, and the CSS class that draws it: raw, smooth or eval."""

    curve: Curve
    style: str
    label_last: bool = False
    """Whether the last value is written at the curve's end."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: resume, event or nonfinite (its CSS class)."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class _Axis:
    """From values to pixels. ``start`` and ``end`` are the pixels of ``low`` and ``high``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line], *, title: str, width: int, height: int, marks: Sequence[Mark] = (), zero: bool = False
) -> str:
    """An SVG of curves over the optimizer step; empty text if there is no finite value.

    Args:
        lines: The curves, drawn in this order.
        title: What the chart shows, for screen readers.
        width: Of the drawing, in CSS pixels.
        height: Of the drawing, in CSS pixels.
        marks: Vertical marks.
        zero: Let the value axis begin at 0.
    """
    lines = [replace(line, curve=[(step, _flushed(value)) for step, value in line.curve]) for line in lines]
    values = [value for line in lines for _, value in line.curve if value is not None]
    if not values:
        return ""
    steps = [step for line in lines for step, _ in line.curve] + [mark.step for mark in marks]
    x = _step_axis(min(steps), max(steps), LEFT, width - RIGHT)
    y, at_values = _value_axis(values, height - BOTTOM, TOP, zero=zero)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for value, text in zip(at_values, _tick_texts(at_values), strict=True):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>')
    for step in _step_ticks(x, min(steps), max(steps), width):
        parts.append(
            f'<text class="tick" x="{x(step):.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{step:,}</text>'
        )
    for mark in marks:
        parts.append(_marked(mark, x(mark.step), height))
    for line in lines:
        parts += _drawn(line, x, y)
    parts += _last_values([line for line in lines if line.label_last], x, y)
    parts.append("</svg>")
    return "".join(parts)


def _flushed(value: float | None) -> float | None:
    """0 for what is next to nothing: the space between two ticks would be no float any more."""
    return 0.0 if value is not None and abs(value) < _LEAST else value


def _marked(mark: Mark, at: float, height: int) -> str:
    title = f"<title>{escape(mark.text)}</title>"
    if mark.kind == "nonfinite":
        low = height - BOTTOM
        cross = f"M{at - 3:.1f} {low - 7:.1f}l6 6m0 -6l-6 6"
        return f'<path class="nonfinite" d="{cross}">{title}</path>'
    return f'<path class="mark {mark.kind}" d="M{at:.1f} {TOP}V{height - BOTTOM}">{title}</path>'


def _drawn(line: Line, x: _Axis, y: _Axis) -> list[str]:
    pieces = _pieces(line.curve)
    made = []
    path = ""
    for piece in pieces:
        if len(piece) == 1:
            step, value = piece[0]
            made.append(f'<circle class="{line.style}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>')
            continue
        spots = [(x(step), y(value)) for step, value in _thinned(piece, round((x.end - x.start) / 1.5))]
        path += "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in spots)
    if path:
        made.insert(0, f'<path class="{line.style}" d="{path}"/>')
    points = [point for piece in pieces for point in piece]
    if len(points) <= _HOVER_POINTS:
        for step, value in points:
            title = f"<title>{step:,}: {short_number(value)}</title>"
            made.append(
                f'<circle class="hover {line.style}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="7">{title}</circle>'
            )
    return made


def _last_values(lines: Sequence[Line], x: _Axis, y: _Axis) -> list[str]:
    """Each curve's last value at its end, one clear of the other."""
    ends = []
    for line in lines:
        if points := [(step, value) for step, value in line.curve if value is not None]:
            ends.append((y(points[-1][1]), *points[-1], line.style))
    made, above = [], -math.inf
    for at, step, value, style in sorted(ends):
        made.append(f'<circle class="last {style}" cx="{x(step):.1f}" cy="{at:.1f}" r="3"/>')
        above = max(at, above + _LABEL_HEIGHT)
        text = short_number(float(f"{value:.3g}"))
        made.append(f'<text class="last {style}" x="{x(step) + 8:.1f}" y="{above + 4:.1f}">{text}</text>')
    return made


def _pieces(curve: Curve) -> list[list[tuple[int, float]]]:
    """The curve, cut where a value is missing."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, value in curve:
        if value is not None:
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thinned(piece: list[tuple[int, float]], columns: int) -> list[tuple[int, float]]:
    """At most the lowest and the highest point of each column of a pixel and a half: what an eye could tell apart."""
    if len(piece) <= 2 * columns:
        return piece
    first, last = piece[0][0], piece[-1][0]
    buckets: dict[int, list[tuple[int, float]]] = {}
    for point in piece:
        buckets.setdefault((point[0] - first) * columns // (last - first + 1), []).append(point)
    kept = set()
    for bucket in buckets.values():
        kept |= {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
    return sorted(kept | {piece[0], piece[-1]})


def _step_axis(low: int, high: int, start: float, end: float) -> _Axis:
    return _Axis(low - 0.5, high + 0.5, start, end) if low == high else _Axis(low, high, start, end)


def _step_ticks(x: _Axis, low: int, high: int, width: int) -> list[int]:
    ticks = [round(tick) for tick in nice_ticks(low, high, max(2, width // 90)) if tick == round(tick)]
    return ticks if 1 not in (low, high) or 1 in ticks or (ticks and x(ticks[0]) - x(1) < 24) else [1, *ticks]


def _value_axis(values: list[float], start: float, end: float, *, zero: bool) -> tuple[_Axis, list[float]]:
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low > 0 and high / low > _LOG_FROM:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [10.0**decade for decade in decades][:: max(1, len(decades) // 6)]
        return _Axis(min(low, ticks[0]), max(high, ticks[-1]), start, end, log=True), ticks
    if low == high:
        room = abs(low) * 0.1 or 1.0
        low, high = (0.0 if zero and low >= 0 else low - room), high + room
    ticks = nice_ticks(low, high, 5)
    width = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    # Up to the next tick, so that no curve touches the frame.
    low = math.floor(low / width + 1e-9) * width
    high = math.ceil(high / width - 1e-9) * width
    return _Axis(low, high, start, end), nice_ticks(low, high, round((high - low) / width))


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round values (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    each = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / each - 1e-9), math.floor(high / each + 1e-9)
    return [float(f"{number * each:.12g}") for number in range(first, last + 1)]


def _tick_texts(ticks: list[float]) -> list[str]:
    return [short_number(tick) for tick in ticks]


def short_number(value: float) -> str:
    """A number in few characters: 0, 2e-4, 0.0312, 1.544, 1,024, 12.5k, 1.2M."""
    size = abs(value)
    if size >= 1e9:
        return f"{value:.3g}"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    if size >= 1e-3 or size == 0:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
