"""How a config says its model turns queries and keys by their positions. No torch."""

from __future__ import annotations

from typing import Any

__all__ = ["STATIC_ROPE", "rope_types", "turns_anew"]

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Rotary embeddings whose angles depend on the position alone, not on the longest sequence seen."""


def rope_types(config: Any) -> set[str]:
    """The types of a config's rotary embeddings, one for all layers or one for each type of layer."""
    return {str(each.get("rope_type", "default")) for each in _parameters(config)}


def turns_anew(config: Any) -> int | None:
    """The tokens up to which a text model turns each token by its position alone; None if it always does.

    With one token more, ``longrope`` (Phi-3, Phi-4-mini) and ``dynamic`` turn all tokens of the text otherwise, and by
    the longest text of a batch all its texts (Transformers' ``dynamic_rope_update``). Keys that were kept before are
    wrong behind that token.
    """
    limits = (_limit(each, config) for each in _parameters(config))
    return min((limit for limit in limits if limit is not None), default=None)


def _parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _limit(parameters: dict[str, Any], config: Any) -> int | None:
    kind = str(parameters.get("rope_type"))
    if kind == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return int(config.max_position_embeddings) if "dynamic" in kind else None
