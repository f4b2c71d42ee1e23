"""The time that requests have, which may end before it has passed: when the server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from slimtune.serve.refusal import Refusal

__all__ = ["Deadlines", "ending"]


class Deadlines:
    """The requests under way and their ends.

    Args:
        seconds: Most time for each.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.over = False
        """Whether the server ends: no request has any time left."""
        self._open: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def within(self) -> AsyncIterator[None]:
        """What is done in this has its time and no more.

        Raises:
            Refusal: The time is over (503, with Retry-After).
        """
        try:
            async with asyncio.timeout(0 if self.over else self.seconds) as scope:
                self._open.add(scope)
                try:
                    yield
                finally:
                    self._open.discard(scope)
        except TimeoutError:
            if self.over:
                raise ending() from None
            words = f"the reply took longer than {self.seconds:g} s"
            raise Refusal(503, words, "timeout", retry_after=5) from None

    def end(self) -> None:
        """End all of them now."""
        self.over = True
        for scope in self._open:
            if not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())


def ending() -> Refusal:
    """What a client is told when the server ends."""
    return Refusal(503, "the server is being stopped", "server_stopping", retry_after=5)
