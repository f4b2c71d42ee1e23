"""Text and control tokens to ids, so that no text can become a control token.

A fast tokenizer first cuts a text at its added tokens (``<|im_end|>`` and the like) and then encodes what lies between.
Here the cutting is the renderer's, which knows which of them the template wrote; what lies between is encoded by a copy
of the tokenizer that recognises no added token at all. For a text without forged tokens the ids are those of the
tokenizer itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from slimtune.data.words import WordEncoder
from slimtune.errors import UserError, is_panic

__all__ = ["Ids", "Piece", "TokenEncoder"]

Ids = npt.NDArray[np.int32]

_KEPT_TEXT = 48
_KEPT_TEXTS = 20_000
_WHITE = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""What control tokens swallow beside them: Unicode's White_Space. Python's strip takes more."""


class Piece(NamedTuple):
    """A stretch of a rendered conversation: one control token, or text that is encoded on its own.

    A control token without text was put in by slimtune: it stands for no character of the rendered conversation.
    """

    text: str
    control: int
    """Id of the control token, or -1 for text."""
    supervised: bool
    joined: bool
    """Whether this goes on from what stands before, as a reply does from what a model is asked with. Neither takes
    from the other: no white space is swallowed, and text behind text gets no prefix space of its own."""


_Plan = list[tuple[Ids | int, bool]]
"""For each part of a document its ids, or the number of its text, and whether it is supervised."""


class HalfEncoded:
    """Documents whose known words are looked up; :meth:`ask` the tokenizer for the rest, then :meth:`documents`."""

    def __init__(
        self, encoder: TokenEncoder, plans: list[_Plan], keys: list[tuple[str, int]], found: list[Ids | None]
    ) -> None:
        self._encoder, self._plans, self._keys, self._found = encoder, plans, keys, found

    def ask(self) -> None:
        """Let the tokenizer encode what is left. Most of it runs outside of Python's lock."""
        self._encoder.ask(self._keys, self._found)

    def documents(self) -> list[tuple[Ids, npt.NDArray[np.bool_]]]:
        """Ids (int32) and supervised mask (bool) of each document, both of shape [tokens]."""
        found: Any = self._found
        self._encoder.keep(self._keys, found)
        made = []
        for plan in self._plans:
            parts = [found[part] if isinstance(part, int) else part for part, _ in plan]
            lengths = [part.shape[0] for part in parts]
            ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
            mask = np.repeat(np.fromiter((flag for _, flag in plan), bool, len(plan)), lengths)
            made.append((ids, mask))
        return made


class TokenEncoder:
    """Encodes pieces by the batch.

    Args:
        tokenizer: A tokenizer of Transformers with a ``tokenizers`` backend.

    Raises:
        UserError: The tokenizer has no such backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} has no fast backend",
                rule="slimtune needs a tokenizer.json of the tokenizers library.",
                way_out="Convert the tokenizer, or take a model that has one.",
            )
        serialised = backend.to_str()
        self.fingerprint = hashlib.sha256(serialised.encode()).hexdigest()
        """SHA-256 of the whole tokenizer."""
        spec = json.loads(serialised)
        as_text, self.wavering = _read_as_text(backend, spec)
        self.read_as_text: tuple[str, ...] = tuple(sorted(as_text | self.wavering))
        """Special tokens that the tokenizer itself doesn't find in text, or only in some places. They are text."""
        added = [token for token in spec["added_tokens"] if token["content"] not in self.read_as_text]
        self.controls: dict[str, int] = {token["content"]: token["id"] for token in added if token["content"]}
        self.special: frozenset[str] = frozenset(t["content"] for t in added if t["special"] and t["content"])
        self._eats_left = {token["id"] for token in added if token["lstrip"]}
        self._eats_right = {token["id"] for token in added if token["rstrip"]}
        alternatives = "|".join(re.escape(text) for text in sorted(self.controls, key=len, reverse=True))
        self.pattern = re.compile(f"({alternatives or '(?!)'})")
        """Finds control tokens in a text, the longest first."""
        self.is_special = np.zeros(max([backend.get_vocab_size(), *self.controls.values()]) + 1, dtype=bool)
        """For each id whether it is a special token, bool [vocabulary]."""
        self.is_special[[token["id"] for token in added if token["special"]]] = True
        self._first = _without_added(spec, prefix=True)
        bare = _without_added(spec, prefix=False) if _writes_prefix(spec) else self._first
        self.longest_token = max(map(len, self._first.get_vocab()), default=1)
        """Characters of the longest token: a text of n characters has at least n divided by it tokens."""
        self._later = self._first if _prefixes_always(spec) else bare
        self._joined = bare
        self._words = WordEncoder(spec, self._first)
        self._kept: dict[tuple[str, int], Ids] = {}
        self._alone: dict[int, Ids] = {token: np.array([token], np.int32) for token in self.controls.values()}
        for ids in self._alone.values():
            ids.flags.writeable = False  # shared by all documents

    def encode(self, documents: Sequence[Sequence[Piece]]) -> list[tuple[Ids, npt.NDArray[np.bool_]]]:
        """Ids (int32) and supervised mask (bool) of each document, both of shape [tokens].

        Raises:
            ValueError: The tokenizer makes a control token out of plain text, so the text can't be kept as text.
        """
        half = self.looked_up(documents)
        half.ask()
        return half.documents()

    def looked_up(self, documents: Sequence[Sequence[Piece]]) -> HalfEncoded:
        """The first half of :meth:`encode`: known words are looked up, the tokenizer isn't asked yet."""
        texts: dict[tuple[str, int], int] = {}
        plans = [self._plan(pieces, texts) for pieces in documents]
        return HalfEncoded(self, plans, list(texts), [self._words.encode(text) for text, _ in texts])

    def _plan(self, pieces: Sequence[Piece], texts: dict[tuple[str, int], int]) -> _Plan:
        plan: _Plan = []
        start, eat, behind_text = True, False, False
        last = len(pieces) - 1
        for at, (text, control, supervised, joined) in enumerate(pieces):
            if control >= 0:
                plan.append((self._alone[control], supervised))
                start = start and not text
                eat, behind_text = bool(text) and control in self._eats_right, False
                continue
            if eat and not joined:
                text = text.lstrip(_WHITE)
            behind = pieces[at + 1] if at < last else None
            if behind is not None and behind.control in self._eats_left and not behind.joined:
                text = text.rstrip(_WHITE)
            if not text:
                continue
            kind = 2 if joined and behind_text else 0 if start else 1
            start, eat, behind_text = False, False, True
            key = (text, kind)
            known = self._kept.get(key)
            plan.append((texts.setdefault(key, len(texts)) if known is None else known, supervised))
        return plan

    def ask(self, keys: Sequence[tuple[str, int]], encoded: list[Ids | None]) -> None:
        """Fill in what is None: the ids of the text at that place."""
        for kind, backend in enumerate((self._first, self._later, self._joined)):
            chosen = [at for at, key in enumerate(keys) if key[1] == kind and encoded[at] is None]
            if not chosen:
                continue
            with _panics_told():
                made = backend.encode_batch_fast([keys[at][0] for at in chosen], add_special_tokens=False)
            for at, encoding in zip(chosen, made, strict=True):
                encoded[at] = np.array(encoding.ids, dtype=np.int32)

    def keep(self, keys: Sequence[tuple[str, int]], encoded: Sequence[Ids]) -> None:
        """Remember short texts, which come again."""
        for key, ids in zip(keys, encoded, strict=True):
            if len(key[0]) <= _KEPT_TEXT and len(self._kept) < _KEPT_TEXTS:
                self._kept[key] = ids

    def text_ids(self, text: str) -> Ids:
        """Ids of a text alone, no added token recognised."""
        return self.encode([[Piece(text, -1, False, False)]])[0][0]


