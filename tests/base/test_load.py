"""The base in 4 bits; and what a person can get wrong about a model, said in one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig
from transformers.core_model_loading import WeightConverter

from slimtune.base.load import Base, load_base
from slimtune.base.packed import PackedTensor
from slimtune.base.quantize import fingerprint
from slimtune.engine.per_layer import keep_in_ram
from slimtune.engine.ram import host_of
from slimtune.engine.stored import places_of, whole_bytes
from slimtune.engine.streamed import move_to_ram
from slimtune.errors import UserError
from slimtune.hardware import Hardware
from tests.engine import models


def test_every_linear_but_the_head_is_nf4_with_double_quantisation(base: Base) -> None:
    linears = {name: module for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name: module for name, module in linears.items() if isinstance(module, Linear4bit)}
    assert set(linears) - set(quantized) == {"lm_head"}
    for module in quantized.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert module.weight.dtype == torch.uint8
        assert module.compute_dtype == torch.float32


def test_double_quantisation_can_be_off(hardware: Hardware) -> None:
    single = load_base("smollm2-135m", hardware, compute_dtype="fp32", double_quant=False)
    states = [module.weight.quant_state for module in single.model.modules() if isinstance(module, Linear4bit)]
    assert states
    assert not any(state.nested for state in states)


def test_quantization_none_keeps_the_weights(hardware: Hardware) -> None:
    plain = load_base("smollm2-135m", hardware, compute_dtype="bf16", quantization="none")
    assert not plain.quantized
    assert not any(isinstance(module, Linear4bit) for module in plain.model.modules())
    assert {parameter.dtype for parameter in plain.model.parameters()} == {torch.bfloat16}


def test_a_cpu_never_repacks_the_weights_into_a_layout_without_backward(base: Base) -> None:
    modules = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    assert modules
    assert not any(module.support_avx512bf16_for_cpu for module in modules)
    before = modules[0].weight.data.clone()
    base.model.eval()
    with torch.no_grad():
        base.model(torch.tensor([[1, 2, 3]]))
    assert torch.equal(modules[0].weight.data, before)


def test_gradients_are_the_same_before_and_after_an_evaluation(base: Base) -> None:
    ids = torch.tensor([[1, 4093, 198, 2427, 339, 253, 1743]])

    def gradient() -> torch.Tensor:
        base.model.train()
        embedded = base.model.get_input_embeddings()(ids).detach().requires_grad_()
        base.model(inputs_embeds=embedded, labels=ids).loss.backward()
        assert embedded.grad is not None
        return embedded.grad

    first = gradient()
    base.model.eval()
    with torch.no_grad():
        base.model.generate(ids, max_new_tokens=2, do_sample=False)
    assert first.abs().max() > 0
    assert torch.equal(gradient(), first)


def test_a_damaged_model_folder_is_named(tmp_path: Path, model_folder: Path, hardware: Hardware) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header")
    with pytest.raises(UserError, match="can't be loaded") as caught:
        load_base(str(tmp_path), hardware, compute_dtype="fp32")
    assert str(tmp_path) in str(caught.value)


def test_a_model_with_code_of_its_own_is_refused_and_not_run(
    tmp_path: Path, model_folder: Path, hardware: Hardware
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (tmp_path / name).symlink_to(model_folder / name)
    with pytest.raises(UserError):
        load_base(str(tmp_path), hardware, compute_dtype="fp32")
    assert not (tmp_path / "ran").exists()


def test_a_soft_cap_is_never_left_out(tmp_path: Path, model_folder: Path, hardware: Hardware) -> None:
    config = Gemma2Config(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=1, initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    expected.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_folder / name, tmp_path / name)
    loaded = load_base(str(tmp_path), hardware, compute_dtype="fp32", quantization="none").model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected.eval()(ids).logits)


def test_a_growing_rope_knows_nothing_of_a_longer_text_before(
    tmp_path: Path, model_folder: Path, hardware: Hardware
) -> None:
    """Transformers goes on with the longest text's angles: here logits are up to 8 off."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.2,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_folder / name, tmp_path / name)
    text, longer, short = torch.arange(40)[None], torch.arange(90)[None], torch.arange(20)[None]
    loaded = load_base(str(tmp_path), hardware, compute_dtype="fp32", quantization="none").model
    with torch.no_grad():
        for ids in (text, short):
            fresh = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
            expected = fresh(ids).logits
            loaded(longer)
            torch.testing.assert_close(loaded(ids).logits, expected)


