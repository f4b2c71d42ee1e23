"""Tokens to text as OpenAI's API gives it out: stop strings, whole characters, and why it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from slimtune.data.calls import Call
from slimtune.serve.engine import Engine, Token
from slimtune.serve.guide import Guide
from slimtune.serve.in_turn import InTurn
from slimtune.serve.tools import CallText
from slimtune.use.sampling import Sampling
from slimtune.use.stream import TextStream

__all__ = ["Part", "StopText", "parts"]

Finish = Literal["stop", "length", "tool_calls"]


@dataclass
class Part:
    """A piece of a reply: what can be shown now."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    calls: list[Call] = field(default_factory=list)


class StopText:
    """Text up to the first stop string, which is left out. What might be the beginning of one is held back.

    Args:
        tokenizer: Decodes the tokens.
        stops: The stop strings; none of them empty.
        kept: Control tokens that are shown as text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], kept: Collection[int] = ()) -> None:
        self.stopped = False
        self._stops = stops
        self._stream = TextStream(tokenizer, kept)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is safe to show after ``token``."""
        return self._pass(self._stream.push(token))

    def end(self) -> str:
        """What is left when no token follows."""
        text = self._pass(self._stream.end())
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _pass(self, text: str) -> str:
        text = self._held + text
        places = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


async def parts(
    engine: Engine | InTurn,
    prompt: Sequence[int],
    sampling: Sampling,
    stops: Sequence[str],
    top_logprobs: int | None,
    *,
    calls: CallText | None = None,
    guide: Guide | None = None,
) -> AsyncGenerator[Part, None]:
    """A reply in parts; the last one says how it ended. Closing the iterator ends the request.

    Raises:
        Refusal: The engine has stopped.
    """
    text = StopText(engine.opened.tokenizer, stops, () if calls is None else calls.marks)
    tokens: list[Token] = []
    async with engine.reply(prompt, sampling, top_logprobs=top_logprobs, guide=guide) as arriving:
        async for token in arriving:
            tokens.append(token)
            turn_ended = token.id in engine.opened.stop_ids
            shown = "" if turn_ended else text.push(token.id)
            if token.last and not text.stopped:
                shown += text.end()
            if calls is not None:
                shown = calls.push(shown)
            if token.last or text.stopped:
                finish: Finish = "stop" if turn_ended or text.stopped else "length"
                rest, made = ("", []) if calls is None else calls.end()
                yield Part(shown + rest, tokens, "tool_calls" if made and finish == "stop" else finish, made)
                return
            if shown:
                yield Part(shown, tokens)
                tokens = []
