"""Small random models of many families, and what their LoRA gradients must be: those of the documents one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from slimtune.batch import IGNORED, MicroBatch
from slimtune.training.layout import Layout

VOCABULARY = 211
LENGTHS = (17, 5, 30, 8, 1, 3, 40)
"""A pack of 104 tokens: a document of one token, and some longer than the windows and chunks below."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SMALL = {key: value for key, value in _COMMON.items() if key not in ("head_dim", "num_key_value_heads")}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_KINDS = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: t.LlamaConfig(**_COMMON), "packed"),
    "mistral-window": (lambda: t.MistralConfig(**_COMMON, sliding_window=7), "packed"),
    "phi3-longrope": (
        lambda: t.Phi3Config(
            **_SMALL, num_key_value_heads=2, sliding_window=None, original_max_position_embeddings=20,
            rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20,
                             "short_factor": [1.0] * 8, "long_factor": [4.0 + at for at in range(8)]},
        ),
        "alone",
    ),
    "gemma3_text": (lambda: t.Gemma3TextConfig(**_COMMON, sliding_window=7, layer_types=_KINDS), "packed"),
    "gemma2-softcap": (
        lambda: t.Gemma2Config(**_COMMON, sliding_window=7, layer_types=_KINDS, attn_logit_softcapping=2.0),
        "packed",
    ),
    "gpt_oss": (
        lambda: t.GptOssConfig(
            **_COMMON, sliding_window=7, layer_types=_KINDS, num_local_experts=4, num_experts_per_tok=2
        ),
        "packed",
    ),
    "llama4-chunks": (
        lambda: t.Llama4TextConfig(
            **_COMMON, intermediate_size_mlp=96, attention_chunk_size=8, num_local_experts=2, moe_layers=[],
            layer_types=["chunked_attention", "full_attention"],
        ),
        "packed",
    ),
    "deepseek_v3": (
        lambda: t.DeepseekV3Config(
            **{**_SMALL, "num_key_value_heads": 4}, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=12, first_k_dense_replace=2,
        ),
        "packed",
    ),
    "opt": (lambda: t.OPTConfig(**_SMALL, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0), "packed"),
    "falcon": (lambda: t.FalconConfig(**_SMALL, alibi=False), "padded"),
    "falcon-alibi": (lambda: t.FalconConfig(**_SMALL, alibi=True), "padded"),
    "bloom": (lambda: t.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4), "padded"),
    "qwen3_5_text": (
        lambda: t.Qwen3_5TextConfig(**_COMMON, **_DELTA, layer_types=["linear_attention", "full_attention"]),
        "padded",
    ),
    "granitemoehybrid": (
        lambda: t.GraniteMoeHybridConfig(
            **_SMALL, **_MAMBA, num_key_value_heads=2, layer_types=["mamba", "attention"], num_local_experts=0,
            shared_intermediate_size=96,
        ),
        "padded",
    ),
    "falcon_h1": (
        lambda: t.FalconH1Config(**_COMMON, **_MAMBA, mamba_d_ssm=128),
        "padded",
    ),
    "lfm2": (lambda: t.Lfm2Config(**_SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]), "padded"),
}  # fmt: skip
"""The config, and how its documents may go through it where no package isolates recurrent layers."""

_ADAPTED = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "in_proj", "in_proj_qkv", "q_b_proj",
            "query_key_value", "dense", "down_proj", "fc2")  # fmt: skip


def make(family: str, *, seed: int = 0) -> nn.Module:
    """A model of ``family`` with an adapter that isn't zero, in training mode."""
    config, _ = FAMILIES[family]
    torch.manual_seed(seed)
    # Transformers' other ways to compute attention leave a soft cap out, in some versions without a word.
    way = {"attn_implementation": "eager"} if "softcap" in family else {}
    base = t.AutoModelForCausalLM.from_config(config(), dtype=torch.float32, **way)
    with torch.no_grad():
        for parameter in base.parameters():
            # Transformers starts norms, decays and sinks at constants, where a mistake with them would not show.
            parameter.add_(0.05 * torch.randn(parameter.shape))
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in _ADAPTED and ".mamba." not in name
    ]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def documents(lengths: tuple[int, ...] = LENGTHS, *, padded: bool, seed: int = 5) -> MicroBatch:
    """Random documents, two tokens of three supervised."""
    ids = torch.randint(3, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).numpy()
    labels = ids.copy()
    labels[::3] = IGNORED
    labels[np.cumsum(lengths) - lengths] = IGNORED
    return MicroBatch(ids, labels, lengths, padded=padded)


def gradients(model: nn.Module, inputs: Iterable[dict[str, Any]], supervised: int) -> dict[str, Tensor]:
    """LoRA gradients of the summed loss over ``supervised``, one forward and backward for each of ``inputs``."""
    model.zero_grad()
    device = next(model.parameters()).device
    for given in inputs:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
        labels = moved.pop("labels")[:, 1:]
        moved.pop("lengths", None)
        logits = model(**moved, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / supervised).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the documents alone, unpadded, on Transformers' own forward."""
    micro = documents(padded=True)
    parts = [part.inputs() for part in micro.split(1) if part.supervised]
    plain = [{"input_ids": part["input_ids"], "labels": part["labels"]} for part in parts]
    return gradients(model, plain, micro.supervised)


def by_layout(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The gradients of the same documents as one micro-batch of slimtune's."""
    micro = documents(padded=layout.kind != "packed")

    def passed() -> Iterable[dict[str, Any]]:
        for piece in layout.pieces(micro.inputs()):
            with layout.passed(piece) as inputs:
                yield inputs  # the caller's forward and backward are in here

    return gradients(model, passed(), micro.supervised)


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a matrix's gradient."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - want).norm() / want.norm()) for name, want in expected.items() if want.norm() > 0)
