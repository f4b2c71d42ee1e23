"""Prove the data before the first step: read every row, account for every row, refuse what would train wrongly.

The result is cached by content: the files' bytes, the tokenizer, its template, the options that matter here, and the
code of this package. A second run with the same of all of them opens the store and reads nothing else.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from slimtune.code import code_sum
from slimtune.config import Config
from slimtune.data.build import FormattingFunc, build
from slimtune.data.documents import Documents, DocumentStore, DocumentWriter
from slimtune.data.held_out import LEAST_ROWS, held_out_facts, set_apart
from slimtune.data.ledger import Ledger
from slimtune.data.readers import TO_UTF8
from slimtune.data.render import ChatRenderer, Manner, renderer_for, writes_date
from slimtune.data.sources import Source, content_hash, sources_of
from slimtune.errors import UserError

__all__ = ["Proof", "cache_folder", "examine", "prove"]

_DECIDE, _LIBRARIES = ("data",), ("tokenizers", "jinja2", "pyarrow")
"""Packages of slimtune, and libraries, that decide on ids."""
_OPTIONS = ("format", "map", "prefer", "max_length", "overlong", "train_on", "allow_control_tokens", "template_vars",
            "seed")  # fmt: skip


@dataclass
class Proof:
    """Data that was read, rendered and accounted for.

    ``facts`` holds plain values: rows, rows_trained, rows_dropped, dropped, repaired, noted (counts by rule), examples
    (the first place of each rule), shapes, sources, documents, tokens, supervised_tokens, duplicates, lengths
    (quantiles in tokens), key (the content's hash); for evaluation data the same under ``eval``, and trained_on: how
    many of its documents are left out, as they are among those to train on; and ``held_out``, what
    :func:`slimtune.data.held_out.held_out_facts` says of the documents to evaluate on.
    """

    train: Documents
    eval: Documents | None
    facts: dict[str, Any]
    folder: Path
    share: float = 0.0
    """Of the rows that was split off for evaluation."""
    different_rows: int = 0
    """Rows that it is a share of: what stands twice counts once. 0 where nothing was to be split off."""
    refusal: UserError | None = None
    """Why training would be refused, if it would."""
    cached: bool = False
    """Whether the proof was taken from the cache."""

    @property
    def eval_work(self) -> float:
        """Tokens to evaluate on, over those of an epoch."""
        return 0.0 if self.eval is None else self.eval.tokens / max(1, self.train.tokens)

    @property
    def ledger(self) -> Path:
        """The file that names each row that was dropped, repaired or noted."""
        return self.folder / "ledger.jsonl"

    @property
    def key(self) -> str:
        """SHA-256 over everything that the documents follow from."""
        return str(self.facts["key"])

    def save_ledger(self, path: Path) -> None:
        """Copy the ledger to a run's folder."""
        shutil.copyfile(self.ledger, path)


def prove(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    formatting_func: FormattingFunc | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Proof:
    """The proven training and evaluation documents of ``config.data`` and ``config.eval``.

    Args:
        config: Its data keys.
        tokenizer: The tokenizer with the chat template that training uses.
        formatting_func: Takes a row and returns its text, its messages, or a row in a known shape. Its results can't
            be cached.
        on_progress: Called with the number of rows read so far.

    Raises:
        UserError: The data can't be read, or training on it is refused: no rows, more dropped than ``max_dropped``, an
            over-long row under ``overlong: error``, a template that can't be used.
    """
    proof = examine(config, tokenizer, formatting_func=formatting_func, on_progress=on_progress)
    if proof.refusal is not None:
        raise proof.refusal
    return proof


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Within this, the garbage collector leaves alone what was there before: the libraries' millions of objects, which
    it would otherwise go through again and again for the short-lived ones of each row."""
    if gc.get_freeze_count():  # the program has seen to it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_only_new_garbage()
def examine(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    formatting_func: FormattingFunc | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Proof:
    """As :func:`prove`, but data that was read whole and is refused comes back with its ``refusal``.

    Raises:
        UserError: The data can't be read, or the template can't be used.
    """
    if not config.data:
        raise UserError("no data was given", rule="Training needs at least one file or hub id.")
    sources, held_out = sources_of(config)
    renderer = renderer_for(tokenizer, Manner.of(config))
    if formatting_func is not None:
        folder = Path(tempfile.mkdtemp(prefix="slimtune-data-"))
        _write(folder, config, sources, held_out, renderer, "", formatting_func, on_progress)
        proof = _open(folder, config, sources, held_out)
        weakref.finalize(proof, shutil.rmtree, folder, ignore_errors=True)
        return proof
    key = content_key(config, tokenizer, sources, held_out)
    folder = cache_folder() / key
    cached = (folder / "facts.json").is_file()
    if not cached:
        with _cache_told():
            cache_folder().mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".making-", dir=cache_folder()))
            try:
                _write(made, config, sources, held_out, renderer, key, None, on_progress)
                if content_key(config, tokenizer, sources, held_out) != key:
                    raise UserError("a data file changed while it was read", way_out="Run again when it is complete.")
                _publish(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    proof = _open(folder, config, sources, held_out)
    proof.cached = cached
    return proof


def cache_folder() -> Path:
    """Where proven data is kept: ``$XDG_CACHE_HOME/slimtune/data``, else ``~/.cache/slimtune/data``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "slimtune" / "data"


@contextmanager
def _cache_told() -> Iterator[None]:
    """What the system refuses of the cache is the person's to mend; what it refuses of the data, its readers tell."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache can't be written: {error.strerror or error} ({error.filename or cache_folder()})",
            rule="Proven data is kept there, as a run reads it.",
            way_out="Make room, or set XDG_CACHE_HOME to a folder that can be written.",
        ) from error


def _publish(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "facts.json").is_file():  # else another process was faster with the same content
            raise


def _write(
    folder: Path,
    config: Config,
    sources: list[Source],
    held_out: list[Source],
    renderer: ChatRenderer,
    key: str,
    formatting_func: FormattingFunc | None,
    on_progress: Callable[[int], None] | None,
) -> None:
    facts: dict[str, Any] = {"key": key}
    with (folder / "ledger.jsonl").open("w", encoding="utf-8") as file:
        for part, chosen in (("train", sources), ("eval", held_out)):
            if not chosen:
                continue
            ledger = Ledger(file)
            with DocumentWriter(folder / part) as writer:
                found = build(config, chosen, renderer, writer, ledger,
                              formatting_func=formatting_func, on_progress=on_progress)  # fmt: skip
            ledger.finish()
            store = DocumentStore(folder / part)
            made = {**ledger.facts(), **found, **_statistics(store)}
            facts.update(made if part == "train" else {"eval": made})
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _statistics(store: DocumentStore) -> dict[str, Any]:
    documents = Documents(store, np.arange(len(store)))
    lengths = documents.lengths
    lengths.sort()
    hashes = np.sort(store.hashes)
    quantiles = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    at = {name: int(lengths[round(share * (len(lengths) - 1))]) for name, share in quantiles.items() if len(lengths)}
    return {
        "documents": len(store),
        "tokens": documents.tokens,
        "supervised_tokens": documents.supervised_tokens,
        "duplicates": int(np.count_nonzero(hashes[1:] == hashes[:-1])),
        "lengths": at,
    }


def _open(folder: Path, config: Config, sources: list[Source], held_out: list[Source]) -> Proof:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    store = DocumentStore(folder / "train")
    chosen = _weighted(store, sources, config.seed)
    evaluation, share, rows = None, 0.0, 0
    if held_out:
        eval_store = DocumentStore(folder / "eval")
        apart = _weighted(eval_store, held_out, config.seed)
        both = np.isin(eval_store.hashes[apart], store.hashes[chosen])
        evaluation, facts["eval"]["trained_on"] = Documents(eval_store, apart[~both]), int(both.sum())
    elif config.eval_share and len(chosen):
        chosen, apart, share, rows = set_apart(store, chosen, config.eval_share, config.seed)
        evaluation = Documents(store, apart) if len(apart) else None
    if evaluation is not None:
        facts["held_out"] = held_out_facts(evaluation)
    proof = Proof(Documents(store, chosen), evaluation, facts, folder, share=share, different_rows=rows)
    proof.refusal = _refusal(proof, config)
    return proof


def _weighted(store: DocumentStore, sources: list[Source], seed: int) -> npt.NDArray[np.int64]:
    """Document numbers, each source's as often as its weight says; of a fraction, a seeded choice."""
    if all(source.weight == 1 for source in sources):
        return np.arange(len(store))
    parts = []
    for number, source in enumerate(sources):
        own = np.flatnonzero(store.places[:, 0] == number)
        whole, rest = divmod(source.weight, 1)
        parts += [own] * int(whole)
        if taken := round(rest * len(own)):
            parts.append(np.sort(np.random.default_rng([seed, 2, number]).choice(own, taken, replace=False)))
    return np.concatenate([np.empty(0, np.int64), *parts])


def _refusal(proof: Proof, config: Config) -> UserError | None:
    for part, facts in (("", proof.facts), ("evaluation ", proof.facts.get("eval"))):
        if facts is None:
            continue
        names = ", ".join(config.data if not part else config.eval)
        rows, examples = facts["rows"], facts["examples"]
        dropped = facts["rows_dropped"] - facts["dropped"].get("not-preferred", 0)  # left out as asked
        if rows == 0:
            return UserError(f"{part}data {names} holds no rows", rule="A data file holds at least one row.")
        if facts["documents"] == dropped == 0:
            return UserError(f"no {part}row has a reply that is wanted", rule="prefer: chosen leaves the others out.")
        first = next((rule for rule in facts["dropped"] if rule != "not-preferred"), None)
        shown = examples[first] if first else ""
        if facts["documents"] == 0 or dropped > config.max_dropped * rows:
            by_rule = ", ".join(f"{rule} {count:,}" for rule, count in facts["dropped"].items())
            return UserError(
                f"{dropped:,} of {rows:,} {part}rows can't be trained on ({by_rule}); the first: {shown}",
                rule=f"At most {config.max_dropped:.0%} of the rows may be dropped (max_dropped).",
                way_out=_way_out(proof.facts | facts, config, dropped, proof.ledger),
            )
    if not len(proof.train):
        return UserError("no document is left to train on", rule="eval_share and weights leave at least one.")
    if proof.eval is not None and not len(proof.eval):
        both = proof.facts["eval"]["trained_on"]
        return UserError(
            f"all {both:,} held-out documents are trained on too" if both else "no held-out document is left",
            rule="A run is judged by rows that it wasn't trained on.",
            way_out="Name others by --eval, or leave it out: of enough rows some are held out by themselves.",
        )
    if config.early_stopping is not None and proof.eval is None:
        return UserError(
            f"early_stopping needs an evaluation, and of {proof.different_rows:,} different rows none is held out",
            rule=f"From {LEAST_ROWS} rows on some are held out by themselves.",
            way_out="Give --eval DATA, or --eval-share 0.2",
        )
    return None


def _way_out(facts: dict[str, Any], config: Config, dropped: int, ledger: Path) -> str:
    ways = []
    too_long, share = facts["overlong"], dropped / facts["rows"]
    if "too-long" in facts["dropped"] and too_long:
        fits, left = 0, dropped
        for length, count in too_long.items():
            fits, left = int(length), left - count
            if left <= config.max_dropped * facts["rows"]:
                break
        if config.overlong == "drop":
            ways.append(f"Raise --max-length to {fits}, or choose --overlong split or keep-end.")
        else:
            ways.append(f"Raise --max-length to {fits}.")
    if "preference" in facts["dropped"]:
        ways.append("Take the better replies by --prefer chosen.")
    if facts["dropped"].get("encoding", 0) > dropped / 2:
        ways.append(TO_UTF8)
    elif set(facts["dropped"]) - {"too-long", "preference", "not-preferred"}:
        named = f" ({ledger} names each)" if facts["key"] else ""  # what a function made isn't kept
        ways.append(f"Mend the rows{named}.")
    if share < 1:
        ways.append(f"Allow it by --max-dropped {min(0.99, np.ceil(share * 100) / 100):.2f}.")
    return " Or: ".join(ways) or "Check the file and --format."


def content_key(
    config: Config, tokenizer: PreTrainedTokenizerBase, sources: list[Source], held_out: list[Source]
) -> str:
    """SHA-256 over all that the documents follow from: bytes, tokenizer, template, options, code.

    Raises:
        UserError: A file can't be read.
    """
    content = hashlib.sha256()

    def take(*values: Any) -> None:
        content.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")

    for source in (*sources, None, *held_out):
        if source is None:
            take("eval")
        else:
            take(source.label, source.sample, content_hash(source))
    renderer = renderer_for(tokenizer, Manner.of(config))
    take(renderer.encoder.fingerprint)
    take(tokenizer.special_tokens_map, tokenizer.chat_template, type(tokenizer).__name__)
    take({name: getattr(config, name) for name in _OPTIONS})
    take(renderer.named_stops)
    if writes_date(tokenizer):
        take((config.date or date.today()).isoformat())
    take(code_sum(_DECIDE, _LIBRARIES))
    return content.hexdigest()
