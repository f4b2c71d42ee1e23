"""Merging against plain PEFT: for each family a tiny random model, an adapter, and the folder read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Mxfp4Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimtune.adapter.files import WeightFiles, attach_adapter
from slimtune.adapter.merged import MergedWeights
from slimtune.base.classes import language_class, skeleton
from slimtune.errors import UserError
from slimtune.use.merge import write_weights
from tests.base.test_quantizer import mxfp4_folder
from tests.families.tiny import small_config

IMAGE_TEXT = ["gemma3", "qwen3_5", "mistral3", "qwen3_vl", "internvl"]
TEXT = ["phi3", "gpt2", "falcon_h1", "nemotron_h", "qwen3_moe", "gpt_oss", "diffllama"]
EXPERTS = ["qwen3_moe", "gpt_oss", "nemotron_h", "mixtral", "qwen3_vl_moe"]
# Transformers' or PEFT's own objections to an adapter there: a kernel takes out_proj's weight past its adapter, and a
# router answers with a tuple.
NOT_ADAPTED = ("lm_head", "out_proj", "router", "conv1d")


def _base(family: str, folder: Path) -> PreTrainedModel:
    """A base's folder in fp32, of the class that slimtune loads it as, and that model read from it."""
    config = small_config(family)
    torch.manual_seed(0)
    loader = language_class(config, family)
    fresh = loader.from_config(config)
    for parameter in fresh.parameters():
        if parameter.numel() > 1 and float(parameter.detach().std()) == 0.0:
            parameter.data += 0.05 * torch.randn_like(parameter)
    fresh.save_pretrained(folder)
    model: PreTrainedModel = loader.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _linear(model: nn.Module) -> list[str]:
    """The text part's linear layers, by their full names."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not any(tower in name for tower in ("vision", "visual", "projector"))
        and not any(part in name for part in NOT_ADAPTED)
    ]


def _merged_like_peft(model: PreTrainedModel, base: Path, tmp_path: Path, **options: Any) -> WeightFiles:
    """Merge an adapter of ``model``, and hold what is written to PEFT's own merging."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)).eval()
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(5, 37).view(1, -1)
    with torch.inference_mode():
        expected = wrapped(input_ids=ids, use_cache=False).logits
        with wrapped.disable_adapter():
            assert float((wrapped(input_ids=ids, use_cache=False).logits - expected).abs().max()) > 1e-2
    weights = MergedWeights(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write_weights(weights, tmp_path / "merged", shard_bytes=200_000)
    (tmp_path / "merged" / "config.json").write_text(json.dumps(weights.config))
    loader = language_class(model.config, "the base")
    again, loading = loader.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.inference_mode():
        got = again.eval()(input_ids=ids, use_cache=False).logits
    scale = float(expected.abs().max())
    torch.testing.assert_close(got / scale, expected / scale, atol=2e-5, rtol=0)
    merge: Any = wrapped.merge_and_unload  # type: ignore[operator]
    plain: dict[str, Tensor] = dict(merge().named_parameters(remove_duplicate=False))
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, plain[name], atol=1e-6, rtol=1e-5)
    return WeightFiles(tmp_path / "merged")


@pytest.mark.parametrize("family", [*IMAGE_TEXT, *TEXT])
def test_linear_layers_merge_in_the_files_own_names(family: str, tmp_path: Path) -> None:
    model = _base(family, tmp_path / "base")
    files = WeightFiles(tmp_path / "base")
    written = _merged_like_peft(model, tmp_path / "base", tmp_path, target_modules=_linear(model))
    assert written.specs.keys() == files.specs.keys()
    assert all(written.specs[name] == files.specs[name] for name in files)
    # What no adapter reaches, a tower for example, is the base's to the bit.
    same = {name for name in files if torch.equal(written[name], files[name])}
    assert len(files.specs) - len(same) == len(_linear(skeleton(tmp_path / "base")))


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_merge_as_the_files_store_them(family: str, tmp_path: Path) -> None:
    """By PEFT's ``target_parameters``, on both stacks of a layer, together with attention's linear layers."""
    model = _base(family, tmp_path / "base")
    files = WeightFiles(tmp_path / "base")
    stacks = sorted(
        {".".join(name.split(".")[-2:]) for name, parameter in model.named_parameters() if _is_stack(name, parameter)}
    )
    assert len(stacks) == 2
    written = _merged_like_peft(
        model, tmp_path / "base", tmp_path, target_modules=["q_proj", "o_proj"], target_parameters=stacks
    )
    assert written.specs.keys() == files.specs.keys()
    experts = [name for name in files if ".experts." in name and not name.endswith("bias")]
    assert experts
    assert not any(torch.equal(written[name], files[name]) for name in experts)
    if family in ("qwen3_moe", "mixtral"):
        assert any(".experts.3." in name for name in experts)  # one by one in the files, a stack in the module


def _is_stack(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 3 and ".experts." in name


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_a_tied_head_that_was_trained_gets_a_name_that_is_read(family: str, tmp_path: Path) -> None:
    model = _base(family, tmp_path / "base")
    files = WeightFiles(tmp_path / "base")
    written = _merged_like_peft(
        model, tmp_path / "base", tmp_path, target_modules=_linear(model)[:2], modules_to_save=["lm_head"]
    )
    assert len(written.specs) == len(files.specs) + 1


def test_dora_on_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    model = _base("gpt2", tmp_path / "base")
    written = _merged_like_peft(model, tmp_path / "base", tmp_path, target_modules=_linear(model), use_dora=True)
    assert written.specs == WeightFiles(tmp_path / "base").specs  # no tensor more, and each stored as it was


def test_an_adapter_of_the_other_class_is_refused_by_all_who_read_adapters(tmp_path: Path) -> None:
    """PEFT warns of names that don't fit, and the model would answer as the bare base."""
    _base("qwen3_5", tmp_path / "base")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(other, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert type(whole) is not type(other)
    for reader in (
        lambda: MergedWeights(tmp_path / "base", tmp_path / "adapter"),
        lambda: attach_adapter(whole, tmp_path / "adapter"),
    ):
        with pytest.raises(UserError, match="does not fit its base: it lacks"):
            reader()


def test_what_a_convolution_learned_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = _base("lfm2", tmp_path / "base")
    convolution = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv1d))
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=[convolution])).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match=r"has an adapter on .*conv \(Conv1d\): it can't be merged exactly"):
        MergedWeights(tmp_path / "base", tmp_path / "adapter")


def test_experts_in_mxfp4_are_merged_into_bf16(tmp_path: Path, model_folder: Path) -> None:
    """gpt-oss as it is published, against what Transformers unpacks and PEFT merges in fp32, rounded once."""
    base = mxfp4_folder(tmp_path / "base", model_folder)
    unpacked = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), device_map={"": "cpu"}
    )
    stacks = ["experts.gate_up_proj"]
    wrapped = get_peft_model(
        unpacked.float(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], target_parameters=stacks)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    wrapped.save_pretrained(tmp_path / "adapter")
    weights = MergedWeights(base, tmp_path / "adapter")
    assert "quantization_config" not in weights.config
    merge: Any = wrapped.merge_and_unload  # type: ignore[operator]
    plain = dict(merge().named_parameters())
    assert set(weights) == set(plain)
    for name in weights:
        expected = plain[name].detach().to(torch.bfloat16)
        assert weights[name].dtype == torch.bfloat16
        # Sums in another order may fall on the other side of a rounding.
        torch.testing.assert_close(weights[name], expected, rtol=2**-7, atol=1e-6)
        assert float((weights[name] != expected).float().mean()) < 1e-3
