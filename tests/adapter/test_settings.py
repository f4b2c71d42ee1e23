"""What an adapter's config and weights may say; each case is one that PEFT takes, or ends on with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimtune.adapter.files import attach_adapter
from slimtune.adapter.settings import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config
from slimtune.errors import UserError
from tests.training.tiny import tiny

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Plain PEFT's, without a passport, with values that change every answer."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    wrapped = get_peft_model(base(), lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def base() -> Any:
    return tiny("llama")


def edit(adapter: Path, **values: Any) -> None:
    file = adapter / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_it_opens(adapter: Path) -> None:
    names = [name for name, _ in attach_adapter(base(), adapter).named_parameters()]
    assert any("lora_A" in name for name in names)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 10**9),
        ("r", 5),
        ("r", "4"),
        ("r", 4.0),
        ("r", True),
        ("r", -1),
        ("rank_pattern", {"q_proj": 5000}),
        ("rank_pattern", ["q_proj"]),
        ("lora_alpha", 0),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("lora_alpha", -8),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("lora_dropout", 2),
        ("bias", "some"),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1, 2]),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", "0"),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [10**12]),
        ("layer_replication", [[0, 10**7]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_dora", "yes"),
        ("task_type", "SEQ_CLS"),
        ("base_model_name_or_path", {"x": 1}),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
    ],
)
def test_a_field_that_can_not_be_is_named(field: str, value: Any, adapter: Path) -> None:
    edit(adapter, **{field: value})
    with pytest.raises(UserError) as refused:
        adapter_config(adapter)
    said = str(refused.value)
    assert field in said or "rank" in said or "adapter" in said
    assert len(said) < 1000


@pytest.mark.parametrize("indices", [[10**9], {"embed_tokens": [2**31 - 1]}])
def test_no_vocabulary_is_made_for_a_number(indices: Any, adapter: Path) -> None:
    edit(adapter, trainable_token_indices=indices)
    with pytest.raises(UserError, match="trains row"):
        attach_adapter(base(), adapter)


def first(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    name = min(tensors)
    return {**tensors, name: change(tensors[name])}


CHANGES: dict[str, tuple[Change, str]] = {
    "no tensors": (lambda t: {}, "lacks"),
    "one missing": (lambda t: {name: t[name] for name in sorted(t)[1:]}, "lacks"),
    "no B": (lambda t: {name: value for name, value in t.items() if "lora_A" in name}, "lacks"),
    "renamed": (lambda t: {name.replace("layers", "blocks"): value for name, value in t.items()}, "lacks"),
    "without prefix": (lambda t: {name.removeprefix("base_model.model."): value for name, value in t.items()}, "lacks"),
    "one more": (lambda t: {**t, "x.lora_A.weight": torch.zeros(4, 2)}, "unknown"),
    "one more, named as PEFT names copies": (lambda t: {**t, "x.modules_to_save.weight": torch.zeros(2)}, "unknown"),
    "a NaN": (lambda t: first(t, lambda value: value.index_fill(0, torch.tensor([0]), float("nan"))), "NaN"),
    "an infinity": (lambda t: first(t, lambda value: torch.full_like(value, -float("inf"))), "infinity"),
    "integers": (lambda t: first(t, lambda value: value.to(torch.int8)), "I8"),
    "another shape": (lambda t: first(t, lambda value: value[:, :-1].contiguous()), "does not fit"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_are_not_the_adapters_are_refused(name: str, adapter: Path) -> None:
    change, message = CHANGES[name]
    save_file(change(load_file(adapter / ADAPTER_WEIGHTS)), adapter / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=message):
        attach_adapter(base(), adapter)


def test_biases_that_trained_must_be_there(tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], bias="all")
    get_peft_model(tiny("llama", attention_bias=True), lora).save_pretrained(tmp_path)
    attach_adapter(tiny("llama", attention_bias=True), tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    biases = [name for name in tensors if "bias" in name]
    assert biases
    save_file({name: value for name, value in tensors.items() if name != biases[0]}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="lacks"):
        attach_adapter(tiny("llama", attention_bias=True), tmp_path)
