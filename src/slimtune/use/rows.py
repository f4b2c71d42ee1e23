"""One pass of a model after another over the rows of a batch: with what the earlier passes left behind, or without."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from slimtune.use.attention import any_length
from slimtune.use.cache import BatchCache

__all__ = ["AloneRow", "KeptRows", "Rows", "TurningRow", "UncachedRow"]

_WORTH_SHARING = 8
_PADDING = 0.1
"""Most of a group of prompts that may be padding while they are read."""
_CACHE_NAMES = ("past_key_values", "cache_params", "cache")  # "cache": Transformers 5.24, for both


class Rows(ABC):
    """Prompts that a model goes on with, a few tokens at a time."""

    last: Tensor
    """The last token of each prompt, which has not been through the model yet: the first step's, int64 [rows, 1]."""

    @abstractmethod
    def step(self, ids: Tensor) -> Tensor:
        """The logits of what follows each of the next tokens ``ids`` [rows, tokens]: [rows, tokens, vocabulary]."""

    @abstractmethod
    def forget(self, tokens: int) -> None:
        """Take the last tokens back."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, int64 [rows]."""


class KeptRows(Rows):
    """Rows of different lengths in one batch, whose keys, values and states are kept.

    All but the last token of each prompt is read here: prompts of nearly one length together, with padding behind them
    (which no token sees) where layers hold keys alone, and of exactly one length where they hold states. Then all
    stand in one cache, each without a gap before its end.

    Args:
        model: A Transformers model or PEFT's wrapping of one.
        prompts: Token ids, the longest first, none empty.
        room: Most tokens that follow a prompt.
        states: Whether layers hold states; then nothing is padded, shared or taken back.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, prompts: Sequence[list[int]], room: int, *, states: bool) -> None:
        self._forward = _Forward(model)
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
        self._length = width = int(lengths[0])
        self._cache = BatchCache(self._forward.config, width + room)
        self._read([prompt[:-1] for prompt in prompts], states)
        device = self._forward.device
        self._positions = lengths[:, None].to(device)
        self._mask = (torch.arange(width + room) >= width - lengths[:, None]).long().to(device)
        self.last = torch.tensor([prompt[-1:] for prompt in prompts], device=device)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """As said there; the tokens are kept."""
        new = ids.shape[1]
        self._length += new
        positions = self._positions + torch.arange(new, device=ids.device)
        self._positions = self._positions + new
        # Where there is no attention, there is nothing to mask: no padding was read.
        mask = self._mask[:, : self._length] if self._cache.holds_keys else None
        return self._forward(ids, mask, positions, self._cache, new)

    @torch.inference_mode()
    def forget(self, tokens: int) -> None:
        """As said there; never with states."""
        if tokens:
            self._length -= tokens
            self._positions = self._positions - tokens
            self._cache.cut(self._length)

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """As said there."""
        rows = rows.to(self._mask.device)
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.keep(rows)

    @property
    def bytes_of_a_row(self) -> tuple[int, int]:
        """As :meth:`BatchCache.bytes_of_a_row`."""
        return self._cache.bytes_of_a_row()

    def _read(self, prompts: list[list[int]], states: bool) -> None:
        width = len(prompts[0])
        shared = 0 if states else _shared_prefix(prompts)
        if len(prompts[-1]) == width and not shared:
            if width:  # all are of one length: nothing has to be moved afterwards
                self._pass(prompts, 0, self._cache)
            return
        prefix = BatchCache(self._forward.config, shared)
        if shared:
            self._pass([prompts[0][:shared]], 0, prefix)
        for rows in _groups([len(prompt) for prompt in prompts], shared, 0.0 if states else _PADDING):
            group = prompts[rows]
            read = BatchCache(self._forward.config, len(group[0]))
            if shared:
                read.share(prefix, len(group))
            self._pass(group, shared, read)
            self._cache.place(read, rows, len(prompts), [len(prompt) for prompt in group], width)

    def _pass(self, prompts: Sequence[list[int]], start: int, cache: BatchCache) -> None:
        """Read the prompts, the longest first, from ``start`` on; behind a short one its last token is repeated."""
        width = len(prompts[0])
        ids = torch.tensor([(prompt + prompt[-1:] * (width - len(prompt)))[start:] for prompt in prompts])
        positions = torch.arange(start, width).expand(len(prompts), -1)
        mask = torch.ones(len(prompts), width, dtype=torch.int64) if cache.holds_keys else None
        device = self._forward.device
        self._forward(ids.to(device), None if mask is None else mask.to(device), positions.to(device), cache, 1)


class TurningRow(Rows):
    """One prompt of a model that turns all tokens otherwise once they are many: then it is read anew.

    Args:
        model: A Transformers model or PEFT's wrapping of one.
        prompt: Token ids.
        room: Most tokens that follow it.
        turns: Tokens up to which nothing changes (:func:`slimtune.families.rotation.turns_anew`).
        states: Whether layers hold states.
    """

    def __init__(self, model: Any, prompt: list[int], room: int, turns: int, *, states: bool) -> None:
        self._model, self._turns, self._states = model, turns, states
        self._ids, self._most = prompt[:-1], len(prompt) + room
        self._kept: KeptRows | None = None
        self.last = torch.tensor([prompt[-1:]], device=model.get_input_embeddings().weight.device)

    def step(self, ids: Tensor) -> Tensor:
        """As said there, one token at a time."""
        self._ids = [*self._ids, int(ids)]
        if len(self._ids) == self._turns + 1:  # what was kept was turned as in a short text
            self._kept = None
            return UncachedRow(self._model, self._ids).step(ids)
        if self._kept is None:
            self._kept = KeptRows(self._model, [self._ids], self._most - len(self._ids) + 1, states=self._states)
        return self._kept.step(ids)

    def forget(self, tokens: int) -> None:
        """Never: it is asked one token at a time."""
        assert tokens == 0

    def keep(self, rows: Tensor) -> None:
        """There is one row."""


class AloneRow(Rows):
    """One prompt, with the cache that Transformers makes for its model.

    Args:
        model: A Transformers model or PEFT's wrapping of one.
        prompt: Token ids.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, prompt: list[int]) -> None:
        self._forward = _Forward(model)
        self._cache = DynamicCache(config=self._forward.config)
        self._length = 0
        self.last = torch.tensor([prompt[-1:]], device=self._forward.device)
        if len(prompt) > 1:
            self.step(torch.tensor([prompt[:-1]], device=self._forward.device))

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """As said there."""
        positions = torch.arange(self._length, self._length + ids.shape[1], device=ids.device)[None]
        self._length += ids.shape[1]
        return self._forward(ids, None, positions, self._cache, ids.shape[1])

    def forget(self, tokens: int) -> None:
        """Never: what the cache is, isn't known."""
        assert tokens == 0

    def keep(self, rows: Tensor) -> None:
        """There is one row."""


