"""The engine's gradients against Transformers + PEFT + autograd, on every family, placement and memory policy."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from slimtune.batch import LENGTHS, MicroBatch
from slimtune.engine import CannotFuse, Engine, FusedAdamW8bit
from slimtune.engine import attention as attention_module
from slimtune.engine import engine as engine_module
from slimtune.engine.decoder import Keep
from slimtune.errors import UserError
from tests.engine import models

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_engine(model: nn.Module, tokens: int = 64, dtype: torch.dtype = torch.float32) -> Engine:
    return Engine(model, dtype=dtype, tokens=tokens)


def run(engine: Engine, model: nn.Module, batch: dict[str, torch.Tensor], count: int) -> tuple[float, dict]:
    engine.flat.grad.zero_()
    loss = engine.forward_backward(batch, count).item()
    return loss, models.gradients(model)


@pytest.mark.parametrize("targets", [ATTENTION, "all-linear", ["v_proj", "down_proj"]], ids=["qkvo", "all", "v+down"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradients_equal_autograd(family: str, targets: list[str] | str) -> None:
    """In float64: where q and k have biases, two ways to round in float32 are 1e-4 apart."""
    model = models.add_lora(models.make_base(family), target_modules=targets)
    wide = deepcopy(model).double()
    # Eager attention, which alone has a soft cap, makes no number of a padding token's float64 scores.
    for batch in (models.pack(),) if family == "gemma2" else (models.pack(), models.padded()):
        loss, expected = models.reference(wide, batch, 40)
        engine = make_engine(model)
        found, actual = run(engine, model, batch, 40)
        assert found == pytest.approx(loss, rel=1e-5)
        assert models.worst_error(actual, expected) < 1e-4


@pytest.mark.parametrize("double", [True, False], ids=["double-quant", "plain"])
@pytest.mark.parametrize("family", ["qwen2", "smollm2", "gemma3_text", "gpt_oss", "qwen3_moe", "qwen3_5_moe_text"])
def test_gradients_on_an_nf4_base(family: str, double: bool) -> None:
    model = models.add_lora(models.quantize(models.make_base(family), double=double))
    batch = models.pack()
    loss, expected = models.reference(model, batch, 40)
    found, actual = run(make_engine(model), model, batch, 40)
    assert found == pytest.approx(loss, rel=1e-5)
    assert models.worst_error(actual, expected) < 1e-4


@pytest.mark.parametrize("targets", [ATTENTION, "all-linear"], ids=["qkvo", "all"])
def test_gradients_on_experts_in_mxfp4(targets: list[str] | str) -> None:
    """As gpt-oss is published, and beside linear layers in NF4 as slimtune loads it; weights kept, and made anew."""
    base = models.quantize(models.with_mxfp4(models.make_base("gpt_oss")), double=True)
    assert {"mxfp4"} == {parameter.format for parameter in base.parameters() if parameter.ndim == 3}
    model, batch = models.add_lora(base, target_modules=targets), models.pack()
    loss, expected = models.reference(model, batch, 40)
    engine = make_engine(model)
    assert engine.plan.kept_weights == 3
    for _ in range(2):
        found, actual = run(engine, model, batch, 40)
        assert found == pytest.approx(loss, rel=1e-5)
        assert models.worst_error(actual, expected) < 1e-4
        for part in (part for layer in engine.layers for block in layer.blocks for part in block.parts):
            part._kept = None


@pytest.mark.parametrize(
    "options", [{"use_rslora": True, "r": 8}, {"lora_alpha": 5}, {"r": 3, "lora_alpha": 32}], ids=str
)
def test_scaling(options: dict) -> None:
    model = models.add_lora(models.make_base("qwen2"), **options)
    batch = models.pack()
    _, expected = models.reference(model, batch, 40)
    _, actual = run(make_engine(model), model, batch, 40)
    assert models.worst_error(actual, expected) < 1e-4


@pytest.mark.parametrize(
    "family",
    [
        "qwen2",
        "qwen3",
        "cohere2",
        "gemma3_text",
        "gemma4-e2b",
        "glm4_moe",
        "gpt_oss",
        "olmo2",
        "qwen3_moe",
        "qwen3_next",
    ],
)
def test_every_memory_policy_gives_the_same_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.add_lora(models.make_base(family), lora_dropout=0.2)
    batch, engine = models.pack(), make_engine(model)
    results = []
    for level in Keep:
        # One chunking for all: a chunk's dropout mask is its own.
        engine.plan = replace(engine.plan, keep=(level,) * len(engine.layers), mlp_tokens=24, head_tokens=7)
        engine.load_state_dict({"seed": 5, "draws": 0})
        results.append(run(engine, model, batch, 40))
    monkeypatch.setattr(attention_module, "_FILLING", 1)  # a group is one kv head
    engine.plan = replace(engine.plan, keep=(Keep.INPUT,) * len(engine.layers), sparing=True)
    engine.load_state_dict({"seed": 5, "draws": 0})
    results.append(run(engine, model, batch, 40))
    for loss, actual in results[1:]:
        assert loss == results[0][0]
        assert models.worst_error(actual, results[0][1]) < 1e-6


def test_weights_that_are_not_kept_give_the_same_gradients() -> None:
    model = models.add_lora(models.quantize(models.make_base("qwen2"), double=True))
    batch, engine = models.pack(), make_engine(model)
    assert engine.plan.kept_weights == 3
    _, kept = run(engine, model, batch, 40)
    for layer in engine.layers:
        for site in layer.sites:
            site._kept = None
    _, again = run(engine, model, batch, 40)
    assert models.worst_error(again, kept) < 1e-6


@pytest.mark.parametrize("family", ["mistral-window", "gpt_oss"])
def test_a_pack_equals_its_documents_one_by_one(family: str) -> None:
    model = models.add_lora(models.make_base(family))
    batch, engine = models.pack(), make_engine(model)
    loss, together = run(engine, model, batch, 40)
    engine.flat.grad.zero_()
    start = total = 0
    for length in models.LENGTHS:
        part = {key: value[:, start : start + length] for key, value in batch.items()}
        total += engine.forward_backward(part, 40).item()
        start += length
    assert total == pytest.approx(loss, rel=1e-5)
    assert models.worst_error(models.gradients(model), together) < 1e-5


def test_a_documents_weight_multiplies_its_gradient() -> None:
    """Against autograd of each weight's documents; in parts too."""
    model = models.add_lora(models.make_base("llama"))
    for batch in (models.pack(), models.padded()):
        plain = MicroBatch.of(batch)
        micro = replace(plain, weights=tuple(1.0 if at % 2 else 0.25 for at in range(len(plain.lengths))))
        whole, _ = models.reference(model, batch, 40)
        expected: dict[str, torch.Tensor] = {}
        for weight, part in micro.by_weight():
            inputs = {key: value for key, value in part.inputs().items() if key != LENGTHS}
            _, own = models.reference(model, inputs, 40)
            expected = {name: weight * own[name] + expected.get(name, 0.0) for name in own}
        engine = make_engine(model)
        for tokens in (engine.plan.part_tokens, 30):
            engine.plan = replace(engine.plan, part_tokens=tokens)
            found, actual = run(engine, model, micro.inputs(), 40)
            assert found == pytest.approx(whole, rel=1e-5)
            assert models.worst_error(actual, expected) < 1e-4


