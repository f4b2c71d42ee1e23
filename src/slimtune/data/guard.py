"""Text stays text: control tokens inside people's words are marked before a template sees them.

The mark (a noncharacter behind the token's first character) keeps the rendered text from holding the token; it is taken
out again when the text is cut into pieces (:mod:`slimtune.data.render`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from slimtune.data.conversation import NONCHARACTER, Message
from slimtune.data.tokens import TokenEncoder

__all__ = ["Guard"]

_THINK = frozenset({"<think>", "</think>"})


class Guard:
    """Marks control tokens in messages and tools.

    Args:
        encoder: Knows the control tokens.
        source: The chat template: added tokens that it writes itself are guarded against, too.
        thought_marks: What the template puts around a thought; in a reply they are the writer's own thought.
    """

    def __init__(self, encoder: TokenEncoder, source: str, thought_marks: Collection[str]) -> None:
        special = encoder.special
        written = {
            text for text in encoder.controls if text in source and any(map(str.isalpha, text)) and len(text) > 1
        }
        self._forgeable: dict[bool, tuple[str, re.Pattern[str]]] = {}
        for is_reply, texts in ((True, special - _THINK - set(thought_marks)), (False, special | written)):
            ordered = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
            self._forgeable[is_reply] = ("".join({text[0] for text in ordered}), pattern)

    def message(self, message: Message, notes: list[str]) -> Message:
        """The message with its text guarded; the same object if nothing had to be."""
        is_reply = message["role"] == "assistant"
        made = message
        for key in ("content", "reasoning_content", "tool_calls", "name"):
            if key in message and (guarded := self.value(message[key], is_reply, notes)) is not message[key]:
                made = {**made, key: guarded}
        return made

    def value(self, value: Any, is_reply: bool, notes: list[str]) -> Any:
        """The value with a mark inside each control token's text, so that it is not recognised; same object if none."""
        if isinstance(value, str):
            firsts, pattern = self._forgeable[is_reply]
            if not any(first in value for first in firsts):
                return value
            marked = pattern.sub(lambda found: found[0][0] + NONCHARACTER + found[0][1:], value)
            if marked == value:
                return value
            notes.append("control-text")
            return marked
        if isinstance(value, dict):
            return {self.value(key, is_reply, notes): self.value(item, is_reply, notes) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, is_reply, notes) for item in value]
        return value
