"""Other tools' configs: named, each key told, translated into one that loads and means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slimtune.cli.config import from_foreign
from slimtune.config import Config, load_config
from slimtune.errors import UserError
from slimtune.foreign import recognised, translated

# name: (the file, what slimtune's config of the same meaning has beside slimtune's defaults)
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "axolotl": (
        {
            "base_model": "owner/base", "load_in_4bit": True, "adapter": "qlora", "lora_model_dir": None,
            "datasets": [{"path": "owner/rows", "type": "chat_template", "split": "extra", "field_messages": "talk"},
                         {"path": "json", "data_files": ["a.jsonl"], "field_messages": "talk"}],
            "val_set_size": 0.1, "early_stopping_patience": 3, "output_dir": "out", "sequence_len": 4096,
            "sample_packing": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
            "lora_target_modules": ["q_proj", "v_proj"], "gradient_accumulation_steps": 4, "micro_batch_size": 2,
            "num_epochs": 2, "optimizer": "paged_adamw_8bit", "lr_scheduler": "cosine", "learning_rate": "1e-4",
            "bf16": "auto", "warmup_ratio": 0.1, "flash_attention": True, "evals_per_epoch": 4, "wandb_project": None,
            "chat_template": "qwen3", "excess_length_strategy": "raise", "weight_decay": 0.01,
        },
        {
            "model": "owner/base", "quantization": "nf4", "data": ("owner/rows:extra", "a.jsonl"),
            "map": {"messages": "talk"}, "eval_share": 0.1, "early_stopping": 3, "output": Path("out"),
            "max_length": 4096, "packing": True, "lora_r": 32, "lora_alpha": 16, "targets": ("q_proj", "v_proj"),
            "gradient_accumulation": 4, "micro_batch": 2, "epochs": 2.0, "optim": "paged_adamw_8bit",
            "learning_rate": 1e-4, "warmup": 0.1, "overlong": "error", "weight_decay": 0.01,
        },
    ),
    "LLaMA-Factory": (
        {
            "model_name_or_path": "owner/base", "quantization_bit": 4, "stage": "sft", "do_train": True,
            "finetuning_type": "lora", "lora_rank": 16, "lora_target": "q_proj,v_proj", "dataset": "one,two",
            "dataset_dir": "sets", "max_samples": 500, "template": "qwen3", "cutoff_len": 1024, "val_size": 0.05,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
            "num_train_epochs": 2.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
            "ddp_timeout": 180000000, "mask_history": True, "neat_packing": True, "save_total_limit": 1,
            "overwrite_cache": True, "report_to": "none",
        },
        {
            "model": "owner/base", "quantization": "nf4", "lora_r": 16, "targets": ("q_proj", "v_proj"),
            "data": ("sets:one#500", "sets:two#500"), "max_length": 1024, "eval_share": 0.05, "micro_batch": 1,
            "gradient_accumulation": 8, "learning_rate": 1e-4, "epochs": 2.0, "warmup": 0.1, "compute_dtype": "bf16",
            "train_on": "last", "packing": True, "keep_checkpoints": 2, "lora_dropout": 0.0,
            "optim": "adamw_torch_fused",
        },
    ),
    "mlx-lm": (
        {
            "model": "owner/base", "train": True, "fine_tune_type": "dora", "data": "rows", "seed": 3,
            "num_layers": 16, "batch_size": 2, "iters": 1200, "grad_accumulation_steps": 4, "learning_rate": 1e-5,
            "steps_per_eval": 200, "save_every": 100, "adapter_path": "out", "max_seq_length": 1024,
            "mask_prompt": True, "optimizer": "adamw",
            "lora_parameters": {"rank": 16, "scale": 2.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
            "lr_schedule": {"name": "cosine_decay", "warmup": 120, "arguments": [1e-5, 1000, 1e-7]},
        },
        {
            "model": "owner/base", "dora": True, "data": ("rows",), "seed": 3, "micro_batch": 2, "max_steps": 300,
            "gradient_accumulation": 4, "learning_rate": 1e-5, "eval_steps": 50, "save_steps": 25,
            "output": Path("out"), "max_length": 1024, "train_on": "last", "optim": "adamw_torch",
            "weight_decay": 0.01, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "targets": ("q_proj",),
            "lr_scheduler": "cosine", "warmup": 0.1, "packing": False,
        },
    ),
    "TRL": (
        {
            "model_name_or_path": "owner/base", "dataset_name": "owner/rows", "dataset_train_split": "part",
            "use_peft": True, "lora_target_modules": "all-linear", "max_length": 2048, "max_steps": 200,
            "warmup_steps": 10, "assistant_only_loss": True, "packing": True, "dtype": "bfloat16",
            "gradient_checkpointing": True, "eos_token": "<|im_end|>", "load_in_4bit": True,
        },
        {
            "model": "owner/base", "data": ("owner/rows:part",), "targets": "all-linear", "max_steps": 200,
            "warmup": 0.05, "packing": True, "compute_dtype": "bf16", "lora_r": 16, "lora_alpha": 32,
            "micro_batch": 8, "gradient_accumulation": 1, "learning_rate": 2e-5, "lr_scheduler": "linear",
            "optim": "adamw_torch_fused", "double_quant": False,
        },
    ),
    "ms-swift": (
        {
            "model": "owner/base", "tuner_type": "lora", "dataset": ["rows.jsonl#500"], "val_dataset": "held.jsonl",
            "target_modules": "all-linear", "lora_rank": 16, "quant_method": "bnb", "quant_bits": 4,
            "loss_scale": "last_round", "truncation_strategy": "delete", "torch_dtype": "bfloat16",
            "columns": {"frage": "query", "antwort": "response"}, "max_length": 4096, "system": "Be brief.",
            "gradient_accumulation_steps": 16,
        },
        {
            "model": "owner/base", "data": ("rows.jsonl#500",), "eval": ("held.jsonl",), "targets": "all-linear",
            "lora_r": 16, "lora_alpha": 32, "quantization": "nf4", "train_on": "last", "overlong": "drop",
            "compute_dtype": "bf16", "map": {"instruction": "frage", "output": "antwort"}, "max_length": 4096,
            "gradient_accumulation": 16, "learning_rate": 1e-4, "weight_decay": 0.1, "packing": False,
            "optim": "adamw_torch_fused",
        },
    ),
}  # fmt: skip


@pytest.fixture(params=FILES)
def tool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def written(tmp_path: Path, values: dict[str, Any]) -> Path:
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def test_a_translated_file_means_the_same(tmp_path: Path, tool: str) -> None:
    values, expected = FILES[tool]
    text = from_foreign(written(tmp_path, values))
    own = tmp_path / "own.yaml"
    own.write_text(text, encoding="utf-8")
    assert load_config(own) == Config(**expected)
    for key in values:
        assert f"# {key}" in text


def test_every_key_is_told_when_it_is_given_to_slimtune(tmp_path: Path, tool: str) -> None:
    values, _ = FILES[tool]
    file = written(tmp_path, values)
    with pytest.raises(UserError, match=r"other\.yaml is ") as refused:
        load_config(file)
    assert refused.value.what == f"config file {file} is {tool}'s"
    assert f"slimtune config --from {file}" in refused.value.way_out
    told = dict(line.split(maxsplit=1) for line in str(refused.value).splitlines()[1:-2])
    assert list(told) == list(values)


def test_each_rule_leads_to_keys_that_are_slimtunes(tool: str) -> None:
    values, _ = FILES[tool]
    found = recognised(values)
    assert found is not None
    assert found.name == tool
    for line in translated({**found.defaults, **values}, found):
        assert line.becomes.keys() <= Config.model_fields.keys(), line.key
        assert line.becomes or line.note, line.key
        assert not any(word in line.note for word in ("None", "{")), line.key


def test_what_cannot_be_translated_is_said_beside_its_value(tmp_path: Path) -> None:
    values = {
        "base_model": "owner/base", "sequence_len": 512, "load_in_8bit": True, "eot_tokens": ["a"], "my_key": 4,
        "lr_scheduler": "one_cycle", "save_steps": 0.25, "val_set_size": 100, "warmup_steps": 10, "note": "a\nb",
        "adapter": "llama-adapter", "lora_r": 0,
    }  # fmt: skip
    text = from_foreign(written(tmp_path, values))
    for line in (
        "# my_key: 4 — no counterpart",
        "# lr_scheduler: one_cycle — one_cycle: lr_scheduler is linear, cosine, constant or constant_with_warmup",
        "# save_steps: 0.25 — 0.25: slimtune counts in whole optimizer steps",
        "# val_set_size: 100 — eval_share is a share of the rows: 100 over all of them",
        "# warmup_steps: 10 — warmup is a share of the steps: 10 steps over all of them",
        "# adapter: llama-adapter — llama-adapter: slimtune trains LoRA",
        "# lora_r: 0 — lora_r can't be that: It is at least 1.",
    ):
        assert line in text.splitlines()
    assert yaml.safe_load(text)["max_length"] == 512


@pytest.mark.parametrize("named", ["data.jsonl", ["data.jsonl"], [{"path": "data.jsonl", "type": "chat_template"}]])
def test_a_data_set_may_be_a_path_alone(tmp_path: Path, named: object) -> None:
    values = {"base_model": "owner/base", "sequence_len": 512, "datasets": named}
    assert yaml.safe_load(from_foreign(written(tmp_path, values)))["data"] == ["data.jsonl"]


def test_options_of_a_data_set_that_become_nothing_are_told(tmp_path: Path) -> None:
    same = {
        "path": "a.jsonl", "type": "chat_template", "split": "train", "field_messages": "messages",
        "roles_to_train": ["assistant"], "train_on_eos": "turn", "message_field_training": "train", "ds_type": "json",
        "message_property_mappings": {"role": "from", "content": "value"},
    }  # fmt: skip
    other = {
        "path": "b.jsonl", "split": "train[:10%]", "roles_to_train": ["user"], "train_on_eos": "none", "shards": 10,
        "message_field_training": "learn", "temperature": 2,
        "type": {"format": "[INST] {instruction}", "system_prompt": "Be brief."},
    }  # fmt: skip
    values = {"base_model": "owner/base", "sequence_len": 512, "datasets": [same, other], "test_datasets": [other]}
    text = from_foreign(written(tmp_path, values))
    told = [line[2:].split(":")[0] for line in text.splitlines() if "datasets[" in line]
    options = [*(name for name in other if name not in ("path", "type")), "type.format", "type.system_prompt"]
    assert told == [f"{key}.{name}" for key in ("datasets[1]", "test_datasets[0]") for name in options]
    assert "# datasets[1].split: train[:10%] — all rows of a file are taken; data: FILE#500 takes a sample" in text
    with pytest.raises(UserError) as refused:
        load_config(written(tmp_path, values))
    assert "datasets[1].roles_to_train" in str(refused.value)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ([{"path": "a.jsonl"}, {"path": "b.jsonl", "type": "completion", "field": "body"}], "read in several ways"),
        ([{"path": "a.jsonl"}, {"path": "b.jsonl", "field_messages": "talk"}], "read in several ways"),
        ([{"path": "owner/name", "data_files": ["a.jsonl"]}], "single files of a hub's data set aren't taken"),
    ],
)
def test_data_sets_that_one_config_cannot_name_are_left_out_with_the_reason(
    tmp_path: Path, named: object, said: str
) -> None:
    text = from_foreign(written(tmp_path, {"base_model": "owner/base", "sequence_len": 512, "datasets": named}))
    assert said in text
    assert not yaml.safe_load(text).keys() & {"data", "format", "map"}


def test_files_of_a_folder_are_named_in_it(tmp_path: Path) -> None:
    named = [{"path": "rows", "data_files": ["a.jsonl"]}, {"path": "json", "data_files": "b.json"}]
    text = from_foreign(written(tmp_path, {"base_model": "owner/base", "sequence_len": 512, "datasets": named}))
    assert yaml.safe_load(text)["data"] == ["rows/a.jsonl", "b.json"]


@pytest.mark.parametrize(
    ("said", "train_on"),
    [
        ({}, "all"),
        ({"assistant_only_loss": False}, "all"),
        ({"assistant_only_loss": True}, "assistant"),
        ({"assistant_only_loss": True, "completion_only_loss": False}, "assistant"),
        ({"completion_only_loss": True}, "completion"),
        ({"completion_only_loss": False}, "all"),
        ({"completion_only_loss": False, "assistant_only_loss": False}, "all"),
    ],
)
def test_trl_learns_every_token_unless_told_otherwise(tmp_path: Path, said: dict[str, bool], train_on: str) -> None:
    text = from_foreign(
        written(tmp_path, {"model_name_or_path": "a/b", "dataset_name": "c/d", "use_peft": True} | said)
    )
    made = yaml.safe_load(text)
    assert made.get("train_on", "assistant") == train_on
    assert made["epochs"] == 3.0
    told = [line for line in text.splitlines() if "train_on: completion" in line and line.startswith("train_on: all")]
    assert len(told) == ("completion_only_loss" not in said and train_on == "all")


def test_a_file_of_nobodys_is_no_tools(tmp_path: Path) -> None:
    assert recognised({"lora_rank": 4}) is None
    assert recognised({"model": "a", "learning_rate": 1e-4}) is None
    with pytest.raises(UserError, match="unknown config key 'lora_rank'"):
        load_config(written(tmp_path, {"lora_rank": 4}))
    with pytest.raises(UserError, match="is slimtune's"):
        from_foreign(written(tmp_path, {"lora_r": 4}))
    with pytest.raises(UserError, match="is the file of no tool that is known here"):
        from_foreign(written(tmp_path, {"compute_environment": "LOCAL"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iters", "many"),
        ("iters", float("inf")),
        ("grad_accumulation_steps", "x"),
        ("lora_parameters", {"rank": "x", "scale": "y"}),
        ("lora_parameters", {"rank": None, "scale": None}),
        ("lr_schedule", {"name": "cosine_decay", "warmup": "a lot"}),
        ("lr_schedule", {"name": ["cosine_decay"]}),
        ("optimizer", ["adam"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_said_beside_its_key(tmp_path: Path, key: str, value: object) -> None:
    text = from_foreign(written(tmp_path, {"model": "m", "iters": 10, "fine_tune_type": "lora", key: value}))
    assert "isn't of the kind that belongs there" in text
    assert yaml.safe_load(text)["model"] == "m"
