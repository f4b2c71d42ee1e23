"""Guess the next tokens of a reply from its own words, so that one pass of the model checks several.

A pass for one row reads all weights for one token; for a few tokens of that row it reads them once as well. What a
reply repeats, of its prompt or of itself, is guessed for nothing, and a wrong guess costs only its own place in a pass.
Prompt lookup decoding (Saxena 2023; Transformers' ``prompt_lookup_num_tokens``), with drafts that grow while they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Lookup"]

_FEWEST, _MOST = 3, 15
"""Tokens of a draft: the first one, and one after drafts that held. A CPU takes 16 tokens in about twice one's time."""
_SUFFIXES = (3, 2)
"""How many of the last tokens must have come before, the longest first."""


class Lookup:
    """Drafts for one row, whose history only grows."""

    def __init__(self) -> None:
        self._size = _FEWEST
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def draft(self, history: Sequence[int], most: int) -> list[int]:
        """What came after the last tokens when they came before; at most ``most`` tokens, none if they never did.

        Args:
            history: The prompt's tokens and the reply's so far.
            most: Tokens that there is use for.
        """
        for end in range(self._seen, len(history)):
            for length in _SUFFIXES:
                self._ends[tuple(history[max(0, end - length) : end])] = end
        self._seen = len(history)
        for length in _SUFFIXES:
            end = self._ends.get(tuple(history[-length:]), 0)
            if end:
                period = len(history) - end
                # Where the words between repeat, they are taken to go on repeating.
                return [history[end + at % period] for at in range(min(self._size, most))]
        return []

    def learn(self, drafted: int, held: int) -> None:
        """Learn how many of a draft's tokens were the reply's."""
        if drafted:
            self._size = min(_MOST, 2 * self._size) if held == drafted else _FEWEST
