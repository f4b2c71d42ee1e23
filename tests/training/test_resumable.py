"""A run that is stopped anywhere, resumed, evaluated, or short of memory gives the adapter of one that wasn't."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.errors import GuardStop, StopRequested
from slimtune.training import checkpoint as checkpoint_module
from slimtune.training.saving import Moment


@pytest.fixture(params=["handed over at once", "handed over late"], autouse=True)
def as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything must hold as well where a save waits until the next step's work is with the GPU."""
    if "late" in request.param:
        monkeypatch.setattr(Moment, "can_wait", True)


class At(TrainerCallback):
    """Do something once, at the beginning of a step."""

    def __init__(self, step: int, action: Callable[..., None]) -> None:
        self.step, self.action = step, action

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            self.action(**kwargs)


def stop_at(run: Any, step: int) -> Any:
    def ask(**_: Any) -> None:
        run.safety.signals.defer()  # as the step does, a moment later: before it a signal ends the run where it is
        run.safety.signals.requested = signal.SIGTERM.name

    run.add_callback(At(step, ask))
    return run


def poison_batch(run: Any, step: int) -> Any:
    """The second micro-batch of ``step`` has a loss that is no number."""
    original = run.compute_loss
    seen = {"micro_batch": 0, "armed": False}

    def compute_loss(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = original(*args, **kwargs)
        if seen["armed"]:
            seen["micro_batch"] += 1
            if seen["micro_batch"] == 2:
                seen["armed"] = False
                return loss * float("nan")
        return loss

    run.compute_loss = compute_loss
    run.add_callback(At(step, lambda **_: seen.update(armed=True)))
    return run


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("stop", [1, 3, 4, 7, 11])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(make_run: Any, stop: int, optim: str) -> None:
    whole = make_run("whole", optim=optim)
    whole.fit()
    first = stop_at(make_run("run", optim=optim), stop)
    with pytest.raises(StopRequested, match="SIGTERM"):
        first.fit()
    assert first.state.global_step == stop
    second = make_run("run", optim=optim)
    second.fit()
    assert first.steps() + second.steps() == whole.steps()
    assert second.digest() == whole.digest()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_what_is_handed_over_late_is_what_was_taken(make_run: Any, optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, bytes]] = []
    for late in (False, True):
        monkeypatch.setattr(Moment, "can_wait", late)
        run = make_run(str(late), save_steps=1, optim=optim)
        original, files = run.safety.checkpoints._write, {}

        def write(snapshot: Any, original: Any = original, files: dict[str, bytes] = files) -> None:
            files.update({f"{snapshot.step}/{name}": data for name, data in snapshot.files().items()})
            original(snapshot)

        monkeypatch.setattr(run.safety.checkpoints, "_write", write)
        run.fit()
        saved.append(files)
    at_once, late_ones = saved
    assert len(at_once) > 4 * 5
    assert [name for name in at_once if at_once[name] != late_ones.get(name)] == []


def test_a_crash_right_after_a_save_keeps_it(make_run: Any) -> None:
    def crash(**_: Any) -> None:
        raise RuntimeError("something broke")

    run = make_run("crashed", save_steps=2)
    run.add_callback(At(5, crash))
    with pytest.raises(RuntimeError, match="something broke"):
        run.fit()
    assert run.safety.checkpoints.steps() == [4, 2]


def test_logs_that_span_the_stop_are_the_same(make_run: Any) -> None:
    whole = make_run("whole", logging_steps=5)
    whole.fit()
    first = stop_at(make_run("run", logging_steps=5), 7)
    with pytest.raises(StopRequested):
        first.fit()
    second = make_run("run", logging_steps=5)
    second.fit()
    assert first.steps() + second.steps() == whole.steps()


def test_a_finished_run_has_no_step_left(make_run: Any) -> None:
    whole = make_run("run")
    whole.fit()
    again = make_run("run")
    again.fit()
    assert again.steps() == []
    assert again.digest() == whole.digest()


