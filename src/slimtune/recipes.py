"""One short function a verb. :func:`finetune` reads like the study note it began with:

1. the base in 4 bits, its tokenizer, and the data;
2. the LoRA configuration;
3. SFTTrainer, which wraps the model by itself;
4. train, and save the adapter alone.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from slimtune.adapter.lora import coverage, give_dropout_
from slimtune.adapter.passport import issue_passport, local_base, stamp
from slimtune.adapter.readback import read_back
from slimtune.adapter.settings import ADAPTER_WEIGHTS
from slimtune.adapter.state import start_from
from slimtune.base.classes import skeleton
from slimtune.base.embedded import EMBEDDED
from slimtune.base.load import torch_dtype
from slimtune.base.named import model_source
from slimtune.base.quantize import bytes_by_part, fingerprint, packed_format
from slimtune.config import Config
from slimtune.data.build import FormattingFunc
from slimtune.data.packing import MicroBatches, batch_facts
from slimtune.data.render import Manner, renderer_for
from slimtune.data.sources import check_sources
from slimtune.data.stdin import keep_stdin
from slimtune.data.stops import save_stops
from slimtune.demo import DEMO_REPLY_TOKENS, DEMO_SETTINGS, Row, is_right, rows
from slimtune.engine.structure import CannotFuse
from slimtune.errors import GuardStop, UserError
from slimtune.hardware import Hardware, detect
from slimtune.language import language
from slimtune.plan import (
    Choice,
    agreed,
    micro_batches_of_run,
    resolve_machine,
    resolve_ranks,
    steps_of_run,
)
from slimtune.prepare import Job, Observer, Prepared, base_of, prepare
from slimtune.ranks.group import together
from slimtune.run.durable import atomic_folder
from slimtune.run.environment import environment, library_versions
from slimtune.run.facts import AdapterFacts, BaseFacts, ChoiceFact, Facts, VerifiedFacts, damage_told
from slimtune.run.folder import RunFolder
from slimtune.run.judge import judge
from slimtune.run.lines import adapter_line, base_line, experts_line, packs_line, steps_line
from slimtune.run.quiet import upstream_to_log
from slimtune.run.ranked import new_folder, old_folder
from slimtune.run.report import write_report
from slimtune.run.samples import read_samples
from slimtune.run.screen import Screen, size_text
from slimtune.training.arguments import check_arguments, check_start, sft_arguments
from slimtune.training.checkpoint import share_newest
from slimtune.training.determinism import deterministic
from slimtune.training.floor import Floor
from slimtune.training.fused import make_engine, tell_memory, why_unfused, without_engine
from slimtune.training.progress import MetricsCallback, optimizer_facts, training_facts
from slimtune.training.proof_of_gradients import prove_step
from slimtune.training.resumable import Safety
from slimtune.training.safety import disk_told, identity_of, make_safety, results_written
from slimtune.training.sampling import SamplesCallback
from slimtune.training.stop import StopSignals, Watchdog
from slimtune.training.trainer import SlimTrainer, adapter_facts
from slimtune.use.ask import ask
from slimtune.use.export import check_exportable, export_run
from slimtune.use.forgetting import general_change
from slimtune.use.load import Found
from slimtune.use.samples import Samples, choose

__all__ = ["DemoResult", "demo", "finetune", "resume"]


def finetune(
    config: Config,
    *,
    formatting_func: FormattingFunc | None = None,
    observe: Observer | None = None,
    screen: Screen | None = None,
) -> RunFolder:
    """Fine-tune a chat model as ``config`` says, and give back the run's folder; of several ranks, rank 0's is whole.

    Args:
        config: What to do; ``auto`` values are decided here and recorded.
        formatting_func: As SFTTrainer's: takes a row of the data, gives its text, or its messages.
        observe: Called with the model and its tokenizer before the training, and again after it.
        screen: Where to show progress; silent by default.

    Raises:
        UserError: Something that the person can mend; no run folder is left behind.
        GuardStop: A guard stopped the training.
        StopRequested: The run was asked to stop, and can be resumed.
    """
    with together(detect, config.watchdog) as ranks:
        screen = screen if screen is not None and ranks.first else Screen(quiet=True)
        _check_inputs(config)
        config = agreed(config, ranks, library_versions())
        with StopSignals(rank=ranks.number) as signals, new_folder(ranks, config) as run:
            config = keep_stdin(config, run.path / "stdin")
            config, choices = resolve_machine(config, detect())
            config, for_ranks = resolve_ranks(config, ranks.count)
            job = Job(run, signals, screen, formatting_func, observe, ranks=ranks)
            _train(config, [*choices, *for_ranks], job)
    if ranks.first:
        export_run(config, run, screen)
    assert config.output is not None
    return RunFolder(config.output)


def resume(
    path: Path,
    config: Config | None = None,
    *,
    accept_changes: bool = False,
    trust_remote_code: bool = False,
    formatting_func: FormattingFunc | None = None,
    screen: Screen | None = None,
) -> RunFolder:
    """Go on with a run that was stopped, bit by bit, from its newest whole checkpoint; without one, from its start.

    Args:
        path: The run's folder.
        config: The run's config with some keys changed; as it was recorded if None.
        accept_changes: Go on all the same, and record what changed.
        trust_remote_code: Must be said again for each process; what the run's config says doesn't count.
        formatting_func: The one that the run began with.
        screen: Where to show progress; silent by default.

    Raises:
        UserError: No run, or one that another process works on, or something changed since the checkpoint.
        GuardStop: A guard stopped the training.
        StopRequested: The run was asked to stop, and can be resumed.
    """
    seconds = Config.model_fields["watchdog"].default if config is None else config.watchdog
    with together(detect, seconds) as ranks:
        screen = screen if screen is not None and ranks.first else Screen(quiet=True)
        with StopSignals(path, rank=ranks.number) as signals, old_folder(ranks, path) as run:
            config = ranks.from_first(run.config if config is None else config.model_copy)
            config = config.model_copy(update={"output": path})
            if ranks.from_first(partial(run.is_finished, config)):
                screen.say("finished", f"{path}: nothing was changed")
                return RunFolder(path)
            if config.trust_remote_code and not trust_remote_code:
                raise UserError(
                    f"run {path} ran code that comes with its model",
                    rule="slimtune runs no code that comes with a model unless told to.",
                    way_out="Read that code, then pass --trust-remote-code.",
                )
            config, _ = resolve_machine(config, detect())  # a file that lacks what was decided
            config, _ = resolve_ranks(config, ranks.count)
            with damage_told(run.facts_file):
                choices = [Choice(**choice) for choice in run.facts().get("choices", [])]
            share_newest(ranks, run.checkpoints, screen.warn)
            job = Job(run, signals, screen, formatting_func, accept_changes=accept_changes, ranks=ranks)
            _train(config, choices, job)
            run.drop_replaced()
    if ranks.first:
        export_run(config, run, screen)
    return RunFolder(path)


def _train(config: Config, choices: list[Choice], job: Job) -> None:
    """Train and save; if the engine turns out not to compute the model, once more from the start, without it.

    The base is loaded again: what was wrapped, and unpacked for the engine, isn't the plain stack's any more.
    """
    try:
        _train_once(config, choices, job)
        return
    except CannotFuse as error:
        if config.engine != "auto":
            raise
        if config.precision == "fp8":
            raise without_engine(error.what) from error
        unfit = Choice("engine", "plain", error.what)
    job.screen.warn(f"{unfit.reason} → from the start on the plain stack")
    gc.collect()  # the base that isn't needed any more
    _train_once(config.model_copy(update={"engine": "plain"}), [*choices, unfit], job)


def _train_once(config: Config, choices: list[Choice], job: Job) -> None:
    hardware, run = detect(), job.run
    with (
        disk_told(run),
        Watchdog(config.watchdog, run.path / "stacks.txt") as watchdog,
        upstream_to_log(run.log_file),
        deterministic(config, hardware.device) as repeats,
    ):
        # 1. The base in 4 bits, its tokenizer, and the data. 2. The LoRA configuration.
        ready = prepare(config, choices, job, hardware, watchdog)
        config, tokenizer = ready.config, ready.tokenizer
        facts, safety = _begin(ready, job, hardware, watchdog)
        job.signals.run = watchdog.run = config.output  # from here on it can be resumed
        job.ranks.goes_on_by(job.signals.resume)

        # 3. SFTTrainer, which wraps the model by itself. The engine then runs its steps, where it knows the model.
        trainer = _trainer(ready, job, hardware, safety)
        documents = ready.data.documents
        texts = [documents[at][0] for at in range(min(3, len(documents)))]
        own_head = prove_step(trainer, texts, config, job.screen.say)
        same = {"loss": own_head or "TRL's", "attention": str(trainer.attention)}
        job.ranks.check_same(same, "All ranks have found the same way to compute it.")
        adapter = facts.adapter = _wrapped(ready, trainer, facts, job.screen)

        # 4. Train, and save the adapter alone.
        job.observed(trainer, tokenizer)
        with job.screen.training(steps_of_run(config, ready.data.per_round)):
            trainer.fit()
        if not job.ranks.first:
            return
        if trainer.samples_told:
            job.screen.say("samples", trainer.samples_told)
        job.observed(trainer, tokenizer)
        with results_written(run, job.signals), watchdog.watching("writing the results"):
            adapter.file_bytes, adapter.folder_files = _save(ready, trainer, run)
            job.screen.say("saved", f"{run.adapter} ({size_text(adapter.file_bytes)})")
            facts.optimizer = optimizer_facts(config.optim, trainer.optimizer)
            with damage_told(run.metrics_file):
                engine = trainer.engine_told if ready.unfused is None else f"plain: {ready.unfused}"
                records = run.metrics()
                facts.training = training_facts(records, engine=engine, repeats=repeats, own_head=own_head)
                facts.training.ranks, facts.training.attention = job.ranks.count, trainer.attention
                facts.training.ram_layers, facts.training.ram_bytes = trainer.in_ram
                facts.training.streamed_layers, facts.training.streamed_bytes = trainer.streamed
                step, held_out, sampled = trainer.saved_step, facts.data.get("held_out"), read_samples(run.samples())
                facts.verdict = judge(records, config, facts.training, step, held_out, sampled, facts.base.parameters)
            facts.base.fingerprint_after = fingerprint(trainer.model)
            data = ready.data
            del trainer, ready  # the fresh base takes their room
            facts.verified, facts.verdict.general = _verify(config, hardware, job, data, watchdog)
            run.write_json(run.facts_file, facts.as_dict())
            write_report(run, language())
            job.screen.conclude(facts.as_dict())
            job.signals.finished = not config.export


def _begin(ready: Prepared, job: Job, hardware: Hardware, watchdog: Watchdog) -> tuple[Facts, Safety]:
    """Say what will be done, look whether the run may go on so, and write it into its folder."""
    config, run, screen = ready.config, job.run, job.screen
    facts = _facts(ready, run, hardware)
    for line in filter(None, (base_line(facts.base), ready.base.kept)):
        screen.say("base", line)
    screen.say("packs", packs_line(ready.data, config, facts.data["unpacked"]))
    steps = steps_of_run(config, ready.data.per_round)
    screen.say("steps", steps_line(steps, config, evaluates=ready.held_out is not None))
    identity = identity_of(config, facts.base.fingerprint_before, ready.tokenizer, run)
    job.ranks.check_same(identity.in_words(), "All ranks compute the same model on the same data.")
    safety = make_safety(
        config, run, identity, ready.data, job.signals, watchdog, screen, accept_changes=job.accept_changes
    )
    run.write_config(config)
    run.write_json(run.environment_file, environment(hardware.as_dict()))
    run.write_json(run.facts_file, facts.as_dict())
    return facts, safety


def _trainer(ready: Prepared, job: Job, hardware: Hardware, safety: Safety) -> SlimTrainer:
    """SFTTrainer around the plain base, which it wraps; with the engine, where that runs the steps."""
    config, base, data = ready.config, ready.base, ready.data
    total = micro_batches_of_run(config, data.per_round)
    floor = Floor.measure(base.model, torch_dtype(config.compute_dtype), config.batch_tokens)
    sinks, ranks = (job.run.append_metrics, job.screen.record), job.ranks
    metrics = MetricsCallback(data, total, config.accumulation, floor, *sinks, ranks=ranks.count)
    trainer = SlimTrainer(
        model=base.model,
        args=sft_arguments(
            config,
            hardware,
            job.run.checkpoints,
            steps=steps_of_run(config, data.per_round),
            fused=ready.unfused is None,
            recompute=base.model.supports_gradient_checkpointing,
            ranks=ranks.count,
        ),
        data=data,
        micro_batches=total,
        evaluation=ready.held_out,
        tokenizer=ready.tokenizer,
        lora=ready.lora,
        callbacks=[metrics],
        ranks=ranks,
    )
    trainer.safety = safety
    held_out = ready.proof.eval if job.ranks.first else None
    if held_out is not None and (asked := choose(held_out, ready.tokenizer, config.samples, config.seed)):
        answer = Samples(asked, ready.tokenizer, Manner.of(config))
        trainer.sample_by(SamplesCallback(answer, metrics, safety, job.run.append_samples))
    if ready.targets.parameters:
        give_dropout_(trainer.model, config)
    if ready.layout is not None:
        trainer.layout = ready.layout
    resumed = safety.checkpoints.last_good is not None  # its values come from the checkpoint
    if config.start_from is not None and not resumed:
        folder = local_base(base.source, config.revision)
        start_from(trainer.model, config.start_from, folder, ready.tokenizer)
    _use_engine(config, hardware, trainer, ready.unfused, job.screen)
    return trainer


def _wrapped(ready: Prepared, trainer: SlimTrainer, facts: Facts, screen: Screen) -> AdapterFacts:
    """What trains now, said; and what the base is that doesn't."""
    # Some initialisations (PiSSA, OLoRA) move a part of the base into the adapter; from here on it is frozen.
    facts.base.fingerprint_before = fingerprint(trainer.model)
    adapter = adapter_facts(ready.config, trainer.wrapping, coverage(trainer.model, ready.targets))
    screen.say("adapter", adapter_line(adapter))
    for name, reason in ready.targets.left_out.items():
        screen.say("left out", f"{name}: {reason}")
    if ready.targets.stacks:
        screen.say("experts", experts_line(adapter, len(ready.targets.stacks)))
    return adapter


