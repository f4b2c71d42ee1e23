"""Small random models of every family that the engine knows, wrapped by PEFT; what a test compares them by."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Cohere2Config,
    CohereConfig,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneMoeConfig,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HeliumConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    SolarOpenConfig,
)

from slimtune.base.packed import Mxfp4Tensor, Nf4Tensor
from tests.families.tiny import with_mxfp4 as with_mxfp4

FAMILIES = (
    "llama", "llama-bias", "mistral", "mistral-window", "qwen2", "qwen3", "smollm2",
    "cohere", "cohere2", "ernie4_5", "exaone4", "exaone4-full", "gemma", "gemma2", "gemma3_text",
    "gemma4-12b", "gemma4-e2b", "gemma4-26b", "glm", "glm4", "granite", "helium", "ministral", "olmo2", "olmo3", "phi3",
    "phi3-partial", "seed_oss", "smollm3", "granitemoehybrid", "ministral3",
    "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe", "granitemoeshared",
    "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_moe-mixed", "qwen3_moe-dense", "solar_open",
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next",
)  # fmt: skip
VOCABULARY = 211
_WEIGHS = re.compile(r"\.router\.|expert_gate$")
"""What weighs experts, which slimtune neither packs nor adapts."""
_MIXES = ("gpt_oss", "granitemoehybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
"""Types that Transformers doesn't keep the documents of a pack apart in."""
LENGTHS = (17, 5, 30, 8, 1, 3)
"""A pack of 64 tokens: document boundaries at odd places, one document of a single token."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 192,  # whole blocks of NF4, as bitsandbytes' CPU kernel needs them
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 3, "moe_intermediate_size": 64}
_CHOSEN: dict[str, Any] = {  # DeepSeek-V3's choice of experts
    **_EXPERTS, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 8.0,
}  # fmt: skip
_WINDOWS: dict[str, Any] = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_DELTA: dict[str, Any] = {  # neither of the heads is as wide as the other kind, nor a power of two
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 24,
    "linear_value_head_dim": 48, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "sliding_window": 7,
    "head_dim": 32,
    "global_head_dim": 64,
    "final_logit_softcapping": 1.5,
}


def family_config(family: str) -> PretrainedConfig:
    match family:
        case "llama":
            return LlamaConfig(**_COMMON, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32})  # fmt: skip
        case "llama-bias":
            return LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True)
        case "mistral":
            return MistralConfig(**_COMMON, sliding_window=None)
        case "mistral-window":
            return MistralConfig(**_COMMON, sliding_window=7)
        case "qwen2":
            return Qwen2Config(**_COMMON)
        case "qwen3":
            return Qwen3Config(**_COMMON, head_dim=32)
        case "smollm2":
            return LlamaConfig(**{**_COMMON, "num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192},
                tie_word_embeddings=True)  # fmt: skip
        case "cohere":
            return CohereConfig(**_COMMON, logit_scale=0.25)
        case "cohere2":
            return Cohere2Config(**_COMMON, **_WINDOWS, logit_scale=0.25)
        case "ernie4_5":
            return Ernie4_5Config(**_COMMON, use_bias=True)
        case "exaone4":
            return Exaone4Config(**_COMMON, **_WINDOWS, sliding_window_pattern="LG")
        case "exaone4-full":
            return Exaone4Config(**_COMMON, sliding_window=None, layer_types=["full_attention"] * 3)
        case "gemma":
            return GemmaConfig(**_COMMON, head_dim=32, hidden_act="gelu_pytorch_tanh")
        case "gemma2":
            return Gemma2Config(**_COMMON, **_WINDOWS, head_dim=32, query_pre_attn_scalar=24,
                attn_logit_softcapping=2.0, final_logit_softcapping=1.5)  # fmt: skip
        case "gemma3_text":
            return Gemma3TextConfig(**_COMMON, **_WINDOWS, head_dim=32, query_pre_attn_scalar=24,
                rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}})  # fmt: skip
        case "gemma4-12b":  # keys are values on full layers, of another head size and another number
            return Gemma4TextConfig(**_COMMON | {"num_hidden_layers": 4}, **_GEMMA4, attention_k_eq_v=True,
                layer_types=["sliding_attention", "full_attention"] * 2, num_global_key_value_heads=1,
                hidden_size_per_layer_input=0)  # fmt: skip
        case "gemma4-e2b":  # per-layer inputs; the last layers take others' keys, and their MLP is twice as wide
            return Gemma4TextConfig(**_COMMON | {"num_hidden_layers": 6}, **_GEMMA4, num_kv_shared_layers=4,
                layer_types=["sliding_attention", "full_attention"] * 3, use_double_wide_mlp=True,
                hidden_size_per_layer_input=24, vocab_size_per_layer_input=VOCABULARY)  # fmt: skip
        case "gemma4-26b":  # an MLP beside experts, each with norms of its own, and the router with another
            return Gemma4TextConfig(**_COMMON, **_GEMMA4, hidden_size_per_layer_input=0, enable_moe_block=True,
                num_experts=6, top_k_experts=3, moe_intermediate_size=64,
                layer_types=["sliding_attention", "full_attention", "full_attention"])  # fmt: skip
        case "glm":
            return GlmConfig(**_COMMON, head_dim=32, partial_rotary_factor=0.5, attention_bias=True)
        case "glm4":
            return Glm4Config(**_COMMON, head_dim=32, partial_rotary_factor=0.5, attention_bias=True)
        case "granite":
            return GraniteConfig(**_COMMON, **_GRANITE)
        case "granitemoehybrid":
            return GraniteMoeHybridConfig(**_COMMON, **_GRANITE, num_local_experts=0, shared_intermediate_size=128,
                layer_types=["attention"] * 3, position_embedding_type="rope", mamba_n_heads=8)  # fmt: skip
        case "helium":
            return HeliumConfig(**_COMMON, head_dim=16)
        case "ministral":
            return MinistralConfig(**_COMMON, **_WINDOWS, head_dim=16)
        case "ministral3":
            return Ministral3Config(**_COMMON, head_dim=32, sliding_window=None, rope_parameters={"rope_type": "yarn",
                "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
                "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4})  # fmt: skip
        case "olmo2":
            return Olmo2Config(**_COMMON)
        case "olmo3":
            return Olmo3Config(**_COMMON, **_WINDOWS)
        case "phi3":
            return Phi3Config(**_COMMON, sliding_window=7)
        case "phi3-partial":
            return Phi3Config(**_COMMON, partial_rotary_factor=0.5, sliding_window=None)
        case "seed_oss":
            return SeedOssConfig(**_COMMON, head_dim=32, attention_bias=True, attention_out_bias=True, mlp_bias=True,
                attention_dropout=0.0, residual_dropout=0.0)  # fmt: skip
        case "smollm3":
            return SmolLM3Config(**_COMMON, no_rope_layers=[1, 0, 1], use_sliding_window=False)
        case "dots1":
            return Dots1Config(**_COMMON, **_CHOSEN, **_WINDOWS, head_dim=32, n_routed_experts=6, n_shared_experts=1,
                norm_topk_prob=True)  # fmt: skip
        case "ernie4_5_moe":
            return Ernie4_5_MoeConfig(**_COMMON, moe_k=3, moe_num_experts=6, moe_intermediate_size=64,
                moe_num_shared_experts=1, moe_layer_start_index=1)  # fmt: skip
        case "exaone_moe":
            return ExaoneMoeConfig(**_COMMON, **_CHOSEN, **_WINDOWS, head_dim=32, num_experts=6, num_shared_experts=1,
                norm_topk_prob=True, sliding_window_pattern="LG")  # fmt: skip
        case "flex_olmo":
            return FlexOlmoConfig(**_COMMON, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True)
        case "glm4_moe":
            return Glm4MoeConfig(**_COMMON, **_CHOSEN, head_dim=32, partial_rotary_factor=0.5, use_qk_norm=True,
                n_routed_experts=6, n_shared_experts=1, norm_topk_prob=True)  # fmt: skip
        case "gpt_oss":
            return GptOssConfig(**_COMMON | {"intermediate_size": 96}, head_dim=32, num_local_experts=5,
                num_experts_per_tok=3, sliding_window=7, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4,
                "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 16})  # fmt: skip
        case "granitemoe":
            return GraniteMoeConfig(**_COMMON, **_GRANITE, num_local_experts=6, num_experts_per_tok=3)
        case "granitemoeshared":
            return GraniteMoeSharedConfig(**_COMMON, **_GRANITE, num_local_experts=6, num_experts_per_tok=3,
                shared_intermediate_size=128)  # fmt: skip
        case "minimax_m2":
            return MiniMaxM2Config(**_COMMON, num_experts_per_tok=3, num_local_experts=6, head_dim=32,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})  # fmt: skip
        case "mixtral":
            return MixtralConfig(**_COMMON, num_experts_per_tok=2, num_local_experts=6, sliding_window=None)
        case "olmoe":
            return OlmoeConfig(**_COMMON, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False,
                sliding_window=7)  # fmt: skip
        case "qwen3_moe":
            return Qwen3MoeConfig(**_COMMON, **_EXPERTS, num_experts=6, head_dim=32, norm_topk_prob=True)
        case "qwen3_moe-mixed":
            return Qwen3MoeConfig(**_COMMON, **_EXPERTS, num_experts=6, mlp_only_layers=[1], norm_topk_prob=False)
        case "qwen3_moe-dense":
            return Qwen3MoeConfig(**_COMMON, **_EXPERTS, num_experts=6, mlp_only_layers=[0, 1, 2])
        case "qwen3_5_text":
            return Qwen3_5TextConfig(**_COMMON, **_DELTA)
        case "qwen3_5_moe_text":
            return Qwen3_5MoeTextConfig(**_COMMON, **_EXPERTS, **_DELTA, num_experts=6,
                shared_expert_intermediate_size=64)  # fmt: skip
        case "qwen3_next":  # a layer without experts, three value heads to a key head, biases beside gates
            return Qwen3NextConfig(**_COMMON, **_EXPERTS, **_DELTA | {"linear_num_value_heads": 6}, num_experts=6,
                shared_expert_intermediate_size=64, mlp_only_layers=[1], attention_bias=True)  # fmt: skip
        case "solar_open":
            return SolarOpenConfig(**_COMMON, **_CHOSEN, head_dim=32, n_routed_experts=6, n_shared_experts=1,
                norm_topk_prob=True)  # fmt: skip
    raise AssertionError(family)


def _stacks(model: nn.Module) -> list[str]:
    """Names of all stacks of experts."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".conv1d." not in name]