class UncachedRow(Rows):
    """One prompt, computed from its first token at every step: slow, and right for any model.

    Args:
        model: A Transformers model or PEFT's wrapping of one.
        prompt: Token ids.
    """

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self._forward = _Forward(model)
        self._ids = torch.tensor([prompt[:-1]], dtype=torch.int64, device=self._forward.device)
        self.last = torch.tensor([prompt[-1:]], device=self._forward.device)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """As said there."""
        self._ids = torch.cat([self._ids, ids], dim=1)
        return self._forward.alone(self._ids, ids.shape[1])

    def forget(self, tokens: int) -> None:
        """As said there."""
        self._ids = self._ids[:, : self._ids.shape[1] - tokens]

    def keep(self, rows: Tensor) -> None:
        """There is one row."""


class _Forward:
    """A model's ``forward``, called with the arguments that it has: not all take positions, say."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.get_input_embeddings().weight.device
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        # The class's: an instance's may be shadowed by one that hands everything on.
        self._takes = inspect.signature(type(bare).forward).parameters

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache, keep: int) -> Tensor:
        """The logits of what follows each of the last ``keep`` tokens, [rows, keep, vocabulary]; fills the cache."""
        name = next(name for name in _CACHE_NAMES if name in self._takes)
        return self._call(ids, keep, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache})

    def alone(self, ids: Tensor, keep: int) -> Tensor:
        """The same without a cache; ``ids`` are whole rows of one length."""
        return self._call(ids, keep, use_cache=False)

    def _call(self, ids: Tensor, keep: int, **arguments: Any) -> Tensor:
        arguments["logits_to_keep"] = keep
        # use_cache may be one of a composite model's keyword arguments, which it hands on.
        taken = {name: value for name, value in arguments.items() if name in self._takes or name == "use_cache"}
        with any_length():
            logits: Tensor = self.model(input_ids=ids, **taken).logits
        return logits[:, -keep:]


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with (a system text, mostly): computed once, not for every row."""
    if len(prompts) < 2:
        return 0
    most = len(prompts[-1]) - 1
    first, last = min(prompts), max(prompts)
    shared = next((at for at in range(most) if first[at] != last[at]), most)
    return shared if shared >= _WORTH_SHARING else 0


def _groups(lengths: Sequence[int], shared: int, padding: float) -> Iterator[slice]:
    """Rows that are read together, of the longest first; rows without tokens are in none."""
    start = 0
    while start < len(lengths) and lengths[start]:
        least = shared + (1 - padding) * (lengths[start] - shared)
        end = start + 1
        while end < len(lengths) and lengths[end] >= max(1, least):
            end += 1
        yield slice(start, end)
        start = end
