"""Micro-batches out of documents: packs of a fixed number of tokens, or rows that are padded.

The order is a pure function of (seed, epoch), so a position in the run is one number and a resumed run finds its place
without replaying anything. Position ``p`` is micro-batch ``p % per_epoch`` of epoch ``p // per_epoch``.

Packs are filled longest document first, inside windows of documents that the seed alone decides: each epoch has as many
packs as the last, memory doesn't grow with the data, and a document meets other companions in each epoch. Where a pack
holds many documents they are dealt out, so that each pack has long and short ones; best fit alone would make packs of
one length (:func:`assign_packs`). Shapes are fixed for the whole run, labels are −100 where not supervised and on the
first token of each document, so nothing is predicted across documents; positions begin at 0 in each document; the rest
of the pack is padding, as documents of its own.

A model that can't keep the documents of a pack apart gets the same documents as rows: as many of about one length as
hold a pack's tokens, padding included (:class:`GroupedBatches`).
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from slimtune.batch import IGNORED, MicroBatch
from slimtune.config import Config
from slimtune.data.documents import Documents
from slimtune.data.sources import Place

__all__ = [
    "FilledBatches",
    "GroupedBatches",
    "MicroBatches",
    "PackedBatches",
    "PaddedBatches",
    "assign_packs",
    "assign_rows",
    "batch_facts",
    "held_out_batches",
    "micro_batches",
]

_WINDOW = 2**16
_TILE = 64
"""Kernels take rows in tiles of this many."""
_UNITS = 32
"""Held-out data goes through the model in about so many parts: how their losses differ says how sure the mean is."""
_DEAL_ROOM = 4
"""With more, packs are less alike; with less, dealing leaves gaps that best fit can't close: up to 3 % more packs."""


