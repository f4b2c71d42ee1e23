"""Prompts of a file, and the answers that the file gives to them, in any shape that training reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slimtune.config import Config
from slimtune.data.conversation import Message, RowRefused, detect_shape, normalise, read_messages, read_variables
from slimtune.data.sources import Place, Row, parse_source, read_rows
from slimtune.data.stdin import keep_stdin
from slimtune.errors import UserError

__all__ = ["Question", "read_questions"]


@dataclass(frozen=True)
class Question:
    """What a model is asked, and the answer that stands in the file, if one does."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    reference: str | None = None
    place: str = ""
    variables: dict[str, Any] = field(default_factory=dict)
    """What the row sets in the chat template (``chat_template_kwargs``)."""


def read_questions(file: str, *, need_reference: bool = False) -> list[Question]:
    """The questions of a file or whatever else training's DATA may be, in its order.

    A row is text; or has ``prompt`` (text or messages), ``messages`` that end with a user's turn, or ``instruction``;
    or it is a row as training reads it, whose last reply is then the reference.

    Args:
        file: As training's DATA; - is standard input.
        need_reference: Refuse rows without an answer.

    Raises:
        UserError: The file can't be read, is empty, or a row breaks a rule; its place is named.
    """
    with TemporaryDirectory() as folder:
        (name,) = keep_stdin(Config.make(data=file), Path(folder)).data
        questions = [_proven(row, need_reference) for row in read_rows(parse_source(name))]
    if not questions:
        raise UserError(f"{file} holds no rows", rule="A file of prompts holds at least one.")
    return questions


def _proven(row: Row, need_reference: bool) -> Question:
    if row.refused:
        raise UserError(f"{row.place}: {row.refused}")
    try:
        question = _question(row.value, row.place)
    except RowRefused as refused:
        raise UserError(f"{row.place}: {refused}", rule=_question.__doc__ or "") from None
    if need_reference and question.reference is None:
        raise UserError(f"{row.place}: the row has no answer", rule="To be scored, each row needs one.")
    return question


def _question(value: Any, place: Place) -> Question:
    """A row is text, or an object with prompt, messages, instruction, or the columns that training reads."""
    where = str(place)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, Mapping):
        raise RowRefused("", "the row is neither text nor an object with named fields")
    tools = list(value.get("tools") or [])
    is_pair = detect_shape(value) in ("prompt-completion", "question-answer")
    asked = value.get("messages", None if is_pair else value.get("prompt"))
    if isinstance(asked, str):
        if not asked.strip():
            raise RowRefused("prompt", "empty")
        return Question(read_messages([{"role": "user", "content": asked}]), tools, None, where)
    if isinstance(asked, list) and asked and isinstance(asked[-1], Mapping) and asked[-1].get("role") != "assistant":
        return Question(read_messages(asked), tools, None, where, read_variables(value.get("chat_template_kwargs")))
    answered = "output" in value or "instruction" not in value
    made = normalise(value if answered else {**value, "output": "-"})
    if made.text is not None:
        raise RowRefused("text", "plain text asks nothing; give prompt or messages")
    reply = made.messages[-1]
    reference = str(reply.get("content") or "") if answered and reply["role"] == "assistant" else None
    return Question(made.messages[:-1], made.tools, reference, where, made.variables)
