"""The work of a step, counted by hand and by torch."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from slimtune.training.floor import Floor, Work

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def test_a_frozen_models_work_is_what_torch_counts_for_its_products() -> None:
    model = LlamaForCausalLM(CONFIG).requires_grad_(False)
    embedded = torch.randn(1, 24, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    work = Work.of(model)
    assert work.flops([24], supervised=24) - 7.0 * work.attention * 24**2 == products


def test_attention_counts_each_document_by_its_square() -> None:
    work = Work(linear=0, head=0, attention=10)
    assert work.flops([6, 8], supervised=0) == 7.0 * 10 * (36 + 64)


def test_the_floor_is_the_work_at_the_measured_rate() -> None:
    floor = Floor.measure(LlamaForCausalLM(CONFIG), torch.float32, tokens=64)
    assert floor.flops_per_second > 0
    assert floor.seconds([24], 24) == floor.work.flops([24], 24) / floor.flops_per_second
