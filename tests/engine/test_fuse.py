"""fuse(): the same gradients through autograd, TRL's trainer unchanged, nothing else touched, undone again."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, Qwen2ForSequenceClassification
from trl import SFTConfig, SFTTrainer

from slimtune.engine import CannotFuse, fuse
from slimtune.engine.decoder import Keep
from tests.engine import models


@pytest.mark.parametrize("keep", list(Keep))
@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradients_equal_the_unfused_models(family: str, keep: Keep) -> None:
    model = models.add_lora(models.make_base(family))
    for batch in (models.pack(), models.padded()):
        loss, expected = models.reference(model, batch, 40)
        fusion = fuse(model, keep=keep)
        found, actual = models.reference(model, batch, 40)
        fusion.undo()
        assert found == pytest.approx(loss, rel=1e-5)
        assert models.worst_error(actual, expected) < 1e-4


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt_oss", "mistral-window", "phi3-partial", "qwen3_moe", "smollm3"]
)
def test_rows_padded_on_the_left(family: str) -> None:
    model = models.add_lora(models.make_base(family))
    batch = {name: tensor.flip(1) for name, tensor in models.padded().items()}
    real = batch["attention_mask"]
    batch["labels"][:, 1:][real[:, :-1] == 0] = -100  # what a pad predicts is nobody's
    for positions in (None, (real.cumsum(1) - 1).clamp(min=0)):
        inputs = batch if positions is None else {**batch, "position_ids": positions}
        loss, expected = models.reference(model, inputs, 40)
        fusion = fuse(model)
        found, actual = models.reference(model, inputs, 40)
        fusion.undo()
        assert fusion.computed == 1
        assert found == pytest.approx(loss, rel=1e-5)
        assert models.worst_error(actual, expected) < 1e-4


@pytest.mark.parametrize("family", ["mistral-window", "qwen2"])
def test_the_text_part_of_a_model_that_reads_images(family: str) -> None:
    model = models.add_lora(models.with_tower(models.family_config(family)), target_modules=["q_proj", "down_proj"])
    projector: Any = model.get_base_model().model.multi_modal_projector
    text = models.padded()
    text["input_ids"].clamp_(min=2)
    image = {**text, "input_ids": text["input_ids"].clone(), "pixel_values": torch.randn(3, 3, 16, 16)}
    image["input_ids"][:, 1:5] = 1  # its four patches
    for batch in (text, image):
        projector.requires_grad_(batch is image)
        loss, expected = models.reference(model, batch, 40)
        fusion = fuse(model)
        found, actual = models.reference(model, batch, 40)
        fusion.undo()
        assert fusion.computed == 1, fusion.left
        assert found == pytest.approx(loss, rel=1e-5)
        assert models.worst_error(actual, expected) < 1e-4


@torch.no_grad()
def test_what_a_call_may_ask_for_is_left_to_the_model() -> None:
    model = models.add_lora(models.make_base("qwen2"))
    fusion = fuse(model)
    ids, ones = torch.arange(5, 17)[None], torch.ones(1, 12, dtype=torch.int64)
    holes = ones.clone()
    holes[:, 4:6] = 0
    bounds = torch.tensor([0, 12], dtype=torch.int32)
    for inputs, reason in (
        ({"use_cache": True}, "use_cache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"is_causal": True}, "is_causal"),
        ({"attention_mask": holes}, "an attention_mask with holes"),
        ({"attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)}, "attention_mask that is no matrix"),
        ({"position_ids": ids + 90}, "position_ids of a document that don't count from 0"),
        ({"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}, "document boundaries without position_ids"),
    ):
        model(input_ids=ids, **{"use_cache": False, **inputs})
        assert fusion.left == {reason: 1}
        fusion.left.clear()
    model.config.output_hidden_states = True
    assert model.get_base_model()(input_ids=ids, use_cache=False).hidden_states is not None
    model.config.output_hidden_states = False
    assert fusion.computed == 0
    model(ids, attention_mask=ones, use_cache=False, logits_to_keep=3)
    assert fusion.computed == 1


@pytest.mark.parametrize("double", [True, False], ids=["double-quant", "plain"])
def test_an_nf4_base(double: bool) -> None:
    model = models.add_lora(models.quantize(models.make_base("qwen2"), double=double))
    for keep_weights in (True, False):
        _, expected = models.reference(model, models.pack(), 40)
        fusion = fuse(model, keep_weights=keep_weights)
        _, actual = models.reference(model, models.pack(), 40)
        fusion.undo()
        assert models.worst_error(actual, expected) < 1e-4


def test_reports_and_undoes_without_a_trace() -> None:
    model, other = models.add_lora(models.make_base("qwen2")), models.add_lora(models.make_base("qwen2"))

    def attributes() -> list[tuple[str, set[str]]]:
        return [(name, set(vars(module))) for name, module in model.named_modules()]

    backbone: Any = model.get_base_model().model
    before, class_forward = attributes(), type(backbone).forward
    fusion = fuse(model)
    assert fusion.fused_layers == 3
    assert str(fusion) == "fused 3 of 3 decoder layers and the head"
    assert "forward" in vars(backbone)
    assert type(backbone).forward is class_forward
    assert "forward" not in vars(other.get_base_model().model)
    with pytest.raises(CannotFuse, match="already"):
        fuse(model)
    fusion.undo()
    assert attributes() == before
    fusion.undo()
    assert attributes() == before


def test_layers_that_cannot_be_fused_run_as_they_are() -> None:
    model = models.add_lora(models.make_base("mistral-window"))
    model.get_base_model().model.layers[1].input_layernorm.weight.requires_grad_(True)
    for batch in (models.pack(), models.padded()):
        loss, expected = models.reference(model, batch, 40)
        fusion = fuse(model)
        assert fusion.fused_layers == 2
        assert list(fusion.unfused) == ["layers.1"]
        assert "norm" in fusion.unfused["layers.1"]
        found, actual = models.reference(model, batch, 40)
        fusion.undo()
        assert found == pytest.approx(loss, rel=1e-5)
        assert models.worst_error(actual, expected) < 1e-4


def test_refuses_with_a_reason() -> None:
    with pytest.raises(CannotFuse, match="variant"):
        fuse(models.add_lora(models.make_base("qwen2"), use_dora=True))
    with pytest.raises(CannotFuse, match="no LoRA adapter"):
        fuse(models.make_base("llama").requires_grad_(False))
    with pytest.raises(CannotFuse, match="Gemma3ForConditionalGeneration may hand its text model masks"):
        fuse(models.add_lora(models.with_tower(models.family_config("gemma3_text")), target_modules=["q_proj"]))
    reward = get_peft_model(
        Qwen2ForSequenceClassification(models.family_config("qwen2")), LoraConfig(task_type="SEQ_CLS")
    )
    with pytest.raises(CannotFuse, match="no Qwen2ForSequenceClassification with no head over a vocabulary"):
        fuse(reward)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(CannotFuse, match="models of type gpt2"):
        fuse(gpt2)


@torch.no_grad()
def test_generation_evaluation_and_disabled_adapters() -> None:
    model = models.add_lora(models.make_base("qwen3")).eval()
    batch, prompt = models.pack(), torch.tensor([[5, 6, 7, 8]])
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}

    def results() -> list[torch.Tensor]:
        with model.disable_adapter():
            off = model(**inputs, use_cache=False).logits
        on = model(**inputs, use_cache=False).logits
        text = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
        left = torch.tensor([[0, 0, 1, 1]])
        return [off, on, text, hidden, model(input_ids=prompt, attention_mask=left, use_cache=False).logits[:, 2:]]

    expected = results()
    fuse(model)
    for actual, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_whose_adapters_are_off_run_as_they_are(family: str) -> None:
    model = models.add_lora(models.make_base(family), target_modules=["gate_up_proj", "down_proj"]).eval()
    assert all(".experts." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    inputs = {"input_ids": models.pack()["input_ids"]}

    def logits() -> torch.Tensor:
        found: torch.Tensor = model(**inputs, use_cache=False).logits
        return found

    on = logits()
    with model.disable_adapter():
        off = logits()
    assert not torch.allclose(on, off, atol=1e-2)
    fuse(model)
    torch.testing.assert_close(logits(), on, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(), off, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(), on, rtol=1e-4, atol=1e-4)


def test_other_scales_new_matrices_and_copies_compute_with_their_own() -> None:
    model = models.add_lora(models.make_base("qwen2"))
    batch = models.pack()
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    fusion = fuse(model)

    def logits(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of(**inputs).logits

    def differs_from_unfused() -> float:
        fused = logits(model)
        again = deepcopy(model)
        plain = logits(again)  # a copy computes with its own layers, unfused
        return float((fused - plain).abs().max() / plain.abs().max())

    before = logits(model)
    copy = deepcopy(model)
    for name, parameter in copy.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert (logits(copy) - before).abs().max() > 1e-2, "the copy computed with the original's adapter"
    layer: Any = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.set_scale("default", 5.0)
    assert differs_from_unfused() < 1e-5
    assert (logits(model) - before).abs().max() > 1e-3
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    assert differs_from_unfused() < 1e-5
    fusion.undo()


@torch.no_grad()
def test_another_adapter_and_positions_from_elsewhere_run_as_they_are() -> None:
    model: Any = models.add_lora(models.make_base("qwen2")).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids, later = torch.arange(5, 17)[None], torch.arange(90, 102)[None]

    def results() -> list[torch.Tensor]:
        found = []
        for adapter in ("other", "default"):
            model.set_adapter(adapter)
            found.append(model(input_ids=ids, use_cache=False).logits)
        return [*found, model(input_ids=ids, position_ids=later, use_cache=False).logits]

    expected = results()
    fuse(model)
    for actual, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_evaluation_before_training_does_not_break_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks weights in its first forward without gradients."""
    import bitsandbytes.functional as bnb

    model = models.add_lora(models.quantize(models.make_base("qwen2"), double=False))
    batch = models.pack()
    _, expected = models.reference(model, batch, 40)
    layers: Any = model.get_base_model().model.layers
    packed = layers[0].mlp.up_proj.base_layer
    if not hasattr(bnb, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes doesn't repack")
    # As its first evaluation there leaves it: 32 output rows together, if the shape allows.
    small = layers[0].self_attn.q_proj.base_layer
    small.weight.data, small.weight.quant_state = bnb._convert_weight_packed_for_cpu(
        small.weight.data, small.weight.quant_state
    )
    assert small.weight.quant_state.packing_format_for_cpu
    packed.support_avx512bf16_for_cpu = True
    fusion = fuse(model)
    assert not packed.support_avx512bf16_for_cpu
    assert not small.weight.quant_state.packing_format_for_cpu
    model.eval()
    with torch.no_grad():
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    model.train()
    _, actual = models.reference(model, batch, 40)
    fusion.undo()
    assert packed.support_avx512bf16_for_cpu
    # The repacked scales were rounded to bf16, 8 bits.
    assert models.worst_error(actual, expected) < 2e-2


def trl_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, *, fused: bool, packing: bool
) -> list[tuple[float, ...]]:
    model = models.add_lora(models.make_base("qwen2"))
    rng = random.Random(0)
    rows = [[rng.randrange(4, 200) for _ in range(rng.randrange(8, 40))] for _ in range(48)]
    data = Dataset.from_dict({"input_ids": rows})
    args = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
        learning_rate=1e-2, gradient_checkpointing=True, max_length=40, packing=packing, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, eval_strategy="steps", eval_steps=2,
        max_grad_norm=0.5, seed=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(8)), processing_class=tokenizer
    )
    if fused:
        assert fuse(trainer.model).fused_layers == 3
    trainer.train()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss")
    return [tuple(row[key] for key in keys if key in row) for row in trainer.state.log_history[:-1]]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_inside_anybodys_trl_script(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, packing: bool) -> None:
    expected = trl_run(tmp_path, tokenizer, fused=False, packing=packing)
    actual = trl_run(tmp_path, tokenizer, fused=True, packing=packing)
    assert len(expected) == 6
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_gradients_need_no_input_gradient_of_the_embedding() -> None:
    model = models.add_lora(models.make_base("qwen2"))
    embedding: nn.Module = model.get_input_embeddings()
    assert not any(parameter.requires_grad for parameter in embedding.parameters())
    fuse(model)
    model.enable_input_require_grads()
    _, with_input = models.reference(model, models.pack(), 40)
    model.disable_input_require_grads()
    _, without = models.reference(model, models.pack(), 40)
    assert models.worst_error(with_input, without) < 1e-6


def test_a_model_whose_weights_have_no_values_is_refused() -> None:
    # It is read all the same where it is only planned (slimtune plan).
    model = models.add_lora(models.make_base("llama")).to("meta")
    with pytest.raises(CannotFuse, match="have no values"):
        fuse(model)
