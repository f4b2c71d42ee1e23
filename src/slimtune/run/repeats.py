"""Whether a model's replies have got stuck: the same piece of text over and over, until they were cut.

Held-out prompts are answered before the first step and at the end (:mod:`slimtune.run.samples`). A reply counts if most
of it is one such stretch, while neither the reply before the training nor what the row goes on with has one half as
long: what repeats by its nature, a table's ruler or a song, accuses nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimtune.run.samples import Reply, Sampled

__all__ = ["Stuck", "longest_repetition", "stuck_replies"]

TIMES = 3
"""A piece that stands so often in a row repeats."""
LEAST = 16
"""Characters. Less may be a word's own, or a number's."""
MOST = 2_000
"""Characters of a text that are looked at."""


@dataclass(frozen=True)
class Stuck:
    """How many replies of a step are stuck, of those that were answered before the training too."""

    stuck: int = 0
    answered: int = 0
    example: str = ""

    @property
    def most(self) -> bool:
        """Whether it is most of them, and more than one."""
        return self.stuck > 1 and 2 * self.stuck > self.answered


def stuck_replies(sampled: Sampled, step: int) -> Stuck:
    """What was answered after ``step``, against step 0 and against what the rows go on with."""
    found = []
    for asked in sampled.prompts:
        replies = {reply.step: reply for reply in asked.replies}
        if step > 0 and 0 in replies and step in replies:
            found.append((replies[step], _is_stuck(replies[step], replies[0].text, asked.expected)))
    stuck = [reply.text for reply, is_stuck in found if is_stuck]
    return Stuck(len(stuck), len(found), stuck[0] if stuck else "")


def _is_stuck(reply: Reply, before: str, expected: str) -> bool:
    length = longest_repetition(reply.text)
    if reply.ended == "stop" or length < LEAST or 2 * length < len(reply.text[:MOST]):
        return False
    return 2 * max(longest_repetition(before), longest_repetition(expected)) < length


def longest_repetition(text: str) -> int:
    """Characters of the longest stretch that is one piece, of whatever length, three times in a row or oftener."""
    codes = np.fromiter(map(ord, text[:MOST]), np.int32)
    longest = 0
    for period in range(1, len(codes) // TIMES + 1):
        # A run of n characters that are those one period before them is a stretch of n + period.
        differs = np.flatnonzero(codes[period:] != codes[:-period])
        edges = np.concatenate(([-1], differs, [len(codes) - period]))
        run = int(np.diff(edges).max()) - 1
        if run >= (TIMES - 1) * period:
            longest = max(longest, run + period)
    return longest
