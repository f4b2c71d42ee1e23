"""What a model's generation config names as the ends of its replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

__all__ = ["GENERATION_CONFIG", "named_stops", "save_stops"]

GENERATION_CONFIG = "generation_config.json"


def named_stops(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the generation config beside the tokenizer's files names; none where there is no such file.

    They decide which of several marks behind a reply ends it: whether a mark is a special token depends on the
    tokenizer's flags, and what the model stops with doesn't.
    """
    where = tokenizer.name_or_path
    if not where:
        return ()
    if Path(where).is_dir():
        file: str | Path | None = Path(where) / GENERATION_CONFIG
    else:
        file = cached_file(
            where,
            GENERATION_CONFIG,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return tuple(_ids(_read(Path(file)))) if file is not None else ()


def save_stops(folder: Path, base: Path, ends: tuple[int, ...]) -> None:
    """Write the base's generation config into a folder, with what ends replies in training among the tokens that stop
    the model, for whoever loads the result without slimtune. Where the base has none, its ``config.json`` says what
    stops it, which Transformers no longer asks once there is one."""
    config = _read(base / GENERATION_CONFIG) or _of_model(_read(base / "config.json"))
    known = _ids(config)
    config["eos_token_id"] = [*known, *(end for end in ends if end not in known)]
    (folder / GENERATION_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _of_model(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a generation config that Transformers takes from a model's config."""
    parts = (config.get("text_config") or {}, config)
    named = (f"{role}_token_id" for role in ("bos", "eos", "pad"))
    return {name: part[name] for name in named for part in parts if part.get(name) is not None}


def _ids(config: dict[str, Any]) -> list[int]:
    named = config.get("eos_token_id")
    return [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]
