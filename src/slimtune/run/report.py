"""The report of a run: ``report.html``, one file without scripts or network, and ``report.md``.

The page holds English and Chinese; a switch made of two radio buttons and CSS shows the one or the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from slimtune.data.page import POLICY
from slimtune.errors import written_out
from slimtune.run.chart import nice_ticks, short_number
from slimtune.run.curves import charts
from slimtune.run.durable import replace_file
from slimtune.run.explain import explain
from slimtune.run.facts import damage_told
from slimtune.run.folder import RunFolder
from slimtune.run.history import History, read_history
from slimtune.run.pages import events_told, in_language, template
from slimtune.run.samples import MOST_REPLIES, Sampled, read_samples, samples_told
from slimtune.run.screen import size_text, time_left
from slimtune.run.show import (
    MARKS,
    markdown_table,
    piece_names,
    verdict,
    verdict_word,
    write_markdown,
)
from slimtune.run.statement import Explanation, Lang, Say, Table, is_finite, share

__all__ = ["write_report"]

ROWS_OF_LOSSES = 12


def write_report(run: RunFolder, lang: Lang = "en") -> None:
    """Write ``report.html`` and ``report.md`` from what the run's folder holds.

    A run that didn't come to its end has no facts; its report then shows its curves, config and machine alone.

    Args:
        run: The run's folder.
        lang: The language of ``report.md``, and the one that the page opens in.
    """
    facts = run.facts()
    environment = run.read_json(run.environment_file)
    config = run.config_file.read_text(encoding="utf-8") if run.config_file.is_file() else ""
    with damage_told(run.metrics_file):
        history = read_history(run.metrics())
        told = {each: _told(history, each) for each in ("en", "zh")}
    sampled = read_samples(run.samples(), MOST_REPLIES)
    views = {
        each: _view(run, facts | history.on_the_way, environment, each)
        | told[each]
        | {
            "samples": sampled,
            "samples_told": samples_told(sampled, in_language(each)),
            "replies": markdown_table(_replies(sampled, in_language(each))),
        }
        for each in ("en", "zh")
    }
    page = template("report.html.j2").render(policy=Markup(POLICY), views=views, lang=lang, config=config)
    replace_file(run.report_html, page)
    replace_file(run.report_markdown, template("report.md.j2").render(**views[lang], config=config))


def _told(history: History, lang: Lang) -> dict[str, Any]:
    """What one language's page shows of the metrics."""
    say = in_language(lang)
    return {
        "charts": charts(history, say),
        "events": events_told(history.events, say),
        "losses": markdown_table(_losses(history, say)) if history.steps else "",
    }


def _view(run: RunFolder, facts: Mapping[str, Any], environment: Mapping[str, Any], lang: Lang) -> dict[str, Any]:
    """Everything else that it shows."""
    say = in_language(lang)
    finished = bool(facts.get("training"))
    story = explain(facts, lang) if facts else Explanation(lang, run.path.name, ())
    return {
        "say": say,
        "lang": lang,
        "name": run.path.resolve().name,
        "story": story,
        "finished": finished,
        "verdict": verdict(story) if finished else say("this run did not come to its end", "这次运行没有走到终点"),
        "subtitle": _subtitle(facts, environment, say),
        "tiles": _tiles(facts, say),
        "machine": _machine(environment, say),
        "markdown_story": write_markdown(story, level=2) if facts else "",
        "markdown_machine": markdown_table(
            Table((say("what", "项目"), say("value", "值")), _machine(environment, say))
        ),
        "marks": MARKS,
        "word": lambda status: verdict_word(status, lang),
        "piece_names": piece_names,
    }


def _subtitle(facts: Mapping[str, Any], environment: Mapping[str, Any], say: Say) -> str:
    base = facts.get("base") or {}
    hardware = environment.get("hardware") or facts.get("hardware") or {}
    versions = environment.get("versions") or facts.get("versions") or {}
    started = str(facts.get("created") or environment.get("started") or "")[:16].replace("T", " ")
    slimtune = f"slimtune {versions['slimtune']}" if "slimtune" in versions else ""
    return " · ".join(text for text in (base.get("model"), started, hardware.get("name"), slimtune) if text)


