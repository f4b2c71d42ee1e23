"""Byte-level BPE by the word: text is cut by the tokenizer's own pattern, and words that were met before are looked up.

A byte-level BPE tokenizer (GPT-2, Llama-3, Qwen, SmolLM2 and most since) cuts text into words by a regular expression
and merges bytes inside each word alone, so a word has the same ids wherever it stands. Real text repeats its words, and
a dictionary is several times as fast as cutting and merging again. Only text is taken whose characters every
implementation of the pattern classes alike (ASCII, Latin, common punctuation); all else goes to the tokenizer itself.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

__all__ = ["WordEncoder", "byte_alphabet"]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of the ByteLevel pre-tokenizer (Radford et al. 2019; tokenizers/src/pre_tokenizers/byte_level.rs)."""
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same behind the Digits pre-tokenizer, which sets each digit apart first."""
_LETTERS = "A-Za-z\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\u024f"
_NUMBERS = "0-9\xb2\xb3\xb9\xbc-\xbe"
_UNSAFE = re.compile(r"[^\t\n\r -~\xa1-\u024f\u2010-\u2027]")
_MOST_WORDS = 300_000
_PROBES = (
    "Hello, world! It's 1234.5%  of   \n\n\n  what's \t\r\n left—“naïve” café… ",
    " x=[1, 22, 333]; if (a!=b) { return c++; } // ok\n\n",
    "\n\nHe said: 'I'll'\n - don't\n\t* list   ",
)


class WordEncoder:
    """Encodes text by words, or says that it can't.

    Args:
        spec: The tokenizer's JSON.
        backend: The same tokenizer, with no added token recognised.
    """

    def __init__(self, spec: dict[str, Any], backend: Tokenizer) -> None:
        self._model = backend.model
        self._pattern = _compiled(_pattern(spec))
        self._ids: dict[str, bytes] = {}  # as int32, so that a text's ids are its words' joined
        self._alphabet = byte_alphabet()
        if self._pattern is not None and any(self._differs(probe, backend) for probe in _PROBES):
            self._pattern = None

    def encode(self, text: str) -> npt.NDArray[np.int32] | None:
        """Ids of a text, int32 [tokens]; None where the tokenizer itself must be asked."""
        if self._pattern is None or _UNSAFE.search(text) is not None:
            return None
        words = self._pattern.findall(text)
        if "".join(words) != text:
            return None
        try:
            ids = b"".join(map(self._ids.__getitem__, words))
        except KeyError:
            ids = b"".join(map(self._word, words))
        return np.frombuffer(ids, np.int32)

    def _word(self, word: str) -> bytes:
        ids = self._ids.get(word)
        if ids is None:
            letters = "".join([self._alphabet[byte] for byte in word.encode()])
            ids = np.array([token.id for token in self._model.tokenize(letters)], np.int32).tobytes()
            if len(self._ids) >= _MOST_WORDS:
                self._ids.clear()
            self._ids[word] = ids
        return ids

    def _differs(self, text: str, backend: Tokenizer) -> bool:
        made = self.encode(text)
        return made is None or made.tolist() != backend.encode(text, add_special_tokens=False).ids


def _pattern(spec: dict[str, Any]) -> str | None:
    """The pattern that the tokenizer cuts text into words by, or None if it is no byte-level BPE of a known kind."""
    model, normalizer = spec["model"], spec["normalizer"]
    if model["type"] != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    ):
        return None
    if normalizer is not None and normalizer["type"] != "NFC":  # what is safe is in NFC already
        return None
    steps = spec["pre_tokenizer"] or {}
    match steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return _GPT2_DIGITS
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    return None


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern for Python's ``re``, with the letters and numbers of the safe characters spelled out."""
    if pattern is None:
        return None
    made, in_brackets, at = "", False, 0
    while at < len(pattern):
        named = {r"\p{L}": _LETTERS, r"\p{N}": _NUMBERS}.get(pattern[at : at + 5])
        if named is not None:
            made, at = made + (named if in_brackets else f"[{named}]"), at + 5
            continue
        step = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        in_brackets = step == "[" or (in_brackets and step != "]")
        made, at = made + step, at + len(step)
    try:
        compiled = re.compile(made)
    except re.error:
        return None
    return None if compiled.groups or r"\p" in made or r"\P" in made else compiled


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
