"""The engine for models that continuous batching can't compute: each request by itself, a token of each in turn.

Slower when many ask at once, since nothing is computed together; what is said is what ``generate`` says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager

from torch import Tensor

from slimtune.serve.choice import Choice
from slimtune.serve.engine import Token, stopped
from slimtune.serve.guide import Guide
from slimtune.serve.limits import Limits
from slimtune.use.decode import decode
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling
from slimtune.use.way import way_of

__all__ = ["InTurn"]


class InTurn:
    """As :class:`slimtune.serve.engine.Engine`, for any model.

    Memory is bounded by the longest request, ``limits.batch`` times: further ones wait.

    Args:
        opened: The model.
        limits: How many requests have their turns, and how long they are.
        computing: What does the sums, one after another.
    """

    def __init__(self, opened: Opened, limits: Limits, computing: Executor) -> None:
        self.opened = opened
        self.longest_prompt = min(limits.prompt_tokens, opened.context - 1)
        self.running = False
        self.held = 0
        self._computing = computing
        self._room = asyncio.Semaphore(limits.batch)
        way_of(opened)

    def start(self) -> None:
        """Answer from now on."""
        self.running = True

    async def stop(self) -> None:
        """Answer no more; requests that are under way are failed."""
        self.running = False

    @asynccontextmanager
    async def reply(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        top_logprobs: int | None = None,
        guide: Guide | None = None,
    ) -> AsyncIterator[AsyncIterator[Token]]:
        """The tokens of one reply as they come; leaving the context ends the request after the token under way.

        Raises:
            Refusal: The engine has stopped.
        """
        self.held += 1
        try:
            async with self._room:
                yield self._tokens(prompt, sampling, Choice(sampling, top_logprobs, guide))
        finally:
            self.held -= 1

    async def _tokens(self, prompt: Sequence[int], sampling: Sampling, choice: Choice) -> AsyncIterator[Token]:
        limit = sampling.max_new_tokens
        steps = decode(self.opened, [list(prompt)], [limit], _Chooses(choice))
        for number in range(limit):
            if not self.running:
                raise stopped()
            # What is under way can't be taken back from the thread that computes: only the waiting for it.
            _, token = await asyncio.shield(asyncio.wrap_future(self._computing.submit(next, steps)))
            last = token in self.opened.stop_ids or number + 1 == limit
            yield Token(token, None if choice.top_logprobs is None else choice.chances[number], last)
            if last:
                return


class _Chooses:
    """One request's choice, as the decoding loop asks for it."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    def choose(self, logits: Tensor) -> Tensor:
        """The token that follows ``logits`` [1, vocabulary]."""
        scores = logits[0].float().clone()
        self._choice.choose(scores)
        return scores.argmax(-1, keepdim=True)

    def keep(self, rows: Tensor) -> None:
        """There is one row."""
