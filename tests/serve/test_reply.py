"""Text with stop strings: nothing of a stop string is ever shown, and nothing else is lost."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.serve.reply import StopText

TEXT = "One aab, two aaab. 你好，世界 👩‍💻 ab"


@pytest.mark.parametrize("stops", [[], ["aab"], ["ab."], ["，世", "zzz"], ["💻"], ["ab", "aaab"], ["x" * 50], ["One"]])
def test_the_text_ends_where_the_first_stop_string_begins(tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> None:
    text = StopText(tokenizer, stops)
    shown = ""
    expected = TEXT[: min([place for place in map(TEXT.find, stops) if place >= 0], default=len(TEXT))]
    for token in tokenizer(TEXT)["input_ids"]:
        shown += text.push(token)
        assert expected.startswith(shown)
        if text.stopped:
            break
    else:
        shown += text.end()
    assert shown == expected
    assert text.stopped == (expected != TEXT)
