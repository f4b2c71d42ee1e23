"""Preference data: rows that hold a better and a worse reply, or say of their reply whether it is wanted.

Such rows are made for DPO, KTO and the like. Trained on as they are they would teach the worse reply, or none at all;
so they are recognised and refused, and ``prefer: chosen`` makes rows of their better replies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slimtune.data.rows import RowRefused, kind_of

__all__ = ["chosen_row"]

_PAIRS = (
    ("chosen", "rejected"),  # TRL, LLaMA-Factory, axolotl, most of what is published
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),  # OpenAI
    ("accepted", "rejected"),
    ("response_j", "response_k"),  # stack-exchange-paired
)
"""(better, worse): columns that make a row preference data where both are there."""
_WORSE = ("rejected_response", "rejected_messages")
"""Columns of ms-swift's: the row itself holds the better reply."""
_UNRANKED = (
    ("response_0", "response_1"), ("output_1", "output_2"), ("response_a", "response_b"),
    ("conversation_a", "conversation_b"), ("response1", "response2"),
)  # fmt: skip
"""Two replies, the better one named elsewhere in a way of each publisher's own."""
_LABELS = ("label", "kto_tag")
_FLAGS = ("chosen", "is_chosen", "preferred", "is_preferred", "desirable")
"""Columns that are a label where they are true or false."""
_SAID = {"true": True, "desirable": True, "false": False, "undesirable": False}
_SIGNS = frozenset({*_LABELS, *_FLAGS, *_WORSE, "output"}.union(*_PAIRS, *_UNRANKED))
"""A row without any of these columns is no preference data: most rows are told by that alone."""
_TURNS = ("conversations", "conversation", "messages")
_QUESTIONS = ("prompt", "question", "instruction", "query", "input")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def chosen_row(value: Mapping[str, Any], prefer: str | None) -> Mapping[str, Any]:
    """The row with its better reply alone; the row itself where it is no preference data.

    Args:
        value: A row.
        prefer: ``chosen``, or None: preference data is refused.

    Raises:
        RowRefused: It is preference data and ``prefer`` is None, or its reply isn't wanted, or which one is isn't said.
    """
    if _SIGNS.isdisjoint(value):
        return value
    labelled = _label(value)
    if labelled is not None:
        name, wanted = labelled
        _need_choice(prefer, f"whether the reply is wanted stands in {name!r}")
        if not wanted:
            raise RowRefused(name, "the reply isn't wanted (prefer: chosen)", "not-preferred")
        return {key: item for key, item in value.items() if key != name}
    for better, worse in _PAIRS:
        if value.get(better) is not None and worse in value:
            _need_choice(prefer, f"a better reply in {better!r}, a worse one in {worse!r}")
            rest = {key: item for key, item in value.items() if key not in (better, worse)}
            return _with_reply(rest, better, value[better])
    for worse in _WORSE:
        if value.get(worse):
            _need_choice(prefer, f"a worse reply in {worse!r}")
            return {key: item for key, item in value.items() if key != worse}
    for first, second in _UNRANKED:
        if first in value and second in value:
            what = f"two replies, {first!r} and {second!r}, and which is better isn't read"
            raise RowRefused("", f"preference data ({what}): keep the better one, without the other", "unranked")
    output = value.get("output")
    if isinstance(value.get("instruction"), str) and isinstance(output, list) and len(output) > 1:
        _need_choice(prefer, "a list of replies in 'output', the best first")
        return {**value, "output": output[0]}
    return value


def _need_choice(prefer: str | None, found: str) -> None:
    if prefer is None:
        raise RowRefused("", f"preference data ({found}): --prefer chosen takes the better one", "preference")


def _label(value: Mapping[str, Any]) -> tuple[str, bool] | None:
    """(column, whether the reply is wanted) of a row of KTO's kind.

    Numbers count beside prompt and completion alone, as elsewhere they may be any classifier's.
    """
    for name in (*_LABELS, *_FLAGS):
        label = value.get(name)
        if name in _LABELS and isinstance(label, str):
            label = _SAID.get(label.strip().lower())
        if name in _LABELS and "prompt" in value and "completion" in value and type(label) is int and label in (0, 1):
            label = bool(label)
        answered = any(column in value for column in (*_TURNS, "completion", "output", "response", "answer"))
        if isinstance(label, bool) and answered:
            return name, label
    return None


def _with_reply(rest: dict[str, Any], name: str, chosen: Any) -> dict[str, Any]:
    """A row of prompt and completion, out of what a row has beside its replies, and the better one."""
    asked = rest.pop("input", None) if isinstance(rest.get("input"), Mapping) else None
    if asked is not None:  # OpenAI's: the request as an object
        rest.update(asked)
    kept: dict[str, Any] = {key: rest[key] for key in ("system", "system_prompt", "tools") if key in rest}
    turns = next((rest[key] for key in _TURNS if isinstance(rest.get(key), list) and rest[key]), None)
    question = next((rest[key] for key in _QUESTIONS if rest.get(key)), None)
    reply = [chosen] if isinstance(chosen, Mapping) else chosen
    if isinstance(reply, list):
        if reply and isinstance(reply[0], Mapping) and not _is_reply(reply[0]):
            return {**_last_reply(reply), **kept}  # the whole conversation, the question included
    elif not isinstance(reply, str):
        raise RowRefused(name, f"{kind_of(reply)} where a reply belongs", "preference")
    elif turns is None and question is None:
        return {**_last_reply(_transcript(name, reply)), **kept}
    else:
        reply = [{"role": "assistant", "content": reply}]
    if question is not None and (turns is None or "prompt" in rest):
        turns = question if isinstance(question, list) else _asked(rest, question)
    if turns is None:
        raise RowRefused(name, "a reply without a question: no prompt stands beside it", "preference")
    return {"prompt": turns, "completion": reply, **kept}


def _last_reply(turns: list[Any]) -> dict[str, Any]:
    """A conversation as prompt and completion: what is chosen is the reply at its end."""
    at = len(turns)
    while at and isinstance(turns[at - 1], Mapping) and _is_reply(turns[at - 1]):
        at -= 1
    return {"prompt": turns[:at], "completion": turns[at:]} if 0 < at < len(turns) else {"messages": turns}


def _asked(rest: Mapping[str, Any], question: Any) -> list[dict[str, Any]]:
    """Alpaca's columns as turns: history, then instruction and input."""
    turns = []
    history = rest.get("history")
    for pair in history if isinstance(history, list) else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRefused("history", "must be pairs: what the user said, what the assistant replied")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    extra = rest.get("input")
    if isinstance(question, str) and isinstance(extra, str) and extra.strip() and extra != question:
        question = f"{question}\n{extra}"
    return [*turns, {"role": "user", "content": question}]


def _is_reply(turn: Mapping[str, Any]) -> bool:
    return str(turn.get("role", turn.get("from"))).lower() in ("assistant", "gpt", "model", "bot", "chatbot")


def _transcript(name: str, text: str) -> list[dict[str, str]]:
    """Turns of the form that Anthropic's HH-RLHF has: each begins with an empty line and Human: or Assistant:."""
    parts = _SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise RowRefused(name, "a reply without a question: no prompt stands beside it", "preference")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
