"""A token's text and bytes as log probabilities show them.

A character may be several tokens. Each has bytes of its own, which a client joins to the reply's text (OpenAI's API
reference, ``logprobs.content[].bytes``); what of them is no text by itself is spelled ``\\xe5\\xb1``, as OpenAI does.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from slimtune.data.words import byte_alphabet

__all__ = ["Spelling"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as tokenizers with SentencePiece's fall-back name it."""


class Spelling:
    """Spells the tokens of one tokenizer.

    Args:
        tokenizer: Decodes.
        before: A token that may stand before another: some tokenizers take the space off a text's first word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: int) -> None:
        self._tokenizer, self._before = tokenizer, before
        self._prefix = self._decoded([before])
        self._bytes = {letter: byte for byte, letter in enumerate(byte_alphabet())}

    def __call__(self, token: int, *, first: bool) -> tuple[str, bytes]:
        """The token's text and its bytes.

        Args:
            token: Its id.
            first: Whether it begins the reply.
        """
        text = self._decoded([token]) if first else self._decoded([self._before, token]).removeprefix(self._prefix)
        made = self._part(token) if _BROKEN in text else None
        if made is None:
            return text, text.encode()
        try:
            return made.decode(), made
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in made), made

    def _part(self, token: int) -> bytes | None:
        """The bytes of a token that isn't whole characters; None if its name isn't that of bytes."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return bytes(self._bytes[letter] for letter in name) if self._bytes.keys() >= set(name) else None

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
