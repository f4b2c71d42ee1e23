"""What changed while a run trained (``slimtune resume --accept-changes``), and what can be said of such a run."""

from __future__ import annotations

from slimtune.run.statement import Facts, Say, Section, Statement, Table, code, counted, listed, plain
from slimtune.words import catalogue

__all__ = ["frozen_since", "has_changed", "since", "tell_changes"]


def has_changed(facts: Facts, what: str = "") -> bool:
    """Whether anything did, or this thing."""
    return any(not what or change["what"] == what for change in facts.get("changes") or ())


def tell_changes(facts: Facts, say: Say) -> Section | None:
    """Each thing that changed, with what it was, what it became, and the step from which on that held."""
    changes = facts.get("changes")
    if not changes:
        return None
    steps = list(dict.fromkeys(f"{change['step']:,}" for change in changes))
    told = Statement(
        say(
            f"After step{'s' * (len(steps) > 1)} {listed(steps, say)} the run went on although "
            f"{counted(len(changes), 'thing')} had changed (`--accept-changes`). What held before stands in the table; "
            "settings, data and base that are told below are those that came last.",
            f"第 {listed(steps, say)} 步之后，有 {len(changes):,} 处变化，运行仍然继续（`--accept-changes`）。"
            "此前的情况见下表；下文所说的设置、数据和基座都是最后的。",
        )
    )
    rows = tuple(
        (*(_cell(change[key], say) for key in ("what", "before", "after")), f"{change['step'] + 1:,}")
        for change in changes
    )
    header = (say("what", "什么"), say("before", "此前"), say("since", "此后"), say("from step", "从第几步起"))
    title = say("Changed on the way", "途中的变化")
    return Section("changes", "", title, (told,), (), (Table(header, rows, (3,)),))


def since(facts: Facts, say: Say) -> Statement | None:
    """What stands before settings that didn't hold for the whole run."""
    if not has_changed(facts):
        return None
    step, training = facts["changes"][-1]["step"], facts.get("training")
    if training and step >= training["steps"]:
        text = say("With this no step was trained; it is what the run was resumed with last:",
                   "没有一步是这样训练的，这是最后一次继续时的情况：")  # fmt: skip
    else:
        text = say(f"From step {step + 1:,} on:", f"从第 {step + 1:,} 步起：")
    return Statement(text)


def frozen_since(facts: Facts, say: Say) -> Statement:
    """The base's fingerprint of a run that went on with another base, and didn't change that one."""
    step = [change["step"] for change in facts["changes"] if change["what"] == "base weights"][-1]
    now = code(facts["base"]["fingerprint_after"][:16])
    return Statement(
        say(
            f"Since step {step + 1:,} the base's fingerprint has been {now}, and still is. Before that step the "
            "adapter was trained against another base.",
            f"从第 {step + 1:,} 步起，基座的指纹一直是 {now}。在那之前，适配器是对着另一个基座训练的。",
        )
    )


def _cell(text: str, say: Say) -> str:
    return say(plain(text), catalogue().cell(plain(text)))
