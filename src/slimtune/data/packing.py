"""Micro-batches out of documents: packs of a fixed number of tokens, or padded batches.

The order is a pure function of (seed, epoch), so a position in the run is one number and a resumed run finds its place
without replaying anything. Position ``p`` is micro-batch ``p % per_epoch`` of epoch ``p // per_epoch``.

Packs are filled longest document first, inside windows of documents that the seed alone decides: each epoch has as many
packs as the last, memory doesn't grow with the data, and a document meets other companions in each epoch. Where a pack
holds many documents they are dealt out, so that each pack has long and short ones; best fit alone would make packs of
one length (:func:`assign_packs`). A micro-batch holds (shapes are fixed for the whole run):

``input_ids``, ``labels``, ``position_ids``: int64 [1, T]. Labels are −100 where not supervised and on the first token
of each document, so nothing is predicted across documents; positions begin at 0 in each document; the rest of the pack
is padding, as documents of its own.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slimtune.config import Config
from slimtune.data.documents import Documents
from slimtune.data.sources import Place

__all__ = ["MicroBatches", "PackedBatches", "PaddedBatches", "assign_packs", "micro_batches"]

IGNORE = -100
"""The label that Transformers' losses leave out."""

_WINDOW = 2**16
_TILE = 64
"""Kernels take rows in tiles of this many."""
_DEAL_ROOM = 4
"""With more, packs are less alike; with less, dealing leaves gaps that best fit can't close: up to 3 % more packs."""


class MicroBatches(ABC):
    """The micro-batches of a run, by position."""

    per_epoch: int
    """Micro-batches in one epoch; the same in each."""

    def __init__(self, documents: Documents, pad_id: int, seed: int) -> None:
        self.documents, self.pad_id, self.seed = documents, pad_id, seed

    @abstractmethod
    def members(self, position: int) -> npt.NDArray[np.int64]:
        """Numbers of the documents in the micro-batch at ``position``, in their order."""

    @abstractmethod
    def batch(self, position: int) -> dict[str, Tensor]:
        """The micro-batch at ``position``; see the module for keys and shapes."""

    def rows(self, position: int) -> list[Place]:
        """Where the rows in the micro-batch at ``position`` stand."""
        return [self.documents.place(int(at)) for at in self.members(position)]

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A data collator: one example, ``{"position": p}``, to its micro-batch."""
        (example,) = examples
        return self.batch(int(example["position"]))

    def dataset(self, positions: int | None = None) -> Any:
        """A ``datasets.Dataset`` of one column, ``position``, for trainers that insist on one.

        Args:
            positions: How many micro-batches the run has in all epochs; one epoch if None.
        """
        import datasets

        return datasets.Dataset.from_dict({"position": np.arange(positions or self.per_epoch)})


class PackedBatches(MicroBatches):
    """Packs of exactly ``tokens`` tokens.

    Args:
        documents: What to pack; none is longer than ``tokens``.
        tokens: T, the tokens of a pack.
        pad_id: What fills the rest of a pack; never supervised.
        seed: The run's seed.
        longest: Most tokens of one document; padding's positions stay under it too.
    """

    def __init__(self, documents: Documents, *, tokens: int, pad_id: int, seed: int, longest: int) -> None:
        super().__init__(documents, pad_id, seed)
        self.tokens, self._longest = tokens, longest
        self._lengths = documents.lengths
        shuffled = np.random.default_rng([seed, 0]).permutation(len(documents))
        self._windows = [shuffled[at : at + _WINDOW] for at in range(0, len(shuffled), _WINDOW)]
        self._counts = np.array([assign_packs(self._lengths[window], tokens)[1] for window in self._windows], np.int64)
        self.per_epoch = int(self._counts.sum())
        self._packs = lru_cache(maxsize=2)(self._make_packs)

    @property
    def fill(self) -> float:
        """Share of the packs' tokens that are not padding."""
        return self.documents.tokens / (self.per_epoch * self.tokens) if self.per_epoch else 0.0

    def _make_packs(self, epoch: int, window: int) -> list[npt.NDArray[np.int64]]:
        """The packs of a window in the order of an epoch, each as document numbers."""
        random = np.random.default_rng([self.seed, 1 + epoch, window])
        members = random.permutation(self._windows[window])
        pack_of, count = assign_packs(self._lengths[members], self.tokens)
        by_pack = np.argsort(pack_of, kind="stable")
        bounds = np.searchsorted(pack_of[by_pack], np.arange(1, count))
        packs = np.split(members[by_pack], bounds)
        return [random.permutation(packs[at]) for at in random.permutation(count)]

    def members(self, position: int) -> npt.NDArray[np.int64]:  # noqa: D102 - the base says it
        epoch, at = divmod(position, self.per_epoch)
        order = np.random.default_rng([self.seed, 1 + epoch]).permutation(len(self._windows))
        ends = np.cumsum(self._counts[order])
        nth = int(np.searchsorted(ends, at, side="right"))
        return self._packs(epoch, int(order[nth]))[at - int(ends[nth - 1] if nth else 0)]

    def batch(self, position: int) -> dict[str, Tensor]:  # noqa: D102 - the base says it
        ids = np.full(self.tokens, self.pad_id, np.int64)
        labels = np.full(self.tokens, IGNORE, np.int64)
        positions = np.empty(self.tokens, np.int64)
        at = 0
        for member in self.members(position):
            tokens, supervised = self.documents[int(member)]
            end = at + tokens.shape[0]
            ids[at:end] = tokens
            labels[at:end] = np.where(supervised, tokens, IGNORE)
            labels[at] = IGNORE
            positions[at:end] = np.arange(tokens.shape[0])
            at = end
        positions[at:] = np.arange(self.tokens - at) % self._longest
        made = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {key: torch.from_numpy(value)[None] for key, value in made.items()}


