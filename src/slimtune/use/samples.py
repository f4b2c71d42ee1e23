"""A few held-out prompts that a model answers while it trains, so that one sees it learn.

The prompts are the beginnings of held-out documents, token by token what training read: up to the last reply, or half
of a text that has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from slimtune.data.documents import Documents
from slimtune.data.render import Manner
from slimtune.use.ask import opened_as_it_is
from slimtune.use.decode import decode
from slimtune.use.load import Opened
from slimtune.use.sampling import Draws, Sampling
from slimtune.use.way import way_of

__all__ = ["Asked", "Samples", "choose"]

TOKENS = 48
"""Most tokens of a reply."""
LONGEST, OF_A_TEXT = 256, 64
"""Most tokens of a prompt, and of one that is the beginning of a text: what is kept of them takes memory."""
LOOKED_AT = 1_000
"""Held-out documents, at most, among which prompts are looked for."""
CHARACTERS = 4_000
"""Of a prompt and of an expected reply, at most."""


@dataclass(frozen=True)
class Asked:
    """One held-out prompt."""

    ids: list[int]
    row: str
    """Where its row stands, as file:line."""
    prompt: str
    """As the model reads it, control tokens and all."""
    expected: str
    """What the row goes on with."""


def choose(documents: Documents, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Asked]:
    """``count`` different prompts, or as many as there are, the same for the same documents and seed."""
    found: dict[tuple[int, ...], Asked] = {}
    if not count:
        return []
    for at in np.random.default_rng([seed, 4]).permutation(len(documents))[:LOOKED_AT]:
        if len(found) == count:
            break
        ids, supervised = documents[int(at)]
        start, end = _reply(supervised)
        if 0 < start <= LONGEST:
            prompt = tuple(map(int, ids[:start]))
            text = tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False)
            expected = tokenizer.decode(
                ids[start:end].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            row = str(documents.place(int(at)))
            found[prompt] = Asked(list(prompt), row, str(text)[-CHARACTERS:], str(expected)[:CHARACTERS])
    return list(found.values())


def _reply(supervised: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Where the last supervised stretch begins and ends; if it is the whole text, a part of its second half."""
    targets = np.flatnonzero(supervised)
    if not len(targets):
        return 0, 0
    end = int(targets[-1]) + 1
    others = np.flatnonzero(~np.asarray(supervised[:end]))
    start = int(others[-1]) + 1 if len(others) else 0
    if start < 2:  # nothing, or a mark that begins every text
        start = min(end // 2, OF_A_TEXT)
        end = min(end, start + TOKENS)
    return start, end


class Samples:
    """Answers the same prompts whenever it is asked to, the likeliest token at each step.

    Args:
        asked: The prompts.
        tokenizer: The training's.
        manner: How it renders conversations; it says what ends a reply.
        tokens: Most tokens of a reply; :data:`TOKENS` unless given.
    """

    def __init__(
        self, asked: list[Asked], tokenizer: PreTrainedTokenizerBase, manner: Manner, tokens: int | None = None
    ) -> None:
        self.asked, self.tokenizer, self.manner = asked, tokenizer, manner
        self.tokens = tokens or TOKENS

    def __call__(self, model: Any, seconds: float, goes_on: Callable[[], bool]) -> list[dict[str, str]] | None:
        """The replies, as ``samples.jsonl`` has them; None once ``goes_on``, asked at every token, says no.

        Args:
            model: A Transformers model or PEFT's wrapping of one; its training mode is what it was, afterwards.
            seconds: Most time for all of them; what isn't said by then is left out (``ended: time``). The first call
                tries the model before that, by a few short passes (:mod:`slimtune.use.way`).
            goes_on: Whether to go on.
        """
        training = model.training
        model.eval()
        try:
            said = self._said(opened_as_it_is(model, self.tokenizer, self.manner), seconds, goes_on)
        finally:
            model.train(training)
        if said is None:
            return None
        return [
            {"row": asked.row, "prompt": asked.prompt, "expected": asked.expected, "reply": text, "ended": ended}
            for asked, (text, ended) in zip(self.asked, said, strict=True)
        ]

    def _said(self, opened: Opened, seconds: float, goes_on: Callable[[], bool]) -> list[tuple[str, str]] | None:
        """(reply, how it ended: stop, length or time) for each prompt."""
        said: list[list[int]] = [[] for _ in self.asked]
        ended = ["time"] * len(said)
        waiting = sorted(range(len(said)), key=lambda index: -len(self.asked[index].ids))  # as decode() takes them
        deadline = time.monotonic() + seconds
        while waiting:
            longest = min(len(self.asked[waiting[0]].ids) + self.tokens, opened.context)
            rows = way_of(opened, longest).rows or len(said)
            now = time.monotonic()
            until = now + (deadline - now) * min(1.0, rows / len(waiting))
            batch, waiting = waiting[:rows], waiting[rows:]
            limits = [min(self.tokens, opened.context - len(self.asked[index].ids)) for index in batch]
            draws = Draws(Sampling(max_new_tokens=self.tokens), batch)
            for row, token in decode(opened, [self.asked[index].ids for index in batch], limits, draws):
                if not goes_on():
                    return None
                if token in opened.stop_ids:
                    ended[batch[row]] = "stop"
                else:
                    said[batch[row]].append(token)
                    if len(said[batch[row]]) == limits[row]:
                        ended[batch[row]] = "length"
                if time.monotonic() >= until:
                    break
        spell = self.tokenizer.decode
        texts = [str(spell(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for ids in said]
        return list(zip(texts, ended, strict=True))