def _save(ready: Prepared, trainer: SlimTrainer, run: RunFolder) -> tuple[int, list[str]]:
    """The adapter alone, with what must be known to use it; gives its bytes, and the names of all files."""
    config, tokenizer, source = ready.config, ready.tokenizer, ready.base.source
    with atomic_folder(run.adapter) as folder:
        trainer.save_model(str(folder))
        ends = renderer_for(tokenizer, Manner.of(config)).end_ids
        save_stops(folder, local_base(source, config.revision), ends)
        stamp(folder, issue_passport(config, source, tokenizer, packed_format(trainer.model)))
    return (run.adapter / ADAPTER_WEIGHTS).stat().st_size, sorted(path.name for path in run.adapter.iterdir())


def _use_engine(
    config: Config, hardware: Hardware, trainer: SlimTrainer, reason_unfused: str | None, screen: Screen
) -> None:
    """Let the engine run the trainer's steps, unless there is a reason against it, which is said."""
    if reason_unfused is not None:
        screen.say("engine", f"plain: {reason_unfused}")
    else:
        trainer.use_engine(make_engine(config, trainer.model))
    if hardware.device == "cuda":
        tell_memory(trainer, config, screen)
    elif config.memory != "auto":
        screen.warn(f"memory: {config.memory} isn't kept: it limits a GPU's memory, and here is none")


