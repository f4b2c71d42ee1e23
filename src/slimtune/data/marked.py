"""Which replies a file marks as ones to show, not to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimtune.data.rows import RowRefused

__all__ = ["LEARNT", "supervision"]

LEARNT = ("weight", "train", "training", "loss", "loss_weight")
"""Keys of a turn that say whether it is learnt: OpenAI's and Mistral's, axolotl's two, ms-swift's and XTuner's."""


def supervision(where: str, role: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    """``supervised: False`` for a reply that its file marks as one to show, not to learn: ``weight: 0``,
    ``train: false``, ``training: false``, ``loss: false``, ``loss_weight: 0``.

    Raises:
        RowRefused: It is to be learnt in part, or with a weight of its own.
    """
    if role != "assistant":
        return {}
    made: dict[str, Any] = {}
    for key in ("train_detail", "training_detail"):
        if turn.get(key):
            raise RowRefused(f"{where}.{key}", "parts of a reply are learnt or not; a reply is learnt whole", "weight")
    for key in LEARNT:
        value = turn.get(key)
        if value is None or value == 1:
            continue
        if not isinstance(value, bool | int | float) or value != 0:
            raise RowRefused(f"{where}.{key}", "a reply is learnt (1, true) or not (0, false)", "weight")
        made["supervised"] = False
    return made
