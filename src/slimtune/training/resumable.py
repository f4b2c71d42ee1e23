"""A Trainer whose run can't be lost: checkpoints, guards, stops and out-of-memory, through the Trainer's own hooks.

:class:`ResumableTrainer` is mixed in before the Trainer that trains. It replaces how a checkpoint is written and read
(Transformers pickles optimizer, schedule and random states), runs a step in pieces when memory runs out, and adds one
callback that watches every step. :meth:`ResumableTrainer.fit` stands for ``train``.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapter.state import adapter_tensors, own_storage_, restore_adapter
from slimtune.config import Config
from slimtune.errors import GuardStop, UserError
from slimtune.run.identity import Identity
from slimtune.run.statement import counted
from slimtune.training.checkpoint import STATE, Checkpoints, OffDevice, Snapshot, read_checkpoint
from slimtune.training.guard import DivergenceGuard, find_nonfinite
from slimtune.training.hooks import EvaluationStoppedError, Hooks, reason_of
from slimtune.training.pieces import largest_piece, split_micro_batch
from slimtune.training.proof import LOOK_AGAIN, is_expert, named, without_gradient
from slimtune.training.ranked import RankedTrainer
from slimtune.training.rng import RandomState, rng_preserved
from slimtune.training.saving import Moment, Trained, snapshot
from slimtune.training.stop import StopSignals, Watchdog

__all__ = ["Progress", "ResumableTrainer", "Safety"]

PATIENCE = 60.0
"""Seconds that the end of a run waits for room to save in."""
SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of 2**64 positions differ."""
PARTS_BITS = 16
"""A micro-batch runs in fewer than 2**16 parts, each of which draws once."""
SMALLER = "Give a smaller --max-length, or a GPU with more memory."


@dataclass
class Safety:
    """What keeps one run safe."""

    config: Config
    checkpoints: Checkpoints
    identity: Identity
    signals: StopSignals
    watchdog: Watchdog
    record: Callable[[dict[str, Any]], None] = lambda record: None
    """Takes events for the metrics: ``{"event": …, "step": …}``."""
    warn: Callable[[str], None] = lambda line: None
    """Takes a line that the person should not miss."""
    journal_error: Callable[[], OSError | None] = lambda: None
    """Why the metrics can't be written at the moment; None if they can."""
    stop_file: Callable[[], bool] = lambda: False
    """Whether the run's folder asks for a stop; a request is heard once (:func:`slimtune.run.lock.take_request`)."""
    rows: Callable[[int], list[str]] = lambda position: []
    """``file:line`` of the rows in a micro-batch, by its position in the run."""
    patience: float = PATIENCE


@dataclass
class Progress:
    """What a run has to remember from one process to the next, beside the Trainer's own state."""

    pieces: int = 1
    """A micro-batch is run in this many pieces since memory ran out."""
    skipped: int = 0
    """Batches left out because a value was no number."""
    best_loss: float | None = None
    best_step: int | None = None
    since_best: int = 0
    """Evaluations since the best one."""
    evaluated_step: int | None = None
    """The step after which the last evaluation was."""
    evaluation_due: bool = False
    """A stop came before the evaluation of this step was done."""
    stopped_early: bool = False
    silent: list[str] | None = None
    """Adapters that have had no gradient yet; None: not looked at."""
    ranks: int = 1
    engine: str = ""
    """What the engine multiplied in, in words; empty: no engine, or not noted."""
    divergence: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, Any] = field(default_factory=dict)
    """What the Trainer has added up since the last line of the log."""