def _verify(
    config: Config, hardware: Hardware, job: Job, data: MicroBatches, watchdog: Watchdog
) -> tuple[VerifiedFacts, dict[str, Any] | None]:
    """The adapter, read back from the disk into a fresh base; and what that base could, with it and without.

    Raises:
        GuardStop: It isn't what was trained, or does nothing.
    """
    gc.collect()
    if hardware.device == "cuda":
        torch.cuda.empty_cache()  # libraries ask the driver itself for their workspaces
    tokens, _ = data.documents[0]
    run, fresh, general = job.run, base_of(config, hardware, watchdog), []

    def goes_on() -> bool:
        watchdog.beat("writing the results")
        return job.signals.requested is None

    def look(model: Any) -> None:
        if run.held_out() is not None and config.samples:
            tell = partial(job.screen.say, "general")
            general.append(general_change(model, fresh.tokenizer, Manner.of(config), goes_on, tell))

    found = read_back(fresh.model, run.adapter, [int(token) for token in tokens[:64]], look)
    if found.problem:
        raise GuardStop(
            f"the adapter in {run.adapter} is bad: {found.problem}",
            rule="It was read back into a fresh base after the last step.",
            way_out="Look at the losses in the run's metrics; a run of one or two steps learns nothing yet.",
        )
    return VerifiedFacts(**asdict(found)), general[0] if general else None


