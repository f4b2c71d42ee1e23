"""What a value must be is a sentence for people, in both languages."""

from __future__ import annotations

from typing import Any

import pytest

from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.words import in_chinese


@pytest.mark.parametrize(
    ("key", "value", "rule", "chinese"),
    [
        ("lora_r", "x", "It is a whole number.", "应为：整数。"),
        ("epochs", -1, "It is more than 0, or 'auto'.", "应为：大于 0，或 'auto'。"),
        ("overlong", "x", "It is one of 'drop', 'error', 'split', 'keep-end'.", "应为：其中之一：'drop', "),
        (
            "targets",
            0,
            "It is a list, or one of 'auto', 'all-linear'.",
            "应为：列表，或 其中之一：'auto'",
        ),
        ("layers", "", "It is a list of at least 1.", "应为：至少 1 项的列表。"),
        ("date", "x", "It is a date, as 2026-01-31.", "应为：日期，如 2026-01-31。"),
        ("memory", "lots", "Most GPU memory that training may take, as 4GiB;", "训练最多占用的显存，如 4GiB；"),
    ],
)
def test_a_rule_in_words(key: str, value: Any, rule: str, chinese: str) -> None:
    with pytest.raises(UserError) as refused:
        Config.make(**{key: value})
    assert refused.value.rule.startswith(rule)
    assert in_chinese(refused.value.rule).startswith(chinese)


def test_no_value_gets_the_librarys_words() -> None:
    for key in Config.model_fields:
        for value in ("x", -1, 0, 1.5, True, [1], ["x"], {"a": 1}, {"a": "b"}, "", 10**9, None, float("inf")):
            assert not _rule(key, value).startswith(("Input", "String", "Tuple", "Datetime")), (key, value)


def _rule(key: str, value: Any) -> str:
    try:
        Config.make(**{key: value})
    except UserError as refused:
        return refused.rule
    return ""
