"""Whether the engine takes a run is decided before the model is wrapped, and what was promised can be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    HeliumConfig,
    PretrainedConfig,
    SmolLM3Config,
)

from slimtune.adapter.lora import lora_config
from slimtune.adapter.matched import adapted_names
from slimtune.adapter.targets import find_targets
from slimtune.config import Config
from slimtune.engine import CannotFuse, Engine
from slimtune.engine.read import fits
from slimtune.families.decoders import DECODERS
from tests.engine.models import FAMILIES, add_lora, family_config, make_base, quantize, with_tower

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "every linear layer": ({"targets": "all-linear"}, {}),
    "some layers": ({"layers": (1, 2)}, {}),
    "one projection": ({"targets": ("v_proj",)}, {}),
    "rsLoRA, another start": ({"rslora": True, "lora_init": "gaussian"}, {}),
    "the embedding": ({"targets": (*ATTENTION, "embed_tokens")}, {}),
    "the head": ({"targets": (*ATTENTION, "lm_head")}, {}),
    "a copy of the head": ({"modules_to_save": ("lm_head",)}, {}),
    "DoRA": ({"dora": True}, {}),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, {}),
    "another optimizer": ({"optim": "adamw_torch"}, {}),
    "attention dropout": ({}, {"attention_dropout": 0.1}),
    "another activation": ({}, {"hidden_act": "gelu"}),
    "a rope that grows": ({}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "a tied head": ({}, {"tie_word_embeddings": True}),
}
TAKEN = {"plain", "every linear layer", "some layers", "one projection", "rsLoRA, another start", "a tied head"}


def run_config(**settings: Any) -> Config:
    chosen: dict[str, Any] = {"model": "m", "data": "d", "optim": "adamw_8bit", "lora_r": 4, **settings}
    return Config.make(**{"targets": ATTENTION, **chosen})


def make_engine(config: Config, model: nn.Module) -> Engine:
    wrapped: Any = get_peft_model(model, lora_config(config, find_targets(config, model)))  # type: ignore[arg-type]
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Engine(wrapped, dtype=torch.float32, tokens=64)


@pytest.mark.parametrize("run", RUNS)
def test_a_reason_comes_before_wrapping_or_the_engine_can_be_made(run: str) -> None:
    options, architecture = RUNS[run]
    family = family_config("llama")
    for name, value in architecture.items():
        setattr(family, name, value)
    model = AutoModelForCausalLM.from_config(family)
    config = run_config(**options)
    before = [name for name, _ in model.named_parameters()]
    reason = fits(config, model, adapted_names(lora_config(config, find_targets(config, model)), model))
    assert [name for name, _ in model.named_parameters()] == before
    assert (reason is None) == (run in TAKEN), reason
    if reason is None:
        make_engine(config, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_in_16_bits_and_in_nf4(family: str) -> None:
    config = run_config(targets="all-linear")
    for model in (make_base(family), quantize(make_base(family), double=True)):
        assert fits(config, model, adapted_names(lora_config(config, find_targets(config, model)), model)) is None
        make_engine(config, model)


def test_the_skeleton_on_the_meta_device_says_the_same() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_config("qwen2"))
    assert fits(run_config(), model) is None
    model.config.attention_dropout = 0.5
    assert "dropout" in str(fits(run_config(), model))


def test_what_4_bits_the_engine_doesnt_read_is_said() -> None:
    model: Any = quantize(make_base("llama"), double=False)
    state = model.model.layers[2].mlp.up_proj.weight.quant_state
    state.quant_type = "fp4"
    assert "layers.2: layers.2.mlp.up_proj is quantised as fp4" in str(fits(run_config(), model))


def test_layers_of_different_sizes_are_not_computed_by_the_first_ones() -> None:
    model: Any = make_base("llama")
    if not hasattr(model.config, "per_layer_config"):
        pytest.skip("this Transformers has no configs that differ by layer")
    model.config.per_layer_config = {1: {"intermediate_size": 64}}
    assert "different sizes" in str(fits(run_config(), model))


def test_a_class_of_its_own_is_not_computed_as_transformers_is() -> None:
    model: Any = make_base("mistral")
    assert model.config.model_type in DECODERS
    model.__class__ = type("OwnMistral", (type(model),), {"__module__": "transformers_modules.own"})
    assert fits(run_config(), model) == "OwnMistral is code of its own"
    with pytest.raises(CannotFuse, match="code of its own"):
        make_engine(run_config(), model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(
            SmolLM3Config(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=211, pad_token_id=0, use_sliding_window=False, sliding_window=7,
                layer_types=["full_attention", "sliding_attention"]),
            "layers.1: layers.1 is of type sliding_attention, and its attention tells no window",
            id="a window of the masks alone",
        ),
        pytest.param(
            HeliumConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=211, pad_token_id=0, head_dim=24),
            "projections that don't make whole heads of 24",
            id="heads that don't come out",
        ),
        pytest.param(
            Glm4MoeConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=211, pad_token_id=0, head_dim=33, first_k_dense_replace=1),
            "rotates 16 columns of heads of 33",
            id="heads with a column more",
        ),
    ],
)  # fmt: skip
def test_what_modules_and_config_tell_differently_is_refused(config: PretrainedConfig, reason: str) -> None:
    assert reason in str(fits(run_config(), AutoModelForCausalLM.from_config(config)))


def test_what_of_gpt_oss_is_not_computed_is_said() -> None:
    """Sinks or biases of experts that train, other parameters of experts, adapters for the matrices' other side."""

    def refused(reason: str, change: Callable[[Any], Any], *, turned: bool = True) -> None:
        base: Any = make_base("gpt_oss")
        for layer in base.model.layers:
            layer.mlp.experts.is_transposed = turned
        model = add_lora(base)
        for layer in base.model.layers:
            layer.mlp.experts.get_base_layer().is_transposed = True
        change(base.model.layers[1])
        with pytest.raises(CannotFuse, match=f"layers.(0|1).*{reason}"):
            Engine(model, dtype=torch.float32, tokens=64)

    def experts(layer: Any) -> Any:
        return layer.mlp.experts.get_base_layer()

    refused("trains its sinks", lambda layer: layer.self_attn.sinks.requires_grad_(True))
    refused("trains its experts themselves", lambda layer: experts(layer).down_proj_bias.requires_grad_(True))
    refused("trains its router", lambda layer: layer.mlp.router.bias.requires_grad_(True))
    refused("a_scale", lambda layer: setattr(experts(layer), "a_scale", nn.Parameter(torch.ones(5))))
    refused("tell where gates are clamped", lambda layer: setattr(experts(layer), "limit", None))
    refused("other way around", lambda layer: None, turned=False)


@pytest.mark.parametrize("family", ["cohere2", "gemma2", "granite"])
def test_a_text_model_inside_another_class_is_not_scaled_as_its_own_class_does(family: str) -> None:
    """Transformers' classes with a tower leave the text model's logits as they are, or cap them."""
    model = with_tower(family_config(family))
    assert f"scales or caps logits ({family})" in str(fits(run_config(), model))
    with pytest.raises(CannotFuse, match="scales or caps logits"):
        make_engine(run_config(), model)


def test_a_plain_text_model_inside_another_class_is_computed() -> None:
    assert fits(run_config(), with_tower(family_config("qwen2"))) is None
