"""Models of many families, made from configs: two layers, a few thousand weights besides the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

__all__ = ["FAMILIES", "saved", "tiny"]

_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen3_moe": _SIZES | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _SIZES
    | {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "granite": _SIZES | {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere2": _SIZES | _WINDOWED | {"logit_scale": 0.25},
    "gemma2": _SIZES | _WINDOWED | {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": _SIZES | _WINDOWED,
    "gemma4_text": _SIZES
    | _WINDOWED
    | {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
    | {"num_kv_shared_layers": 0, "final_logit_softcapping": 1.0},
    "llama4_text": _SIZES
    | {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    | {"attention_chunk_size": 256},
    "recurrent_gemma": _SIZES
    | {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]}
    | {"logits_soft_cap": 150.0},
    "gpt2": {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
    "deepseek_v3": _SIZES
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}


def tiny(family: str, **settings: Any) -> Any:
    """A random model in fp32. Its weights are larger than at a training's start, so that what scales logits shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def saved(folder: Path, family: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Path:
    """:func:`tiny` with a tokenizer, as a checkpoint of its own."""
    vocabulary = {"vocab_size": len(tokenizer)}
    if "vocab_size_per_layer_input" in FAMILIES[family]:
        vocabulary["vocab_size_per_layer_input"] = len(tokenizer)
    tiny(family, **vocabulary, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
