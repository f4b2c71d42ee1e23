"""What a person can ask for: strict, documented, and the same from YAML, flags and Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtune.cli.config import documented_defaults
from slimtune.config import Config, load_config
from slimtune.errors import UserError


def test_defaults_are_the_notes_numbers() -> None:
    config = Config()
    assert config.model == "Qwen/Qwen1.5-1.8B-Chat"
    assert (config.quantization, config.double_quant) == ("nf4", True)
    assert (config.lora_r, config.alpha, config.lora_dropout) == (8, 16, 0.05)
    assert config.targets == "auto"


def test_alpha_follows_r_unless_set() -> None:
    assert Config(lora_r=32).alpha == 64
    assert Config(lora_r=32, lora_alpha=8).alpha == 8


def test_every_key_is_documented() -> None:
    undocumented = [name for name, field in Config.model_fields.items() if not field.description]
    assert undocumented == []


def test_printed_defaults_read_back_to_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(documented_defaults(), encoding="utf-8")
    assert load_config(file) == Config()


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = Config.make(targets="all-linear", map={"instruction": "frage"}, data="a.jsonl", output=Path("x"), lora_r=4)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: 4\nseed: 7\n", encoding="utf-8")
    config = load_config(file, lora_r="16")
    assert (config.lora_r, config.seed) == (16, 7)


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-4 as a string.
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\n", encoding="utf-8")
    assert load_config(file).learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": 4}, "unknown config key 'lora_rank'"),
        ({"lerning_rate": 1e-4}, "Did you mean 'learning_rate'?"),
        ({"lora_r": 0}, "config key 'lora_r' can't be 0"),
        ({"lora_dropout": 1.0}, "config key 'lora_dropout' can't be 1.0"),
        ({"overlong": "truncate"}, "It is one of 'drop', 'error', 'split', 'keep-end'."),
        ({"keep_checkpoints": 1}, "config key 'keep_checkpoints' can't be 1"),
        ({"memory": "lots"}, "config key 'memory' can't be 'lots'"),
        ({"early_stopping": 3, "eval_share": 0.0}, "early_stopping needs an evaluation"),
        ({"eval": "a.jsonl", "eval_share": 0.1}, "eval and eval_share exclude each other"),
        ({"lora_init": "loftq"}, "loftq starts from unquantised weights"),
        ({"lora_init": "pissa_niter_4"}, "pissa_niter_4 starts from unquantised weights"),
    ],
)
def test_a_refused_value_names_key_and_rule(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Config.make(**values)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert caught.value.way_out or caught.value.rule


@pytest.mark.parametrize(
    "text",
    [
        "defaults: &d\n  lora_r: 16\n  seed: 7\n<<: *d\nseed: 9\n",
        "a: &a {lora_r: 16}\nb: &b {<<: *a, seed: 9}\n<<: [*b, *a]\n",
        "a: &a {lora_r: 16, seed: 1}\n<<: *a\nseed: 9\n<<: *a\n",
    ],
)
def test_merge_keys_work_and_what_they_merge_is_no_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file) == Config(lora_r=16, seed=9)


def test_a_mapping_that_is_merged_and_has_a_keys_name_stays_that_key(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank_pattern: &r {q_proj: 4}\nalpha_pattern: {<<: *r, v_proj: 8}\n", encoding="utf-8")
    assert load_config(file) == Config(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4, "v_proj": 8})


def _bomb(line: str) -> str:
    return line.format(at=0, inside="x") + "".join(
        line.format(at=at, inside=",".join([f"*a{at - 1}"] * 9)) for at in range(1, 20)
    )


@pytest.mark.parametrize(
    "text",
    [
        _bomb("a{at}: &a{at} [{inside}]\n"),
        _bomb("a{at}: &a{at} {{k{at}: 1, <<: [{inside}]}}\n").replace("<<: [x]", "y: 1") + "<<: *a19\n",
        "a: &a\n  b: *a\n",
        "a: &a {<<: *a}\n<<: *a\n",
    ],
    ids=["lists", "merges", "a mapping in itself", "merged with itself"],
)
def test_aliases_without_bound_are_refused_before_they_grow(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.yaml is too large with its aliases"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("five", "holds a single value"),
        ("seed: 2026-13-41\n", "month must be in 1..12"),
        ("? [a, b]\n: 1\n", "found unhashable key"),
        ("<<: 5\n", "expected a mapping or list of mappings for merging"),
        ("a: " + "[" * 1500, "is nested too deeply"),
        ("lora_r: [\n", "is no valid YAML"),
        ("lora_r: 4\nlora_r: 8\n", "key 'lora_r' stands twice"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.yaml") as caught:
        load_config(file)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_of_the_base_train_no_more_than_the_rest_of_it(which: str) -> None:
    with pytest.raises(UserError, match=rf"'lora_bias' can't be '{which}'[\s\S]*biases of the base itself"):
        Config.make(model="m", data="d", lora_bias=which)


def test_a_config_cannot_be_changed_after_parsing() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]


def test_schema_is_json_and_closed() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", float("inf")),
        ("epochs", float("inf")),
        ("epochs", 1e9),
        ("watchdog", float("inf")),
        ("weight_decay", float("nan")),
        ("divergence_factor", float("inf")),
        ("lora_r", 10**9),
        ("rank_pattern", {"q_proj": 10**9}),
        ("max_length", 10**18),
        ("max_steps", 10**24),
        ("template_vars", {"a": [float("inf")]}),
        ("output", "a\0b"),
        ("output", "x" * 300),
        ("data", "rows/" + "x" * 300),
        ("model", "é" * 200),
    ],
)
def test_what_no_run_could_do_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError) as refused:
        Config.make(**{key: value})
    assert key in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
        + "targets: *a9\n",
        "a: &a [*a]\n",
        "a0: &a0 {k0: 1}\n"
        + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 10))
        + "<<: *a9\n",
        "targets: &t [" + "y" * 9000 + "]\nmodel: {a: *t, b: *t, c: *t}\n",
    ],
)
def test_aliases_cost_nothing_and_a_message_is_short(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(file)
    assert len(str(refused.value)) < 2000


def test_a_message_repeats_no_more_than_it_must() -> None:
    error = UserError("x" * 10**6 + "\x1b[31m", rule="\u202e\x07")
    assert len(str(error)) < 10_000
    assert not {"\x1b", "\x07", "\u202e"} & set(str(error))


@pytest.mark.parametrize(("given", "value"), [("10%", 0.1), ("0.1", 0.1), (0.1, 0.1), ("100 %", 1.0), ("2.5%", 0.025)])
def test_a_share_may_be_given_in_percent(given: Any, value: float) -> None:
    assert Config.make(rehearse=given).rehearse == pytest.approx(value)
    if value < 1:
        assert Config.make(eval_share=given).eval_share == pytest.approx(value)


@pytest.mark.parametrize("given", ["%", "x%", "101%", "-1%", "inf%", "10%%"])
def test_what_is_no_share_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="rehearse"):
        Config.make(rehearse=given)
