"""The decoding loop: tokens are chosen, rows that have ended leave, and what the last row repeats is guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from slimtune.use.load import Opened
from slimtune.use.lookup import Lookup
from slimtune.use.way import way_of

__all__ = ["Chooses", "decode"]

# Rows leave when this fraction of the batch has ended: leaving copies the cache of those that stay.
_LEAVE_SHARE = 8


class Chooses(Protocol):
    """What chooses each row's next token, as :class:`slimtune.use.sampling.Draws`."""

    def choose(self, logits: Tensor) -> Tensor:
        """A token for each row of ``logits`` [rows, vocabulary], int64 [rows]; called once for each token."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""


def decode(
    opened: Opened, prompts: Sequence[list[int]], limits: Sequence[int], draws: Chooses
) -> Iterator[tuple[int, int]]:
    """Go on with ``prompts``, all in one batch.

    Args:
        opened: The model.
        prompts: Token ids, the longest first; one alone where :attr:`Way.rows` says so of the longest, reply and all.
        limits: Most tokens that each may get.
        draws: Chooses the tokens.

    Yields:
        (number of the prompt, token) for each token as it is chosen, the one that ends a reply among them.
    """
    way = way_of(opened, max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
    rows = way.begin(opened.model, prompts, max(limits))
    alive = [
        _Row(index, list(prompt), limit) for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    ids, draft, lookup = rows.last, list[int](), Lookup()
    while True:
        logits = rows.step(ids)
        # The logits follow each row's last token and, in the last row of all, a draft of the next ones: as far as the
        # draft is what is chosen, it counts; behind that, it is forgotten.
        for held in range(len(draft) + 1):
            chosen = draws.choose(logits[:, held])
            for row, token in zip(alive, chosen.tolist(), strict=True):
                if not row.done:
                    row.take(token, token in opened.stop_ids)
                    yield row.index, token
            dead = sum(row.done for row in alive)
            if dead == len(alive):
                return
            if held == len(draft) or int(chosen) != draft[held]:
                break
        lookup.learn(len(draft), held)
        rows.forget(len(draft) - held)
        if dead * _LEAVE_SHARE >= len(alive):
            keep = torch.tensor([number for number, row in enumerate(alive) if not row.done])
            alive = [row for row in alive if not row.done]
            chosen = chosen[keep.to(chosen.device)]
            rows.keep(keep)
            draws.keep(keep)
        first = alive[0]
        draft = lookup.draft(first.history, first.left - 1) if len(alive) == 1 and way.drafts else []
        ids = torch.cat([chosen.unsqueeze(1), chosen.new_tensor([draft])], 1) if draft else chosen.unsqueeze(1)


class _Row:
    """One prompt in the batch, and what has been said."""

    def __init__(self, index: int, prompt: list[int], limit: int) -> None:
        self.index = index
        self.history = prompt
        self.left = limit
        self.done = False

    def take(self, token: int, ends: bool) -> None:
        self.history.append(token)
        self.left -= 1
        self.done = ends or self.left == 0
