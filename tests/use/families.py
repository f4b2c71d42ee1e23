"""Small random models of the kinds of architecture that decode differently, with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from slimtune.use.load import Found, Opened

STOP = 2
FIRST = 3
"""The first of the 256 bytes' ids."""
VOCABULARY = FIRST + 256
WINDOW = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": STOP,
}
_WINDOW = {"sliding_window": WINDOW}
_ALTERNATE = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}
_MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW,
    "gemma3_text": _ALTERNATE,
    # A window, other heads in the layers without one, and layers that use another's keys.
    "gemma4_text": {**_WINDOW, "global_head_dim": 32, "num_global_key_value_heads": 1, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "gpt_oss": {**_ALTERNATE, **_EXPERTS},
    "qwen3_moe": _EXPERTS,
    "llama4_text": {**_EXPERTS, "attention_chunk_size": WINDOW, "num_hidden_layers": 4, "intermediate_size_mlp": 96},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen3_5_text": {**_DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": _MAMBA,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "deepseek_v32": {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32, "num_key_value_heads": 4},
}  # fmt: skip
FAMILIES = tuple(name for name in _OWN if name != "deepseek_v32")
"""Those of which many rows can be computed together."""


def make_model(family: str) -> Any:
    """A model in eval mode whose replies differ with what it was asked: norms, biases and sinks are random too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **_OWN[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name or "sinks" in name:
            parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval().requires_grad_(False)


def make_opened(family: str) -> Opened:
    """The same as the verbs have it."""
    return Opened(Found(family, Path(family), None, None), make_model(family), byte_tokenizer(), (STOP,))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: FIRST + at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Random tokens, the first ``shared`` of each the same."""
    draw = torch.Generator().manual_seed(5)
    start = torch.randint(FIRST, VOCABULARY, (shared,), generator=draw).tolist()
    return [start + torch.randint(FIRST, VOCABULARY, (n - shared,), generator=draw).tolist() for n in lengths]


@torch.inference_mode()
def greedy(opened: Opened, prompt: list[int], tokens: int) -> list[int]:
    """What the model says to ``prompt`` alone, computed from the first token at every step, without any cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        token = int(opened.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == STOP:
            break
        ids.append(token)
    return ids[len(prompt) :]