@contextmanager
def _panics_told() -> Iterator[None]:
    """A pattern of the tokenizer's that runs in circles over some text ends in a panic of the tokenizers library."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(
            f"the tokenizer can't encode a text of the data: {error}",
            rule="Its own patterns and steps fail on it.",
            way_out="Take the tokenizer from where the model comes from.",
        ) from error


def _read_as_text(backend: Tokenizer, spec: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Added tokens that the tokenizer finds nowhere in text, and those that it finds in some places only.

    A token with ``normalized: true`` is looked for in the normalised text, in its own normalised form. A normaliser
    that prepends a space gives it one, and then it is found behind a space and nowhere else.
    """
    if spec["normalizer"] is None:
        return set(), set()
    texts = [token["content"] for token in spec["added_tokens"] if token["normalized"] and token["content"]]
    places = ("{}", "a{}", "\n{}", " {}b")
    found = backend.encode_batch_fast(
        [place.format(text) for text in texts for place in places], add_special_tokens=False
    )
    nowhere: set[str] = set()
    somewhere: set[str] = set()
    for number, text in enumerate(texts):
        wanted = backend.token_to_id(text)
        times = sum(wanted in e.ids for e in found[number * len(places) : (number + 1) * len(places)])
        if times < len(places):
            (somewhere if times else nowhere).add(text)
    return nowhere, somewhere


def _without_added(spec: dict[str, Any], *, prefix: bool) -> Tokenizer:
    """The tokenizer with every added token switched off; without ``prefix`` no space is put before a text."""
    plain = dict(spec, truncation=None, padding=None)
    plain["added_tokens"] = [dict(token, special=True) for token in spec["added_tokens"]]
    if not prefix:
        plain["normalizer"] = _no_prefix(plain["normalizer"])
        plain["pre_tokenizer"] = _no_prefix(plain["pre_tokenizer"])
    made: Tokenizer = Tokenizer.from_str(json.dumps(plain))
    made.encode_special_tokens = True
    return made


def _no_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokeniser that puts no space before the text."""
    if step is None or step["type"] == "Prepend":
        return None
    step = dict(step)
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        step[key] = [made for part in step[key] if (made := _no_prefix(part)) is not None]
    if "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    if step.get("add_prefix_space"):
        step["add_prefix_space"] = False
    return step


def _writes_prefix(spec: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    return any(_no_prefix(spec[step]) != spec[step] for step in ("normalizer", "pre_tokenizer"))


def _prefixes_always(spec: dict[str, Any]) -> bool:
    """Whether text behind an added token gets the prefix space too, not only the text's beginning."""
    return '"prepend_scheme": "first"' not in json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
