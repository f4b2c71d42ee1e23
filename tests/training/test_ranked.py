"""The next step's micro-batches are read while the device computes this one's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from slimtune.ranks.group import ALONE
from slimtune.training.ranked import RankedTrainer


@pytest.mark.parametrize("engine", [None, object()])
def test_reading_ahead_changes_no_step(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of seven micro-batches, three to a step, as the Trainer asks for them; and then one that is left in
    its middle."""
    trainer = RankedTrainer.__new__(RankedTrainer)
    trainer.engine, trainer.ranks = engine, ALONE
    trainer.args = SimpleNamespace(gradient_accumulation_steps=3)  # type: ignore[assignment]
    counted_on, reads = [], []

    def counted(self: Any, samples: list[int], device: torch.device) -> int:
        counted_on.append(device.type)
        return len(samples)

    def epoch(number: int) -> Iterator[int]:
        for at in range(7):
            reads.append(at)
            yield 10 * number + at

    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", counted)
    for number, wanted in enumerate(((3, 3, 1), (3, 3, 1), (3,))):
        source, taken = epoch(number), []
        for count in wanted:
            samples, items = trainer.get_batch_samples(source, count, torch.device("meta"))
            assert items == len(samples) == count
            taken += samples
            before = len(reads)
            trainer.read_ahead()
            assert len(reads) - before == (0 if engine is None else min(3, 7 - len(taken)))
        assert taken == [10 * number + at for at in range(sum(wanted))]
    assert set(counted_on) == {"meta" if engine is None else "cpu"}