def test_gradients_accumulate_over_the_window() -> None:
    model = models.add_lora(models.make_base("qwen2"))
    engine, batches = make_engine(model), [models.pack(seed) for seed in (2, 3)]
    singles = [run(engine, model, batch, 80)[1] for batch in batches]
    engine.flat.grad.zero_()
    for batch in batches:
        engine.forward_backward(batch, torch.tensor(80))
    expected = {name: singles[0][name] + singles[1][name] for name in singles[0]}
    assert models.worst_error(models.gradients(model), expected) < 1e-6


@pytest.mark.parametrize(
    ("family", "options"), [("qwen2", {}), ("qwen3_5_text", {"target_modules": r".*\.layers\.2\..*_proj\w*"})]
)
def test_dropout_is_the_same_forward_and_backward(family: str, options: dict) -> None:
    """The loss is linear in an adapter's B along one direction's small step: its slope is the gradient."""
    model = models.add_lora(models.make_base(family, dtype=torch.float64), lora_dropout=0.3, **options)
    engine = make_engine(model, dtype=torch.float64)
    batch = models.pack()
    state = {"seed": 9, "draws": 3}
    engine.load_state_dict(state)
    _, grads = run(engine, model, batch, 40)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        step = 1e-3 * grads[name] / grads[name].norm()
        losses = []
        for sign in (1, -1):
            parameter.data.add_(step, alpha=sign)
            engine.load_state_dict(state)
            losses.append(engine.forward_backward(batch, 40).item())
            parameter.data.add_(step, alpha=-sign)
        slope = (losses[0] - losses[1]) / 2e-3
        assert slope == pytest.approx(float(grads[name].norm()), rel=2e-2), name


