"""Steps, epochs and what is said of too few of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from slimtune.config import Config
from slimtune.data.documents import Documents, DocumentStore, DocumentWriter
from slimtune.data.packing import PackedBatches, micro_batches
from slimtune.data.sources import Place
from slimtune.errors import UserError
from slimtune.plan import (
    few_steps,
    micro_batches_of_run,
    resolve_amount,
    resolve_held_out,
    resolve_rate,
    resolve_steps,
    rounds_of_rows,
    steps_of_run,
)
from slimtune.recipes import finetune
from slimtune.training.resumable import ResumableTrainer
from tests.campaigns import campaign


def test_epochs_are_exact_though_the_last_step_has_fewer_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {"messages": [{"role": "user", "content": f"n {n}?"}, {"role": "assistant", "content": f"no {n}"}]}
        for n in range(5)
    ]
    file = tmp_path / "five.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained: list[int] = []
    step, batch = ResumableTrainer.training_step, PackedBatches.batch

    def counted(self: ResumableTrainer, model: Any, inputs: dict[str, Any], *more: Any) -> Tensor:
        trained.append(int((inputs["labels"] >= 0).sum()))
        return step(self, model, inputs, *more)

    monkeypatch.setattr(ResumableTrainer, "training_step", counted)
    config = Config.make(
        model=str(campaign.make_model(tmp_path / "model")), data=str(file), output=tmp_path / "run", epochs=3,
        gradient_accumulation=2, pack_tokens=2048, compute_dtype="fp32", lora_dropout=0.0, learning_rate=1e-3,
    )  # fmt: skip
    run = finetune(config)
    records = [record for record in run.metrics() if "step_seconds" in record]
    assert PackedBatches.batch is batch
    assert len(trained) == 3
    assert [record["epoch"] for record in records] == [2.0, 3.0]
    assert sum(record["supervised_tokens"] for record in records) == sum(trained)
    assert run.read_json(run.facts_file)["training"]["epochs"] == 3.0


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "whole"),
    [(3.0, 1, 3), (0.1, 30, 3), (0.7, 10, 7), (2.5, 1, 3), (0.01, 10, 1), (1.5, 3, 5)],
)
def test_epochs_that_are_no_whole_micro_batches_are_rounded_up_and_said(
    epochs: float, per_epoch: int, whole: int
) -> None:
    config = Config.make(epochs=epochs)
    assert micro_batches_of_run(config, per_epoch) == whole
    resolved, choices = resolve_steps(config, per_epoch)
    said = {choice.key: choice for choice in choices}
    assert resolved.epochs * per_epoch == pytest.approx(whole)
    assert ("epochs" in said) == (abs(epochs * per_epoch - whole) > 1e-6)
    assert micro_batches_of_run(resolved, per_epoch) == whole


def documents_of(folder: Path, count: int, *, tokens: int = 39) -> Documents:
    with DocumentWriter(folder) as writer:
        for number in range(count):
            ids = np.full(tokens, number, np.int32)
            writer.add(ids, np.ones(tokens, bool), 0, Place("rows.jsonl", number + 1, "line"))
    return Documents(DocumentStore(folder), np.arange(count))


@pytest.mark.parametrize(
    ("given", "rounds"),
    [({}, 1), ({"epochs": 0.3}, 1), ({"epochs": 18}, 4), ({"epochs": 20}, 5), ({"epochs": 20, "max_steps": 9}, 1)],
)
def test_a_run_goes_over_its_answers_about_four_times(given: dict[str, Any], rounds: int) -> None:
    assert rounds_of_rows(Config.make(**given)) == 1
    config = Config.make(rehearse=0.1, **given)
    assert rounds_of_rows(config) == rounds
    decided, choices = resolve_steps(config, 64.3)
    assert "epochs" not in {choice.key for choice in choices}  # what is read from the run's folder means the same
    assert rounds_of_rows(decided) == rounds


def test_too_few_steps_are_said_with_what_to_set(tmp_path: Path) -> None:
    config, documents = Config.make(epochs=3, gradient_accumulation=2), documents_of(tmp_path, 5)
    line = few_steps(config, 1, documents)
    assert line == (
        "2 optimizer steps are little to learn from: more by --gradient-accumulation 1 --pack-tokens 192 --epochs 20"
    )
    shared = few_steps(Config.make(epochs=3, gradient_accumulation=6), 1, documents, ranks=3)
    assert shared == (
        "1 optimizer step is little to learn from: more by --gradient-accumulation 3 --pack-tokens 192 --epochs 20"
    ), "each rank takes one at least"
    assert few_steps(Config.make(max_steps=2), 1, documents) is None
    assert few_steps(config, 40, documents) is None
    padded = few_steps(Config.make(packing=False, gradient_accumulation=1, epochs=3), 5, documents)
    assert padded == "15 optimizer steps are little to learn from: more by --epochs 20"
    beside = few_steps(Config.make(epochs=3, gradient_accumulation=1, rehearse=0.1), 1, documents)
    assert beside is not None
    assert "--pack-tokens 256" in beside, "the answers that are rehearsed fit in"
    decided, _ = resolve_amount(Config.make(), documents, None)
    assert few_steps(decided, 2, documents) == "40 optimizer steps are little to learn from: more rows would teach more"


@pytest.mark.parametrize(
    ("rows", "given", "taken", "steps"),
    [
        # 32 documents of 39 tokens: four to a pack are eight packs.
        (32, {}, {"epochs": 20, "gradient_accumulation": 1, "pack_tokens": 192}, 160),
        (32, {"epochs": 1}, {"gradient_accumulation": 1, "pack_tokens": 192}, 8),
        (32, {"gradient_accumulation": 4}, {"epochs": 20, "pack_tokens": 192}, 40),
        (32, {"pack_tokens": 512}, {"epochs": 20, "gradient_accumulation": 1}, 60),
        (32, {"micro_batch": 2}, {"epochs": 20, "gradient_accumulation": 1}, 20),
        (32, {"max_steps": 5}, {}, 5),
        (32, {"packing": False}, {"epochs": 5, "gradient_accumulation": 1}, 160),
        (1000, {}, {"gradient_accumulation": 1, "pack_tokens": 768}, 159),
        (2200, {}, {}, 65),
        (5, {}, {"epochs": 20, "gradient_accumulation": 1, "pack_tokens": 192}, 40),
    ],
)
def test_few_steps_become_more_by_what_nobody_asked_for(
    rows: int, given: dict[str, Any], taken: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    documents = documents_of(tmp_path, rows)
    config, choices = resolve_amount(Config.make(**given), documents, None)
    assert {choice.key: choice.value for choice in choices} == taken
    assert all(choice.value == getattr(config, choice.key) for choice in choices)
    assert not set(taken) & set(given)
    assert config.model_dump(include=given.keys()) == Config.make(**given).model_dump(include=given.keys())
    assert "auto" not in (config.epochs, config.gradient_accumulation)
    assert steps_of_run(config, micro_batches(documents, config).per_epoch) == steps
    # What was decided is a config of its own: read again, by resume or by eval, it decides nothing.
    assert resolve_amount(Config.make(**config.model_dump()), documents, None) == (config, [])


def test_packs_hold_the_longest_conversation(tmp_path: Path) -> None:
    trained, held = documents_of(tmp_path / "trained", 40), documents_of(tmp_path / "held", 2, tokens=700)
    config, _ = resolve_amount(Config.make(), trained, held)
    assert config.pack_tokens == 704
    with pytest.raises(UserError, match="less than the longest conversation, which has 700 tokens"):
        resolve_amount(Config.make(pack_tokens=512), trained, held)


@pytest.mark.parametrize(
    ("values", "work", "steps"),
    [
        ({"epochs": 3}, 0.05, 15), ({"epochs": 3}, 0.25, 50), ({"epochs": 1}, 0.5, 150), ({"max_steps": 5}, 0.05, 5),
        ({"epochs": 3, "early_stopping": 2}, 0.25, 15), ({"epochs": 3, "eval_steps": 4}, 0.25, 4), ({}, 0.0, 15),
    ],
)  # fmt: skip
def test_evaluations_take_a_tenth_of_the_work_at_most(values: dict[str, Any], work: float, steps: int) -> None:
    epochs = values.get("epochs", 3)
    config = Config.make(**{"gradient_accumulation": 1, "eval_share": 0.2, **values})
    resolved, _ = resolve_steps(config, 150 // epochs, work)
    assert resolved.eval_steps == steps
    if "eval_steps" not in values and "early_stopping" not in values and work:
        count = -(-steps_of_run(resolved, 150 // epochs) // steps)
        assert count == 1 or count * work <= 0.1 * 3 * micro_batches_of_run(resolved, 150 // epochs) / (150 // epochs)


def test_what_is_held_out_is_recorded_with_its_reason() -> None:
    config, (choice,) = resolve_held_out(Config.make(), 0.2, 40)
    assert (config.eval_share, choice.value) == (0.2, 0.2)
    assert choice.reason.startswith("8 of 40 different rows")
    config, (choice,) = resolve_held_out(Config.make(), 0.0, 12)
    assert (config.eval_share, choice.reason) == (0.0, "none of 12 different rows, as they are fewer than 20")
    config, (choice,) = resolve_held_out(Config.make(eval="held.jsonl"), 0.0, 0)
    assert (config.eval_share, choice.reason) == (0.0, "eval names the held-out data")
    assert resolve_held_out(Config.make(eval_share=0.1), 0.1, 40) == (Config.make(eval_share=0.1), [])


def test_the_learning_rate_follows_from_the_bases_size_unless_it_is_given() -> None:
    config, (choice,) = resolve_rate(Config.make(), 134_515_008)
    assert (config.learning_rate, choice.key, choice.value) == (1e-3, "learning_rate", 1e-3)
    config, choices = resolve_rate(Config.make(), 1_836_828_672)
    assert (config.learning_rate, choices) == (2e-4, [])
    assert resolve_rate(Config.make(learning_rate=5.0), 134_515_008) == (Config.make(learning_rate=5.0), [])
