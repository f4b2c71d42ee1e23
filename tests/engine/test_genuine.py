"""What somebody changed in a model is told: the engine computes what Transformers' classes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaModel

from slimtune import fuse
from slimtune.engine import CannotFuse, Engine
from tests.engine import models


class _Mlp(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


class _Model(LlamaModel):
    pass


class _Embedding(nn.Embedding):
    pass


def _halved(*args: Any, **kwargs: Any) -> Any:
    output, *rest = sdpa_attention_forward(*args, **kwargs)
    return 0.5 * output, *rest


def _other_function(model: Any) -> None:
    AttentionInterface.register("halved", _halved)
    model.set_attn_implementation("halved")


def _own_forward(module: Any) -> None:
    before = module.forward
    module.forward = lambda x: 0.5 * before(x)


def _another_weight(module: Any) -> None:
    """As a later version of Transformers may bring it, or a family whose line was copied."""
    module.gain = nn.Parameter(torch.ones(64), requires_grad=False)


def _set(owner: Callable[[Any], Any], name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(owner(model), name, value)


def _layer(model: Any) -> Any:
    return model.model.layers[1]


CHANGED: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "a layer's class": ("llama", _set(lambda m: _layer(m).mlp, "__class__", _Mlp), r"layers\.1\.mlp \(_Mlp\) is code"),
    "the decoder's class": ("llama", _set(lambda m: m.model, "__class__", _Model), "_Model is code of its own"),
    "the embedding's class": (
        "llama", _set(lambda m: m.model.embed_tokens, "__class__", _Embedding), r"embed_tokens \(_Embedding\) is code",
    ),
    "another family's class": (
        "mistral", _set(lambda m: _layer(m).self_attn, "__class__", LlamaAttention), r"\(LlamaAttention\) is code",
    ),
    "another norm": ("llama", _set(_layer, "input_layernorm", nn.LayerNorm(64)), "LayerNorm for its input_layernorm"),
    "another last norm": ("llama", _set(lambda m: m.model, "norm", nn.RMSNorm(64)), "a RMSNorm for its norm"),
    "a weight of attention": ("llama", lambda m: _another_weight(_layer(m).self_attn), "self_attn has a gain"),
    "a weight of a norm": ("qwen3", lambda m: _another_weight(_layer(m).self_attn.k_norm), "k_norm has a gain"),
    "a weight of an MLP": ("llama", lambda m: _another_weight(_layer(m).mlp), "mlp has a gain"),
    "a weight of a mixture": ("qwen3_moe", lambda m: _another_weight(_layer(m).mlp), "mlp has a gain"),
    "a weight of a layer": ("llama", lambda m: _another_weight(_layer(m)), "layers.1 has a gain"),
    "groups too few": ("dots1", _set(lambda m: _layer(m).mlp.gate, "topk_group", 1), "1 of 3 groups of 2 experts"),
    "angles of nothing": ("llama", _set(lambda m: m.model.rotary_emb, "inv_freq", torch.zeros(0)), "rotates 0 columns"),
    "no attention": ("llama", _set(_layer, "self_attn", nn.Identity()), "an? Identity for its self_attn"),
    "a forward of one instance": ("llama", lambda m: _own_forward(_layer(m).mlp), "LlamaMLP.* forward of its own"),
    "a registered attention": ("llama", _other_function, "halved for its attention"),
    "fewer layers by the config": ("llama", _set(lambda m: m.config, "num_hidden_layers", 2), "counts fewer"),
    "a window of the config's": ("gemma3_text", _set(lambda m: m.config, "sliding_window", 3), "window of 7.* of 3"),
    "a window of all masks": ("qwen3_moe", _set(lambda m: m.config, "sliding_window", 3), "window of None.* of 3"),
    "other types of layers": (
        "olmo3", _set(lambda m: m.config, "layer_types", ["full_attention"] * 3), "window of 7.* of None",
    ),
    "a module's dropout": ("llama", _set(lambda m: _layer(m).self_attn, "attention_dropout", 0.1), "1 has dropout"),
    "a mask of another kind": (
        "gemma3_text", _set(lambda m: m.config, "use_bidirectional_attention", True), "tokens to come",
    ),
    "a cap of nothing": ("gemma2", _set(lambda m: m.config, "final_logit_softcapping", 0.0), "softcapping of 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED)
def test_what_somebody_changed_is_told(change: str) -> None:
    family, apply, reason = CHANGED[change]
    base = models.make_base(family)
    apply(base)
    with pytest.raises(CannotFuse, match=reason):
        Engine(models.add_lora(base, target_modules=["q_proj", "v_proj"]), dtype=torch.float32, tokens=64)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("cohere", "logit_scale", 3.0),
        ("granite", "residual_multiplier", 3.0),
        ("granitemoe", "logits_scaling", 3.0),  # the model has such an attribute, and doesn't read it
        ("exaone4-full", "sliding_window", 3),
    ],
)
def test_what_modules_took_over_of_their_config_is_theirs(family: str, name: str, value: float) -> None:
    base: Any = models.make_base(family)
    setattr(base.config, name, value)
    model, batch = models.add_lora(base), models.pack()
    loss, expected = models.reference(model, batch, 40)
    found = Engine(model, dtype=torch.float32, tokens=64).forward_backward(batch, 40)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert models.worst_error(models.gradients(model), expected) < 1e-4


def test_a_hook_that_changes_nothing_is_no_reason() -> None:
    """Transformers' own, which a call for hidden states leaves behind, and the one for layers that are recomputed."""
    model: Any = models.add_lora(models.make_base("llama"))
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    model.enable_input_require_grads()
    layers = model.base_model.model.model
    assert layers.layers[0]._forward_hooks
    assert layers.embed_tokens._forward_hooks
    Engine(model, dtype=torch.float32, tokens=64)


