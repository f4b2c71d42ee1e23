"""What a run's metrics sum up to; records that no run has written are none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slimtune.training.progress import training_facts

RECORD = {"step": 1, "loss": 2.0, "epoch": 0.5, "tokens": 10, "supervised_tokens": 5, "step_seconds": 2.0,
          "logged_steps": 2, "memory_bytes": 7}  # fmt: skip


def test_records_are_summed_up() -> None:
    facts = training_facts(
        [RECORD, RECORD | {"step": 2, "loss": None}, {"event": "gradients", "step": 1, "without": ["a"]}],
        "plain",
        repeats=True,
    )
    assert (facts.steps, facts.tokens, facts.seconds, facts.first_loss) == (2, 20, 8.0, 2.0)
    assert math.isnan(facts.last_loss)
    assert facts.without_gradient == ["a"]


@pytest.mark.parametrize("key", ["loss", "tokens", "supervised_tokens", "step_seconds", "logged_steps", "memory_bytes"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, True, "x", [1], {}])
def test_what_is_no_measured_number_is_refused(key: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        training_facts([RECORD | {key: value}], "plain", repeats=True)


@pytest.mark.parametrize("value", [10**7, None])
def test_names_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        training_facts([RECORD, {"event": "gradients", "without": value}], "plain", repeats=True)
