"""Which micro-batches one recorded graph can take."""

from __future__ import annotations

import pytest
import torch

from slimtune.batch import MicroBatch
from slimtune.engine import inputs as inputs_module
from slimtune.engine.attention import Way
from slimtune.engine.inputs import Inputs, ShapeKey
from slimtune.engine.structure import ScoresKind


def pack(*lengths: int) -> MicroBatch:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.ones_like(positions)
    return MicroBatch.of({"input_ids": ids, "labels": ids, "position_ids": positions})


def keys(monkeypatch: pytest.MonkeyPatch, way: Way, room: int, *packs: MicroBatch) -> list[ShapeKey]:
    monkeypatch.setattr(inputs_module, "choose", lambda *_, **__: way)
    inputs = Inputs(2048, (ScoresKind(64),), torch.float32, torch.device("cpu"))
    inputs.padded_room = room
    made = []
    for micro in packs:
        made.append(inputs.load(micro, 0))
        runs = inputs.documents(micro, made[-1]).runs
        assert sum(run.tokens.stop - run.tokens.start for run in runs) == micro.tokens
        if way == "efficient" and made[-1].recordable:
            assert [len(run.boundaries) - 1 for run in runs] == [made[-1].documents]
    return made


TWO = pack(1000, 500, 500, 48), pack(900, 100, 40, 500, 500, 8)


def test_packs_of_other_lengths_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = keys(monkeypatch, "varlen", 0, *TWO)
    assert first == second == ShapeKey(2048, ("varlen",), 8, 1024, recordable=True)


def test_the_memory_efficient_kernel_needs_room_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = keys(monkeypatch, "efficient", 8 * 1024, *TWO)
    assert first == second == ShapeKey(2048, ("efficient",), 8, 1024, recordable=True)
    first, second = keys(monkeypatch, "efficient", 8 * 1024 - 1, *TWO)
    assert first == ShapeKey(2048, ("efficient",), 4, 1000, recordable=False)
    assert second == ShapeKey(2048, ("efficient",), 6, 900, recordable=False)


def test_where_the_host_goes_over_the_documents_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(key.recordable for key in keys(monkeypatch, "torch", 1 << 30, *TWO))
    assert all(key.recordable for key in keys(monkeypatch, "cudnn", 0, pack(1024, 1024)))
