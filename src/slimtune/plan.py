"""What this run will do on this machine: every ``auto`` of the config decided, with the reason.

The decisions become part of the resolved config that the run records, and ``slimtune explain`` tells them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.config import SMALL_BASE, SMALL_RATE, Config
from slimtune.data.packing import micro_batches
from slimtune.errors import UserError
from slimtune.hardware import Card, Hardware
from slimtune.ranks.group import Ranks
from slimtune.ranks.share import accumulation_for, check_even
from slimtune.run.statement import counted

if TYPE_CHECKING:
    from slimtune.data.documents import Documents

__all__ = [
    "ANSWER_WEIGHT",
    "Choice",
    "agreed",
    "check_precision",
    "default_output",
    "few_steps",
    "memory_budget",
    "micro_batches_of_run",
    "resolve_amount",
    "resolve_held_out",
    "resolve_machine",
    "resolve_ranks",
    "resolve_rate",
    "resolve_steps",
    "resolved",
    "rounds_of_rows",
    "steps_of_run",
]

SAVES_IN_A_RUN = 10
EVALUATION_SHARE = 0.1
"""Of a run's work that evaluations may take, unless their number is given."""
FEW_STEPS = 60
"""With fewer optimizer steps an adapter that begins at nothing has hardly moved."""
STEPS_OF_FEW = 160
"""What few rows are given instead: of a grid's two amounts, 60 and 160 steps, the better (benchmarks/defaults.py)."""
MOST_EPOCHS = 20.0
"""Of few rows, more are learnt by heart."""
ANSWER_PASSES = 4
"""How often a run goes over what it rehearses, however often over its rows: 96 answers four times kept 93 % of a small
base's general score on average, in each of up to twenty epochs 84 %, in up to three times the steps (decision 174)."""
ANSWER_WEIGHT = 0.25
"""How much a token of what is rehearsed counts, where a row's counts 1. The optimizer divides by how large gradients
are: beside whole answers, which never end to have some, little is left to the rows' own (decision 176)."""
REHEARSED_TOKENS = 256
"""A general prompt with its answer takes no more, in most templates."""
LEAST_DOCUMENTS = 4
"""Of a pack, on average: what a step of fewer says depends on which they are."""
_TILE = 64
MEMORY_SHARE = 0.9
"""Of the card's memory that training may take: the rest is the CUDA context's and fragmentation's."""


@dataclass(frozen=True)
class Choice:
    """One value that was chosen for the person, and why."""

    key: str
    value: Any
    reason: str


def default_output(model: str, now: datetime) -> Path:
    """``runs/<time>-<model>``, for a run that was given no folder."""
    name = Path(model).name.lower() or "model"
    return Path("runs") / f"{now:%Y%m%d-%H%M%S}-{name}"


def agreed(config: Config, ranks: Ranks, versions: dict[str, str]) -> Config:
    """Rank 0's config, with its folder and date, once it is seen that all ranks were given the same.

    Raises:
        UserError: One was given another config, or has other versions; or all are to read standard input.
    """
    ranks.check_same(versions, "All ranks compute with the same versions.")
    given = config.model_dump(mode="json", exclude={"output", "date"})
    ranks.check_same(given, "All ranks are given the same config.")
    if not ranks.alone and "-" in config.data:
        raise UserError("several ranks can't read standard input", way_out="Write it to a file, and give that.")
    output = config.output or default_output(config.model, datetime.now())
    return ranks.from_first(lambda: config.model_copy(update={"output": output, "date": config.date or date.today()}))