@dataclass(frozen=True)
class DemoResult:
    """What the demo's model answered before and after, to requests that it wasn't trained on."""

    run: RunFolder
    held_out: list[Row]
    before: list[str]
    after: list[str]

    def right(self, replies: list[str]) -> list[bool]:
        """Which of the replies are right."""
        return [is_right(reply, row.answer) for reply, row in zip(replies, self.held_out, strict=True)]


def demo(output: Path, *, seed: int = 42, overwrite: bool = False, screen: Screen | None = None) -> DemoResult:
    """The main job on the embedded model: ask, train, ask again.

    Raises:
        UserError: The embedded model isn't installed, or ``output`` can't be used.
    """
    trained, held_out = rows()
    requests = [row.messages[:1] for row in held_out]
    replies: list[list[str]] = []
    with TemporaryDirectory(prefix="slimtune-demo-") as folder:
        file = Path(folder) / "requests.jsonl"
        file.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in trained), encoding="utf-8")
        config = Config.make(
            model=EMBEDDED, data=str(file), output=output, overwrite=overwrite, seed=seed, **DEMO_SETTINGS
        )
        run = finetune(
            config,
            observe=lambda model, tokenizer: replies.append(ask(model, tokenizer, requests, DEMO_REPLY_TOKENS)),
            screen=screen,
        )
    before, after = replies
    return DemoResult(run, held_out, before, after)


