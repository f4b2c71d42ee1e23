"""Documents of a micro-batch don't touch each other, whatever the model; where they would, it is found out."""

from __future__ import annotations

import inspect
import re
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5

from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.training.isolation import find_layout, lay_out
from slimtune.training.layout import Layout
from slimtune.training.packs import DocumentAttention
from slimtune.training.rng import RandomState
from slimtune.words import in_chinese
from tests.families.tiny import made
from tests.tolerances import GRADIENT, GRADIENT_16_BIT
from tests.training import families


def expected_kind(family: str) -> str:
    """As the family's table says; Transformers before 5.20 counts Llama 4's chunks from the pack's beginning."""
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20)
    return "padded" if old and family == "llama4-chunks" else families.FAMILIES[family][1]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_gradients_are_those_of_the_documents_one_by_one(family: str) -> None:
    model = families.make(family)
    found = find_layout(model)
    assert found.layout.kind == expected_kind(family), found.reasons
    expected = families.one_by_one(model)
    assert families.distance(families.by_layout(model, found.layout), expected) <= GRADIENT
    alone = Layout(model, "alone")
    assert families.distance(families.by_layout(model, alone), expected) <= GRADIENT


@pytest.mark.gpu
@pytest.mark.parametrize("family", families.FAMILIES)
def test_on_a_gpu(family: str) -> None:
    model = families.make(family).cuda()
    expected = families.one_by_one(model)
    for dtype in (torch.float32, torch.bfloat16):
        found = find_layout(model, dtype=dtype)
        assert found.layout.kind == expected_kind(family), (dtype, found.reasons)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            error = families.distance(families.by_layout(model, found.layout), expected)
        if dtype == torch.float32:
            assert error <= GRADIENT
        elif family != "gpt_oss":  # whose router may be sent elsewhere by rounding
            assert error <= GRADIENT_16_BIT


@contextmanager
def _nothing(self: DocumentAttention, documents: Any) -> Any:
    yield


@pytest.mark.parametrize("family", ["gpt_oss", "opt"])
def test_a_pack_that_mixes_documents_is_found_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # These hand no positions to their mask, so Transformers' own attention sees all of a pack.
    model = families.make(family)
    monkeypatch.setattr(DocumentAttention, "within", _nothing)
    packed = Layout(model, "packed")
    assert families.distance(families.by_layout(model, packed), families.one_by_one(model)) > 0.01
    found = find_layout(model)
    assert found.layout.kind == "padded"
    assert "neighbours in a pack" in found.reasons["packed"]


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "granitemoehybrid", "falcon_h1"])
def test_states_and_convolutions_that_run_on_are_found_out(family: str) -> None:
    model = families.make(family)
    # Without the boundaries, for whose sake Transformers refuses, nothing but the proof is in the way.
    found = find_layout(model)
    assert found.layout.kind == "padded"
    leaking = Layout(model, "packed", boundaries=False)
    assert families.distance(families.by_layout(model, leaking), families.one_by_one(model)) > 0.01


def _convolution(keeps: str) -> Any:
    """In the place of causal-conv1d's kernel, which is told where documents are by ``seq_idx``."""
    plain = inspect.unwrap(modeling_qwen3_5.causal_conv1d_fn)

    def convolve(x: Tensor, *weights: Any, seq_idx: Tensor | None = None, **options: Any) -> Tensor:
        if seq_idx is None or keeps in ("no documents", "states"):
            return plain(x, *weights, **options)
        parts = x.split(torch.bincount(seq_idx[0]).tolist(), dim=-1)
        return torch.cat([plain(part, *weights, **options) for part in parts], dim=-1)

    return convolve


def _delta_rule(keeps: str) -> Any:
    """In the place of flash-linear-attention's, which is told by ``cu_seqlens``."""
    plain = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)

    def compute(*tensors: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Any:
        if keeps == "refuses":
            raise RuntimeError("Triton 3.6.0 isn't supported on Hopper. Use another one.")
        if cu_seqlens is None or keeps in ("no documents", "convolutions"):
            return plain(*tensors, g=g, beta=beta, **options)
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(tensor.split(lengths, dim=1) for tensor in (*tensors, g, beta)), strict=True)
        made = [plain(*part[:-2], g=part[-2], beta=part[-1], **options)[0] for part in parts]
        return torch.cat(made, dim=1), None

    return compute


