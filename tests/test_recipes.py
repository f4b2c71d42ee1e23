"""The main job, whole: what it writes, that only the adapter changes, and that nothing half-written is left behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.recipes import finetune
from slimtune.run.folder import RunFolder

QUICK: dict[str, Any] = {
    "samples": 0,
    "max_steps": 3,
    "max_length": 128,
    "micro_batch": 1,
    "gradient_accumulation": 2,
    "warmup": 0.0,
}


def train(model: Path, data: Path, output: Path, **values: Any) -> RunFolder:
    return finetune(Config.make(model=str(model), data=str(data), output=output, **{**QUICK, **values}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, requests_file: Path) -> RunFolder:
    return train(tiny_model, requests_file, tmp_path_factory.mktemp("runs") / "run", learning_rate=1e-2)


def test_only_the_adapter_is_saved(run: RunFolder) -> None:
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    modules = {name.split(".self_attn.")[-1].split(".lora_")[0] for name in tensors}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    weights = [
        path for path in run.adapter.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    ]
    assert [path.name for path in weights] == ["adapter_model.safetensors"]
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert config["task_type"] == "CAUSAL_LM"
    assert (run.adapter / "chat_template.jinja").is_file()
    assert (run.adapter / "tokenizer.json").is_file()


def test_the_adapter_learned_and_is_finite(run: RunFolder) -> None:
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    # B starts at zero: what isn't zero was trained.
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.abs().max() > 0, name


def test_plain_peft_loads_it(run: RunFolder, tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([[1, 4093, 198, 2427]])
    with torch.no_grad():
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, run.adapter)(ids).logits
    assert not torch.equal(before, after)


def test_the_facts_are_the_runs(run: RunFolder) -> None:
    facts = run.read_json(run.facts_file)
    assert facts["base"]["fingerprint_before"] == facts["base"]["fingerprint_after"]
    assert facts["adapter"]["class_before"] == "LlamaForCausalLM"
    assert facts["adapter"]["class_after"].startswith("PeftModel")
    assert facts["adapter"]["wrapped_by"] == "trl.SFTTrainer"
    assert facts["adapter"]["modules"] == {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
    assert (facts["adapter"]["adapted_layers"], facts["adapter"]["layers"]) == (2, 2)
    assert facts["adapter"]["adapted_weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64)
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert facts["adapter"]["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["adapter"]["file_bytes"] == (run.adapter / "adapter_model.safetensors").stat().st_size
    assert facts["training"]["steps"] == 3
    records = [record for record in run.metrics() if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert facts["training"]["tokens"] == sum(record["tokens"] for record in records)
    assert facts["training"]["first_loss"] == records[0]["loss"]
    assert facts["optimizer"]["parameters"] == facts["adapter"]["trainable_parameters"]


def test_the_recorded_config_is_what_ran(run: RunFolder) -> None:
    config = run.config()
    assert "auto" not in (config.compute_dtype, config.optim, config.save_steps, config.targets)
    assert config.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert config.output == run.path
    assert (config.max_steps, config.learning_rate) == (3, 1e-2)


def test_the_same_seed_gives_the_same_bytes(
    run: RunFolder, tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    again = train(tiny_model, requests_file, tmp_path / "again", learning_rate=1e-2)
    other = train(tiny_model, requests_file, tmp_path / "other", learning_rate=1e-2, seed=43)
    assert digest(again) == digest(run)
    assert digest(other) != digest(run)


@pytest.mark.parametrize(
    "values",
    [
        {"engine": "plain"},
        {"packing": False, "micro_batch": 3},
        {"targets": "all-linear", "rslora": True},
        {"dora": True},
        {"quantization": "none", "lora_init": "pissa"},
        {"modules_to_save": "lm_head"},
        {"rank_pattern": {"q_proj": 4}},
        {"compute_dtype": "bf16"},
        {"optim": "adamw_torch"},
        {"eval_share": 0.2, "eval_steps": 1},
    ],
    ids=lambda values: ",".join(values),
)
def test_what_people_ask_for_trains(
    values: dict[str, Any], tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    run = train(tiny_model, requests_file, tmp_path / "run", **values)
    facts = run.read_json(run.facts_file)
    assert facts["base"]["fingerprint_before"] == facts["base"]["fingerprint_after"]
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    if "eval_share" in values:
        assert [record["step"] for record in run.metrics() if "eval_loss" in record] == [0, 1, 2, 3]


def test_the_engine_and_the_plain_stack_learn_the_same(tiny_model: Path, requests_file: Path, tmp_path: Path) -> None:
    losses = {}
    for engine in ("fused", "plain"):
        run = train(tiny_model, requests_file, tmp_path / engine, engine=engine, lora_dropout=0.0, learning_rate=1e-2)
        losses[engine] = [record["loss"] for record in run.metrics() if "loss" in record]
    assert losses["fused"][0] == pytest.approx(losses["plain"][0], rel=2e-5)
    # A gradient's last bit may choose another sign of Adam's first update, or another 8-bit code of its state.
    assert losses["fused"][1:] == pytest.approx(losses["plain"][1:], rel=2e-4)
    assert len(losses["fused"]) == len(losses["plain"]) == 3


def test_a_formatting_func_from_python(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"frage": f"What is {n}?", "antwort": f"{n}."}) + "\n" for n in range(40)))
    config = Config.make(model=str(tiny_model), data=str(data), output=tmp_path / "run", **QUICK)
    run = finetune(
        config,
        formatting_func=lambda row: [
            {"role": "user", "content": row["frage"]},
            {"role": "assistant", "content": row["antwort"]},
        ],
    )
    assert run.read_json(run.facts_file)["data"]["rows"] == 40


def test_an_existing_run_is_not_overwritten(run: RunFolder, tiny_model: Path, requests_file: Path) -> None:
    before = digest(run)
    with pytest.raises(UserError, match="exists and is not empty"):
        train(tiny_model, requests_file, run.path)
    assert digest(run) == before


def test_a_run_written_over_is_back_when_the_new_one_never_begins(
    tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    run = train(tiny_model, requests_file, tmp_path / "run")
    before = digest(run)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        train(tiny_model, bad, run.path, overwrite=True)
    assert digest(run) == before
    train(tiny_model, requests_file, run.path, overwrite=True, seed=7)
    assert digest(run) != before
    assert not (run.path / ".replaced").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ('{"messages": 3}\n', "data.jsonl:1")],
)
def test_bad_data_leaves_nothing_behind(text: str, message: str, tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    with pytest.raises(UserError) as caught:
        train(tiny_model, data, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": "q_porj"}, "Did you mean 'q_proj'?"),
        ({"targets": "nothing_like_it"}, "Its linear layers are"),
        ({"modules_to_save": "lm_haed"}, "Did you mean 'lm_head'?"),
        ({"layers": "1,2"}, "Layers count from 0 to 1."),
        ({"optim": "adamw_8bits"}, "Did you mean 'adamw_8bit'?"),
        ({"report_to": "wandb"}, "pip install wandb"),
    ],
)
def test_a_name_that_is_not_there_is_said(
    values: dict[str, Any], message: str, tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train(tiny_model, requests_file, tmp_path / "run", **values)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_of_one_step_learns(tiny_model: Path, requests_file: Path, tmp_path: Path) -> None:
    run = train(tiny_model, requests_file, tmp_path / "run", max_steps=1, warmup=0.03)
    assert run.read_json(run.facts_file)["verified"]["outputs_differ"]


def test_no_data_is_said(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no data"):
        finetune(Config.make(model=str(tiny_model)))


def digest(run: RunFolder) -> str:
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_an_export_asked_for_in_the_config_follows_the_training(
    tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    run = train(tiny_model, requests_file, tmp_path / "run", export="f16")
    folder = run.path / "export" / "f16"
    assert {path.name for path in folder.iterdir()} == {"run-f16.gguf", "Modelfile", "parity.json"}


def test_what_an_export_needs_is_checked_before_the_training(
    tiny_model: Path, requests_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="llama-quantize is not installed"):
        train(tiny_model, requests_file, tmp_path / "run", export="q8_0,q4_k_m")
    assert not (tmp_path / "run").exists()
