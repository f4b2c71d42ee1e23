"""The passport in the adapter's file: of the values alone, and readable from older versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slimtune.adapter.passport import Passport, read_passport, stamp
from slimtune.config import FREE_KEYS, Config

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
