"""Memory plans: within their budget, faster with more of it, and down to the layers' inputs."""

from __future__ import annotations

import math
import weakref
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from slimtune.engine import Engine
from slimtune.engine.attention import Way
from slimtune.engine.blocks import Keep, Memory, MlpBlock
from slimtune.engine.blocks.attention import AttentionBlock
from slimtune.engine.blocks.branch import BranchComputation
from slimtune.engine.blocks.experts import ExpertsBlock
from slimtune.engine.decoder import LayerComputation, computations
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.read import read_decoder
from slimtune.engine.weights import Site
from tests.engine import models

VOCABULARY, TOKENS, LONGEST = 151936, 16384, 2048
RESULT = 65536 * (2048 + 8) * 2 + 4 * 16 * 65536
"""Of attention in a layer of the 1.8B over 65,536 tokens: o's input, and a logarithm for each head."""


def layers_of(hidden: int, intermediate: int, count: int, heads: int) -> list[LayerComputation]:
    """A model's layers, without weights."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=count,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "o_proj"]))
    made = computations(read_decoder(model), torch.bfloat16, torch.device("meta"))
    return [layer for layer in made if layer is not None]


def planned(
    layers: list[LayerComputation], tokens: int, vocabulary: int, budget: float = math.inf,
    *, longest: int | None = None, way: Way = "varlen", ram: int = 0, **weights: Any,
) -> MemoryPlan:  # fmt: skip
    ways = {layer.layer.attention.kind: way for layer in layers}
    return plan_memory(layers, tokens, vocabulary, budget, longest=longest, ways=ways, ram=ram, **weights)


@pytest.fixture(scope="module")
def layers() -> list[LayerComputation]:
    """Qwen1.5-1.8B's shape."""
    return layers_of(2048, 5504, 24, 16)


@pytest.fixture(scope="module")
def small_layers() -> list[LayerComputation]:
    """SmolLM2-135M's shape, but for shared kv heads."""
    return layers_of(576, 1536, 30, 9)


def test_weights_that_are_all_kept_need_no_buffer(layers: list[LayerComputation]) -> None:
    plan = planned(layers, TOKENS, VOCABULARY, math.inf, longest=LONGEST)
    assert plan.kept_weights == len(layers)
    ways: dict[Any, Way] = {layer.layer.attention.kind: "varlen" for layer in layers}
    memory = Memory(plan.part_tokens, plan.mlp_tokens, ways, plan.padded_room, plan.sparing)
    work = layers[-1].working_bytes(memory) - layers[-1].kept_bytes(memory, Keep.ATTENTION)
    head = 2 * (plan.head_tokens * (VOCABULARY + 4 * 2048) + 3 * TOKENS * 2048)
    assert plan.nbytes == plan.kept_bytes + max(head, work)


def test_plenty_keeps_everything(layers: list[LayerComputation]) -> None:
    plan = planned(layers, TOKENS, VOCABULARY, math.inf, longest=LONGEST)
    assert set(plan.keep) == {Keep.ALL}
    assert plan.kept_weights == 24
    assert plan.part_tokens == TOKENS


@pytest.mark.parametrize("way", ["varlen", "efficient"])
@pytest.mark.parametrize("gigabytes", [1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0])
def test_stays_within_its_budget(layers: list[LayerComputation], gigabytes: float, way: Way) -> None:
    plan = planned(layers, TOKENS, VOCABULARY, gigabytes * 1e9, longest=LONGEST, way=way)
    assert plan.nbytes <= gigabytes * 1e9
    assert plan.part_tokens >= LONGEST
    memory = Memory(plan.part_tokens, plan.mlp_tokens, {layers[0].layer.attention.kind: way}, plan.padded_room)
    kept = sum(layers[0].kept_bytes(memory, level) for level in plan.keep)
    assert kept + plan.kept_weights * sum(site.kept_bytes for site in layers[0].sites) < plan.nbytes


def test_keeps_the_inputs_alone_when_there_is_no_more_room(layers: list[LayerComputation]) -> None:
    plan = planned(layers, TOKENS, VOCABULARY, 0.0, longest=LONGEST)
    assert set(plan.keep) == {Keep.INPUT}
    assert plan.kept_weights == 0
    assert plan.part_tokens == LONGEST


def test_inputs_go_to_ram_where_nothing_else_fits(layers: list[LayerComputation]) -> None:
    """A long document: without RAM as small as it may be, and with it the same but for its layers' inputs."""
    stream = 65536 * 2048 * 2
    least = planned(layers, 65536, VOCABULARY, 0.0)
    assert least.in_ram == ()
    plenty = planned(layers, 65536, VOCABULARY, least.nbytes, ram=1 << 40)
    assert plenty == planned(layers, 65536, VOCABULARY, least.nbytes)
    away = planned(layers, 65536, VOCABULARY, 0.0, ram=1 << 40)
    assert away.in_ram == tuple(range(23))  # the last one's backward comes at once
    assert away.ram_bytes == 23 * stream
    assert away.nbytes == least.nbytes - 22 * stream  # one is on its way
    some = planned(layers, 65536, VOCABULARY, 0.0, ram=5 * stream + 1)
    assert some.in_ram == (0, 1, 2, 3, 4)
    assert some.nbytes == least.nbytes - 5 * stream  # the most is taken before the first of them comes back