class MicroBatches(ABC):
    """The micro-batches of a run, by position."""

    per_epoch: int
    """Micro-batches in one epoch; the same in each."""

    def __init__(self, documents: Documents, seed: int) -> None:
        self.documents, self.seed = documents, seed

    @property
    def per_round(self) -> float:
        """Micro-batches to one pass over the data's rows, of which an epoch has several where it rehearses."""
        return self.per_epoch / self.documents.rounds

    @abstractmethod
    def members(self, position: int) -> npt.NDArray[np.int64]:
        """Numbers of the documents in the micro-batch at ``position``, in their order."""

    @abstractmethod
    def micro_batch(self, position: int) -> MicroBatch:
        """The micro-batch at ``position``."""

    def batch(self, position: int) -> dict[str, Any]:
        """The micro-batch at ``position`` as a trainer hands it through (:meth:`slimtune.batch.MicroBatch.inputs`)."""
        return self.micro_batch(position).inputs()

    def _documents(self, position: int) -> MicroBatch:
        """The documents at ``position``, as rows."""
        documents = [self.documents[int(member)] for member in self.members(position)]
        lengths = tuple(tokens.shape[0] for tokens, _ in documents)
        ids = np.concatenate([tokens for tokens, _ in documents]).astype(np.int64)
        labels = np.where(np.concatenate([supervised for _, supervised in documents]), ids, IGNORED)
        labels[np.cumsum(lengths) - lengths] = IGNORED
        return MicroBatch(ids, labels, lengths, padded=True, weights=self._weights_of(self.members(position)))

    def _weights_of(self, members: npt.NDArray[np.int64]) -> tuple[float, ...] | None:
        weights = self.documents.weights
        return None if weights is None else tuple(weights[members].tolist())

    def rows(self, position: int) -> list[Place]:
        """Where the rows in the micro-batch at ``position`` stand."""
        return [self.documents.place(int(at)) for at in self.members(position)]

    def sizes(self, first: int, end: int) -> tuple[list[int], int]:
        """(tokens of each document, tokens that are supervised) in the micro-batches from ``first`` to before ``end``.
        Asked for at every step, while the device waits."""
        members = np.concatenate([np.empty(0, np.int64), *map(self.members, range(first, end))])
        return self._lengths[members].tolist(), int(self._targets[members].sum())

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int32]:
        return self.documents.lengths

    @cached_property
    def _targets(self) -> npt.NDArray[np.int32]:
        return self.documents.targets

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A data collator: one example, ``{"position": p}``, to its micro-batch."""
        (example,) = examples
        return self.batch(int(example["position"]))

    def dataset(self, positions: int | npt.NDArray[np.int64] | None = None) -> Any:
        """A ``datasets.Dataset`` of one column, ``position``, for trainers that insist on one.

        Args:
            positions: How many micro-batches the run has in all epochs, or which of them; one epoch if None.
        """
        import datasets

        if positions is None:
            positions = self.per_epoch
        return datasets.Dataset.from_dict(
            {"position": np.arange(positions) if isinstance(positions, int) else positions}
        )


class FilledBatches(MicroBatches):
    """As many whole documents in each micro-batch as ``tokens`` tokens hold.

    Args:
        documents: What to fill in; none is longer than ``tokens``.
        tokens: T, the tokens of a micro-batch.
        seed: The run's seed.
    """

    def __init__(self, documents: Documents, *, tokens: int, seed: int) -> None:
        super().__init__(documents, seed)
        self.tokens = tokens
        shuffled = np.random.default_rng([seed, 0]).permutation(len(documents))
        self._windows = [shuffled[at : at + _WINDOW] for at in range(0, len(shuffled), _WINDOW)]
        self._counts = np.array([self.assign(self._lengths[window], tokens)[1] for window in self._windows], np.int64)
        self.per_epoch = int(self._counts.sum())
        self._fillings, self._orders = lru_cache(maxsize=2)(self._fill), lru_cache(maxsize=2)(self._order)

    @staticmethod
    @abstractmethod
    def assign(lengths: npt.NDArray[np.int32], tokens: int) -> tuple[npt.NDArray[np.int64], int]:
        """The micro-batch of each document, and how many there are; that depends on the lengths alone."""

    @property
    @abstractmethod
    def fill(self) -> float:
        """Share of the tokens that a model computes that are not padding."""

    def _fill(self, epoch: int, window: int) -> list[npt.NDArray[np.int64]]:
        """The micro-batches of a window in the order of an epoch, each as document numbers."""
        random = np.random.default_rng([self.seed, 1 + epoch, window])
        members = random.permutation(self._windows[window])
        batch_of, count = self.assign(self._lengths[members], self.tokens)
        by_batch = np.argsort(batch_of, kind="stable")
        bounds = np.searchsorted(batch_of[by_batch], np.arange(1, count))
        batches = np.split(members[by_batch], bounds)
        return [random.permutation(batches[at]) for at in random.permutation(count)]

    def _order(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The windows in the order of an epoch, and where each ends in it."""
        order = np.random.default_rng([self.seed, 1 + epoch]).permutation(len(self._windows))
        return order, np.cumsum(self._counts[order])

    def members(self, position: int) -> npt.NDArray[np.int64]:  # noqa: D102 - the base says it
        epoch, at = divmod(position, self.per_epoch)
        order, ends = self._orders(epoch)
        nth = int(np.searchsorted(ends, at, side="right"))
        return self._fillings(epoch, int(order[nth]))[at - int(ends[nth - 1] if nth else 0)]


class PackedBatches(FilledBatches):
    """Packs of exactly ``tokens`` tokens.

    Args:
        documents: As :class:`FilledBatches` takes them, and its other arguments.
        longest: Most tokens of one document; padding's positions stay under it too.
        rest: As :class:`FilledBatches`.
    """

    def __init__(self, documents: Documents, *, longest: int, **rest: Any) -> None:
        super().__init__(documents, **rest)
        self._longest = longest

    @staticmethod
    def assign(lengths: npt.NDArray[np.int32], tokens: int) -> tuple[npt.NDArray[np.int64], int]:  # noqa: D102
        return assign_packs(lengths, tokens)

    @property
    def fill(self) -> float:  # noqa: D102 - the base says it
        return self.documents.tokens / (self.per_epoch * self.tokens) if self.per_epoch else 0.0

    def micro_batch(self, position: int) -> MicroBatch:  # noqa: D102 - the base says it
        filled = self._documents(position)
        missing = self.tokens - filled.tokens
        padding = [min(self._longest, missing - at) for at in range(0, missing, self._longest)]
        return MicroBatch(
            np.pad(filled.input_ids, (0, missing), constant_values=filled.filler),
            np.pad(filled.labels, (0, missing), constant_values=IGNORED),
            (*filled.lengths, *padding),
            weights=filled.weights and (*filled.weights, *[1.0] * len(padding)),
        )


