"""A backward that is wrong is found on the loaded model, before the first step."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimtune.engine import CannotFuse, Engine
from slimtune.engine import engine as engine_module
from slimtune.engine.blocks import attention, delta, experts, mlp
from slimtune.engine.fp8 import Fp8
from slimtune.engine.fp8_head import Fp8Head
from slimtune.engine.kernels import delta as rule
from slimtune.engine.kernels import fp8, lora, mlp_fp8, norm, short_conv
from slimtune.errors import UserError
from slimtune.training import proof_of_gradients
from slimtune.training.proof import beside_others, prove_loss, text_of
from slimtune.training.proof_of_gradients import prove_gradients, prove_precision
from tests.engine import models

TOKENS = np.random.default_rng(0).integers(3, models.VOCABULARY, 30)
HOW = torch.float32, 256, 128
PACK = beside_others(text_of(TOKENS, 128), 256)


class Trainer(SimpleNamespace):
    """What the proof asks of one."""

    aux_loss_enabled = False

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def compute_loss_context_manager(self) -> Any:
        wide = self.engine.dtype == torch.float32
        return nullcontext() if wide else torch.autocast("cpu", self.engine.dtype)

    def evaluation_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        found: tuple[Tensor, int] = self.engine.evaluate(inputs)
        return found


def trainer(family: str, targets: str | list[str] = "all-linear", dtype: torch.dtype = torch.float32) -> Trainer:
    """One that begins: every B is zero."""
    model = models.add_lora(models.make_base(family, dtype=dtype), target_modules=targets)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return Trainer(model=model, engine=Engine(model, dtype=dtype, tokens=256), _metrics={"eval": {}})


@pytest.mark.parametrize("family", ["qwen2", "gemma4-e2b", "gpt_oss", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_the_engine_is_right_and_stays_as_it_was(family: str) -> None:
    made = trainer(family)
    before, random = made.engine.flat.data.clone(), torch.get_rng_state()
    prove_loss(made, [TOKENS], *HOW)
    assert prove_gradients(made, [TOKENS], *HOW) is None
    assert torch.equal(made.engine.flat.data, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not made.engine.flat.grad.any()
    assert made.engine.state_dict()["draws"] == 0
    assert made.model.training
    assert all(parameter.requires_grad for parameter in made.engine.flat.parameters)


def off(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same by 3 % too large, whatever tensors it gives."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        made = function(*arguments, **options)
        if isinstance(made, tuple):
            return tuple(1.03 * each for each in made)
        return None if made is None else 1.03 * made

    return wrong


@pytest.mark.parametrize(
    ("family", "owner", "name"),
    [
        ("qwen3_5_text", rule, "delta_backward"),
        ("qwen3_5_moe_text", rule, "delta_backward"),
        ("qwen3_next", rule, "delta_backward"),
        ("qwen3_5_text", short_conv, "conv_silu_backward"),
        ("qwen3_5_text", norm, "norm_backward"),
        ("gpt_oss", attention.AttentionBlock, "backward"),
        ("gpt_oss", experts.ExpertsBlock, "backward"),
        ("qwen2", mlp.MlpBlock, "backward"),
    ],
)
def test_a_backward_that_is_three_percent_off_is_found(
    family: str, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(family)
    monkeypatch.setattr(owner, name, off(getattr(owner, name)))
    prove_loss(made, [TOKENS], *HOW)  # no loss shows it
    with pytest.raises(CannotFuse, match=r"gradient of .+ on a document in a pack is 0\.\d+ of its size"):
        prove_gradients(made, [TOKENS, TOKENS[::-1]], *HOW)


def test_a_loss_that_rounding_moved_is_looked_at_on_other_documents() -> None:
    made, inner, offs = trainer("qwen2"), Trainer.evaluation_sum, list[float]()

    def evaluation_sum(model: Any, inputs: dict[str, Any]) -> tuple[Any, int]:
        total, supervised = inner(made, model, inputs)
        return total * (1 + offs.pop(0)), supervised

    made.evaluation_sum = evaluation_sum
    texts = [TOKENS, TOKENS[::-1], TOKENS[1:]]
    for rounding in ([2e-4, -2e-4], [2e-4, 1e-4, -3e-4]):  # at most 1e-4 in 32 bits
        offs[:] = rounding
        prove_loss(made, texts, *HOW)
        assert not offs
    offs[:] = [2e-4, 2e-4, 2e-4]
    with pytest.raises(CannotFuse, match="the engine's loss on a document in a pack"):
        prove_loss(made, texts, *HOW)


def test_what_a_single_document_says_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = trainer("qwen3_moe"), []
    inner = Engine.upper_gradients

    def turned(self: Engine, batch: dict[str, Any]) -> Any:
        """As if a router's choice had turned in the first one."""
        seen.append(batch["input_ids"])
        return [(parameter, gradient * (0.9 if len(seen) == 1 else 1.0)) for parameter, gradient in inner(self, batch)]

    monkeypatch.setattr(Engine, "upper_gradients", turned)
    assert prove_gradients(made, [TOKENS, TOKENS[::-1], TOKENS], *HOW) is None
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_an_adapters_own_gradients_are_compared_though_its_b_begins_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("qwen2", ["v_proj"])
    inner = lora.lora_up_backward_

    def wrong(dy: Tensor, u: Tensor, scaling: float, **options: Any) -> Any:
        return inner(dy, u, 1.03 * scaling, **options)

    monkeypatch.setattr(lora, "lora_up_backward_", wrong)
    with pytest.raises(CannotFuse, match="lora_"):
        prove_gradients(made, [TOKENS], *HOW)


