from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GgufConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from slimtune.adapter.merged import MergedWeights
from slimtune.errors import GuardStop, UserError
from slimtune.use import export
from slimtune.use.export import check_exportable, export_gguf
from slimtune.use.gguf_file import _rope_factors, pre_tokenizer, write_gguf
from slimtune.use.load import find
from slimtune.use.ollama import read_turns
from slimtune.use.parity import PROMPTS
from tests.data.tokenizers import BUILT

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, vocab_size=49152, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, vocab_size=49152, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, vocab_size=49152),
    # Transformers reads no head size from a GGUF file: it takes Qwen 3's own, 128, for every Qwen 3 model.
    "qwen3": Qwen3Config(**SHAPE, vocab_size=49152, head_dim=128),
    # Nor the experts' size, which it takes for 768.
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, vocab_size=49152, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=768, norm_topk_prob=True
    ),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "f16"),
        ("llama", "q8_0"),
        ("mistral", "f16"),
        ("qwen2", "q8_0"),
        ("qwen3", "f16"),
        ("qwen3_moe", "f16"),
    ],
)
def test_each_family_read_back_by_transformers_computes_the_same(
    family: str, kind: Any, tmp_path: Path, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "base")
    write_gguf(
        MergedWeights(tmp_path / "base", None), tokenizer, tmp_path / "model.gguf", kind, name="tiny", turn_end=2
    )
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    ids = torch.arange(100, 160).view(1, -1)
    with torch.inference_mode():
        expected, got = model(ids).logits.log_softmax(-1), read(ids).logits.log_softmax(-1)
    divergence = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert divergence < {"f16": 1e-5, "q8_0": 1e-3}[kind]


def test_what_cannot_be_exported_is_said_before_training(tmp_path: Path, tokenizer: Any) -> None:
    Qwen3MoeConfig(**SHAPE, mlp_only_layers=[0], norm_topk_prob=True).save_pretrained(tmp_path / "partly")
    FAMILIES["llama"].save_pretrained(tmp_path / "llama")
    for folder in ("partly", "llama"):
        tokenizer.save_pretrained(tmp_path / folder)
    with pytest.raises(UserError, match="mixture of experts can't be exported"):
        check_exportable(find(str(tmp_path / "partly")), ["f16"])
    with pytest.raises(UserError, match="init_lora_weights: pissa"):
        check_exportable(find(str(tmp_path / "llama")), ["f16"], "pissa")
    check_exportable(find(str(tmp_path / "llama")), ["f16"])
    parts = json.loads((tmp_path / "llama" / "tokenizer.json").read_text("utf-8"))
    parts["model"]["merges"] = []
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(parts), "utf-8")
    with pytest.raises(UserError, match="it has no merges"):
        check_exportable(find(str(tmp_path / "llama")), ["f16"])


@pytest.mark.parametrize(
    ("config", "written", "said"),
    [
        (LlamaConfig(**SHAPE, hidden_act="gelu"), {}, "whose MLP has 'gelu'"),
        (Qwen3Config(**SHAPE, attention_bias=True), {}, "qwen3 model with biases in its attention"),
        (
            Qwen2Config(**SHAPE),
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "'dynamic' rotary embeddings",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    config: Any, written: dict[str, Any], said: str, tmp_path: Path, tokenizer: Any
) -> None:
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | written))
    with pytest.raises(UserError, match=said):
        check_exportable(find(str(tmp_path)), ["f16"])


