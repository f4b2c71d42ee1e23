"""Write a model as GGUF, the file that llama.cpp and Ollama run: F16 or Q8_0, tensor by tensor, by the gguf package.

Tensor names come from the package's own map; a layer's experts, single in the base's files, are stacked. Llama and
Mistral store q and k with the rotary halves interleaved (llama.cpp, ``convert_hf_to_gguf.py``, ``LlamaModel.permute``);
Qwen2 and Qwen3 store them as they are. The tokenizer is written as training used it; its way of splitting text is
recognised by structure; one without a name in llama.cpp is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimtune.adapter.merged import MergedWeights
from slimtune.base.source import upstream_errors
from slimtune.errors import UserError

__all__ = ["FAMILIES", "ROPE_FACTORS", "check_family", "longest_text", "pre_tokenizer", "write_gguf"]

FAMILIES: dict[str, str] = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"
}  # fmt: skip
"""Transformers' model types that can be written, and llama.cpp's name of each."""
_PERMUTED = {"llama"}
_WITHOUT_BIASES = {"qwen3", "qwen3moe"}
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.\d+\.(?P<projection>.+)")
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that is none of the model's weights."""
_ROUTER = "ffn_gate_inp.weight"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _bytes(use_regex=False)]


_SPLITTERS: list[tuple[list[dict[str, Any]], bool, str]] = [
    ([_bytes(use_regex=True)], False, "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)], False, "smollm"),
    (_split(_WORDS + r"\p{N}" + _REST), False, "qwen2"),
    (_split(_WORDS + r"\p{N}{1,3}" + _REST), True, "llama-bpe"),
    (_split(_WORDS + r"\p{N}{1,3}" + _REST), False, "smaug-bpe"),
]
"""The steps that cut a text, whether a word that is a token is taken whole (``ignore_merges``), llama.cpp's name."""
_NORMALIZERS = (None, {"type": "NFC"})
"""What a text may go through first. llama.cpp has no NFC, and its Qwens do without: text is composed as a rule."""
_ACTIVATIONS = ("silu", "swish")
_CONTROL_LIKE = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Added tokens that llama.cpp's converter takes for control tokens though they aren't marked so: ``<|fim_prefix|>``."""
_Q8 = gguf.GGMLQuantizationType.Q8_0


def check_family(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the model's family.

    Raises:
        UserError: The family, its rotary embedding or its tokenizer can't be written.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise UserError(
            f"a {config.get('model_type')} model can't be exported to GGUF",
            rule=f"These can: {', '.join(FAMILIES)}.",
            way_out="Merge it, and convert the merged folder by llama.cpp's convert_hf_to_gguf.py.",
        )
    full = _completed(config)
    rope = full.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3"):
        raise UserError(
            f"a model with {rope!r} rotary embeddings can't be exported to GGUF",
            way_out="Merge it, and convert the merged folder by llama.cpp's convert_hf_to_gguf.py.",
        )
    if full.hidden_act not in _ACTIVATIONS:
        raise UserError(
            f"a model whose MLP has {full.hidden_act!r} can't be exported to GGUF",
            rule=f"llama.cpp computes a {config['model_type']} model with silu, whatever its file says.",
            way_out="Merge it, and use the merged folder.",
        )
    if family in _WITHOUT_BIASES and full.attention_bias:
        raise UserError(
            f"a {config['model_type']} model with biases in its attention can't be exported to GGUF",
            rule="llama.cpp has no place for them.",
            way_out="Merge it, and use the merged folder.",
        )
    if family == "qwen3moe" and not _is_plain_mixture(full):
        raise UserError(
            "this mixture of experts can't be exported to GGUF",
            rule="llama.cpp knows Qwen 3's with experts in every layer, their weights made to sum to one.",
            way_out="Merge it, and use the merged folder.",
        )
    pre_tokenizer(tokenizer)
    if not json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]:
        raise UserError(
            "this tokenizer can't be exported to GGUF: it has no merges",
            rule="llama.cpp reads no byte-level BPE without merges, and nor does Transformers from a GGUF file.",
            way_out="Merge it, and use the merged folder.",
        )
    return family


def longest_text(config: dict[str, Any]) -> int:
    """Most tokens of a text that llama.cpp computes as the model does.

    In these families it reads all that stands before a token, a window's worth or more: up to a window both are one.
    """
    full = _completed(config)
    # Llama's class has no window, whatever its config says.
    window = None if full.model_type == "llama" else full.sliding_window
    if window and "sliding_attention" in (getattr(full, "layer_types", None) or ["sliding_attention"]):
        return min(int(full.max_position_embeddings), int(window))
    return int(full.max_position_embeddings)


def _completed(config: dict[str, Any]) -> PretrainedConfig:
    """The config as Transformers reads it: with what its file leaves to the class's defaults, and old names' values."""
    with upstream_errors("config.json"):
        made: PretrainedConfig = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    return made


def _is_plain_mixture(config: Any) -> bool:
    return config.decoder_sparse_step == 1 and not config.mlp_only_layers and bool(config.norm_topk_prob)


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how the tokenizer cuts text before its merges.

    Raises:
        UserError: It is none of those that slimtune can name for certain.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # none of one that is written in Python
    if backend is not None and (name := _split_name(json.loads(backend.to_str()))):
        return name
    raise UserError(
        "this tokenizer can't be exported to GGUF: llama.cpp's name for its way of splitting text isn't known",
        rule="Byte-level BPE as of GPT-2, SmolLM, Qwen 2 and 3, and Llama 3 is known.",
        way_out="Merge it, and convert the merged folder by llama.cpp's convert_hf_to_gguf.py.",
    )


def _split_name(backend: dict[str, Any]) -> str | None:
    splitter, model = backend["pre_tokenizer"] or {}, backend["model"]
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in splitter.get("pretokenizers", [splitter])
    ]
    further = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in further) or backend["normalizer"] not in _NORMALIZERS:
        return None
    whole_words = bool(model.get("ignore_merges"))
    return next((name for known, whole, name in _SPLITTERS if (steps, whole_words) == (known, whole)), None)


def write_gguf(
    weights: MergedWeights,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    kind: Literal["f16", "q8_0"],
    *,
    name: str,
    turn_end: int,
) -> None:
    """Write the merged weights, the tokenizer and the chat template into one GGUF file.

    Norms and biases are F32. In Q8_0 a matrix whose rows aren't a multiple of 32 stays F16.

    Raises:
        UserError: The family can't be written, or a weight is too large for F16.
    """
    family = check_family(weights.config, tokenizer)
    config: Any = _completed(weights.config)
    writer = gguf.GGUFWriter(file, family)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _hyperparameters(writer, config, longest_text(weights.config))
    _tokenizer(writer, tokenizer, config.vocab_size, turn_end)
    sources = _sources(weights, config, family)
    shapes = {target: _shape(weights, tensors) for target, tensors in sources.items()}
    plans = {target: _type(target, shape, kind) for target, shape in shapes.items()}
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes)
    for target, shape in shapes.items():
        stored = gguf.quant_shape_to_byte_shape(shape, plans[target])  # its last axis counts bytes
        if plans[target] is _Q8:
            writer.add_tensor_info(target, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=_Q8)
        else:
            plain = np.float16 if plans[target] is gguf.GGMLQuantizationType.F16 else np.float32
            writer.add_tensor_info(target, shape, np.dtype(plain), math.prod(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for target, tensors in sources.items():
        parts = [_values(weights[name], name, config, family, plans[target]) for name in tensors]
        writer.write_tensor_data(np.stack(parts) if _EXPERT.fullmatch(tensors[0]) else parts[0])
    writer.close()


def _hyperparameters(writer: Any, config: Any, longest: int) -> None:
    size = _head_size(config)
    rope = config.rope_parameters
    writer.add_context_length(longest)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_factors(config: Any) -> npt.NDArray[np.float32] | None:
    """Llama 3's divisors of the rotary frequencies (Transformers, ``_compute_llama3_parameters``)."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    size = _head_size(config)
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), dtype=np.float32)