def test_dropout_differs_between_micro_batches_and_is_off_in_evaluation() -> None:
    model = models.add_lora(models.make_base("qwen2"), lora_dropout=0.3)
    engine, batch = make_engine(model), models.pack()
    assert engine.forward_backward(batch, 1).item() != engine.forward_backward(batch, 1).item()
    loss, count = engine.evaluate(batch)
    model.eval()
    expected, _ = models.reference(model, batch, 1)
    assert count == models.supervised(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_dropout_goes_on_where_it_was() -> None:
    batch = models.pack()
    model = models.add_lora(models.make_base("qwen2"), lora_dropout=0.3)
    engine = make_engine(model)
    engine.forward_backward(batch, 1)
    state, next_loss = engine.state_dict(), engine.forward_backward(batch, 1).item()
    engine.load_state_dict(state)
    assert engine.forward_backward(batch, 1).item() == next_loss


def test_the_loss_falls_and_the_base_stays() -> None:
    model = models.add_lora(models.quantize(models.make_base("smollm2"), double=True))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    engine, batch = make_engine(model), models.pack()
    optimizer = FusedAdamW8bit(engine.flat, lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(engine.forward_backward(batch, models.supervised(batch)).item())
        optimizer.clip_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss"])
def test_what_peft_saves_is_what_was_trained(tmp_path: Path, family: str) -> None:
    model = models.add_lora(models.make_base(family))
    engine, batch = make_engine(model), models.pack()
    optimizer = FusedAdamW8bit(engine.flat, lr=1e-2)
    engine.forward_backward(batch, 40)
    optimizer.step()
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(models.make_base(family), tmp_path)
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_only_some_layers_have_adapters() -> None:
    model = models.add_lora(models.make_base("qwen2"), layers_to_transform=[1, 2], target_modules=ATTENTION)
    batch = models.pack()
    _, expected = models.reference(model, batch, 40)
    _, actual = run(make_engine(model), model, batch, 40)
    assert models.worst_error(actual, expected) < 1e-4


def test_nothing_supervised_gives_no_gradient() -> None:
    model = models.add_lora(models.make_base("qwen2"))
    batch = models.pack()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    engine = make_engine(model)
    assert engine.forward_backward(batch, 0).item() == 0.0
    assert not engine.flat.grad.any()


def test_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(CannotFuse, match="variant"):
        make_engine(models.add_lora(models.make_base("qwen2"), use_dora=True))
    with pytest.raises(CannotFuse, match="head"):
        make_engine(models.add_lora(models.make_base("qwen2"), modules_to_save=["lm_head"]))
    with pytest.raises(CannotFuse, match="no LoRA adapter"):
        make_engine(models.make_base("qwen2").requires_grad_(False))
    model = models.add_lora(models.make_base("qwen3_5_text"))
    model.get_base_model().model.layers[2].linear_attn.A_log.requires_grad_(True)
    with pytest.raises(CannotFuse, match="trains its decays"):
        make_engine(model)
    engine = make_engine(models.add_lora(models.make_base("qwen2")), tokens=32)
    with pytest.raises(UserError, match="40 tokens"):
        engine.forward_backward(models.pack(lengths=(40,)), 1)
    left = models.padded()
    left["attention_mask"] = left["attention_mask"].flip(1)
    with pytest.raises(UserError, match="left"):
        make_engine(models.add_lora(models.make_base("qwen2"))).forward_backward(left, 1)


def test_a_text_model_inside_its_own_families_class() -> None:
    """Gemma 4's class around it makes embedded tokens and per-layer inputs, and caps logits, as the text model does."""
    torch.manual_seed(0)
    model = models.add_lora(
        models.gemma4_with_tower(), target_modules=[*ATTENTION, "down_proj", "per_layer_input_gate"]
    )
    batch = models.pack()
    batch["input_ids"].clamp_(min=4)  # no image's
    loss, expected = models.reference(model, batch, 40)
    found, actual = run(make_engine(model), model, batch, 40)
    assert found == pytest.approx(loss, rel=1e-5)
    assert models.worst_error(actual, expected) < 1e-4


def test_the_real_model(model_folder: Path) -> None:
    """SmolLM2-135M in fp32 and in NF4, 30 layers deep, on two packed documents."""
    batch = models.pack(lengths=(24, 9, 7))
    for nf4 in (False, True):
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model = models.add_lora(models.quantize(base, double=True) if nf4 else base, target_modules=ATTENTION, r=8)
        loss, expected = models.reference(model, batch, 20)
        found, actual = run(make_engine(model), model, batch, 20)
        assert found == pytest.approx(loss, rel=1e-5)
        assert models.worst_error(actual, expected) < 1e-4


def test_a_memory_that_no_plan_keeps_is_said() -> None:
    model = models.add_lora(models.make_base("qwen2"))
    engine = Engine(model, dtype=torch.float32, tokens=64, memory=1)
    assert engine.least_memory == engine.plan.nbytes > 1
    assert Engine(model, dtype=torch.float32, tokens=64, memory=engine.plan.nbytes).least_memory is None


@pytest.mark.parametrize("part_tokens", [30, 40])
def test_parts_of_documents_give_the_same_gradients(part_tokens: int) -> None:
    model = models.add_lora(models.make_base("qwen2"))
    batch, engine = models.pack(), make_engine(model)
    loss, whole = run(engine, model, batch, 40)
    expected = engine.evaluate(batch)
    engine.plan = replace(engine.plan, part_tokens=part_tokens)
    in_parts, actual = run(engine, model, batch, 40)
    assert in_parts == pytest.approx(loss, rel=1e-5)
    assert models.worst_error(actual, whole) < 1e-5
    assert engine.evaluate(batch)[0].item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_long_documents_by_themselves_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as a row of a round length; of what fills the pack up nothing is computed."""
    model = models.add_lora(models.make_base("qwen2"))
    batch, engine = models.pack(lengths=(17, 5, 30, 12)), make_engine(model)
    loss, whole = run(engine, model, batch, 40)
    expected = engine.evaluate(batch)
    monkeypatch.setattr(engine_module, "LONG", 16)
    assert [part.lengths for part in engine._parts(engine._micro_batch(batch))] == [(64,), (5,), (64,)]
    by_themselves, actual = run(engine, model, batch, 40)
    assert by_themselves == pytest.approx(loss, rel=1e-5)
    assert models.worst_error(actual, whole) < 1e-5
    assert engine.evaluate(batch)[0].item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_fp16_keeps_small_gradients() -> None:
    """The division by the window's supervised tokens happens in float32: in fp16 it would push gradients under 6e-8."""
    model = models.add_lora(models.make_base("qwen2", dtype=torch.float16))
    engine, batch = make_engine(model, dtype=torch.float16), models.pack()
    _, few = run(engine, model, batch, 40)
    _, many = run(engine, model, batch, 40_000_000)
    assert all(bool(grad.isfinite().all()) for grad in few.values())
    assert models.worst_error({name: grad * 1e6 for name, grad in many.items()}, few) < 1e-3
