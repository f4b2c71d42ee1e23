"""Replies in the shapes of OpenAI's API: whole ones, chunks of a stream, log probabilities, usage."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimtune.data.calls import Call
from slimtune.serve.engine import Token
from slimtune.serve.reply import Part

__all__ = ["Chat", "Completion", "Shape", "usage"]

Spell = Callable[[int], tuple[str, list[int]]]
"""A token's text and its bytes."""


def usage(prompt: int, reply: int) -> dict[str, int]:
    """The counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def _call(call: Call) -> dict[str, Any]:
    """A call as clients get it. Nine letters and digits are what Mistral's templates take for an id."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"c{secrets.token_hex(4)}", "type": "function", "function": function}


@dataclass
class Shape(ABC):
    """One reply's fixed fields, and what differs between chat and completions."""

    model: str
    logprobs: bool
    spell: Spell
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    created: int = field(default_factory=lambda: int(time.time()))
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(
        self,
        text: str,
        tokens: Sequence[Token],
        finish: str | None,
        counts: dict[str, int],
        calls: Sequence[Call] = (),
    ) -> dict[str, Any]:
        """The answer at once."""
        choice = {"index": 0, **self._text(text, calls), "logprobs": self._logprobs(tokens), "finish_reason": finish}
        return {**self._head(self.whole_object), "choices": [choice], "usage": counts}

    def chunk(self, part: Part) -> dict[str, Any]:
        """A piece of a stream."""
        delta = self._delta(part.text, part.calls)
        choice = {"index": 0, **delta, "logprobs": self._logprobs(part.tokens), "finish_reason": part.finish}
        return {**self._head(self.chunk_object), "choices": [choice]}

    def last(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk that holds the usage, after all others."""
        return {**self._head(self.chunk_object), "choices": [], "usage": counts}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{self.identity}", "object": kind, "created": self.created, "model": self.model}

    @abstractmethod
    def _text(self, text: str, calls: Sequence[Call]) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, text: str, calls: Sequence[Call]) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None: ...


class Chat(Shape):
    """``chat.completion`` and ``chat.completion.chunk``."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """Who speaks."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{**self._head(self.chunk_object), "choices": [choice]}]

    def _text(self, text: str, calls: Sequence[Call]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        return {"message": message}

    def _delta(self, text: str, calls: Sequence[Call]) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": at, **_call(call)} for at, call in enumerate(calls)]
        return {"delta": delta}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens if token.chances is not None], "refusal": None}

    def _token(self, token: Token) -> dict[str, Any]:
        assert token.chances is not None
        top = [self._spelled(other, logprob) for other, logprob in token.chances.top]
        return {**self._spelled(token.id, token.chances.logprob), "top_logprobs": top}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text, spelled = self.spell(token)
        return {"token": text, "logprob": logprob, "bytes": spelled}


class Completion(Shape):
    """``text_completion``, whole and in chunks."""

    def _text(self, text: str, calls: Sequence[Call]) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str, calls: Sequence[Call]) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for token in tokens:
            assert token.chances is not None
            made["tokens"].append(self.spell(token.id)[0])
            made["token_logprobs"].append(token.chances.logprob)
            made["top_logprobs"].append({self.spell(other)[0]: logprob for other, logprob in token.chances.top})
        return made
