"""Targets: the names that PEFT gets hit exactly what was meant, by PEFT's own wrapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimtune.adapter.lora import coverage, give_dropout_, lora_config
from slimtune.adapter.targets import default_targets, find_targets
from slimtune.base.load import load_base
from slimtune.base.packed import PackedTensor, unpack_
from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.families import read_family
from slimtune.hardware import Hardware
from tests.families.tiny import made, save, skeleton


def config_of(**values: Any) -> Config:
    return Config.make(**{"lora_r": 4, "targets": "all-linear", **values})


def wrapped(model: Any, config: Config) -> Any:
    return get_peft_model(model, lora_config(config, find_targets(config, model)))


def adapted(model: Any) -> set[str]:
    """Full names of what carries an adapter; of a stack, the parameter's."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (module.lora_A or module.lora_embedding_A):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            own = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            names.add(name if own == "weight" else f"{name}.{own}")
    return names


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mistral", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("qwen2", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("qwen3", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("phi3", ("o_proj", "qkv_proj")),
        ("gpt2", ("c_attn", "attn.c_proj")),
        ("falcon", ("query_key_value", "dense")),
        ("falcon_h1", ("in_proj", "q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_the_default_of_a_family(model_type: str, names: tuple[str, ...]) -> None:
    found, reason = default_targets(skeleton(model_type))
    assert found == names
    assert reason.startswith("the projections of what mixes tokens: ")


FAMILIES = (
    "llama", "phi3", "gpt2", "gemma3", "mixtral", "gpt_oss", "glm4_moe", "afmoe", "deepseek_v3", "qwen3_next",
    "qwen3_5_text", "falcon_h1", "nemotron_h", "lfm2_moe", "zamba2", "jetmoe", "longcat_flash", "phi4_multimodal",
)  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_peft_hits_what_is_meant(model_type: str) -> None:
    """Default and all-linear: PEFT wraps exactly the parts of the family, nothing of a tower, a router or the head."""
    family = read_family(skeleton(model_type))
    for targets, parts in (("auto", ("attention",)), ("all-linear", ("attention", "mlp", "experts"))):
        model = skeleton(model_type)
        names = default_targets(model)[0] if targets == "auto" else targets
        expected = {name for part in parts for name in family.names(part)}
        assert adapted(wrapped(model, config_of(targets=names))) == {
            name.removesuffix(".weight") for name in expected
        }, targets


def test_a_dense_layer_beside_experts_is_adapted() -> None:
    """PEFT takes ``gate_proj`` for experts' in these families, and left dense and shared feed-forwards out."""
    model = skeleton("glm4_moe")
    names = adapted(wrapped(model, config_of()))
    assert "model.layers.0.mlp.gate_proj" in names  # dense
    assert "model.layers.1.mlp.shared_experts.down_proj" in names
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert not any(".gate." in f"{name}." for name in names)  # the router


def test_what_peft_would_lose_is_left_out() -> None:
    """A rule for Laguna's weight files renames its shared experts' adapters too, and plain PEFT finds none there."""
    model = skeleton("laguna")
    targets = find_targets(config_of(), model)
    assert {name: "PEFT" in reason for name, reason in targets.left_out.items()} == {
        f"shared_experts.{name}_proj": True for name in ("gate", "up", "down")
    }
    assert not any("shared_experts" in name for name in adapted(wrapped(model, config_of())))


def test_words_and_names_go_together() -> None:
    names = adapted(wrapped(skeleton("qwen3_moe"), config_of(targets="v_proj,experts")))
    assert {name.rsplit(".", 1)[-1] for name in names} == {"v_proj", "gate_up_proj", "down_proj"}
    # A name means every linear layer and stack that ends so.
    names = adapted(wrapped(skeleton("glm4_moe"), config_of(targets="down_proj")))
    assert {name.split(".", 3)[-1] for name in names} == {
        "mlp.down_proj", "mlp.shared_experts.down_proj", "mlp.experts.down_proj",
    }  # fmt: skip


def test_some_layers_of_experts() -> None:
    names = adapted(wrapped(skeleton("qwen3_moe"), config_of(layers="1,2")))
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert sum("experts" in name for name in names) == 4


@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("qwen3_moe", {"targets": "gate_proj"}, "Did you mean 'gate_up_proj'?"),
        ("qwen3_moe", {"targets": "xyz"}, "Its experts lie in experts.down_proj, experts.gate_up_proj."),
        ("qwen3_moe", {"targets": "expert"}, "Did you mean 'experts'?"),
        ("llama", {"targets": "experts"}, "has none of these"),
        ("falcon_h1", {"targets": "q_proj,out_proj"}, "The model's code takes its weight past it"),
        ("gemma3", {"targets": "fc1"}, "not in the part that reads text"),
        ("mixtral", {"targets": "gate"}, "It is no linear layer."),
        ("mixtral", {"dora": True}, "plain LoRA alone"),
        ("mixtral", {"quantization": "none", "lora_init": "pissa"}, "plain LoRA alone"),
        ("xlnet", {"targets": "auto"}, "Name modules by the end of their names"),
    ],
)
def test_what_cant_be_had_is_said(model_type: str, values: dict[str, Any], message: str) -> None:
    model = skeleton(model_type)
    make = default_targets if values.get("targets") == "auto" else lambda model: wrapped(model, config_of(**values))
    with pytest.raises(UserError) as caught:
        make(model)
    assert message in str(caught.value)


