"""What the base weighs, and the fingerprint that proves it stayed frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from slimtune.base import load, quantize, quantizer
from slimtune.base.load import Base, load_base
from slimtune.base.packed import Nf4Tensor, misreads_partial_blocks
from slimtune.base.quantize import bytes_by_part, fingerprint
from slimtune.engine.kernels import reference_nf4
from slimtune.errors import UserError
from slimtune.hardware import Hardware


def test_bytes_are_counted_from_the_tensors(base: Base) -> None:
    parts = {part.part: part for part in bytes_by_part(base.model)}
    assert set(parts) == {"attention", "MLP", "embedding", "norms"}
    config = base.model.config
    assert parts["embedding"].parameters == config.vocab_size * config.hidden_size
    assert parts["embedding"].bytes_now == 4 * parts["embedding"].parameters
    mlp = parts["MLP"]
    assert mlp.parameters == 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    # 4 bits for a weight, 8 bits for a block of 64, and little for the scales' own scales.
    assert 4.12 < 8 * mlp.bytes_now / mlp.parameters < 4.14
    assert sum(part.parameters for part in parts.values()) == 134_515_008


def test_any_changed_bit_changes_the_fingerprint(base: Base) -> None:
    before = fingerprint(base.model)
    assert before == fingerprint(base.model)
    weights = [
        base.model.model.layers[0].self_attn.q_proj.weight.data,
        base.model.model.layers[29].mlp.down_proj.weight.quant_state.absmax,
        base.model.model.norm.weight.data.view(torch.uint8),
    ]
    for weight in weights:
        flat = weight.view(-1)
        kept = flat[-1].clone()
        flat[-1] = kept ^ 1
        assert fingerprint(base.model) != before
        flat[-1] = kept
    assert fingerprint(base.model) == before


def test_swapped_words_change_the_fingerprint(base: Base) -> None:
    before = fingerprint(base.model)
    flat = base.model.model.layers[3].mlp.up_proj.weight.data.view(-1)
    flat[:16] = torch.cat([flat[8:16].clone(), flat[:8].clone()])
    assert fingerprint(base.model) != before


def test_wrapping_does_not_change_the_fingerprint(base: Base) -> None:
    peft = pytest.importorskip("peft")
    before = fingerprint(base.model)
    wrapped = peft.get_peft_model(base.model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert fingerprint(wrapped) == before


def test_what_bitsandbytes_misreads_is_known() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    right = reference_nf4.dequantize(packed, state.absmax, shape=(6, 96), dtype=torch.float32)
    assert misreads_partial_blocks() != torch.allclose(dequantize_4bit(packed, state), right, atol=1e-5)


@pytest.mark.parametrize(("width", "misreads", "packed"), [(96, True, True), (96, False, False), (128, True, False)])
def test_what_would_be_misread_is_packed_otherwise(
    width: int,
    misreads: bool,
    packed: bool,
    tiny_model: Path,
    tmp_path: Path,
    hardware: Hardware,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantizer, "misreads_partial_blocks", lambda: misreads)
    monkeypatch.setattr(quantize, "misreads_partial_blocks", lambda: False)
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.intermediate_size = width
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for file in tiny_model.iterdir():
        if not (tmp_path / "model" / file.name).exists():
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    base = load_base(str(tmp_path / "model"), hardware, compute_dtype="fp32")
    assert base.quantized
    down: Any = base.model.model.layers[0].mlp.down_proj
    assert isinstance(down.weight, Nf4Tensor) == packed
    assert isinstance(base.model.model.layers[0].mlp.up_proj, Linear4bit)
    if packed:
        plain = load_base(str(tmp_path / "model"), hardware, compute_dtype="fp32", quantization="none").model
        weight = plain.model.layers[0].mlp.down_proj.weight
        codes, state = quantize_4bit(weight.reshape(-1, 64), quant_type="nf4", blocksize=64, compress_statistics=True)
        assert torch.equal(down.weight.unpack().reshape(-1, 64), dequantize_4bit(codes, state))


def test_a_stored_base_that_would_be_misread_is_refused(
    tiny_model: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "misread_weight", lambda model: "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(UserError, match=r"misreads .*down_proj.weight .* in 4 bits on this CPU"):
        load_base(str(tiny_model), hardware, compute_dtype="fp32")


def test_a_weight_of_another_shape_than_the_configs_is_refused(
    tiny_model: Path, hardware: Hardware, tmp_path: Path
) -> None:
    """Transformers doesn't compare what is packed while it is read."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_key_value_heads"] != config["num_attention_heads"]
    config["num_key_value_heads"] = None
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"k_proj\.weight of \d+ × \d+, where config\.json says \d+ × \d+"):
        load_base(str(tmp_path / "model"), hardware, compute_dtype="fp32")
