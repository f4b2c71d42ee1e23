"""Which weights lie in 4 bits, packed as they are read; and bases whose files hold other formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconH1Config,
    GptOssConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MixtralConfig,
    Mxfp4Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import MergeModulelist

from slimtune.base.load import load_base
from slimtune.base.packed import Mxfp4Tensor, Nf4Tensor, PackedTensor
from slimtune.base.quantize import bytes_by_part, fingerprint, packed_format
from slimtune.base.quantizer import policy_of
from slimtune.errors import UserError
from slimtune.hardware import Hardware
from tests.families.tiny import save, skeleton, small_config

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": 64}


def write(folder: Path, config: PreTrainedConfig, tokenizer: Path) -> Path:
    """A random model in bf16 with the tokenizer of another, as a published folder is laid out."""
    torch.manual_seed(0)
    config.vocab_size = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    config = Qwen3MoeConfig(**SMALL, **EXPERTS, moe_intermediate_size=64, num_experts=4)
    return write(tmp_path_factory.mktemp("mixture"), config, model_folder)


def test_experts_are_packed_one_by_one_as_they_are_read(mixture: Path, hardware: Hardware) -> None:
    base = load_base(str(mixture), hardware, compute_dtype="fp32")
    assert (base.quantized, base.format) == (True, "nf4")
    assert packed_format(base.model) == "nf4"
    stored = load_file(mixture / "model.safetensors")
    for index, layer in enumerate(base.model.model.layers):
        stacks = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        for name, sources in stacks.items():
            stack = getattr(layer.mlp.experts, name)
            assert isinstance(stack, Nf4Tensor)
            for expert in range(4):
                parts = [stored[f"model.layers.{index}.mlp.experts.{expert}.{source}.weight"] for source in sources]
                codes, state = bnb.quantize_4bit(
                    torch.cat(parts).float(), blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                assert torch.equal(stack.parts["codes"][expert], codes.flatten())
                assert torch.equal(stack[expert].unpack(), bnb.dequantize_4bit(codes, state))
        assert isinstance(layer.mlp.gate.weight, nn.Parameter)
        assert layer.mlp.gate.weight.dtype == torch.float32
    parts = {part.part: part for part in bytes_by_part(base.model)}
    assert parts["experts"].format == "nf4"
    assert parts["experts"].parameters == 2 * 4 * 3 * 64 * 64
    assert parts["experts"].bytes_now < parts["experts"].bytes_16bit / 3
    assert parts["router"].format == "fp32"


def test_the_experts_of_a_layer_never_lie_stacked_in_16_bits(
    mixture: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked: list[tuple[int, ...]] = []
    plain = MergeModulelist.convert

    def convert(self: Any, *arguments: Any, **options: Any) -> Any:
        made = plain(self, *arguments, **options)
        stacked.extend(tuple(tensor.shape) for tensor in made.values())
        return made

    monkeypatch.setattr(MergeModulelist, "convert", convert)
    load_base(str(mixture), hardware, compute_dtype="fp32")
    assert stacked
    assert {shape[0] for shape in stacked} == {1}
    stacked.clear()
    load_base(str(mixture), hardware, compute_dtype="fp32", quantization="none")
    assert {shape[0] for shape in stacked} == {4}


def test_a_changed_bit_of_an_expert_changes_the_fingerprint(mixture: Path, hardware: Hardware) -> None:
    base = load_base(str(mixture), hardware, compute_dtype="fp32")
    stack: Any = base.model.model.layers[1].mlp.experts.down_proj
    before = fingerprint(base.model)
    assert fingerprint(load_base(str(mixture), hardware, compute_dtype="fp32").model) == before
    for part in stack.parts.values():
        raw = part.view(-1).view(torch.uint8)
        raw[-1] ^= 1
        assert fingerprint(base.model) != before
        raw[-1] ^= 1
    assert fingerprint(base.model) == before


def test_a_linear_layer_with_a_forward_of_its_own_is_packed(
    tmp_path: Path, model_folder: Path, hardware: Hardware
) -> None:
    config = FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, new_decoder_architecture=False, multi_query=False
    )
    base = load_base(str(write(tmp_path / "falcon", config, model_folder)), hardware, compute_dtype="fp32")
    weights = [
        parameter for name, parameter in base.model.named_parameters() if "h.0." in name and parameter.dim() == 2
    ]
    assert len(weights) == 4
    assert all(isinstance(weight, Nf4Tensor) for weight in weights)
    plain = load_base(base.source, hardware, compute_dtype="fp32", quantization="none").model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if isinstance(parameter, PackedTensor):
                plain.get_parameter(name).copy_(parameter.unpack())
        assert torch.equal(base.model(ids).logits, plain(ids).logits)


def test_routers_convolutions_norms_embeddings_and_head_stay() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, **EXPERTS, num_local_experts=8))
    policy = policy_of(model)
    assert policy.left == {f"model.layers.{index}.mlp.gate" for index in range(2)}
    assert policy.packed == {
        f"model.layers.{index}.mlp.experts.{name}" for index in range(2) for name in ("gate_up_proj", "down_proj")
    }
    assert {name.rsplit(".", 2)[-2] for name in policy.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert policy.share > 0.98
    assert policy.rest[0] == ("model.layers.*.mlp.gate.weight", 2 * 8 * 64)


def test_a_weight_that_the_models_code_hands_to_a_kernel_is_no_raw_bytes() -> None:
    config = FalconH1Config(**SMALL, intermediate_size=64, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_state=16)
    with torch.device("meta"):
        policy = policy_of(AutoModelForCausalLM.from_config(config))
    assert {name.split(".", 3)[-1] for name in policy.packed} == {"mamba.out_proj.weight"}
    assert "model.layers.0.mamba.in_proj.weight" in policy.linears


def test_a_router_is_one_by_its_name_too() -> None:
    # One output for each expert and one more for none.
    config = LongcatFlashConfig(
        vocab_size=64, hidden_size=64, num_layers=1, num_attention_heads=4, n_routed_experts=4, zero_expert_num=1,
        expert_ffn_hidden_size=64, ffn_hidden_size=64, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, head_dim=16,
    )  # fmt: skip
    with torch.device("meta"):
        policy = policy_of(AutoModelForCausalLM.from_config(config))
    assert policy.left == {"model.layers.0.mlp.router.classifier"}


def test_coefficients_stay() -> None:
    """Gemma 3n reads and clamps their weights past the layers that hold them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config("gemma3n_text"))
    policy = policy_of(model)
    kept = {"modality_router", "prediction_coefs", "correction_coefs"}
    assert {path.rpartition(".")[2] for path in policy.left} == kept
    assert not any(name.rsplit(".", 2)[-2] in kept for name in policy.linears | policy.packed)


