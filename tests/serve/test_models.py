"""Which runs can be served together, and under which names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from slimtune.adapter.passport import issue_passport, stamp
from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.serve.models import find_all, open_all
from slimtune.serve.vllm import vllm_command
from tests.families.tiny import made, save, tokenizer


def test_names_come_from_folders_or_are_given(runs: list[Path], tiny_model: Path) -> None:
    targets = [str(runs[0]), f"mine={runs[1]}", str(tiny_model)]
    assert [model.name for model in find_all(targets)] == ["first", "mine", str(tiny_model)]
    assert [model.name for model in find_all([str(runs[0] / "adapter")])] == ["first"]
    with pytest.raises(UserError, match="both called first"):
        find_all([str(runs[0]), str(runs[0])])


def test_runs_on_different_bases_are_refused(runs: list[Path], model_folder: Path) -> None:
    with pytest.raises(UserError, match="different bases"):
        find_all([str(runs[0]), str(model_folder)])


def test_vllm_gets_the_same_models(runs: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    words = vllm_command(find_all([str(run) for run in runs]), "127.0.0.1", 8000, 16)
    assert words[:3] == ["vllm", "serve", str(tiny_model)]
    after = {word: words[at + 1] for at, word in enumerate(words) if word.startswith("--") and at + 1 < len(words)}
    assert after["--max-lora-rank"] == "16"  # the ranks are 4 and 12
    assert after["--max-loras"] == "2"
    assert after["--quantization"] == "bitsandbytes"
    assert after["--tokenizer"] == str(runs[0] / "adapter")
    at = words.index("--lora-modules")
    assert words[at + 1 : at + 3] == [f"{run.name}={run / 'adapter'}" for run in runs]
    odd = shutil.copytree(runs[0], tmp_path / "a=b")
    assert f'{{"name": "odd", "path": "{odd / "adapter"}"}}' in vllm_command(
        find_all([f"odd={odd}"]), "127.0.0.1", 8000, 16
    )


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        ({"target_parameters": ["gate_up_proj"]}, "Merge it"),
        ({"use_dora": True}, "Merge it"),
        ({"alpha_pattern": {"q_proj": 32}}, "Merge it"),
        ({"rank_pattern": {"q_proj": 2}}, "Merge it"),
        ({"bias": "lora_only"}, "Merge it"),
        ({"init_lora_weights": "pissa"}, "leave --engine vllm"),
    ],
    ids=str,
)
def test_vllm_is_not_given_what_it_would_leave_out(
    options: dict[str, Any], way_out: str, runs: list[Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    with pytest.raises(UserError, match=way_out):
        vllm_command(find_all([str(run)]), "127.0.0.1", 8000, 16)


def test_the_base_is_asked_as_the_first_run_is(tmp_path: Path) -> None:
    base, adapter = save("llama", tmp_path / "base"), tmp_path / "calm" / "adapter"
    get_peft_model(made("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(adapter)
    toned = tokenizer()
    toned.chat_template = "{{ tone }}" + str(toned.chat_template)
    toned.save_pretrained(adapter)
    config = Config(model=str(base), data=("rows.jsonl",), compute_dtype="fp32", template_vars={"tone": "calm"})
    stamp(adapter, issue_passport(config, str(base), toned))
    run, bare = open_all(find_all([str(adapter.parent)]), quantization="none", dtype="fp32").values()
    asked = run.prompt_ids([{"role": "user", "content": "Well?"}])
    assert str(toned.decode(asked)).startswith("calm")
    assert bare.prompt_ids([{"role": "user", "content": "Well?"}]) == asked
    assert bare.found.adapter is None
