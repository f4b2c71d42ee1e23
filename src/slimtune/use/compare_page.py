"""The page of a comparison: base and tuned side by side, in English and Chinese, without scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup

from slimtune.data.page import POLICY
from slimtune.language import Lang
from slimtune.run.pages import template
from slimtune.use.compare import Comparison, Item

__all__ = ["comparison_page", "marked"]

Pieces = list[tuple[str, bool]]
"""A text in pieces, in their order; True for what the other text hasn't."""
PARTS = ("held-out", "general")
LONG = 420
"""Characters from which on a text is folded."""
LINES = 8
"""Lines likewise."""
_MOST_WORDS = 2_000
"""Of longer texts the difference isn't looked for: that takes the square of it."""
_WORD = re.compile(r"[\u2e80-\u9fff\uf900-\uffef]|[^\W\u2e80-\u9fff\uf900-\uffef]+|\s+|.", re.DOTALL)
"""A Chinese character, a word, white space, or a sign."""
_OUTCOMES = ("worse", "better", "same")


@dataclass(frozen=True)
class _Shown:
    """One question with its replies in pieces."""

    item: Item
    base: Pieces
    tuned: Pieces
    outcome: str


def comparison_page(made: Comparison, lang: Lang) -> str:
    """The page's HTML.

    Args:
        made: What is shown.
        lang: The language that it opens in; a switch shows the other.
    """
    parts: dict[str, list[tuple[str, list[_Shown]]]] = {}
    for part in PARTS:
        shown = [_shown(item) for item in made.part(part)]
        groups = [(outcome, [one for one in shown if one.outcome == outcome]) for outcome in _OUTCOMES]
        parts[part] = [group for group in groups if group[1]]
    text: str = template("compare.html.j2").render(
        policy=Markup(POLICY),
        made=made,
        lang=lang,
        tiles=_tiles(made),
        parts=parts,
        is_long=lambda pieces: _is_long("".join(text for text, _ in pieces)),
    )
    return text


def marked(one: str, other: str) -> Pieces:
    """``one`` with what ``other`` hasn't at that place marked, by words."""
    words, theirs = _WORD.findall(one), _WORD.findall(other)
    if max(len(words), len(theirs)) > _MOST_WORDS:
        return [(one, False)]
    made: Pieces = []
    for tag, start, end, _, _ in SequenceMatcher(None, words, theirs, autojunk=False).get_opcodes():
        if start < end:
            made.append(("".join(words[start:end]), tag != "equal"))
    return made


def _shown(item: Item) -> _Shown:
    outcome = _OUTCOMES[2 if item.score == item.base_score else int(item.score > item.base_score)]
    return _Shown(item, marked(item.base_reply, item.reply), marked(item.reply, item.base_reply), outcome)


def _is_long(text: str) -> bool:
    return len(text) > LONG or text.count("\n") >= LINES


def _tiles(made: Comparison) -> Sequence[tuple[str, str, str, str]]:
    """(what it is, base, tuned, change) of each number, the interval with the change."""
    return [(what.strip(), base, tuned, change) for what, base, tuned, change in made.rows() if base]
