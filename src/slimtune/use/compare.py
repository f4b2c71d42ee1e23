"""Base against tuned, on held-out rows and on a small general set: scores, wins and losses, and what got worse."""

from __future__ import annotations

import importlib.util
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimtune.data.documents import Documents
from slimtune.errors import GuardStop, UserError
from slimtune.run.interval import Interval, bootstrap
from slimtune.use.evaluate import documents_of, losses
from slimtune.use.general import GENERAL
from slimtune.use.generate import generate
from slimtune.use.held_out import HeldOut
from slimtune.use.load import Opened
from slimtune.use.questions import Question, read_questions
from slimtune.use.sampling import Sampling

__all__ = ["Checker", "Comparison", "Item", "compare", "exact_match", "fail_if", "load_checker"]

Checker = Callable[[str, str], float]
"""(reply, reference) to a score between 0 and 1."""
OnProgress = Callable[[str, int, int], None]
"""Takes which work (tuned, base, losses), how much of it is done, and of how much."""


@dataclass(frozen=True)
class Item:
    """One question, both replies and both scores."""

    part: str
    """held-out or general."""
    asked: str
    """The last turn of what was asked."""
    reference: str
    """What was expected, for people to read."""
    base_reply: str
    reply: str
    base_score: float
    score: float
    before: tuple[tuple[str, str], ...] = ()
    """What stood before the last turn: (role, text) each."""


@dataclass(frozen=True)
class Comparison:
    """What came out of it. Losses are None without held-out rows."""

    name: str
    base: str
    """The base's name."""
    items: list[Item]
    loss: Interval | None
    base_loss: Interval | None
    loss_change: Interval | None
    """Tuned minus base, nats for a supervised token; the same rows are resampled on both sides."""

    def part(self, name: str) -> list[Item]:
        """The items of one part."""
        return [item for item in self.items if item.part == name]

    def numbers(self) -> dict[str, float]:
        """Every number that ``--fail-if`` knows."""
        made: dict[str, float] = {}
        for part, prefix in (("held-out", ""), ("general", "general_")):
            items = self.part(part)
            if items:
                made[f"{prefix}score"] = float(np.mean([item.score for item in items]))
                made[f"{prefix}base_score"] = float(np.mean([item.base_score for item in items]))
                made[f"{prefix}wins"] = sum(item.score > item.base_score for item in items)
                made[f"{prefix}losses"] = sum(item.score < item.base_score for item in items)
                made[f"{prefix}change"] = made[f"{prefix}score"] - made[f"{prefix}base_score"]
        if self.loss and self.base_loss:
            made |= {"loss": self.loss.value, "base_loss": self.base_loss.value}
        return made

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: what, base, tuned, tuned minus base; intervals are 95 %."""
        made = []
        for part, title in (("held-out", "score, held-out"), ("general", "score, general")):
            items = self.part(part)
            if not items:
                continue
            before, after = (np.array([getattr(i, side) for i in items]) for side in ("base_score", "score"))
            made.append((title, str(bootstrap(before)), str(bootstrap(after)), str(bootstrap(after - before))))
            wins, lost = int((after > before).sum()), int((after < before).sum())
            made.append(
                (f"  of {len(items)} rows", "", "", f"{wins} better · {lost} worse · {len(items) - wins - lost} same")
            )
        if self.loss and self.base_loss and self.loss_change:
            made.append(("loss, held-out", str(self.base_loss), str(self.loss), str(self.loss_change)))
        return made

    def worse(self) -> list[Item]:
        """What the base did better, the greatest fall first."""
        return sorted((i for i in self.items if i.score < i.base_score), key=lambda i: i.score - i.base_score)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``compare.json``."""
        return {"numbers": self.numbers(), **asdict(self)}