def with_tower(text: PretrainedConfig) -> nn.Module:
    """A text model inside a class that reads images too, of 16 x 16 points in four patches."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 16, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    if isinstance(text, Gemma3TextConfig):
        return Gemma3ForConditionalGeneration(Gemma3Config(vision_config=SiglipVisionConfig(**sizes), text_config=text))
    tower = CLIPVisionConfig(**sizes)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=1, vision_feature_layer=-1)
    )


def gemma4_with_tower() -> nn.Module:
    """Gemma 4 as it is published: its text model, with per-layer inputs, in a class that reads images too."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16}  # fmt: skip
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=family_config("gemma4-e2b"), vision_config=tower, audio_config=None, image_token_id=1)
    )


def make_base(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        family_config(family), dtype=dtype, attn_implementation="eager" if family in ("gemma2", "gpt_oss") else "sdpa"
    )
    if _stacks(model):
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    for name, parameter in model.named_parameters():
        # Transformers starts biases at 0 and norms at 1, where a mistake with them would not show.
        if "norm" in name:
            parameter.data.normal_(1.0, 0.3)
            if family.startswith("gemma4") and "q_norm" in name:
                parameter.data *= 0.2  # its scores are scaled by nothing else: softmax would be all or nothing
        elif "bias" in name:
            parameter.data.normal_(0.0, 0.3)
        elif "sinks" in name:
            parameter.data.normal_(0.0, 1.0)
        elif name.endswith("A_log"):
            parameter.data.uniform_(-4.0, 1.0)  # random models start with states that have gone after a token
        elif name.endswith("scale"):
            parameter.data.normal_(1.0, 0.3)
    for module in model.modules():
        if hasattr(module, "limit"):
            module.limit = 0.4  # so that some gates and ups of these small weights are clamped
    for name, buffer in model.named_buffers():
        if "layer_scalar" in name:
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)
    return model


