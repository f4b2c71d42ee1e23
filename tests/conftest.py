"""Fixtures on real parts: the embedded model, its tokenizer, a fresh 4-bit base."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.base.embedded import EMBEDDED, embedded_model_folder
from slimtune.base.load import Base, load_base, load_tokenizer
from slimtune.hardware import Hardware, detect


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


@pytest.fixture
def base(hardware: Hardware) -> Base:
    """A base of its own for each test, in 4 bits, computed in fp32."""
    return load_base(EMBEDDED, hardware, compute_dtype="fp32")
