"""A run whose weights, embedding and inputs come from RAM: the adapter's bytes are those without, a stop in it too."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from slimtune import prepare
from slimtune.base.load import load_base
from slimtune.engine import Engine
from slimtune.engine.stored import places_of
from slimtune.engine.streamed import in_ram
from slimtune.errors import StopRequested
from slimtune.recipes import finetune, resume
from slimtune.training import fused
from tests.campaigns import campaign
from tests.training.test_recipe import config
from tests.training.test_recipe import stop_in_step as stop_in_step


def test_a_streamed_run_learns_the_same_and_goes_on_bit_by_bit(
    tmp_path: Path, stop_in_step: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out losses, samples and the proofs of the first step come between, by the engine and by the model itself."""
    rows = campaign.make_rows(tmp_path / "rows.jsonl")
    model = campaign.make_model(tmp_path / "model", layers=4, tied=False)
    made: list[Engine] = []

    class Little(Engine):
        ram_there = 0

        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "memory": -(1 << 40), "ram": self.ram_there})  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(fused, "Engine", Little)

    short = partial(config, str(model), rows, max_steps=3, save_steps=1, gradient_accumulation=1)
    resident = finetune(short(tmp_path / "resident"))
    assert not made[-1].plan.streamed
    Little.ram_there = 1 << 30
    stop_in_step(2)
    with pytest.raises(StopRequested):
        finetune(short(tmp_path / "streamed"))
    streamed = resume(tmp_path / "streamed")
    assert len(made[-1].plan.streamed) == len(made[-1].layers) == 4
    assert made[-1].plan.embedding_bytes > 0
    assert campaign.adapter_sha256(streamed.path) == campaign.adapter_sha256(resident.path)
    facts = json.loads(streamed.facts_file.read_text())
    assert facts["training"]["streamed_bytes"] == made[-1].plan.streamed_bytes > 0
    assert facts["base"]["fingerprint_after"] == facts["base"]["fingerprint_before"]


def test_the_plain_stack_trains_on_what_is_in_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run that was planned for the engine ends on the plain stack, its base lies where the plan put it."""
    rows = campaign.make_rows(tmp_path / "rows.jsonl")
    model = campaign.make_model(tmp_path / "model", layers=2, tied=False)
    short = partial(config, str(model), rows, max_steps=2, gradient_accumulation=1, engine="plain")
    resident = finetune(short(tmp_path / "resident"))
    with safe_open(model / "model.safetensors", framework="pt") as file:
        names = frozenset(name for name in file.keys() if "proj" in name or "embed" in name)  # noqa: SIM118
    monkeypatch.setattr(prepare, "names_in_ram", lambda *_: names)
    loaded: list[int] = []

    def spied(*args: Any, **options: Any) -> Any:
        base = load_base(*args, **options)
        loaded.append(sum(in_ram(places_of(parameter)) > 0 for parameter in base.model.parameters()))
        return base

    monkeypatch.setattr(prepare, "load_base", spied)
    away = finetune(short(tmp_path / "away"))
    assert set(loaded) == {len(names)}
    assert campaign.adapter_sha256(away.path) == campaign.adapter_sha256(resident.path)
