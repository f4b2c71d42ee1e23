"""Pieces to ids: as the tokenizer itself, by the word or whole, and no text becomes a control token."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slimtune.data.conversation import normalise
from slimtune.data.render import prompt_ids, renderer_for
from slimtune.data.tokens import Piece, TokenEncoder
from slimtune.errors import UserError
from tests.data.tokenizers import BUILT, CODE, Built

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


PLAIN = (
    {"role": "user", "content": "What floats? "},
    {"role": "assistant", "content": "A boat floats."},
    {"role": "user", "content": " And   what sinks?\nSay it."},
    {"role": "assistant", "content": "An anchor.\n\nThat is it"},
)


@pytest.fixture(scope="module", params=BUILT)
def built(request: pytest.FixtureRequest) -> tuple[Built, PreTrainedTokenizerBase]:
    kind = BUILT[request.param]
    return kind, kind.make()


def encoded(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
    renderer = renderer_for(tokenizer)
    [draft] = renderer.drafts(normalise({"messages": list(messages)}))
    ids, mask = renderer.encoder.encode([draft.pieces])[0]
    return ids.tolist(), mask.tolist()


def test_trained_ids_are_transformers_own(built: tuple[Built, PreTrainedTokenizerBase]) -> None:
    kind, tokenizer = built
    text = str(tokenizer.apply_chat_template(list(PLAIN), tokenize=False))
    ids, mask = encoded(tokenizer, PLAIN)
    assert ids == tokenizer(text, add_special_tokens=kind.bos == "post").input_ids
    assert sum(mask) > 8


@pytest.mark.parametrize("reply", ["A boat floats.", CODE, " it", "\n\nit"])
def test_a_reply_stands_behind_its_prompt_and_decodes_to_itself(
    built: tuple[Built, PreTrainedTokenizerBase], reply: str
) -> None:
    kind, tokenizer = built
    messages = [{"role": "user", "content": "What floats?"}, {"role": "assistant", "content": reply}]
    ids, mask = encoded(tokenizer, messages)
    prompt = prompt_ids(tokenizer, messages[:1])
    start = mask.index(True)
    assert ids[:start] == prompt
    if "船" in reply and not kind.byte_fallback and kind.prefix != "none":
        return  # its vocabulary has no such character
    lost = tokenizer.backend_tokenizer.normalizer
    wanted = reply if lost is None or kind.prefix == "prepend" else _normalised(kind, reply)
    before = tokenizer.decode(prompt, skip_special_tokens=False)
    after = tokenizer.decode(ids, skip_special_tokens=False)
    assert after.startswith(before)
    said = after[len(before) :].removesuffix("<|end|>")
    behind_control = prompt[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    # There the tokenizer writes its prefix space; Metaspace only where the text doesn't begin with one.
    if behind_control and (kind.prefix == "prepend" or (kind.prefix == "always" and not reply.startswith(" "))):
        said = said.removeprefix(" ")
    assert said == wanted


def _normalised(kind: Built, reply: str) -> str:
    return reply if kind.normalizer is None else str(kind.normalizer.normalize_str(reply))


def test_raw_text_begins_as_the_tokenizer_begins_it(built: tuple[Built, PreTrainedTokenizerBase]) -> None:
    _, tokenizer = built
    renderer = renderer_for(tokenizer)
    [draft] = renderer.drafts(normalise({"text": "The quick brown fox"}))
    ids, _ = renderer.encoder.encode([draft.pieces])[0]
    assert ids[:-1].tolist() == tokenizer("The quick brown fox").input_ids


@pytest.mark.parametrize("begins", [["<s>"], ["<|user|>", "<|system|>"], ["<s>", "<|user|>"], ["<|user|>", "<s>"]])
@pytest.mark.parametrize("written", [False, True])
def test_raw_text_begins_with_all_that_the_tokenizer_puts_there(begins: list[str], written: bool) -> None:
    """As GLM's, which puts two tokens that aren't its BOS; what a program wrote itself isn't put there again."""
    tokenizer = BUILT["byte-level"].make()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*begins, "$A", "</s>"]),
        special_tokens=[(t, backend.token_to_id(t)) for t in {*begins, "</s>"}],
    )
    renderer = renderer_for(tokenizer)
    conversation = normalise({"text": "".join(begins) * written + "The fox"})
    conversation.rendered = written
    [draft] = renderer.drafts(conversation)
    assert renderer.encoder.encode([draft.pieces])[0][0].tolist() == tokenizer("The fox").input_ids


def test_a_token_that_transformers_reads_as_text_is_text() -> None:
    tokenizer = BUILT["byte-level"].make()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": "|"}, "content": "/"}
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 800, "content": "<|odd|>", "normalized": True})
    spec["normalizer"] = {"type": "Prepend", "prepend": "_"}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>")
    encoder = TokenEncoder(made)
    assert encoder.read_as_text == ("<|odd|>",)
    assert not encoder.pattern.search("a<|odd|>b")
    assert encoder.text_ids("a<|odd|>b").tolist() == made("a<|odd|>b", add_special_tokens=False).input_ids


def test_a_template_that_writes_a_token_read_both_ways_is_refused() -> None:
    tokenizer = dataclasses.replace(BUILT["prepend"], normalized=True).make()
    assert "<|end|>" in TokenEncoder(tokenizer).wavering
    with pytest.raises(UserError, match="as a control token in some places") as caught:
        renderer_for(tokenizer)
    assert '"normalized": false' in caught.value.way_out


def test_a_pattern_that_runs_in_circles_is_told() -> None:
    """The tokenizers library gives up on it, by a panic."""
    tokenizer = BUILT["byte-level"].make()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    encoder = TokenEncoder(tokenizer)
    with pytest.raises(UserError, match=r"can't encode a text.*retry-limit"):
        encoder.text_ids("a" * 40 + "!")
