"""The room of the largest micro-batch is taken before the first step; what FP8 loses is looked at in any run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from slimtune.config import Config
from slimtune.engine import Engine
from slimtune.errors import UserError
from slimtune.training.fused import FusedTrainer, _take_room, too_little
from tests.engine import models

GIB = 1 << 30


@pytest.mark.parametrize("free", [3, 1])
def test_a_gpu_without_room_is_said_at_once(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def empty(size: int, **_: Any) -> None:
        taken.append(size)
        if size > free * GIB:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", empty)
    for name, value in (("memory_allocated", 5 * GIB), ("mem_get_info", (free * GIB, 8 * GIB)), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    engine: Any = SimpleNamespace(device=torch.device("cuda"), parts={"weights": 4 * GIB, "workspace": 3 * GIB})
    if free > 2:
        _take_room(engine)
    else:
        with pytest.raises(UserError, match=r"takes 2\.00GiB more of the GPU, and 1\.00 are free") as refused:
            _take_room(engine)
        assert "--memory" in (refused.value.way_out or "")
    assert taken == [2 * GIB]


def test_a_memory_that_surely_isnt_enough_is_refused_and_one_that_may_be_isnt() -> None:
    """Plans are some percent off what is allocated."""
    config = Config.make(memory="4GiB", max_length=4096)
    refusal = too_little(config, int(4.3 * GIB), 2048)
    assert refusal is not None
    assert refusal.what == "memory: 4GiB is too little: documents of 4,096 tokens take 4.30GiB at least"
    assert "--max-length 2048" in refusal.way_out
    assert too_little(config, int(4.1 * GIB)) is None
    assert too_little(config, None) is None
    assert too_little(config.model_copy(update={"memory": "auto"}), 5 * GIB) is None


@pytest.mark.parametrize("evaluates", [True, False])
def test_without_an_evaluation_what_fp8_loses_is_told_at_every_checkpoint(
    evaluates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtune.engine.engine.pays", lambda *shape: True)
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", lambda *_: None)
    model = models.add_lora(models.quantize(models.make_base("llama"), double=True))
    trainer, told = FusedTrainer.__new__(FusedTrainer), list[dict[str, float]]()
    trainer.engine = Engine(model, dtype=torch.bfloat16, tokens=64, fp8=True)
    trainer.fp8_pack, trainer.log = models.pack(), told.append  # type: ignore[method-assign]
    trainer.eval_dataset = [0] if evaluates else None
    draws = trainer.engine.state_dict()
    for saves in (False, True):
        trainer.control = SimpleNamespace(should_save=saves)
        trainer._maybe_log_save_evaluate()
    assert [0 < each["eval_fp8_lost"] < 0.05 for each in told] == [True] * (not evaluates)
    assert trainer.engine.state_dict() == draws
    trainer.engine = Engine(model, dtype=torch.bfloat16, tokens=64)
    trainer._maybe_log_save_evaluate()
    assert len(told) == (not evaluates)
