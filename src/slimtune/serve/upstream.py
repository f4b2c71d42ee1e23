"""What serving leans on that its libraries don't promise, in one place, and the versions that it was tried with.

Continuous batching is Transformers' newest part and changes from version to version; uvicorn has no timeout for a
request's head. So :mod:`slimtune.serve.engine`, :mod:`~slimtune.serve.paged`, :mod:`~slimtune.serve.attention` and
:mod:`~slimtune.serve.choice` reach into the one, :mod:`~slimtune.serve.connection` into the other:

- the names below, which are looked for when the server starts;
- that a manager has its scores changed by ``logit_processor`` and keeps its ``batch_processor``, and that one its
  ``scheduler`` with ``active_requests`` and ``waiting_requests``;
- that the attention is called with ``cu_seq_lens_q`` and ``cu_seq_lens_k``, and until 5.23 with the ``cache``.

How all of it works together is tried on the loaded model: :func:`slimtune.serve.paged.why_not_paged` compares what
comes out, and :meth:`slimtune.serve.api.Api.greet` has each engine answer before any client may ask.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

from transformers import ContinuousBatchingConfig

from slimtune.errors import UserError

__all__ = ["OLD_TRANSFORMERS", "TRIED", "check_uvicorn", "what_transformers_lacks"]

TRIED = {"transformers": "5.17 to 5.24", "uvicorn": "0.40 to 0.54"}
"""By library, the versions that the tests passed with."""

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
_UVICORN = {
    "uvicorn.protocols.http.h11_impl": {
        "H11Protocol": "connection_made connection_lost data_received on_response_complete",
    },
    "uvicorn": {"Server": "startup on_tick shutdown handle_exit"},
}


def what_transformers_lacks() -> str | None:
    """The first name that the installed Transformers doesn't have, in words; None if it has all."""
    return _lacks("transformers", _TRANSFORMERS)


def check_uvicorn() -> None:
    """Look for what is needed of uvicorn.

    Raises:
        UserError: The installed version doesn't have it.
    """
    if (lacks := _lacks("uvicorn", _UVICORN)) is not None:
        raise UserError(
            lacks,
            rule=f"slimtune serve was tried with {TRIED['uvicorn']}.",
            way_out="Install one of these: pip install 'uvicorn<=0.54'",
        )


def _lacks(library: str, names: dict[str, dict[str, str]]) -> str | None:
    for module, classes in names.items():
        for name, attributes in classes.items():
            try:
                found = getattr(import_module(module), name)
            except (ImportError, AttributeError):
                return f"{library} {version(library)} has no {module}.{name}"
            for attribute in attributes.split():
                if not hasattr(found, attribute):
                    return f"{library} {version(library)} has no {name}.{attribute}"
    return None
