"""A micro-batch as the collator gives it, worked out on the host: nothing here asks the device for a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slimtune.errors import UserError

__all__ = ["IGNORED", "MicroBatch"]

IGNORED = -100
"""The label of a token that is not supervised (Hugging Face's convention)."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Documents flattened one after the other: T tokens."""

    input_ids: Ints
    """[T]."""
    position_ids: Ints
    """[T], restarting at 0 in each document."""
    lengths: tuple[int, ...]
    """Tokens of each document; they sum to T."""
    rows: Ints
    """[n], the tokens that predict a supervised one."""
    targets: Ints
    """[n], the supervised tokens."""

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[0])

    @property
    def supervised(self) -> int:
        """n."""
        return int(self.rows.shape[0])

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], *, round_to: int = 1, most: int | None = None) -> MicroBatch:
        """From ``input_ids`` and ``labels`` [B, S] with ``position_ids`` [B, S] (packed) or ``attention_mask``.

        Labels stand where their tokens stand (unshifted). Tensors on a GPU work, but are waited for.

        Args:
            batch: The tensors.
            round_to: Rows that aren't packed are padded to a multiple of so many tokens: lengths that come again are
                computed faster on a GPU.
            most: Tokens that the micro-batch may be padded to; None: any number.

        Raises:
            UserError: The attention mask pads on the left or has holes.
        """
        ids, labels = _host(batch["input_ids"]), _host(batch["labels"])
        rows, length = ids.shape
        mask = batch.get("attention_mask")
        if mask is not None and bool(np.any(np.diff(_host(mask), axis=1) > 0)):
            raise UserError(
                "a micro-batch whose attention_mask pads on the left or has holes",
                rule="The fused engine takes documents that begin at their row's first token.",
                way_out="Pad on the right: tokenizer.padding_side = 'right'.",
            )
        if mask is None and "position_ids" in batch:
            positions = _host(batch["position_ids"])
            # Where positions don't go on by one, a document begins: Transformers' own rule for packed batches.
            starts = np.diff(positions, axis=1, prepend=-2) != 1
        else:
            padded = -(-length // round_to) * round_to
            if most is not None:
                padded = max(length, min(padded, most // rows))
            ids = np.pad(ids, ((0, 0), (0, padded - length)))
            labels = np.pad(labels, ((0, 0), (0, padded - length)), constant_values=IGNORED)
            length = padded
            positions = np.broadcast_to(np.arange(length), ids.shape)
            starts = positions == 0
        begins = np.flatnonzero(starts)
        ends = np.append(begins[1:], rows * length)
        following = np.full_like(labels, IGNORED)
        following[:, :-1] = labels[:, 1:]
        following = following.reshape(-1)
        supervised = np.flatnonzero(following != IGNORED)
        return cls(
            input_ids=ids.reshape(-1),
            position_ids=np.ascontiguousarray(positions.reshape(-1)),
            lengths=tuple((ends - begins).tolist()),
            rows=supervised,
            targets=following[supervised],
        )

    def split(self, part_tokens: int) -> list[MicroBatch]:
        """Whole documents in parts of ``part_tokens`` tokens, each filled up by a document that supervises nothing.

        A document longer than that is a part by itself.
        """
        if self.tokens <= part_tokens:
            return [self]
        parts: list[MicroBatch] = []
        start = end = 0
        lengths: list[int] = []
        for length in (*self.lengths, None):
            if lengths and (length is None or end - start + length > part_tokens):
                parts.append(self._part(start, end, tuple(lengths), part_tokens))
                start, lengths = end, []
            if length is not None:
                lengths.append(length)
                end += length
        return parts

    def _part(self, start: int, end: int, lengths: tuple[int, ...], tokens: int) -> MicroBatch:
        missing = max(0, tokens - (end - start))
        mine = (self.rows >= start) & (self.rows < end)
        return MicroBatch(
            input_ids=np.pad(self.input_ids[start:end], (0, missing)),
            position_ids=np.concatenate([self.position_ids[start:end], np.arange(missing)]),
            lengths=(*lengths, missing) if missing else lengths,
            rows=self.rows[mine] - start,
            targets=self.targets[mine],
        )


def _host(x: Tensor) -> Ints:
    array: Ints = x.detach().to("cpu", torch.int64).numpy()
    return array
