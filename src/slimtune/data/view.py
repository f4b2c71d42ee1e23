"""What a proof shows: the table's lines, and one conversation with its supervised tokens told apart."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.documents import Documents
from slimtune.data.packing import MicroBatches, PackedBatches
from slimtune.data.preflight import Proof

__all__ = ["Sample", "Segment", "hints", "sample", "summary", "table"]


@dataclass(frozen=True)
class Segment:
    """A stretch of text whose tokens are all supervised, or none of them."""

    text: str
    supervised: bool
    tokens: int


@dataclass(frozen=True)
class Sample:
    """One document as the model will see it, and where its row stands."""

    place: str
    segments: list[Segment]


def sample(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Sample | None:
    """The document of median length; None if there is none."""
    if not len(documents):
        return None
    at = int(np.argsort(documents.lengths, kind="stable")[len(documents) // 2])
    ids, supervised = documents[at]
    targets = np.array(supervised)
    targets[:1] = False  # nothing predicts the first token
    edges = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
    segments = [
        Segment(text, bool(targets[start]), end - start)
        for (start, end), text in zip(itertools.pairwise(edges), _texts(ids.tolist(), edges, tokenizer), strict=True)
    ]
    return Sample(str(documents.place(at)), segments)


def _texts(ids: list[int], edges: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text between each two edges. The whole is decoded and then cut, so that a character whose tokens lie on both
    sides of an edge is shown whole, behind it, and spaces stay that a tokenizer leaves out before a text's first token.
    """
    whole = str(tokenizer.decode(ids))
    cuts = [0]
    for edge in edges[1:-1]:
        before = str(tokenizer.decode(ids[:edge]))
        while not whole.startswith(before):  # it ends within a character
            before = before[:-1]
        cuts.append(len(before))
    return (whole[start:end] for start, end in itertools.pairwise([*cuts, len(whole)]))


def table(proof: Proof, config: Config, batches: MicroBatches | None) -> list[tuple[str, str]]:
    """(label, text) for each line of the table."""
    lines = [*_part(proof.facts), *_account(proof.facts)]
    if any(proof.facts[action] for action in ("dropped", "repaired", "noted")):
        lines.append(("each row", str(proof.ledger)))
    if isinstance(batches, PackedBatches) and batches.per_epoch:
        full = f"{batches.per_epoch:,} of {batches.tokens:,} tokens in an epoch, {batches.fill:.1%} full"
        lines.insert(5, ("packs", full))
    if proof.eval is not None:
        held = proof.eval
        lines.append(("held out", f"{len(held):,} documents · {held.tokens:,} tokens"))
        lines += [(f"eval {label}", text) for label, text in _account(proof.facts.get("eval", {}))]
    return lines


def _part(facts: dict[str, Any]) -> list[tuple[str, str]]:
    shapes = ", ".join(f"{shape} ({count:,})" for shape, count in facts["shapes"].items()) or "none"
    share = facts["supervised_tokens"] / facts["tokens"] if facts["tokens"] else 0.0
    lengths = "none"
    if at := facts["lengths"]:
        lengths = (
            f"min {at['min']:,} · p10 {at['p10']:,} · median {at['median']:,} · p90 {at['p90']:,}"
            f" · p99 {at['p99']:,} · max {at['max']:,}"
        )
    return [
        ("shape", shapes),
        (
            "rows",
            f"{facts['rows']:,} in = {facts['rows_trained']:,} trained + {facts['rows_dropped']:,} dropped"
            f" · {facts['rows_repaired']:,} repaired",
        ),
        ("documents", f"{facts['documents']:,} · {facts['duplicates']:,} duplicates"),
        ("tokens", f"{facts['tokens']:,} · {facts['supervised_tokens']:,} supervised ({share:.1%})"),
        ("lengths", lengths),
    ]


def _account(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if unread := facts.get("unread"):
        shares = (f" ({count:,})" if count < facts["rows"] else "" for count in unread.values())
        lines.append(("not read", ", ".join(map("".join, zip(unread, shares, strict=True)))))
    for action in ("dropped", "repaired", "noted"):
        for rule, count in facts.get(action, {}).items():
            lines.append((action, f"{rule} {count:,}, first {facts['examples'][rule]}"))
    return lines


def hints(proof: Proof, config: Config, variables: Collection[str]) -> list[str]:
    """What a person should look at, though training isn't refused for it; ``variables`` stand in the template."""
    facts, said = proof.facts, []
    rows = max(1, facts["rows_trained"])
    if facts["noted"].get("control-text", 0) > rows / 2 and not config.allow_control_tokens:
        said.append(
            "More than half of the rows hold control-token text: if they were rendered by a template already, "
            "use --format text --allow-control-tokens."
        )
    if left := facts["noted"].get("thoughts-left-out", 0):
        how = "it has no variable for them"
        if "enable_thinking" in variables:
            how = "it has a variable for them (--template-vars enable_thinking=true)"
        said.append(f"The thoughts of {left:,} rows are left out by the template: {how}.")
    if facts["duplicates"] > facts["documents"] / 10:
        said.append(f"{facts['duplicates'] / facts['documents']:.0%} of the documents are duplicates.")
    if both := facts.get("eval", {}).get("trained_on"):
        said.append(f"{both:,} held-out documents are left out: they are trained on too.")
    if left_out := facts.get("left_out"):
        names = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        said.append(
            f"Left out of the folder: {names}. --eval FOLDER:valid or FOLDER:test takes what is named for it, "
            "'FOLDER/**/*.jsonl' what lies in folders below."
        )
    if len(facts["shapes"]) > 1:
        said.append("The rows have more than one shape: is one of the files the wrong one?")
    return said


def summary(proof: Proof, batches: MicroBatches | None, shown: Sample | None, said: list[str]) -> dict[str, Any]:
    """Everything above as plain values, for ``--json``, and what was said of it."""
    made = dict(proof.facts)
    made["cached"] = proof.cached
    made["refused"] = None if proof.refusal is None else str(proof.refusal)
    made["hints"] = said
    if isinstance(batches, PackedBatches):
        made["packs"] = {"per_epoch": batches.per_epoch, "tokens": batches.tokens, "fill": round(batches.fill, 4)}
    if proof.eval is not None:
        made["held_out"] = {"documents": len(proof.eval), "tokens": proof.eval.tokens}
    if shown is not None:
        segments = [{"text": s.text, "supervised": s.supervised, "tokens": s.tokens} for s in shown.segments]
        made["sample"] = {"place": shown.place, "segments": segments}
    return made
