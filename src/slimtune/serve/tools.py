"""Tool calls in replies: kept out of the text, and given out as ``tool_calls`` once the reply is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from slimtune.data.calls import Call, CallForm, call_form
from slimtune.data.render import renderer_for
from slimtune.serve.refusal import Refusal
from slimtune.use.load import Opened

__all__ = ["CallText", "Forms"]

_KEPT = 64


class Forms:
    """How one model's template writes calls, by the variables that it is rendered with.

    Args:
        opened: The model.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._known: dict[str, CallForm | None] = {}

    def find(self, variables: Mapping[str, Any] | None) -> CallForm:
        """The form; found out once.

        Raises:
            Refusal: It can't be read back (400).
        """
        key = json.dumps(variables, sort_keys=True)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            renderer = renderer_for(self._opened.tokenizer, self._opened.found.manner)
            ends = [str(self._opened.tokenizer.decode([token])) for token in self._opened.stop_ids]
            self._known[key] = call_form(lambda messages, tools: renderer.reply(messages, tools, variables), ends)
        form = self._known[key]
        if form is None:
            words = "the model's chat template writes calls in a form that can't be read back"
            raise Refusal(400, words, "unsupported_value", param="tools")
        return form

    def marks(self, form: CallForm) -> frozenset[int]:
        """Ids of control tokens that calls are written with: of a reply that has calls they must be seen."""
        known = self._opened.tokenizer.added_tokens_decoder
        return frozenset(token for token, added in known.items() if added.special and added.content in form.sample)


class CallText:
    """A reply's text with the calls kept back.

    Args:
        form: How they are written.
        tools: What the model was shown.
        marks: Ids of control tokens that calls are written with.
        most: Most calls that are given out.
        checks: By the name of a tool whose schema is promised to be kept to, whether arguments fit it.
    """

    def __init__(
        self,
        form: CallForm,
        tools: list[dict[str, Any]],
        marks: frozenset[int],
        *,
        most: int | None = None,
        checks: Mapping[str, Callable[[Any], bool]] | None = None,
    ) -> None:
        self.marks, self._checks = marks, checks or {}
        self._form, self._tools, self._most = form, tools, most
        self._held = ""
        self._begun = False
        self._shown = False

    def push(self, text: str) -> str:
        """What of ``text``, and of what was kept back before, is no part of a call."""
        self._held += text
        if self._begun:
            return ""
        end = len(self._held)
        if self._form.opening or not self._shown:
            begin = self._form.begins(self._held)
            self._begun = begin is not None
            end = begin if begin is not None else end - self._form.may_begin(self._held)
            end = len(self._held[:end].rstrip())  # white space between text and calls is the calls'
        shown, self._held = self._held[:end], self._held[end:]
        self._shown = self._shown or bool(shown)
        return shown

    def end(self) -> tuple[str, list[Call]]:
        """What is left: text, and the calls. Where one breaks its tool's promise, all stays text."""
        if not self._begun:
            return self._held, []
        read = self._form.read(self._held, self._tools)
        calls = read.calls[: self._most]
        if not calls or not all(self._checks[c.name](c.arguments) for c in calls if c.name in self._checks):
            return self._held, []
        return read.text, calls
