"""The plan before the download is the engine's of the loaded model, and what a step allocates is what a plan says."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimtune.adapter.lora import lora_config, wrapped
from slimtune.adapter.targets import find_targets
from slimtune.base.load import load_base
from slimtune.config import Config
from slimtune.engine import Engine
from slimtune.engine import attention as attention_module
from slimtune.engine import engine as engine_module
from slimtune.engine import memory as memory_module
from slimtune.engine.blocks import Keep, Memory
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.optimizer import FusedAdamW8bit, adapter_bytes
from slimtune.engine.streamed import embedding_places
from slimtune.errors import UserError
from slimtune.hardware import CARDS, Card, Hardware
from slimtune.plan import memory_budget
from slimtune.training import forecast as forecast_module
from slimtune.training.forecast import Forecaster, _fits_in_16_bits, names_in_ram
from tests.engine import models
from tests.engine.counted import most_of_a_step

GIB = 1 << 30


@pytest.fixture
def folder_of(model_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    def made(family: str) -> Path:
        folder = tmp_path / family
        folder.mkdir()
        for file in model_folder.glob("tokenizer*"):
            shutil.copy(file, folder / file.name)
        models.make_base(family).save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_sizes_are_those_of_the_loaded_model(
    family: str, targets: str, folder_of: Callable[[str], Path], hardware: Hardware
) -> None:
    folder = folder_of(family)
    config = Config.make(model=str(folder), targets=targets, compute_dtype="fp32", lora_dropout=0.0)
    forecaster = Forecaster(config)
    assert forecaster.unfused is None
    base = load_base(str(folder), hardware, compute_dtype="fp32")
    config = forecaster.config
    model = wrapped(base.model, lora_config(config, find_targets(config, base.model)))
    engine = Engine(model, dtype=torch.float32, tokens=64)
    assert forecaster.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for sparing in (False, True):
        memory = Memory(64, 64, engine._inputs.packs_ways, 0, sparing)
        for ours, theirs in zip(forecaster._layers, engine.layers, strict=True):
            assert [ours.kept_bytes(memory, level) for level in Keep] == [
                theirs.kept_bytes(memory, level) for level in Keep
            ]
            assert ours.working_bytes(memory) == theirs.working_bytes(memory)
            assert [block.weight_bytes for block in ours.blocks] == [block.weight_bytes for block in theirs.blocks]
    assert forecaster._stored == [layer.stored_bytes for layer in engine.layers]
    assert forecaster._embedding == sum(place.tensor.nbytes for place in embedding_places(engine.decoder))
    inputs = (engine._inputs._fixed, engine._inputs._boundaries)
    assert engine._inputs.nbytes_of(64) == sum(tensor.nbytes for tensor in inputs)


@pytest.mark.parametrize(("family", "targets"), [("qwen3", "all-linear"), ("qwen3_moe", ("q_proj", "o_proj"))])
def test_sizes_in_fp8_are_those_of_the_loaded_model(
    family: str,
    targets: Any,
    folder_of: Callable[[str], Path],
    hardware: Hardware,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (engine_module, forecast_module):
        monkeypatch.setattr(module, "pays", lambda tokens, inputs, outputs, experts=0: outputs > 64 or experts)
    asked = {"targets": targets, "compute_dtype": "bf16", "lora_dropout": 0.0}
    config = Config.make(model=str(folder_of(family)), precision="fp8", **asked)
    base = load_base(str(config.model), hardware, compute_dtype="bf16")
    model, forecaster = wrapped(base.model, lora_config(config, find_targets(config, base.model))), Forecaster(config)
    engine = Engine(model, dtype=torch.bfloat16, tokens=64, fp8=True)
    assert 0 < engine.fp8_share < 1
    assert engine.fp8_share == forecaster._in_fp8(CARDS["H200"])
    monkeypatch.setattr("slimtune.engine.memory._Shape.spare", 1e9)  # so small models' heads weigh more than FP8 spares
    again = Engine(model, dtype=torch.bfloat16, tokens=64, fp8=True)
    told = forecaster._plan(CARDS["H200"], 64, 64, math.inf, None)
    assert 0 < told.turned_head == again.plan.turned_head
    memory = Memory(64, 64, engine._inputs.packs_ways, 0)
    for ours, theirs in zip(forecaster._layers, engine.layers, strict=True):
        assert ours.working_bytes(memory) == theirs.working_bytes(memory)
        assert [block.scratch for block in ours.blocks] == [block.scratch for block in theirs.blocks]
        assert [site.channels for site in ours.sites] == [site.channels for site in theirs.sites]
        for size in ("weight_bytes", "turned_bytes", "spared_bytes"):
            assert [getattr(block, size) for block in ours.blocks] == [getattr(block, size) for block in theirs.blocks]


def test_the_adapter_takes_what_its_tensors_take() -> None:
    engine = Engine(models.add_lora(models.make_base("qwen3")), dtype=torch.float32, tokens=64)
    state = FusedAdamW8bit(engine.flat)._moments
    codes = sum(tensor.nbytes for tensor in vars(state).values() if isinstance(tensor, Tensor))
    flat = engine.flat.data.nbytes + engine.flat.grad.nbytes + engine._sums.nbytes
    said = adapter_bytes([parameter.numel() for parameter in engine.flat.parameters])
    assert flat < said <= flat + codes


MOST = 1.02
"""Vectors of a number a token, and an adapter's own stacks, are in no plan: here a hundredth, in a large model none."""