def resolve_machine(config: Config, hardware: Hardware) -> tuple[Config, list[Choice]]:
    """Decide what depends on the machine: dtype, optimizer, memory."""
    choices: list[Choice] = []
    if config.compute_dtype == "auto":
        choices.append(Choice("compute_dtype", hardware.compute_dtype, hardware.compute_dtype_reason))
    if config.optim == "auto":
        if hardware.device == "cuda":
            choices.append(Choice("optim", "paged_adamw_8bit", "8-bit states, paged to RAM when the GPU runs short"))
        else:
            choices.append(
                Choice(
                    "optim",
                    "adamw_8bit",
                    "the same 8-bit states; paging moves them between GPU and RAM, and here is no GPU",
                )
            )
    if config.memory == "auto" and hardware.device == "cuda":
        share = f"{hardware.memory_bytes * MEMORY_SHARE / 2**30:.2f}GiB"
        choices.append(Choice("memory", share, f"{MEMORY_SHARE:.0%} of what {hardware.name} has"))
    return _with_precision(resolved(config, choices), hardware), choices


def _with_precision(config: Config, hardware: Hardware) -> Config:
    """What is multiplied in, decided: never FP8 unless it was asked for.

    Raises:
        UserError: It was, or bf16, and this machine computes in something else.
    """
    if config.precision == "auto":
        return config.model_copy(update={"precision": "bf16"}) if config.compute_dtype == "bf16" else config
    reason = hardware.without_fp8 if config.precision == "fp8" else None
    if reason is None and config.compute_dtype != "bf16":
        reason = f"this machine computes in {config.compute_dtype}: {hardware.compute_dtype_reason}"
    if reason is not None:
        raise _without(config.precision, reason)
    return config


def check_precision(config: Config, card: Card | Hardware) -> None:
    """See that a card that is planned for multiplies in what was asked for, as a run there sees to it.

    Raises:
        UserError: It doesn't.
    """
    reason = card.without_fp8 if config.precision == "fp8" else None
    if reason is None and config.precision != "auto" and (config.compute_dtype, card.compute_dtype) == ("auto", "fp16"):
        reason = f"{card.name} has no native bf16"
    if reason is not None:
        raise _without(config.precision, reason)


def _without(precision: str, reason: str) -> UserError:
    return UserError(
        f"precision: {precision} can't be had: {reason}", way_out="Leave precision at auto: as compute_dtype."
    )


def resolve_ranks(config: Config, count: int) -> tuple[Config, list[Choice]]:
    """Decide what depends on how many processes share a step.

    Raises:
        UserError: They can't share it evenly.
    """
    if count > 1 and config.gradient_accumulation == "auto":
        chosen = accumulation_for(config.accumulation, count)
        choice = Choice("gradient_accumulation", chosen, f"{count} ranks, each of which takes as many of a step")
        return resolved(config, [choice]), [choice]
    check_even(config.accumulation, count)
    return config, []


def memory_budget(config: Config) -> int | None:
    """Most bytes that training may take on the GPU; None where there is no limit to keep (a CPU)."""
    if config.memory == "auto":
        return None
    number, unit = re.fullmatch(r"([\d.]+)\s?(\w+)", config.memory).groups()  # type: ignore[union-attr]
    return int(float(number) * {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}[unit])


def rounds_of_rows(config: Config) -> int:
    """How often the run goes over its rows while it goes over what it rehearses once: so that it does this about
    :data:`ANSWER_PASSES` times. Follows from the config alone, decided or recorded."""
    if not config.rehearse or config.max_steps is not None:
        return 1
    return max(1, round(config.passes / ANSWER_PASSES))


def micro_batches_of_run(config: Config, per_epoch: float) -> int:
    """Micro-batches of the whole run, over all its epochs; ``per_epoch``: in a pass over its rows."""
    if config.max_steps is not None:
        return config.max_steps * config.accumulation
    return max(1, math.ceil(round(config.passes * per_epoch, 6)))  # 0.1 x 30 is a little over 3 in floats


def steps_of_run(config: Config, per_epoch: float) -> int:
    """Optimizer steps of the whole run; ``per_epoch``: micro-batches in a pass over its rows."""
    return math.ceil(micro_batches_of_run(config, per_epoch) / config.accumulation)


