"""What a proof shows is the text that the model sees, no character of it cut in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.preflight import examine
from slimtune.data.view import hints, sample, table


@pytest.mark.parametrize("text", ["布偶猫喜欢安静。", "🚢 sails", "a boat"])
def test_raw_text_is_shown_whole_though_its_first_token_is_no_target(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": text, "id": 1}), encoding="utf-8")
    config = Config.make(data=str(file))
    proof = examine(config, tokenizer)
    shown = sample(proof.train, tokenizer)
    assert shown is not None
    assert [segment.supervised for segment in shown.segments] == [False, True]
    assert "".join(segment.text for segment in shown.segments) == text + tokenizer.eos_token
    assert "\ufffd" not in shown.segments[0].text
    assert sum(segment.tokens for segment in shown.segments) == len(proof.train[0][0])
    assert ("not read", "id") in table(proof, config, None)


def test_a_row_that_was_changed_is_named_in_a_file_that_is_there(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"instruction": "Hi", "output": "a\ufdd0b"}))
    config = Config.make(data=str(file))
    proof = examine(config, tokenizer)
    lines = dict(table(proof, config, None))
    assert "noncharacter" in Path(lines["each row"]).read_text()


@pytest.mark.parametrize(("variables", "told"), [({"enable_thinking"}, True), ({"messages"}, False)])
def test_a_variable_is_advised_only_where_the_template_has_it(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    variables: set[str],
    told: bool,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": "Hi", "answer": "Ho", "thinking": "Hm"}))
    config = Config.make(data=str(file))
    (line,) = [line for line in hints(examine(config, tokenizer), config, variables) if "thoughts" in line]
    assert ("--template-vars enable_thinking=true" in line) is told
