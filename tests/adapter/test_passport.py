"""The passport in the adapter's file: of the values alone, and readable from older versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from slimtune.adapter.passport import (
    Passport,
    check_tokenizer,
    is_hashed_whole,
    read_passport,
    stamp,
    template_hash,
    tokenizer_hash,
)
from slimtune.config import FREE_KEYS, Config
from slimtune.errors import UserError
from tests.data.tokenizers import BUILT

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}


def stamped(folder: Path, config: dict[str, Any]) -> Passport:
    folder.mkdir()
    save_file(TENSORS, folder / "adapter_model.safetensors", {"format": "pt", "made": "by a test", "any": "thing"})
    passport = Passport("base", None, "f" * 64, {"method": "nf4"}, "t" * 64, "c" * 64, config)
    stamp(folder, passport)
    return passport


def test_a_passport_is_read_back_and_the_values_stay(tmp_path: Path) -> None:
    passport = stamped(tmp_path / "one", {"lora_r": 8})
    assert read_passport(tmp_path / "one") == passport
    saved = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert saved.keys() == TENSORS.keys()
    assert all(torch.equal(saved[name], TENSORS[name]) for name in saved)


def test_the_same_values_and_passport_are_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        stamped(tmp_path / name, {"lora_r": 8})
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_an_older_passport_with_the_whole_config_is_read(tmp_path: Path) -> None:
    config = Config(data=("rows.jsonl",), output=Path("runs/old")).model_dump(mode="json")
    passport = stamped(tmp_path / "old", config)
    assert read_passport(tmp_path / "old") == passport
    assert passport.config.keys() >= FREE_KEYS


def _old_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """As passports of version 1 have it: the vocabulary and the ids of one text."""
    probe = "It's 12345.678 -- don't\n\n\tdef f(x):  x**2 # Grüße, 你好世界，こんにちは, Привет, مرحبا 👩‍💻   end "
    what = [sorted(tokenizer.get_vocab().items()), tokenizer.encode(probe, add_special_tokens=False)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def test_the_hash_sees_what_stands_behind_a_control_token(tokenizer: PreTrainedTokenizerBase) -> None:
    always, first = BUILT["llama, legacy"].make(), BUILT["llama, not legacy"].make()
    first.chat_template = always.chat_template
    assert _old_hash(always) == _old_hash(first)
    assert tokenizer_hash(always) != tokenizer_hash(first)
    passport = Passport("base", None, "f" * 64, {}, tokenizer_hash(always), template_hash(always), {})
    check_tokenizer(passport, always, "here")
    with pytest.raises(UserError, match="the tokenizer of here"):
        check_tokenizer(passport, first, "here")


def test_an_old_passports_tokenizer_is_accepted(tokenizer: PreTrainedTokenizerBase) -> None:
    passport = Passport("base", None, "f" * 64, {}, _old_hash(tokenizer), template_hash(tokenizer), {})
    assert not is_hashed_whole(passport)
    check_tokenizer(passport, tokenizer, "here")
    with pytest.raises(UserError, match="the tokenizer of there"):
        check_tokenizer(passport, BUILT["first"].make(), "there")
