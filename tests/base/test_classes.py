"""Which class a base is loaded as: tiny models from configs, and the text that image-text models take alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    Blip2Config,
    DiffusionGemmaConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    T5Config,
    Wav2Vec2Config,
    WhisperConfig,
)

from slimtune.base.classes import language_class, skeleton
from slimtune.base.load import load_base
from slimtune.errors import UserError
from slimtune.hardware import Hardware

TEXT: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0], "head_dim": 8,
}  # fmt: skip
IMAGE_TEXT = ["gemma3", "mistral3", "qwen3_vl", "qwen3_5", "internvl", "llava"]


def image_text_config(name: str) -> PreTrainedConfig:
    """A config of the family whose model has under a million parameters."""
    plain = AutoConfig.for_model(name)
    tower = {key: value for key, value in TOWER.items() if key in plain.vision_config.to_dict()}
    text = {key: value for key, value in TEXT.items() if key in plain.text_config.to_dict()}
    return AutoConfig.for_model(
        name,
        text_config={"model_type": plain.text_config.model_type, **text},
        vision_config={"model_type": plain.vision_config.model_type, **tower},
        **({"mm_tokens_per_image": 4} if name == "gemma3" else {}),
    )


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_an_image_text_base_is_loaded_as_the_class_that_its_config_names(
    name: str, tmp_path: Path, model_folder: Path, hardware: Hardware
) -> None:
    torch.manual_seed(0)
    saved = AutoModelForImageTextToText.from_config(image_text_config(name))
    saved.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_folder / file, tmp_path / file)
    base = load_base(str(tmp_path), hardware, compute_dtype="fp32", quantization="none")
    assert type(base.model).__name__ == base.model.config.architectures[0] == type(saved).__name__
    ids = torch.arange(5, 25).view(1, -1)
    base.model.train()
    loss = base.model(input_ids=ids, labels=ids).loss
    loss.backward()  # text alone reaches every layer
    assert all(p.grad is not None for n, p in base.model.named_parameters() if ".language_model.layers." in n)
    empty = skeleton(tmp_path)
    assert [(n, p.shape) for n, p in empty.named_parameters()] == [
        (n, p.shape) for n, p in base.model.named_parameters()
    ]
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), r"^here can't be trained: it is a sequence-to-sequence model \(t5\)"),
        (WhisperConfig(), "a sequence-to-sequence model"),
        (BertConfig(), "an encoder"),
        (Wav2Vec2Config(), "no class that continues text"),
        (Blip2Config(), "takes no text without pixel_values"),
        (DiffusionGemmaConfig(), "no loss on text"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_another_kind_of_model_is_refused_with_the_reason(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        language_class(config, "here")


def test_a_text_model_stays_one_and_a_decoder_of_an_encoder_family_can_be_used() -> None:
    assert language_class(LlamaConfig(), "here") is AutoModelForCausalLM
    assert language_class(BertConfig(is_decoder=True), "here") is AutoModelForCausalLM


def test_a_model_whose_files_lack_the_head_is_refused(tmp_path: Path, model_folder: Path, hardware: Hardware) -> None:
    """A classifier's checkpoint: Transformers would warn, and begin the language head at random."""
    sizes = {key: value for key, value in TEXT.items() if not key.startswith("linear_")}
    LlamaForSequenceClassification(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_folder / file, tmp_path / file)
    for quantization in ("nf4", "none"):
        with pytest.raises(UserError, match=r"hold nothing for lm_head\.weight\n"):
            load_base(str(tmp_path), hardware, compute_dtype="fp32", quantization=quantization)
