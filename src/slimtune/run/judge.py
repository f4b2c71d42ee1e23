"""Whether a run made the model better or worse on rows that it wasn't trained on, and what to try next.

Every evaluation leaves the losses of the held-out data's parts in ``metrics.jsonl`` (:func:`parts_record`). Two
evaluations are compared part by part: the interval of their difference is that of resampled parts
(:func:`slimtune.run.interval.bootstrap`), so that how hard the rows are by themselves doesn't count. A model whose
replies have got stuck (:mod:`slimtune.run.repeats`) is worse whatever its loss is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from slimtune.config import SMALL_BASE, SMALL_RATE, USUAL_RATE, Config
from slimtune.run.facts import TrainingFacts, VerdictFacts
from slimtune.run.history import read_history
from slimtune.run.interval import Interval, bootstrap
from slimtune.run.repeats import Stuck, stuck_replies
from slimtune.run.samples import Sampled

__all__ = ["judge", "parts_record"]

LEAST_CHANGE = 0.01
"""Nats. What changes a perplexity by less than a hundredth is no change, however sure it is."""
RISE = 1.5
"""Without held-out rows: the losses at the end, which are other rows', may be this many times the first."""
MOST_PARTS = 200
"""Parts that a record holds; of more, several are added up."""
HIGH_RATE = 10 * USUAL_RATE
"""Over it, what didn't change for the better is more likely to have learned too fast than too little."""
_OF_EVALUATIONS = frozenset(
    {"base weights", "chat template", "tokenizer", "config data", "config eval", "config eval_share", "config seed"}
)
"""What decides what is evaluated, beside the data itself (:class:`slimtune.run.identity.Change`)."""
Parts = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]
"""(nats, supervised tokens), each [parts]."""


