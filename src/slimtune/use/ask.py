"""Ask a loaded model a few things at once, greedily: what the demo and the checks after training do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimtune.data.render import Manner
from slimtune.use.generate import generate
from slimtune.use.load import Found, Opened, stop_ids
from slimtune.use.sampling import Sampling

__all__ = ["ask", "opened_as_it_is"]


def opened_as_it_is(model: Any, tokenizer: PreTrainedTokenizerBase, manner: Manner | None = None) -> Opened:
    """A loaded model as something that answers, in the middle of its training too; it must be in eval mode by then."""
    name = str(model.config.name_or_path)
    return Opened(Found(name, Path(name), None, None), model, tokenizer, stop_ids(model, tokenizer, manner))


def ask(
    model: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Any]], max_new_tokens: int
) -> list[str]:
    """The model's reply to each conversation, the likeliest token at each step.

    Args:
        model: A Transformers model or PEFT's wrapping of one; its training mode is what it was, afterwards.
        tokenizer: With the chat template.
        conversations: Messages; the last of each is the user's.
        max_new_tokens: Most tokens of a reply.
    """
    opened = opened_as_it_is(model, tokenizer)
    training = model.training
    model.eval()
    try:
        prompts = [opened.prompt_ids(messages) for messages in conversations]
        replies = {
            reply.index: reply.text for reply in generate(opened, prompts, Sampling(max_new_tokens=max_new_tokens))
        }
    finally:
        model.train(training)
    return [replies[index] for index in range(len(prompts))]
