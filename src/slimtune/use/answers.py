"""Answers to a file of prompts: streamed to disk while they come, resumable, in the prompts' order at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimtune.adapter.settings import ADAPTER_WEIGHTS
from slimtune.errors import UserError
from slimtune.run.durable import replace_file
from slimtune.use.generate import generate
from slimtune.use.load import Opened
from slimtune.use.questions import Question
from slimtune.use.sampling import Sampling

__all__ = ["answer_file"]


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    tokens: int
    stopped: bool


def answer_file(
    opened: Opened,
    questions: list[Question],
    output: Path,
    sampling: Sampling,
    *,
    with_base: bool = False,
    numbers: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Answer ``questions`` into ``output``, one JSON object a line, in their order.

    While it runs, answers stand in ``<output>.partial``, each written as soon as it is there. A later call with the
    same model, prompts and options goes on from it.

    Args:
        opened: The model.
        questions: What to ask.
        output: The file; it appears when all is answered.
        sampling: How tokens are chosen.
        with_base: Ask the base too, the adapter switched off: ``base_reply``.
        numbers: Where each question stands in its file, if these are a part of it; its draws follow from that.
        on_progress: Called with (replies done, replies in all).

    Returns:
        Replies that were there already from an earlier call.

    Raises:
        UserError: ``output`` exists, or what stands in its ``.partial`` was made with other options.
    """
    if output.exists():
        raise UserError(f"output {output} exists", way_out="Choose another file (-o), or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    numbers = range(len(questions)) if numbers is None else numbers
    prompts = [
        opened.prompt_ids(question.messages, question.tools or None, question.variables) for question in questions
    ]
    settings = _settings(opened, prompts, numbers, sampling)
    replies = _resumed(partial, settings)
    sides = ("reply", "base_reply") if with_base else ("reply",)
    already = sum(side in sides for _, side in replies)
    total = len(questions) * len(sides)
    with partial.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            _line(file, {"settings": settings})
        for side in sides:
            done = {index for index, its in replies if its == side}
            for index, made in _answers(opened, prompts, numbers, sampling, side, done):
                replies[index, side] = made
                _line(file, {"index": index, "side": side, **asdict(made)})
                on_progress(sum(its in sides for _, its in replies), total)
    rows = []
    for index, question in enumerate(questions):
        row: dict[str, Any] = {"index": numbers[index], "messages": question.messages}
        if question.reference is not None:
            row["reference"] = question.reference
        for side in sides:
            made = replies[index, side]
            row |= {side: made.text, f"{side}_tokens": made.tokens, f"{side}_stopped": made.stopped}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    replace_file(output, "".join(rows))
    partial.unlink()
    return already


def _answers(
    opened: Opened, prompts: list[list[int]], numbers: Sequence[int], sampling: Sampling, side: str, done: set[int]
) -> Iterator[tuple[int, _Answer]]:
    left = [index for index in range(len(prompts)) if index not in done]
    asked = [prompts[index] for index in left]
    with opened.as_base() if side == "base_reply" else opened.as_tuned():
        # A row's random numbers follow from its own place in the file, also after a resume.
        for reply in generate(opened, asked, sampling, numbers=[numbers[index] for index in left]):
            yield left[reply.index], _Answer(reply.text, len(reply.ids), reply.stopped)


def _settings(opened: Opened, prompts: list[list[int]], numbers: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """What answers depend on; two calls whose settings are equal may share a file. The prompts count as what the model
    is asked with: a template may write the date."""
    adapter = opened.found.adapter
    weights = hashlib.sha256((adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest() if adapter is not None else None
    return {
        "base": str(opened.found.base),
        "format": opened.format,
        "adapter": weights,
        "dtype": str(opened.model.dtype),
        "prompts": hashlib.sha256(json.dumps([prompts, list(numbers)]).encode()).hexdigest(),
        "sampling": asdict(sampling),
    }


def _resumed(partial: Path, settings: dict[str, Any]) -> dict[tuple[int, str], _Answer]:
    if not partial.is_file():
        return {}
    whole = partial.read_bytes()
    # A kill can cut the last line off; what is behind the last line's end goes.
    kept = whole[: whole.rfind(b"\n") + 1]
    way_out = "Remove it, or choose another output (-o)."
    try:
        lines = [json.loads(line) for line in kept.splitlines()]
        made_with = lines[0]["settings"] if lines else settings
        replies = {(line.pop("index"), line.pop("side")): _Answer(**line) for line in lines[1:]}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise UserError(f"{partial} isn't as slimtune wrote it", way_out=way_out) from None
    if made_with != settings:
        raise UserError(
            f"{partial} was made with another model, other prompts or other options",
            rule="Answers that were made differently aren't mixed.",
            way_out=way_out,
        )
    if len(kept) < len(whole):
        partial.write_bytes(kept)
    return replies


def _line(file: Any, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()