class ResumableTrainer(RankedTrainer):
    """The mixin. ``safety`` must be set before :meth:`fit`."""

    safety: Safety
    # Set by the Trainer before any of this runs.
    model: Any
    processing_class: Any
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    train_dataset: Sized
    eval_dataset: Any
    saved_step: int
    """After :meth:`fit`: the optimizer step whose adapter the model has."""

    def fit(self) -> None:
        """Train from the newest whole checkpoint, or from the start, to the end, and save.

        Raises:
            GuardStop: A guard stopped the run, or no checkpoint could be written; the last good one is named.
            StopRequested: A signal came; the run was saved and can go on.
        """
        safety = self.safety
        self.progress = Progress()
        self.divergence = DivergenceGuard(safety.config.divergence_factor, safety.config.divergence_steps)
        self._step_inputs: list[dict[str, Any]] = []
        self._step_losses: list[Tensor] = []
        self._step_random: tuple[RandomState, Any] | None = None
        self._step_logs: dict[str, Any] = {}
        self._alarmed: tuple[int, int | None] | None = None
        self._cancelled = False
        self._restored: Snapshot | None = None
        self._unsaved: Moment | None = None
        self._adapter = adapter_tensors(self.model)  # the parameters themselves: the walk over the model is made once
        own_storage_(self._adapter.values())
        checkpoint = safety.checkpoints.newest_valid()
        if checkpoint is not None:
            self._restored = read_checkpoint(checkpoint)
            self.progress = Progress(**json.loads(self._restored.texts[STATE])["progress"])
            safety.checkpoints.best_step = self.progress.best_step
            before, now = self.progress.ranks, self.ranks.count
            if before != now:
                safety.warn(f"ranks: {before} until here, {now} from here; sums round differently")
                step = safety.checkpoints.last_saved
                safety.record({"event": "ranks", "step": step, "before": before, "after": now})
            self._see_engine(self.progress.engine)
        self.progress.ranks, self.progress.engine = self.ranks.count, self._engine_told
        self.begin_alike()
        self.add_callback(Hooks(self))
        with safety.watchdog.watching("a step"), safety.signals.deferrable():
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                self._evaluate_last()
                self.check_alike()
                self.ranks.leave()  # the others don't wait for this one's disk
                self._secure()
            except GuardStop:
                self._save_before_step()
                raise
            except torch.OutOfMemoryError as error:
                raise self._stop_by_guard(f"out of memory: {str(error).splitlines()[0]}", [], SMALLER) from error
            finally:
                self._hand_over()
                safety.checkpoints.wait()
        self.saved_step = self.state.global_step
        if self.ranks.first and safety.config.early_stopping and self.progress.best_step is not None:
            self._take_best()
            self.saved_step = self.progress.best_step

    @property
    def _engine_told(self) -> str:
        return "" if getattr(self, "engine", None) is None else str(getattr(self, "engine_told", ""))

    def _see_engine(self, before: str) -> None:
        """Say where a resumed run multiplies otherwise: what is in FP8 follows from the card and the room on it."""
        if before and before != (now := self._engine_told):
            self.safety.warn(f"engine: {before} until here, {now} from here")
            step = self.safety.checkpoints.last_saved
            self.safety.record({"event": "engine", "step": step, "before": before, "after": now})

    # -- checkpoints, written and read in place of the Trainer's

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        del model, trial
        if not self.ranks.first:  # rank 0 writes it
            self.safety.checkpoints.last_saved = self.state.global_step
            return
        self.safety.checkpoints.best_step = self.progress.best_step
        self._hand_over()
        if self.ranks.alone or not self.safety.checkpoints.saving:  # nobody waits for another rank's disk
            self.safety.checkpoints.wait()
            self._see_last_save()
        self._unsaved = self._moment()
        if not self._unsaved.can_wait:
            self._hand_over()

    def _moment(self, *, before_step: bool = False) -> Moment:
        """The run as it is now, but for what is trained.

        Args:
            before_step: A step is under way, and not applied: random generators and logs are taken as it began.
        """
        draws, logs = (self._step_random, self._step_logs) if before_step else (self._draws(), self._logs_so_far())
        assert draws is not None
        self.store_flos()
        return Moment(
            step=self.state.global_step,
            position=self._position(),
            draws=draws,
            logs=logs,
            progress={**vars(self.progress), "divergence": self.divergence.state()},
            # The history of logs is the run's metrics.jsonl; kept here too it would grow with every step.
            trainer_state={**vars(self.state), "log_history": [], "stateful_callbacks": {}},
        )

    def _hand_over(self) -> None:
        """Give the last step's end, if it is to be saved, to the thread that saves; before the next optimizer step.

        On a GPU that is when it has the next step's work: nothing here keeps it, nor does the Python of the thread.
        """
        moment, self._unsaved = self._unsaved, None
        if moment is None:
            return
        checkpoints, made = self.safety.checkpoints, snapshot(moment, self._trained(), self.safety.identity)
        if self.ranks.alone or not checkpoints.save_later(moment.step, made):
            checkpoints.save(moment.step, made)

    def _trained(self) -> Trained:
        scaler = getattr(self.accelerator, "scaler", None)
        return Trained(self.model, self._adapter, self.optimizer, self.lr_scheduler, scaler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del resume_from_checkpoint, model
        with self._fitting():
            restore_adapter(self.model, self._saved().tensors["adapter_model"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = self._saved()
        with self._fitting():
            self._trained().load(json.loads(saved.texts[STATE])["plain"], saved.tensors["optimizer"])

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """The body puts back what the checkpoint holds.

        Raises:
            UserError: It doesn't fit this run's adapter or optimizer; nothing but a change that was accepted does that.
        """
        try:
            yield
        except ValueError as error:
            run = self.safety.checkpoints.folder.parent
            raise UserError(
                f"run {run} can't go on with what was changed: {error}",
                rule="What its checkpoint holds must fit its adapter and its optimizer.",
                way_out=f"Put it back, or start anew from the adapter: slimtune train --from {run}",
            ) from error

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved = self._saved()
            self._redraw(RandomState.from_tensors(saved.tensors["random"]), json.loads(saved.texts[STATE])["engine"])
            self._restored = None  # the last thing that the Trainer reads

    def _draws(self) -> tuple[RandomState, Any]:
        """Where all random streams are now; the fused engine counts its own."""
        engine = getattr(self, "engine", None)
        return RandomState.capture(), None if engine is None else engine.state_dict()

    def _redraw(self, random: RandomState, engine: Any) -> None:
        random.restore()
        if engine is not None:
            self.engine.load_state_dict(engine)

    def _saved(self) -> Snapshot:
        if self._restored is None:
            raise RuntimeError("a run is resumed by fit()")
        return self._restored

    def _position(self) -> int:
        """The data's position: micro-batches that the run has trained on, over all epochs."""
        length = math.ceil(len(self.train_dataset) / self.args.train_batch_size)
        accumulation = self.args.gradient_accumulation_steps
        epoch, updates = divmod(self.state.global_step, max(1, math.ceil(length / accumulation)))
        own: int = epoch * length + updates * accumulation
        return own if self.ranks.alone else min(own * self.ranks.count, self.share.total)

    def _position_of(self, place: int) -> int | None:
        """That of a micro-batch of this step by its place in it; None if the run has no more, but other ranks do."""
        return self._position() + place if self.ranks.alone else self.share.position(self._position(), place)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A finished run that is resumed has no step left, even in the middle of an epoch."""
        if self.progress.stopped_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _secure(self) -> None:
        """See that the last step is on the disk, or say that it can't be.

        Raises:
            GuardStop: It couldn't be saved, even after waiting for room.
        """
        checkpoints, signals = self.safety.checkpoints, self.safety.signals
        deadline, waiting = time.monotonic() + self.safety.patience, False
        self._hand_over()
        while checkpoints.wait() != self.state.global_step:
            self._see_last_save()
            if checkpoints.failure is not None:
                if signals.requested is not None:
                    return  # asked to stop: the run goes on from the last good checkpoint
                if time.monotonic() >= deadline:
                    what = f"the last step can't be saved: {reason_of(checkpoints.failure.error)}"
                    raise self._stop_by_guard(what, [], f"Make room, then: {signals.resume}")
                if not waiting:
                    waiting = True
                    self.safety.warn(f"the last step waits {self.safety.patience:.0f} s for room on the disk")
                time.sleep(min(1.0, self.safety.patience))
            self.safety.watchdog.beat("a step")
            self._save_checkpoint(self.model, None)
            self._hand_over()
        self._see_last_save()

    def _save_before_step(self) -> None:
        """A guard stopped a step before it was applied: save the run as it was before, if it is sound and unsaved."""
        self._hand_over()
        checkpoints = self.safety.checkpoints
        if self._step_random is None or checkpoints.wait() == self.state.global_step:
            return
        self._unsaved = self._moment(before_step=True)
        self._hand_over()

    def _take_best(self) -> None:
        step = self.progress.best_step
        if step is not None and step != self.state.global_step:
            restore_adapter(self.model, read_checkpoint(self.safety.checkpoints.path(step)).tensors["adapter_model"])

    # -- evaluation leaves no trace in the training

    def _evaluate_last(self) -> None:
        """What is saved was evaluated, whatever the intervals; a run that was asked to stop goes on with that."""
        is_done = self.progress.evaluated_step == self.state.global_step
        signals = self.safety.signals
        if self.ranks.any(signals.requested is not None) and signals.requested is None:
            signals.requested = "a request to another rank"
        if self.eval_dataset is not None and not is_done and signals.requested is None:
            self.evaluate()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, but what it draws from the random generators doesn't show afterwards."""
        training = self.model.training
        try:
            with rng_preserved():
                metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        except EvaluationStoppedError:
            self.progress.evaluation_due = True
            self.control.should_save = self.control.should_training_stop = True
            metrics = {}
        self.model.train(training)
        return metrics

    # -- memory

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer's; when memory runs out, the step so far is run again in smaller pieces."""
        self._step_inputs.append(inputs)
        if self._given_up is not None:
            return self._nothing()
        try:
            loss = self._run_pieces(model, len(self._step_inputs) - 1, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        else:
            self._step_losses.append(loss)
            self._hand_over()
            return loss
        # Outside the except block, so that the failed pass's tensors aren't held by the exception.
        try:
            return self._run_again(model, num_items_in_batch, reason)
        except GuardStop as stop:
            if self.ranks.alone:
                raise
            self._given_up = stop  # the others are told when they come together
            return self._nothing()

    def _nothing(self) -> Tensor:
        return torch.zeros((), device=self.args.device)

    def _run_pieces(self, model: nn.Module, place: int, items: Tensor | int | None) -> Tensor:
        position = self._position_of(place)
        if position is None:
            return self._nothing()
        self._draw_at(position)
        pieces = split_micro_batch(self._step_inputs[place], self.progress.pieces)
        losses: list[Tensor] = [super(ResumableTrainer, self).training_step(model, piece, items) for piece in pieces]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _draw_at(self, position: int) -> None:
        """Dropout follows from (seed, position), so that it is the same on whichever rank a micro-batch runs."""
        if self.engine is None:
            torch.manual_seed((self.args.seed + (position + 1) * SEED_STRIDE) % 2**63)
        else:
            self.engine.draws = position << PARTS_BITS

    def _run_again(self, model: nn.Module, items: Tensor | int | None, reason: str) -> Tensor:
        """Roll the step back and run its micro-batches so far in twice as many pieces, until they fit."""
        returned = list(self._step_losses)
        while True:
            before = max(largest_piece(inputs, self.progress.pieces) for inputs in self._step_inputs)
            self.progress.pieces *= 2
            after = max(largest_piece(inputs, self.progress.pieces) for inputs in self._step_inputs)
            self._roll_back(model)
            step = self.state.global_step + 1
            if after >= before:
                raise self._stop_by_guard(
                    f"out of memory in step {step} even with one document at a time: {reason}",
                    [],
                    SMALLER,
                )
            self.safety.warn(f"out of memory in step {step}: micro-batches now run in {self.progress.pieces} pieces")
            self.safety.record({"event": "out_of_memory", "step": step, "pieces": self.progress.pieces})
            try:
                losses = [self._run_pieces(model, place, items) for place in range(len(self._step_inputs))]
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                continue
            self._step_losses = losses
            # The Trainer has added up the losses that were returned before; the step's sum is to be the new ones'.
            return torch.stack(losses).sum() - sum(returned, torch.zeros_like(losses[0]))

    def _roll_back(self, model: nn.Module) -> None:
        """The step's start: no gradients, the random generators as they were."""
        model.zero_grad()
        if self._step_random is not None:
            self._redraw(*self._step_random)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- what the hooks do

    def _begin(self) -> None:
        """The Trainer has set itself up: put back what it doesn't remember by itself."""
        # Asking for pinned memory takes 15 ms, and what was asked for once is kept.
        OffDevice([*self._trained().storages(), self._tr_loss])
        if self._restored is None:
            if self.eval_dataset is not None:
                self.evaluate()
            return
        self.divergence.load(self.progress.divergence)
        logs = self.progress.logs
        self._tr_loss.fill_(logs["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = logs["total"], logs["step"]
        if "trl" in logs and hasattr(self, "_metrics"):
            self._metrics["train"].update(logs["trl"]["metrics"])
            self._total_train_tokens = logs["trl"]["tokens"]
        if self.progress.evaluation_due:
            self.progress.evaluation_due = False
            self.evaluate()
            self._save_checkpoint(self.model, None)

    def _logs_so_far(self) -> dict[str, Any]:
        """What hasn't been logged yet. The loss stays on the device: this is called at every step."""
        logs: dict[str, Any] = {
            "loss": self._tr_loss.clone(),
            "total": self._total_loss_scalar,
            "step": self._globalstep_last_logged,
        }
        if hasattr(self, "_metrics") and hasattr(self, "_total_train_tokens"):
            metrics = {name: list(values) for name, values in self._metrics["train"].items()}
            logs["trl"] = {"metrics": metrics, "tokens": self._total_train_tokens}
        return logs

    def _before_optimizer(self) -> None:
        """Nothing that is no number is ever applied."""
        self._hand_over()
        loss = torch.stack([loss.detach().float() for loss in self._step_losses]).sum()
        self.read_ahead()
        bad = find_nonfinite(
            loss, self.model, self.optimizer
        )  # waits for the device, which has heard the ranks by then
        self.take_in()
        scaler = getattr(self.accelerator, "scaler", None)
        if bad is None:
            self._prove_gradients()
            return
        if scaler is not None and bad.where == "gradient" and scaler.get_scale() > 1.0:
            return  # with fp16, an overflow first means that the loss scale is too high; the scaler skips and lowers it
        step, rows = self.state.global_step + 1, self._rows_of_step()
        config, what = self.safety.config, f"{bad} in step {step}{self._whose()}"
        if bad.applied or config.on_nonfinite == "stop":
            raise self._stop_by_guard(what, [] if bad.applied else rows)
        self.progress.skipped += 1
        found = {"where": bad.where, "name": bad.name, "value": str(bad.value), "rows": rows}
        self.safety.record({"event": "skipped", "step": step, **found})
        if self.progress.skipped > config.max_skipped:
            raise self._stop_by_guard(f"{what}, after {config.max_skipped} skipped batches", rows)
        self.safety.warn(f"{what}: batch skipped ({self.progress.skipped} so far); rows {_some(rows)}")
        # Accelerate's optimizer does nothing while gradients are being accumulated.
        self._cancelled = True
        self.accelerator.gradient_state._set_sync_gradients(False)

    def _prove_gradients(self) -> None:
        """In the first step, and some steps later for those that had none: every adapter gets a gradient."""
        progress, step = self.progress, self.state.global_step + 1
        first, last = progress.silent is None, min(LOOK_AGAIN, self.state.max_steps)
        if not first and (not progress.silent or step > last):
            return
        silent, adapters = without_gradient(self.model, progress.silent)
        if first and adapters and len(silent) == adapters:
            what = f"no adapter gets a gradient in step {step}"
            raise self._stop_by_guard(what, [], "Choose other --targets: what they name takes no part in the loss.")
        progress.silent = silent
        if first or step == last or not silent:
            self.safety.record({"event": "gradients", "step": step, "without": silent})
        told = [name for name in silent if (first and not is_expert(name)) or (step == last and is_expert(name))]
        if told:
            self.safety.warn(f"no gradient in {counted(step, 'step')}: {named(told)}")

    def _rows_of_step(self) -> list[str]:
        """The rows of the micro-batch whose loss is no number, or of the whole step's; of several ranks, those of the
        rank whose gradient isn't."""
        bad = [place for place, loss in enumerate(self._step_losses) if not bool(torch.isfinite(loss).all())]
        if not bad and self.unsound:
            bad = [place for place in range(len(self._step_losses)) if place // self.share.own in self.unsound]
        first = self._position()
        return [row for place in bad or range(len(self._step_losses)) for row in self.safety.rows(first + place)]

    def _whose(self) -> str:
        """`` on rank 1``, where several train."""
        ranks = " and ".join(map(str, self.unsound))
        return f" on rank{'s' * (len(self.unsound) > 1)} {ranks}" if ranks else ""

    def _stop_by_guard(self, what: str, rows: list[str], way_out: str = "") -> GuardStop:
        newest, resume = self.safety.checkpoints.last_good, self.safety.signals.resume
        good = f"The last good checkpoint is {newest}." if newest is not None else ""
        self.safety.record({"event": "guard", "step": self.state.global_step + 1, "what": what, "rows": rows})
        return GuardStop(
            what + (f"\n       rows of the batch: {_some(rows)}" if rows else ""),
            rule=f"Nothing of it was applied or saved. {good}".strip(),
            way_out=way_out or f"Look at the rows; or go on without them: {resume} --on-nonfinite skip",
        )

    def _see_last_save(self) -> None:
        """Once a save is over: sound the alarm if it failed, or end the alarm if it is the first to succeed again.

        Raises:
            GuardStop: It was to hold a value that is no number, and was not written.
        """
        refused = self.safety.checkpoints.refused
        if refused is not None:
            raise self._stop_by_guard(f"{refused.name} is no number after step {refused.step}", [])
        if self.safety.checkpoints.failure is not None:
            self._alarm()
        elif self._alarmed is not None:
            self._alarmed = None
            saved = self.safety.checkpoints.last_saved
            self.safety.record({"event": "save_recovered", "step": self.state.global_step, "saved": saved})

    def _alarm(self) -> None:
        """A save failed: say so on the screen and in the metrics, once for each step and reason."""
        failure = self.safety.checkpoints.failure
        if failure is None or (failure.step, failure.error.errno) == self._alarmed:
            return
        self._alarmed = failure.step, failure.error.errno
        saved = self.safety.checkpoints.last_saved
        last = f"the last good checkpoint is at step {saved}" if saved is not None else "there is no checkpoint yet"
        why = reason_of(failure.error)
        self.safety.warn(f"the checkpoint of step {failure.step} could not be saved: {why}; {last}")
        self.safety.record({"event": "save_failed", "step": failure.step, "error": why, "last_good": saved})


def _some(rows: Sequence[str], most: int = 8) -> str:
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(rows[:most]) + more
