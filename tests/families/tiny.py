"""Tiny models of any architecture that Transformers knows, with random weights and a tokenizer of 260 tokens.

A configuration is the class's own default, its sizes shrunk by name: it keeps experts, windows, latent attention, state
spaces and linear attention where the family has them, and takes no table of families.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from slimtune.base.packed import Mxfp4Tensor

__all__ = ["made", "save", "skeleton", "small_config", "tokenizer"]

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
VOCABULARY = 256 + len(SPECIAL)
HIDDEN, LAYERS, HEADS = 64, 4, 4

# fmt: off
SIZES: dict[str, Any] = {
    # width and depth
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN, "hidden_dim": HIDDEN,
    "lru_width": HIDDEN, "word_embed_proj_dim": HIDDEN, "attention_hidden_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "intermediate_size": 128, "n_inner": 128, "ffn_dim": 128, "ffn_hidden_size": 128, "ffn_hidden": 128,
    "block_ff_dim": 128, "dim_ff": 128, "shared_intermediate_size": 64, "initializer_range": 0.1,
    # attention
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_key_value_heads": 2, "num_kv_heads": 2,
    "head_dim": 16, "attention_head_dim": 16, "attn_head_dim": 16, "dim_head": 16, "rotary_dim": 8,
    "sliding_window": 16, "attention_window_size": 16, "max_position_embeddings": 512, "n_positions": 512,
    "n_ctx": 512, "max_seq_len": 512,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_head_dim": 32, "o_lora_rank": 64, "o_groups": 2, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 16,
    # linear attention, state spaces and convolutions
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "mamba_d_ssm": 128, "mamba_dt_rank": 64, "n_mamba_heads": 2, "mamba_ngroups": 1,
    "mamba_n_groups": 1, "n_groups": 1, "ssm_state_size": 16, "state_size": 16, "num_heads": 8, "expand": 2,
    "chunk_size": 16, "mamba_chunk_size": 16, "time_step_rank": 64, "conv_L_cache": 3, "num_mem_blocks": 2,
    "adapter_rank": 64,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    "expert_ffn_hidden_size": 64, "n_shared_experts": 1, "num_shared_experts": 1, "zero_expert_num": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "router_hidden_size": 64,
    # inputs of each layer's own
    "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 64,
    "num_kv_shared_layers": 0, "num_nextn_predict_layers": 0, "mtp_num_hidden_layers": 0,
    "ple_embed_dim": 64, "ple_lowrank": 64, "hc_lowrank": 64, "ngram_vocab_size_base": 100, "heads_per_ngram": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "depth": 2,
    "num_heads": 2, "embed_dim": 64, "image_size": 16, "patch_size": 4, "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
    "num_key_value_heads": 2, "head_dim": 32, "hidden_dim": 64, "position_embedding_size": 16,
    "projector_input_dim": 64, "projector_output_dim": HIDDEN, "vision_output_dim": 64, "projection_dim": HIDDEN,
    "output_dim": HIDDEN, "adapter_in_dim": 64, "adapter_out_dim": HIDDEN, "adapter_input_size": 64,
    "initializer_range": 0.1,
}
BYTES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "intermediate_size": 128, "initializer_range": 0.1, "max_position_embeddings": 512,
}
HYBRID = ["sliding_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_size": [3], "encoder_hash_byte_group_vocab": 64, "patching_mode": "space",
        "encoder_config": {**BYTES, "cross_attn_k": 2, "hidden_size_global": 2 * HIDDEN},
        "decoder_config": {**BYTES, "cross_attn_k": 2, "hidden_size_global": 2 * HIDDEN},
        "global_config": {**BYTES, "hidden_size": 2 * HIDDEN}, "patcher_config": BYTES,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon": {"new_decoder_architecture": False, "num_kv_heads": HEADS},
    "gemma3n_text": {
        "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4, "layer_types": HYBRID * 2,
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2],
        },
    },
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "glm_ocr_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "logits_scaling": 4.0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 64,
    },
    "kosmos_2_5_text_model": {"embed_dim": HIDDEN, "layers": LAYERS, "attention_heads": HEADS},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_hidden_layers": 2},
    "ministral": {"layer_types": HYBRID * 2, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]}},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "rwkv": {"attention_hidden_size": HIDDEN},
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, four special ones, and ChatML as its template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pad, start, end, unknown = SPECIAL
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, bos_token=start, eos_token=end, unk_token=unknown, model_max_length=512
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def small_config(model_type: str) -> PretrainedConfig:
    """The configuration of a tiny model of this type."""
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    values = _shrunk(defaults, SIZES, model_type)
    for key, value in defaults.items():
        if not isinstance(value, dict) or not value.get("model_type") or key in OWN.get(model_type, {}):
            continue
        kind = value["model_type"]
        if key == "text_config":
            values[key] = {"model_type": kind, **_shrunk(CONFIG_MAPPING[kind]().to_dict(), SIZES, kind)}
        else:
            values[key] = {"model_type": kind, **_shrunk(value, TOWER, kind)}
    return CONFIG_MAPPING[model_type](**values)


def _shrunk(defaults: dict[str, Any], sizes: dict[str, Any], model_type: str) -> dict[str, Any]:
    values = {
        key: sizes[key]
        for key, value in defaults.items()
        if key in sizes and (value is not None or key.endswith("token_id"))
    }
    every_head = defaults.get("num_attention_heads")
    if every_head is not None and defaults.get("num_key_value_heads") == every_head and "num_attention_heads" in sizes:
        values["num_key_value_heads"] = sizes["num_attention_heads"]
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(kinds := defaults.get(key), list):
            each = list(dict.fromkeys(kinds))
            values[key] = (each * LAYERS)[: max(LAYERS, len(each))]
            values["num_hidden_layers"] = len(values[key])
    # What is compared must not be drawn: GPT-2's and others' bases drop by default.
    values |= {key: 0.0 for key, value in defaults.items() if re.search("dropout|pdrop", key) and type(value) is float}
    return values | OWN.get(model_type, {})


def made(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The model in fp32. What a fresh model holds as a constant, as norms and decays, gets noise too."""
    torch.manual_seed(seed)
    model = _fresh(model_type)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.05)
            elif parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model


def with_mxfp4(model: nn.Module) -> nn.Module:
    """Stacks of experts in MXFP4, as gpt-oss is published, of numbers as large as those that they replace."""
    draw = torch.Generator().manual_seed(3)
    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                stack, columns, rows = parameter.shape
                blocks = torch.randint(0, 256, (stack, rows, columns // 32, 16), dtype=torch.uint8, generator=draw)
                scales = torch.randint(118, 123, blocks.shape[:3], dtype=torch.uint8, generator=draw)
                packed = Mxfp4Tensor.of_files(blocks, scales, parameter.dtype)
                setattr(module, own, nn.Parameter(packed, requires_grad=False))
    return model


def skeleton(model_type: str) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, no numbers."""
    with torch.device("meta"):
        return _fresh(model_type)


def _fresh(model_type: str) -> PreTrainedModel:
    # As published: Qwen3.5 is in both of Transformers' lists, and its checkpoints name the class with the tower.
    images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(small_config(model_type), dtype=torch.float32)
    return model


def save(model_type: str, folder: Path) -> Path:
    """A model folder as one is published: config, safetensors, tokenizer."""
    model = made(model_type)
    # A text file only has one generation_config; sampling defaults of a family's own are not of interest.
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
