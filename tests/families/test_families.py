"""A dozen families, unlike each other: gradients, reading back, merging, a reply; mixtures in 4 bits as published.

All the others that Transformers has are tried by ``make families``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimtune.base.quantize import four_bit_share
from tests import tolerances
from tests.families.check import check

FAMILIES = (
    "llama", "phi3", "qwen3_moe", "gpt_oss", "gemma4_text", "qwen3_5_text", "granitemoehybrid", "deepseek_v3", "lfm2",
    "mixtral", "falcon_h1", "gemma3",
)  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_trains_as_plain_peft_does(model_type: str, tmp_path: Path) -> None:
    proof = check(model_type, tmp_path)
    assert proof.faults == {}
    assert set(proof.refused) <= {"gguf"}, proof.refused
    assert proof.gradient is not None
    assert proof.gradient < tolerances.FAMILY_GRADIENT
    assert proof.reload is not None
    assert proof.reload < tolerances.FAMILY_LOGITS
    assert proof.trained_4bit
    assert (proof.merge, proof.chat) == ("yes", "yes")


# Sizes as published, by hand; what isn't named is the class's default.
PUBLISHED: dict[str, dict[str, Any]] = {
    # Qwen3-30B-A3B
    "qwen3_moe": {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "intermediate_size": 6144, "vocab_size": 151936,
    },
    # Mixtral 8x7B
    "mixtral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000,
    },
    # gpt-oss-20b
    "gpt_oss": {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "vocab_size": 201088,
    },
    # GLM-4.5-Air
    "glm4_moe": {
        "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128, "moe_intermediate_size": 1408,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "vocab_size": 151552,
    },
    # MiniMax-M2
    "minimax_m2": {
        "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62, "num_attention_heads": 48,
        "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256, "vocab_size": 200064,
    },
    # Granite 3.1 3B-A800M
    "granitemoe": {
        "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 24,
        "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8, "vocab_size": 49155,
    },
    # DeepSeek-V3
    "deepseek_v3": {
        "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "vocab_size": 129280,
    },
    # Qwen3-Next-80B-A3B
    "qwen3_next": {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "num_experts": 512, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "vocab_size": 151936,
    },
    # Qwen3.5-35B-A3B
    "qwen3_5_moe_text": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "num_experts": 256, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "vocab_size": 248320,
    },
    # OLMoE-1B-7B
    "olmoe": {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_mixtures_lie_in_4_bits_as_published(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**PUBLISHED[model_type]))
    assert four_bit_share(model) >= 0.97
