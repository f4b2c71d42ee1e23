"""What held-out prompts were answered in the course of a run: ``samples.jsonl``, put together by prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slimtune.run.statement import Say

__all__ = ["Answered", "Reply", "Sampled", "read_samples", "samples_told"]

MOST_REPLIES = 12
"""Of one prompt, for people to read: the first, the last, and as many between them."""


@dataclass(frozen=True)
class Reply:
    """What the model answered after a step."""

    step: int
    text: str
    ended: str
    """stop, or why it was cut: length, time."""


@dataclass
class Answered:
    """One prompt and its replies over the steps."""

    row: str
    prompt: str
    expected: str
    replies: list[Reply] = field(default_factory=list)


@dataclass(frozen=True)
class Sampled:
    """All of them."""

    prompts: list[Answered]
    evaluations: int
    """At which they were answered."""
    seconds: float
    """That this took."""


def read_samples(records: Iterable[Mapping[str, Any]], most: int | None = None) -> Sampled:
    """Sort the lines of ``samples.jsonl``. What was answered after the step that a session went on from is left out,
    but not the time that it took; a line that isn't as the run writes it is passed over.

    Args:
        records: The lines.
        most: How many replies of a prompt are wanted, two or more; None: all of them.
    """
    kept: dict[int, list[dict[str, str]]] = {}
    seconds = 0.0
    for record in records:
        step, samples, taken = record.get("step"), record.get("samples"), record.get("seconds")
        if isinstance(step, int) and isinstance(samples, list) and all(map(_is_whole, samples)):
            while kept and next(reversed(kept)) >= step:
                kept.popitem()
            kept[step] = samples
            seconds += float(taken) if isinstance(taken, int | float) and 0 <= taken < math.inf else 0.0
    prompts: dict[tuple[str, str], Answered] = {}
    for step, samples in kept.items():
        for said in samples:
            asked = Answered(said["row"], said["prompt"], said["expected"])
            asked = prompts.setdefault((asked.row, asked.prompt), asked)
            asked.replies.append(Reply(step, said["reply"], said["ended"]))
    for asked in prompts.values():
        last = len(asked.replies) - 1
        if most is not None and last >= most:
            asked.replies = [asked.replies[at * last // (most - 1)] for at in range(most)]
    return Sampled(list(prompts.values()), len(kept), seconds)


def _is_whole(said: Any) -> bool:
    names = ("row", "prompt", "expected", "reply", "ended")
    return isinstance(said, dict) and all(isinstance(said.get(name), str) for name in names)


def samples_told(sampled: Sampled, say: Say) -> str:
    """At how many evaluations, and what it cost."""
    count, seconds = sampled.evaluations, sampled.seconds
    return say(
        f"held-out prompts, answered greedily at {count:,} evaluation{'s' * (count != 1)}; that took {seconds:.1f} s",
        f"留出数据中的提示，在 {count:,} 次评估时以贪心方式作答，共用 {seconds:.1f} 秒",
    )
