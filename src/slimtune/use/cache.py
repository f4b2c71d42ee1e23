"""What the tokens of a batch leave behind for the next ones: keys and values, and the states of recurrent layers.

Transformers' own layers serve one prompt, or prompts of one length, or prompts that were padded while they were read.
These here take prompts that were read apart and put them into one batch, each row's tokens without a gap and all rows
ending at one place: what stands before a row's first token was never computed. So a sliding window counts real tokens
only, and a state has seen nothing but its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

__all__ = ["BatchCache", "Holds", "what_it_holds"]

_BOTH = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_STATE = ("conv_states", "recurrent_states")
# What else a state's layer keeps, the same for all rows.
_FLAGS = (
    "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size", "dtype",
    "device",
)  # fmt: skip


class Holds(Enum):
    """What a model's layers keep of the tokens so far."""

    KEYS = "keys and values of each token"
    """They can be shared, cut off and padded."""
    STATES = "states that each token changes"
    """In some layers at least; they can be put side by side and no more."""
    OTHER = "something else"


def what_it_holds(config: PretrainedConfig) -> Holds:
    """What the layers of a model keep, by the cache that Transformers makes for its config."""
    try:
        kinds = {type(layer) for layer in _transformers_layers(config)}
    except (AttributeError, KeyError, TypeError, ValueError):  # not made for it: BLT is three models in one
        return Holds.OTHER
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, *_BOTH, *filter(_is_empty, kinds)}:
        return Holds.OTHER
    return Holds.STATES if any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in kinds) else Holds.KEYS


def _transformers_layers(config: PretrainedConfig) -> list[Any]:
    return list(DynamicCache(config=config).layers)


def _is_empty(kind: type) -> bool:
    """Whether layers of this kind keep nothing: they have no attention, or use another layer's keys."""
    return not issubclass(kind, (CacheLayerMixin, LinearAttentionCacheLayerMixin))


class BatchCache(Cache):
    """A cache with room for a batch's longest row.

    Args:
        config: The text model's; :func:`what_it_holds` must know it.
        room: Most tokens of a row.
    """

    def __init__(self, config: PretrainedConfig, room: int) -> None:
        self._all: list[Any] = [_layer(layer, room) for layer in _transformers_layers(config)]
        super().__init__(layers=self._all)

    @property
    def holds_keys(self) -> bool:
        """Whether any layer has attention."""
        return any(isinstance(layer, _Room) for layer in self._all)

    def place(self, read: BatchCache, rows: slice, of: int, lengths: Sequence[int], width: int) -> None:
        """Take over rows that were read apart, each row's tokens so that they end before ``width``.

        Args:
            read: Their cache; what stands behind a row's own tokens is left there.
            rows: Which of this cache's rows they become.
            of: How many rows this cache has.
            lengths: Tokens of each.
            width: Tokens of the longest row of all.
        """
        longest = max(lengths)
        at = None
        if min(lengths) < longest:
            # Which token of the row stands at each of the last places.
            at = (torch.arange(longest) - longest + torch.tensor(lengths)[:, None]).clamp(min=0)
        for mine, theirs in zip(self._all, read._all, strict=True):
            if isinstance(mine, _Room):
                mine.place_keys(theirs, rows, of, at, width)
            if isinstance(mine, LinearAttentionCacheLayerMixin):
                _place_states(mine, theirs, rows, of)

    def share(self, common: BatchCache, rows: int) -> None:
        """Let ``rows`` rows begin with what the one row of ``common`` holds."""
        for mine, theirs in zip(self._all, common._all, strict=True):
            if isinstance(mine, _Room) and theirs.is_initialized:
                mine.update(*(x.expand(rows, -1, -1, -1) for x in theirs.pair))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for layer in self._all:
            if isinstance(layer, _Room):
                layer.keep_keys(rows)
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                # What Transformers calls reordering takes any rows.
                LinearAttentionLayer.reorder_cache(layer, cast(torch.LongTensor, rows))

    def cut(self, length: int) -> None:
        """Forget all tokens from ``length`` on. States can't."""
        for layer in self._all:
            if isinstance(layer, _Room):
                layer.grow(min(length, layer.length))

    def bytes_of_a_row(self) -> tuple[int, int]:
        """Bytes of a row's states, and of each token that it has room for; at least one pass must have been made."""
        keys = [layer for layer in self._all if isinstance(layer, _Room) and layer.is_initialized]
        states = [layer for layer in self._all if isinstance(layer, LinearAttentionCacheLayerMixin)]
        held = [state for layer in states for name in _STATE for state in getattr(layer, name).values()]
        token = sum(x[:1, :, :1].nbytes for layer in keys for x in layer.whole)
        return sum(state[:1].nbytes for state in held if state is not None), token


