"""What a model could before its training and can't any more: the package's general set, with the adapter off and on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from slimtune.base.computes import CANT_TAKE
from slimtune.data.render import Manner, prompt_ids
from slimtune.errors import UserError
from slimtune.run.interval import bootstrap
from slimtune.use.general import GENERAL
from slimtune.use.samples import Asked, Samples

__all__ = ["general_change"]

SECONDS = 20.0
"""Most time for all of it."""
GROUP = 22
"""Questions that are asked together, on both sides; as many groups as there is time for."""
TOKENS = 24
"""Most tokens of an answer: the right ones are short."""
LEAST = 16
"""Questions that both sides answered; of fewer nothing is said."""


def general_change(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    manner: Manner,
    goes_on: Callable[[], bool],
    tell: Callable[[str], None],
) -> dict[str, Any] | None:
    """How many of the general questions are answered right without the adapter, and with it.

    Answers are greedy and bounded in time; a question that time cut on one side counts on neither.

    Args:
        model: PEFT's wrapping of the base, in eval mode.
        tokenizer: With the run's chat template.
        manner: How the run renders conversations.
        goes_on: Whether to go on, asked at every token.
        tell: Takes the reason why nothing can be said.

    Returns:
        questions, before, after, and the interval of the change of their share (value, low, high); None if the model
        can't be asked, answers too slowly, or isn't to go on.
    """
    right: list[tuple[bool, bool]] = []
    began = time.monotonic()
    try:
        for start in range(0, len(GENERAL), GROUP):
            taken = time.monotonic() - began
            if start and taken * (start + GROUP) / start > SECONDS:
                break
            questions = GENERAL[start : start + GROUP]
            asked = [Asked(prompt_ids(tokenizer, one.messages, manner=manner), "", one.text, "") for one in questions]
            answer = Samples(asked, tokenizer, manner, tokens=TOKENS)
            now = answer(model, (SECONDS - taken) / 2, goes_on)
            with model.disable_adapter():
                before = answer(model, (SECONDS - taken) / 2, goes_on)
            if now is None or before is None:
                return None
            right += [
                (question.is_right(was["reply"]), question.is_right(is_now["reply"]))
                for question, was, is_now in zip(questions, before, now, strict=True)
                if "time" not in (was["ended"], is_now["ended"])
            ]
    except (UserError, torch.OutOfMemoryError, *CANT_TAKE) as error:
        tell(f"not asked: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return None
    if len(right) < LEAST:
        tell(f"in {SECONDS:g} s both sides answered {len(right)} questions, too few to say something")
        return None
    scores = np.array(right, np.float64)
    change = bootstrap(scores[:, 1] - scores[:, 0])
    return {
        "questions": len(right),
        "before": int(scores[:, 0].sum()),
        "after": int(scores[:, 1].sum()),
        "change": asdict(change),
    }