def test_what_room_is_left_beside_inputs_in_ram_is_used(layers: list[LayerComputation]) -> None:
    least = planned(layers, 65536, VOCABULARY, 0.0, ram=1 << 40)
    budget = least.nbytes + 5e9
    plan = planned(layers, 65536, VOCABULARY, budget, ram=1 << 40)
    assert plan.nbytes <= budget
    assert plan.keep[0] < Keep.GATES
    assert plan.keep[-1] > plan.keep[0] or plan.kept_weights
    assert all(plan.keep[index] == plan.keep[0] for index in plan.in_ram)


def test_what_attention_gave_goes_to_ram_too_where_documents_are_long(layers: list[LayerComputation]) -> None:
    """Inputs first, as they must; then it, where there is RAM to spare and the device has room for what is coming."""
    stream, result = 65536 * 2048 * 2, RESULT
    least = planned(layers, 65536, VOCABULARY, 0.0, ram=1 << 40)
    budget, must = least.nbytes + result, 23 * stream
    some = planned(layers, 65536, VOCABULARY, budget, ram=must + 3 * result)
    assert some.keep == (Keep.ATTENDED,) * 3 + (Keep.INPUT,) * 21
    assert some.ram_sizes == (stream + result,) * 3 + (stream,) * 20
    assert some.spare_ram_bytes == 3 * result
    assert some.nbytes == budget
    for less in (planned(layers, 65536, VOCABULARY, budget, ram=1 << 40, lavish=False),
                 planned(layers, 65536, VOCABULARY, budget - result // 2, ram=1 << 40)):  # fmt: skip
        assert less.in_ram == some.in_ram
        assert less.ram_bytes == must
        assert less.spare_ram_bytes == 0
    # Of short ones it takes no time that counts, and of one of all layers' nothing is kept alone.
    short = planned(layers, 65536, VOCABULARY, budget, longest=2048, ram=1 << 40)
    assert Keep.ATTENDED not in short.keep


def test_what_attention_gave_goes_to_ram_beside_streamed_weights(layers: list[LayerComputation]) -> None:
    weights: dict[str, Any] = {"stored": [1 << 26] * 24, "ram": 1 << 40}
    inputs = planned(layers, 65536, VOCABULARY, 0.0, ram=1 << 40)
    plan = planned(layers, 65536, VOCABULARY, inputs.nbytes - 3e8, **weights)
    assert len(plan.streamed) > 0
    assert plan.attended_in_ram == len(plan.in_ram) == 23
    needed = planned(layers, 65536, VOCABULARY, inputs.nbytes - 3e8, lavish=False, **weights)
    assert len(needed.streamed) > 0
    assert needed.attended_in_ram == 0


def test_a_device_with_room_keeps_what_attention_gave_of_long_documents(layers: list[LayerComputation]) -> None:
    least = planned(layers, 65536, VOCABULARY, 0.0)
    plans = [planned(layers, 65536, VOCABULARY, least.nbytes + more * 24 * RESULT) for more in (0, 0.5, 1.2)]
    assert [min(plan.keep) for plan in plans] == [Keep.INPUT, Keep.INPUT, Keep.ATTENDED]
    assert set(plans[1].keep) == {Keep.INPUT, Keep.ATTENDED}
    assert not any(plan.in_ram for plan in plans)


def test_ranks_of_a_host_have_weights_in_ram_once(layers: list[LayerComputation]) -> None:
    """Each of four needs a quarter of the RAM for weights, and the whole of its own for inputs."""
    weights: dict[str, Any] = {"stored": [1 << 26] * 24, "embedding": 1 << 29}
    whole = (24 << 26) + (1 << 29)
    alone = planned(layers, 2048, VOCABULARY, -math.inf, ram=whole, **weights)
    assert (alone.streamed_bytes, alone.embedding_bytes) == (24 << 26, 1 << 29)
    assert planned(layers, 2048, VOCABULARY, -math.inf, ram=whole // 4, sharing=4, **weights) == alone
    less = planned(layers, 2048, VOCABULARY, -math.inf, ram=whole // 4 - 1, sharing=4, **weights)
    assert less.streamed_bytes < alone.streamed_bytes
    stream = 2048 * 2048 * 2
    inputs = planned(layers, 2048, VOCABULARY, -math.inf, ram=whole // 4 + 5 * stream, sharing=4, **weights)
    assert (inputs.ram_bytes, inputs.streamed_bytes) == (5 * stream, alone.streamed_bytes)


def test_documents_are_never_cut(layers: list[LayerComputation]) -> None:
    assert planned(layers, TOKENS, VOCABULARY, 2e9).part_tokens == TOKENS
    assert planned(layers, 3000, VOCABULARY, 1e9, longest=2000).part_tokens >= 2000


def test_a_small_model_gives_the_memory_efficient_kernel_room_for_all_documents(
    small_layers: list[LayerComputation],
) -> None:
    """A graph needs it, and a host takes longer to launch so small a model's kernels than they do."""
    plenty, tight = (
        planned(small_layers, 2048, 49152, budget, longest=1024, way="efficient") for budget in (14e9, 0.3e9)
    )
    assert plenty.padded_room >= 64 * 1024
    assert plenty.nbytes <= 14e9
    assert tight.padded_room == 0
    assert tight.nbytes <= 0.3e9
    assert planned(small_layers, 2048, 49152, 14e9, longest=1024).padded_room == 0


def _storages(owner: Any, found: dict[int, int]) -> int:
    """Bytes of all tensors that an object holds, each memory counted once."""
    if isinstance(owner, torch.Tensor):
        found[owner.untyped_storage().data_ptr()] = owner.untyped_storage().nbytes()
    parts = owner.values() if isinstance(owner, dict) else owner if isinstance(owner, list | tuple) else ()
    if is_dataclass(owner):
        parts = [getattr(owner, each.name) for each in fields(owner)]
    for part in parts:
        _storages(part, found)
    return sum(found.values())


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma4-12b", "gemma4-26b", "gemma4-e2b", "gpt_oss", "qwen3_5_moe_text", "qwen3_next"]
)
def test_layers_keep_what_they_said_to_the_byte(family: str) -> None:
    """What one layer lends to others too, and what those collect for it."""
    model = models.add_lora(models.make_base(family))
    engine = Engine(model, dtype=torch.float32, tokens=64)
    key = engine._inputs.load(micro := engine._micro_batch(models.pack()), 1)
    memory = Memory(64, 64, engine._inputs.packs_ways, 0)
    beside = engine._per_layer
    for level in Keep:
        on = engine._pass(micro, key, training=True)
        with torch.no_grad():
            x, _, saved = engine._forward(key, on, (level,) * len(engine.layers))
            kept = _storages([saved, on.lent], {})
            engine._backward(torch.ones_like(x), saved, on)
        collected = _storages([lent.collected for lent in on.lent.values()], {})
        said = sum(layer.kept_bytes(memory, level) for layer in engine.layers)
        if beside is not None:
            said += beside.kept_bytes(memory) - beside.site.kept_bytes  # its weight lies in no pass
        assert kept + collected == said


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_nothing_is_held_beside_what_a_layer_needs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer was given is gone while its attention computes, but for what it keeps; a chunk's gates are when the
    next one's are there."""
    given: list[weakref.ref[torch.Tensor]] = []
    gates: list[weakref.ref[torch.Tensor]] = []
    enter, attend = BranchComputation.enter, AttentionBlock.forward
    gate, project = ExpertsBlock._gates, Site.forward

    def entered(self: Any, stream: list[torch.Tensor], *, own: bool = False) -> Any:
        given[:] = [weakref.ref(each) for each in stream[1:] if own]
        return enter(self, stream, own=own)

    def attended(self: Any, n: torch.Tensor, on: Any, keep: Any) -> Any:
        assert [each() for each in given] == [None] * len(given)
        seen.append(len(given))
        return attend(self, n, on, keep)

    def gated(self: Any, n: torch.Tensor, weight: torch.Tensor) -> Any:
        assert all(each() is None for each in gates)
        made = gate(self, n, weight)
        gates.append(weakref.ref(made[1]))
        return made

    def projected(self: Site, *args: Any, **options: Any) -> torch.Tensor:
        gated = any(self is block.gate_up for block in feeding)
        assert not gated or all(each() is None for each in gates)
        made = project(self, *args, **options)
        if gated:
            gates.append(weakref.ref(made))
        return made

    monkeypatch.setattr(BranchComputation, "enter", entered)
    monkeypatch.setattr(AttentionBlock, "forward", attended)
    monkeypatch.setattr(ExpertsBlock, "_gates", gated)
    monkeypatch.setattr(Site, "forward", projected)
    seen: list[int] = []
    engine = Engine(models.add_lora(models.make_base(family)), dtype=torch.float32, tokens=64)
    feeding = [block for layer in engine.layers for block in layer.blocks if isinstance(block, MlpBlock)]
    engine.plan = replace(engine.plan, keep=(Keep.INPUT,) * len(engine.layers), mlp_tokens=16)
    engine.forward_backward(models.pack(), 64)
    assert sum(seen) == len(engine.layers) - 1
    assert len(gates) >= 4 * len(engine.layers)
