"""What is worked out on the host: documents, supervised tokens, parts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from slimtune.batch import IGNORED, LENGTHS, MicroBatch
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


def test_a_row_is_a_document_without_its_padding() -> None:
    batch = models.padded()
    micro = MicroBatch.of(batch)
    assert micro.padded
    assert micro.lengths == (13, 20, 4)
    assert micro.position_ids.tolist() == [*range(13), *range(20), *range(4)]
    assert micro.supervised == models.supervised(batch)
    assert not set(np.cumsum(micro.lengths) - 1) & set(micro.rows), "a row predicted the next row's first token"
    no_mask = MicroBatch.of({"input_ids": batch["input_ids"], "labels": batch["labels"]})
    assert no_mask.lengths == (20, 20, 20)


@pytest.mark.parametrize("batch", [models.pack(), models.padded()])
def test_what_a_trainer_is_handed_is_read_back(batch: dict[str, torch.Tensor]) -> None:
    micro = MicroBatch.of(batch)
    made = micro.inputs()
    again = MicroBatch.of(made)
    for name in ("input_ids", "labels", "position_ids"):
        assert np.array_equal(getattr(again, name), getattr(micro, name)), name
    assert again.lengths == micro.lengths == made[LENGTHS]
    assert again.padded == micro.padded
    for name in batch.keys() - {"input_ids", "labels"}:
        assert torch.equal(made[name], batch[name]), name
    shown = made["attention_mask"] == 1 if micro.padded else torch.ones_like(made["input_ids"]) == 1
    assert torch.equal(made["input_ids"][shown], batch["input_ids"][shown])
    assert (made["input_ids"][~shown] == micro.input_ids[0]).all()


def test_lengths_that_are_known_are_not_looked_for() -> None:
    # Two documents whose positions go on as one's would.
    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8)[None]}
    assert MicroBatch.of(batch).lengths == (8,)
    micro = MicroBatch.of({**batch, LENGTHS: (3, 5)})
    assert micro.lengths == (3, 5)
    assert micro.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert micro.labels.tolist() == [IGNORED, 1, 2, IGNORED, 4, 5, 6, 7]


@pytest.mark.parametrize(("most", "length"), [(192, 64), (190, 63), (100, 33), (60, 20), (1, 20)])
def test_rows_are_levelled_and_rounded_up_where_there_is_room(most: int, length: int) -> None:
    batch = models.padded()
    plain = MicroBatch.of(batch)
    micro = plain.levelled(64, most)
    assert micro.lengths == (length,) * 3
    assert micro.position_ids.tolist() == list(range(length)) * 3
    assert micro.targets.tolist() == plain.targets.tolist()
    row, place = np.divmod(micro.rows, length)
    starts = np.cumsum(plain.lengths) - plain.lengths
    assert (starts[row] + place).tolist() == plain.rows.tolist()
    assert micro.input_ids[micro.rows].tolist() == plain.input_ids[plain.rows].tolist()


def test_refuses_holes_in_the_mask() -> None:
    batch = models.padded()
    batch["attention_mask"][1, 5] = 0
    with pytest.raises(UserError, match="holes"):
        MicroBatch.of(batch)


@pytest.mark.parametrize("weights", [(1.0,), torch.ones(3, 40), (1.0, 0.25, 0.0), (1.0, float("nan"), 1.0)])
def test_refuses_weights_that_are_no_documents(weights: Any) -> None:
    with pytest.raises(UserError, match="3 documents with the weights"):
        MicroBatch.of({**models.padded(), "weights": weights})


def test_a_row_without_tokens_takes_its_weight_away() -> None:
    batch = models.padded()
    batch["attention_mask"][1] = 0
    assert MicroBatch.of({**batch, "weights": torch.tensor([1.0, 0.5, 0.25])}).weights == (1.0, 0.25)


@pytest.mark.parametrize("most", [1, 16, 30, 33, 60, 64])
@pytest.mark.parametrize("batch", [models.pack(), models.padded()])
def test_parts_hold_every_document_once(batch: dict[str, torch.Tensor], most: int) -> None:
    micro = MicroBatch.of(batch)
    parts = micro.split(most)
    assert all(part.computed <= most or len(part.lengths) == 1 for part in parts)
    assert sum((part.lengths for part in parts), ()) == micro.lengths
    for name in ("input_ids", "labels", "position_ids"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(micro, name)), name
    assert sum(part.supervised for part in parts) == micro.supervised
    assert all(part.padded == micro.padded for part in parts)


@pytest.mark.parametrize("least", [1, 8, 17, 18])
def test_long_documents_are_parts_by_themselves(least: int) -> None:
    micro = MicroBatch.of(models.pack())
    parts = micro.apart(least)
    assert sum((part.lengths for part in parts), ()) == micro.lengths
    assert all(len(part.lengths) == 1 or max(part.lengths) < least for part in parts)
    assert not any(max(a.lengths + b.lengths) < least for a, b in itertools.pairwise(parts))
    for name in ("input_ids", "labels", "position_ids"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(micro, name)), name


@pytest.mark.parametrize("batch", [models.pack(), models.padded()])
def test_weights_stay_their_documents(batch: dict[str, torch.Tensor]) -> None:
    plain = MicroBatch.of(batch)
    assert "weights" not in plain.inputs()
    weights = tuple(1.0 if at % 2 else 0.25 for at in range(len(plain.lengths)))
    micro = replace(plain, weights=weights)
    assert MicroBatch.of(micro.inputs()).weights == weights
    of_tokens = np.repeat(weights, micro.lengths)
    assert micro.weights_of_rows is not None
    assert np.array_equal(micro.weights_of_rows, of_tokens[micro.rows])
    assert plain.weights_of_rows is None
    for parts in (micro.split(30), micro.apart(8)):
        assert sum((part.weights or () for part in parts), ()) == weights
    assert micro.filled(micro.tokens + 3).weights == (*weights, 1.0)
    level = micro.levelled(8, 1 << 10)
    assert level.weights_of_rows is not None
    assert np.array_equal(level.weights_of_rows, micro.weights_of_rows)

    apart = micro.by_weight()
    assert [weight for weight, _ in apart] == [0.25, 1.0]
    assert sum(part.supervised for _, part in apart) == micro.supervised
    for weight, part in apart:
        assert part.lengths == tuple(
            length for length, own in zip(micro.lengths, weights, strict=True) if own == weight
        )
        assert np.array_equal(part.input_ids, micro.input_ids[of_tokens == weight])
        assert part.padded == micro.padded
    ((weight, same),) = plain.by_weight()
    assert (weight, same is plain) == (1.0, True)


def test_a_part_is_filled_by_a_document_that_supervises_nothing() -> None:
    micro = MicroBatch.of(models.pack())
    part = micro.split(30)[0]
    filled = part.filled(30)
    assert part.lengths == (17, 5)
    assert filled.lengths == (17, 5, 8)
    assert filled.position_ids[-8:].tolist() == list(range(8))
    assert (filled.labels[-8:] == IGNORED).all()
    assert (filled.input_ids[-8:] == part.input_ids[0]).all(), "another token may have no gradient"
    assert filled.supervised == part.supervised
    assert micro.filled(10) is micro