def _untrained(config: Any, folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_a_window_is_exported_up_to_it(tmp_path: Path) -> None:
    tokenizer = BUILT["byte-level"].make()
    config = MistralConfig(**SHAPE, vocab_size=len(tokenizer), sliding_window=24)
    base = _untrained(config, tmp_path / "base", tokenizer)
    export_gguf(find(str(base)), tmp_path / "out", "f16", parity=False)
    fields = gguf.GGUFReader(tmp_path / "out" / "out-f16.gguf").fields
    assert fields["llama.context_length"].contents() == 24
    assert "PARAMETER num_ctx 24\n" in (tmp_path / "out" / "Modelfile").read_text()


def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(tmp_path: Path) -> None:
    tokenizer = BUILT["byte-level"].make()
    shape = SHAPE | {"num_attention_heads": 16, "num_key_value_heads": 8}  # eight are the class's own
    config = MistralConfig(**shape, vocab_size=len(tokenizer), sliding_window=None)
    base = _untrained(config, tmp_path / "base", tokenizer)
    left_out = ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "head_dim")
    written = json.loads((base / "config.json").read_text())
    written = {name: value for name, value in written.items() if name not in left_out}
    written |= {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}  # as before Transformers 5
    (base / "config.json").write_text(json.dumps(written))
    write_gguf(MergedWeights(base, None), tokenizer, tmp_path / "m.gguf", "f16", name="m", turn_end=2)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = AutoConfig.from_pretrained(base)
    assert fields["llama.attention.head_count_kv"] == expected.num_key_value_heads
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(expected.rms_norm_eps)
    assert (fields["llama.rope.freq_base"], fields["llama.rope.dimension_count"]) == (5e4, 4)
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = BUILT["byte-level"].make()
    size = max(tokenizer.get_vocab().values())
    base = _untrained(LlamaConfig(**SHAPE, vocab_size=size), tmp_path / "base", tokenizer)
    with pytest.raises(UserError, match=f"has a token {size}, and the model's embedding {size} rows"):
        write_gguf(MergedWeights(base, None), tokenizer, tmp_path / "m.gguf", "f16", name="m", turn_end=2)


def test_templates_that_have_names_keep_them(tmp_path: Path) -> None:
    tokenizer = BUILT["byte-level"].make()
    plain = str(tokenizer.chat_template)
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools }}" + plain}
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": 512}, vocab_size=len(tokenizer))
    certificate = export_gguf(find(str(_untrained(config, tmp_path / "base", tokenizer))), tmp_path / "out", "f16")
    assert certificate is not None
    fields = gguf.GGUFReader(tmp_path / "out" / "out-f16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == plain
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}" + plain


def test_numbers_that_reading_back_leaves_out_are_no_proof(tmp_path: Path) -> None:
    """Transformers' reader drops a Llama's biases without a word, and fresh ones are zeros: all would seem equal."""
    tokenizer = BUILT["byte-level"].make()
    config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer), attention_bias=True)
    export_gguf(find(str(_untrained(config, tmp_path / "base", tokenizer))), tmp_path / "unproven", "f16", parity=False)
    with pytest.raises(UserError, match="numbers in unproven"):
        export._read_back_voice(tmp_path / "unproven" / "unproven-f16.gguf")