class PaddedBatches(MicroBatches):
    """Batches of whole documents, padded on the right to the longest of them.

    ``input_ids``, ``labels``, ``attention_mask``: int64 [B, S]; the last batch of an epoch may be smaller.
    """

    def __init__(self, documents: Documents, *, batch_size: int, pad_id: int, seed: int) -> None:
        super().__init__(documents, pad_id, seed)
        self.batch_size = batch_size
        self.per_epoch = -(-len(documents) // batch_size)
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, 1 + epoch]).permutation(len(documents))
        )

    def members(self, position: int) -> npt.NDArray[np.int64]:  # noqa: D102 - the base says it
        epoch, at = divmod(position, self.per_epoch)
        chosen: npt.NDArray[np.int64] = self._order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        return chosen

    def batch(self, position: int) -> dict[str, Tensor]:  # noqa: D102 - the base says it
        documents = [self.documents[int(member)] for member in self.members(position)]
        shape = (len(documents), max(ids.shape[0] for ids, _ in documents))
        made = {
            "input_ids": np.full(shape, self.pad_id, np.int64),
            "labels": np.full(shape, IGNORE, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
        }
        for row, (ids, supervised) in enumerate(documents):
            made["input_ids"][row, : ids.shape[0]] = ids
            made["labels"][row, : ids.shape[0]] = np.where(supervised, ids, IGNORE)
            made["attention_mask"][row, : ids.shape[0]] = 1
        made["labels"][:, 0] = IGNORE
        return {key: torch.from_numpy(value) for key, value in made.items()}


def micro_batches(documents: Documents, config: Config, pad_id: int) -> MicroBatches:
    """The micro-batches that ``config`` asks for: packs of micro_batch × max_length tokens, or padded batches.

    Packs of a file that doesn't fill one have its size: what is padded is computed like any token.
    """
    if config.packing:
        whole = -(-documents.tokens // _TILE) * _TILE
        tokens = min(config.batch_tokens, whole)
        return PackedBatches(documents, tokens=tokens, pad_id=pad_id, seed=config.seed, longest=config.max_length)
    return PaddedBatches(documents, batch_size=config.micro_batch, pad_id=pad_id, seed=config.seed)


def assign_packs(lengths: npt.NDArray[np.int32], capacity: int) -> tuple[npt.NDArray[np.int64], int]:
    """The pack of each document, int64 [documents], and the number of packs.

    Longest first, each document goes into the emptiest pack as long as that has room for four more of its length (the
    rule of longest processing time, Graham 1969); from then on into the fullest pack that it still fits into
    (best-fit decreasing, Johnson 1973; TRL's ``bfd``). The first part mixes lengths, so that each step sees what the
    data is like and attention has as much to do in each; the second fills the packs up. Packs of few documents are
    filled by the second alone. Packs' free room is a bit set in one integer, so finding the fullest that has enough is
    a shift and a lowest-bit test. Documents of one length keep their order.

    Args:
        lengths: Tokens of each document, none over ``capacity``.
        capacity: Tokens of a pack.
    """
    pack_of = np.empty(len(lengths), np.int64)
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    count = -(-int(lengths.sum(dtype=np.int64)) // capacity)  # none of so many can stay empty
    used = [0] * count
    emptiest = [(0, pack) for pack in range(count)]
    dealt = 0
    for document in longest_first:
        length = int(lengths[document])
        tokens, pack = emptiest[0]
        if capacity - tokens < _DEAL_ROOM * length:
            break
        pack_of[document], used[pack] = pack, tokens + length
        heapq.heapreplace(emptiest, (used[pack], pack))
        dealt += 1

    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for pack in reversed(range(count)):
        with_room[capacity - used[pack]].append(pack)
        rooms |= 1 << (capacity - used[pack])
    for document in longest_first[dealt:]:
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack, count = capacity, count, count + 1
        pack_of[document] = pack
        left = room - length
        if left:
            if not with_room[left]:
                rooms |= 1 << left
            with_room[left].append(pack)
    return pack_of, count
