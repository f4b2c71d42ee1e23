"""LLaMA-Factory's ``dataset_info.json``: which file, of what shape, with which columns and tags.

Its format: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md. A row comes out under the names that
:mod:`slimtune.data.conversation` knows; whether it is preference data or has pictures is found there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimtune.errors import UserError

__all__ = ["Description", "descriptions"]

_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_NAMES = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label", "images": "images",
    "videos": "videos", "audios": "audios",
}  # fmt: skip
"""LLaMA-Factory's name of a column, and slimtune's."""
_ROLES = {
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "system_tag": ("system", "system"),
    "observation_tag": ("observation", "tool"), "function_tag": ("function_call", "function_call"),
}  # fmt: skip
"""Tag to (its value where none is given, the role)."""


@dataclass(frozen=True, slots=True)
class Description:
    """One data set as ``dataset_info.json`` describes it."""

    file: str
    """File or folder, from the folder of the description on."""
    hub: str = ""
    """``owner/name:split`` in place of a file."""
    subset: str = ""
    """Which part of the hub's data set, if not all of it."""
    shape: str = "alpaca"
    """alpaca, sharegpt or openai."""
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    sample: int | None = None

    def row(self, value: Any) -> Any:
        """A row under the names that slimtune reads."""
        if not isinstance(value, Mapping):
            return value
        names = self.columns
        made = {_NAMES[name]: value[column] for name, column in names.items() if name in _NAMES and column in value}
        if self.shape == "alpaca":
            if set(names) == {"prompt"}:
                return {"text": value.get(names["prompt"])}  # a data set to go on pretraining with
            return made if names else value
        turns = value.get(names.get("messages", "conversations"))
        kept = made if names else {key: item for key, item in value.items() if key != "conversations"}
        chosen = {name: self._turn(kept[name]) for name in ("chosen", "rejected") if name in kept}
        return {
            **kept,
            **chosen,
            "messages": [self._turn(turn) for turn in turns] if isinstance(turns, list) else turns,
        }

    def _turn(self, turn: Any) -> Any:
        """A turn as role and content."""
        role_tag, content_tag = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        if not isinstance(turn, Mapping) or role_tag not in turn:
            return turn
        roles = {self.tags.get(tag, usual): role for tag, (usual, role) in _ROLES.items()}
        rest = {key: item for key, item in turn.items() if key not in (role_tag, content_tag)}
        who = turn[role_tag]
        role = roles.get(who, who) if isinstance(who, str) else who
        return {**rest, "role": role, "content": turn.get(content_tag)}


def descriptions(entries: Mapping[str, Any], name: str) -> dict[str, Description] | None:
    """The data sets of a ``dataset_info.json``; None where it is another's file of that name.

    Raises:
        UserError: A data set is described in a way that slimtune doesn't read.
    """
    described = {key: entry for key, entry in entries.items() if isinstance(entry, Mapping)}
    if not any(place in entry for entry in described.values() for place in _PLACES):
        return None
    return {key: _description(f"{name}, {key}", entry) for key, entry in described.items()}


def _description(name: str, entry: Mapping[str, Any]) -> Description:
    shape = entry.get("formatting", "alpaca")
    if shape not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{name}: formatting {shape!r}", rule="It is alpaca, sharegpt or openai.")
    sample = entry.get("num_samples")
    hub = entry.get("hf_hub_url")
    split = entry.get("split", "train")
    return Description(
        file=str(entry.get("file_name", "")),
        hub=f"{hub}:{split}" if hub and "file_name" not in entry else "",
        subset=str(entry.get("subset") or entry.get("folder") or ""),
        shape=shape,
        columns=_texts(f"{name}, columns", entry.get("columns")),
        tags=_texts(f"{name}, tags", entry.get("tags")),
        sample=sample if isinstance(sample, int) and sample > 0 else None,
    )


def _texts(name: str, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for item in value.values()):
        raise UserError(f"{name}: names are texts", rule="It maps LLaMA-Factory's names to the file's.")
    return {str(key): item for key, item in value.items()}