def quantize(model: nn.Module, *, double: bool) -> nn.Module:
    """Every linear layer but the head in NF4, as bitsandbytes has it, and every stack of experts, packed one by one."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and not _WEIGHS.search(name):
            parent, _, child = name.rpartition(".")
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, quant_type="nf4",
                compute_dtype=torch.float32, compress_statistics=double,
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double
            ).to("cpu")
            new.bias = module.bias
            setattr(model.get_submodule(parent), child, new)
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3 and not isinstance(module, nn.Conv1d) and not isinstance(parameter, Mxfp4Tensor):
                packed = Nf4Tensor.quantize(parameter.data, double_quant=double)
                setattr(module, own, nn.Parameter(packed, requires_grad=False))
    model.is_loaded_in_4bit = True
    return model


def add_lora(model: nn.Module, *, seed: int = 1, **options: Any) -> nn.Module:
    """PEFT's LoRA, with a B that isn't zero: else A would have no gradient."""
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **options}
    wanted = settings["target_modules"]
    if _stacks(model):
        # By full names: of these types PEFT would take other words for the experts, and adapt their routers too.
        named = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head" and not _WEIGHS.search(name)
        ]
        stacks = _stacks(model)
        settings["target_modules"], settings["target_parameters"] = (
            [name for name in names if wanted == "all-linear" or name.rpartition(".")[2] in wanted]
            for names in (named, stacks)
        )
        settings["lora_dropout"] = 0.0 if settings["target_parameters"] else settings["lora_dropout"]
    wrapped = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    return wrapped.train()


def pack(seed: int = 2, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """A packed micro-batch whose last document is padding, with two of three tokens supervised."""
    torch.manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.clone()
    labels[:, ::3] = -100
    labels[positions == 0] = -100
    labels[:, -lengths[-1] :] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def padded(seed: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    mask[2, 4:] = 0
    ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def supervised(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def reference(model: nn.Module, batch: dict[str, Tensor], count: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and LoRA gradients of the model as it is, through Transformers, PEFT and autograd."""
    model.zero_grad()
    loss = torch.zeros(())
    for part in documents(batch) if model.config.model_type in _MIXES else [batch]:
        inputs = {key: value for key, value in part.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        loss += nn.functional.cross_entropy(logits.flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="sum")
    loss = loss / count
    loss.backward()
    grads = gradients(model)
    model.zero_grad()
    return loss.item(), grads


def documents(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A pack's documents one by one."""
    if "position_ids" not in batch:
        return [batch]
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    return [{key: value[:, a:b] for key, value in batch.items()} for a, b in pairwise(starts)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest ‖a - e‖ / ‖e‖ over all tensors, which must be the same ones and not zero."""
    assert actual.keys() == expected.keys()
    assert all(value.norm() > 0 for value in expected.values())
    return max(float((actual[name] - value).norm() / value.norm()) for name, value in expected.items())
