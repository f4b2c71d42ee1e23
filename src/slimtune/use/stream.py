"""Tokens to text while they come: what is shown is never half a character."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one reply token by token.

    A Chinese character or an emoji is often several tokens, and some tokenizers put a space before a token only if
    another stands before it. So each step decodes the last finished piece with the new tokens behind it, and gives out
    the difference once it ends in a whole character: constant work for a token, and the pieces together are the text
    that decoding all tokens at once gives.

    Args:
        tokenizer: Decodes.
        kept: Control tokens that are shown as text; no other is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._kept = bool(kept)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} if kept else set()
        self._hidden = special.difference(kept)
        self.ids: list[int] = []
        self._context = 0
        self._given = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        if token in self._hidden:
            return ""
        self.ids.append(token)
        text = self._pending()
        if not text or text.endswith(_BROKEN):
            return ""
        self._context, self._given = self._given, len(self.ids)
        return text

    def end(self) -> str:
        """What is left when the reply ends, unfinished characters as U+FFFD."""
        text = self._pending()
        self._given = len(self.ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self.ids[self._context : self._given])
        return self._decode(self.ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not self._kept, clean_up_tokenization_spaces=False))
