"""Ask a loaded model a few things at once, greedily: what the demo and the checks after training do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slimtune.data.render import prompt_ids
from slimtune.use.attention import any_length
from slimtune.use.load import stop_ids

__all__ = ["ask"]


@torch.inference_mode()
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
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    width = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.pad_token_id
    # Padded on the left, so that every prompt ends where the replies begin.
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    training = model.training
    model.eval()
    try:
        with any_length():
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(stop_ids(model, tokenizer)),
                pad_token_id=pad,
            )
    finally:
        model.train(training)
    return [str(tokenizer.decode(reply[width:], skip_special_tokens=True)) for reply in made]
