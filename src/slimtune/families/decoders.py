"""How the decoder layers of Transformers' model types are put together, where their modules don't tell it. No torch.

To add a family to the engine: its line in :data:`DECODERS`, its tiny config in ``tests/engine/models.py``. The tests
hold every one against the unfused model; a run holds it against the model's own loss before its first step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["DECODERS", "BranchForm", "DecoderForm", "RouterForm"]


@dataclass(frozen=True)
class BranchForm:
    """One residual branch, by the names of the layer's modules."""

    blocks: tuple[str | BranchForm, ...]
    """An attention is called self_attn, a state linear_attn; the gate of a per-layer input is followed by its
    projection. A branch among them has norms of its own, and no stream past it."""
    norm: str | None = None
    norm_after: str | None = None
    where: str | None = None
    """It is there in layers that have this module."""
    unless: str | None = None
    """It isn't there in layers that have this module."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        inside = (name for each in self.blocks for name in ((each,) if isinstance(each, str) else each.names))
        return *inside, *(name for name in (self.norm, self.norm_after, self.where) if name is not None)


@dataclass(frozen=True)
class RouterForm:
    """Where a mixture's router lies, and how it makes weights of its logits, where its attributes don't tell it."""

    gate: str = "gate"
    """The router's name in the mixture."""
    bias: str = "gate.e_score_correction_bias"
    """What is added to scores before experts are chosen, in the mixture; some have none."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    wide: bool = False
    """Logits are computed in float32 whatever the model's dtype."""
    epsilon: float = 0.0
    """Added to the sum that the chosen scores are divided by."""
    normalises: bool = False
    """It reads what the experts' norm reads, by a norm of its own, and each expert has a scale."""
    clamped: bool = False
    """Its experts clamp gate and up (gpt-oss): the limit and the activation's factor are the module's."""


@dataclass(frozen=True)
class DecoderForm:
    """What the layers of a model type have in common."""

    branches: tuple[BranchForm, ...]
    norm_offset: float = 0.0
    """What norms add to their weights."""
    centred: bool = False
    """Norms take the mean away first, as LayerNorm."""
    interleaved: bool = False
    """Rotation turns neighbouring columns against each other; else a head's halves."""
    norms_rows: bool = False
    """The norms of q and k go over all heads of a token."""
    window_of_all: bool = False
    """The config's ``sliding_window`` is every layer's; else the attention module has its own."""
    turned: Literal["all", "windowed", "windowed if any"] = "all"
    """Which layers are rotated: those with a window alone, or so only where the config has one."""
    scaled_embedding: bool = False
    """Embedded tokens are multiplied with the root of the hidden size, rounded to their dtype."""
    embedding_times: str | None = None
    """The config's name of what embedded tokens are multiplied with."""
    residual_times: str | None = None
    """The config's name of what each branch's result is multiplied with."""
    logits_times: str | None = None
    """The config's name of what logits are multiplied with."""
    logits_over: str | None = None
    """The config's name of what logits are divided by."""
    layer_times: str | None = None
    """The layer's name of what its result is multiplied with, stream and all."""
    sizes_by_layer: bool = False
    """The config has other sizes for some layers, which their modules tell as well."""
    same_inside: tuple[str, ...] = ()
    """Model types around the text model that do to logits what its own class does."""
    grows_queries: bool = False
    """Rotated queries grow with their position, as in Llama 4: the config's ``llama_4_scaling_beta``."""
    gates_queries: bool = False
    """A query's projection gives its gate too, head by head; its sigmoid multiplies what attention gives."""
    caps_scores: bool = False
    """The attention module's soft cap is applied; Gemma 3 has one that is not."""
    router: RouterForm | None = None
    """Where feed-forwards may be mixtures of experts."""


