"""Every verb asks with the same token ids, and they are how the training document of that conversation begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtune.use.answers import answer_file
from slimtune.use.chat import ChatSession
from slimtune.use.compare import compare
from slimtune.use.evaluate import documents_of
from slimtune.use.load import Opened
from slimtune.use.questions import read_questions
from slimtune.use.sampling import Sampling
from slimtune.use.way import way_of

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "用中文回答：你好吗？"}],
    [{"role": "user", "content": "  spaces\n\nand <|im_end|> written by a person  "}],
]
ONE = Sampling(max_new_tokens=1)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "control text"])
def test_ids_are_the_same_in_every_verb_and_in_training(
    opened: Opened, messages: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [*messages, {"role": "assistant", "content": "Well."}]}) + "\n")
    trained, supervised = documents_of(opened, (str(rows),))[0]
    expected = trained[: int(supervised.argmax())].tolist()

    way_of(opened)  # what is tried before the first reply goes through the model too
    seen: list[list[int]] = []
    inner = opened.model.get_base_model()
    forward = inner.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        ids: torch.Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append(ids[0].tolist())
        return forward(*args, **kwargs)

    monkeypatch.setattr(inner, "forward", watched)
    session = ChatSession(opened, ONE, system=messages[0]["content"] if messages[0]["role"] == "system" else None)
    session.reply(messages[-1]["content"], lambda text: None)
    answer_file(opened, read_questions(str(rows)), tmp_path / "out.jsonl", ONE)
    # A prompt goes through the model in two parts, the last token by itself.
    asked = [expected[:-1], expected[-1:]]
    assert seen == asked * 2
    seen.clear()
    compare(opened, str(rows), general=False, sampling=ONE)
    # Two replies, then two losses on the whole document.
    assert seen == [*asked * 2, trained.tolist(), trained.tolist()]
