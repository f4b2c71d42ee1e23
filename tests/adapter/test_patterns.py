"""Patterns of an adapter's config: the slow ones are refused, those that programs write are taken."""

from __future__ import annotations

from typing import Any

import pytest

from slimtune.adapter import patterns
from slimtune.adapter.patterns import check_patterns
from slimtune.errors import UserError

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in range(24)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.gate_up_proj")
]

SLOW: list[dict[str, Any]] = [
    {"target_modules": "(.*)*x"},
    {"target_modules": r"((\w|\.)+)+!"},
    {"target_modules": ".*.*.*.*.*.*.*.*.*.*.*.*.*!"},
    {"target_modules": r"(?:\w|model|[a-z._0-9]|layers)+?!"},
    {"exclude_modules": r"([\w.]{1,9}){1,30}!"},
    {"rank_pattern": {r"(?:\w+\.?)+!": 4}},
    {"alpha_pattern": {"(.+)+!": 4}},
    {"layers_pattern": ["q_proj", r"(?:\w+\.?)+!"]},
    {"modules_to_save": [r"(?:\w+\.?)+!"]},
]

REAL: list[dict[str, Any]] = [
    # Unsloth's for image-text models
    {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
    },
    # LLaMA-Factory's with a frozen vision tower, and slimtune's own
    {"target_modules": r"^(?!.*patch_embed)(?!.*(?:visual|merger)).*(?:q_proj|v_proj).*"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"(model\.vision_tower|model\.projector)\..*"},
    {"rank_pattern": {r"^model\.layers\.1\d\.self_attn\.q_proj": 4}, "layers_pattern": "layers"},
    {"target_modules": "all-linear"},
]


@pytest.mark.parametrize("settings", SLOW)
def test_a_pattern_that_does_not_end_is_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 1.0)
    with pytest.raises(UserError, match=f"FILE: a pattern in {next(iter(settings))} is still being matched"):
        check_patterns("FILE", settings, NAMES)


@pytest.mark.parametrize("settings", REAL)
def test_patterns_that_programs_write_are_taken(settings: dict[str, Any]) -> None:
    check_patterns("FILE", settings, NAMES)


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "(" * 5000 + ")" * 5000, "(?P<x>a)(?P<x>b)", "\\"])
def test_what_is_no_expression_is_named(pattern: str) -> None:
    with pytest.raises(UserError, match="a pattern in target_modules is no valid regular expression"):
        check_patterns("FILE", {"target_modules": pattern}, NAMES)
