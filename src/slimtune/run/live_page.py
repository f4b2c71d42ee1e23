"""The live page: what a :class:`slimtune.run.live.LiveRun` says, as pieces of HTML in a person's language.

The page itself is one file that asks for nothing but its own events. Each piece has a name, which is the id of the
element that holds it; a piece that is what it was needn't be sent again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup, escape

from slimtune.errors import UserError
from slimtune.run.chart import short_number
from slimtune.run.curves import RUNS, Chart, charts, overlaid
from slimtune.run.facts import damage_told
from slimtune.run.live import HEARS, LiveRun, State
from slimtune.run.pages import events_told, in_language, template
from slimtune.run.samples import samples_told
from slimtune.run.screen import size_text, time_left
from slimtune.run.show import inline_html
from slimtune.run.statement import Lang, Say, is_finite, sentence
from slimtune.run.verdict import advice_text, general_text, verdict_text

__all__ = ["language", "page", "pieces"]

_STATES: dict[State, tuple[str, str]] = {
    "absent": ("waiting for the folder", "等待运行目录出现"),
    "gone": ("the folder is gone", "运行目录已不存在"),
    "damaged": ("its files are damaged", "运行文件已损坏"),
    "preparing": ("preparing: reading the data, loading the base", "准备中：读取数据、载入基座"),
    "running": ("running", "运行中"),
    "stopping": ("stopping: the step is ended and saved first", "正在停止：先走完这一步并保存"),
    "finishing": ("all steps done: writing the results", "步数已走完：正在写入结果"),
    "ended": ("done", "已完成"),
    "worse": ("done, and worse than before the training", "已完成，但比训练前更差"),
    "guard": ("stopped by a guard", "被保护机制停下"),
    "stopped": ("stopped", "已停止"),
}
_BAD = frozenset({"gone", "damaged", "worse", "guard"})
_MOST_EVENTS = 50
"""Events that are shown, the newest first."""


def language(wanted: str | None, accepted: str) -> Lang:
    """The page's language.

    Args:
        wanted: As the address has it (``en``, ``zh``), if it has any.
        accepted: The browser's Accept-Language: the first of the two that stands there, else English.
    """
    for word in [wanted or "", *accepted.lower().split(",")]:
        if found := re.match(r"\s*(en|zh)\b", word):
            return "zh" if found[1] == "zh" else "en"
    return "en"


def page(runs: Sequence[LiveRun], lang: Lang, nonce: str) -> str:
    """The page with nothing in it yet.

    Args:
        runs: What is watched.
        lang: Its language.
        nonce: What its Content-Security-Policy lets run.
    """
    made: str = template("watch.html.j2").render(runs=runs, lang=lang, nonce=nonce, say=in_language(lang), colours=RUNS)
    return made


def pieces(runs: Sequence[LiveRun], lang: Lang) -> dict[str, str]:
    """All that the page shows now, by element. Of a run whose metrics no run has written it shows that."""
    say = in_language(lang)
    made: dict[str, str] = {}
    drawn: list[tuple[LiveRun, list[Chart]]] = []
    for number, run in enumerate(runs):
        of_run, its_charts = _told(number, run, say)
        made |= of_run
        drawn += [] if its_charts is None else [(run, its_charts)]
    several = [(run.name, run.history) for run, _ in drawn]
    made["charts"] = str(_parts().charts(drawn[0][1] if len(runs) == len(drawn) == 1 else overlaid(several, say)))
    return made


def _told(number: int, run: LiveRun, say: Say) -> tuple[dict[str, str], list[Chart] | None]:
    """One run's pieces, and its charts; None where they can't be drawn."""
    parts, newest = _parts(), run.history.events[: -_MOST_EVENTS - 1 : -1]
    made = {f"{name}-{number}": "" for name in ("tiles", "events", "samples")}
    drawn, problem, verdict = None, run.problem, Markup("")
    if not problem:
        try:
            with damage_told(run.path):
                drawn = charts(run.history, say)
                made[f"tiles-{number}"] = str(parts.tiles(_tiles(run, say)))
                made[f"events-{number}"] = str(parts.events(say, events_told(newest, say)))
                verdict = _verdict(run, say)
        except UserError as error:
            drawn, problem = None, error.what
    if run.sampled.prompts:
        told = samples_told(run.sampled, say)
        made[f"samples-{number}"] = str(parts.samples(say, run.sampled.prompts, told))
    made[f"state-{number}"] = _state(run, "damaged" if problem else run.state, problem, say) + str(verdict)
    made[f"stop-{number}"] = _stop(number, run, say)
    return made, drawn


def _parts() -> Any:
    return template("parts.html.j2").module


def _state(run: LiveRun, state: State, problem: str, say: Say) -> str:
    kind = "bad" if state in _BAD else "working" if run.is_working else ""
    base = (run.facts.get("base") or {}).get("model") or ""
    text = Markup('<p class="subtitle">{}</p><p class="verdict {}">{}</p>').format(base, kind, say(*_STATES[state]))
    return str(text + Markup('<p class="subtitle">{}</p>').format(problem) if problem else text)


def _verdict(run: LiveRun, say: Say) -> Markup:
    """What became of the model, once the run is done: as the report says it."""
    verdict = run.facts.get("verdict")
    if run.state not in ("ended", "worse") or not verdict:
        return Markup("")
    told = [verdict_text(verdict, run.facts["training"], say), advice_text(verdict, say), general_text(verdict, say)]
    if verdict["outcome"] == "unmeasured":
        told[0] = say("Not measured: ", "未测量：") + told[0]
    return Markup("").join(Markup("<p>{}</p>").format(Markup(inline_html(sentence(text)))) for text in told if text)


def _stop(number: int, run: LiveRun, say: Say) -> str:
    """The button, or how to go on."""
    if run.state in HEARS and run.state != "stopping":
        sure = say("Press again to stop", "再按一次即停止")
        text = say("Stop with a checkpoint", "保存检查点并停止")
        return str(Markup('<button type="button" data-run="{}" data-sure="{}">{}</button>').format(number, sure, text))
    if run.state in ("stopped", "guard"):
        return f"<code>{escape(f'slimtune resume {shlex.quote(str(run.path))}')}</code>"
    return ""


def _tiles(run: LiveRun, say: Say) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures that a watcher looks for first."""
    last: dict[str, Any] = dict(run.last)
    evaluations, end = run.history.evaluations, run.end
    tiles = []
    if last:
        step, steps = last["step"], last.get("steps")
        share = f"{step / steps:.0%}" if isinstance(steps, int) and steps > 0 else ""
        tiles.append((say("step", "步"), f"{step:,} / {steps:,}" if share else f"{step:,}", share))
        if end is not None:
            note = say(f"until {_clock(end)}", f"预计 {_clock(end)} 结束")
            tiles.append((say("time left", "剩余时间"), time_left(last["seconds_left"]), note))
        tiles.append((say("loss", "损失"), _number(last.get("loss"), "{:.3f}".format), ""))
    if evaluations:
        first, now = (_number(record["eval_loss"], "{:.3f}".format) for record in (evaluations[0], evaluations[-1]))
        at = f"{evaluations[-1]['step']:,}"
        note = say(f"after step {at}", f"第 {at} 步之后")
        tiles.append((say("held-out loss", "留出数据损失"), f"{first} → {now}" if len(evaluations) > 1 else now, note))
    if last:
        speed = _number(last.get("tokens_per_second"), lambda value: short_number(round(value)))
        rate, norm = _number(last.get("learning_rate"), short_number), _number(last.get("grad_norm"), "{:.3g}".format)
        tiles.append((say("tokens/s", "token/秒"), speed, ""))
        tiles.append((say("memory", "内存"), _number(last.get("memory_bytes"), size_text), ""))
        tiles.append((say("learning rate", "学习率"), rate, ""))
        tiles.append((say("gradient norm", "梯度范数"), norm, ""))
    return tiles


def _number(value: Any, write: Callable[[float], str]) -> str:
    return write(value) if is_finite(value) else "—"


def _clock(when: datetime) -> str:
    """17:42, with the day where that isn't today."""
    return when.strftime("%H:%M" if when.date() == datetime.now().date() else "%m-%d %H:%M")
