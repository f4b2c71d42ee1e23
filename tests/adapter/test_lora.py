"""Which modules can be copied, to train whole beside the adapter."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from slimtune.adapter.lora import check_names, lora_config
from slimtune.adapter.targets import find_targets
from slimtune.base.load import load_base
from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.hardware import detect
from tests.families.tiny import made, save


def test_what_lies_in_4_bits_is_not_copied_nor_more_than_was_meant(tmp_path: Path) -> None:
    model = load_base(str(save("qwen3_moe", tmp_path / "model")), detect(), compute_dtype="fp32").model

    def check(*names: str) -> None:
        check_names(Config(modules_to_save=names), model)

    check("lm_head", "embed_tokens", "model.norm", "q_norm", "mlp.gate")
    with pytest.raises(UserError, match=r"'q_proj': model.layers.0.self_attn.q_proj lies in nf4"):
        check("q_proj")
    with pytest.raises(UserError, match=r"'experts': model.layers.0.mlp.experts lies in nf4"):
        check("experts")
    with pytest.raises(UserError, match=r"'self_attn': model.layers.0.self_attn is made of other modules") as refusal:
        check("self_attn")
    assert refusal.value.way_out.endswith("q_proj,k_proj,v_proj,o_proj,q_norm,k_norm")
    with pytest.raises(UserError, match=r"'norm' is the end of model.layers.0.self_attn.q_norm too") as refusal:
        check("norm")
    assert refusal.value.way_out == "Say more of the name: --modules-to-save model.norm"


def test_a_module_has_an_adapter_or_trains_whole() -> None:
    model = made("llama")
    for saved, is_refused in (("q_proj", True), ("self_attn.q_proj", True), ("k_proj", False)):
        config = Config(targets=("q_proj", "v_proj"), modules_to_save=(saved,))
        with pytest.raises(UserError, match="is among the targets") if is_refused else nullcontext():
            lora_config(config, find_targets(config, model))


@pytest.mark.parametrize(("family", "last"), [("llama", 3), ("blt", 0), ("gpt2", 3)])
def test_layers_are_counted_on_the_model(family: str, last: int) -> None:
    model = made(family)
    check_names(Config(layers=(0, last)), model)
    with pytest.raises(UserError, match=f"layers {last + 1} is not there: .* has {last + 1}") as refusal:
        check_names(Config(layers=(0, last + 1)), model)
    assert refusal.value.rule == f"Layers count from 0 to {last}."