def resolve_amount(config: Config, train: Documents, held_out: Documents | None) -> tuple[Config, list[Choice]]:
    """Decide tokens of a pack, micro-batches to a step and epochs: the usual ones, and where these make few steps, ones
    that make more. What was asked for stays.

    Args:
        config: What is to run.
        train: What it trains on.
        held_out: What it is evaluated on: a pack holds its longest document too.

    Raises:
        UserError: The packs that were asked for don't hold the longest document.
    """
    longest = _longest(config, *(part for part in (train, held_out) if part is not None))
    if config.packing and longest > config.batch_tokens:
        raise UserError(
            f"pack_tokens {config.batch_tokens:,} is less than the longest conversation, which has {longest:,} tokens",
            rule="A pack holds whole conversations.",
            way_out=f"Give --pack-tokens {longest} or more, or a smaller --max-length.",
        )
    usual = {"epochs": config.passes, "gradient_accumulation": config.accumulation}
    usual |= {"pack_tokens": config.batch_tokens} if config.packing else {}
    steps = _steps_at_least(config, train)
    taken = usual | (_more_steps(config, train, longest) if steps < FEW_STEPS else {})
    reason = "with the usual {:,g} the run would have {}, fewer than about {}"
    choices = [
        Choice(key, value, reason.format(usual[key], counted(steps, "optimizer step"), FEW_STEPS))
        for key, value in taken.items()
        if value != usual[key]
    ]
    return config.model_copy(update=taken), choices


def _longest(config: Config, *parts: Documents) -> int:
    """Tokens of the longest document that a pack is to hold; of what is rehearsed, where packs are made for it."""
    longest = max(int(part.lengths.max()) for part in parts)
    if config.rehearse and config.pack_tokens == "auto":
        longest = max(longest, min(REHEARSED_TOKENS, config.batch_tokens))
    return longest


def _steps_at_least(config: Config, documents: Documents) -> int:
    """Optimizer steps of the run; of many, no fewer than these. Packs are counted only where there are few."""
    if config.packing:
        bound = steps_of_run(config, math.ceil(documents.tokens / config.batch_tokens))
        if bound >= FEW_STEPS:
            return bound
    return steps_of_run(config, micro_batches(documents, config).per_epoch)


def _more_steps(config: Config, documents: Documents, longest: int) -> dict[str, Any]:
    """What makes about :data:`STEPS_OF_FEW` steps of the data, by the keys that are ``auto``: first single
    micro-batches, then smaller packs, then more epochs."""
    if config.max_steps is not None:
        return {}
    taken: dict[str, Any] = {}
    if config.gradient_accumulation == "auto":
        taken["gradient_accumulation"] = 1
    wanted = STEPS_OF_FEW * config.model_copy(update=taken).accumulation
    if config.packing and config.pack_tokens == "auto" and config.micro_batch == 1:
        least = max(longest, LEAST_DOCUMENTS * documents.tokens / len(documents))
        tokens = _TILE * math.ceil(max(least, documents.tokens / math.ceil(wanted / config.passes)) / _TILE)
        taken["pack_tokens"] = min(tokens, config.batch_tokens)
    if config.epochs == "auto":
        per_epoch = micro_batches(documents, config.model_copy(update=taken)).per_epoch
        taken["epochs"] = min(MOST_EPOCHS, max(config.passes, float(round(wanted / per_epoch))))
    return taken


def few_steps(config: Config, per_epoch: float, documents: Documents, ranks: int = 1) -> str | None:
    """What to say of a run of too few optimizer steps to learn from, and what to set; None if there are enough.

    Args:
        config: What is to run, decided. Steps that it names itself are taken as meant.
        per_epoch: Micro-batches in a pass over its rows.
        documents: The rows that it trains on.
        ranks: That share a step; it has as many micro-batches at least.
    """
    steps = steps_of_run(config, per_epoch)
    if config.max_steps is not None or steps >= FEW_STEPS:
        return None
    free: dict[str, Any] = {"epochs": "auto", "gradient_accumulation": "auto" if ranks == 1 else ranks}
    free |= {"pack_tokens": "auto", "micro_batch": 1} if config.packing else {}
    more = {"gradient_accumulation": ranks}
    freed = config.model_copy(update=free)
    more |= _more_steps(freed, documents, _longest(freed, documents))
    flags = [f"--{key.replace('_', '-')} {value:g}" for key, value in more.items() if value != getattr(config, key)]
    what = f"{steps} optimizer step{'s are' if steps > 1 else ' is'} little to learn from"
    return f"{what}: more by {' '.join(flags)}" if flags else f"{what}: more rows would teach more"


