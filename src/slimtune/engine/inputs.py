"""A micro-batch's place on the device, at addresses that stay, and the CUDA graphs that read it there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimtune.batch import MicroBatch
from slimtune.engine.attention import LONG, Documents, Way, choose, padded_tokens
from slimtune.engine.structure import ScoresKind
from slimtune.errors import UserError

__all__ = ["Inputs", "ShapeKey"]

_AHEAD = 4
"""Micro-batches that the host may be ahead of the device."""
_AHEAD_OF_ROWS = 2
"""The same where a table in RAM gives rows, of which a micro-batch's are some hundred megabytes."""
_DOCUMENT_STEPS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of documents that graphs are made for: attention's grid grows with it, so no more than is needed."""


@dataclass(frozen=True)
class ShapeKey:
    """What a recorded graph holds for: micro-batches of one key can be replayed by one graph."""

    tokens: int
    ways: tuple[Way, ...]
    """Attention's, for each kind that the model has."""
    documents: int
    """How many, or the most that a graph takes."""
    longest: int
    """The row length, or at least the longest document's."""
    recordable: bool
    """Whether the device alone reads where the documents end, so that a graph holds for others of this key."""


@dataclass(frozen=True)
class _Staging:
    """Host buffers of one micro-batch, each as large as its buffer on the device."""

    fixed: Tensor
    boundaries: Tensor
    rows: Tensor | None


