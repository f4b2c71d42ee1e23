"""Transformers' continuous batching for one model: how it is set up, and whether the model bears it.

Its attention knows full and sliding windows over keys and values of one size, one cache for all requests. Another
cache it refuses, some of what a model does in its attention it leaves out (a softcap) or has no place for (ALiBi). So
what comes out is tried, once when the server starts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from slimtune.families.rotation import turns_anew
from slimtune.serve.attention import attend_by_request
from slimtune.serve.choice import Chooser
from slimtune.serve.models import sharing
from slimtune.serve.upstream import OLD_TRANSFORMERS, what_transformers_lacks
from slimtune.use.cache import Holds, what_it_holds
from slimtune.use.load import Opened
from slimtune.use.way import FAULTS, apart, at_once, is_rounding, trial_prompts

__all__ = ["PAGE", "make_manager", "why_not_paged"]

# Prompts that begin alike share whole pages: the smaller a page, the less of a known beginning is computed again.
PAGE = 8
# The second: never fetches a kernel from the hub, and computes attention in the same way on every machine.
_NAMES: dict[str, Any] = {"page_size": PAGE, "auto_switch_to_flash": False}
_OLD_NAMES: dict[str, Any] = {"block_size": PAGE}
# The trial's: its prompts are computed in parts, and some tokens follow each.
_TRIAL_TOKENS, _TRIAL_NEW = 24, 3


def make_manager(opened: Opened, pages: int, step_tokens: int, requests: int) -> tuple[Any, Any]:
    """A copy of the model's modules, which shares the tensors, and the manager that computes on it.

    Args:
        opened: The model.
        pages: Pages of keys and values that are set aside.
        step_tokens: Most tokens of a step.
        requests: Most requests of a step.
    """
    model = sharing(opened.model.get_base_model() if opened.found.adapter is not None else opened.model)
    manager = model.init_continuous_batching(
        GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=list(opened.stop_ids), pad_token_id=opened.pad_id
        ),
        ContinuousBatchingConfig(
            num_blocks=pages,
            max_batch_tokens=step_tokens,
            max_requests_per_batch=requests,
            use_cuda_graph=False,
            use_async_batching=False,
            **(_OLD_NAMES if OLD_TRANSFORMERS else _NAMES),
        ),
    )
    # Not for models that compute their attention otherwise (sinks, softcaps), and not measured on a GPU.
    if opened.device.type == "cpu" and model.config._attn_implementation == "sdpa" and not OLD_TRANSFORMERS:
        attend_by_request(model)
    return model, manager


@torch.inference_mode()
def why_not_paged(opened: Opened, longest: int | None = None) -> str | None:
    """Why this model can't be computed so, or None.

    Args:
        opened: The model.
        longest: Most tokens of a request, prompt and reply; as many as the model takes unless given.
    """
    if (lacks := what_transformers_lacks()) is not None:
        return lacks
    config = opened.model.config.get_text_config(decoder=True)
    bare = opened.model.get_base_model() if opened.found.adapter is not None else opened.model
    if what_it_holds(config) is not Holds.KEYS:
        return "its layers keep more than keys and values"
    if not bare._can_set_attn_implementation():
        return "it computes its attention in a way of its own"
    # Left out without a word, and of no effect on the trial's short prompts perhaps.
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a softcap"
    prompts = {str(number): prompt for number, prompt in enumerate(trial_prompts(opened))}
    # The cache would forget what is outside it, the attention reads all.
    if getattr(config, "sliding_window", None) and "sliding_window" not in getattr(config, "__dataclass_fields__", ()):
        return "its config has a sliding_window, its class has no window"
    turns = turns_anew(config)
    if turns is not None and min(longest or opened.context, opened.context) > turns:
        return f"a request of more than {turns:,} tokens would change the rotation of those beside it"
    heard = _Listening()
    try:
        pages = sum(len(prompt) + _TRIAL_NEW for prompt in prompts.values()) // PAGE + 2 * len(prompts) + 1
        model, manager = make_manager(opened, pages, _TRIAL_TOKENS, len(prompts))
        manager.logit_processor = heard
        processor = manager._create_batch_processor()
        for name, prompt in prompts.items():
            manager.add_request(prompt, request_id=name, max_new_tokens=_TRIAL_NEW)
        while processor.prepare_next_batch():
            processor._generation_step(model)
            processor.update_batch()
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    for name, prompt in prompts.items():
        scores = torch.stack(heard.scores[name])
        said = scores.argmax(-1).tolist()
        wrong = apart(scores, at_once(opened.model, prompt, said[:-1]))
        if not is_rounding(wrong, opened.model):
            return f"its scores are {wrong:.1%} of their spread off"
    return None


class _Listening(Chooser):
    """Notes each request's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[str, list[Tensor]] = {}

    def __call__(self, input_ids: Any, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Nothing is changed."""
        for row, request in enumerate(self._rows):
            self.scores.setdefault(request, []).append(scores[row].clone())
        return scores
