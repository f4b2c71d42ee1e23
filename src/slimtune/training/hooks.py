"""What a :class:`slimtune.training.resumable.ResumableTrainer` does at the Trainer's own moments of a step."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.run.judge import parts_record

if TYPE_CHECKING:
    from slimtune.training.resumable import ResumableTrainer

__all__ = ["EvaluationStoppedError", "Hooks", "reason_of"]


class EvaluationStoppedError(Exception):
    """A stop signal came while evaluating."""


class Hooks(TrainerCallback):
    """Calls the trainer's own methods at the right moments of a step."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.retry_at = 0
        self.retry_after = 1
        self.postponed = False
        self.total = 0.0
        self.journal_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer has set itself up."""
        self.trainer._begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where a step begins: it may be run again."""
        trainer = self.trainer
        trainer.safety.watchdog.beat("a step")
        trainer.safety.signals.defer()
        trainer._step_random, trainer._step_logs = trainer._draws(), trainer._logs_so_far()
        trainer._step_inputs, trainer._step_losses = [], []

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro-batch is progress."""
        self.trainer.safety.watchdog.beat("a step")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at loss and gradients before they are applied."""
        self.trainer._before_optimizer()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step that was cancelled is over."""
        if self.trainer._cancelled:
            self.trainer._cancelled = False
            self.trainer.accelerator.gradient_state._set_sync_gradients(True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See to saves that failed, and to a stop that was asked for."""
        trainer = self.trainer
        trainer.safety.watchdog.beat("a step")
        trainer._step_random = None
        self._see_failed_save(state.global_step, control)
        self._postpone_save(control)
        self._see_failed_journal()
        if self._stop_is_asked():
            trainer.progress.evaluation_due = control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def _stop_is_asked(self) -> bool:
        """By a signal, or by the file in the run's folder, which counts as one; of several ranks, by what all heard."""
        signals = self.trainer.safety.signals
        if not self.trainer.ranks.alone:
            signals.requested = signals.requested if self.trainer.stop_agreed is None else self.trainer.stop_agreed
            return self.trainer.stop_agreed is not None
        if signals.requested is None and self.trainer.safety.stop_file():
            signals.requested = "the run's stop file"
        return signals.requested is not None

    def _see_failed_save(self, step: int, control: TrainerControl) -> None:
        checkpoints = self.trainer.safety.checkpoints
        if checkpoints.saving:
            return
        self.trainer._see_last_save()
        if checkpoints.failure is None:
            self.retry_at, self.retry_after = 0, 1
            return
        if not self.retry_at:
            self.retry_at = step + self.retry_after
        elif step >= self.retry_at:
            control.should_save = True
            self.retry_after *= 2
            self.retry_at = step + self.retry_after

    def _postpone_save(self, control: TrainerControl) -> None:
        """A save that is due while another is under way would be waited for, by all ranks: it is made once that one is
        over. Alone a run waits, and has its checkpoints where it is told to."""
        if self.trainer.ranks.alone:
            return
        due = control.should_save or self.postponed
        self.postponed = due and self.trainer.safety.checkpoints.saving
        control.should_save = due and not self.postponed

    def _see_failed_journal(self) -> None:
        error = self.trainer.safety.journal_error()
        if error is not None and not self.journal_failed:
            self.trainer.safety.warn(f"the metrics can't be written, and wait in memory: {reason_of(error)}")
        self.journal_failed = error is not None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the Trainer's sums finite, and watch the loss for divergence."""
        trainer = self.trainer
        if not logs or "loss" not in logs:
            return
        if math.isfinite(trainer._total_loss_scalar):
            self.total = trainer._total_loss_scalar
        else:
            # The Trainer's sums would stay NaN for ever after; the log has told the true value.
            trainer._total_loss_scalar = self.total
            trainer._tr_loss.zero_()
        divergence = trainer.divergence.see(state.global_step, float(logs["loss"]))
        if divergence is None:
            return
        trainer.safety.record({"event": "divergence", **dataclasses.asdict(divergence)})
        if trainer.safety.config.on_divergence == "stop":
            trainer._save_checkpoint(trainer.model, None)
            raise trainer._stop_by_guard(str(divergence), [], way_out="Try a lower --learning-rate.")
        trainer.safety.warn(str(divergence))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluation is progress, and stops when asked to."""
        self.trainer.safety.watchdog.beat("a step")
        if self._stop_is_asked():
            raise EvaluationStoppedError

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the evaluation by parts, and keep the best one's step."""
        progress, loss = self.trainer.progress, (metrics or {}).get("eval_loss")
        if loss is None:
            return
        nats, tokens = getattr(self.trainer, "evaluated", ([], []))
        if nats:
            self.trainer.safety.record(parts_record(state.global_step, nats, tokens))
        progress.evaluated_step = state.global_step
        if state.global_step == 0:
            return  # what the others are compared with, not one of them
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.since_best = loss, state.global_step, 0
            control.should_save = True
            return
        progress.since_best += 1
        patience = self.trainer.safety.config.early_stopping
        if patience is not None and progress.since_best >= patience:
            progress.stopped_early = True
            control.should_save = control.should_training_stop = True


def reason_of(error: OSError) -> str:
    """What the system says of a file, and which."""
    detail = error.strerror or type(error).__name__
    return f"{detail} ({error.filename})" if error.filename else detail
