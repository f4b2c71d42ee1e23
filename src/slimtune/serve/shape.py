"""Replies in the shapes of OpenAI's API: whole ones, chunks of a stream, log probabilities, usage."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimtune.data.calls import Call
from slimtune.serve.engine import Token
from slimtune.serve.reply import Part
from slimtune.serve.spelling import Spelling

__all__ = ["Chat", "Completion", "Shape", "usage"]

Spelled = tuple[str, bytes]


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
    spelling: Spelling
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    created: int = field(default_factory=lambda: int(time.time()))
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    _begun: bool = field(default=False, init=False)
    """Whether a token has been shown."""

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

    def _shown(self, tokens: Sequence[Token]) -> Iterator[tuple[Spelled, float, list[tuple[Spelled, float]]]]:
        """Each token's spelling and log probability, and those of the likeliest in its place."""
        for token in tokens:
            assert token.chances is not None
            first, self._begun = not self._begun, True
            top = [(self.spelling(other, first=first), logprob) for other, logprob in token.chances.top]
            yield self.spelling(token.id, first=first), token.chances.logprob, top

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
        content = []
        for (text, spelled), logprob, top in self._shown(tokens):
            others = [{"token": other, "logprob": its, "bytes": list(bytes_of_it)} for (other, bytes_of_it), its in top]
            content.append({"token": text, "logprob": logprob, "bytes": list(spelled), "top_logprobs": others})
        return {"content": content, "refusal": None}


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
        for spelled, logprob, top in self._shown(tokens):
            made["tokens"].append(_name(*spelled))
            made["token_logprobs"].append(logprob)
            named: dict[str, float] = {}
            for other, its in top:
                named.setdefault(_name(*other), its)  # of two that are spelled alike, the likelier
            made["top_logprobs"].append(named)
        return made


def _name(text: str, spelled: bytes) -> str:
    """A token where there is no field for its bytes: what is no text is marked."""
    return text if text.encode() == spelled else f"bytes:{text}"
