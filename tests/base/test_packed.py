"""Packed weights: bitsandbytes' own bytes and numbers, MXFP4 as Transformers reads it, and gradients to the bit."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from slimtune.base.packed import Mxfp4Tensor, Nf4Tensor, PackedTensor, unpack_


def stack(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 128, 64), (3, 24, 40), (2, 512, 576), (2, 130, 128), (2, 33, 7)])
def test_each_matrix_is_packed_as_bitsandbytes_packs_it_alone(
    shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool
) -> None:
    weights = stack(shape, dtype)
    packed = Nf4Tensor.quantize(weights, double_quant=double_quant)
    assert (packed.shape, packed.dtype) == (weights.shape, dtype)
    for at, matrix in enumerate(weights):
        codes, state = bnb.quantize_4bit(
            matrix.contiguous(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
        )
        assert torch.equal(packed.parts["codes"][at, : codes.numel()], codes.flatten())
        assert torch.equal(packed.parts["absmax"][at], state.absmax)
        if double_quant:
            assert torch.equal(packed.parts["scale"][at], state.state2.absmax)
            assert torch.equal(packed.parts["offset"][at], state.offset)
        if shape[-1] % 64 == 0:  # on some CPUs bitsandbytes itself misreads rows of other widths
            assert torch.equal(packed.unpack()[at], bnb.dequantize_4bit(codes, state))


def test_it_stays_packed_in_inference_mode() -> None:
    """As answers are computed: a view of a parameter is taken there too."""
    weights = nn.Parameter(Nf4Tensor.quantize(stack((3, 128, 64)), double_quant=True), requires_grad=False)
    numbers, rows = weights.unpack(), stack((3, 5, 64))
    with torch.inference_mode():
        for view, same in (
            (weights.transpose(-2, -1), numbers.transpose(-2, -1)), (weights[1], numbers[1]),
            (weights[torch.tensor([2, 0])], numbers[torch.tensor([2, 0])]),
        ):  # fmt: skip
            assert isinstance(view, Nf4Tensor)
            assert torch.equal(view.unpack(), same)
        assert torch.equal(rows @ weights.transpose(-2, -1), rows @ numbers.transpose(-2, -1))


def test_rows_that_are_no_whole_blocks_have_their_own_scales() -> None:
    weights = stack((2, 33, 7))
    packed = Nf4Tensor.quantize(weights, double_quant=False)
    flat = weights.reshape(2, -1)
    for at in range(2):
        blocks = torch.nn.functional.pad(flat[at], (0, -flat.shape[1] % 64)).view(-1, 64)
        assert torch.equal(packed.parts["absmax"][at], blocks.abs().amax(dim=1))
    # NF4's widest gap between neighbouring values is 0.304 of the scale.
    limit = 0.16 * packed.parts["absmax"].repeat_interleave(64, 1)[:, : flat.shape[1]]
    assert ((packed.unpack().reshape(2, -1) - flat).abs() <= limit).all()


def test_what_can_stay_packed_does() -> None:
    weights = stack((4, 64, 128))
    packed: Any = Nf4Tensor.quantize(weights, double_quant=True)
    numbers = packed.unpack()
    cases = [
        (packed[2], numbers[2]),
        (packed[torch.tensor(1)], numbers[1]),
        (packed[torch.tensor([3, 0, 3])], numbers[[3, 0, 3]]),
        (packed.transpose(-2, -1), numbers.transpose(-2, -1)),
        (packed.transpose(1, 2)[1].t(), numbers[1]),
        (packed.permute(0, 2, 1), numbers.permute(0, 2, 1)),
        (packed[0].T, numbers[0].T),
        (packed.detach(), numbers),
        (packed.clone(), numbers),
        (packed.to(torch.float64), numbers.double()),
    ]
    for packed_result, expected in cases:
        assert isinstance(packed_result, PackedTensor)
        assert packed_result.shape == expected.shape
        assert packed_result.stride() == expected.stride()
        if expected.dtype == torch.float32:
            assert torch.equal(packed_result.unpack(), expected)
    assert not isinstance(packed.transpose(0, 1), PackedTensor)
    assert torch.equal(packed.transpose(0, 1), numbers.transpose(0, 1))
    assert torch.equal(packed[1:3], numbers[1:3])
    assert torch.equal(packed + 1, numbers + 1)
    assert packed.packed_bytes < weights.nbytes / 6


def test_packed_weights_are_never_written_to() -> None:
    packed: Any = nn.Parameter(Nf4Tensor.quantize(stack((2, 64, 64)), double_quant=True), requires_grad=False)
    for write in (
        lambda: packed.data.add_(1.0),
        lambda: packed.data.copy_(torch.zeros(2, 64, 64)),
        lambda: packed.data.zero_(),
        lambda: packed.data.mul_(2.0),
    ):
        with pytest.raises(TypeError, match="frozen"):
            write()


def test_a_module_that_is_moved_takes_the_parts_along() -> None:
    """As ``Module.to`` moves to a GPU: it sets a parameter's ``data``, and the parameter stays the same object."""
    packed = Nf4Tensor.quantize(stack((3, 24, 40)), double_quant=True)
    module = nn.Module()
    module.stack = parameter = nn.Parameter(packed, requires_grad=False)
    numbers, before = packed.unpack(), dict(parameter.parts)
    module._apply(lambda tensor: tensor.clone())
    assert module.stack is parameter
    assert all(parameter.parts[name] is not part for name, part in before.items())
    assert all(part.data_ptr() != before[name].data_ptr() for name, part in parameter.parts.items())
    assert torch.equal(parameter.unpack(), numbers)
    assert isinstance(parameter.data, Nf4Tensor)
    with torch.no_grad():
        parameter.data = parameter.transpose(1, 2).transpose(1, 2).to(torch.bfloat16)
    assert (parameter.dtype, parameter.turned, parameter.unpack().dtype) == (torch.bfloat16, False, torch.bfloat16)
    with pytest.raises(TypeError, match="can't be a Tensor"):
        parameter.data = numbers
    assert module.to("meta").stack.parts["codes"].is_meta