def test_a_run_with_evaluations_gives_the_same_adapter(make_run: Any) -> None:
    plain = make_run("plain")
    plain.fit()
    evaluated = make_run("evaluated", evaluate=True)
    evaluated.fit()
    assert evaluated.steps() == plain.steps()
    assert evaluated.digest() == plain.digest()
    losses = {log["step"]: log["eval_loss"] for log in evaluated.state.log_history if "eval_loss" in log}
    assert evaluated.progress.best_step == min(losses, key=losses.__getitem__)


def test_a_stop_during_an_evaluation_is_made_up_for(make_run: Any) -> None:
    whole = make_run("whole", evaluate=True)
    whole.fit()
    first = make_run("run", evaluate=True)

    class StopInEvaluation(TrainerCallback):
        def on_prediction_step(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step == 4:
                first.safety.signals.requested = signal.SIGINT.name

    first.add_callback(StopInEvaluation())
    with pytest.raises(StopRequested):
        first.fit()
    second = make_run("run", evaluate=True)
    second.fit()
    evaluations = [
        [(log["step"], log["eval_loss"]) for log in run.state.log_history if "eval_loss" in log]
        for run in (whole, first, second)
    ]
    assert evaluations[1] + evaluations[2] == evaluations[0]
    assert (second.progress.best_step, second.digest()) == (whole.progress.best_step, whole.digest())


def test_early_stopping_counts_across_a_stop_and_takes_the_best(make_run: Any) -> None:
    def evaluate_as(run: Any) -> Any:
        original = run.prediction_step

        def prediction_step(*args: Any, **kwargs: Any) -> Any:
            loss, logits, labels = original(*args, **kwargs)
            return loss * 0 + abs(run.state.global_step - 4), logits, labels

        run.prediction_step = prediction_step
        return run

    whole = evaluate_as(make_run("whole", evaluate=True, early_stopping=2))
    whole.fit()
    assert (whole.state.global_step, whole.progress.best_step) == (8, 4)
    first = stop_at(evaluate_as(make_run("run", evaluate=True, early_stopping=2)), 7)
    with pytest.raises(StopRequested):
        first.fit()
    second = evaluate_as(make_run("run", evaluate=True, early_stopping=2))
    second.fit()
    assert (second.state.global_step, second.progress.best_step) == (8, 4)
    assert second.digest() == whole.digest()
    best = load_file(whole.safety.checkpoints.path(4) / "adapter_model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in _tensors(whole).items())


def _tensors(run: Any) -> dict[str, Tensor]:
    from slimtune.adapter.state import adapter_tensors

    return adapter_tensors(run.model)


def test_nothing_pickled_is_written(make_run: Any, tmp_path: Path) -> None:
    make_run("run").fit()
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ""}
    assert {path.name for path in (tmp_path / "run").rglob("*") if not path.suffix and path.is_file()} == {"SHA256SUMS"}


# -- numbers that are none


def test_a_nan_stops_the_run_before_it_is_applied_and_names_the_rows(make_run: Any, tmp_path: Path) -> None:
    clean = make_run("clean")
    clean.fit()
    run = poison_batch(make_run("run"), 5)
    with pytest.raises(GuardStop, match=r"loss is nan in step 5") as stop:
        run.fit()
    assert stop.value.exit_code == 3
    # Step 5 is the second of the second epoch: 11 micro-batches are behind, and 4; its second micro-batch is bad.
    assert "data.jsonl:17" in str(stop.value)
    assert "data.jsonl:16," not in str(stop.value)
    assert run.safety.checkpoints.wait() == 4
    # What was saved is the run before that step: without the poison it goes on as if nothing had been.
    again = make_run("run")
    again.fit()
    assert again.digest() == clean.digest()


def test_skip_leaves_the_batch_out_and_the_log_tells_the_true_value(make_run: Any) -> None:
    run = poison_batch(make_run("run", on_nonfinite="skip"), 5)
    before: dict[str, Tensor] = {}
    run.add_callback(At(5, lambda **_: before.update({k: v.clone() for k, v in _tensors(run).items()})))
    after: dict[str, Tensor] = {}
    run.add_callback(At(6, lambda **_: after.update({k: v.clone() for k, v in _tensors(run).items()})))
    run.fit()
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = {step: loss for step, loss, _ in run.steps()}
    assert [step for step, loss in losses.items() if loss != loss] == [5]
    assert all(0 < losses[step] < 100 for step in losses if step != 5)
    (event,) = [event for event in run.events if event["event"] == "skipped"]
    assert (event["step"], event["value"], event["rows"]) == (5, "nan", ["data.jsonl:17"])
    assert run.progress.skipped == 1
    assert all(torch.isfinite(tensor).all() for tensor in _tensors(run).values())


def test_skipping_has_a_limit(make_run: Any) -> None:
    run = make_run("run", on_nonfinite="skip", max_skipped=2)
    for step in (2, 3, 4):
        poison_batch(run, step)
    with pytest.raises(GuardStop, match="after 2 skipped batches"):
        run.fit()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("where", ["gradient", "parameter", "optimizer state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_place_is_watched(make_run: Any, where: str, value: float, optim: str) -> None:
    run = make_run("run", optim=optim)

    def poison(**kwargs: Any) -> None:
        parameter = next(p for p in run.model.parameters() if p.requires_grad)
        if where == "parameter":
            parameter.data[0, 0] = value
        elif where == "optimizer state":
            state = run.optimizer.state[parameter]
            key = "exp_avg_sq" if "exp_avg_sq" in state else "state2"
            state[key].view(-1)[0] = value
        else:
            handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient + value)[1])

    run.add_callback(At(5, poison))
    with pytest.raises(GuardStop, match=rf"{where} of .* in step 5"):
        run.fit()
    for step in run.safety.checkpoints.steps():
        for file in run.safety.checkpoints.path(step).glob("*.safetensors"):
            assert checkpoint_module.nonfinite(load_file(file)) == []


@pytest.mark.parametrize("step", [6, 12])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_an_optimizer_that_makes_a_nan_has_it_neither_saved_nor_called_done(
    make_run: Any, step: int, optim: str
) -> None:
    """After the last step no other looks at its parameters: what is to be written is looked at."""
    run = make_run("run", optim=optim)

    class Spoil(TrainerCallback):
        def on_optimizer_step(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step + 1 == step:
                next(p for p in run.model.parameters() if p.requires_grad).data[0, 0] = float("nan")

    run.add_callback(Spoil())
    with pytest.raises(GuardStop, match=rf"lora_A.* (is no number after step {step}|in step {step + 1})") as stop:
        run.fit()
    assert run.safety.checkpoints.steps()[0] == step - 3
    assert str(run.safety.checkpoints.path(step - 3)) in str(stop.value)


def test_a_diverging_loss_warns_or_stops(make_run: Any) -> None:
    for policy in ("warn", "stop"):
        run = make_run(policy, on_divergence=policy, divergence_steps=3, divergence_factor=2.0)
        original = run.compute_loss

        def compute_loss(*args: Any, run: Any = run, original: Any = original, **kwargs: Any) -> Tensor:
            return original(*args, **kwargs) * (10.0 if run.state.global_step >= 5 else 1.0)

        run.compute_loss = compute_loss
        if policy == "stop":
            with pytest.raises(GuardStop, match="diverges"):
                run.fit()
            assert run.safety.checkpoints.wait() == 8
        else:
            run.fit()
            assert any("diverges" in line for line in run.warnings)
        (event,) = [event for event in run.events if event["event"] == "divergence"]
        assert event["step"] == 8


# -- memory


def out_of_memory_at(run: Any, step: int, micro_batch: int, largest: int) -> Any:
    """A forward pass over more than ``largest`` rows fails from ``micro_batch`` of ``step`` on."""
    state = {"on": False, "seen": 0}
    original = run.compute_loss

    def compute_loss(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
        if state["on"]:
            state["seen"] += 1
            if state["seen"] >= micro_batch and inputs["input_ids"].shape[0] > largest:
                original(model, inputs, **kwargs).backward()  # leaves gradients behind, as a real failure may
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(model, inputs, **kwargs)

    run.compute_loss = compute_loss
    run.add_callback(At(step, lambda **_: state.update(on=True)))
    return run


def test_out_of_memory_halves_the_micro_batch_and_goes_on(make_run: Any) -> None:
    run = out_of_memory_at(make_run("run"), 5, 3, largest=1)
    run.fit()
    assert run.state.global_step == 12
    assert [event for event in run.events if event["event"] == "out_of_memory"] == [
        {"event": "out_of_memory", "step": 5, "pieces": 2}
    ]
    # A run that was in two pieces from step 5 on without any failure: the rollback left nothing behind.
    same = make_run("same")
    same.add_callback(At(5, lambda **_: setattr(same.progress, "pieces", 2)))
    same.fit()
    assert [step for step, *_ in run.steps()] == [step for step, *_ in same.steps()]
    for (_, loss, norm), (_, other_loss, other_norm) in zip(run.steps(), same.steps(), strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-5)
    assert run.digest() == same.digest()


def test_pieces_survive_a_stop(make_run: Any) -> None:
    whole = out_of_memory_at(make_run("whole"), 5, 1, largest=1)
    whole.fit()
    first = stop_at(out_of_memory_at(make_run("run"), 5, 1, largest=1), 8)
    with pytest.raises(StopRequested):
        first.fit()
    second = make_run("run")
    second.fit()
    assert second.progress.pieces == 2
    assert second.digest() == whole.digest()


def test_out_of_memory_with_one_row_gives_up_with_a_checkpoint(make_run: Any) -> None:
    clean = make_run("clean")
    clean.fit()
    run = out_of_memory_at(make_run("run"), 5, 3, largest=0)
    with pytest.raises(GuardStop, match="out of memory in step 5") as stop:
        run.fit()
    assert stop.value.exit_code == 3
    assert run.safety.checkpoints.wait() == 4


# -- the disk


class FailingDisk:
    """Stands for :mod:`os` in the durable module: writes fail while ``broken`` is set."""

    def __init__(self, number: int) -> None:
        self.number, self.broken = number, False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: Any) -> int:
        if self.broken:
            raise OSError(self.number, os.strerror(self.number))
        return os.write(descriptor, data)

    def breaks_at(self, run: Any, step: int) -> None:
        """From ``step`` on writes fail; a save that is under way by then, on a slow machine, still succeeds."""

        def breaks(**_: Any) -> None:
            run.safety.checkpoints.wait()
            self.broken = True

        run.add_callback(At(step, breaks))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_training_goes_on_without_a_disk_and_saves_again_with_one(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    clean = make_run("clean")
    clean.fit()
    disk = FailingDisk(number)
    monkeypatch.setattr("slimtune.run.durable.os", disk)
    run = make_run("run")
    disk.breaks_at(run, 5)
    run.add_callback(At(10, lambda **_: setattr(disk, "broken", False)))
    run.fit()
    assert run.digest() == clean.digest()
    assert run.safety.checkpoints.last_saved == 12
    failures = [event for event in run.events if event["event"] == "save_failed"]
    assert failures[0] == {"event": "save_failed", "step": 6, "error": os.strerror(number), "last_good": 3}
    assert any("could not be saved" in line for line in run.warnings)
    assert [event["event"] for event in run.events][-1] == "save_recovered"


def test_a_disk_that_never_comes_back_ends_in_exit_3_with_the_last_good_one(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FailingDisk(errno.ENOSPC)
    monkeypatch.setattr("slimtune.run.durable.os", disk)
    run = make_run("run")
    disk.breaks_at(run, 8)
    with pytest.raises(GuardStop, match="No space left") as stop:
        run.fit()
    assert run.warnings[-1] == "the last step waits 1 s for room on the disk"
    assert stop.value.exit_code == 3
    assert str(run.safety.checkpoints.path(6)) in str(stop.value)
    disk.broken = False
    assert run.safety.checkpoints.newest_valid() == run.safety.checkpoints.path(6)


def test_room_is_checked_before_a_save(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda path: 1000)
    run = make_run("run")
    with pytest.raises(GuardStop, match=r"1\.0 MiB are needed, and the disk has 1\.0 KiB free"):
        run.fit()
    assert list(run.safety.checkpoints.folder.iterdir()) == []


def test_state_is_json(make_run: Any) -> None:
    run = make_run("run", evaluate=True)
    run.fit()
    folder = run.safety.checkpoints.path(12)
    state = json.loads((folder / "state.json").read_text("utf-8"))
    assert state["position"] == 4 * 22 / 2
    assert state["progress"]["best_step"] == run.progress.best_step
