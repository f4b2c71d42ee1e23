"""A micro-batch that doesn't fit, run in pieces: same documents, same supervised tokens, same gradient, less memory.

The loss of a piece is its sum over supervised tokens divided by the step's count of them, so the pieces' losses and
gradients add up to the whole micro-batch's; only dropout's masks and the order of additions differ.
"""

from __future__ import annotations

from typing import Any

from slimtune.batch import MicroBatch

__all__ = ["largest_piece", "split_micro_batch"]


def split_micro_batch(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Split a micro-batch between its documents into pieces of a ``parts``-th of its tokens, or fewer.

    Args:
        batch: As :meth:`slimtune.batch.MicroBatch.of` reads it.
        parts: Pieces to aim at; a document is never cut, so one that is longer is a piece by itself.

    Returns:
        Pieces in the micro-batch's order, as :meth:`slimtune.batch.MicroBatch.inputs` makes them. Those that supervise
        nothing (padding) are left out.
    """
    if parts <= 1:
        return [batch]
    pieces = _pieces(batch, parts)
    return [piece.inputs() for piece in [piece for piece in pieces if piece.supervised] or pieces[:1]]


def largest_piece(batch: dict[str, Any], parts: int) -> int:
    """Tokens that the largest piece of :func:`split_micro_batch` computes."""
    return max(piece.computed for piece in _pieces(batch, parts))


def _pieces(batch: dict[str, Any], parts: int) -> list[MicroBatch]:
    whole = MicroBatch.of(batch)
    return whole.split(-(-whole.computed // parts))
