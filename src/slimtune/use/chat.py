"""A conversation: its history, and replies that stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slimtune.errors import UserError
from slimtune.use.decode import decode
from slimtune.use.load import Opened
from slimtune.use.sampling import Draws, Sampling
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
        self.is_base = False
        """Whether the adapter is switched off, so that the base answers."""
        self._replies = 0

    @property
    def model(self) -> str:
        """Who answers."""
        return self.opened.found.base_name if self.is_base else self.opened.found.name

    def switch(self, *, base: bool) -> None:
        """Let the base answer, or what was opened; another model begins another conversation.

        Raises:
            UserError: There is no other, or the adapter can't be switched off.
        """
        if self.opened.found.adapter is None:
            raise UserError(f"{self.opened.found.name} is a bare model: there is no adapter to switch off or on")
        with self.opened.as_base():  # refuses what it can't do
            pass
        if base != self.is_base:
            self.is_base = base
            self.reset()

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
        said = _Spoken(TextStream(self.opened.tokenizer), show)
        try:
            ids = self.opened.prompt_ids(self.messages)
            # Each reply of the session has draws of its own, the same ones whenever the session is had again.
            draws = Draws(self.sampling, [self._replies])
            self._replies += 1
            with self.opened.as_base() if self.is_base else self.opened.as_tuned():
                for _, token in decode(self.opened, [ids], [self._room(len(ids))], draws):
                    if token not in self.opened.stop_ids:
                        said.push(token)
            said.end()
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
                rule=f"The context of {self.opened.found.name} holds {context}.",
                way_out="/reset starts anew.",
            )
        return min(self.sampling.max_new_tokens, context - used)


class _Spoken:
    """Takes tokens, shows their text, and keeps it."""

    def __init__(self, stream: TextStream, show: Callable[[str], None]) -> None:
        self.stream, self.show = stream, show
        self.text = ""

    def push(self, token: int) -> None:
        """The next token."""
        self._say(self.stream.push(token))

    def end(self) -> None:
        """The reply is over."""
        self._say(self.stream.end())

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self.show(text)
