"""Pieces to ids: as the tokenizer itself, by the word or whole, and no text becomes a control token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from slimtune.data.render import renderer_for
from slimtune.data.tokens import Piece, TokenEncoder

Make = Callable[[str], PreTrainedTokenizerBase]

BY_WORD = ("smollm2", "llama3", "qwen2.5", "gemma")
texts = st.text(max_size=80) | st.text(
    st.sampled_from(" \n\t\r'st\"lld12345abcXYZé—“”½²…_-+=(){}[]<|>/\\.,:;!?"), max_size=120
)


@pytest.mark.parametrize("family", ["smollm2", "llama3"])
def test_known_words_are_looked_up(make_tokenizer: Make, family: str) -> None:
    encoder = renderer_for(make_tokenizer(family)).encoder
    made = encoder._words.encode("It's 1234 naïve words,\n\n  isn't it?  ")
    assert made is not None
    assert encoder._words.encode("船") is None


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=150)
@given(text=texts)
def test_text_gets_the_tokenizers_own_ids(make_tokenizer: Make, text: str) -> None:
    for family in ("smollm2", "llama3", "mistral"):
        tokenizer = make_tokenizer(family)
        encoder = renderer_for(tokenizer).encoder
        if encoder.pattern.search(text):
            continue
        assert encoder.text_ids(text).tolist() == tokenizer(text, add_special_tokens=False).input_ids


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=100)
@given(before=texts, after=texts)
def test_control_token_text_never_becomes_one(make_tokenizer: Make, before: str, after: str) -> None:
    for family in ("smollm2", "llama3", "qwen3", "phi3", "deepseek-v3"):
        tokenizer = make_tokenizer(family)
        encoder: TokenEncoder = renderer_for(tokenizer).encoder
        for control in sorted(encoder.special)[:3]:
            text = before + control + after
            ids = encoder.text_ids(text)
            assert not encoder.is_special[ids].any()
            assert control in tokenizer.decode(ids)


def test_control_pieces_and_text_pieces_alternate_as_the_tokenizer_would_cut(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoder = renderer_for(tokenizer).encoder
    text = "<|im_start|>user\nHi there<|im_end|>\n"
    pieces = [Piece(part, encoder.controls.get(part, -1), False, False) for part in encoder.pattern.split(text) if part]
    ids, mask = encoder.encode([pieces])[0]
    assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert not mask.any()


def test_the_fingerprint_changes_with_the_tokenizer(make_tokenizer: Make) -> None:
    prints = {renderer_for(make_tokenizer(family)).encoder.fingerprint for family in BY_WORD}
    assert len(prints) == len(BY_WORD)
