"""A plan is carried out, or another one that needs less of what the system doesn't give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from slimtune.engine import Engine
from slimtune.engine import engine as engine_module
from slimtune.engine import memory as memory_module
from slimtune.engine import placed as placed_module
from slimtune.engine.blocks import Keep
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.offload import KeptInRam
from slimtune.errors import UserError
from tests.engine import models


@pytest.mark.parametrize("most", ["all", "inputs", "nothing"])
def test_ram_that_isnt_locked_is_missed_only_where_it_must_be_there(most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers' inputs must be; what attention gave needn't, and is computed again."""

    def resident(*args: Any, **options: Any) -> MemoryPlan:
        return plan_memory(*args, **{**options, "stored": ()})

    def locked(sizes: Mapping[int, int], device: torch.device) -> KeptInRam:
        if sum(sizes.values()) > limit:
            raise UserError("RAM can't be locked")
        return KeptInRam(sizes, device)

    model = models.add_lora(models.make_base("qwen3"))
    monkeypatch.setattr(engine_module, "plan_memory", resident)
    monkeypatch.setattr(memory_module, "_ATTENDED", 1.0)
    inputs = Engine(model, dtype=torch.float32, tokens=64, memory=0, ram=1 << 30).plan
    monkeypatch.setattr(memory_module, "_ASIDES", (Keep.ATTENDED,))
    wanted = Engine(model, dtype=torch.float32, tokens=64, memory=0, ram=1 << 30).plan
    assert wanted.spare_ram_bytes == wanted.ram_bytes - inputs.ram_bytes > 0
    limit = {"all": wanted.ram_bytes, "inputs": inputs.ram_bytes, "nothing": 0}[most]
    monkeypatch.setattr(memory_module, "_ASIDES", (Keep.INPUT, Keep.ATTENDED))
    monkeypatch.setattr(placed_module, "KeptInRam", locked)
    budget = inputs.nbytes if most == "nothing" else wanted.nbytes
    if most == "nothing":
        with pytest.raises(UserError, match="locked"):
            Engine(model, dtype=torch.float32, tokens=64, memory=budget, ram=1 << 30)
        return
    plan = Engine(model, dtype=torch.float32, tokens=64, memory=budget, ram=1 << 30).plan
    assert plan.attended_in_ram == (len(plan.in_ram) if most == "all" else 0)
    assert plan.ram_bytes <= limit