def test_the_run_as_gguf_says_what_the_adapter_says(adapter: Path, tmp_path: Path) -> None:
    certificate = export_gguf(find(str(adapter)), tmp_path / "out", "q8_0")
    assert certificate is not None
    assert certificate.holds
    assert certificate.prompt_ids_equal == certificate.prompts == 16
    assert certificate.positions > 100
    assert 0 < certificate.kl_mean < 1e-2
    written = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert written["holds"] is True
    reader = gguf.GGUFReader(tmp_path / "out" / "out-q8_0.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "Q8_0"}
    assert reader.fields["tokenizer.chat_template"].contents() == find(str(adapter)).tokenizer().chat_template
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./out-q8_0.gguf" in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n" in modelfile


def test_an_export_that_says_something_else_fails_and_says_so(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export without its adapter stands for any that lost the tuning."""
    plain = export.MergedWeights
    monkeypatch.setattr(export, "MergedWeights", lambda base, adapter, **_: plain(base, None))
    for name in ("reference", "certify"):
        monkeypatch.setattr(export, name, partial(getattr(export, name), prompts=PROMPTS[:3]))
    with pytest.raises(GuardStop, match="does not say what"):
        export_gguf(find(str(adapter)), tmp_path / "out", "f16")
    assert not list(tmp_path.iterdir())  # nothing that looks whole


def test_a_missing_quantizer_is_said_before_any_work(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="llama-quantize is not installed"):
        export_gguf(find(str(adapter)), tmp_path / "out", "q4_k_m")
    assert not list(tmp_path.iterdir())


def test_llama_3s_frequencies_are_divided_as_transformers_divides_them() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    factors = _rope_factors(config)
    assert factors is not None
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)


def test_the_tokenizers_way_of_splitting_is_named_or_refused(tokenizer: Any) -> None:
    from copy import deepcopy

    from tokenizers import Regex, normalizers, pre_tokenizers

    other = deepcopy(tokenizer)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.backend_tokenizer.pre_tokenizer = bytes_only
    assert pre_tokenizer(other) == "gpt-2"
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_only])
    assert pre_tokenizer(other) == "smollm"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    no_cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, no_cut])
    # What llama.cpp does under the name: it takes a word that is a token whole, or not (Llama 3's; Smaug's).
    for whole, name in ((True, "llama-bpe"), (False, "smaug-bpe")):
        other.backend_tokenizer.model.ignore_merges = whole
        assert pre_tokenizer(other) == name
    other.backend_tokenizer.normalizer = normalizers.NFC()
    assert pre_tokenizer(other) == "smaug-bpe"
    for unlike in (
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), bytes_only]),
        pre_tokenizers.Sequence([split, bytes_only]),  # cut once more
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ):
        other.backend_tokenizer.pre_tokenizer = unlike
        with pytest.raises(UserError, match="way of splitting text isn't known"):
            pre_tokenizer(other)
    other.backend_tokenizer.pre_tokenizer = bytes_only
    other.backend_tokenizer.model.ignore_merges = False
    assert pre_tokenizer(other) == "gpt-2"
    other.backend_tokenizer.normalizer = normalizers.Replace("~", "about")
    for unlike_whole in (other, ByT5Tokenizer()):
        with pytest.raises(UserError, match="way of splitting text isn't known"):
            pre_tokenizer(unlike_whole)


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}


@pytest.mark.parametrize("name", [*TEMPLATES, "the model's own"])
def test_the_go_templates_parts_render_what_the_jinja_template_renders(name: str, tokenizer: Any) -> None:
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    turns = read_turns(other)
    assert turns is not None
    messages = [
        {"role": "user", "content": "Hello,\n\nyou!"},
        {"role": "assistant", "content": "你好"},
        {"role": "user", "content": "Again?"},
    ]
    for asked in (messages, [{"role": "system", "content": "Be kind."}, *messages]):
        assert turns.render(asked) == other.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


def test_a_template_that_is_no_sequence_of_turns_has_no_go_template(tokenizer: Any) -> None:
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = (
        "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert read_turns(other) is None


def test_added_tokens_have_the_types_that_llama_cpps_converter_gives_them(tmp_path: Path) -> None:
    tokenizer = BUILT["byte-level"].make()
    names = ("<|fim_prefix|>", "<｜fim▁hole｜>", "<think>", "<unused7>", "<pad>")
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer) + 2, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    write_gguf(MergedWeights(tmp_path / "base", None), tokenizer, tmp_path / "m.gguf", "f16", name="m", turn_end=2)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    made = {
        name: gguf.TokenType(types[tokenizer.convert_tokens_to_ids(name)]).name for name in (*names, "<|end|>", "a")
    }
    assert made == {
        "<|fim_prefix|>": "CONTROL", "<｜fim▁hole｜>": "CONTROL", "<think>": "USER_DEFINED", "<unused7>": "CONTROL",
        "<pad>": "CONTROL", "<|end|>": "CONTROL", "a": "NORMAL",
    }  # fmt: skip
    assert [gguf.TokenType(types[at]).name for at in (-2, -1)] == ["UNUSED", "UNUSED"]
