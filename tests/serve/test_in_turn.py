"""Requests computed in turn get what each would get alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from slimtune.serve.engine import Token
from slimtune.serve.in_turn import InTurn
from slimtune.serve.limits import Limits
from slimtune.serve.refusal import Refusal
from slimtune.use.generate import generate
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling
from tests.use.families import greedy, make_opened, prompts

NEW = 10
ASKED = prompts(4, 30, 19, 11)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return make_opened("lfm2")


@pytest.fixture
def engine(opened: Opened) -> Iterator[InTurn]:
    with ThreadPoolExecutor(1) as computing:
        made = InTurn(opened, Limits(batch=2), computing)
        made.start()
        yield made


async def _reply(engine: InTurn, prompt: list[int], sampling: Sampling, top: int | None = None) -> list[Token]:
    async with engine.reply(prompt, sampling, top_logprobs=top) as tokens:
        return [token async for token in tokens]


def test_replies_that_come_together_are_those_of_each_alone(engine: InTurn, opened: Opened) -> None:
    async def all_at_once() -> list[list[Token]]:
        return await asyncio.gather(*(_reply(engine, prompt, Sampling(max_new_tokens=NEW)) for prompt in ASKED))

    replies = asyncio.run(all_at_once())
    for prompt, reply in zip(ASKED, replies, strict=True):
        assert [token.id for token in reply if token.id not in opened.stop_ids] == greedy(opened, prompt, NEW)
        assert [token.last for token in reply] == [False] * (len(reply) - 1) + [True]
    assert engine.held == 0


def test_a_seed_draws_what_generate_draws(engine: InTurn, opened: Opened) -> None:
    drawn = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=NEW, seed=4)
    [expected] = generate(opened, ASKED[:1], drawn)
    said = [token.id for token in asyncio.run(_reply(engine, ASKED[0], drawn))]
    assert [token for token in said if token not in opened.stop_ids] == expected.ids


def test_log_probabilities_are_the_models(engine: InTurn) -> None:
    reply = asyncio.run(_reply(engine, ASKED[0], Sampling(max_new_tokens=3), top=2))
    for token in reply:
        assert token.chances is not None
        assert token.chances.top[0][0] == token.id
        assert token.chances.top[0][1] == pytest.approx(token.chances.logprob)
        assert token.chances.top[1][1] <= token.chances.logprob <= 0.0


def test_one_that_leaves_makes_room_and_one_after_the_end_is_refused(engine: InTurn) -> None:
    async def left() -> None:
        greedily = Sampling(max_new_tokens=200)
        tasks = [asyncio.create_task(_reply(engine, prompt, greedily)) for prompt in ASKED[:2]]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.held == 0
        assert len(await _reply(engine, ASKED[2], Sampling(max_new_tokens=2))) == 2
        await engine.stop()
        with pytest.raises(Refusal):
            await _reply(engine, ASKED[2], greedily)

    asyncio.run(left())
