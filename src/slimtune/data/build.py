"""From rows to a document store: read, normalise, render, encode, fit, write; every row is accounted for.

Words that were met before are looked up here; where texts are left for the tokenizer, its own threads encode them
outside of Python's lock while this one reads and renders the next batch of rows. Memory is bounded by the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimtune.config import Config
from slimtune.data.conversation import REPAIRS, Conversation, RowRefused, normalise
from slimtune.data.documents import DocumentWriter, Mask
from slimtune.data.ledger import Ledger
from slimtune.data.overlong import keep_end, split
from slimtune.data.render import NOTES, ChatRenderer, Draft
from slimtune.data.sources import Row, Source, read_rows
from slimtune.data.tokens import HalfEncoded, Ids
from slimtune.errors import UserError

__all__ = ["FormattingFunc", "build"]

FormattingFunc = Callable[[Mapping[str, Any]], Any]
"""Takes a row, returns text, messages, or a row in a known shape."""

Encoded = list[tuple[Ids, Mask]]

_BATCH_ROWS = 512
_BATCH_CHARACTERS = 2**20
_COLUMNS_NAMED = 20


@dataclass(slots=True)
class _Item:
    row: Row
    conversation: Conversation
    drafts: list[Draft]
    characters: int


@dataclass(slots=True)
class _Batch:
    items: list[_Item] = field(default_factory=list)
    characters: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.items) >= _BATCH_ROWS or self.characters >= _BATCH_CHARACTERS


class Builder:
    """Builds one document store from the sources of ``data`` or ``eval``."""

    def __init__(
        self,
        config: Config,
        renderer: ChatRenderer,
        writer: DocumentWriter,
        ledger: Ledger,
        formatting_func: FormattingFunc | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.renderer, self.writer, self.ledger = config, renderer, writer, ledger
        self.formatting_func, self.on_progress = formatting_func, on_progress
        self.shapes: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.overlong: Counter[int] = Counter()
        self._longest_text = config.max_length * renderer.encoder.longest_token

    def run(self, sources: list[Source]) -> None:
        """Read, prove and write every row of the sources.

        Raises:
            UserError: A file can't be read, or a row is too long and ``overlong`` is ``error``.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="slimtune-encode") as pool:
            waiting: tuple[int, _Batch, HalfEncoded, Future[None]] | None = None
            for number, batch in self._batches(sources):
                half = self.renderer.encoder.looked_up([draft.pieces for item in batch.items for draft in item.drafts])
                future = pool.submit(half.ask)
                if waiting is not None:
                    self._finish(*waiting)
                waiting = number, batch, half, future
            if waiting is not None:
                self._finish(*waiting)

    def _batches(self, sources: list[Source]) -> Iterator[tuple[int, _Batch]]:
        for number, source in enumerate(sources):
            batch = _Batch()
            for row in read_rows(source, seed=self.config.seed, whole=self.config.format):
                self.ledger.rows_in += row.rows
                item = self._item(row)
                if item is None:
                    continue
                batch.items.append(item)
                batch.characters += item.characters
                if batch.is_full:
                    yield number, batch
                    batch = _Batch()
            yield number, batch

    def _item(self, row: Row) -> _Item | None:
        """A row, normalised and rendered; None where it is dropped."""
        if row.refused:
            self.ledger.drop(row.place, "unreadable", row.refused, rows=row.rows)
            return None
        try:
            conversation = self._conversation(row)
            turns = len(conversation.messages)  # a turn has a token at least, and each is rendered with all before it
            if turns > self.config.max_length and self.config.overlong == "drop":
                self._too_long(row, f"{turns:,} turns", turns)
                return None
            drafts = self.renderer.drafts(conversation, self.config.train_on)
        except RowRefused as refused:
            self.ledger.drop(row.place, refused.name, refused.rule, refused.field)
            return None
        sizes = [sum([len(piece.text) for piece in draft.pieces]) for draft in drafts]
        size = max(sizes)
        if size > self._longest_text and self.config.overlong == "drop":
            self._too_long(row, f"{size:,} characters", size // 4)
            return None
        return _Item(row, conversation, drafts, sum(sizes))

    def _too_long(self, row: Row, what: str, tokens: int) -> None:
        """Drop a row that is too long whatever it comes to; ``tokens`` is a guess."""
        reason = f"{what} can't fit into max_length {self.config.max_length:,} tokens"
        self.ledger.drop(row.place, "too-long", reason)
        self.overlong[_rounded(tokens)] += 1

    def _conversation(self, row: Row) -> Conversation:
        value = row.value
        if self.formatting_func is not None:
            value = self.formatting_func(value)
            if isinstance(value, str):
                made = normalise({"text": value}, shape="text")
                made.rendered = True
                return made
            if isinstance(value, list):
                value = {"messages": value}
            return normalise(value)
        config = self.config
        made = normalise(value, shape=config.shape, mapping=config.map, prefer=config.prefer,
                         seen=self.shapes, unread=self.unread)  # fmt: skip
        made.repairs[:0] = row.repairs
        return made

    def _finish(self, source: int, batch: _Batch, half: HalfEncoded, asked: Future[None]) -> None:
        asked.result()
        done = half.documents()
        sound = not self._forged([draft for item in batch.items for draft in item.drafts], done)
        encoded = iter(done)
        for item in batch.items:
            made = [next(encoded) for _ in item.drafts]
            self._place(source, item, made, sound)
        if self.on_progress is not None:
            self.on_progress(self.ledger.rows_in)

    def _place(self, source: int, item: _Item, made: Encoded, sound: bool) -> None:
        """Write the documents of a row, or account for why not."""
        place, limit = item.row.place, self.config.max_length
        if not sound and self._forged(item.drafts, made):
            self.ledger.drop(place, "control-tokens", "the tokenizer makes a control token out of plain text")
            return
        longest = max(ids.shape[0] for ids, _ in made)
        if longest > limit:
            self.overlong[_rounded(longest)] += 1
            fitted = self._fitted(item, longest, made)
            if fitted is None:
                return
            made = fitted
        if not any(mask[1:].any() for _, mask in made):
            self.ledger.drop(place, "nothing-to-learn", "no token of it is supervised")
            return
        for ids, mask in made:
            self.writer.add(ids, mask, source, place)
        self.ledger.rows_trained += 1
        self.ledger.repair(place, item.conversation.repairs, REPAIRS)
        self.ledger.note(place, [note for draft in item.drafts for note in draft.notes], NOTES)

    def _forged(self, drafts: list[Draft], made: Encoded) -> bool:
        """Whether the ids hold special tokens that the template didn't write: the last check of the promise that text
        stays text."""
        is_special = self.renderer.encoder.is_special
        controls = [piece.control for draft in drafts for piece in draft.pieces if piece.control >= 0]
        written = np.count_nonzero(is_special[controls])
        return bool(made) and np.count_nonzero(is_special[np.concatenate([ids for ids, _ in made])]) != written

    def _fitted(self, item: _Item, longest: int, made: Encoded) -> Encoded | None:
        """What ``overlong`` makes of a row that is too long; None where it is dropped."""
        place, limit, how = item.row.place, self.config.max_length, self.config.overlong
        what = f"{longest:,} tokens, over max_length {limit:,}"
        if how == "error":
            raise UserError(
                f"{place}: {what}",
                rule="overlong: error refuses a run with a conversation that doesn't fit.",
                way_out=f"Raise --max-length to {longest} or more, or choose --overlong drop, split or keep-end.",
            )
        fitted: Encoded | None = None
        if how == "split":
            fitted = split(item.conversation, self.renderer, self.config.train_on, limit)
        elif how == "keep-end":
            fitted = keep_end(item.conversation, self.renderer, self.config.train_on, limit)
        if fitted is None:
            why = "" if how == "drop" else f"; {how} can't make it fit without cutting a reply"
            self.ledger.drop(place, "too-long", what + why)
        return fitted


def _rounded(length: int) -> int:
    """A length rounded up to a multiple of 64, so that the account of lengths stays small."""
    return -(-length // 64) * 64


def build(
    config: Config,
    sources: list[Source],
    renderer: ChatRenderer,
    writer: DocumentWriter,
    ledger: Ledger,
    *,
    formatting_func: FormattingFunc | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Fill a store from the sources; returns what was detected: how many rows of each shape, how many have each column
    that isn't read, which files of folders are left for evaluation, and how many were too long, by length rounded up.

    Raises:
        UserError: A file can't be read, or a row is too long and ``overlong`` is ``error``.
    """
    builder = Builder(config, renderer, writer, ledger, formatting_func, on_progress)
    builder.run(sources)
    return {
        "shapes": dict(builder.shapes.most_common()),
        "left_out": [name for source in sources for name in source.found.left_out],
        "unread": dict(builder.unread.most_common(_COLUMNS_NAMED)),
        "overlong": {str(length): count for length, count in sorted(builder.overlong.items())},
    }
