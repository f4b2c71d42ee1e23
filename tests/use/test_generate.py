from __future__ import annotations

import itertools

import pytest
import torch

from slimtune.errors import UserError
from slimtune.use.generate import Reply, generate
from slimtune.use.load import Opened
from slimtune.use.lookup import Lookup
from slimtune.use.rows import KeptRows
from slimtune.use.sampling import Draws, Sampling

ASKED = (
    "Hi",
    "What is the capital of France?",
    "Write the word yes.",
    "用一句话介绍你自己。",
    "Explain in two sentences, to a child of six years who has never seen it, why the sea is salt and rivers are not.",
    "2 + 2?",
)


def _prompts(opened: Opened) -> list[list[int]]:
    asked = [[{"role": "user", "content": text}] for text in ASKED]
    # One has another system text, so that not all rows begin alike.
    asked.append([{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hello?"}])
    return [opened.prompt_ids(messages) for messages in asked]


def _alone(opened: Opened, prompt: list[int], new: int) -> list[int]:
    """Plain ``generate``, one prompt, no padding."""
    config = Sampling(max_new_tokens=new).generation_config(opened, new)
    ids = torch.tensor([prompt], device=opened.device)
    with torch.inference_mode():
        made = opened.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    reply: list[int] = made[0, len(prompt) :].tolist()
    return list(itertools.takewhile(lambda token: token not in opened.stop_ids, reply))


def _in_order(replies: list[Reply]) -> list[list[int]]:
    assert sorted(reply.index for reply in replies) == list(range(len(replies)))
    return [reply.ids for reply in sorted(replies, key=lambda reply: reply.index)]


@pytest.mark.parametrize("skip", [0, 1], ids=["mixed beginnings", "one beginning, computed once"])
def test_greedy_replies_are_those_of_plain_generate_on_each_prompt_alone(opened: Opened, skip: int) -> None:
    prompts = _prompts(opened)[: len(ASKED) + 1 - skip]
    expected = [_alone(opened, prompt, 20) for prompt in prompts]
    replies = list(generate(opened, prompts, Sampling(max_new_tokens=20)))
    assert _in_order(replies) == expected
    for reply in replies:
        assert reply.text == opened.tokenizer.decode(reply.ids, skip_special_tokens=True)
        assert reply.stopped == (len(reply.ids) < 20)


def test_rows_that_end_early_leave_without_changing_the_others(opened: Opened) -> None:
    """Each row's own early token is made a stop token, so that rows end one after another."""
    prompts = _prompts(opened)
    whole = [_alone(opened, prompt, 12) for prompt in prompts]
    stops = tuple({reply[at] for at, reply in enumerate(whole) if at < len(reply)} | set(opened.stop_ids))
    early = Opened(opened.found, opened.model, opened.tokenizer, stops)
    expected = [list(itertools.takewhile(lambda token: token not in stops, reply)) for reply in whole]
    assert len({len(reply) for reply in expected}) > 3
    assert _in_order(list(generate(early, prompts, Sampling(max_new_tokens=12)))) == expected


def test_what_a_reply_repeats_takes_fewer_passes_and_changes_nothing(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts that hold, that fail at every place, and that are cut by the end."""
    words = "tea, milk, bread, eggs, rice, salt"
    prompt = opened.prompt_ids([{"role": "user", "content": f"Repeat this list ten times: {words}; {words}; {words}"}])
    passes: list[int] = []
    step = KeptRows.step

    def counted(rows: KeptRows, ids: torch.Tensor) -> torch.Tensor:
        passes.append(ids.shape[1])
        return step(rows, ids)

    monkeypatch.setattr(KeptRows, "step", counted)
    greedy = Sampling(max_new_tokens=70)
    assert _in_order(list(generate(opened, [prompt], greedy))) == [_alone(opened, prompt, 70)]
    assert len(passes) < 50
    assert max(passes) > 7
    drawn = Sampling(temperature=0.6, max_new_tokens=40, seed=5)
    with_drafts = _in_order(list(generate(opened, [prompt], drawn)))
    wrong = (lambda self, history, most: [1, history[-1], 2][:most]), (lambda self, history, most: [])
    for draft in wrong:
        monkeypatch.setattr(Lookup, "draft", draft)
        assert _in_order(list(generate(opened, [prompt], drawn))) == with_drafts


def test_a_row_is_drawn_alike_in_any_batch(opened: Opened) -> None:
    prompts = _prompts(opened)
    drawn = Sampling(temperature=1.2, top_p=0.95, top_k=50, max_new_tokens=8, seed=3)
    together = _in_order(list(generate(opened, prompts, drawn)))
    by_twos = _in_order(list(generate(opened, prompts, drawn, most_rows=2)))
    assert together == by_twos
    other = _in_order(list(generate(opened, prompts, Sampling(temperature=1.2, max_new_tokens=8, seed=4))))
    assert other != together


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]]).repeat(20_000, 1)
    rows = range(20_000)
    free = Draws(Sampling(temperature=1.0), rows).choose(logits)
    shares = torch.bincount(free, minlength=5) / len(rows)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.015, rtol=0.0)
    assert set(Draws(Sampling(temperature=1.0, top_k=2), rows).choose(logits).tolist()) == {0, 1}
    # 0.64 + 0.24 passes 0.8, so the third is never drawn.
    assert set(Draws(Sampling(temperature=1.0, top_p=0.8), rows).choose(logits).tolist()) == {0, 1}
    assert set(Draws(Sampling(temperature=1.0, top_p=0.1), rows).choose(logits).tolist()) == {0}


def test_a_prompt_over_the_context_is_refused(opened: Opened) -> None:
    with pytest.raises(UserError, match="prompt 2 has 8192 tokens"):
        list(generate(opened, [[5], [5] * 8192], Sampling()))
