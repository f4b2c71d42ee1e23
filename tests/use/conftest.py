"""An adapter made by plain PEFT, with a passport; small but with effect: its values are random, not zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from slimtune.adapter.passport import issue_passport, stamp
from slimtune.base.embedded import EMBEDDED
from slimtune.config import Config
from slimtune.use.load import Opened, open_model


@pytest.fixture(scope="session")
def plain_adapter(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """As another program would leave it: no passport, no tokenizer."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    wrapped = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]
        ),
    )
    draw = torch.Generator().manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=draw) * 0.03
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(
    tmp_path_factory: pytest.TempPathFactory,
    plain_adapter: Path,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """As a run leaves it: stamped, the tokenizer and template beside it."""
    import shutil

    folder = tmp_path_factory.mktemp("run") / "adapter"
    shutil.copytree(plain_adapter, folder)
    tokenizer.save_pretrained(folder)
    config = Config(model=EMBEDDED, data=("/home/someone/rows.jsonl",), compute_dtype="fp32")
    stamp(folder, issue_passport(config, str(model_folder), tokenizer))
    return folder


@pytest.fixture(scope="session")
def opened(adapter: Path) -> Opened:
    """The adapter on its base in 4 bits, computed in fp32."""
    return open_model(str(adapter), dtype="fp32")
