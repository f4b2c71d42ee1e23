"""A conversation: its history, and replies that stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from slimtune.errors import UserError
from slimtune.use.attention import any_length
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling
from slimtune.use.stream import TextStream

__all__ = ["ChatSession"]


class ChatSession:
    """One person's conversation with one model.

    Args:
        opened: The model.
        sampling: How its tokens are chosen.
        system: The system text, or None.
    """

    def __init__(self, opened: Opened, sampling: Sampling, system: str | None = None) -> None:
        self.opened = opened
        self.sampling = sampling
        self.system = system
        self.turns: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, the system text first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def reset(self) -> None:
        """Forget the conversation; the system text stays."""
        self.turns.clear()

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """Answer ``text``, handing each piece to ``show`` as it comes, and remember both turns.

        A KeyboardInterrupt stops the reply: what was said so far is remembered and the interrupt goes on to the caller.

        Raises:
            UserError: The conversation has outgrown the model's context.
        """
        self.turns.append({"role": "user", "content": text})
        said = _Spoken(TextStream(self.opened.tokenizer), self.opened.stop_ids, show)
        try:
            ids = self.opened.prompt_ids(self.messages)
            room = self._room(len(ids))
            with torch.inference_mode(), any_length():
                self.opened.model.generate(
                    torch.tensor([ids], device=self.opened.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=self.opened.device),
                    generation_config=self.sampling.generation_config(self.opened, room),
                    streamer=said,
                )
        finally:
            if said.text:
                self.turns.append({"role": "assistant", "content": said.text})
            else:
                # Nothing was said: the question isn't remembered either, so that turns keep alternating.
                self.turns.pop()
        return said.text

    def _room(self, used: int) -> int:
        context = self.opened.context
        if used >= context:
            raise UserError(
                f"the conversation has {used} tokens",
                rule=f"{self.opened.found.name} takes {context}.",
                way_out="/reset starts anew.",
            )
        return min(self.sampling.max_new_tokens, context - used)


class _Spoken(BaseStreamer):
    """Takes generate's tokens, shows their text, and keeps it."""

    def __init__(self, stream: TextStream, stop_ids: tuple[int, ...], show: Callable[[str], None]) -> None:
        self.stream, self.stop_ids, self.show = stream, stop_ids, show
        self.text = ""
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        """Transformers hands over the prompt first, then each token."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        for token in value.reshape(-1).tolist():
            if token not in self.stop_ids:
                self._say(self.stream.push(token))

    def end(self) -> None:
        """The reply is over."""
        self._say(self.stream.end())

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self.show(text)
