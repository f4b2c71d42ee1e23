"""A micro-batch: whole documents with their lengths, worked out on the host. Nothing here asks the device for a value.

Packing makes it and knows where each document ends; the engine and the plain path read that, and find nothing again.
Trainers hand batches through as dicts: :meth:`MicroBatch.inputs` makes one, :meth:`MicroBatch.of` reads it, and other
people's as well, which have no lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slimtune.errors import UserError

__all__ = ["IGNORED", "LENGTHS", "WEIGHTS", "MicroBatch"]

IGNORED = -100
"""The label of a token that is not supervised (Hugging Face's convention)."""
LENGTHS = "lengths"
"""The key under which a micro-batch's dict carries its documents' lengths, a tuple of int."""
WEIGHTS = "weights"
"""The same of their weights, a tuple of float, where they have any."""
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MicroBatch:
    """Documents flattened one after the other: T tokens."""

    input_ids: Ints
    """[T]."""
    labels: Ints
    """[T], each where its token stands (unshifted); :data:`IGNORED` on the first token of each document."""
    lengths: tuple[int, ...]
    """Tokens of each document; they sum to T."""
    padded: bool = False
    """A model gets each document as a row, padded on the right to the longest; else all of them as one row."""
    weights: tuple[float, ...] | None = None
    """How much each document's gradient counts, as many times that of its tokens; None: all alike. A loss that is told
    is that of all tokens alike."""

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[0])

    @property
    def computed(self) -> int:
        """Tokens that a model computes: T, or rows times the longest one."""
        return len(self.lengths) * max(self.lengths) if self.padded else self.tokens

    @cached_property
    def position_ids(self) -> Ints:
        """[T], beginning at 0 in each document."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.arange(self.tokens, dtype=np.int64) - np.repeat(starts, self.lengths)

    @cached_property
    def rows(self) -> Ints:
        """[n], the tokens that predict a supervised one."""
        return np.flatnonzero(self.labels[1:] != IGNORED)

    @property
    def targets(self) -> Ints:
        """[n], the supervised tokens."""
        return self.labels[self.rows + 1]

    @property
    def weights_of_rows(self) -> Floats | None:
        """[n], what each of :attr:`rows` counts; None: all alike."""
        return None if self.weights is None else np.repeat(self.weights, self.lengths)[self.rows]

    @property
    def filler(self) -> int:
        """What stands where no document is: a token of the documents, which the model has a gradient for.

        A padding token's embedding is zero in many models, and where a root is taken of it, as in Gemma 3n, no number.
        """
        return int(self.input_ids[0])

    @property
    def supervised(self) -> int:
        """n."""
        return int(self.rows.shape[0])

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> MicroBatch:
        """From what :meth:`inputs` made, or a plain dict of ``input_ids`` and ``labels`` [B, S].

        Such a dict has ``position_ids`` [B, S] (packed: where they don't go on by one, a document begins, which is
        Transformers' own rule), or ``attention_mask`` (a document a row), or neither. Tensors on a GPU work, but are
        waited for.

        Raises:
            UserError: The attention mask pads on the left or has holes, or the weights aren't the documents'.
        """
        ids, labels = _host(batch["input_ids"]), _host(batch["labels"]).copy()
        rows, length = ids.shape
        mask, known = batch.get("attention_mask"), batch.get(LENGTHS)
        packed = mask is None and "position_ids" in batch
        if packed:
            if known is None:
                starts = np.diff(_host(batch["position_ids"]), axis=1, prepend=-2) != 1
                known = np.diff(np.append(np.flatnonzero(starts), rows * length))
            ids, labels = ids.reshape(-1), labels.reshape(-1)
        else:
            if known is None:
                known = np.full(rows, length) if mask is None else _tokens_of_rows(_host(mask))
            there = np.arange(length) < np.asarray(known)[:, None]
            ids, labels = ids[there], labels[there]
        lengths = tuple(int(tokens) for tokens in known if tokens)
        labels[np.cumsum(lengths) - lengths] = IGNORED
        return cls(ids, labels, lengths, padded=not packed, weights=_weights(batch.get(WEIGHTS), known))

    def inputs(self) -> dict[str, Any]:
        """A model's inputs on the host, and the lengths and weights, which no model takes.

        ``input_ids`` and ``labels`` int64 [1, T] with ``position_ids`` [1, T]; or, if :attr:`padded`, [documents,
        longest] with ``attention_mask``, and its first token (:attr:`filler`) in the padding.
        """
        told = {LENGTHS: self.lengths} if self.weights is None else {LENGTHS: self.lengths, WEIGHTS: self.weights}
        if not self.padded:
            made = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
            return {**{key: torch.from_numpy(value)[None] for key, value in made.items()}, **told}
        there = np.arange(max(self.lengths)) < np.asarray(self.lengths)[:, None]
        ids, labels = np.full(there.shape, self.filler, np.int64), np.full(there.shape, IGNORED, np.int64)
        ids[there], labels[there] = self.input_ids, self.labels
        made = {"input_ids": ids, "labels": labels, "attention_mask": there.astype(np.int64)}
        return {**{key: torch.from_numpy(value) for key, value in made.items()}, **told}

    def split(self, most: int) -> list[MicroBatch]:
        """Whole documents in parts that compute ``most`` tokens or fewer; a longer document is a part by itself."""
        parts: list[MicroBatch] = []
        first = start = at = longest = 0
        for index, length in enumerate(self.lengths):
            longest, count = max(longest, length), index + 1 - first
            if count > 1 and (count * longest if self.padded else at + length - start) > most:
                parts.append(self._part(first, index, start, at))
                first, start, longest = index, at, length
            at += length
        return [*parts, self._part(first, len(self.lengths), start, at)] if parts else [self]

    def apart(self, least: int) -> list[MicroBatch]:
        """Each document of ``least`` tokens or more by itself, and the others between them together."""
        ends = np.cumsum(self.lengths)
        long = [index for index, length in enumerate(self.lengths) if length >= least]
        cuts = sorted({0, *long, *(index + 1 for index in long), len(self.lengths)})
        starts = [0, *(int(ends[cut - 1]) for cut in cuts[1:])]
        return [self._part(*cuts[n : n + 2], *starts[n : n + 2]) for n in range(len(cuts) - 1)]

    def by_weight(self) -> list[tuple[float, MicroBatch]]:
        """Each weight, with the documents of it that supervise something."""
        if self.weights is None:
            return [(1.0, self)]
        of_tokens, parts = np.repeat(self.weights, self.lengths), []
        for weight in sorted(set(self.weights)):
            there = of_tokens == weight
            lengths = tuple(length for length, own in zip(self.lengths, self.weights, strict=True) if own == weight)
            part = MicroBatch(self.input_ids[there], self.labels[there], lengths, padded=self.padded)
            parts += [(weight, part)] if part.supervised else []
        return parts

    def _part(self, first: int, last: int, start: int, end: int) -> MicroBatch:
        return MicroBatch(
            self.input_ids[start:end], self.labels[start:end], self.lengths[first:last], padded=self.padded,
            weights=self.weights and self.weights[first:last],
        )  # fmt: skip

    def filled(self, tokens: int) -> MicroBatch:
        """With a last document that supervises nothing, so that T is ``tokens``; as it is if it has as many or more."""
        missing = tokens - self.tokens
        if missing <= 0:
            return self
        ids = np.pad(self.input_ids, (0, missing), constant_values=self.filler)
        labels = np.pad(self.labels, (0, missing), constant_values=IGNORED)
        weights = self.weights and (*self.weights, 1.0)
        return MicroBatch(ids, labels, (*self.lengths, missing), padded=self.padded, weights=weights)

    def levelled(self, round_to: int, most: int) -> MicroBatch:
        """With documents of one length, that of the longest, filled up by tokens that supervise nothing.

        Args:
            round_to: That length is a multiple of it where there is room: lengths that come again are computed faster.
            most: Tokens that the micro-batch may be filled up to.
        """
        count, longest = len(self.lengths), max(self.lengths)
        length = max(longest, min(-(-longest // round_to) * round_to, most // count))
        there = np.arange(length) < np.asarray(self.lengths)[:, None]
        ids, labels = np.full(there.shape, self.filler, np.int64), np.full(there.shape, IGNORED, np.int64)
        ids[there], labels[there] = self.input_ids, self.labels
        lengths = (length,) * count
        return MicroBatch(ids.reshape(-1), labels.reshape(-1), lengths, padded=self.padded, weights=self.weights)


def _tokens_of_rows(mask: Ints) -> Ints:
    if bool(np.any(np.diff(mask, axis=1) > 0)):
        raise UserError(
            "a micro-batch whose attention_mask pads on the left or has holes",
            rule="The fused engine takes documents that begin at their row's first token.",
            way_out="Pad on the right: tokenizer.padding_side = 'right'.",
        )
    tokens: Ints = (mask != 0).sum(axis=1)
    return tokens


def _weights(given: Any, lengths: Any) -> tuple[float, ...] | None:
    """Those of the documents that have tokens; ``given``: one for each of ``lengths``, or None."""
    if given is None:
        return None
    weights = torch.as_tensor(given, dtype=torch.float64, device="cpu").numpy()
    if weights.shape != (len(lengths),) or not bool((weights > 0).all()):
        raise UserError(
            f"a micro-batch of {len(lengths)} documents with the weights {weights.tolist()}",
            rule="Each document has one, above 0, which its gradient is multiplied with.",
            way_out="Leave the key weights out, where it means something else.",
        )
    return tuple(weights[np.asarray(lengths) > 0].tolist())


def _host(x: Tensor) -> Ints:
    array: Ints = x.detach().to("cpu", torch.int64).numpy()
    return array
