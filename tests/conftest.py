"""Fixtures on real parts: the embedded model, its tokenizer, a fresh 4-bit base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from slimtune.base.embedded import EMBEDDED, embedded_model_folder
from slimtune.base.load import Base, load_base
from slimtune.base.tokenizer import load_tokenizer
from slimtune.demo import rows
from slimtune.hardware import Hardware, detect

# How fast a machine draws examples says nothing of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs a GPU is skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def hardware() -> Hardware:
    return detect()


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The embedded model's folder: bf16 safetensors of SmolLM2-135M-Instruct."""
    return embedded_model_folder()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A random two-layer Llama with the embedded model's real tokenizer: trains in a second."""
    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_folder / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def requests_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's training rows as a file of OpenAI messages."""
    file = tmp_path_factory.mktemp("data") / "requests.jsonl"
    trained, _ = rows()
    file.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in trained), encoding="utf-8")
    return file


@pytest.fixture
def base(hardware: Hardware) -> Base:
    """A base of its own for each test, in 4 bits, computed in fp32."""
    return load_base(EMBEDDED, hardware, compute_dtype="fp32")
