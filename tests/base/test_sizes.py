"""A config that names more than its files hold is refused before a module is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.base.classes import skeleton
from slimtune.base.load import load_base
from slimtune.errors import UserError
from slimtune.hardware import detect
from tests.training.tiny import saved


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**7), ("vocab_size", 10**12), ("intermediate_size", 2**40)],
)
def test_what_the_files_do_not_hold_is_not_made(
    field: str, value: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", "qwen3_moe", tokenizer)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    for use in (lambda: load_base(str(folder), detect(), compute_dtype="fp32"), lambda: skeleton(folder)):
        with pytest.raises(UserError, match=rf"names \w+ = {value:,}, and its files hold nothing so large"):
            use()
