"""What is worked out on the host: documents, supervised tokens, parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimtune.engine.microbatch import MicroBatch
from slimtune.errors import UserError
from tests.engine import models


def test_packed() -> None:
    batch = models.pack()
    micro = MicroBatch.of(batch)
    assert micro.lengths == models.LENGTHS
    assert micro.tokens == sum(models.LENGTHS)
    assert micro.supervised == models.supervised(batch)
    labels = batch["labels"][0].numpy()
    for row, target in zip(micro.rows, micro.targets, strict=True):
        assert labels[row + 1] == target != -100
    # No document predicts the first token of the next.
    ends = np.cumsum(models.LENGTHS) - 1
    assert not set(ends) & set(micro.rows)


def test_padded_rows_are_documents() -> None:
    batch = models.padded()
    micro = MicroBatch.of(batch)
    assert micro.lengths == (20, 20, 20)
    assert micro.position_ids.tolist() == list(range(20)) * 3
    assert micro.supervised == models.supervised(batch)
    assert 19 not in micro.rows, "a row predicted the next row's first token"


@pytest.mark.parametrize(("most", "length"), [(None, 64), (192, 64), (190, 63), (100, 33), (60, 20), (1, 20)])
def test_padded_rows_are_rounded_up_where_there_is_room(most: int | None, length: int) -> None:
    batch = models.padded()
    micro, plain = MicroBatch.of(batch, round_to=64, most=most), MicroBatch.of(batch)
    assert micro.lengths == (length,) * 3
    assert micro.position_ids.tolist() == list(range(length)) * 3
    assert micro.targets.tolist() == plain.targets.tolist()
    row, place = np.divmod(micro.rows, length)
    assert (row * 20 + place).tolist() == plain.rows.tolist()
    assert micro.input_ids[micro.rows].tolist() == plain.input_ids[plain.rows].tolist()


def test_packs_are_never_rounded_up() -> None:
    assert MicroBatch.of(models.pack(), round_to=64).lengths == models.LENGTHS


def test_refuses_holes_in_the_mask() -> None:
    batch = models.padded()
    batch["attention_mask"][1, 5] = 0
    with pytest.raises(UserError, match="holes"):
        MicroBatch.of(batch)


@pytest.mark.parametrize("part_tokens", [16, 30, 33, 60, 64])
def test_parts_hold_every_document_once(part_tokens: int) -> None:
    micro = MicroBatch.of(models.pack())
    parts = micro.split(part_tokens)
    assert all(part.tokens == part_tokens or len(part.lengths) == 1 for part in parts) or part_tokens == 64
    assert sum(part.supervised for part in parts) == micro.supervised
    ids, seen = [], 0
    for part in parts:
        assert sum(part.lengths) == part.tokens == len(part.position_ids)
        padding = part.lengths[-1] if seen + part.tokens > micro.tokens or part.tokens == part_tokens else 0
        length = 0
        documents = list(part.lengths)
        while documents and seen < len(models.LENGTHS) and documents[0] == models.LENGTHS[seen]:
            length += documents.pop(0)
            seen += 1
        ids += part.input_ids[:length].tolist()
        assert len(documents) <= 1, (documents, padding)
        assert np.array_equal(part.targets, part.input_ids[part.rows + 1])
    assert seen == len(models.LENGTHS)
    assert ids == torch.flatten(models.pack()["input_ids"]).tolist()