def _check_inputs(config: Config) -> None:
    check_start(config)
    check_arguments(config)
    if config.engine == "fused" and (folder := Path(model_source(config.model))).is_dir():
        why_unfused(config, skeleton(folder, trust_remote_code=config.trust_remote_code))
    if config.export:
        base = local_base(model_source(config.model), config.revision)
        init = None if config.lora_init == "default" else config.lora_init
        check_exportable(Found(config.model, base, None, None, config.trust_remote_code), config.export, init)
    check_sources(config)


def _facts(ready: Prepared, run: RunFolder, hardware: Hardware) -> Facts:
    config, base = ready.config, ready.base
    parts = bytes_by_part(base.model)
    return Facts(
        run=run.path.name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        base=BaseFacts(
            model=config.model,
            source=base.source,
            class_name=type(base.model).__name__,
            quantization=base.format,
            double_quant="nf4" in base.format and config.double_quant,
            compute_dtype=config.compute_dtype,
            parameters=sum(part.parameters for part in parts),
            parts=[asdict(part) for part in parts],
            bytes_16bit=sum(part.bytes_16bit for part in parts),
            bytes_now=sum(part.bytes_now for part in parts),
            fingerprint_before=fingerprint(base.model),
        ),
        data=ready.proof.facts | batch_facts(ready.data, {choice.key: choice.reason for choice in ready.choices}),
        choices=[ChoiceFact(**asdict(choice)) for choice in ready.choices],
        versions=library_versions(),
        hardware=hardware.as_dict(),
    )
