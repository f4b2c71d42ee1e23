"""How much longer a tokenizer may make a text: thirty lines of tokenizer.json that double it would take all memory.

Of the tokenizers library's steps, ``Replace`` and ``Precompiled`` write more than they read as the file says; the
others at most as Unicode does. A tokenizer's own added tokens go through its normalizer while it is loaded, so the file
is looked at before the library sees it.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from slimtune.errors import UserError

__all__ = ["check_growth"]

MOST = 128
"""Times as long. Writing a tab as ``<|tab|>`` makes it 7; SentencePiece's table for NFKC, 18."""
_PIECES = 1_000
"""Most tokens that may be put around a text; Whisper has four."""


def check_growth(file: Path, spec: Any) -> None:
    """See that no text becomes much longer by the steps of a ``tokenizer.json``.

    Args:
        file: For the message.
        spec: What stands in it.

    Raises:
        UserError: A text would.
    """
    if not isinstance(spec, Mapping):
        return  # the library says so
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        times = _growth(spec.get(step))
        if times > MOST:
            raise UserError(
                f"the {step} of {file} makes a text up to {times:.3g} times as long",
                rule=f"{MOST} times is the most that any tokenizer has use for.",
                way_out="Take the file from where the model comes from.",
            )
    if (pieces := _around(spec.get("post_processor"))) > _PIECES:
        raise UserError(
            f"the post_processor of {file} puts {pieces:,} pieces around a text",
            rule=f"At most {_PIECES:,}.",
            way_out="Take the file from where the model comes from.",
        )


def _growth(step: Any) -> float:
    """The most characters that a step makes of one."""
    if not isinstance(step, Mapping):
        return 1.0
    parts = [part for name in ("normalizers", "pretokenizers", "decoders") for part in _list(step.get(name))]
    pattern, content = step.get("pattern"), step.get("content")
    own = 1.0
    if isinstance(content, str):  # a pattern's match has at least one character: the library fails on an empty one
        text = pattern.get("String") if isinstance(pattern, Mapping) else pattern
        own = len(content) / (len(text) if isinstance(text, str) and text else 1)
    elif isinstance(step.get("precompiled_charsmap"), str):
        own = float(_longest(step["precompiled_charsmap"]))
    elif isinstance(prepended := step.get("prepend"), str):
        own = len(prepended) / MOST  # once to a text
    return min(max(1.0, own) * prod(map(_growth, parts)), 1e300)


def _longest(table: str) -> int:
    """Characters of the longest text that SentencePiece's table puts for another: bytes that count a trie's, the trie,
    and the texts, each ended by a zero."""
    try:
        data = base64.b64decode(table)
        (size,) = struct.unpack_from("<I", data)
    except (binascii.Error, ValueError, struct.error):
        return 1
    return max((len(text.decode("utf-8", "replace")) for text in data[4 + size :].split(b"\0")), default=1)


def _around(step: Any) -> int:
    """How many tokens, and copies of the text, a post-processor writes."""
    if not isinstance(step, Mapping):
        return 0
    special = step.get("special_tokens")
    lengths = {}
    if isinstance(special, Mapping):
        lengths = {key: len(_list(token.get("ids"))) for key, token in special.items() if isinstance(token, Mapping)}
    names = [piece.get("SpecialToken") for piece in _list(step.get("single")) if isinstance(piece, Mapping)]
    ids = sum(lengths.get(str(name.get("id")), 1) if isinstance(name, Mapping) else 1 for name in names)
    return ids + sum(map(_around, _list(step.get("processors"))))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
