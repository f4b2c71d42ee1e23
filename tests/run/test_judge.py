"""Better or worse: the verdict follows from held-out losses, and its words say the same in both languages."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from slimtune.config import Config
from slimtune.plan import resolve_rate
from slimtune.run.facts import TrainingFacts, VerdictFacts
from slimtune.run.interval import bootstrap
from slimtune.run.judge import judge, parts_record
from slimtune.run.samples import Sampled, read_samples
from slimtune.run.verdict import advice_text, general_text, is_worse, tell_verdict, verdict_text

TOKENS = [10, 20, 30, 40, 50, 60, 70, 80]
TRAINING = TrainingFacts(
    engine="plain", repeats=True, steps=60, epochs=3.0, first_loss=3.0, last_loss=1.0, seconds=1.0, tokens=1,
    supervised_tokens=1, tokens_per_second=1.0, model_flops_per_second=None, floor_share=None, peak_memory_bytes=1,
    memory_kind="process resident",
)  # fmt: skip
HELD_OUT = {"documents": 8}
HARD = np.random.default_rng(0).normal(0.0, 0.5, len(TOKENS))
"""How hard each part is by itself: more than the changes below."""


def evaluation(step: int, loss: float) -> dict[str, Any]:
    spread = np.random.default_rng(step + 1).normal(0.0, 0.01, len(TOKENS))
    nats = (loss + HARD + spread) * TOKENS
    return json.loads(json.dumps(parts_record(step, nats.tolist(), TOKENS)))  # type: ignore[no-any-return]


def verdict(losses: dict[int, float], **config: Any) -> VerdictFacts:
    records = [evaluation(step, loss) for step, loss in losses.items()]
    return judge(records, Config.make(**config), TRAINING, max(losses), HELD_OUT)


@pytest.mark.parametrize(
    ("losses", "outcome", "advice", "suggestion"),
    [
        ({0: 3.0, 20: 1.0, 40: 0.9, 60: 0.9}, "better", "", ""),
        ({0: 3.0, 20: 2.5, 40: 2.0, 60: 1.5}, "better", "longer", "--epochs 6"),
        ({0: 3.0, 20: 1.0, 40: 1.5, 60: 2.0}, "better", "shorter", "--epochs 1"),
        ({0: 3.0, 20: 1.0, 40: 2.5, 60: 4.0}, "worse", "shorter", "--epochs 1"),
        ({0: 3.0, 20: 9.0, 40: 9.0, 60: 9.0}, "worse", "slower", "--learning-rate 2e-05"),
        ({0: 3.0, 20: math.nan, 40: math.nan, 60: math.nan}, "worse", "slower", "--learning-rate 2e-05"),
        ({0: 3.0, 20: 1.0, 40: 1.0, 60: math.nan}, "worse", "shorter", "--epochs 1"),
        ({0: 3.0, 20: 3.0, 40: 3.0, 60: 3.0}, "same", "longer", "--epochs 6"),
        ({0: 3.0, 60: 3.2}, "worse", "slower", "--learning-rate 2e-05"),
        ({0: 3.0, 60: 2.8}, "better", "", ""),
    ],
)
def test_what_the_losses_say(losses: dict[int, float], outcome: str, advice: str, suggestion: str) -> None:
    found = verdict(losses)
    assert (found.outcome, found.advice, found.suggestion) == (outcome, advice, suggestion)
    assert is_worse({"verdict": vars(found)}) == (outcome == "worse")
    trained = {step: loss for step, loss in losses.items() if step and math.isfinite(loss)}
    assert found.best_loss is None if not trained else found.best_step in trained


def test_the_change_is_paired_and_its_interval_the_bootstraps() -> None:
    found = verdict({0: 3.0, 60: 2.8})
    before, after = (np.array(evaluation(step, loss)["held_out_nats"]) for step, loss in ((0, 3.0), (60, 2.8)))
    expected = bootstrap(after - before, np.array(TOKENS))
    assert found.change == pytest.approx(vars(expected), rel=1e-5)
    # The parts differ more from each other than the change is large: unpaired, nothing could be told.
    assert found.start is not None
    assert found.end is not None
    assert found.start["low"] < found.end["high"]
    assert found.change is not None
    assert found.change["high"] < -0.15


def test_the_flag_is_the_one_that_the_run_was_given() -> None:
    assert verdict({0: 3.0, 20: 2.5, 40: 2.0, 60: 1.5}, max_steps=60).suggestion == "--max-steps 120"
    assert verdict({0: 3.0, 60: 9.0}, learning_rate=5).suggestion == "--learning-rate 0.0002"
    assert verdict({0: 3.0, 20: 3.0, 60: 3.0}, learning_rate=5).suggestion == "--learning-rate 0.0002"


@pytest.mark.parametrize(
    ("parameters", "rate", "lower"),
    [
        (135_000_000, 5.0, "0.001"), (135_000_000, 2e-3, "0.001"), (135_000_000, 1e-3, "0.0001"),
        (7_000_000_000, 1e-3, "0.0002"), (7_000_000_000, 2e-4, "2e-05"),
    ],
)  # fmt: skip
def test_a_lower_rate_is_the_bases_own_unless_that_failed(parameters: int, rate: float, lower: str) -> None:
    config = Config.make(learning_rate=rate)
    records = [evaluation(0, 3.0), evaluation(60, 9.0)]
    found = judge(records, config, TRAINING, 60, HELD_OUT, None, parameters)
    assert found.suggestion == f"--learning-rate {lower}"
    unmeasured = TrainingFacts(**{**vars(TRAINING), "last_loss": math.nan})
    assert judge([], config, unmeasured, 60, None, None, parameters).suggestion == found.suggestion
    # What it is given by itself is what the advice goes by.
    given, _ = resolve_rate(Config.make(), parameters)
    assert given.rate < rate or float(lower) < given.rate


def test_a_run_that_stopped_early_isnt_to_be_longer() -> None:
    records = [evaluation(step, loss) for step, loss in {0: 3.0, 20: 2.5, 40: 2.0, 60: 2.05}.items()]
    found = judge(records, Config.make(early_stopping=1), TRAINING, 40, HELD_OUT)
    assert (found.outcome, found.advice, found.suggestion) == ("better", "", "")
    assert judge(records[:-1], Config.make(), TRAINING, 40, HELD_OUT).advice == "longer"


def test_without_held_out_rows_only_losses_that_are_none_are_seen() -> None:
    for last, outcome in ((1.0, "unmeasured"), (4.0, "unmeasured"), (5.0, "worse"), (math.nan, "worse")):
        training = TrainingFacts(**{**vars(TRAINING), "last_loss": last})
        assert judge([], Config.make(), training, 60, None).outcome == outcome


def test_other_data_on_the_way_is_compared_with_nothing() -> None:
    records = [evaluation(0, 3.0), {**evaluation(60, 1.0), "held_out_tokens": [1] * 8}]
    assert judge(records, Config.make(), TRAINING, 60, HELD_OUT).outcome == "unmeasured"


@pytest.mark.parametrize(
    ("what", "outcome"),
    [("base weights", "unmeasured"), ("tokenizer", "unmeasured"), ("data a.jsonl", "unmeasured"),
     ("config seed", "unmeasured"), ("config learning_rate", "better"), ("data a token of an answer", "better")],
)  # fmt: skip
def test_another_base_or_other_rows_on_the_way_are_compared_with_nothing(what: str, outcome: str) -> None:
    went_on = {"event": "resumed", "step": 30, "changes": [{"what": what, "before": "1", "after": "2"}]}
    records = [evaluation(0, 3.0), went_on, evaluation(60, 1.0)]
    found = judge(records, Config.make(data="a.jsonl"), TRAINING, 60, HELD_OUT)
    assert found.outcome == outcome
    told = verdict_text(vars(found), vars(TRAINING), lambda english, chinese: english)
    assert ("same rows and the same base" in told) == (outcome == "unmeasured")
    assert "none was held out" not in told


def test_many_parts_are_added_up() -> None:
    record = parts_record(3, [1.0] * 1000, [2] * 1000)
    assert len(record["held_out_nats"]) == 200
    assert (sum(record["held_out_nats"]), sum(record["held_out_tokens"])) == (1000.0, 2000)


@pytest.mark.parametrize(
    "losses",
    [
        {0: 3.0, 20: 1.0, 40: 0.9, 60: 0.9}, {0: 3.0, 20: 2.5, 60: 1.5}, {0: 3.0, 20: 1.0, 60: 4.0}, {0: 3.0, 60: 9.0},
        {0: 3.0, 60: math.nan}, {0: 3.0, 60: 3.0}, None,
    ],
)  # fmt: skip
def test_both_languages_say_the_same_numbers(losses: dict[int, float] | None) -> None:
    found = vars(verdict(losses) if losses else judge([], Config.make(), TRAINING, 60, None))
    for say in (lambda verdict, say: verdict_text(verdict, vars(TRAINING), say), advice_text):
        english, chinese = say(found, lambda en, zh: en), say(found, lambda en, zh: zh)
        assert bool(english) == bool(chinese)
        assert not re.search("[\u4e00-\u9fff]", english)
        assert not english or re.search("[\u4e00-\u9fff]", chinese)
        assert sorted(re.findall(r"[\d.]*\d", english)) == sorted(re.findall(r"[\d.]*\d", chinese))
    section = tell_verdict({"verdict": found, "training": vars(TRAINING)}, lambda en, zh: en)
    assert section is not None
    status = {"better": "proved", "worse": "broken", "same": "told", "unmeasured": "unmeasured"}[found["outcome"]]
    assert section.statements[0].status == status


def stuck_samples(*steps: int) -> Sampled:
    """Three prompts, answered well before the training and endlessly after ``steps``."""
    return read_samples(
        {
            "step": step,
            "samples": [
                {"row": f"rows.jsonl:{at}", "prompt": f"{at}?", "expected": "Yes.", "ended": "length",
                 "reply": "abre " * 20 if step in steps else "Yes, it is so."}
                for at in range(3)
            ],
        }
        for step in (0, 60)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "rate", "advice"),
    [
        ({0: 3.0, 20: 1.0, 60: 1.0}, 1e-3, "slower"),
        ({0: 3.0, 20: 1.0, 60: 1.0}, 2e-4, ""),
        ({0: 3.0, 20: 1.0, 60: 2.0}, 2e-4, "shorter"),
    ],
)
def test_replies_that_got_stuck_are_worse_whatever_the_loss_is(
    losses: dict[int, float], rate: float, advice: str
) -> None:
    records = [evaluation(step, loss) for step, loss in losses.items()]
    config = Config.make(learning_rate=rate)
    found = judge(records, config, TRAINING, 60, HELD_OUT, stuck_samples(60))
    assert (found.outcome, found.by_replies, found.stuck, found.answered) == ("worse", True, 3, 3)
    assert found.advice == advice
    assert is_worse({"verdict": vars(found)})
    for say, word in ((lambda en, zh: en, "abre abre"), (lambda en, zh: zh, "不停地重复自己")):
        text = verdict_text(vars(found), vars(TRAINING), say)
        assert word in text
        assert "abre" in text
        assert "No checkpoint is better" not in advice_text(vars(found), say)
    if advice == "shorter":
        assert "checkpoint-20" in advice_text(vars(found), lambda en, zh: en)
    sound = judge(records, config, TRAINING, 60, HELD_OUT, stuck_samples())
    assert (sound.outcome, sound.by_replies, sound.stuck) == ("better", False, 0)


def test_a_loss_that_rose_and_replies_that_got_stuck_are_both_told() -> None:
    records = [evaluation(step, loss) for step, loss in {0: 3.0, 60: 9.0}.items()]
    found = judge(records, Config.make(learning_rate=5), TRAINING, 60, HELD_OUT, stuck_samples(60))
    assert (found.outcome, found.by_replies, found.advice) == ("worse", False, "slower")
    text = verdict_text(vars(found), vars(TRAINING), lambda en, zh: en)
    assert text.startswith("WORSE than before the training on 8 held-out documents")
    assert "3 of 3 replies" in text


@pytest.mark.parametrize(("after", "high", "forgets"), [(3, -0.2, True), (20, 0.05, False), (25, 0.2, False)])
def test_what_it_could_before_is_told_with_what_helps(after: int, high: float, forgets: bool) -> None:
    change = {"value": (after - 21) / 44, "low": -0.5, "high": high}
    verdict = {"general": {"questions": 44, "before": 21, "after": after, "change": change}}
    for say in (lambda en, zh: en, lambda en, zh: zh):
        text = general_text(verdict, say)
        assert {"44", "21", str(after)} <= set(re.findall(r"\d+", text))
        assert ("--rehearse 10%" in text) == forgets
    assert general_text({}, lambda en, zh: en) == ""
