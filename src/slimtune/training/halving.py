"""A micro-batch that doesn't fit, run in pieces: same documents, same supervised tokens, same gradient, less memory.

The loss of a piece is its sum over supervised tokens divided by the step's count of them, so the pieces' losses and
gradients add up to the whole micro-batch's; only dropout's masks and the order of additions differ.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

__all__ = ["split_micro_batch"]

IGNORED = -100


def split_micro_batch(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Split a micro-batch between its documents into about ``parts`` pieces of equal length.

    Args:
        batch: Packed, ``input_ids``, ``labels``, ``position_ids`` [1, T] with positions that restart at 0 in each
            document; or rows, ``input_ids``, ``labels``, ``attention_mask`` [B, S].
        parts: Pieces to aim at; a document is never cut, so there may be fewer.

    Returns:
        Pieces in the micro-batch's order. Documents without a supervised token (padding) are left out where a piece
        has nothing else.
    """
    if parts <= 1:
        return [batch]
    pieces = _split_rows(batch, parts) if "position_ids" not in batch else _split_packed(batch, parts)
    supervised = [piece for piece in pieces if bool((piece["labels"] != IGNORED).any())]
    return supervised or pieces[:1]


def _split_rows(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    rows = batch["input_ids"].shape[0]
    bounds = sorted({round(part * rows / parts) for part in range(parts + 1)})
    pieces = []
    for begin, end in itertools.pairwise(bounds):
        length = int(batch["attention_mask"][begin:end].sum(dim=1).max())
        pieces.append({name: _part(value, slice(begin, end), slice(0, length)) for name, value in batch.items()})
    return pieces


def _split_packed(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    total = batch["input_ids"].shape[1]
    starts = torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist()
    bounds = [0]
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        # Close the piece before this document if that comes nearer to an equal share than taking it in.
        share = total * len(bounds) / parts
        if start > bounds[-1] and abs(start - share) <= abs(end - share):
            bounds.append(start)
    pieces = zip(bounds, [*bounds[1:], total], strict=True)
    return [
        {name: _part(value, slice(None), slice(begin, end)) for name, value in batch.items()} for begin, end in pieces
    ]


def _part(value: Any, rows: slice, columns: slice) -> Any:
    return value[rows, columns] if isinstance(value, Tensor) and value.dim() == 2 else value
