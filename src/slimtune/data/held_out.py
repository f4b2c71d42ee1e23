"""The rows that a run isn't trained on, so that it can say what it is worth on rows that it hasn't seen."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from slimtune.data.documents import Documents, DocumentStore

__all__ = ["held_out_facts", "set_apart", "share_of"]

LEAST_ROWS = 20
"""Of fewer different rows none is held out by itself: what is left to learn from counts more."""
SHARE, LEAST, MOST = 0.05, 8, 200
"""Rows held out by themselves: this share, but no fewer and no more. 200 rows tell a loss to a few percent."""


def share_of(rows: int) -> float:
    """The share of so many different rows that is held out by itself; 0 for none.

    Six digits, so that the same share gives the same rows when it is read from a config.
    """
    return 0.0 if rows < LEAST_ROWS else float(f"{min(MOST, max(LEAST, round(SHARE * rows))) / rows:.6g}")


def set_apart(
    store: DocumentStore, chosen: npt.NDArray[np.int64], share: float | Literal["auto"], seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], float, int]:
    """Split documents into those to train on and those to evaluate on.

    Whole rows, chosen by seed and content: what stands twice in the data lies on one side.

    Args:
        store: All documents.
        chosen: Numbers of those that may be trained on.
        share: Of the different rows; ``auto``: :func:`share_of` them.
        seed: Of the choice.

    Returns:
        (numbers to train on, numbers to evaluate on, the share that was taken, different rows).
    """
    mixed = np.asarray(store.hashes) ^ np.uint64(np.random.default_rng([seed, 3]).integers(2**63))
    mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) ^ (mixed >> np.uint64(29))
    rows = np.ascontiguousarray(store.places)
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    score = mixed[first][np.cumsum(first) - 1]
    distinct = np.unique(score[chosen])
    taken = share_of(len(distinct)) if share == "auto" else share
    if not taken or not len(distinct):
        return chosen, np.empty(0, np.int64), 0.0, len(distinct)
    threshold = distinct[min(len(distinct) - 1, max(0, round(taken * len(distinct)) - 1))]
    apart = score[chosen] <= threshold
    return chosen[~apart], np.unique(chosen[apart]), taken, len(distinct)


def held_out_facts(documents: Documents) -> dict[str, Any]:
    """What a run remembers of its held-out documents: how many they are, and which (a hash of their tokens)."""
    content = np.sort(documents.store.hashes[documents.chosen]).tobytes()
    return {
        "documents": len(documents),
        "tokens": documents.tokens,
        "fingerprint": hashlib.sha256(content).hexdigest(),
    }
