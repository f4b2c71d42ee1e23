"""One short function a verb. :func:`finetune` reads like the study note it began with:

1. the base in 4 bits, its tokenizer, and the data;
2. the LoRA configuration;
3. SFTTrainer, which wraps the model by itself;
4. train, and save the adapter alone.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from slimtune.adapter.files import ADAPTER_WEIGHTS
from slimtune.adapter.lora import lora_config
from slimtune.adapter.passport import issue_passport, stamp
from slimtune.base.load import Base, load_base, load_tokenizer
from slimtune.base.quantize import bytes_by_part, fingerprint
from slimtune.config import Config
from slimtune.data.build import FormattingFunc
from slimtune.data.packing import MicroBatches, PackedBatches, micro_batches
from slimtune.data.preflight import Proof, prove
from slimtune.errors import UserError
from slimtune.hardware import Hardware, detect
from slimtune.plan import Choice, default_output, micro_batches_of_run, resolve_machine, resolve_steps
from slimtune.run.environment import environment, library_versions
from slimtune.run.facts import AdapterFacts, BaseFacts, ChoiceFact, Facts
from slimtune.run.folder import RunFolder
from slimtune.run.quiet import upstream_to_log
from slimtune.run.screen import Screen, megabytes
from slimtune.training.arguments import sft_arguments
from slimtune.training.fused import make_engine, why_unfused
from slimtune.training.progress import MetricsCallback, optimizer_facts, training_facts
from slimtune.training.trainer import SlimTrainer

__all__ = ["finetune"]


def finetune(
    config: Config,
    *,
    formatting_func: FormattingFunc | None = None,
    screen: Screen | None = None,
) -> RunFolder:
    """Fine-tune a chat model as ``config`` says, and give back the run's folder.

    Args:
        config: What to do; ``auto`` values are decided here and recorded.
        formatting_func: As SFTTrainer's: takes a row of the data, gives its text, or its messages.
        screen: Where to show progress; silent by default.

    Raises:
        UserError: Something that the person can mend; no run folder is left behind.
        GuardStop: A guard stopped the training.
        StopRequested: The run was asked to stop, and can be resumed.
    """
    screen = screen or Screen(quiet=True)
    _check_inputs(config)
    hardware = detect()
    config, choices = resolve_machine(config, hardware)
    output = config.output or default_output(config.model, datetime.now())
    with RunFolder.create(output, overwrite=config.overwrite) as run, upstream_to_log(run.log_file):
        # 1. The tokenizer, the data proven with it, and the base in 4 bits.
        with screen.working("reading the data"):
            tokenizer = load_tokenizer(
                config.model,
                revision=config.revision,
                template=config.template,
                trust_remote_code=config.trust_remote_code,
            )
            proof = prove(config, tokenizer, formatting_func=formatting_func)
            proof.save_ledger(run.ledger_file)
            data = micro_batches(proof.train, config, tokenizer.pad_token_id)
            held_out = None if proof.eval is None else micro_batches(proof.eval, config, tokenizer.pad_token_id)
        screen.say("data", _data_line(proof, data))
        config, more = resolve_steps(config, data.per_epoch)
        choices += more
        run.write_config(config.model_copy(update={"output": output}))
        run.write_json(run.environment_file, environment(hardware.as_dict()))
        with screen.working("loading the base"):
            base = _load(config, hardware)
        facts = _facts(config, base, run, proof.facts | _batch_facts(data), choices, hardware)
        screen.say("base", _base_line(facts.base))

        # 2. The adapter.
        lora = lora_config(config)

        # 3. SFTTrainer wraps the plain model in it. The engine then runs its steps, where it knows the model.
        reason_unfused = why_unfused(config, base.model)
        trainer = SlimTrainer(
            model=base.model,
            args=sft_arguments(config, hardware, run.checkpoints, fused=reason_unfused is None),
            data=data,
            micro_batches=micro_batches_of_run(config, data.per_epoch),
            evaluation=held_out,
            tokenizer=tokenizer,
            lora=lora,
            callbacks=[MetricsCallback(data, config.gradient_accumulation, run.append_metrics, screen.record)],
        )
        if reason_unfused is None:
            trainer.use_engine(make_engine(config, trainer.model))
        else:
            screen.say("engine", f"plain: {reason_unfused}")
        facts.adapter = _adapter_facts(config, trainer)
        screen.say("adapter", _adapter_line(facts.adapter))

        # 4. Train, and save the adapter alone.
        with screen.training():
            trainer.train()
        trainer.save_model(str(run.adapter))
        stamp(run.adapter, issue_passport(config, base.source, tokenizer))
        screen.say("saved", f"{run.adapter} ({megabytes(_adapter_bytes(run))})")

        # What happened, measured.
        facts.optimizer = optimizer_facts(config.optim, trainer.optimizer)
        facts.training = training_facts(
            run.metrics(), engine="fused" if reason_unfused is None else f"plain: {reason_unfused}"
        )
        facts.base.fingerprint_after = fingerprint(trainer.model)
        facts.adapter.file_bytes = _adapter_bytes(run)
        facts.adapter.folder_files = sorted(path.name for path in run.adapter.iterdir())
        run.write_json(run.facts_file, facts.as_dict())
        return run


def _check_inputs(config: Config) -> None:
    if not config.data:
        raise UserError("no data given", way_out="slimtune train MODEL DATA, with DATA a local file or a hub id.")


def _load(config: Config, hardware: Hardware) -> Base:
    return load_base(
        config.model,
        hardware,
        compute_dtype=config.compute_dtype,
        quantization=config.quantization,
        double_quant=config.double_quant,
        revision=config.revision,
        template=config.template,
        trust_remote_code=config.trust_remote_code,
    )


def _facts(
    config: Config, base: Base, run: RunFolder, data: dict[str, Any], choices: list[Choice], hardware: Hardware
) -> Facts:
    parts = bytes_by_part(base.model)
    return Facts(
        run=run.path.name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        base=BaseFacts(
            model=config.model,
            source=base.source,
            class_name=type(base.model).__name__,
            quantization="nf4" if base.quantized else "none",
            double_quant=base.quantized and config.double_quant,
            compute_dtype=config.compute_dtype,
            parameters=sum(part.parameters for part in parts),
            parts=[asdict(part) for part in parts],
            bytes_16bit=sum(part.bytes_16bit for part in parts),
            bytes_now=sum(part.bytes_now for part in parts),
            fingerprint_before=fingerprint(base.model),
        ),
        data=data,
        choices=[ChoiceFact(**asdict(choice)) for choice in choices],
        versions=library_versions(),
        hardware=hardware.as_dict(),
    )


def _adapter_facts(config: Config, trainer: SlimTrainer) -> AdapterFacts:
    return AdapterFacts(
        r=config.lora_r,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        targets=[config.targets] if isinstance(config.targets, str) else list(config.targets),
        **asdict(trainer.wrapping),
    )


def _batch_facts(data: MicroBatches) -> dict[str, Any]:
    packed = isinstance(data, PackedBatches)
    return {
        "packed": packed,
        "micro_batches_per_epoch": data.per_epoch,
        "pack_tokens": data.tokens if isinstance(data, PackedBatches) else None,
        "fill": data.fill if isinstance(data, PackedBatches) else None,
    }


def _data_line(proof: Proof, data: MicroBatches) -> str:
    facts = proof.facts
    share = facts["supervised_tokens"] / max(1, facts["tokens"])
    dropped = f", {facts['rows_dropped']:,} dropped" if facts["rows_dropped"] else ""
    batches = (
        f"{data.per_epoch:,} packs of {data.tokens:,} tokens, {data.fill:.1%} full"
        if isinstance(data, PackedBatches)
        else f"{data.per_epoch:,} padded micro-batches"
    )
    return f"{facts['rows']:,} rows{dropped}, {facts['tokens']:,} tokens ({share:.0%} supervised) → {batches}"


def _base_line(base: BaseFacts) -> str:
    return (
        f"{base.parameters / 1e6:,.1f} M parameters, {megabytes(base.bytes_16bit)} in 16 bits → "
        f"{megabytes(base.bytes_now)} as loaded ({base.quantization}, {base.compute_dtype})"
    )


def _adapter_line(adapter: AdapterFacts) -> str:
    share = adapter.trainable_parameters / adapter.total_parameters
    return f"{adapter.trainable_parameters:,} parameters train ({share:.2%}) in {sum(adapter.modules.values())} modules"


def _adapter_bytes(run: RunFolder) -> int:
    return (run.adapter / ADAPTER_WEIGHTS).stat().st_size