def _tiles(facts: Mapping[str, Any], say: Say) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures that a reader looks for first."""
    base, adapter, training = (facts.get(key) or {} for key in ("base", "adapter", "training"))
    tiles = []
    if training:
        first, last = (f"{v:.3f}" if is_finite(v) else "—" for v in (training["first_loss"], training["last_loss"]))
        held = training.get("eval_loss")
        note = say("first → last tenth", "首步 → 最后十分之一")
        tiles += _held_out(facts.get("verdict") or {}, say)
        if is_finite(held) and not tiles:
            note = say(f"held-out {held:.3f}", f"留出数据 {held:.3f}")
        tiles.append((say("loss", "损失"), f"{first} → {last}", note))
    if base:
        before, now = base["bytes_16bit"], base["bytes_now"]
        note = say(f"from {size_text(before)} in 16 bits", f"16 位时为 {size_text(before)}")
        tiles.append((say("base in memory", "基座体积"), size_text(now), note))
    if adapter:
        trained = share(adapter["trainable_parameters"], adapter["total_parameters"])
        note = say(f"{adapter['trainable_parameters']:,} parameters", f"{adapter['trainable_parameters']:,} 个参数")
        tiles.append((say("trained", "训练占比"), trained, note))
        if adapter.get("file_bytes"):
            note = say(f"rank {adapter['r']}, alpha {adapter['alpha']}", f"秩 {adapter['r']}，alpha {adapter['alpha']}")
            tiles.append((say("adapter", "适配器"), size_text(adapter["file_bytes"]), note))
    if training:
        note = say(f"{training['tokens']:,} tokens", f"{training['tokens']:,} token")
        if reached := training.get("floor_share"):
            note += say(f", {reached:.0%} of what this machine can compute", f"，达本机算力的 {reached:.0%}")
        tiles.append((say("tokens/s", "token/秒"), short_number(round(training["tokens_per_second"])), note))
        steps = say(f"{training['steps']:,} steps", f"{training['steps']:,} 步")
        tiles.append((say("time", "用时"), time_left(training["seconds"]), steps))
    return tiles


def _held_out(verdict: Mapping[str, Any], say: Say) -> list[tuple[str, str, str]]:
    """The held-out loss before and after; what it comes to stands below."""
    start, end = verdict.get("start"), verdict.get("end") or {}
    if start is None:
        return []
    words = {
        "better": say("better", "变好"),
        "worse": say("WORSE than before", "比训练前更差"),
        "same": say("no change", "看不出变化"),
    }
    before, after = (f"{v:.3f}" if is_finite(v) else "—" for v in (start["value"], end.get("value")))
    count = verdict["documents"]
    note = say(f"{words[verdict['outcome']]}, on {count:,} documents", f"{words[verdict['outcome']]}，共 {count:,} 篇")
    return [(say("held-out loss", "留出数据损失"), f"{before} → {after}", note)]


def _losses(history: History, say: Say) -> Table:
    """A dozen steps from the first to the last, for the reader of the Markdown."""
    steps = history.steps
    picked = [steps[round(at)] for at in nice_ticks(0, len(steps) - 1, ROWS_OF_LOSSES) if at == round(at)]
    if picked[-1] is not steps[-1]:
        picked.append(steps[-1])
    rows = tuple(
        (f"{record['step']:,}", *(_cell(record.get(key)) for key in ("loss", "learning_rate", "grad_norm")))
        for record in picked
    )
    header = (say("step", "步"), say("loss", "损失"), say("learning rate", "学习率"), say("gradient norm", "梯度范数"))
    return Table(header, rows, (0, 1, 2, 3))


def _replies(sampled: Sampled, say: Say) -> Table:
    """The first and the last reply to each prompt, for the reader of the Markdown."""
    rows = []
    for asked in sampled.prompts:
        first, last = asked.replies[0], asked.replies[-1]
        texts = (asked.row, asked.expected, first.text, last.text)
        rows.append(tuple(" ".join(written_out(text).split()) for text in texts))
    header = (
        say("row", "行"),
        say("expected", "期望"),
        say("first reply", "最初的回答"),
        say("last reply", "最后的回答"),
    )
    return Table(header, tuple(rows))


def _cell(value: Any) -> str:
    return short_number(value) if is_finite(value) else "—"


def _machine(environment: Mapping[str, Any], say: Say) -> tuple[tuple[str, str], ...]:
    hardware = environment.get("hardware") or {}
    rows = [
        (say("device", "设备"), f"{hardware['name']} ({hardware['device']})" if "name" in hardware else ""),
        (say("memory", "内存"), size_text(hardware["memory_bytes"]) if "memory_bytes" in hardware else ""),
        (say("system", "系统"), str(environment.get("system", ""))),
        ("Python", str(environment.get("python", ""))),
        *((name, str(version)) for name, version in (environment.get("versions") or {}).items()),
    ]
    return tuple((name, value) for name, value in rows if value)
