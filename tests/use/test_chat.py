from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slimtune.errors import UserError
from slimtune.use.chat import ChatSession
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling

SHORT = Sampling(max_new_tokens=12)


def _expected(opened: Opened, messages: list[dict[str, str]], tokens: int) -> str:
    """The same reply, token by token, by hand."""
    ids = opened.prompt_ids(messages)
    reply: list[int] = []
    with torch.inference_mode():
        while len(reply) < tokens:
            token = int(opened.model(torch.tensor([ids + reply], device=opened.device)).logits[0, -1].argmax())
            if token in opened.stop_ids:
                break
            reply.append(token)
    return str(opened.tokenizer.decode(reply, skip_special_tokens=True))


def test_the_second_reply_knows_the_first_exchange(opened: Opened) -> None:
    session = ChatSession(opened, SHORT)
    shown: list[str] = []
    first = session.reply("My name is Ada. Who are you?", shown.append)
    assert "".join(shown) == first
    assert len(shown) > 3
    second = session.reply("What is my name?", shown.append)
    history = [
        {"role": "user", "content": "My name is Ada. Who are you?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "What is my name?"},
    ]
    assert session.messages == [*history, {"role": "assistant", "content": second}]
    assert second == _expected(opened, history, 12)
    session.reset()
    assert session.messages == []


def test_the_system_text_leads_and_outlives_a_reset(opened: Opened) -> None:
    session = ChatSession(opened, SHORT, system="Answer in one word.")
    reply = session.reply("Hello?", lambda text: None)
    asked = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Hello?"}]
    assert reply == _expected(opened, asked, 12)
    session.reset()
    assert session.messages == asked[:1]


def test_the_base_answers_in_a_conversation_of_its_own(opened: Opened) -> None:
    def both(text: str) -> tuple[str, str]:
        asked = [{"role": "user", "content": text}]
        with opened.as_base():
            bare = _expected(opened, asked, 12)
        return _expected(opened, asked, 12), bare

    texts = ("Describe the sea.", "Name a bird and a tree.", "Why is it so?", "Say hello.", "Tell me something.")
    question, tuned, bare = next((text, *made) for text in texts if len(set(made := both(text))) == 2)
    session = ChatSession(opened, SHORT)
    assert session.reply(question, lambda text: None) == tuned
    session.switch(base=True)
    assert (session.model, session.messages) == (opened.found.base_name, [])
    assert session.reply(question, lambda text: None) == bare
    session.switch(base=True)  # the same again: the conversation goes on
    assert len(session.messages) == 2
    session.switch(base=False)
    assert session.model == opened.found.name
    assert session.reply(question, lambda text: None) == tuned
    alone = ChatSession(replace(opened, found=replace(opened.found, adapter=None)), SHORT)
    with pytest.raises(UserError, match="bare model"):
        alone.switch(base=True)


def test_an_interrupt_keeps_what_was_said(opened: Opened) -> None:
    session = ChatSession(opened, Sampling(max_new_tokens=50))
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.reply("Tell me a long story.", show)
    assert session.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    session.reply("Go on.", lambda text: None)
    assert [turn["role"] for turn in session.messages] == ["user", "assistant", "user", "assistant"]


def test_a_conversation_that_outgrows_the_context_is_refused_and_not_remembered(opened: Opened) -> None:
    session = ChatSession(opened, SHORT)
    with pytest.raises(UserError, match="conversation has"):
        session.reply("word " * 9000, lambda text: None)
    assert session.messages == []


def test_the_same_seed_draws_the_same_reply_another_seed_another(opened: Opened) -> None:
    replies = []
    for seed in (1, 1, 2):
        session = ChatSession(opened, Sampling(temperature=1.5, max_new_tokens=12, seed=seed))
        replies.append(session.reply("Tell me something.", lambda text: None))
    assert replies[0] == replies[1] != replies[2]
    session.reset()
    # What is asked again is drawn again.
    assert session.reply("Tell me something.", lambda text: None) != replies[2]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}],
)
def test_sampling_that_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