@pytest.mark.skipif(
    not hasattr(modeling_qwen3_5.torch_chunk_gated_delta_rule, "__wrapped__"),
    reason="this Transformers chooses its kernels in each layer",
)
@pytest.mark.parametrize(
    ("keeps", "kind", "seen"),
    [
        ("documents", "packed", ""),
        ("convolutions", "padded", "neighbours in a pack"),
        ("states", "padded", "neighbours in a pack"),
        ("no documents", "padded", "neighbours in a pack"),
        ("refuses", "alone", "Triton 3.6.0 isn't supported on Hopper"),
    ],
)
def test_kernels_that_are_installed_are_not_believed(
    keeps: str, kind: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", _convolution(keeps))
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", _delta_rule(keeps))
    model = families.make("qwen3_5_text")
    found = find_layout(model)
    assert found.layout.kind == kind, found.reasons
    assert seen in found.reasons.get("packed", "")
    if keeps != "refuses":
        assert families.distance(families.by_layout(model, found.layout), families.one_by_one(model)) <= GRADIENT
    if kind == "padded":
        packed = families.by_layout(model, Layout(model, "packed"))
        assert families.distance(packed, families.one_by_one(model)) > GRADIENT


class _Toy(nn.Module):
    """A language model that mixes what it is told to mix."""

    class _Config:
        @staticmethod
        def to_dict() -> dict[str, Any]:
            return {"pad_token_id": 0, 3: "labels have numbers for keys"}

        def get_text_config(self) -> _Toy._Config:
            return self

    def __init__(self, mixes: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixes, self.config = mixes, self._Config()
        self.embed, self.head, self.place = nn.Embedding(64, 32), nn.Linear(32, 64), nn.Embedding(256, 32)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        x = self.embed(input_ids)
        match self.mixes:
            case "neighbours":
                x = x + 0.01 * nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
            case "places":  # positions that count through the pack
                x = x + self.place(torch.arange(x.shape[1]))[None]
            case "rows":
                x = x + 0.01 * x.roll(1, 0) if attention_mask is not None else x + 0.01 * x.roll(1, 1)
            case "padding":
                x = x + 0.01 * (x.mean(1, keepdim=True) if attention_mask is not None else x.roll(1, 1))
            case "dropout":
                x = nn.functional.dropout(x, 0.5, self.training)
        return type("Output", (), {"logits": self.head(x)})


@pytest.mark.parametrize(
    ("mixes", "kind", "seen"),
    [
        ("nothing", "packed", {}),
        ("dropout", "packed", {}),
        ("neighbours", "padded", {"packed": "neighbours"}),
        ("places", "padded", {"packed": "neighbours"}),
        ("rows", "alone", {"packed": "neighbours", "padded": "other rows"}),
        ("padding", "alone", {"packed": "neighbours", "padded": "padding"}),
    ],
)
def test_what_mixes_is_found(mixes: str, kind: str, seen: dict[str, str]) -> None:
    found = find_layout(_Toy(mixes))
    assert found.layout.kind == kind
    assert found.reasons.keys() == seen.keys()
    for name, words in seen.items():
        assert words in found.reasons[name]
        assert re.search("[\u4e00-\u9fff]", in_chinese(found.reasons[name]))


def test_documents_that_are_apart_and_not_as_alone_go_unpacked() -> None:
    """Kosmos-2.5 counts positions from 2 where it is given none, and takes given ones as they are."""
    model = made("kosmos-2.5")
    found = find_layout(model)
    assert found.layout.kind == "padded"
    [reason] = found.reasons.values()
    assert reason == "a document's logits in a pack are not those of the document alone"
    assert "单独" in in_chinese(reason)


def test_a_long_document_that_turns_short_ones_goes_alone() -> None:
    """Phi-3's long models turn all tokens of a micro-batch by the angles of its longest document."""
    model = families.make("phi3-longrope")
    reason = "a document of more than 20 tokens changes the rotation of those beside it"
    assert find_layout(model).reasons == {"packed": reason, "padded": reason}
    assert "旋转" in in_chinese(reason)
    for kind in ("packed", "padded"):
        mixed = families.by_layout(model, Layout(model, kind))
        assert families.distance(mixed, families.one_by_one(model)) > 0.01
    assert find_layout(model, longest=21).layout.kind == "alone"
    assert find_layout(model, longest=20).layout.kind == "packed"


def test_layers_that_mix_more_than_a_proof_shows_go_unpacked() -> None:
    model = families.make("llama")
    model.config.layer_types = ["full_attention", "compressed_sparse_attention"]
    found = find_layout(model)
    assert found.layout.kind == "padded"
    assert "compressed_sparse_attention" in found.reasons["packed"]
    assert "看不出" in in_chinese(found.reasons["packed"])


def test_nothing_shows_afterwards() -> None:
    model = families.make("gpt_oss")
    quiet = model.get_submodule("base_model.model.lm_head").eval()
    implementation = model.config._attn_implementation
    torch.manual_seed(11)
    before = RandomState.capture()
    find_layout(model)
    assert torch.equal(RandomState.capture().torch, before.torch)
    assert model.training
    assert not quiet.training
    assert model.config._attn_implementation == implementation
    assert all(parameter.grad is None for parameter in model.parameters())


def config(**changed: Any) -> Config:
    return Config.make(model="m", data="d.jsonl", compute_dtype="fp32", **changed)


def test_the_choice_is_recorded_with_its_reason() -> None:
    layout, choices = lay_out(config(), families.make("lfm2"), fused=False)
    assert layout is not None
    assert layout.kind == "padded"
    assert [(choice.key, choice.value) for choice in choices] == [("layout", "padded")]
    # Transformers before 5.20 takes the boundaries, does nothing with them, and is found out.
    assert re.search("can't keep packed sequences apart|neighbours in a pack", choices[0].reason)
    assert re.search("无法隔开|相邻文档", in_chinese(choices[0].reason))
    # what a resumed run is told is taken as it is
    again, none = lay_out(config(layout="padded"), families.make("lfm2"), fused=False)
    assert again is not None
    assert again.kind == "padded"
    assert not none


def test_a_layout_that_is_not_right_is_refused() -> None:
    with pytest.raises(UserError, match="layout: packed is not right for this model"):
        lay_out(config(layout="packed"), families.make("lfm2"), fused=False)


def test_one_document_a_micro_batch_needs_no_proof() -> None:
    layout, _ = lay_out(config(packing=False, micro_batch=1), _Toy("rows"), fused=False)
    assert layout is not None
    assert layout.kind == "alone"
    layout, choices = lay_out(config(packing=False, micro_batch=4), _Toy("rows"), fused=False)
    assert layout is not None
    assert layout.kind == "alone"
    assert "other rows" in choices[0].reason
