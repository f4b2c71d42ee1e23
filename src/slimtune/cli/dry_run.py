"""``slimtune train --dry-run``: what a run would do, from its data and this machine; no weights are loaded."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slimtune.base.classes import skeleton
from slimtune.base.named import model_source
from slimtune.base.tokenizer import remarks
from slimtune.base.vocabulary import tokenizer_of
from slimtune.cli.fits import fit_of
from slimtune.config import Config
from slimtune.data.packing import PackedBatches, micro_batches
from slimtune.data.preflight import prove
from slimtune.data.stdin import keep_stdin
from slimtune.engine.ram import ram_to_lock
from slimtune.hardware import detect
from slimtune.plan import (
    Choice,
    few_steps,
    memory_budget,
    micro_batches_of_run,
    resolve_amount,
    resolve_held_out,
    resolve_machine,
    resolve_rate,
    resolve_steps,
    rounds_of_rows,
    steps_of_run,
)
from slimtune.run.lines import (
    data_line,
    embedding_line,
    in_ram_line,
    memory_line,
    packs_line,
    rehearsed_line,
    steps_line,
    streamed_line,
)
from slimtune.run.quiet import upstream_to_log
from slimtune.run.screen import Screen
from slimtune.training.arguments import check_arguments
from slimtune.training.forecast import Forecaster
from slimtune.training.fused import too_little
from slimtune.use.rehearse import ANSWER_TOKENS, expected
from slimtune.words import told

__all__ = ["dry_run"]


@upstream_to_log(None)
def dry_run(config: Config, screen: Screen) -> dict[str, Any]:
    """Prove the data and plan the run, as :func:`slimtune.recipes.finetune` does before it loads the base.

    Returns:
        The data's facts, the steps, the tokens that they take in all, a document's on average, and the choices, as
        plain data.

    Raises:
        UserError: Training would be refused for its data, or for what the config names.
    """
    check_arguments(config)
    config, for_machine = resolve_machine(config, detect())
    with TemporaryDirectory() as folder, screen.working("reading the data"):
        config = keep_stdin(config, Path(folder))
        tokenizer = tokenizer_of(config)
        proof = prove(config, tokenizer)
    config, for_held_out = resolve_held_out(config, proof.share, proof.different_rows)
    config, for_amount = resolve_amount(config, proof.train, proof.eval)
    data = micro_batches(proof.train, config)
    for_rate: list[Choice] = []
    if (base := Path(model_source(config.model))).is_dir():
        made = skeleton(base, trust_remote_code=config.trust_remote_code)
        config, for_rate = resolve_rate(config, sum(parameter.numel() for parameter in made.parameters()))
    answers, per_epoch = expected(config, data)
    config, for_steps = resolve_steps(config, per_epoch, proof.eval_work)
    steps = steps_of_run(config, per_epoch)
    choices = [*for_machine, *for_held_out, *for_amount, *for_rate, *for_steps]
    for line in remarks(tokenizer):
        screen.warn(line)
    screen.say("data", data_line(proof.facts))
    screen.say("packs", packs_line(data, config, None if isinstance(data, PackedBatches) else "asked for"))
    screen.say("steps", steps_line(steps, config, evaluates=proof.eval is not None))
    if answers:
        screen.say("rehearse", rehearsed_line(answers))
    for choice in choices:
        screen.say("chosen", f"{choice.key} {choice.value}: {told(choice.reason)}")
    if (few := few_steps(config, per_epoch, proof.train)) is not None:
        screen.warn(few)
    if (budget := memory_budget(config)) is not None:
        _tell_memory(Forecaster(config), budget, config, screen)
    else:
        within = config.model_copy(update={"max_length": min(config.max_length, config.batch_tokens)})
        screen.say("memory", " ".join(fit_of(Forecaster(within, headers=False), detect().card, None, 0).said))
    screen.say("dry run", "nothing was written. Targets, engine and layout are decided on the loaded model.")
    of_epoch = proof.train.tokens + answers * ANSWER_TOKENS / rounds_of_rows(config)
    tokens = round(micro_batches_of_run(config, per_epoch) / per_epoch * of_epoch)
    mean = math.ceil(proof.train.tokens / len(proof.train))
    return {
        "data": proof.facts, "steps": steps, "tokens": tokens, "mean_length": mean,
        "choices": [asdict(choice) for choice in choices],
    }  # fmt: skip


def _tell_memory(forecaster: Forecaster, budget: int, config: Config, screen: Screen) -> None:
    if forecaster.unfused is not None:
        screen.say("memory", f"not planned, as the engine doesn't run the steps: {forecaster.unfused}")
        return
    if forecaster.fp8_told:
        screen.say("engine", forecaster.fp8_told)
    machine = detect()
    planned = forecaster.forecast(machine.card, budget, ram_to_lock() if machine.device == "cuda" else None)
    screen.say("memory", memory_line(planned.parts, config.memory))
    if planned.ram_layers:
        line = in_ram_line(planned.ram_layers, planned.attended_layers, planned.layers, planned.ram_bytes)
        screen.say("memory", line)
    if planned.embedding_bytes:
        screen.say("memory", embedding_line(planned.embedding_bytes))
    if planned.streamed_layers:
        screen.say("memory", streamed_line(planned.streamed_layers, planned.layers, planned.streamed_bytes))
    if not planned.trains:
        refusal = too_little(config, planned.nbytes)
        perhaps = f"memory: {config.memory} is too little for documents of {config.max_length:,} tokens"
        screen.warn(perhaps if refusal is None else refusal.what)
