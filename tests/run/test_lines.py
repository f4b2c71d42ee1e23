"""What a run says before its first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slimtune.config import Config
from slimtune.data.documents import Documents, DocumentStore, DocumentWriter, Together
from slimtune.data.packing import micro_batches
from slimtune.data.sources import Place
from slimtune.run.lines import data_line, in_ram_line, packs_line, steps_line


def test_the_length_of_a_run_is_said() -> None:
    config = Config.make(save_steps=6, eval_steps=6)
    assert steps_line(60, config, evaluates=True) == (
        "60 optimizer steps of 2 micro-batches, 3 epochs; a checkpoint every 6 steps; the held-out loss every 6 steps"
    )
    config = Config.make(max_steps=1, gradient_accumulation=1, save_steps=1)
    assert steps_line(1, config, evaluates=False) == "1 optimizer step of 1 micro-batch; a checkpoint after every step"


def test_columns_that_arent_read_are_named_but_not_at_any_length() -> None:
    facts = {"rows": 2, "rows_dropped": 0, "tokens": 10, "supervised_tokens": 4, "unread": ["id", "k" * 41, *"abcd"]}
    assert data_line(facts).endswith(f"; columns not read: id, {'k' * 39}…, a, b, c, …")


def test_what_waits_in_ram_is_said_with_its_price() -> None:
    assert in_ram_line(31, 0, 32, 31 << 29) == (
        "the inputs of 31 of 32 layers wait in RAM for their backward (15.50GiB locked): 31.00GiB are copied in a "
        "micro-batch of full length, beside the layers' work"
    )
    assert "backward, and of 30 what attention gave (30.50GiB locked): 61.00GiB" in in_ram_line(31, 30, 32, 61 << 29)


def test_packs_of_several_epochs_are_told_as_such(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path) as writer:
        for row in range(4):
            writer.add(np.arange(32, dtype=np.int32), np.ones(32, np.bool_), 0, Place("a", row, "row"))
    rows = Documents(DocumentStore(tmp_path), np.arange(3))
    config = Config.make(pack_tokens=128)
    assert packs_line(micro_batches(rows, config), config, None) == "1 of 128 tokens, 75.0% full"
    twice = Together(rows, Documents(rows.store, np.arange(3, 4)), 2, 0.25)
    assert packs_line(micro_batches(twice, config), config, None) == "2 of 128 tokens, 87.5% full; 2 epochs together"
    alone = Config.make(packing=False)
    assert packs_line(micro_batches(twice, alone), alone, "asked for").endswith("7 micro-batches; 2 epochs together")