@pytest.mark.parametrize(
    ("family", "budget", "ram", "adapted"),
    [
        ("llama", 0, 0, None), ("llama", 0, GIB, None), ("llama", GIB, 0, None), ("qwen3", 0, GIB, None),
        ("olmo2", 0, 0, None), ("olmo2", GIB, 0, None), ("llama", GIB, 0, [1]), ("llama", 0, GIB, [1]),
    ],
)  # fmt: skip
def test_a_step_takes_no_more_than_its_plan(
    family: str, budget: int, ram: int, adapted: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers below the lowest adapter keep nothing."""
    monkeypatch.setattr(attention_module, "_FILLING", 1)
    upper = {} if adapted is None else {"layers_to_transform": adapted, "target_modules": ["q_proj", "down_proj"]}
    model = models.add_lora(models.make_base(family), **upper)
    engine = Engine(model, dtype=torch.float32, tokens=1024, memory=budget, ram=ram)
    assert 0.8 < _taken_of_planned(model, engine) <= MOST


def test_what_attention_gave_is_in_the_plan_when_it_is_in_ram(monkeypatch: pytest.MonkeyPatch) -> None:

    def resident(*args: Any, **options: Any) -> MemoryPlan:
        return plan_memory(*args, **{**options, "stored": ()})

    monkeypatch.setattr(attention_module, "_FILLING", 1)
    monkeypatch.setattr(engine_module, "plan_memory", resident)
    monkeypatch.setattr(memory_module, "_ATTENDED", 1.0)
    monkeypatch.setattr(memory_module, "_ASIDES", (Keep.ATTENDED,))
    model = models.add_lora(models.make_base("llama"))
    engine = Engine(model, dtype=torch.float32, tokens=1024, memory=0, ram=GIB)
    assert engine.plan.keep == (Keep.ATTENDED, Keep.ATTENDED, Keep.INPUT)
    assert 0.8 < _taken_of_planned(model, engine) <= MOST


def _taken_of_planned(model: nn.Module, engine: Engine) -> float:
    """The most bytes that a step holds, as a share of the engine's plan."""
    return most_of_a_step(model, engine, tokens=1024) / (engine.plan.nbytes + engine.plan.spared_bytes)


def test_more_memory_takes_longer_documents(folder_of: Callable[[str], Path]) -> None:
    forecaster = Forecaster(Config.make(model=str(folder_of("qwen3")), max_length=512))
    rows = [forecaster.with_longest(Card(f"{size}", size << 20, (8, 0))) for size in (33, 120, 400)]
    assert [row.trains for row in rows] == [False, True, True]
    assert 0 < rows[1].longest < rows[2].longest
    assert rows[2].longest_ram > 0
    assert rows[0].nbytes > rows[0].budget
    assert all(row.nbytes <= row.budget for row in rows[1:])
    none = forecaster.with_longest(Card("a small one", 400 << 20, (8, 0)), ram=0)
    assert none.longest < rows[2].longest
    assert none.longest_ram == 0


def test_an_old_card_computes_in_fp16_by_another_kernel(folder_of: Callable[[str], Path]) -> None:
    forecaster = Forecaster(Config.make(model=str(folder_of("qwen3"))))
    assert set(forecaster._ways(CARDS["T4"]).values()) == {"efficient"}
    assert set(forecaster._ways(CARDS["H100"]).values()) == {"varlen"}


def test_an_adapter_that_begins_with_parts_of_the_base_has_its_size(folder_of: Callable[[str], Path]) -> None:
    config = Config.make(model=str(folder_of("qwen3")), quantization="none", lora_init="pissa")
    plain = config.model_copy(update={"lora_init": "default"})
    assert Forecaster(config).adapter_parameters == Forecaster(plain).adapter_parameters > 0


def test_a_base_that_fits_as_it_is_is_not_looked_at(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor one of the hub that was downloaded; of one that wasn't nobody knows."""
    local = Config.make(model=str(folder_of("qwen3")))
    size = sum(file.stat().st_size for file in Path(local.model).glob("*.safetensors"))
    assert _fits_in_16_bits(local, size)
    assert not _fits_in_16_bits(local, size - 1)
    monkeypatch.setattr(forecast_module, "HF_HUB_CACHE", str(tmp_path))
    hub = Config.make(model="somebody/a-model")
    assert not _fits_in_16_bits(hub, 1 << 40)
    blobs = tmp_path / "models--somebody--a-model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "weights").write_bytes(b"x" * 100)
    assert _fits_in_16_bits(hub, 100)
    assert not _fits_in_16_bits(hub, 99)


def test_what_the_engine_doesnt_take_is_said(folder_of: Callable[[str], Path]) -> None:
    forecaster = Forecaster(Config.make(model=str(folder_of("qwen3")), dora=True))
    assert forecaster.unfused == "the engine has nothing for DoRA"
    assert forecaster.weights > 0


def test_too_little_ram_is_said_before_anything_is_loaded(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("qwen3")
    card = Hardware("cuda", "a card", 2 * GIB, "bf16", "", 1)
    monkeypatch.setattr(Hardware, "capability", (8, 0))
    config = Config.make(model=str(folder), max_length=65536, micro_batch=1)
    forecaster, on = Forecaster(config), Card("a card", 2 * GIB, (8, 0))
    memory = f"{forecaster.forecast(on, 0).nbytes // 2**20 + 1}MiB"
    config = config.model_copy(update={"memory": memory})
    needed = forecaster.forecast(on, memory_budget(config))
    assert needed.trains
    assert needed.ram_bytes > 0
    monkeypatch.setattr(forecast_module, "ram_to_lock", lambda: needed.locked_bytes)
    streamed = names_in_ram(config, card)
    assert len(streamed) == 7 * needed.streamed_layers + bool(needed.embedding_bytes)
    assert all(forecaster.base.model.get_parameter(name).dim() == 2 for name in streamed)
    monkeypatch.setattr(forecast_module, "ram_to_lock", lambda: needed.locked_bytes // 4)
    with pytest.raises(UserError, match=r"documents of 65,536 tokens take \d+MiB of RAM beside \d+MiB") as refused:
        names_in_ram(config, card)
    assert "--max-length" in (refused.value.way_out or "")
    short = config.model_copy(update={"max_length": 2048, "memory": "1GiB"})
    assert names_in_ram(short, card) == frozenset()


def test_too_little_memory_is_said_before_anything_is_loaded(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the length that would do; it does."""
    card = Hardware("cuda", "a card", 2 * GIB, "bf16", "", 1)
    monkeypatch.setattr(Hardware, "capability", (8, 0))
    monkeypatch.setattr(forecast_module, "ram_to_lock", lambda: GIB)
    config = Config.make(model=str(folder_of("qwen3")), max_length=32768, memory="100MiB")
    with pytest.raises(UserError, match=r"100MiB is too little: documents of 32,768 tokens take 0\.\d+GiB") as refused:
        names_in_ram(config, card)
    found = re.search(r"--max-length (\d+)", refused.value.way_out)
    assert found is not None
    assert 0 < int(found[1]) < 32768
    shorter = config.model_copy(update={"max_length": int(found[1])})
    names_in_ram(shorter, card)
    assert Forecaster(shorter).forecast(Card("a card", 2 * GIB, (8, 0)), memory_budget(config)).trains
