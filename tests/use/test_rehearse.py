"""Rehearsal: the base's own answers, as documents behind the data's; never the questions that measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.preflight import prove
from slimtune.errors import UserError
from slimtune.use import rehearse as rehearsal
from slimtune.use.ask import ask
from slimtune.use.general import GENERAL
from slimtune.use.load import Opened
from slimtune.use.rehearse import rehearse
from slimtune.use.rehearsed import PROMPTS


def test_what_is_rehearsed_measures_nothing() -> None:
    def words(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    asked = {words(text) for text, _ in PROMPTS}
    assert not asked & {words(question.text) for question in GENERAL}
    assert len(set(PROMPTS)) == len(PROMPTS)
    assert sum(not text.isascii() for text, _ in PROMPTS) > 15


def test_the_bases_answers_stand_behind_the_data(
    opened: Opened,
    requests_file: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rehearsal, "REPLY_TOKENS", 12)
    prompts = (("Answer with one word: what is ice?", ""), ("Hi!", ""), ("Answer with one word: is fire cold?", ""))
    monkeypatch.setattr(rehearsal, "PROMPTS", prompts)
    config = Config.make(data=(str(requests_file),), rehearse="1.5%", eval_share=0.1, epochs=8)
    proof, plain = prove(config, tokenizer), prove(config, tokenizer)
    beats: list[int] = []
    with opened.as_base():
        said = ask(opened.model, opened.tokenizer, [[{"role": "user", "content": text}] for text, _ in prompts], 12)
        line = rehearse(proof, config, opened.model, tokenizer, tmp_path / "rehearsed.jsonl", lambda: beats.append(1))
    rows = [json.loads(row)["messages"] for row in (tmp_path / "rehearsed.jsonl").read_text().splitlines()]
    assert rows
    assert len(beats) == len(prompts)
    told = {row[0]["content"]: row[1]["content"] for row in rows}
    assert told == {text: reply for (text, _), reply in zip(prompts, said, strict=True) if text in told}
    count, made = len(plain.train), len(rows)
    assert line.startswith(f"{made} general prompts" if made == 3 else f"{made} of 3 general prompts")
    # The rows come twice as often: eight epochs see each of them eight times, and each answer four times.
    assert line.endswith("; seen 4 times in 8 epochs")
    assert proof.facts["rehearsed"]["rounds"] == proof.train.rounds == 2
    assert len(proof.train) == 2 * count + made == len(proof.train.lengths) == len(proof.train.targets)
    assert len(proof.train.rows) == count
    assert proof.train.tokens == 2 * plain.train.tokens + proof.facts["rehearsed"]["tokens"]
    assert str(proof.train.place(2 * count)) == "rehearsed.jsonl:1"
    for at in (0, count - 1, count, 2 * count - 1):
        assert proof.train[at][0].tolist() == plain.train[at % count][0].tolist()
        assert proof.train.lengths[at] == len(proof.train[at][0])
        assert proof.train.place(at) == plain.train.place(at % count)
    ids, supervised = proof.train[2 * count]
    assert rows[0][0]["content"] in tokenizer.decode(ids)
    assert tokenizer.decode(ids[supervised]).strip() == f"{rows[0][1]['content']}<|im_end|>"
    supervised_there = sum(int(proof.train[2 * count + at][1].sum()) for at in range(made))
    assert proof.train.supervised_tokens == 2 * plain.train.supervised_tokens + supervised_there
    # A run that goes on takes what was answered, whatever the model would say now.
    again = prove(config, tokenizer)
    rehearse(again, config, None, tokenizer, tmp_path / "rehearsed.jsonl")
    assert [again.train[at][0].tolist() for at in range(len(again.train))] == [
        proof.train[at][0].tolist() for at in range(len(proof.train))
    ]


def test_a_model_that_never_ends_has_nothing_to_rehearse(
    opened: Opened,
    requests_file: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rehearsal, "REPLY_TOKENS", 1)
    monkeypatch.setattr(rehearsal, "PROMPTS", PROMPTS[:4])
    config = Config.make(data=(str(requests_file),), rehearse=0.01)
    with pytest.raises(UserError, match="ended none of its answers"):
        rehearse(prove(config, tokenizer), config, opened.model, tokenizer, tmp_path / "rehearsed.jsonl")
    assert not (tmp_path / "rehearsed.jsonl").exists()
