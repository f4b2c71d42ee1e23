"""What :mod:`slimtune.run.judge` found, in words: a line in the terminal, a section of the explanation."""

from __future__ import annotations

from typing import Any

from slimtune.run.statement import (
    Facts,
    Say,
    Section,
    Statement,
    Status,
    code,
    counted,
    part_name,
    sentence,
    value_text,
)

__all__ = ["advice_text", "general_text", "is_worse", "tell_verdict", "verdict_text"]

REHEARSE = "`--rehearse 10%`"
STUCK_SHOWN = 40
"""Characters of a reply that repeats itself."""
_STATUS: dict[str, Status] = {"better": "proved", "worse": "broken", "same": "told", "unmeasured": "unmeasured"}


def is_worse(facts: Facts) -> bool:
    """Whether a run's facts say that it made the model worse than it was."""
    return (facts.get("verdict") or {}).get("outcome") == "worse"


def verdict_text(verdict: Facts, training: Facts, say: Say) -> str:
    """Better, worse or the same, by how much, and how sure that is.

    Args:
        verdict: :class:`slimtune.run.facts.VerdictFacts` as plain data.
        training: :class:`slimtune.run.facts.TrainingFacts` likewise.
        say: Chooses the language.
    """
    outcome, start = verdict["outcome"], verdict.get("start")
    if outcome == "unmeasured" and verdict.get("documents"):
        return say(
            "whether the model is better on rows that it hasn't seen: at its start and its end it wasn't evaluated on "
            "the same rows and the same base.",
            "模型在没见过的数据上是否变好，因为开始与结束时没有用同样的数据和基座评估。",
        )
    if outcome == "unmeasured":
        return say(
            "whether the model is better on rows that it hasn't seen, as none was held out.",
            "模型在没见过的数据上是否变好，因为没有留出数据。",
        )
    if start is None:
        first, last = (value_text(training.get(key), say) for key in ("first_loss", "last_loss"))
        unheld = ("No row was held out", "没有留出数据")
        if verdict.get("documents"):
            unheld = ("It wasn't evaluated on the same rows and base before", "训练前没有用同样的数据和基座评估")
        return say(
            f"WORSE than before the training: its losses rose from {first} to {last}. {unheld[0]}.",
            f"比训练前更差：训练损失从 {first} 升到 {last}。{unheld[1]}。",
        )
    count = verdict["documents"]
    on = say(f"on {counted(count, 'held-out document')}", f"在 {count:,} 篇留出的文档上")
    end = verdict.get("end") or {}
    losses_en = f"loss {value_text(start['value'], say)} → {value_text(end.get('value'), say)}"
    losses_zh = f"损失 {value_text(start['value'], say)} → {value_text(end.get('value'), say)}"
    if verdict.get("change") is not None:
        change = _signed(verdict["change"])
        losses_en, losses_zh = f"{losses_en}, {change}", f"{losses_zh}，变化 {change}"
    stuck = _stuck(verdict, say)
    if verdict.get("by_replies"):
        return say(
            f"WORSE than before the training, as {stuck}. {sentence(on)}: {losses_en}.",
            f"比训练前更差：{stuck}。{on}，{losses_zh}。",
        )
    told = {
        "better": (f"better than before the training {on}: {losses_en}.", f"比训练前更好：{on}，{losses_zh}。"),
        "worse": (f"WORSE than before the training {on}: {losses_en}.", f"比训练前更差：{on}，{losses_zh}。"),
        "same": (f"no change that can be told {on}: {losses_en}.", f"看不出变化：{on}，{losses_zh}。"),
    }
    return say(*told[outcome]) + (say(f" {sentence(stuck)}.", f"{stuck}。") if stuck else "")


def _stuck(verdict: Facts, say: Say) -> str:
    """Of replies that are one piece of text over and over; empty if none is."""
    count, of = verdict.get("stuck"), verdict.get("answered")
    if not count:
        return ""
    example = code(f"{str(verdict.get('stuck_reply'))[:STUCK_SHOWN]}…")
    return say(
        f"{count} of {of} replies to held-out prompts repeat themselves without an end ({example}), and didn't before",
        f"{of} 个留出提示的回答中有 {count} 个不停地重复自己（{example}），训练前并非如此",
    )


def advice_text(verdict: Facts, say: Say) -> str:
    """What to try next, in one line; empty if there is nothing to say."""
    advice, flag, best = verdict.get("advice"), code(verdict.get("suggestion")), verdict.get("best_step")
    if advice == "longer":
        if verdict["outcome"] == "same":
            return say(f"Train longer: {flag}.", f"训练得再久一些：{flag}。")
        return say(f"It was still getting better at the end: {flag} may do more.", f"结束时仍在变好：可以试试 {flag}。")
    if advice == "shorter":
        loss, folder = value_text(verdict["best_loss"], say), code(f"checkpoints/checkpoint-{best}")
        return say(
            f"It was best after step {best:,} (loss {loss}, {folder}): train shorter by {flag}, or let "
            f"`--early-stopping 2` take the best.",
            f"第 {best:,} 步之后最好（损失 {loss}，{folder}）：用 {flag} 缩短训练，"
            f"或用 `--early-stopping 2` 取最好的一步。",
        )
    if advice == "slower":
        nothing = ""
        if best is not None and verdict["outcome"] == "worse" and not verdict.get("by_replies"):
            nothing = say("No checkpoint is better than the start. ", "没有一个检查点好于训练前。")
        return nothing + say(f"Take a lower learning rate: {flag}.", f"请降低学习率：{flag}。")
    return ""


def general_text(verdict: Facts, say: Say) -> str:
    """What became of the general questions, and what helps if it is less; empty if they weren't asked, or the base knew
    none."""
    general = verdict.get("general")
    if not general or not general["before"]:
        return ""
    count, before, after, change = (general[name] for name in ("questions", "before", "after", "change"))
    text = say(
        f"Of {count} general questions the base had {before} right, the model has {after}",
        f"{count} 道通用问题，基座答对 {before} 道，现在答对 {after} 道",
    )
    if change["high"] >= 0:
        return text + say(".", "。")
    return text + say(
        f" ({_signed(change)}): it forgets what it could before. {REHEARSE} keeps more of that.",
        f"（{_signed(change)}）：原有的本领在丢失，{REHEARSE} 可以多保住一些。",
    )


def tell_verdict(facts: Facts, say: Say) -> Section | None:
    """The section of the explanation; none for runs from before there was a verdict, or that didn't end."""
    verdict = facts.get("verdict")
    if not verdict:
        return None
    status = _STATUS[verdict["outcome"]]
    text = verdict_text(verdict, facts.get("training") or {}, say)
    told = [Statement(text if status == "unmeasured" else sentence(text), status)]
    if verdict.get("change") is not None:
        told.append(
            Statement(
                say(
                    "In brackets stands the 95 % interval of the change, by resampling the held-out data's parts.",
                    "方括号内是变化量的 95% 区间，由对留出数据各部分重采样得出。",
                )
            )
        )
    if advice := advice_text(verdict, say):
        told.append(Statement(advice))
    if general := general_text(verdict, say):
        told.append(Statement(general))
    return Section("verdict", part_name(4, say), say("Better or worse", "变好还是变坏"), tuple(told))


def _signed(change: dict[str, Any]) -> str:
    value, low, high = (f"{change[name]:+.3g}".replace("-", "−") for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