def _tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int, turn_end: int) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    highest = max(tokenizer.get_vocab().values())
    if highest >= size:
        raise UserError(
            f"the tokenizer has a token {highest:,}, and the model's embedding {size:,} rows",
            rule="llama.cpp's list of tokens is as long as the embedding.",
            way_out="Take the tokens that the model never learnt out of the tokenizer's files.",
        )
    tokens = [f"[PAD{at}]" for at in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for text, at in backend["model"]["vocab"].items():
        tokens[at], types[at] = text, int(gguf.TokenType.NORMAL)
    for added in backend["added_tokens"]:
        tokens[added["id"]] = added["content"]
        control = added["special"] or _CONTROL_LIKE.fullmatch(added["content"])
        types[added["id"]] = int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    adds_bos = list(tokenizer("").input_ids)[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    writer.add_add_bos_token(adds_bos)
    writer.add_add_space_prefix(False)
    # What ends a turn is what ends generation.
    writer.add_eos_token_id(turn_end)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(int(token))
    source = tokenizer.chat_template
    named = source.items() if isinstance(source, dict) else [("default", source)]
    writer.add_chat_template([{"name": name, "template": text} for name, text in named])


def _sources(weights: MergedWeights, config: Any, family: str) -> dict[str, list[str]]:
    """For each tensor of the GGUF file the base's that it is made of: one, or a layer's experts in their order."""
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    sources: dict[str, list[str]] = {}
    for tensor in weights:
        if (config.tie_word_embeddings and tensor == "lm_head.weight") or tensor.endswith("rotary_emb.inv_freq"):
            continue
        expert = _EXPERT.fullmatch(tensor)
        name = f"{expert['stack']}.{expert['projection']}" if expert else tensor
        target = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"the model's tensor {tensor} has no place in a {family} GGUF file")
        sources.setdefault(str(target), []).append(tensor)
    return {target: sorted(tensors, key=_number) for target, tensors in sources.items()}


def _number(tensor: str) -> int:
    """An expert's number; 0 for what is none."""
    return int(tensor.rpartition(".experts.")[2].partition(".")[0]) if _EXPERT.fullmatch(tensor) else 0


def _shape(weights: MergedWeights, tensors: list[str]) -> tuple[int, ...]:
    shape = weights.specs[tensors[0]].shape
    return (len(tensors), *shape) if _EXPERT.fullmatch(tensors[0]) else shape


def _type(target: str, shape: tuple[int, ...], kind: str) -> Any:
    """As llama.cpp's converter chooses: vectors and routers stay whole."""
    if len(shape) < 2 or target.endswith(_ROUTER):
        return gguf.GGMLQuantizationType.F32
    return _Q8 if kind == "q8_0" and shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F16


def _values(tensor: Tensor, name: str, config: Any, family: str, kind: Any) -> npt.NDArray[Any]:
    part = name.rsplit(".", 2)[-2]
    if family in _PERMUTED and part in ("q_proj", "k_proj"):
        tensor = _interleaved(tensor, config.num_attention_heads if part == "q_proj" else config.num_key_value_heads)
    if kind is _Q8:
        return np.concatenate([gguf.quants.quantize(rows.float().numpy(), _Q8) for rows in _some_rows(tensor)])
    if kind is gguf.GGMLQuantizationType.F32:
        return np.asarray(tensor.float().numpy())
    made = tensor.to(torch.float16)
    if not bool(torch.isfinite(made).all()):
        raise UserError(f"{name} has values that F16 can't hold", way_out="Export as q8_0.")
    return np.asarray(made.numpy())


def _some_rows(tensor: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(tensor, max(1, 2**24 // tensor.shape[-1])))


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """From [first halves, second halves] of each head's rotary pairs to pairs side by side."""
    rest = tensor.shape[1:]
    return (
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest)
        .transpose(1, 2)
        .reshape(tensor.shape)
        .contiguous()
    )
