"""The bytes beside log probabilities join to the reply's text, whatever tokens its characters are made of."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.serve.choice import Chances
from slimtune.serve.engine import Token
from slimtune.serve.shape import Chat, Completion
from slimtune.serve.spelling import Spelling
from tests.data.tokenizers import BUILT

TEXT = "It's Grüße, 山 🦀 龘 and 👩‍💻\n  end �."


def _tokens(ids: list[int]) -> list[Token]:
    return [Token(token, Chances(-1.0, [(token, -1.0), (ids[-1], -2.0)]), token == ids[-1]) for token in ids]


@pytest.mark.parametrize(
    "kind", ["byte-level", "first", "always", "never", "prepend", "llama, legacy", "unigram", "own"]
)
def test_bytes_join_to_the_text(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    known = tokenizer if kind == "own" else BUILT[kind].make()
    ids = known.encode(TEXT, add_special_tokens=False)
    shape = Chat("m", True, Spelling(known, known.eos_token_id))
    # In two chunks of a stream: the reply begins once.
    content: list[Any] = []
    for part in (ids[:3], ids[3:]):
        logprobs = shape._logprobs(_tokens(part))
        assert logprobs is not None
        content += logprobs["content"]
    joined = b"".join(bytes(token["bytes"]) for token in content)
    assert joined.decode() == known.decode(ids, clean_up_tokenization_spaces=False)
    for token in content:
        assert token["top_logprobs"][0]["bytes"] == token["bytes"]


def test_half_a_character_is_spelled_by_its_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("山", add_special_tokens=False)
    spelling = Spelling(tokenizer, 2)
    assert [spelling(token, first=False) for token in ids] == [("\\xe5\\xb1", b"\xe5\xb1"), ("\\xb1", b"\xb1")]
    made = Completion("m", True, spelling)._logprobs(_tokens(ids))
    assert made is not None
    assert made["tokens"] == ["bytes:\\xe5\\xb1", "bytes:\\xb1"]
    # Two tokens stay two, also where both are halves.
    assert made["top_logprobs"][0] == {"bytes:\\xe5\\xb1": -1.0, "bytes:\\xb1": -2.0}