def test_what_is_to_be_in_ram_lies_there_with_the_same_bytes(
    tmp_path: Path, model_folder: Path, hardware: Hardware
) -> None:
    """As each is read: one layer's matrices in 4 bits, experts among them, and the embedding as it is.

    What stays on the device lies side by side, a layer in a block of its own.
    """
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / file.name)
    models.make_base("qwen3_moe").save_pretrained(tmp_path)
    base, asked = load_base(str(tmp_path), hardware, compute_dtype="fp32"), set()
    for name, parameter in base.model.named_parameters():
        if name == "model.embed_tokens.weight" or (".layers.1." in name and parameter.dtype == torch.uint8):
            asked.add(name)
        if ".layers.1." in name and isinstance(parameter, PackedTensor):
            asked.add(name)
    loaded = load_base(str(tmp_path), hardware, compute_dtype="fp32", in_ram=asked)
    assert len(asked) == 1 + 4 + 2
    for name, parameter in loaded.model.named_parameters():
        assert all((host_of(place.tensor) is not None) == (name in asked) for place in places_of(parameter)), name
    assert fingerprint(loaded.model) == fingerprint(base.model)
    for layer, moved in ((0, False), (1, True), (2, False)):
        tensors = [
            place.tensor
            for name, parameter in loaded.model.named_parameters()
            if f".layers.{layer}." in name and (parameter.dtype == torch.uint8 or isinstance(parameter, PackedTensor))
            for place in places_of(parameter)
        ]
        memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert (len(memory) == 1) == (not moved)
        if not moved:
            assert tensors[0].untyped_storage().nbytes() == sum(whole_bytes(tensor.nbytes) for tensor in tensors)
    ids = torch.tensor([[1, 40, 98, 7]])
    assert torch.equal(loaded.model(ids).logits, base.model(ids).logits)
    left = StorageWeakRef(tensors[0].untyped_storage())  # layer 2's memory, which leaves the device later
    move_to_ram([place for name, each in loaded.model.named_parameters() if f".layers.{layer}." in name
                 for place in places_of(each)], torch.device("cpu"), "layer's weights")  # fmt: skip
    del tensors
    assert left.expired()


def test_a_table_of_rows_goes_to_ram_without_being_on_the_device(
    tmp_path: Path, model_folder: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read there by Transformers, and left there by the engine."""
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / file.name)
    models.make_base("gemma4-e2b").save_pretrained(tmp_path)
    base, read = load_base(str(tmp_path), hardware, compute_dtype="fp32"), []
    convert = WeightConverter.convert

    def seen(self: WeightConverter, name: str, **options: Any) -> Any:
        made = convert(self, name, **options)
        read.extend(made if self.force_cpu else ())
        return made

    monkeypatch.setattr(WeightConverter, "convert", seen)
    name = "model.embed_tokens_per_layer.weight"
    loaded = load_base(str(tmp_path), hardware, compute_dtype="fp32", in_ram={name}).model
    assert read == [name]
    table = loaded.get_parameter(name)
    home = host_of(table.data)
    assert home is not None
    assert fingerprint(loaded) == fingerprint(base.model)
    keep_in_ram(loaded.model.embed_tokens_per_layer)
    assert table.data_ptr() == home.data_ptr()
    ids = torch.tensor([[1, 40, 98, 7]])
    assert torch.equal(loaded(ids).logits, base.model(ids).logits)