def resolve_held_out(config: Config, share: float, rows: int) -> tuple[Config, list[Choice]]:
    """Decide what isn't trained on.

    Args:
        config: What is to run.
        share: Of the rows that the proof of the data has held out.
        rows: Different rows that it is a share of.
    """
    if config.eval_share != "auto":
        return config, []
    reason = f"{round(share * rows):,} of {rows:,} different rows: a twentieth, 8 at least and 200 at most"
    if config.eval:
        reason = "eval names the held-out data"
    elif not share:
        reason = f"none of {rows:,} different rows, as they are fewer than 20"
    choices = [Choice("eval_share", share, reason)]
    return resolved(config, choices), choices


def resolve_rate(config: Config, parameters: int) -> tuple[Config, list[Choice]]:
    """Decide what depends on the base's size; ``parameters`` is how many it has."""
    if config.learning_rate != "auto":
        return config, []
    choices = []
    if parameters <= SMALL_BASE:
        size, most = f"{parameters / 1e6:,.0f}", f"{SMALL_BASE / 1e6:,.0f}"
        reason = f"the base has {size} million parameters: one of up to {most} learns little at {config.rate:g}"
        choices = [Choice("learning_rate", SMALL_RATE, reason)]
    return config.model_copy(update={"learning_rate": SMALL_RATE if choices else config.rate}), choices


def resolve_steps(config: Config, per_epoch: float, eval_work: float = 0.0) -> tuple[Config, list[Choice]]:
    """Decide what depends on the data's length.

    Args:
        config: What is to run.
        per_epoch: Micro-batches in a pass over its rows.
        eval_work: Tokens of an evaluation over those of an epoch.
    """
    total = steps_of_run(config, per_epoch)
    choices: list[Choice] = []
    whole = micro_batches_of_run(config, per_epoch) / per_epoch
    # A run that rehearses keeps the epochs it was given: what follows from them must be the same when it is resumed.
    if config.max_steps is None and not config.rehearse and not math.isclose(whole, config.passes):
        reason = (
            f"{config.passes:g} epochs rounded up to whole micro-batches, of which an epoch has {round(per_epoch):,}"
        )
        choices.append(Choice("epochs", whole, reason))
    every = max(1, math.ceil(total / SAVES_IN_A_RUN))
    if config.save_steps == "auto":
        choices.append(
            Choice("save_steps", every, f"{total} optimizer steps, so about {math.ceil(total / every)} checkpoints")
        )
    if config.eval_steps == "auto" and (config.eval or config.eval_share):
        # Not as the checkpoints, which may be made at other steps without the run being another.
        often = max(1, math.ceil(total / _evaluations(config, whole, eval_work)))
        choices.append(
            Choice("eval_steps", often, f"{total} optimizer steps, so about {math.ceil(total / often)} evaluations")
        )
    return resolved(config, choices), choices


def _evaluations(config: Config, epochs: float, eval_work: float) -> int:
    """How many of a run take no more than a tenth of its work: a token that is trained on takes three times as much."""
    if config.early_stopping is not None or not eval_work:
        return SAVES_IN_A_RUN
    return max(1, min(SAVES_IN_A_RUN, int(EVALUATION_SHARE * 3 * epochs / eval_work)))


def resolved(config: Config, choices: list[Choice]) -> Config:
    """``config`` with what was chosen."""
    return config.model_copy(update={choice.key: choice.value for choice in choices})