def compare(
    opened: Opened,
    data: str | HeldOut | None = None,
    *,
    checker: Checker | None = None,
    general: bool = True,
    sampling: Sampling | None = None,
    on_progress: OnProgress = lambda work, done, total: None,
) -> Comparison:
    """Ask base and tuned the same, greedily unless told otherwise, and score both.

    Args:
        opened: The run.
        data: Held-out rows with answers, in any shape that training reads; or those that the run held out.
        checker: Scores a reply against the row's answer; exact match unless given.
        general: Ask the package's general set too.
        sampling: How tokens are chosen.
        on_progress: Takes how much of which work is done.

    Raises:
        UserError: The target has no adapter, or the data can't be read.
    """
    if opened.found.adapter is None:
        raise UserError(f"{opened.found.name} is a bare model: there is nothing to compare it with")
    sampling = sampling or Sampling(max_new_tokens=256)
    questions: list[Question] = []
    documents: Documents | None = None
    if isinstance(data, HeldOut):
        questions, documents = data.questions(), data.documents
    elif data:
        questions, documents = read_questions(data, need_reference=True), documents_of(opened, (data,))
    check = checker or exact_match
    asked: list[Question] = [*questions, *(Question(list(g.messages)) for g in GENERAL if general)]
    if not asked:
        raise UserError("there is nothing to compare on", way_out="Give DATA, or leave the general set in.")
    prompts = [opened.prompt_ids(question.messages, question.tools or None, question.variables) for question in asked]
    replies = _in_order(opened, prompts, sampling, lambda done: on_progress("tuned", done, len(prompts)))
    with opened.as_base():
        base_replies = _in_order(opened, prompts, sampling, lambda done: on_progress("base", done, len(prompts)))
    items = []
    for at, question in enumerate(asked):
        if at < len(questions):
            part, reference = "held-out", question.reference or ""
            was, now = (float(check(text, reference)) for text in (base_replies[at], replies[at]))
        else:
            rule = GENERAL[at - len(questions)]
            part, reference = "general", rule.expected
            was, now = (float(rule.is_right(text)) for text in (base_replies[at], replies[at]))
        *before, last = [(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in question.messages]
        items.append(Item(part, last[1], reference, base_replies[at], replies[at], was, now, tuple(before)))
    loss = base_loss = change = None
    if documents is not None:
        on_progress("losses", 0, 2)
        tuned = losses(opened, documents)
        on_progress("losses", 1, 2)
        with opened.as_base():
            bare = losses(opened, documents)
        on_progress("losses", 2, 2)
        loss, base_loss, change = tuned.mean(), bare.mean(), bootstrap(tuned.nats - bare.nats, tuned.tokens)
    return Comparison(opened.found.name, opened.found.base_name, items, loss, base_loss, change)


def exact_match(reply: str, reference: str) -> float:
    """1 if they are the same but for white space around them."""
    return float(reply.strip() == reference.strip())


def load_checker(text: str) -> Checker:
    """The function that ``file.py:name`` stands for.

    Raises:
        UserError: There is no such file or function.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file() or not name:
        raise UserError(f"--checker {text!r}", rule="It is written file.py:function, and the file must exist.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--checker {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{file} has no function {name!r}", rule="It takes (reply, reference) and gives 0 to 1.")
    made: Checker = function
    return made


_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def parse_condition(text: str) -> tuple[str, str, float]:
    """(name, operator, number) of ``score<0.9``.

    Raises:
        UserError: It is written otherwise.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*", text)
    if found is None:
        raise UserError(f"--fail-if {text!r}", rule="It is written name<number, with <, <=, > or >=: score<0.9")
    return found[1], found[2], float(found[3])


def fail_if(comparison: Comparison, conditions: Sequence[str]) -> None:
    """Stop if one of the conditions holds.

    Raises:
        UserError: A condition is malformed, or names no number of this comparison.
        GuardStop: A condition holds.
    """
    numbers = comparison.numbers()
    for text in conditions:
        name, sign, limit = parse_condition(text)
        if name not in numbers:
            raise UserError(f"--fail-if {text!r}: there is no {name}", rule=f"There are {', '.join(numbers)}.")
        if _OPERATORS[sign](numbers[name], limit):
            raise GuardStop(f"{name} is {numbers[name]:.4g}", rule=f"--fail-if {text}")


def _in_order(opened: Opened, prompts: list[list[int]], sampling: Sampling, tell: Callable[[int], None]) -> list[str]:
    made: dict[int, str] = {}
    tell(0)
    for reply in generate(opened, prompts, sampling):
        made[reply.index] = reply.text
        tell(len(made))
    return [made[index] for index in range(len(prompts))]
