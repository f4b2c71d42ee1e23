"""The grammar of a reply that has to be a call, in the form in which the model's template writes calls.

In llguidance's notation: Lark's, with JSON schemas (``%json``), control tokens by their numbers (``<[5]>``), and text
up to a mark (``[suffix=…]``). What comes from a client stands in it as JSON or quoted, never as the template's words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from slimtune.data.calls import Frame, Marked

__all__ = ["CannotSpell", "call_grammar"]

# What may stand for what differs from call to call.
_VARYING = {Frame.ID: "/[a-zA-Z0-9]{9}/", Frame.NUMBER: "/[0-9]{1,3}/"}
# What a schema may say where its arguments stand between marks. The second of texts, which stand there as they are.
_KNOWN = {"type", "properties", "required", "additionalProperties", "$defs"}
_OF_TEXT = {"type", "enum", "const"}
_WORDS = {"title", "description", "default", "examples", "$schema"}


class CannotSpell(Exception):
    """A schema says more than a grammar of this form can keep to."""


def call_grammar(
    frame: Frame,
    tools: Mapping[str, dict[str, Any]],
    control: Mapping[str, int],
    json_style: dict[str, Any],
    several: bool,
) -> str:
    """The grammar.

    Args:
        frame: What stands around calls.
        tools: By name, the schema of the tool's arguments.
        control: The tokenizer's control tokens.
        json_style: llguidance's options for JSON.
        several: Whether there may be more than one call.

    Raises:
        CannotSpell: A schema can't be kept to.
    """
    spell = _Spelling(control, json_style)
    more = f"({spell.text(frame.between)} call)*" if several and frame.between is not None else ""
    rules = [
        f"start: {spell.text(frame.before)} call {more} {spell.text(frame.after)}",
        f"call: {' | '.join(f'call{number}' for number in range(len(tools)))}",
    ]
    for number, (name, schema) in enumerate(tools.items()):
        rules.append(f"call{number}: {json.dumps(name)} rest{number}")
        if isinstance(frame.within, Marked):
            rules += spell.marked(f"rest{number}", frame.within, schema)
        else:
            rules.append(f"rest{number}: {spell.text(frame.within)} args{number}")
            rules.append(f"args{number}: {spell.json({**schema, 'type': 'object'})}")
    return "\n".join(rules)


class _Spelling:
    def __init__(self, control: Mapping[str, int], json_style: dict[str, Any]) -> None:
        self._words = {**{word: f"<[{token}]>" for word, token in control.items()}, **_VARYING}
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(self._words, key=len, reverse=True)))})")
        self._json_style = json_style

    def text(self, text: str) -> str:
        """The words for a text."""
        return " ".join(self._words.get(part, json.dumps(part)) for part in self._split.split(text) if part) or '""'

    def json(self, schema: dict[str, Any]) -> str:
        """The words for a JSON value."""
        return "%json " + json.dumps({**schema, "x-guidance": self._json_style})

    def marked(self, rule: str, marks: Marked, schema: dict[str, Any]) -> list[str]:
        """Arguments between marks, in the schema's order; an optional one may be left out. Two rules for each: one for
        when none stands before it, one for when some do."""
        if more := schema.keys() - _KNOWN - _WORDS:
            raise CannotSpell(f"arguments between marks can't be held to {', '.join(sorted(more))}")
        required, properties = schema.get("required") or [], schema.get("properties") or {}
        if not isinstance(properties, dict) or not _is_texts(required):
            raise CannotSpell("its properties or what is required of them aren't a schema's")
        named = {**properties, **{name: {} for name in required if name not in properties}}
        separator = marks.next_key.removeprefix(marks.value_end)
        rules = [f"{rule}: {rule}_first0"]
        for number, (name, argument) in enumerate(named.items()):
            rules += self._value(f"{rule}_value{number}", marks, argument, schema)
            name_in = f"{self._verbatim(name, marks.key_end)} {self.text(marks.key_end)}"
            for kind, before in (("first", marks.before_key), ("later", separator)):
                given = f"{self.text(before)} {name_in} {rule}_value{number} {rule}_later{number + 1}"
                left_out = "" if name in required else f" | {rule}_{kind}{number + 1}"
                rules.append(f"{rule}_{kind}{number}: {given}{left_out}")
        rules.append(f"{rule}_first{len(named)}: {self.text(marks.none + marks.end)}")
        return [*rules, f"{rule}_later{len(named)}: {self.text(marks.end)}"]

    def _value(self, rule: str, marks: Marked, argument: Any, schema: dict[str, Any]) -> list[str]:
        """A value and the mark behind it: a text as it is, all else as JSON."""
        end = marks.value_end.strip()
        known = argument if isinstance(argument, dict) else {}
        if known.keys() - _WORDS == {"type"} and known["type"] == "boolean":  # templates write it either way
            return [f'{rule}: ("true" | "false" | "True" | "False") {self.text(marks.value_end)}']
        if known.get("type") != "string":
            return [f"{rule}: {self.json({**known, '$defs': schema.get('$defs') or {}})} {self.text(marks.value_end)}"]
        if more := known.keys() - _OF_TEXT - _WORDS:
            raise CannotSpell(f"a text between marks can't be held to {', '.join(sorted(more))}")
        if "enum" in known or "const" in known:
            texts = known.get("enum", [known.get("const")])
            if not texts or not _is_texts(texts):
                raise CannotSpell("an enum of texts is a list of them")
            spelled = " | ".join(self._verbatim(text, end) for text in texts)
            return [f"{rule}: ({spelled}) {self.text(marks.value_end)}"]
        if end in self._words:  # no text holds a control token
            return [f"{rule}: {rule}_text {self.text(end)}", f"{rule}_text: /(?s:.*)/"]
        return [f"{rule}[suffix={json.dumps(end)}]: /(?s:.*)/"]

    def _verbatim(self, text: str, mark: str) -> str:
        """A client's text that stands before a mark, as it is."""
        if not text or text != text.strip() or mark.strip() in text:
            raise CannotSpell(f"{text!r:.100} can't stand between marks")
        return json.dumps(text)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