def test_mxfp4_is_what_transformers_unpacks() -> None:
    draw = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 40, 5, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(110, 140, (3, 40, 5), dtype=torch.uint8, generator=draw)
    for dtype in (torch.bfloat16, torch.float32):
        packed: Any = Mxfp4Tensor.of_files(blocks, scales, dtype)
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert packed.shape == expected.shape == (3, 160, 40)
        assert torch.equal(packed.unpack(), expected)
        assert torch.equal(packed[1].unpack(), expected[1])
    assert packed.packed_bytes == blocks.nbytes + scales.nbytes


@pytest.fixture(scope="module")
def mixture() -> tuple[Any, Any]:
    """A small mixture of experts with packed stacks, and the same with their numbers."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    packed = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in packed.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            made = Nf4Tensor.quantize(getattr(layer.mlp.experts, name).data, double_quant=True)
            setattr(layer.mlp.experts, name, nn.Parameter(made, requires_grad=False))
    plain = copy.deepcopy(packed)
    unpack_(plain)
    assert isinstance(packed.model.layers[0].mlp.experts.gate_up_proj, Nf4Tensor)
    assert not any(isinstance(parameter, PackedTensor) for parameter in plain.parameters())
    return packed, plain


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_the_numbers(
    mixture: tuple[Any, Any], implementation: str, experts: bool, checkpointing: bool
) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    found = []
    for model in map(copy.deepcopy, mixture):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = implementation
        config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=parameters)
        wrapped: Any = get_peft_model(model, config)
        torch.manual_seed(2)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(24)[None] % 128
        wrapped.train()
        output = wrapped(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
        found.append((output.logits, gradients))
    (logits, gradients), (expected, expected_gradients) = found
    # Batched products are of copies that lie elsewhere, and some CPUs' libraries choose their kernel by alignment.
    same = {"rtol": 1e-5, "atol": 1e-6} if implementation == "batched_mm" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(logits, expected, **same)
    assert gradients.keys() == expected_gradients.keys()
    assert sum(".experts." in name for name in gradients) == (8 if experts else 0)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected_gradients[name], **same, msg=name)


def test_no_numbers_are_kept_for_the_backward(mixture: tuple[Any, Any]) -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    model = copy.deepcopy(mixture[0])
    embedded = model.get_input_embeddings()(torch.arange(8)[None]).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=embedded).logits.sum().backward()
    assert any(isinstance(tensor, PackedTensor) for tensor in kept)
    sizes = {parameter.numel() for parameter in model.parameters() if isinstance(parameter, PackedTensor)}
    assert not [t for t in kept if not isinstance(t, PackedTensor) and t.dim() == 3 and t.numel() in sizes]
