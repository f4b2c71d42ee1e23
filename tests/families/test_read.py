"""What is found on a model's own modules, for families whose layers are unlike."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from slimtune.config import Config
from slimtune.engine.read import fits
from slimtune.families import Family, decoder_of, read_family
from tests.families.tiny import skeleton

QKVO = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
STACKS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def in_layers(family: Family, part: str) -> Counter[str]:
    """Names of one part within their layers, each with the number of layers that have it."""
    return Counter(re.sub(r"^.*?\.\d+\.", "", name) for name in family.names(part))


@pytest.mark.parametrize(
    ("model_type", "attention", "mlp", "experts"),
    [
        ("llama", QKVO, MLP, set()),
        ("phi3", {"self_attn.qkv_proj", "self_attn.o_proj"}, {"mlp.gate_up_proj", "mlp.down_proj"}, set()),
        ("qwen3_moe", QKVO, set(), STACKS),
        ("gpt_oss", QKVO, set(), STACKS),
        ("mixtral", QKVO, set(), STACKS),
        ("gemma4_text", QKVO, MLP, set()),
        ("gemma3", QKVO, MLP, set()),
        (
            "deepseek_v3",
            {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")},
            MLP | {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
            STACKS,
        ),
        (
            "qwen3_5_text",
            QKVO | {"linear_attn.out_proj"}
            | {f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "a", "b")},
            MLP,
            set(),
        ),
        (
            "granitemoehybrid",
            QKVO | {"mamba.in_proj"},
            {"shared_mlp.input_linear", "shared_mlp.output_linear"},
            {"block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"},
        ),
        (
            "lfm2",
            {"conv.in_proj", "conv.out_proj"} | {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
            {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
            set(),
        ),
        ("gpt2", {"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}, set()),
        (
            "nemotron_h",
            {f"mixer.{name}" for name in ("in_proj", "q_proj", "k_proj", "v_proj", "o_proj")},
            {f"mixer.{name}_proj" for name in ("up", "down", "shared_experts.up", "shared_experts.down")},
            {"mixer.experts.up_proj", "mixer.experts.down_proj"},
        ),
        (
            "zaya",
            {"self_attn.o_proj"}
            | {f"self_attn.qkv_proj.{name}" for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")},
            set(),
            STACKS,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_parts_of_a_layer(model_type: str, attention: set[str], mlp: set[str], experts: set[str]) -> None:
    family = read_family(skeleton(model_type))
    assert in_layers(family, "attention").keys() == attention
    assert in_layers(family, "mlp").keys() == mlp
    assert in_layers(family, "experts").keys() == experts
    # Nemotron-H's layers are a mixer or a feed-forward each; elsewhere each layer is both.
    assert model_type == "nemotron_h" or all(layer.mixers for layer in family.layers)


def test_towers_are_no_text() -> None:
    family = read_family(skeleton("gemma3"))
    assert family.text == "model.language_model"
    assert not family.in_text("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert family.in_text("lm_head")
    inside = read_family(skeleton("phi4_multimodal"))
    assert inside.towers
    assert all(layer.path.startswith("model.layers.") for layer in inside.layers)


def test_what_the_code_reads_past_the_call_is_unfit() -> None:
    """Falcon-H1's fused kernel takes ``out_proj.weight``: PEFT refuses that name there, and Bamba's is read alike."""
    for model_type in ("falcon_h1", "bamba", "granitemoehybrid", "mamba2"):
        family = read_family(skeleton(model_type))
        unfit = {name.rsplit(".", 1)[-1] for name in family.unfit}
        assert "out_proj" in unfit, model_type
        assert not any(name.endswith("mamba.out_proj") for name in family.names("attention")), model_type
    # LFM2's out_proj is called as any layer is.
    assert not read_family(skeleton("lfm2")).unfit


def test_shared_layers_stand_once() -> None:
    """Zamba2's attention block is one module in several layers."""
    model = skeleton("zamba2")
    family = read_family(model)
    names = family.names("attention")
    assert len(names) == len(set(names))
    own = {name for name, _ in model.named_modules()}
    assert set(names) <= own


def test_families_that_nothing_here_knows_have_parts() -> None:
    for model_type in ("bloom", "olmo_hybrid", "jetmoe", "recurrent_gemma", "rwkv", "xlstm", "longcat_flash"):
        family = read_family(skeleton(model_type))
        assert len(family.layers) >= 2
        assert family.names("attention"), model_type


def test_a_head_that_is_called_decoder_is_none() -> None:
    model = skeleton("modernbert-decoder")
    assert model.get_decoder() is model.get_output_embeddings()
    assert decoder_of(model) is model
    assert fits(Config.make(compute_dtype="bf16"), model) == "the engine doesn't know models of type modernbert-decoder"
    llama = skeleton("llama")
    assert decoder_of(llama) is llama.model