_BEFORE = (BranchForm(("self_attn",), "input_layernorm"), BranchForm(("mlp",), "post_attention_layernorm"))
_AFTER = (
    BranchForm(("self_attn",), norm_after="post_attention_layernorm"),
    BranchForm(("mlp",), norm_after="post_feedforward_layernorm"),
)
_AROUND = (
    BranchForm(("self_attn",), "input_layernorm", "post_attention_layernorm"),
    BranchForm(("mlp",), "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_PER_LAYER = BranchForm(
    ("per_layer_input_gate", "per_layer_projection"),
    norm_after="post_per_layer_input_norm",
    where="per_layer_input_gate",
)
_GLM4 = (
    BranchForm(("self_attn",), "input_layernorm", "post_self_attn_layernorm"),
    BranchForm(("mlp",), "post_attention_layernorm", "post_mlp_layernorm"),
)
_GRANITE_MOE = (
    BranchForm(("self_attn",), "input_layernorm"),
    BranchForm(("block_sparse_moe", "shared_mlp"), "post_attention_layernorm"),
)
_BESIDE = (BranchForm(("self_attn", "mlp"), "input_layernorm"),)
_MLP_AND_EXPERTS = BranchForm(
    (
        BranchForm(("mlp",), "pre_feedforward_layernorm", "post_feedforward_layernorm_1"),
        BranchForm(("experts",), "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
    ),
    norm_after="post_feedforward_layernorm",
    where="router",
)
_GEMMA4 = DecoderForm(
    (_AROUND[0], replace(_AROUND[1], unless="router"), _MLP_AND_EXPERTS, _PER_LAYER),
    router=RouterForm("router", normalises=True),
    scaled_embedding=True,
    layer_times="layer_scalar",
    sizes_by_layer=True,
    same_inside=("gemma4", "gemma4_unified"),
)

_QWEN3_NEXT = DecoderForm(
    (
        replace(_BEFORE[0], where="self_attn"),
        BranchForm(("linear_attn",), "input_layernorm", where="linear_attn"),
        _BEFORE[1],
    ),
    norm_offset=1.0,
    gates_queries=True,
    router=RouterForm(),
)

_GRANITE: dict[str, Any] = {
    "embedding_times": "embedding_multiplier",
    "residual_times": "residual_multiplier",
    "logits_over": "logits_scaling",
}
# DeepSeek-V3's.
_SIGMOID = RouterForm(score="sigmoid", wide=True, epsilon=1e-20)

DECODERS: dict[str, DecoderForm] = {
    "cohere": DecoderForm(_BESIDE, centred=True, interleaved=True, logits_times="logit_scale"),
    "cohere2": DecoderForm(_BESIDE, centred=True, interleaved=True, turned="windowed", logits_times="logit_scale"),
    "dots1": DecoderForm(_BEFORE, router=_SIGMOID),
    "ernie4_5": DecoderForm(_BEFORE, interleaved=True),
    "ernie4_5_moe": DecoderForm(
        _BEFORE, interleaved=True, router=RouterForm(bias="gate.moe_statics.e_score_correction_bias", wide=True)
    ),
    "exaone4": DecoderForm(_AFTER, turned="windowed if any"),
    "exaone_moe": DecoderForm(_BEFORE, turned="windowed if any", router=_SIGMOID),
    "flex_olmo": DecoderForm(_AFTER, norms_rows=True, router=RouterForm()),
    "gemma": DecoderForm(_BEFORE, norm_offset=1.0, scaled_embedding=True),
    "gemma2": DecoderForm(_AROUND, norm_offset=1.0, scaled_embedding=True, caps_scores=True),
    "gemma3_text": DecoderForm(_AROUND, norm_offset=1.0, scaled_embedding=True),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm": DecoderForm(_BEFORE, interleaved=True),
    "glm4": DecoderForm(_GLM4, interleaved=True),
    "glm4_moe": DecoderForm(_BEFORE, router=_SIGMOID),
    "gpt_oss": DecoderForm(_BEFORE, router=RouterForm("router", clamped=True)),
    "granite": DecoderForm(_BEFORE, **_GRANITE),
    "granitemoe": DecoderForm(_GRANITE_MOE, **_GRANITE, router=RouterForm("router")),
    # Its dense models have attention alone; the others' states the engine doesn't compute.
    "granitemoehybrid": DecoderForm(_GRANITE_MOE, **_GRANITE, router=RouterForm("router")),
    "granitemoeshared": DecoderForm(_GRANITE_MOE, **_GRANITE, router=RouterForm("router")),
    "helium": DecoderForm(_BEFORE, interleaved=True),
    "llama": DecoderForm(_BEFORE),
    "minimax_m2": DecoderForm(
        _BEFORE, norms_rows=True, router=RouterForm(bias="e_score_correction_bias", score="sigmoid")
    ),
    "ministral": DecoderForm(_BEFORE),
    "ministral3": DecoderForm(_BEFORE, window_of_all=True, grows_queries=True),
    "mistral": DecoderForm(_BEFORE, window_of_all=True),
    "mixtral": DecoderForm(_BEFORE, window_of_all=True, router=RouterForm()),
    "olmo2": DecoderForm(_AFTER, norms_rows=True),
    "olmo3": DecoderForm(_AFTER, norms_rows=True),
    # Its attention hands on a window of the config's, but its masks have none.
    "olmoe": DecoderForm(_BEFORE, norms_rows=True, router=RouterForm()),
    "phi3": DecoderForm(_BEFORE, window_of_all=True),
    "qwen2": DecoderForm(_BEFORE),
    "qwen3": DecoderForm(_BEFORE),
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_moe": DecoderForm(_BEFORE, router=RouterForm()),
    "qwen3_next": _QWEN3_NEXT,
    "seed_oss": DecoderForm(_BEFORE),
    "smollm3": DecoderForm(_BEFORE),
    "solar_open": DecoderForm(_BEFORE, router=_SIGMOID),
}
"""By ``model_type``."""
