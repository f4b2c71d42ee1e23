"""What a run has before its model is wrapped: the data, the base in 4 bits, and all that is decided by them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimtune.adapter.lora import check_names, lora_config
from slimtune.adapter.matched import adapted_names
from slimtune.adapter.targets import Targets, default_targets, find_targets
from slimtune.base.load import Base, load_base
from slimtune.base.named import model_source
from slimtune.base.quantize import bytes_by_part
from slimtune.base.tokenizer import remarks
from slimtune.base.vocabulary import add_tokens, make_room, rows_by_name, tokenizer_of
from slimtune.config import Config
from slimtune.data.build import FormattingFunc
from slimtune.data.packing import MicroBatches, held_out_batches, micro_batches
from slimtune.data.preflight import Proof, prove
from slimtune.hardware import Hardware
from slimtune.plan import (
    Choice,
    few_steps,
    resolve_amount,
    resolve_held_out,
    resolve_rate,
    resolve_steps,
    resolved,
)
from slimtune.ranks.group import ALONE, Ranks
from slimtune.run.folder import RunFolder
from slimtune.run.lines import data_line
from slimtune.run.screen import Screen
from slimtune.training.arguments import check_model
from slimtune.training.forecast import names_in_ram
from slimtune.training.fused import why_unfused
from slimtune.training.isolation import lay_out
from slimtune.training.layout import Layout
from slimtune.training.stop import StopSignals, Watchdog
from slimtune.training.trainer import SlimTrainer
from slimtune.use.rehearse import rehearse

__all__ = ["Job", "Observer", "Prepared", "base_of", "prepare"]

Observer = Callable[[Any, PreTrainedTokenizerBase], None]


@dataclass(frozen=True)
class Job:
    """What a run is given besides its config."""

    run: RunFolder
    signals: StopSignals
    screen: Screen
    formatting_func: FormattingFunc | None = None
    observe: Observer | None = None
    accept_changes: bool = False
    ranks: Ranks = ALONE

    def observed(self, trainer: SlimTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
        """Show the model to who asked for it."""
        if self.observe is not None:
            self.observe(trainer.model, tokenizer)


@dataclass(frozen=True)
class Prepared:
    """All that is decided before the model is wrapped."""

    config: Config
    """Nothing in it is ``auto`` any more."""
    choices: list[Choice]
    tokenizer: PreTrainedTokenizerBase
    proof: Proof
    base: Base
    targets: Targets
    lora: Any
    """PEFT's ``LoraConfig``."""
    unfused: str | None
    """Why the engine doesn't run the steps; None: it does."""
    layout: Layout | None
    """How documents go through the model; None where the engine computes them."""
    data: MicroBatches
    held_out: MicroBatches | None


def prepare(config: Config, choices: list[Choice], job: Job, hardware: Hardware, watchdog: Watchdog) -> Prepared:
    """Read the data, load the base, and decide what depends on them."""
    screen = job.screen
    with screen.working("reading the data"):
        tokenizer, proof = _read(config, job.run, watchdog, job.formatting_func)
    for line in remarks(tokenizer):
        screen.warn(line)
    screen.say("data", data_line(proof.facts))
    config, for_held_out = resolve_held_out(config, proof.share, proof.different_rows)
    config, for_amount = resolve_amount(config, proof.train, proof.eval)
    with screen.working("loading the base"):
        base = base_of(config, hardware, watchdog)
    if config.rehearse:
        activity, answers = "answering general prompts", job.run.rehearsed_file
        with screen.working(activity):
            if not job.ranks.first:  # unwatched: it takes what rank 0 takes, which is watched there
                answers.write_bytes(job.ranks.from_first(bytes))
            with watchdog.watching(activity):
                line = rehearse(proof, config, base.model, tokenizer, answers, partial(watchdog.beat, activity))
            if job.ranks.first:
                job.ranks.from_first(answers.read_bytes)
        screen.say("rehearse", line)
    check_names(config, base.model)
    check_model(config, base.model)
    config, for_rate = resolve_rate(config, sum(part.parameters for part in bytes_by_part(base.model)))
    config, for_family = _resolve_targets(config, base)
    targets = find_targets(config, base.model)
    lora = lora_config(config, targets, rows_by_name(base.model, base.new_tokens))
    unfused = why_unfused(config, base.model, adapted_names(lora, base.model))
    if config.engine == "plain":
        unfused = next((choice.reason for choice in choices if choice.key == "engine"), unfused)
    layout, for_layout = lay_out(config, base.model, fused=unfused is None)
    config = resolved(config, for_layout)
    data = micro_batches(proof.train, config)
    held_out = None if proof.eval is None else held_out_batches(proof.eval, config)
    config, for_steps = resolve_steps(config, data.per_round, proof.eval_work)
    if (few := few_steps(config, data.per_round, proof.train.rows, job.ranks.count)) is not None:
        screen.warn(few)
    choices = [*choices, *for_held_out, *for_amount, *for_rate, *for_family, *for_layout, *for_steps]
    return Prepared(config, choices, tokenizer, proof, base, targets, lora, unfused, layout, data, held_out)


def _read(
    config: Config, run: RunFolder, watchdog: Watchdog, formatting_func: FormattingFunc | None
) -> tuple[PreTrainedTokenizerBase, Proof]:
    """The tokenizer, and the data proven with it."""
    activity = "reading the data"
    with watchdog.watching(activity):
        tokenizer = tokenizer_of(config)
        proof = prove(
            config, tokenizer, formatting_func=formatting_func, on_progress=lambda rows: watchdog.beat(activity)
        )
        proof.save_ledger(run.ledger_file)
    return tokenizer, proof


def base_of(config: Config, hardware: Hardware, watchdog: Watchdog) -> Base:
    """The base that ``config`` names, in 4 bits, with the tokens that it adds, loaded under the watchdog's eyes."""
    local = Path(model_source(config.model)).is_dir()  # a download shows no progress, and has timeouts of its own
    with watchdog.watching("loading the base") if local else nullcontext():
        base = load_base(
            config.model,
            hardware,
            compute_dtype=config.compute_dtype,
            quantization=config.quantization,
            double_quant=config.double_quant,
            revision=config.revision,
            template=config.template,
            trust_remote_code=config.trust_remote_code,
            in_ram=names_in_ram(config, hardware),
        )
        if config.add_tokens is not None:
            base.new_tokens = add_tokens(base.tokenizer, config.add_tokens)
            make_room(base.model, base.new_tokens)
    return base


def _resolve_targets(config: Config, base: Base) -> tuple[Config, list[Choice]]:
    """Decide what depends on the model's family."""
    if config.targets != "auto":
        return config, []
    names, reason = default_targets(base.model)
    return config.model_copy(update={"targets": names}), [Choice("targets", ", ".join(names), reason)]
