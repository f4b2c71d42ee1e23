"""A run's curves as charts for a page, and those of several runs one over the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from slimtune.run.chart import Line, Mark, line_chart
from slimtune.run.history import Curve, History, coarse, smooth
from slimtune.run.statement import Say

__all__ = ["RUNS", "Chart", "charts", "overlaid"]

WIDE, NARROW, HEIGHT = 920, 440, 240
"""Pixels of a chart across the page, of one in a column (or on a phone), and of each one's height."""
RUNS = 6
"""Runs that have a colour of their own (the CSS classes r0 to r5)."""


@dataclass(frozen=True)
class Chart:
    """One drawing in two widths; ``legend`` holds (CSS class, text) of what is in it."""

    title: str
    note: str
    wide: Markup
    narrow: Markup
    legend: tuple[tuple[str, str], ...] = ()


def charts(history: History, say: Say) -> list[Chart]:
    """Loss across the page; learning rate, gradient norm and speed in columns."""
    made = []
    resumed = [
        Mark(step, "resume", say(f"resumed after step {step:,}", f"从第 {step:,} 步恢复")) for step in history.resumed
    ]
    loss = history.curve("loss")
    bad = [
        Mark(step, "nonfinite", say(f"step {step:,}: not a finite number", f"第 {step:,} 步：非有限数"))
        for step, value in loss
        if value is None
    ]
    happened = [
        Mark(event["step"], "event", f"{event['step']:,}: {event['event']}")
        for event in history.events
        if event["event"] != "resumed"
    ]
    smoothed, evaluated = smooth(coarse(loss)), history.evaluation_curve()
    lines = [Line(loss, "raw")] if len(loss) >= 10 else []
    lines += [Line(smoothed, "smooth", label_last=True), Line(evaluated, "eval", label_last=True)]
    legend = (
        ("raw", say("each step", "逐步"), len(loss) >= 10),
        ("smooth", say("smoothed", "平滑") if len(loss) >= 10 else say("loss", "损失"), True),
        ("eval", say("held-out", "留出数据"), bool(evaluated)),
        ("resume", say("resumed", "恢复运行"), bool(resumed)),
        ("event", say("event", "事件"), bool(happened)),
        ("nonfinite", say(f"not finite: {len(bad)}", f"非有限数：{len(bad)}"), bool(bad)),
    )
    title = say("Loss", "损失")
    wide, narrow = (
        Markup(line_chart(lines, title=title, width=width, height=HEIGHT + 40, marks=[*resumed, *happened, *bad]))
        for width in (WIDE, NARROW)
    )
    if wide:
        shown = tuple((style, text) for style, text, there in legend if there)
        made.append(Chart(title, say("by optimizer step", "按优化器步"), wide, narrow, shown))
    for key, title, zero in _others(say):
        curve = _curve(history, key)
        if drawn := line_chart(
            _two_lines(curve, key), title=title, width=NARROW, height=HEIGHT, marks=resumed, zero=zero
        ):
            made.append(Chart(title, "", Markup(), Markup(drawn)))
    return made


def overlaid(runs: Sequence[tuple[str, History]], say: Say) -> list[Chart]:
    """The same of several runs, by name: one line each, in the run's colour; the loss across the page."""
    legend = tuple((f"r{number % RUNS}", name) for number, (name, _) in enumerate(runs))
    made = []
    for key, title, zero in (
        ("loss", say("Loss", "损失"), False),
        ("eval_loss", say("Held-out loss", "留出数据损失"), False),
        *_others(say),
    ):
        lines = [
            Line(_course(_curve(history, key), key), style, label_last=True)
            for (style, _), (_, history) in zip(legend, runs, strict=True)
        ]
        height = HEIGHT + 40 if key == "loss" else HEIGHT
        wide, narrow = (
            Markup(line_chart(lines, title=title, width=width, height=height, zero=zero)) for width in (WIDE, NARROW)
        )
        if narrow and key == "loss":
            made.append(Chart(title, say("by optimizer step", "按优化器步"), wide, narrow, legend))
        elif narrow:
            made.append(Chart(title, "", Markup(), narrow))
    return made


def _others(say: Say) -> tuple[tuple[str, str, bool], ...]:
    """(key, title, whether the axis begins at 0) of what is drawn beside the loss."""
    return (
        ("learning_rate", say("Learning rate", "学习率"), True),
        ("grad_norm", say("Gradient norm", "梯度范数"), False),
        ("tokens_per_second", say("Tokens per second", "每秒 token 数"), True),
        ("memory_bytes", say("Memory, GiB", "内存（GiB）"), True),
    )


def _curve(history: History, key: str) -> Curve:
    if key == "eval_loss":
        return history.evaluation_curve()
    curve = history.curve(key)
    if key == "memory_bytes":
        return [(step, None if value is None else value / 2**30) for step, value in curve]
    return curve


def _course(curve: Curve, key: str) -> Curve:
    """A schedule and a level as they are; what scatters smoothed."""
    return curve if key in ("learning_rate", "memory_bytes", "eval_loss") else smooth(coarse(curve))


def _two_lines(curve: Curve, key: str) -> list[Line]:
    """A schedule and a level are drawn as they are; what scatters is drawn faint under its smoothed course."""
    course = _course(curve, key)
    lines = [Line(course, "smooth", label_last=True)]
    return lines if course is curve or len(curve) < 10 else [Line(curve, "raw"), *lines]
