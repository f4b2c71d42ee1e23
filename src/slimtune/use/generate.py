"""Answer many prompts fast: batched by length, with room in the cache, and rows that leave when they are done.

What it gains over ``model.generate`` in file order, on a CPU and on a GPU alike: prompts of one length are read
together, so little is padded; batches are as large as memory allows, so each pass over the weights makes more tokens;
what all prompts of a batch begin with, a system text mostly, is computed once; keys and values are written into room
that was set aside, where Transformers' dynamic cache copies all of them for every token; rows that ended leave the
batch instead of being computed until the longest one ends; and what the last row repeats is guessed, and checked
several tokens at a time (:mod:`slimtune.use.lookup`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from slimtune.errors import UserError
from slimtune.hardware import detect
from slimtune.use.attention import any_length
from slimtune.use.load import Opened
from slimtune.use.lookup import Lookup
from slimtune.use.sampling import Draws, Sampling

__all__ = ["Reply", "generate"]

_MOST_ROWS = {"cpu": 64, "cuda": 256}
_CACHE_SHARE = 0.2
# Rows leave when this fraction of the batch has ended: leaving copies the cache of those that stay.
_LEAVE_SHARE = 8
_WORTH_SHARING = 8
_PADDING = 0.1
"""Most of a group of prompts that may be padding while they are read."""


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

    Greedy replies are those of ``model.generate`` on each prompt alone. Drawn ones depend on the seed and the prompt's
    number, not on what else is in its batch.

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
        length = len(prompts[waiting[0]]) + sampling.max_new_tokens
        rows = most_rows or max(1, min(_MOST_ROWS[opened.device.type], _rows_that_fit(opened, length)))
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


@torch.inference_mode()
def _batch(
    opened: Opened, prompts: Sequence[list[int]], numbers: Sequence[int], batch: list[int], sampling: Sampling
) -> Iterator[Reply]:
    device, model = opened.device, opened.model
    limits = [min(sampling.max_new_tokens, opened.context - len(prompts[index])) for index in batch]
    shared = _shared_prefix([prompts[index] for index in batch])
    ids, mask = _padded([prompts[index] for index in batch], shared, opened.pad_id, max(limits))
    ids, mask = ids.to(device), mask.to(device)
    width = ids.shape[1]
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    layers = [_RoomyLayer(mask.shape[1]) for _ in range(_layers(model))]
    logits = _read(model, ids, mask, positions, layers, shared)
    cache = Cache(layers=list(layers))
    stops = torch.tensor(opened.stop_ids, device=device)
    draws = Draws(sampling, [numbers[index] for index in batch])
    rows = _Rows(opened, batch, limits)
    positions, length = positions[:, -1:], width
    lookup, draft = Lookup(), list[int]()
    while True:
        # The logits follow each row's last token and, in the last row of all, a draft of the next ones: as far as the
        # draft is what is chosen, it counts; behind that, it is forgotten.
        for held in range(len(draft) + 1):
            ids = draws.choose(logits[:, held]).unsqueeze(1)
            yield from rows.take(ids[:, 0], torch.isin(ids[:, 0], stops))
            if not rows.alive:
                return
            if held == len(draft) or int(ids) != draft[held]:
                break
        lookup.learn(len(draft), held)
        positions = positions + held + 1
        length -= len(draft) - held
        for layer in layers:
            layer.cut(length)
        if rows.dead * _LEAVE_SHARE >= len(rows.index):
            keep = rows.leave().to(device)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            for layer in layers:
                layer.batch_select_indices(keep)
            draws.keep(keep)
        draft = lookup.draft(prompts[rows.index[0]] + rows.said[0], rows.left - 1) if len(rows.index) == 1 else []
        ids = torch.cat([ids, torch.tensor([draft], dtype=ids.dtype, device=device)], dim=1) if draft else ids
        length += ids.shape[1]
        steps = torch.arange(ids.shape[1], device=device)
        logits = _forward(model, ids, mask[:, :length], positions + steps, cache, ids.shape[1])


def _read(
    model: Any, ids: Tensor, mask: Tensor, positions: Tensor, layers: Sequence[_RoomyLayer], shared: int
) -> Tensor:
    """Fill the layers with the prompts' keys and values; the logits of what follows each prompt, [rows, 1, vocabulary].

    The prompts, longest first, are read in groups of nearly one length.
    """
    width = ids.shape[1]
    prefix = [_RoomyLayer(shared) for _ in layers]
    if shared:
        _forward(model, ids[:1, :shared], mask[:1, :shared], positions[:1, :shared], Cache(layers=list(prefix)))
    padding = (mask[:, shared:width] == 0).sum(1).tolist()
    logits = []
    start = 0
    while start < len(padding):
        read = width - shared - padding[start]
        end = start + 1
        while end < len(padding) and width - shared - padding[end] >= (1 - _PADDING) * read:
            end += 1
        rows, first = slice(start, end), width - read
        group = [_RoomyLayer(shared + read) for _ in layers]
        for layer, common in zip(group, prefix, strict=True):
            if shared:
                layer.update(*(x.expand(end - start, -1, -1, -1) for x in common.pair))
        seen = torch.cat([mask[rows, :shared], mask[rows, first:width]], dim=1)
        cache = Cache(layers=list(group))
        logits.append(_forward(model, ids[rows, first:], seen, positions[rows, first:], cache))
        for layer, read_layer in zip(layers, group, strict=True):
            layer.place(read_layer, rows, len(padding), shared, width)
        start = end
    return torch.cat(logits)


def _forward(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, keep: int = 1) -> Tensor:
    """The logits of what follows each of the last ``keep`` tokens, [rows, keep, vocabulary]; fills the cache."""
    with any_length():
        made: Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=keep,
        ).logits  # fmt: skip
    return made


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with (a system text, mostly): computed once, not for every row."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    first, last = min(prompts), max(prompts)
    shared = next((at for at in range(most) if first[at] != last[at]), most)
    return shared if shared >= _WORTH_SHARING else 0


def _padded(prompts: Sequence[list[int]], shared: int, pad: int, room: int) -> tuple[Tensor, Tensor]:
    """Ids [rows, width] and mask [rows, width + room], int64: the shared tokens, padding, and the rest of each prompt.

    Padding stands before what differs, so that every prompt ends where the replies begin.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width + room, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = width - (len(prompt) - shared)
        ids[row, :shared] = torch.tensor(prompt[:shared], dtype=torch.int64)
        ids[row, start:] = torch.tensor(prompt[shared:])
        mask[row, :shared] = 1
        mask[row, start:] = 1
    return ids, mask


