"""Held-out prompts while it trains: the data's own tokens, the model's own replies, within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.documents import Documents, DocumentStore, DocumentWriter
from slimtune.data.preflight import prove
from slimtune.data.render import Manner
from slimtune.data.sources import Place
from slimtune.use import samples
from slimtune.use.ask import ask
from slimtune.use.load import Opened
from slimtune.use.samples import Samples, choose


@pytest.fixture(scope="module")
def held_out(requests_file: Path, tokenizer: PreTrainedTokenizerBase) -> Documents:
    documents = prove(Config.make(data=(str(requests_file),), eval_share=0.1), tokenizer).eval
    assert documents is not None
    return documents


def test_prompts_are_the_rows_own_up_to_the_reply(held_out: Documents, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = choose(held_out, tokenizer, 3, seed=42)
    assert asked == choose(held_out, tokenizer, 3, seed=42)
    assert asked != choose(held_out, tokenizer, 3, seed=43)
    assert len({one.row for one in asked}) == 3
    whole = {str(held_out.place(at)): held_out[at][0].tolist() for at in range(len(held_out))}
    for one in asked:
        assert whole[one.row][: len(one.ids)] == one.ids
        assert one.prompt.endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(whole[one.row]).startswith(one.prompt + one.expected)
    assert choose(held_out, tokenizer, 0, seed=42) == []


def test_a_text_is_gone_on_with(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = np.asarray(tokenizer("A river rises in the hills and is slow before it comes to the sea.")["input_ids"])
    with DocumentWriter(tmp_path) as writer:
        writer.add(ids.astype(np.int32), np.ones(len(ids), np.bool_), 0, Place("t.txt", 1))
        writer.add(ids.astype(np.int32), np.zeros(len(ids), np.bool_), 0, Place("t.txt", 2))
    (one,) = choose(Documents(DocumentStore(tmp_path), np.arange(2)), tokenizer, 3, seed=0)
    assert one.prompt + one.expected == tokenizer.decode(ids)
    assert len(one.ids) == len(ids) // 2


def test_replies_are_the_models_and_its_mode_stays(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "TOKENS", 8)
    # By ask(), whose prompts are rendered from messages.
    questions = ["Where is the spare key?", "Say nothing but: yes."]
    messages = [[{"role": "user", "content": text}] for text in questions]
    expected = ask(opened.model, opened.tokenizer, messages, samples.TOKENS)
    asked = [samples.Asked(opened.prompt_ids(turns), "f:1", "", "") for turns in messages]
    answer = Samples(asked, opened.tokenizer, Manner())
    opened.model.train()
    try:
        said = answer(opened.model, 1000.0, lambda: True)
        assert opened.model.training
    finally:
        opened.model.eval()
    assert said is not None
    assert [one["reply"] for one in said] == expected
    assert {one["ended"] for one in said} <= {"stop", "length"}


def test_time_ends_replies_and_a_stop_drops_them(opened: Opened) -> None:
    asked = [samples.Asked(opened.prompt_ids([{"role": "user", "content": "Count."}]), "f:1", "", "")]
    answer = Samples(asked, opened.tokenizer, Manner())
    said = answer(opened.model, 0.0, lambda: True)
    assert said is not None
    assert said[0]["ended"] == "time"
    assert len(opened.tokenizer(said[0]["reply"])["input_ids"]) <= 1
    turns: Iterator[bool] = iter([True, True, False])
    assert answer(opened.model, 1000.0, lambda: next(turns)) is None
    assert torch.is_grad_enabled()