class Inputs:
    """Device buffers for micro-batches of up to ``tokens`` tokens, filled by one copy without waiting for it.

    A ``table`` [vocabulary, C] in RAM gives a row for each token, which a copy of its own brings.
    """

    def __init__(
        self,
        tokens: int,
        scores: tuple[ScoresKind, ...],
        dtype: torch.dtype,
        device: torch.device,
        table: Tensor | None = None,
    ) -> None:
        self._scores, self._dtype, self._device = scores, dtype, device
        self.room = tokens
        """Tokens that there is room for."""
        self.padded_room = 0
        """:attr:`slimtune.engine.memory.MemoryPlan.padded_room`."""
        # One after the other: seed, input_ids, position_ids, rows, targets, weights' bits; then the documents'
        # boundaries.
        self._fixed = torch.zeros(1 + 5 * tokens, dtype=torch.int64, device=device)
        self._boundaries = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
        self._table = table
        self._rows: Tensor | None = None
        if table is not None:
            self._rows = torch.zeros(tokens, table.shape[1], dtype=table.dtype, device=device)
        self._pinned = device.type == "cuda"
        self._free: deque[_Staging] = deque()
        self._busy: deque[tuple[_Staging, torch.cuda.Event]] = deque()

    @staticmethod
    def nbytes_of(tokens: int) -> int:
        """What its buffers take on the device, a table's rows not among them."""
        return 8 * (1 + 5 * tokens) + 4 * (tokens + 1)

    @property
    def packs_ways(self) -> dict[ScoresKind, Way]:
        """How each kind of attention over documents of any lengths is computed."""
        return {kind: self._choose(kind, (1, 2)) for kind in self._scores}

    def ways(self, key: ShapeKey) -> dict[ScoresKind, Way]:
        """How each kind of attention is computed for micro-batches of a key."""
        return dict(zip(self._scores, key.ways, strict=True))

    def _choose(self, kind: ScoresKind, lengths: tuple[int, ...]) -> Way:
        return choose(self._device, self._dtype, kind.head_dim, lengths, softcap=kind.softcap, sinks=kind.sinks)

    @property
    def seed(self) -> Tensor:
        """int64 scalar."""
        return self._fixed[0]

    def _part(self, number: int, length: int) -> Tensor:
        start = 1 + number * self.room
        return self._fixed[start : start + length]

    def input_ids(self, key: ShapeKey) -> Tensor:
        """int64 [T]."""
        return self._part(0, key.tokens)

    def table_rows(self, key: ShapeKey) -> Tensor | None:
        """The tokens' rows of the table in RAM [T, C], if there is one."""
        return None if self._rows is None else self._rows[: key.tokens]

    def position_ids(self, key: ShapeKey) -> Tensor:
        """int64 [T]."""
        return self._part(1, key.tokens)

    def supervised(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """rows and targets, int64 [n]."""
        return self._part(2, micro.supervised), self._part(3, micro.supervised)

    def weights(self, micro: MicroBatch) -> Tensor | None:
        """What each of those rows counts, float64 [n]; None: all alike."""
        return None if micro.weights is None else self._part(4, micro.supervised).view(torch.float64)

    def documents(self, micro: MicroBatch, key: ShapeKey) -> Documents:
        """The micro-batch's documents; what the device reads of them lies at a fixed address."""
        return Documents(micro.lengths, self._boundaries[: key.documents + 1], key.longest, self.padded_room)

    def load(self, micro: MicroBatch, seed: int) -> ShapeKey:
        """Bring a micro-batch to the device.

        Raises:
            UserError: It has more tokens than there is room for.
        """
        if micro.tokens > self.room:
            raise UserError(
                f"a micro-batch of {micro.tokens} tokens",
                rule=f"The engine was made for at most {self.room}.",
                way_out="Make it with tokens set to the largest micro-batch, evaluation's too.",
            )
        key = self._key(micro)
        staging = self._staging()
        fixed, boundaries = staging.fixed, staging.boundaries
        fixed[0] = seed
        parts = [micro.input_ids, micro.position_ids, micro.rows, micro.targets]
        if (weights := micro.weights_of_rows) is not None:
            parts.append(weights.view(np.int64))
        for number, values in enumerate(parts):
            start = 1 + number * self.room
            fixed[start : start + len(values)] = torch.from_numpy(values)
        ends = torch.tensor(micro.lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        boundaries[1 : 1 + len(ends)] = ends
        boundaries[1 + len(ends) : key.documents + 1] = key.tokens
        self._fixed.copy_(fixed, non_blocking=True)
        self._boundaries[: key.documents + 1].copy_(boundaries[: key.documents + 1], non_blocking=True)
        if self._table is not None and self._rows is not None and staging.rows is not None:
            rows = staging.rows[: key.tokens]
            torch.index_select(self._table, 0, fixed[1 : 1 + key.tokens], out=rows)
            self._rows[: key.tokens].copy_(rows, non_blocking=True)
        if self._pinned:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            self._busy.append((staging, copied))
        else:
            self._free.append(staging)
        return key

    def _staging(self) -> _Staging:
        """Host buffers that no copy reads any more."""
        if len(self._busy) >= (_AHEAD if self._table is None else _AHEAD_OF_ROWS):
            staging, copied = self._busy.popleft()
            copied.synchronize()
            return staging
        if self._free:
            return self._free.popleft()
        fixed, boundaries, rows = (
            None if like is None else torch.zeros(like.shape, dtype=like.dtype, pin_memory=self._pinned)
            for like in (self._fixed, self._boundaries, self._rows)
        )
        assert fixed is not None
        assert boundaries is not None
        return _Staging(fixed, boundaries, rows)

    def _key(self, micro: MicroBatch) -> ShapeKey:
        longest, count = max(micro.lengths), len(micro.lengths)
        ways = tuple(self._choose(kind, micro.lengths) for kind in self._scores)
        if not {"varlen", "efficient", "triton"}.isdisjoint(ways):
            most = next((step for step in _DOCUMENT_STEPS if step >= count), micro.tokens)
            rounded = min(micro.tokens, 1 << max(7, (longest - 1).bit_length()))
            room = "efficient" not in ways or padded_tokens(most, rounded) <= self.padded_room
            if room and "torch" not in ways:
                return ShapeKey(micro.tokens, ways, most, rounded, recordable=True)
        # Each length of a long document would be a graph of its own, and its launches take no time that counts.
        return ShapeKey(micro.tokens, ways, count, longest, recordable=set(ways) == {"cudnn"} and longest < LONG)
