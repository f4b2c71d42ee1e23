"""Every kind of architecture gives the tokens that it gives without a cache, whatever is in its batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from slimtune.data.documents import Documents
from slimtune.errors import UserError
from slimtune.use.chat import ChatSession
from slimtune.use.decode import decode
from slimtune.use.evaluate import losses
from slimtune.use.generate import generate
from slimtune.use.load import Opened
from slimtune.use.sampling import Draws, Sampling
from slimtune.use.way import way_of
from tests.families.tiny import with_mxfp4
from tests.use.families import WINDOW, adapted, greedy, make_opened, make_turning, prompts

# Windows, sinks, chunks, distances instead of positions, learned positions, layers that use another's keys, experts,
# latent attention; recurrent layers alone, beside attention and in one layer with it; a text model among others.
FAMILIES = (
    "llama", "mistral", "gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "bloom", "mpt", "gpt2", "qwen3_moe",
    "deepseek_v3", "mamba", "qwen3_5_text", "lfm2", "falcon_h1", "qwen3_vl",
)  # fmt: skip
NEW = 24
# Shorter and longer than the window, two of one length, two that are read together, and one of a single token.
MIXED = prompts(5, 21, 21, 38, 36, 1)
SHARED = prompts(14, 22, 25, 41, 39, shared=12)


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest) -> Opened:
    return make_opened(request.param)


@pytest.mark.parametrize("asked", [MIXED, SHARED], ids=["mixed", "one beginning"])
def test_a_batch_gives_what_each_prompt_gives_alone_and_uncached(opened: Opened, asked: list[list[int]]) -> None:
    expected = [greedy(opened, prompt, NEW) for prompt in asked]
    assert len({token for reply in expected for token in reply}) > 5
    replies = {reply.index: reply.ids for reply in generate(opened, asked, Sampling(max_new_tokens=NEW))}
    assert [replies[index] for index in range(len(asked))] == expected
    # None of them was right only because it was computed the slow way.
    assert way_of(opened).slow is None


def test_a_text_that_grows_long_is_turned_as_a_long_one_and_those_beside_it_are_not() -> None:
    """Replies that begin short and end long, at every place where they may become it; others that stay short."""
    opened, turns = make_turning(60), 60
    asked = prompts(5, 30, turns - 2, turns - 1, turns, turns + 1, turns + 2, 90)
    expected = [greedy(opened, prompt, NEW) for prompt in asked]
    assert len({token for reply in expected for token in reply}) > 5
    replies = {reply.index: reply.ids for reply in generate(opened, asked, Sampling(max_new_tokens=NEW))}
    assert [replies[index] for index in range(len(asked))] == expected
    assert way_of(opened, turns).rows is None  # short ones are still answered together


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_next", "gpt_oss in MXFP4"])
def test_with_an_adapter_on_everything_it_gives_them_too(family: str) -> None:
    plain = make_opened(family.split()[0])
    opened = adapted(replace(plain, model=with_mxfp4(plain.model)) if "MXFP4" in family else plain)
    asked = prompts(5, 37, 1)
    expected = [greedy(opened, prompt, 8) for prompt in asked]
    with opened.model.disable_adapter():
        assert expected[0] != greedy(opened, asked[0], 8)
    replies = {reply.index: reply.ids for reply in generate(opened, asked, Sampling(max_new_tokens=8))}
    assert [replies[index] for index in range(len(asked))] == expected
    assert way_of(opened).slow is None


def test_rows_leave_and_the_last_one_goes_on(opened: Opened) -> None:
    asked = sorted(SHARED, key=len, reverse=True)
    limits = [3, 9, NEW, 1, 6]
    said: list[list[int]] = [[] for _ in asked]
    for row, token in decode(opened, asked, limits, Draws(Sampling(), range(len(asked)))):
        said[row].append(token)
    expected = [greedy(opened, prompt, limit) for prompt, limit in zip(asked, limits, strict=True)]
    assert [reply[: len(e)] for reply, e in zip(said, expected, strict=True)] == expected


def test_a_guess_that_fails_leaves_no_trace(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.use.lookup.Lookup.draft", lambda self, history, most: [7, history[-1], 9][:most])
    [prompt] = prompts(WINDOW + 4)
    [reply] = generate(opened, [prompt], Sampling(max_new_tokens=NEW))
    assert reply.ids == greedy(opened, prompt, NEW)


def test_chat_gives_them_too(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    [prompt] = prompts(WINDOW + 9)
    monkeypatch.setattr(Opened, "prompt_ids", lambda self, messages, tools=None: prompt)
    expected = opened.tokenizer.decode(greedy(opened, prompt, NEW), skip_special_tokens=True)
    assert ChatSession(opened, Sampling(max_new_tokens=NEW)).reply("anything", lambda text: None) == expected


def test_a_window_that_the_models_class_does_not_know_cuts_nothing() -> None:
    opened = make_opened("llama")
    opened.model.config.sliding_window = WINDOW  # left over from another class; Transformers' own cache obeys it
    expected = [greedy(opened, prompt, NEW) for prompt in MIXED]
    replies = {reply.index: reply.ids for reply in generate(opened, MIXED, Sampling(max_new_tokens=NEW))}
    assert [replies[index] for index in range(len(MIXED))] == expected


def test_memory_of_a_row_is_measured(opened: Opened) -> None:
    way = way_of(opened)
    assert way.state_bytes + way.token_bytes > 0
    if opened.found.name == "llama":
        config = opened.model.config
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        assert way.token_bytes == 2 * layers * heads * config.head_dim * torch.float32.itemsize
        assert way.state_bytes == 0


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "qwen3_5_text", "mamba", "bloom", "deepseek_v32"])
def test_losses_are_those_of_each_document_alone(family: str) -> None:
    opened = make_opened(family)
    documents = _Documents(prompts(5, 21, 40, 38, 2))
    measured = losses(opened, cast(Documents, documents))
    for at, ids in enumerate(documents.rows):
        with torch.inference_mode():
            logits = opened.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        assert measured.nats[at] == pytest.approx(float(expected), rel=1e-5)  # float32, summed over 39 tokens


class _Documents:
    """All tokens supervised."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.lengths = np.array([len(row) for row in rows], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> tuple[Any, Any]:
        return np.array(self.rows[at]), np.ones(len(self.rows[at]), dtype=bool)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_isnt_finite_chooses_no_token(temperature: float) -> None:
    """The highest of such scores is one of them, and was said as if it were a token that was meant."""
    opened = make_opened("llama")
    fine, bad = prompts(12, 9)
    with torch.no_grad():
        opened.model.get_input_embeddings().weight[bad[4]] = torch.inf
    assert bad[4] not in fine
    sampling = Sampling(temperature=temperature, max_new_tokens=2)
    assert len(next(iter(generate(opened, [fine], sampling))).ids) == 2
    with pytest.raises(UserError, match="for a prompt isn't finite"):
        list(generate(opened, [fine, bad], sampling))