def test_in_16_bits_rounding_is_none_and_a_gradient_of_another_direction_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made, how = trainer("qwen3_5_text", dtype=torch.bfloat16), (torch.bfloat16, *HOW[1:])
    assert prove_gradients(made, [TOKENS], *how) is None
    inner = rule.delta_backward

    def wrong(do: Tensor, mixed: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Without what goes to the keys."""
        dmixed, dg, dbeta = inner(do, mixed, *rest)
        keys = rest[-2].columns[0]
        dmixed[:, keys : 2 * keys] = 0
        return dmixed, dg, dbeta

    with monkeypatch.context() as patched:
        patched.setattr(rule, "delta_backward", wrong)
        with pytest.raises(CannotFuse, match="in_proj_qkv"):
            prove_gradients(made, [TOKENS], *how)
    # A model whose gradients are nearly all rounding is held to its own.
    monkeypatch.setitem(proof_of_gradients._APART, torch.bfloat16, 1e-3)
    assert prove_gradients(made, [TOKENS], *how) is None
    monkeypatch.setattr(proof_of_gradients, "_NOISE", 0.0)
    with pytest.raises(CannotFuse):
        prove_gradients(made, [TOKENS], *how)


def test_a_state_that_ends_with_its_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The document begins within a chunk of 64 and goes on in the next one, in the loss and in the gradient."""
    forward, backward = rule.delta_forward, rule.delta_backward

    def cut(starts: Tensor) -> tuple[Tensor, Tensor]:
        starts = torch.maximum(starts, torch.arange(len(starts), dtype=starts.dtype) // rule.CHUNK * rule.CHUNK)
        ends = torch.cat([starts.unique(), torch.tensor([len(starts)])])
        return starts, ends.int()

    made = trainer("qwen3_5_text")
    with monkeypatch.context() as patched:
        patched.setattr(
            delta.delta, "delta_forward",
            lambda mixed, g, beta, starts, boundaries, heads: forward(mixed, g, beta, *cut(starts), heads),
        )  # fmt: skip
        with pytest.raises(CannotFuse, match="the engine's loss"):
            prove_loss(made, [TOKENS], *HOW)
    monkeypatch.setattr(
        delta.delta, "delta_backward",
        lambda do, mixed, g, beta, starts, boundaries, heads, saved: backward(
            do, mixed, g, beta, *cut(starts), heads, saved
        ),
    )  # fmt: skip
    prove_loss(made, [TOKENS], *HOW)
    with pytest.raises(CannotFuse, match="the engine's gradient"):
        prove_gradients(made, [TOKENS], *HOW)


def test_where_the_model_itself_has_no_gradient_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("qwen2")
    for error, said in (
        (RuntimeError("refused on this device\nmore"), r"has none \(RuntimeError: refused on this device\)"),
        (torch.OutOfMemoryError("17 GiB"), "there is no room for"),
    ):
        monkeypatch.setattr(torch.autograd, "grad", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        reason = prove_gradients(made, [TOKENS], *HOW)
        assert reason is not None
        assert re.search(said, reason)


@pytest.mark.parametrize(("room", "longest"), [(256, 128), (128, 128), (110, 110), (64, 32), (8, 8), (2, 2)])
def test_a_document_and_those_beside_it_fit(room: int, longest: int) -> None:
    text = text_of(TOKENS, min(room, longest))
    assert len(text) == min(longest, 100)
    assert text[:8].tolist() == TOKENS[: min(8, longest)].tolist()
    batch = beside_others(text, room)
    assert batch["input_ids"].shape[1] <= room
    assert int((batch["labels"] != -100).sum()) == len(text) - 1


@pytest.fixture
def in_fp8(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer whose engine multiplies in FP8, by the kernels' reference."""
    return trainer_in_fp8("qwen2", "all-linear", monkeypatch)


@pytest.fixture
def mixture_in_fp8(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """The same of a mixture, experts and all."""
    return trainer_in_fp8("qwen3_moe", ["q_proj", "k_proj", "v_proj", "o_proj"], monkeypatch)


def trainer_in_fp8(family: str, targets: str | list[str], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr(engine_module, "pays", lambda *shape: True)
    monkeypatch.setattr("slimtune.engine.weights.channels", lambda *shape: 16)
    model = models.add_lora(models.quantize(models.make_base(family), double=True), target_modules=targets)
    engine = Engine(model, dtype=torch.bfloat16, tokens=256, fp8=True)
    return Trainer(model=model, engine=engine, _metrics={"eval": {}})


def test_fp8_is_proven_beside_bf16_and_nothing_stays(in_fp8: Trainer) -> None:
    before = in_fp8.engine.flat.data.clone()
    how = torch.bfloat16, *HOW[1:]
    assert prove_gradients(in_fp8, [TOKENS], *how) is None
    told = prove_precision(in_fp8, PACK)
    assert told.startswith("an experiment: 100% of the layers' products are in FP8")
    apart = float(told.split("gradients are ")[1].split()[0])
    assert 0.01 < apart < 0.3
    assert torch.equal(in_fp8.engine.flat.data, before)
    assert not in_fp8.engine.flat.grad.any()
    assert in_fp8.engine.state_dict()["draws"] == 0


def test_a_backward_that_multiplies_with_other_numbers_is_found(
    in_fp8: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights' scales forgotten in dy: the proof in bf16 doesn't see it."""
    quantize = Fp8.quantize
    monkeypatch.setattr(Fp8, "quantize", lambda self, dy, factors: quantize(self, dy, torch.ones_like(factors)))
    assert prove_gradients(in_fp8, [TOKENS], torch.bfloat16, *HOW[1:]) is None
    with pytest.raises(UserError, match=r"precision: fp8 can't be had: the gradient .* from bf16's"):
        prove_precision(in_fp8, PACK)


def test_further_columns_of_other_channels_are_found(in_fp8: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that takes in what rounding lost of others is as far from bf16's as one without."""
    quantize = fp8.quantize

    def of_others(x: Tensor, *, again: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        return quantize(x, again=None if again is None else again.flip(0), **options)

    monkeypatch.setattr(fp8, "quantize", of_others)
    with pytest.raises(UserError, match=r"precision: fp8 can't be had: the product of .* is 0.0\d+ of its size"):
        prove_precision(in_fp8, PACK)


@pytest.mark.parametrize("way", ["product of", "gradient through"])
def test_one_projection_that_is_two_percent_off_is_found(in_fp8: Trainer, way: str) -> None:
    """Gradients alone don't tell it from rounding."""
    site = in_fp8.engine.layers[0].sites[1]
    eight = site.in_fp8
    assert eight is not None
    (eight.scales if way == "product of" else eight.ones).mul_(1.02)
    assert proof_of_gradients._wrong_product(in_fp8.engine) is not None
    with pytest.raises(
        UserError, match=rf"fp8 can't be had: the {way} \S*layers\.0\.self_attn\.o_proj is .*, 0\.0[12]\d* along"
    ):
        prove_precision(in_fp8, PACK)


def test_a_head_that_is_two_percent_off_is_found(in_fp8: Trainer) -> None:
    engine = in_fp8.engine
    head = engine._head_in_fp8 = Fp8Head(engine._head, engine._fp8)  # so small a model has no room for it
    assert proof_of_gradients._wrong_head(engine) is None
    head.scales.mul_(1.02)
    with pytest.raises(UserError, match=r"fp8 can't be had: the gradient through the head is .*, 0\.00\d* along"):
        prove_precision(in_fp8, PACK)


def test_a_head_whose_rows_are_much_alike_stays_in_16_bits(in_fp8: Trainer) -> None:
    """What they have in common cancels between a target and the others, but for rounding."""
    engine = in_fp8.engine
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(engine._head.shape[1], generator=draw) * engine._head.float().std()
    for much, stays in ((1, False), (6, True)):
        engine._head = (engine._head.float() + much * common).bfloat16()
        engine._head_in_fp8 = Fp8Head(engine._head, engine._fp8)
        engine.plan = replace(engine.plan, turned_head=1)
        assert prove_precision(in_fp8, PACK).startswith("an experiment")
        assert (engine._head_in_fp8 is None) == (engine.plan.turned_head == 0) == stays


@pytest.mark.parametrize("way", ["product of", "gradient through"])
@pytest.mark.parametrize("place", [0, 1])
def test_experts_that_are_two_percent_off_are_found(mixture_in_fp8: Trainer, way: str, place: int) -> None:
    assert prove_precision(mixture_in_fp8, PACK).startswith("an experiment: 100% of the layers' products are in FP8")
    stack = mixture_in_fp8.engine.layers[1].blocks[1].stacks[place]
    eight = stack.in_fp8
    assert eight is not None
    (eight.scales if way == "product of" else eight.ones).mul_(1.02)
    with pytest.raises(UserError, match=rf"fp8 can't be had: the {way} {stack.name} is .*, 0\.0[12]\d* along"):
        prove_precision(mixture_in_fp8, PACK)


@pytest.mark.parametrize(
    ("made", "kernel", "off"), [("in_fp8", "gated_backward", 0.5), ("mixture_in_fp8", "experts_backward", 8.0)]
)
def test_a_fused_kernel_that_is_wrong_is_found(
    made: str, kernel: str, off: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No product shows it, and in the gradients it is as small as rounding; random experts have little of them."""
    trainer, inner = request.getfixturevalue(made), getattr(mlp_fp8, kernel)

    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        values, scales = inner(*arguments, **options)
        return values, off * scales

    monkeypatch.setattr(mlp_fp8, kernel, wrong)
    assert proof_of_gradients._wrong_product(trainer.engine) is None
    with pytest.raises(UserError, match=r"the gradient of .*lora_. is 0\.\d+ of its size from itself"):
        prove_precision(trainer, PACK)


def test_a_device_that_cannot_multiply_so_is_told(in_fp8: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_product(*_: Any, **__: Any) -> None:
        raise RuntimeError("Rowwise scaling is not currently supported on your device")

    monkeypatch.setattr("slimtune.engine.kernels.fp8.product", no_such_product)
    with pytest.raises(UserError, match=r"this device can't \(RuntimeError: Rowwise scaling"):
        prove_precision(in_fp8, PACK)

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("slimtune.engine.kernels.fp8.product", no_room)
    with pytest.raises(torch.OutOfMemoryError):  # which says nothing of FP8
        prove_precision(in_fp8, PACK)


def test_small_products_are_left_in_bf16_and_that_is_said() -> None:
    model = models.add_lora(models.quantize(models.make_base("qwen2"), double=True))
    made = Trainer(model=model, engine=Engine(model, dtype=torch.bfloat16, tokens=256, fp8=True), _metrics={"eval": {}})
    assert prove_precision(made, PACK).startswith("no product of this run is large enough for FP8")
