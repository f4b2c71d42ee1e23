"""What a value must be, in a sentence for people: from what pydantic found wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["must_be"]

_KINDS = {
    "int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false", "string": "a text",
    "tuple": "a list", "list": "a list", "dict": "a mapping", "path": "a path",
    "date": "a date, as 2026-01-31",
}  # fmt: skip
_BOUNDS = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt"),
           "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}  # fmt: skip


def must_be(found: Sequence[Mapping[str, Any]]) -> str:
    """The rule that a value breaks, as "It is at least 1, or 'auto'."

    Args:
        found: What :meth:`pydantic.ValidationError.errors` says of one field: where it may be of several kinds, each.

    Returns:
        A sentence; pydantic's own where it names another rule.
    """
    said = list(dict.fromkeys(filter(None, map(_one_of, found))))
    if not said:
        return str(found[0]["msg"]).removeprefix("Value error, ")
    return f"It is {', or '.join(said)}."


def _one_of(found: Mapping[str, Any]) -> str | None:
    kind, given = str(found["type"]), found.get("ctx") or {}
    if kind == "literal_error":
        values = str(given["expected"]).replace(" or ", ", ")
        return f"one of {values}" if "," in values else values
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{word} {given[key]:g}"
    if kind == "too_short":
        return f"a list of at least {given['min_length']}"
    return _KINDS.get(kind.partition("_")[0]) if kind.partition("_")[2] != "pattern_mismatch" else None
