"""A step over one pack on the plain path: slimtune's attention by lengths, and Transformers' own masks.

    python benchmarks/packs.py

A few layers of two shapes, bf16, forward and backward of a pack of 8,192 tokens of chats (16 to 2,048 tokens, 370 on
average). Prints milliseconds a step and the peak of the GPU's memory, and what the proof of isolation takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from torch import nn

from slimtune.batch import LENGTHS, MicroBatch
from slimtune.training.isolation import find_layout
from slimtune.training.layout import Layout

TOKENS = 8192
STEPS = 10
SHAPES = {
    "llama, 4 layers": transformers.LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "gpt-oss, 4 layers": transformers.GptOssConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=4, num_experts_per_tok=2,
    ),
}  # fmt: skip


def pack() -> MicroBatch:
    """Chats until the pack is full; the last one is cut."""
    random, lengths = np.random.default_rng(0), [0]
    while sum(lengths) < TOKENS:
        length = int(np.clip(random.lognormal(np.log(370) - 0.405, 0.9), 16, 2048))
        lengths.append(min(length, TOKENS - sum(lengths)))
    ids = random.integers(5, 1000, TOKENS)
    return MicroBatch(ids, ids.copy(), tuple(lengths[1:]))


def by_layout(model: nn.Module, layout: Layout, micro: MicroBatch) -> None:
    with layout.passed(micro.inputs()) as passed:
        inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in passed.items()}
        model(**inputs, use_cache=False).loss.backward()
    model.zero_grad()


def by_transformers(model: nn.Module, micro: MicroBatch) -> None:
    inputs = {key: value.cuda() for key, value in micro.inputs().items() if key != LENGTHS}
    model(**inputs, use_cache=False).loss.backward()
    model.zero_grad()


def measured(step: Callable[[], None]) -> str:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - begin) * 1000 / STEPS
    return f"{milliseconds:.1f} ms, {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"


def compare(name: str, config: transformers.PretrainedConfig, micro: MicroBatch) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
    find_layout(model, dtype=torch.bfloat16)  # compiles and loads its kernels
    begin = time.perf_counter()
    layout = find_layout(model, dtype=torch.bfloat16).layout
    print(f"{name}: {layout.kind}, proof {time.perf_counter() - begin:.2f} s")
    print("  slimtune's attention:", measured(lambda: by_layout(model, layout, micro)))
    print("  Transformers' masks:", measured(lambda: by_transformers(model, micro)))


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__)
    micro = pack()
    for name, config in SHAPES.items():
        compare(name, config, micro)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