def parts_record(step: int, nats: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """The line of ``metrics.jsonl`` that :func:`judge` reads: what an evaluation after ``step`` found, by part.

    A sum that is no number becomes null, as JSON has none.
    """
    every = math.ceil(len(nats) / MOST_PARTS)
    sums = [(sum(nats[at : at + every]), sum(tokens[at : at + every])) for at in range(0, len(nats), every or 1)]
    return {
        "step": step,
        "held_out_nats": [round(total, 6) if math.isfinite(total) else None for total, _ in sums],
        "held_out_tokens": [count for _, count in sums],
    }


def judge(
    records: Sequence[Mapping[str, Any]],
    config: Config,
    training: TrainingFacts,
    step: int,
    held_out: Mapping[str, Any] | None,
    sampled: Sampled | None = None,
    parameters: int = SMALL_BASE + 1,
) -> VerdictFacts:
    """Compare what was saved with what the training began with.

    Args:
        records: The lines of ``metrics.jsonl``.
        config: What ran.
        training: What its training did.
        step: The optimizer step that was saved.
        held_out: What the data's proof says of the held-out documents; None if there are none.
        sampled: What held-out prompts were answered.
        parameters: Of the base.
    """
    found = {record["step"]: _parts(record) for record in records if "held_out_nats" in record}
    start, end = found.get(0), found.get(step)
    comparable = start is not None and end is not None and np.array_equal(start[1], end[1])
    if not held_out or start is None or end is None or not comparable or _compares_others(records, config):
        return _by_training(config, training, parameters, documents=held_out["documents"] if held_out else 0)
    same = {at: parts for at, parts in found.items() if at <= step and np.array_equal(start[1], parts[1])}
    losses = {at: float(nats.sum() / max(1, tokens.sum())) for at, (nats, tokens) in same.items()}
    trained = {at: loss for at, loss in losses.items() if at > 0 and math.isfinite(loss)}
    best = min(trained, key=trained.__getitem__, default=None)
    change = _change(start, end)
    outcome = "same"
    if change is None or _rises(change):
        outcome = "worse"
    elif _falls(change):
        outcome = "better"
    replies = stuck_replies(sampled, step) if sampled is not None else Stuck()
    advice = _advice(outcome, same, best, step)
    if outcome == "same" and advice == "longer" and config.rate > HIGH_RATE:
        advice = "slower"
    if advice == "longer" and max(found) > step:  # early stopping went on from what is saved, and found no better
        advice = ""
    by_replies = replies.most and outcome != "worse"
    if by_replies:
        outcome = "worse"
        if advice != "shorter":
            advice = "slower" if config.rate > USUAL_RATE else ""
    return VerdictFacts(
        outcome=outcome,
        documents=held_out["documents"],
        start=_plain(bootstrap(*start)),
        end=None if change is None else _plain(bootstrap(*end)),
        change=None if change is None else _plain(change),
        step=step,
        best_step=best,
        best_loss=None if best is None else trained[best],
        advice=advice,
        suggestion=_suggestion(advice, config, training, best, step, parameters),
        answered=replies.answered,
        stuck=replies.stuck,
        stuck_reply=replies.example,
        by_replies=by_replies,
    )


def _parts(record: Mapping[str, Any]) -> Parts:
    nats = [math.nan if value is None else value for value in record["held_out_nats"]]
    return np.array(nats, np.float64), np.array(record["held_out_tokens"], np.int64)


def _compares_others(records: Sequence[Mapping[str, Any]], config: Config) -> bool:
    """Whether the run went on with something else than what its first evaluation was of: other rows, another base."""
    sources = {f"data {source}" for source in (*config.data, *config.eval)}
    return any(change["what"] in _OF_EVALUATIONS | sources for change in read_history(records).changes)


def _change(before: Parts, after: Parts) -> Interval | None:
    """Of the loss of a supervised token, in nats; None if one of them is no number."""
    difference = after[0] - before[0]
    return bootstrap(difference, after[1]) if np.isfinite(difference).all() else None


def _rises(change: Interval | None) -> bool:
    return change is not None and change.low > 0 and change.value > LEAST_CHANGE


def _falls(change: Interval | None) -> bool:
    return change is not None and change.high < 0 and change.value < -LEAST_CHANGE


def _advice(outcome: str, found: Mapping[int, Parts], best: int | None, step: int) -> str:
    """longer, shorter, slower, or nothing."""
    if best is not None and best != step:
        falls, rises = _change(found[0], found[best]), _change(found[best], found[step])
        if _falls(falls) and (rises is None or _rises(rises)):
            return "shorter"
    if outcome == "worse":
        return "slower"
    earlier = [at for at in found if 0 < at <= step * 2 / 3]
    still = bool(earlier) and _falls(_change(found[max(earlier)], found[step]))
    return "longer" if still or outcome == "same" else ""


def _suggestion(
    advice: str, config: Config, training: TrainingFacts, best: int | None, step: int, parameters: int
) -> str:
    """The flag that follows the advice. A lower rate is the one that such a base is given by itself, unless it is what
    failed, or as good as that."""
    if advice == "slower":
        usual = SMALL_RATE if parameters <= SMALL_BASE else USUAL_RATE
        rate = usual if 2 * usual <= config.rate else config.rate / 10
        return f"--learning-rate {rate:.2g}"
    if advice not in ("longer", "shorter"):
        return ""
    steps = 2 * training.steps if advice == "longer" else best or step
    if config.max_steps is not None:
        return f"--max-steps {steps}"
    epochs = training.epochs * steps / max(1, training.steps)
    return f"--epochs {epochs:.2g}"


def _by_training(config: Config, training: TrainingFacts, parameters: int, documents: int) -> VerdictFacts:
    """No row was held out, or others at the end: all that can be seen is losses that are none."""
    first, last = training.first_loss, training.last_loss
    if math.isfinite(last) and not last > RISE * first:
        return VerdictFacts(outcome="unmeasured", documents=documents)
    suggestion = _suggestion("slower", config, training, None, 0, parameters)
    return VerdictFacts(outcome="worse", documents=documents, advice="slower", suggestion=suggestion)


def _plain(interval: Interval) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in asdict(interval).items()}