def test_the_experts_of_a_published_size_are_counted() -> None:
    """Qwen3-30B-A3B: r=16 on all of its experts is 629 million parameters."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    shape = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151936,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    total = sum(parameter.numel() for parameter in model.parameters())
    config = config_of(lora_r=16)
    targets = find_targets(config, model)
    with torch.device("meta"):
        covered = coverage(get_peft_model(model, lora_config(config, targets)), targets)
    assert covered.expert_parameters == 629_145_600
    assert (covered.adapted_layers, covered.layers) == (48, 48)
    embeddings_routers_norms = 2 * 151936 * 2048 + 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    assert covered.adapted_weights == total - embeddings_routers_norms


def test_dropout_stays_where_peft_has_it(tmp_path: Path) -> None:
    """Experts have none; the linear layers keep theirs, the file says 0, and plain PEFT gives equal logits."""
    ids = torch.tensor([[5, 7, 11, 13, 17, 19]])
    config = config_of(lora_dropout=0.5)
    model = wrapped(made("glm4_moe"), config)
    give_dropout_(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        again = PeftModel.from_pretrained(made("glm4_moe"), tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        assert not torch.equal(again(ids).logits, made("glm4_moe")(ids).logits)


def test_experts_in_4_bits_get_the_same_gradients(tmp_path: Path, hardware: Hardware) -> None:
    """Both of a stack's nested adapters count, on packed stacks as on the same numbers unpacked."""
    folder = save("glm4_moe", tmp_path / "base")
    ids = torch.tensor([[5, 7, 11, 13, 17, 19, 23, 29, 31]])
    config = config_of(lora_r=2, lora_dropout=0.0)
    found: list[dict[str, torch.Tensor]] = []
    for plain in (False, True):
        model: Any = load_base(str(folder), hardware, compute_dtype="fp32").model
        if plain:
            model = model.dequantize(dtype=torch.float32)
            unpack_(model)
        assert plain is not any(isinstance(parameter, PackedTensor) for parameter in model.parameters())
        model = wrapped(model, config)
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if ".lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    packed, unpacked = found
    assert packed.keys() == unpacked.keys()
    for name, gradient in unpacked.items():
        assert gradient.any(), name
        torch.testing.assert_close(packed[name], gradient)


def test_patterns_reach_what_is_adapted_as_a_tensor_too() -> None:
    """The dense feed-forward of DeepSeek's first layer, whose names PEFT takes for experts'."""
    model = wrapped(made("deepseek_v3"), config_of(rank_pattern={"down_proj": 2, "q_b_proj": 3}, lora_dropout=0.0))
    ranks = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            name = path.removeprefix("base_model.model.model.layers.").replace(".base_layer", "")
            own = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            ranks[name if own == "weight" else f"{name}.{own}"] = module.r["default"]
    assert ranks["0.mlp.down_proj"] == ranks["1.mlp.shared_experts.down_proj"] == ranks["1.mlp.experts.down_proj"] == 2
    assert ranks["0.mlp.up_proj"] == ranks["1.mlp.experts.gate_up_proj"] == 4
    assert ranks["0.self_attn.q_b_proj"] == 3


def test_a_pattern_for_nothing_that_gets_an_adapter_is_refused() -> None:
    model = skeleton("qwen3_moe")
    find_targets(config_of(alpha_pattern={r"layers\.1\..*_proj": 3, "experts.down_proj": 2}), model)
    for option in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UserError, match=f"{option} 'experts' is the name of nothing that gets an adapter"):
            find_targets(config_of(**{option: {"experts": 2}}), model)
    with pytest.raises(UserError, match="'o_proj' is the name of nothing"):
        find_targets(config_of(targets="q_proj", rank_pattern={"o_proj": 2}), model)


@pytest.mark.skipif("unlimited_ocr" not in CONFIG_MAPPING, reason="this Transformers has no such family")
@pytest.mark.parametrize("targets", ["auto", "all-linear", ("q_proj",)])
def test_where_nothing_fits_the_reason_is_told(targets: Any) -> None:
    """PEFT renames this family's adapters once more when it reads them (Transformers 5.23)."""
    model = skeleton("unlimited_ocr")
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj of UnlimitedOcr") as refusal:
        default_targets(model) if targets == "auto" else find_targets(config_of(targets=targets), model)
    assert refusal.value.rule == "PEFT reads its adapter back under another name."