def test_what_a_class_keeps_out_of_16_bits_stays(tmp_path: Path, hardware: Hardware) -> None:
    """DeepSeek V4's compressors. The policy, by which share and size are told, says what is found after loading."""
    save("deepseek_v4", tmp_path)
    loaded = load_base(str(tmp_path), hardware, compute_dtype="fp32").model
    policy = policy_of(skeleton("deepseek_v4"))
    four_bit = {
        name for name, parameter in loaded.named_parameters()
        if isinstance(parameter, PackedTensor) or hasattr(parameter, "quant_state")
    }  # fmt: skip
    assert four_bit == policy.linears | policy.packed
    kept = ("compressor.kv_proj.weight", "compressor.gate_proj.weight", "scorer.weights_proj.weight")
    assert {end for end in kept if any(name.endswith(end) for name in policy.sizes)} == set(kept)
    assert not any(name.endswith(kept) for name in four_bit)


class Odd(nn.Module):
    """Keeps its matrix in a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(256, 256))


def test_a_model_that_is_mostly_not_4_bit_is_refused_before_its_weights_are_read(
    tmp_path: Path, model_folder: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "odd", LlamaConfig(**SMALL, intermediate_size=64), model_folder)
    from transformers.models.llama import modeling_llama

    class OddLayer(modeling_llama.LlamaDecoderLayer):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.odd = Odd()

    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", OddLayer)
    (folder / "model.safetensors").write_bytes(b"")  # never opened
    with pytest.raises(UserError, match=r"only \d+% of LlamaForCausalLM's weights can lie in 4 bits") as refused:
        load_base(str(folder), hardware, compute_dtype="fp32")
    assert "model.layers.*.odd.matrix" in refused.value.rule


def mxfp4_folder(folder: Path, tokenizer: Path) -> Path:
    """gpt-oss as it is published: experts in MXFP4, the rest in bf16."""
    config = GptOssConfig(**SMALL, **EXPERTS, num_local_experts=4, sliding_window=16)
    write(folder, config, tokenizer)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=draw)
    save_file(tensors, file, {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_mxfp4_stays_what_it_is(tmp_path: Path, model_folder: Path, hardware: Hardware, quantization: str) -> None:
    folder = mxfp4_folder(tmp_path / "oss", model_folder)
    base = load_base(str(folder), hardware, compute_dtype="bf16", quantization=quantization)
    assert base.format == ("mxfp4+nf4" if quantization == "nf4" else "mxfp4")
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), device_map={"": "cpu"}
    )
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for index, layer in enumerate(base.model.model.layers):
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(layer.mlp.experts, name)
                assert isinstance(stack, Mxfp4Tensor)
                stored = file.get_tensor(f"model.layers.{index}.mlp.experts.{name}_blocks")
                assert torch.equal(stack.parts["blocks"].view(stored.shape), stored)
                theirs = getattr(expected.model.layers[index].mlp.experts, name)
                assert torch.equal(stack.unpack(), theirs)
                assert torch.equal(layer.mlp.router.weight, expected.model.layers[index].mlp.router.weight)
    if quantization == "none":
        ids = torch.arange(20)[None]
        with torch.no_grad():
            assert torch.equal(base.model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
    ],
)
def test_other_stored_formats_are_refused(
    mixture: Path, tmp_path: Path, hardware: Hardware, stored: dict[str, Any], named: str
) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(mixture, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": stored}))
    with pytest.raises(UserError, match=named) as refused:
        load_base(str(folder), hardware, compute_dtype="fp32")
    assert "16-bit original" in refused.value.way_out


def test_a_stored_mixture_whose_experts_are_in_16_bits_is_refused(
    mixture: Path, tmp_path: Path, hardware: Hardware
) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(mixture, folder)
    values = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": stored}))
    with pytest.raises(UserError, match="experts in 16"):
        load_base(str(folder), hardware, compute_dtype="fp32")
