from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slimtune.use.stream import TextStream

TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("你好世界，吃饭了吗？龘靐齉👩‍💻🇨🇭 \n")), max_size=40
)


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [piece for piece in [*(stream.push(token) for token in ids), stream.end()] if piece]


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_pieces_are_the_whole_text(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(_pieces(tokenizer, ids)) == whole


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("你好世界，吃饭了吗？龘靐齉👩‍💻"), min_size=1, max_size=40))
def test_no_character_is_broken(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = _pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_reply_cut_inside_a_character_ends_with_a_mark(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("好龘", add_special_tokens=False)
    pieces = _pieces(tokenizer, ids[:-1])
    assert "".join(pieces) == tokenizer.decode(ids[:-1])
    assert pieces[-1].endswith("\N{REPLACEMENT CHARACTER}")


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerBase:
    """Word pieces joined by a marker, bytes for what is unknown, as Llama 2 and Mistral tokenizers have it."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "!", "▁the", "re"]
    backend = Tokenizer(
        models.Unigram([(piece, -float(at)) for at, piece in enumerate(vocabulary)], unk_id=0, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", ["Hello world! there", "Hello 你好 world", "👩‍💻there", " ", "the re"])
def test_spaces_between_word_pieces_are_kept(text: str, sentencepiece_like: PreTrainedTokenizerBase) -> None:
    ids = sentencepiece_like.encode(text, add_special_tokens=False)
    whole = sentencepiece_like.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(_pieces(sentencepiece_like, ids)) == whole
