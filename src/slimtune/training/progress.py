"""What the trainer tells the outside while it runs: one record a logged step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.data.packing import MicroBatches
from slimtune.run.facts import OptimizerFacts, TrainingFacts
from slimtune.training.floor import Floor

__all__ = ["MetricsCallback", "memory_bytes", "optimizer_facts", "training_facts"]

_MOST = 1e30
"""No step's flops, bytes or seconds come near it."""


class MetricsCallback(TrainerCallback):
    """Turns the Trainer's logs into records with speed, time left and memory.

    A record has ``step``, ``steps``, ``epoch``, ``loss``, ``grad_norm``, ``learning_rate``, ``tokens`` (padding left
    out) and ``supervised_tokens`` since the last record, ``tokens_per_second``, ``seconds`` since the start,
    ``seconds_left`` and ``memory_bytes`` (peak allocated on the GPU; resident on a CPU). With a ``floor`` also
    ``model_flops`` of these tokens, and ``floor_share`` (the least time that they can take here, over the time that
    they took).
    """

    def __init__(
        self,
        data: MicroBatches,
        micro_batches: int,
        gradient_accumulation: int,
        floor: Floor | None,
        *sinks: Callable[[dict[str, Any]], None],
        ranks: int = 1,
    ) -> None:
        self.data, self.accumulation, self.floor = data, gradient_accumulation, floor
        self.micro_batches = micro_batches  # of the whole run: its last step may have fewer than the others
        self.sinks, self.ranks = sinks, ranks
        self.started = self.last_time = time.monotonic()
        self.last_step = 0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; a resumed run counts from where it is."""
        self.started = self.last_time = time.monotonic()
        self.last_step = self.first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass one record on to every sink."""
        if not logs or "train_runtime" in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        record: dict[str, Any] = {"step": state.global_step, "steps": state.max_steps}
        record |= {key: _number(value) for key, value in logs.items()}
        if "loss" in logs:
            steps, elapsed = state.global_step - self.last_step, now - self.last_time
            lengths, supervised = self.data.sizes(self._position(self.last_step), self._position(state.global_step))
            tokens = sum(lengths)
            record["epoch"] = round(self._position(state.global_step) / self.data.per_round, 4)
            record["tokens"], record["supervised_tokens"] = tokens, supervised
            record["tokens_per_second"] = round(tokens / elapsed, 1) if elapsed > 0 else 0.0
            if self.floor is not None:
                record["model_flops"] = self.floor.work.flops(lengths, supervised)
                record["floor_share"] = round(
                    self.floor.seconds(lengths, supervised) / self.ranks / max(elapsed, 1e-9), 4
                )
            done = state.global_step - self.first_step
            record["seconds"] = round(now - self.started, 3)
            record["logged_steps"] = steps
            record["step_seconds"] = round(elapsed / max(1, steps), 4)
            record["seconds_left"] = round(
                (now - self.started) / max(1, done) * (state.max_steps - state.global_step), 1
            )
            record["memory_bytes"] = memory_bytes()
            self.last_time, self.last_step = now, state.global_step
        elif "eval_runtime" in logs:
            self.leave_out(float(logs["eval_runtime"]), state.global_step)
        for sink in self.sinks:
            sink(record)

    def leave_out(self, seconds: float, step: int) -> None:
        """An evaluation is no part of a step's time; the one before the first step isn't what the others will take."""
        self.last_time += seconds
        if step == self.first_step:
            self.started += seconds

    def _position(self, step: int) -> int:
        """Micro-batches that are trained on after so many optimizer steps."""
        return min(step * self.accumulation, self.micro_batches)


def training_facts(
    records: list[dict[str, Any]], engine: str, *, repeats: bool, own_head: str | None = None
) -> TrainingFacts:
    """Sum up a run from its metrics' records.

    Args:
        records: The lines of ``metrics.jsonl``. A step that was trained again after a resume counts once.
        engine: ``fused``, or ``plain`` with the reason.
        repeats: Whether the kernels were deterministic.
        own_head: Why the loss came from the model's own head.
    """
    steps = list({record["step"]: record for record in records if "step_seconds" in record}.values())
    tokens = sum(int(_value(record, "tokens")) for record in steps)
    supervised_tokens = sum(int(_value(record, "supervised_tokens")) for record in steps)
    losses = [None if record["loss"] is None else _value(record, "loss") for record in steps]
    tail = [loss for loss in losses[-max(1, len(steps) // 10) :] if loss is not None]
    evaluations = [_value(record, "eval_loss") for record in records if record.get("eval_loss") is not None]
    looks = [[str(name) for name in record["without"]] for record in records if record.get("event") == "gradients"]
    seconds = sum(map(_seconds, steps))
    spent, counted = max(seconds, 1e-9), all("floor_share" in record for record in steps)
    return TrainingFacts(
        engine=engine,
        repeats=repeats,
        steps=int(_value(steps[-1], "step")) if steps else 0,
        epochs=round(_value({"epoch": 0.0} | steps[-1], "epoch"), 3) if steps else 0.0,
        first_loss=losses[0] if losses and losses[0] is not None else float("nan"),
        last_loss=sum(tail) / len(tail) if tail else float("nan"),
        seconds=round(seconds, 2),
        tokens=tokens,
        supervised_tokens=supervised_tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
        model_flops_per_second=sum(_value(r, "model_flops") for r in steps) / spent if counted else None,
        floor_share=round(sum(_value(r, "floor_share") * _seconds(r) for r in steps) / spent, 4) if counted else None,
        peak_memory_bytes=max((int(_value(record, "memory_bytes")) for record in steps), default=0),
        memory_kind="gpu peak allocated" if torch.cuda.is_available() else "process resident",
        eval_loss=evaluations[-1] if evaluations else None,
        own_head=own_head,
        without_gradient=looks[-1] if looks else None,
    )


def _seconds(record: dict[str, Any]) -> float:
    """How long the steps of a record took."""
    return _value(record, "step_seconds") * _value({"logged_steps": 1} | record, "logged_steps")


def _value(record: dict[str, Any], key: str) -> float:
    """A record's number, as a run of this world may have measured it.

    Raises:
        ValueError: It is none.
    """
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
        raise ValueError(f"step {record.get('step')}: {key} = {value!r}")
    return float(value)


def optimizer_facts(name: str, optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    """Count the optimizer's state: bytes by dtype, over all state tensors of more than one element."""
    inner = getattr(optimizer, "optimizer", optimizer)
    # By storage: bitsandbytes lists its two quantisation maps with every parameter.
    tensors = {tensor.data_ptr(): tensor for tensor in _tensors(inner.state_dict()["state"]) if tensor.numel() > 1}
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    parameters = sum(parameter.numel() for group in inner.param_groups for parameter in group["params"])
    return OptimizerFacts(
        name=name,
        class_name=f"{type(inner).__module__.split('.')[0]}.{type(inner).__name__}",
        state_bytes=dict(sizes),
        parameters=parameters,
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inside in value.values():
            yield from _tensors(inside)


def memory_bytes() -> int:
    """Peak bytes allocated on the GPU, or the process's resident bytes on a CPU."""
    if torch.cuda.is_available():
        # As torch.cuda.max_memory_allocated(), which sorts all of the allocator's figures first; a GPU waits for this.
        stats = torch.cuda.memory_stats_as_nested_dict()
        return int(stats["allocated_bytes"]["all"]["peak"]) if stats else 0
    import psutil

    return int(psutil.Process().memory_info().rss)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) else value