@pytest.mark.parametrize("place", ["layers.1", "layers.1.mlp.up_proj.lora_A", "embed_tokens"])
def test_a_hook_is_told(place: str) -> None:
    model: Any = models.add_lora(models.make_base("llama"))
    part = model.base_model.model.model.get_submodule(place)
    part.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    with pytest.raises(CannotFuse, match=f"{type(part).__name__} has a hook"):
        Engine(model, dtype=torch.float32, tokens=64)


def _mixed_adapters(batch: dict[str, torch.Tensor], model: Any) -> torch.Tensor:
    """PEFT tells layers apart which rows are whose by hooks, for the one call."""
    ids = batch["input_ids"].repeat(2, 1)
    logits: torch.Tensor = model.eval()(ids, use_cache=False, adapter_names=["default", "other"]).logits
    return logits


def test_a_hooked_call_is_left_to_the_model() -> None:
    model: Any = models.add_lora(models.make_base("llama"))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    batch = models.pack()
    own = _mixed_adapters(batch, model)
    fusion = fuse(model)
    torch.testing.assert_close(_mixed_adapters(batch, model), own)
    assert dict(fusion.left) == {"a hook on a Linear": 1}
    handle = model.base_model.model.model.layers[1].register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not model(batch["input_ids"], use_cache=False).logits.any()
    handle.remove()
    assert fusion.computed == 0
    model(batch["input_ids"], use_cache=False)
    assert fusion.computed == 1


def test_what_trains_must_be_the_adapters_whole() -> None:
    def refused(reason: str, change: Callable[[Any, Any], Any]) -> None:
        model = models.add_lora(models.make_base("llama"))
        layers: Any = model.get_submodule("base_model.model.model")
        change(layers.layers[0].self_attn.q_proj, layers)
        with pytest.raises(CannotFuse, match=reason):
            Engine(model, dtype=torch.float32, tokens=64)

    refused("lora_A.*is frozen", lambda q, _: q.lora_A.default.requires_grad_(False))
    refused("lora_B.*has a hook", lambda q, _: q.lora_B.default.weight.register_hook(lambda grad: 2 * grad))
    refused("several layers share", lambda q, all_: q.lora_A.update(all_.layers[1].self_attn.q_proj.lora_A))


def test_an_adapter_on_the_embedding_is_told_though_it_is_frozen() -> None:
    model: Any = models.add_lora(models.make_base("llama"))
    model.add_adapter("other", LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            parameter.requires_grad_(False)
    with pytest.raises(CannotFuse, match="embedding has an adapter"):
        Engine(model, dtype=torch.float32, tokens=64)


def test_what_is_no_whole_model_is_told() -> None:
    model = models.add_lora(models.make_base("llama"))
    with pytest.raises(CannotFuse, match="DataParallel is no model of Transformers'"):
        fuse(nn.DataParallel(model))
    with pytest.raises(CannotFuse, match="no values"):
        fuse(model.to("meta"))
    adaptive = AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    with pytest.raises(CannotFuse, match="SVDLinear, not a LoRA adapter"):
        fuse(get_peft_model(models.make_base("llama"), adaptive))


def test_matrices_that_change_before_their_backward_are_told() -> None:
    """As autograd tells it: the backward would compute with other numbers than the forward."""
    model: Any = models.add_lora(models.make_base("llama"))
    fuse(model)
    loss = model(models.pack()["input_ids"], use_cache=False).logits.sum()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
