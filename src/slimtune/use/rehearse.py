"""Rehearsal: a base's own answers to general prompts, as documents beside those of the data.

An adapter learns what its rows show and nothing holds it back elsewhere: after forty rows of one kind a small model
answers everything in that kind. What it answered before is the simplest thing that holds it (as pseudo-rehearsal,
Robins 1995; by a language model's own output in Scialom et al. 2022, arXiv:2205.12393).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.documents import Documents, Together
from slimtune.data.packing import MicroBatches, PackedBatches
from slimtune.data.preflight import Proof, prove
from slimtune.data.render import Manner, prompt_ids
from slimtune.errors import UserError
from slimtune.plan import ANSWER_WEIGHT, rounds_of_rows
from slimtune.run.durable import replace_file
from slimtune.run.statement import counted
from slimtune.use.ask import opened_as_it_is
from slimtune.use.generate import generate
from slimtune.use.rehearsed import PROMPTS
from slimtune.use.sampling import Sampling

__all__ = ["ANSWER_TOKENS", "answer", "expected", "rehearse"]

LEAST = 96
"""Of fewer rows too: a few answers hold a few answers (decision 158)."""
REPLY_TOKENS = 96
"""Most tokens of an answer; one that isn't ended by then is left out, as its end would be taught wrongly."""
ANSWER_TOKENS = 73
"""Of a prompt with its answer, on average, as SmolLM2 gives them: what a run's length is told by, before it begins."""
SPARE = 2.0
"""So many times the prompts that are wanted are asked."""


def wanted(config: Config, documents: Documents) -> int:
    """How many answers are to be rehearsed beside ``documents``."""
    return min(len(PROMPTS), max(LEAST, round(config.rehearse * len(documents))))


def expected(config: Config, data: MicroBatches) -> tuple[int, float]:
    """What a run's length is told by before there are answers: (how many they are at most, about how many micro-batches
    a pass over the rows has with its share of them).

    Args:
        config: Decided but for its steps.
        data: The rows' micro-batches alone.
    """
    if not config.rehearse:
        return 0, data.per_epoch
    rows = data.documents
    answers = wanted(config, rows)
    held = config.batch_tokens / ANSWER_TOKENS if isinstance(data, PackedBatches) else len(rows) / data.per_epoch
    return answers, data.per_epoch + math.ceil(answers / held) / rounds_of_rows(config)


def rehearse(
    proof: Proof,
    config: Config,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    beat: Callable[[], None] = lambda: None,
) -> str:
    """Add what ``config.rehearse`` asks for to the documents that ``proof`` trains on; gives the line that says it.

    Args:
        proof: Of the data; its facts get ``rehearsed``: wanted, documents, tokens, the passes over the rows to each
            over the answers, and what an answer's token counts beside a row's.
        config: Decided.
        model: The base, not wrapped yet.
        tokenizer: With the chat template.
        file: Where the answers stand. If it is there, they are taken from it: a run that goes on.
        beat: Called at each answer.

    Raises:
        UserError: There is no chat template, or the model can't answer.
    """
    count = wanted(config, proof.train)
    if not file.is_file():
        answer(model, tokenizer, config, count, file, beat)
    made = _documents(config, tokenizer, file)
    rounds = rounds_of_rows(config)
    proof.train = Together(proof.train, made, rounds, ANSWER_WEIGHT)
    proof.facts["rehearsed"] = {
        "wanted": count, "documents": len(made), "tokens": made.tokens, "rounds": rounds, "weight": ANSWER_WEIGHT,
    }  # fmt: skip
    many = f"{len(made):,} of {count:,}" if len(made) < count else f"{len(made):,}"
    line = f"{many} general prompts, {made.tokens:,} tokens, answered by the base as it was"
    if rounds > 1:
        line += f"; seen {config.passes / rounds:.3g} times in {counted(config.passes, 'epoch')}"
    return line


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: Config, count: int, file: Path, beat: Callable[[], None]
) -> None:
    """Have a base answer ``count`` general prompts, and write what it said to ``file``, as rows of messages.

    Args:
        model: The base, not wrapped yet; its training mode is what it was, afterwards.
        tokenizer: With the chat template.
        config: Its manner of rendering.
        count: Answers that are wanted. Greedy ones, of prompts in a fixed order.
        file: Appears whole or not at all.
        beat: Called at each answer.

    Raises:
        UserError: There is no chat template, or the model can't answer.
    """
    asked = PROMPTS[: round(SPARE * count)]
    rows = [[{"role": "user", "content": text}] for text, _ in asked]
    rows = [
        [{"role": "system", "content": system}, *row] if system else row
        for row, (_, system) in zip(rows, asked, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        manner = Manner.of(config)
        opened = opened_as_it_is(model, tokenizer, manner)
        prompts = [prompt_ids(tokenizer, row, manner=manner) for row in rows]
        said: dict[int, str] = {}
        for reply in generate(opened, prompts, Sampling(max_new_tokens=REPLY_TOKENS)):
            beat()
            if reply.stopped and reply.text.strip():
                said[reply.index] = reply.text
    finally:
        model.train(training)
    taken = [{"messages": [*rows[at], {"role": "assistant", "content": said[at]}]} for at in sorted(said)[:count]]
    if not taken:
        raise UserError(
            "the base ended none of its answers to general prompts",
            rule=f"rehearse trains on what it answers, in {REPLY_TOKENS} tokens at most.",
            way_out="Leave --rehearse out, or take a chat model.",
        )
    replace_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in taken))


def _documents(config: Config, tokenizer: PreTrainedTokenizerBase, file: Path) -> Documents:
    """What :func:`answer` wrote, rendered as training renders every row. What is longer than a pack is left out."""
    alone = config.model_copy(
        update={
            "data": (str(file),), "eval": (), "eval_share": 0.0, "format": "messages", "map": {}, "prefer": None,
            "max_length": min(config.max_length, config.batch_tokens), "overlong": "drop", "max_dropped": 0.999,
            "early_stopping": None,
        }
    )  # fmt: skip
    return prove(alone, tokenizer).train
