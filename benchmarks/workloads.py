"""The benchmarks' models and workloads: weights and tokens are random, since speed and memory don't depend on them.

Sizes are those of Qwen1.5-1.8B, Qwen2.5-7B, Llama-3.1-8B and Llama-3.1-70B. W1 to W4 are rows of tokens or chats of
varied length; every document is supervised whole, as a trainer without chat masks does it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SIZES: dict[str, dict[str, Any]] = {
    "1.8b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Workload:
    """What one micro-batch holds; one micro-batch is one optimizer step."""

    name: str
    size: str
    rows: int
    length: int
    targets: tuple[str, ...] | str = ATTENTION
    r: int = 8
    dropout: float = 0.05
    chats: bool = False
    """Documents of 16 to ``length`` tokens, log-normal, mean about 370 at 2048, instead of full rows."""

    def document_lengths(self, steps: int, seed: int = 0) -> list[int]:
        """Tokens of each document of ``steps`` steps of ``rows`` documents."""
        rng = random.Random(seed)
        if not self.chats:
            return [self.length] * (self.rows * steps)
        return [max(16, min(self.length, int(rng.lognormvariate(0, 0.7) * 300))) for _ in range(self.rows * steps)]


WORKLOADS = {
    "W1": Workload("W1", "1.8b", 8, 2048),
    "W1-all": Workload("W1-all", "1.8b", 8, 2048, targets="all-linear", r=16, dropout=0.0),
    "W2": Workload("W2", "1.8b", 2, 512),
    "W3": Workload("W3", "1.8b", 8, 2048, chats=True),
    "W4": Workload("W4", "7b", 4, 2048),
    "8b-all": Workload("8b-all", "8b", 2, 4096, targets="all-linear", r=16, dropout=0.0),
    "8b-long": Workload("8b-long", "8b", 1, 65536, targets="all-linear", r=16, dropout=0.0),
    "tiny": Workload("tiny", "tiny", 2, 64),
    "tiny-chats": Workload("tiny-chats", "tiny", 4, 64, chats=True),
}


def make_model(
    size: str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, nf4: bool = True, seed: int = 0
) -> nn.Module:
    """A random Qwen2 of this size on the GPU (or the CPU), quantised as its weights are drawn."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = {**SIZES[size], "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": False}
    if layers is not None:
        values["num_hidden_layers"] = layers
    config = Qwen2Config(**values, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype=dtype)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for name, module in list(model.named_modules()):
        for part, parameter in list(module.named_parameters(recurse=False)):
            spread = 0.02 if parameter.ndim > 1 else 0.1
            value = torch.randn(parameter.shape, device=device, dtype=dtype) * spread + (
                part == "weight" and parameter.ndim == 1
            )
            setattr(module, part, nn.Parameter(value, requires_grad=False))
        if nf4 and isinstance(module, nn.Linear) and name != "lm_head":
            _quantize(model, name, module, dtype)
    if nf4:
        _side_by_side(model)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    model.is_loaded_in_4bit = nf4
    model.config.use_cache = False
    return model


def _side_by_side(model: nn.Module) -> None:
    """As slimtune's loader leaves the weights: each layer's in a block of its own."""
    from slimtune.base.shelves import Shelves
    from slimtune.engine.stored import places_of

    packed = {name: each for name, each in model.named_parameters() if hasattr(each, "quant_state")}
    shelves = Shelves({name: [x.tensor.nbytes for x in places_of(each)] for name, each in packed.items()})
    for name, each in packed.items():
        shelves.place(name, each)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _quantize(model: nn.Module, name: str, module: nn.Linear, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    device = module.weight.device
    new = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    new.weight = bnb.nn.Params4bit(
        module.weight.data.cpu() if device.type == "cpu" else module.weight.data, requires_grad=False, quant_type="nf4"
    ).to(device)
    new.bias = module.bias
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def add_lora(model: nn.Module, workload: Workload) -> nn.Module:
    """PEFT's LoRA in float32, with a B that is not zero, so that every gradient is."""
    from peft import LoraConfig, get_peft_model

    targets = workload.targets if isinstance(workload.targets, str) else list(workload.targets)
    config = LoraConfig(
        r=workload.r, lora_alpha=2 * workload.r, lora_dropout=workload.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return wrapped


def packs(workload: Workload, steps: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """``steps`` packed micro-batches of rows x length tokens, filled in order, the rest padding as a document."""
    generator = torch.Generator().manual_seed(seed)
    room = workload.rows * workload.length
    vocabulary = min(150000, SIZES[workload.size]["vocab_size"])
    pending = workload.document_lengths(steps * 8 if workload.chats else steps, seed)
    batches = []
    for _ in range(steps):
        lengths: list[int] = []
        while pending and sum(lengths) + pending[0] <= room:
            lengths.append(pending.pop(0))
        used = sum(lengths)
        ids = torch.randint(4, vocabulary, (1, room), generator=generator)
        labels = ids.clone()
        parts = [torch.arange(length) for length in lengths]
        if used < room:
            parts.append(torch.arange(room - used))
            ids[:, used:] = 0
            labels[:, used:] = -100
        positions = torch.cat(parts)[None]
        labels[positions == 0] = -100
        batches.append({"input_ids": ids, "labels": labels, "position_ids": positions, "real_tokens": used})
    return batches