class _Room(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values in room for the longest reply: a new token is written, nothing is copied.

    ``keys`` and ``values`` are views [rows, heads, tokens so far, head size] of the room.
    """

    whole: tuple[Tensor, Tensor]
    """The room for keys, and for values, [rows, heads, room, head size]; from the first token on."""

    def __init__(self, room: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.room = room
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind those that are there; give back all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._make((key_states, value_states), key_states.shape[0], Tensor.new_empty)
        end = self.length + key_states.shape[-2]
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, self.length : end] = new
        self.grow(end)
        return self.pair

    def place_keys(self, read: Any, rows: slice, of: int, at: Tensor | None, width: int) -> None:
        """As :meth:`BatchCache.place`; ``at`` says which tokens are taken, int64 [rows, tokens], None: all.

        What lies before a row's first token is padding: zeros, as NaN would pass through a mask.
        """
        if not read.is_initialized:  # it uses another layer's keys
            return
        if not self.is_initialized:
            self.lazy_initialization(*read.pair)
            self._make(read.pair, of, Tensor.new_zeros)
            self.grow(width)
        for mine, theirs in zip(self.whole, read.pair, strict=True):
            taken = theirs
            if at is not None:
                taken = theirs[torch.arange(len(at))[:, None], :, at].transpose(1, 2)
            mine[rows, :, width - taken.shape[2] : width] = taken

    def keep_keys(self, rows: Tensor) -> None:
        """Keep some rows; what is behind the tokens so far isn't copied."""
        if not self.is_initialized:
            return
        old = self.whole
        self._make(old, len(rows), Tensor.new_empty)
        for mine, theirs in zip(self.whole, old, strict=True):
            mine[:, :, : self.length] = theirs[rows, :, : self.length]
        self.grow(self.length)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far, [rows, heads, tokens, head size]; there must be some."""
        keys, values = (x[:, :, : self.length] for x in self.whole)
        return keys, values

    def grow(self, length: int) -> None:
        """Have ``length`` tokens."""
        self.length = length
        if self.is_initialized:
            self.keys, self.values = self.pair

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def _make(self, like: Sequence[Tensor], rows: int, new: Callable[..., Tensor]) -> None:
        keys, values = (new(x, (rows, x.shape[1], self.room, x.shape[3])) for x in like)
        self.whole = keys, values


class _Keys(_Room, DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer with attention, whatever its window: the mask sees to that."""


class _KeysAndStates(_Room, LinearAttentionAndFullAttentionLayer):  # type: ignore[no-untyped-call, override, misc]
    """A layer with attention and a state beside it."""

    def __init__(self, room: int, number_of_states: int) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.room = room
        self.length = 0


def _layer(theirs: Any, room: int) -> Any:
    """Ours in the place of Transformers'."""
    if isinstance(theirs, _BOTH):
        return _KeysAndStates(room, theirs.number_of_states)
    return _Keys(room) if isinstance(theirs, DynamicLayer) else theirs


def _place_states(mine: Any, theirs: Any, rows: slice, of: int) -> None:
    for name in _STATE:
        states = getattr(mine, name)
        for number, state in getattr(theirs, name).items():
            if state is None:
                continue
            if states[number] is None:
                states[number] = state.new_zeros(of, *state.shape[1:])
            states[number][rows] = state
    for name in _FLAGS:
        setattr(mine, name, getattr(theirs, name))