class GroupedBatches(FilledBatches):
    """Rows of about one length, as many as take ``tokens`` tokens or fewer, padding included.

    A micro-batch has as many tokens to learn from as a pack has, but for the padding; its documents are of one length,
    and the micro-batches of an epoch come in a shuffled order.
    """

    @staticmethod
    def assign(lengths: npt.NDArray[np.int32], tokens: int) -> tuple[npt.NDArray[np.int64], int]:  # noqa: D102
        return assign_rows(lengths, tokens)

    @property
    def fill(self) -> float:  # noqa: D102 - the base says it
        computed = 0
        for window in self._windows:
            rows_of, count = assign_rows(self._lengths[window], self.tokens)
            longest = np.zeros(count, np.int64)
            np.maximum.at(longest, rows_of, self._lengths[window])
            computed += int((longest * np.bincount(rows_of, minlength=count)).sum())
        return self.documents.tokens / computed if computed else 0.0

    def micro_batch(self, position: int) -> MicroBatch:  # noqa: D102 - the base says it
        return self._documents(position)


class PaddedBatches(MicroBatches):
    """Batches of ``batch_size`` whole documents, padded on the right to the longest of them.

    The last batch of an epoch may be smaller.
    """

    def __init__(self, documents: Documents, *, batch_size: int, seed: int) -> None:
        super().__init__(documents, seed)
        self.batch_size = batch_size
        self.per_epoch = -(-len(documents) // batch_size)
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, 1 + epoch]).permutation(len(documents))
        )

    def members(self, position: int) -> npt.NDArray[np.int64]:  # noqa: D102 - the base says it
        epoch, at = divmod(position, self.per_epoch)
        chosen: npt.NDArray[np.int64] = self._order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        return chosen

    def micro_batch(self, position: int) -> MicroBatch:  # noqa: D102 - the base says it
        return self._documents(position)


def micro_batches(documents: Documents, config: Config, most: int | None = None) -> MicroBatches:
    """The micro-batches that ``config`` asks for: packs of micro_batch × max_length tokens, or padded rows.

    Packs of a file that doesn't fill one have its size: what is padded is computed like any token.

    Args:
        documents: What to fill in.
        config: Its keys of batches and layout.
        most: Tokens of a pack, if they are to be fewer.
    """
    if not config.packing:
        return PaddedBatches(documents, batch_size=config.micro_batch, seed=config.seed)
    most = config.batch_tokens if most is None else min(config.batch_tokens, most)
    if config.layout in ("padded", "alone"):
        return GroupedBatches(documents, tokens=most, seed=config.seed)
    tokens = min(most, -(-documents.tokens // _TILE) * _TILE)
    return PackedBatches(documents, tokens=tokens, seed=config.seed, longest=config.max_length)


def held_out_batches(documents: Documents, config: Config) -> MicroBatches:
    """Micro-batches to evaluate on, each a unit of the loss's interval: documents alone, if they are few; else as
    training has them, but so small that there are about 32 of them or more."""
    if len(documents) <= _UNITS:
        return PaddedBatches(documents, batch_size=1, seed=config.seed)
    share = max(int(documents.lengths.max()), -(-documents.tokens // _UNITS))
    return micro_batches(documents, config, -(-share // _TILE) * _TILE)


def batch_facts(data: MicroBatches, reasons: Mapping[str, str]) -> dict[str, Any]:
    """How documents fill micro-batches, as a run's facts have it; ``reasons`` says why of each key that was chosen."""
    packed, filled = isinstance(data, PackedBatches), isinstance(data, FilledBatches)
    return {
        "packed": packed,
        "unpacked": None if packed else reasons.get("layout", "asked for") if filled else "asked for",
        "micro_batches_per_epoch": data.per_epoch,
        "pack_tokens": data.tokens if isinstance(data, PackedBatches) else None,
        "fill": data.fill if isinstance(data, FilledBatches) else None,
    }


def assign_rows(lengths: npt.NDArray[np.int32], capacity: int) -> tuple[npt.NDArray[np.int64], int]:
    """The group of each document, int64 [documents], and the number of groups.

    Longest first, a group takes documents as long as its rows, padded to its longest, hold ``capacity`` tokens or
    fewer. Documents of one length keep their order.

    Args:
        lengths: Tokens of each document, none over ``capacity``.
        capacity: Tokens of a group, padding included.
    """
    group_of = np.empty(len(lengths), np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    at = count = 0
    while at < len(lengths):
        rows = max(1, capacity // int(lengths[longest_first[at]]))
        group_of[longest_first[at : at + rows]] = count
        at, count = at + rows, count + 1
    return group_of, count


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
