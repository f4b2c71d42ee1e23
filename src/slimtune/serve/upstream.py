"""What serving leans on that Transformers doesn't promise, in one place.

Continuous batching is Transformers' newest part and changes from version to version. :mod:`slimtune.serve.engine`,
:mod:`~slimtune.serve.paged`, :mod:`~slimtune.serve.attention` and :mod:`~slimtune.serve.choice` reach into it:

- the names below, which are looked for when the server starts;
- that a manager has its scores changed by ``logit_processor`` and keeps its ``batch_processor``, and that one its
  ``scheduler`` with ``active_requests`` and ``waiting_requests``;
- that the attention is called with ``cu_seq_lens_q`` and ``cu_seq_lens_k``, and until 5.23 with the ``cache``.

How all of it works together is tried on the loaded model: :func:`slimtune.serve.paged.why_not_paged` compares what
comes out, and :meth:`slimtune.serve.api.Api.greet` has each engine answer before any client may ask.
"""

from __future__ import annotations

from transformers import ContinuousBatchingConfig

from slimtune.serve.installed import lacks

__all__ = ["OLD_TRANSFORMERS", "what_transformers_lacks"]

OLD_TRANSFORMERS = "page_size" not in ContinuousBatchingConfig.__dataclass_fields__
"""5.17 calls a page a block, knows no switch, and hands its cache to the attention in another way."""

_BATCHING = "transformers.generation.continuous_batching"
_TRANSFORMERS = {
    f"{_BATCHING}.continuous_api": {
        "ContinuousBatchingManager": (
            "start stop destroy is_running add_request cancel_request __iter__ _create_batch_processor"
        ),
        "ContinuousMixin": "init_continuous_batching",
        "ContinuousBatchProcessor": "prepare_next_batch _generation_step update_batch",
    },
    f"{_BATCHING}.cb_logits_processors": {"ContinuousBatchingLogitsProcessorList": "prepare_tensor_args __call__"},
    f"{_BATCHING}.cache": {"PagedAttentionCache": "update"},
    "transformers": {"PreTrainedModel": "set_attn_implementation _can_set_attn_implementation"},
}


def what_transformers_lacks() -> str | None:
    """The first name that the installed Transformers doesn't have, in words; None if it has all."""
    return lacks("transformers", _TRANSFORMERS)
