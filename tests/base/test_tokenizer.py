"""The base's tokenizer, as it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.base.tokenizer import load_tokenizer
from slimtune.errors import UserError


def test_padding_is_not_the_turns_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token != "<|im_end|>"


def test_a_tokenizer_without_template_is_refused_unless_one_is_given(tmp_path: Path, model_folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(str(tmp_path))
    given = _write(tmp_path / "own.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load_tokenizer(str(tmp_path), template=given).chat_template == given.read_text()
    with pytest.raises(UserError, match=r"chat template .*absent\.jinja can't be read"):
        load_tokenizer(str(tmp_path), template=tmp_path / "absent.jinja")


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
