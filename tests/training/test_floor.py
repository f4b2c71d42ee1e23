"""The work of a step, counted by hand and by torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from slimtune.training.floor import Floor, Work
from tests.training.tiny import tiny

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
COUNTED = ("llama", "qwen3_moe", "gemma3_text", "gpt2", "deepseek_v3", "gemma4_text")


@pytest.mark.parametrize("family", COUNTED)
def test_a_frozen_models_work_is_what_torch_counts_for_its_products(family: str) -> None:
    model = tiny(family).requires_grad_(False).eval()
    model.set_experts_implementation("eager")  # the counter knows no grouped products
    embedded = torch.randn(1, 24, 32, requires_grad=True)
    # Gemma 4 looks its tokens up a second time.
    ids = {"per_layer_inputs": torch.zeros(1, 24, 2, 8)} if family == "gemma4_text" else {}
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False, **ids).logits.sum().backward()
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    work = Work.of(model)
    assert work is not None
    linear = Work(work.linear, work.head, {}).flops([24], supervised=24)
    assert linear == pytest.approx(products, rel=1e-3)


def test_attention_counts_each_document_by_its_square_less_what_a_window_leaves_out() -> None:
    work = Work(linear=0, head=0, attention={None: 10})
    assert work.flops([6, 8], supervised=0) == 7.0 * 10 * (36 + 64)
    windowed = Work(linear=0, head=0, attention={None: 10, 4: 2})
    seen = sum(min(token + 1, 4) - 0.5 for token in range(8))  # the token itself counts half, as in a square's half
    assert windowed.flops([8], supervised=0) == pytest.approx(7.0 * (10 * 64 + 2 * 2 * seen), rel=0.05)


def test_layers_of_different_heads_count_each_its_own() -> None:
    assert Work.of(tiny("gemma4_text")).attention == {8: 4 * 8, None: 4 * 16}  # type: ignore[union-attr]
    assert Work.of(tiny("deepseek_v3")).attention == {None: 2 * 4 * (16 + 8) // 2}  # type: ignore[union-attr]


def test_a_config_without_the_usual_names_is_no_reason_to_stop() -> None:
    model = tiny("llama")
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    work = Work.of(model)
    assert work is not None
    assert work.linear == Work.of(tiny("llama")).linear  # type: ignore[union-attr]
    assert not work.attention  # its heads are told by nothing


def test_a_model_whose_experts_dont_say_how_many_a_token_takes_has_no_floor() -> None:
    model = tiny("qwen3_moe")
    del model.config.num_experts_per_tok
    for module in model.modules():
        if hasattr(module, "top_k"):
            del module.top_k
    assert Work.of(model) is None
    assert Floor.measure(model, torch.float32, tokens=64) is None


def test_the_floor_is_the_work_at_the_measured_rate() -> None:
    floor = Floor.measure(LlamaForCausalLM(CONFIG), torch.float32, tokens=64)
    assert floor is not None
    assert floor.flops_per_second > 0
    assert floor.seconds([24], 24) == floor.work.flops([24], 24) / floor.flops_per_second