class _Rows:
    """Which row of the batch is which prompt, what it has said, and whether it goes on."""

    def __init__(self, opened: Opened, batch: Sequence[int], limits: Sequence[int]) -> None:
        self.opened = opened
        self.index = list(batch)
        self.limits = list(limits)
        self.said: list[list[int]] = [[] for _ in batch]
        self.done = [False] * len(batch)

    @property
    def dead(self) -> int:
        """Rows that are computed for nothing."""
        return sum(self.done)

    @property
    def left(self) -> int:
        """Tokens that the first row may still say."""
        return self.limits[0] - len(self.said[0])

    @property
    def alive(self) -> int:
        """Rows that go on."""
        return len(self.done) - self.dead

    def take(self, tokens: Tensor, stopped: Tensor) -> Iterator[Reply]:
        """Add a token to each row; rows that end here come out as replies."""
        for row, (token, stop) in enumerate(zip(tokens.tolist(), stopped.tolist(), strict=True)):
            if self.done[row]:
                continue
            if not stop:
                self.said[row].append(token)
            if stop or len(self.said[row]) == self.limits[row]:
                self.done[row] = True
                text = self.opened.tokenizer.decode(
                    self.said[row], skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                yield Reply(self.index[row], self.said[row], str(text), bool(stop))

    def leave(self) -> Tensor:
        """Drop the rows that are done; the numbers of those that stay, int64 [rows]."""
        keep = [row for row, done in enumerate(self.done) if not done]
        self.index = [self.index[row] for row in keep]
        self.limits = [self.limits[row] for row in keep]
        self.said = [self.said[row] for row in keep]
        self.done = [False] * len(keep)
        return torch.tensor(keep)


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in room for the longest reply: a new token is written, nothing is copied.

    ``keys`` and ``values`` are views [rows, heads, tokens so far, head size] of the room.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind those that are there; give back all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, size = key_states.shape
            self._keys = key_states.new_empty(rows, heads, self.room, size)
            self._values = value_states.new_empty(rows, heads, self.room, value_states.shape[-1])
        end = self.length + key_states.shape[-2]
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self._grow(end)
        return self.pair

    def place(self, read: _RoomyLayer, rows: slice, of: int, shared: int, width: int) -> None:
        """Take over what ``read`` holds of some of ``of`` rows: ``shared`` tokens in front, the rest before ``width``.

        What lies between is padding: zeros, as NaN would pass through a mask.
        """
        if not self.is_initialized:
            self.lazy_initialization(*read.pair)
            self._keys, self._values = (x.new_zeros(of, x.shape[1], self.room, x.shape[3]) for x in read.pair)
            self._grow(width)
        for mine, theirs in zip((self._keys, self._values), read.pair, strict=True):
            mine[rows, :, :shared] = theirs[:, :, :shared]
            mine[rows, :, width - (read.length - shared) : width] = theirs[:, :, shared:]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far, [rows, heads, tokens, head size]; there must be some."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    def _grow(self, length: int) -> None:
        self.length = length
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def cut(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        if length < self.length:
            self._grow(length)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; what is behind the tokens so far isn't copied."""
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(len(indices), *old.shape[1:])
            new[:, :, : self.length] = old[indices, :, : self.length]
            setattr(self, name, new)
        self._grow(self.length)


def _layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _rows_that_fit(opened: Opened, length: int) -> int:
    """Rows of ``length`` tokens whose keys and values take a fifth of the memory."""
    config = opened.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * _layers(opened.model) * heads * size * length * opened.model.dtype.itemsize
    return int(detect().memory_bytes * _CACHE_SHARE / row)
