"""What must be the same for a run to go on bit by bit: config, data, base, template, tokenizer, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimtune.config import FREE_KEYS
from slimtune.errors import UserError
from slimtune.run.statement import counted

__all__ = ["MADE_WITH", "Change", "Identity", "require_same"]

MADE_WITH = frozenset(
    {"lora_r", "targets", "layers", "rank_pattern", "modules_to_save", "add_tokens", "dora", "lora_init", "start_from",
     "optim"}
)  # fmt: skip
"""Keys that a checkpoint's adapter and optimizer state were made with: a run can't go on with another value."""

_HOW_TO_NAME = {"base": "base weights", "template": "chat template", "tokenizer": "tokenizer", "python": "Python"}


@dataclass(frozen=True)
class Change:
    """One thing that is not what it was at the checkpoint."""

    what: str
    before: str
    after: str

    @property
    def made_with(self) -> str:
        """The key among :data:`MADE_WITH` that it is; empty if it is none. Paging an optimizer's state changes none."""
        key, pages = self.what.removeprefix("config "), "paged_"
        return key if key in MADE_WITH and self.before.removeprefix(pages) != self.after.removeprefix(pages) else ""


@dataclass(frozen=True)
class Identity:
    """What a run's numbers follow from."""

    config: dict[str, Any]
    """The resolved config, as JSON."""
    base: str
    """Fingerprint of the loaded base (:func:`slimtune.base.quantize.fingerprint`)."""
    data: dict[str, str]
    """Each source, training and evaluation, with the SHA-256 of its bytes."""
    tokenizer: str
    template: str
    python: str
    versions: dict[str, str]
    """slimtune and the libraries."""

    def to_bytes(self) -> bytes:
        """As ``identity.json`` holds it."""
        return (json.dumps(asdict(self), indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """What :meth:`to_bytes` wrote. Raises ValueError or TypeError if it is something else."""
        return cls(**json.loads(data))

    def in_words(self) -> dict[str, str]:
        """Each part by what it is called, the config last, of which some follows from the others; but for its free
        keys, which no number follows from."""
        parts = [("version of", self.versions), ("data", self.data), ("config", self.config)]
        named = {called: getattr(self, name) for name, called in _HOW_TO_NAME.items()}
        named |= {f"{kind} {key}": value for kind, values in parts for key, value in values.items()}
        free = {f"config {key}" for key in FREE_KEYS}
        return {name: _short(value) for name, value in named.items() if name not in free}

    def changes(self, now: Identity) -> list[Change]:
        """What differs from this identity in ``now``, except for :data:`slimtune.config.FREE_KEYS`."""
        found = [
            change
            for change in _differences("config", self.config, now.config)
            if change.what.removeprefix("config ") not in FREE_KEYS
        ]
        found += _differences("data", self.data, now.data)
        for name, called in _HOW_TO_NAME.items():
            before, after = getattr(self, name), getattr(now, name)
            if before != after:
                found.append(Change(called, _short(before), _short(after)))
        return found + _differences("version of", self.versions, now.versions)


def require_same(before: Identity, now: Identity, run: Path, *, accept: bool) -> list[Change]:
    """Refuse to go on with something else than what the checkpoint was made with.

    Returns:
        The changes; empty unless ``accept`` is on.

    Raises:
        UserError: Something changed and ``accept`` is off, or it can't be accepted; with a table of what, from what,
            to what.
    """
    changes = before.changes(now)
    if accept and (keys := [change.made_with for change in changes if change.made_with]):
        raise UserError(
            f"run {run} can't go on with another {', '.join(keys)}",
            table=_table(changes),
            rule="The adapter and the optimizer's state in its checkpoint were made with what was given first.",
            way_out=f"Put it back, or start anew from the adapter: slimtune train --from {run}",
        )
    if changes and not accept:
        raise UserError(
            f"run {run} can't go on as it was: {counted(len(changes), 'thing')} changed",
            table=_table(changes),
            rule="A resumed run gives an uninterrupted one's adapter only if nothing that makes its numbers changed.",
            way_out="Put it back, or go on all the same and have it recorded: --accept-changes. "
            f"To start anew from the adapter: slimtune train --from {run}",
        )
    return changes


def _table(changes: list[Change]) -> list[tuple[str, str, str]]:
    return [("", "at the checkpoint", "now"), *((change.what, change.before, change.after) for change in changes)]


def _differences(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    return [
        Change(f"{kind} {key}", _short(before.get(key, "—")), _short(after.get(key, "—")))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_hash = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return f"{text[:16]}…" if is_hash or len(text) > 60 else text
