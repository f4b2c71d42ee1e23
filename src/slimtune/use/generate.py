"""Answer many prompts fast: batched by length, with room in the cache, and rows that leave when they are done.

What it gains over ``model.generate`` in file order, on a CPU and on a GPU alike: prompts of one length are read
together, so little is padded; batches are as large as memory allows, so each pass over the weights makes more tokens;
what all prompts of a batch begin with, a system text mostly, is computed once; keys and values are written into room
that was set aside, where Transformers' dynamic cache copies all of them for every token; rows that ended leave the
batch instead of being computed until the longest one ends; and what the last row repeats is guessed, and checked
several tokens at a time (:mod:`slimtune.use.lookup`). Which of these a model allows: :mod:`slimtune.use.way`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from slimtune.errors import UserError
from slimtune.hardware import detect
from slimtune.use.decode import decode
from slimtune.use.load import Opened
from slimtune.use.sampling import Draws, Sampling
from slimtune.use.way import way_of

__all__ = ["Reply", "generate"]

_MOST_ROWS = {"cpu": 64, "cuda": 256}
_CACHE_SHARE = 0.2


@dataclass(frozen=True)
class Reply:
    """The answer to one prompt."""

    index: int
    """Which prompt it answers."""
    ids: list[int]
    """Its tokens, without the one that ended it."""
    text: str
    stopped: bool
    """Whether it ended by itself, not at max_new_tokens or the context's end."""


def generate(
    opened: Opened,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    numbers: Sequence[int] | None = None,
    most_rows: int | None = None,
) -> Iterator[Reply]:
    """Answer ``prompts``; each reply is given out as soon as it is done.

    Greedy replies are those of the model on each prompt alone, without a cache. Drawn ones depend on the seed and the
    prompt's number, not on what else is in its batch.

    Args:
        opened: The model.
        prompts: Token ids.
        sampling: How tokens are chosen.
        numbers: A number for each prompt that its draws follow from; its index unless given.
        most_rows: Most prompts in a batch; as many as memory allows, up to 64 on a CPU and 256 on a GPU, unless given.

    Raises:
        UserError: A prompt is longer than the model's context, or one alone doesn't fit the memory.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) >= opened.context:
            raise UserError(
                f"prompt {index + 1} has {len(prompt)} tokens",
                rule=f"{opened.found.name} takes {opened.context}, reply included.",
            )
    # The longest first: if anything is too much for the memory, it is said at once.
    numbers = range(len(prompts)) if numbers is None else numbers
    waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    while waiting:
        length = min(len(prompts[waiting[0]]) + sampling.max_new_tokens, opened.context)
        fit = max(1, min(_MOST_ROWS[opened.device.type], _rows_that_fit(opened, length)))
        rows = way_of(opened, length).rows or most_rows or fit
        batch, waiting = waiting[:rows], waiting[rows:]
        yield from _with_fewer_rows(opened, prompts, numbers, batch, sampling)


def _with_fewer_rows(
    opened: Opened, prompts: Sequence[list[int]], numbers: Sequence[int], batch: list[int], sampling: Sampling
) -> Iterator[Reply]:
    """The batch; in halves, if the GPU's memory turns out to be too small."""
    left = set(batch)
    try:
        for reply in _batch(opened, prompts, numbers, batch, sampling):
            left.discard(reply.index)
            yield reply
        return
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        rest = [index for index in batch if index in left]
        if len(batch) == 1:
            raise UserError(
                f"prompt {rest[0] + 1} ({len(prompts[rest[0]])} tokens) does not fit this GPU's memory",
                way_out="Give a smaller --max-new-tokens, or leave the prompt out.",
            ) from None
    half = max(1, len(batch) // 2)
    for start in range(0, len(rest), half):
        yield from _with_fewer_rows(opened, prompts, numbers, rest[start : start + half], sampling)


def _batch(
    opened: Opened, prompts: Sequence[list[int]], numbers: Sequence[int], batch: list[int], sampling: Sampling
) -> Iterator[Reply]:
    limits = [min(sampling.max_new_tokens, opened.context - len(prompts[index])) for index in batch]
    draws = Draws(sampling, [numbers[index] for index in batch])
    said: list[list[int]] = [[] for _ in batch]
    for row, token in decode(opened, [prompts[index] for index in batch], limits, draws):
        stopped = token in opened.stop_ids
        if not stopped:
            said[row].append(token)
        if stopped or len(said[row]) == limits[row]:
            text = opened.tokenizer.decode(said[row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            yield Reply(batch[row], said[row], str(text), stopped)


def _rows_that_fit(opened: Opened, length: int) -> int:
    """Rows of ``length`` tokens that together take a fifth of the memory."""
    way = way_of(opened)
    return int(detect().memory_bytes * _CACHE_SHARE / max(1, way.state_bytes + length * way.token_bytes))
