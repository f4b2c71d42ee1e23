from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from slimtune.adapter.files import attach_adapter
from slimtune.adapter.merged import MergedWeights
from slimtune.errors import GuardStop, UserError
from slimtune.use import export
from slimtune.use import merge as merging
from slimtune.use.load import find
from slimtune.use.merge import merge, write_weights
from slimtune.use.parity import PROMPTS
from slimtune.use.rounding import round_once_
from tests.families.tiny import made, save, tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# Every kind that is merged: LoraConfig's options, and whether the base's head is tied.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({"target_modules": ATTENTION}, False),
    "rslora": ({"target_modules": ATTENTION, "use_rslora": True, "r": 6}, False),
    "dora": ({"target_modules": "all-linear", "use_dora": True}, False),
    "gaussian": ({"target_modules": "all-linear", "init_lora_weights": "gaussian"}, True),
    "patterns": (
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            "alpha_pattern": {"q_proj": 3, "down_proj": 1},
        },
        False,
    ),
    "some layers": ({"target_modules": ATTENTION, "layers_to_transform": [1]}, False),
    "trained biases": ({"target_modules": ATTENTION, "bias": "all"}, False),
    "adapter biases": ({"target_modules": ["q_proj"], "lora_bias": True}, False),
    "head and embedding whole": ({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tied, embedding whole": ({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}, True),
    "tied, head whole": ({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, True),
    "embedding adapter": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "tied, embedding adapter": ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    "head adapter": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "tied, head adapter": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "rows": (
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
        False,
    ),
    "rows of the embedding": ({"target_modules": ATTENTION, "trainable_token_indices": [7, 3]}, False),
    "tied, rows": ({"target_modules": ATTENTION, "trainable_token_indices": [7, 3]}, True),
}


def _tiny(folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, tie_word_embeddings=tied)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def _wrap(base: Path, folder: Path, **options: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options}))
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_plus_adapter(kind: str, tmp_path: Path) -> None:
    options, tied = KINDS[kind]
    base = _tiny(tmp_path / "base", tied=tied)
    wrapped = _wrap(base, tmp_path / "adapter", **options)
    weights = MergedWeights(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write_weights(weights, tmp_path / "merged", shard_bytes=40_000)
    (tmp_path / "merged" / "config.json").write_text(json.dumps(weights.config))
    merged, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids = torch.arange(1, 200).view(1, -1)
    with torch.inference_mode():
        expected, got = wrapped(ids).logits, merged(ids).logits
        with wrapped.disable_adapter():
            bare = wrapped(ids).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert float((bare - expected).abs().max()) > 1e-3  # the adapter does something


NEW = [300, 301, 302]
RESIZED: dict[str, tuple[dict[str, Any], bool]] = {
    "rows": ({"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}}, False),
    "tied, rows": ({"trainable_token_indices": NEW}, True),
    "whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tied, whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "tied, embedding whole": ({"modules_to_save": ["embed_tokens"]}, True),
    "nothing but saved": ({}, False),
    "tied, nothing but saved": ({}, True),
    "fewer": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
}


@pytest.mark.parametrize("saves", ["auto", False])
@pytest.mark.parametrize("kind", RESIZED)
def test_an_adapter_of_another_vocabulary_is_attached_and_merged(kind: str, saves: bool | str, tmp_path: Path) -> None:
    options, tied = RESIZED[kind]
    base = _tiny(tmp_path / "base", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(290 if kind == "fewer" else 303)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION, **options)
    wrapped = get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=saves)
    ids = torch.tensor([[5, 7, 289, 11]] if kind == "fewer" else [[5, 300, 301, 7, 302]])
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if not saves and kind == "tied, embedding whole":
        with pytest.raises(UserError, match="of 303 rows"):
            attach_adapter(fresh, tmp_path / "adapter")
        with pytest.raises(UserError, match="of 303 rows"):
            MergedWeights(base, tmp_path / "adapter")
        return
    if not saves and "nothing" in kind:
        return  # then nothing of the new vocabulary is in the file
    attached = attach_adapter(fresh, tmp_path / "adapter").eval()
    weights = MergedWeights(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write_weights(weights, tmp_path / "merged")
    (tmp_path / "merged" / "config.json").write_text(json.dumps(weights.config))
    merged, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.inference_mode():
        expected = wrapped(ids).logits
        torch.testing.assert_close(attached(ids).logits, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(merged(ids).logits, expected, atol=2e-5, rtol=1e-4)
    assert merged.config.vocab_size == expected.shape[-1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ATTENTION, "init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"target_modules": ATTENTION, "init_lora_weights": "olora"}, "init_lora_weights: olora"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, r"DoRA on model.embed_tokens \(Embedding\)"),
    ],
)
def test_what_is_no_low_rank_sum_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = _tiny(tmp_path / "base", tied=False)
    _wrap(base, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=reason):
        MergedWeights(base, tmp_path / "adapter")


def test_an_adapter_of_another_shape_or_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = _tiny(tmp_path / "base", tied=False)
    _wrap(base, tmp_path / "adapter", target_modules=ATTENTION)
    other = LlamaConfig(**{**SHAPE, "hidden_size": 64})
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="_proj"):
        MergedWeights(tmp_path / "other", tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="is quantised"):
        MergedWeights(base, tmp_path / "adapter")


def test_the_real_model_merges_in_its_own_dtype_with_its_tokenizer(adapter: Path, tmp_path: Path) -> None:
    found = find(str(adapter))
    merged = tmp_path / "merged"
    merge(found, merged, shard_bytes=10**8)
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) == 3
    assert all(file.stat().st_size < 10**8 + 10**5 for file in shards)
    with safe_open(shards[0], framework="pt") as handle:
        assert {handle.get_slice(name).get_dtype() for name in handle.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == found.tokenizer().chat_template
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops
    base = AutoModelForCausalLM.from_pretrained(found.base, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Italy is")])
    with torch.inference_mode():
        expected = wrapped(ids).logits.log_softmax(-1)
        got = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - got)).sum(-1)
    assert float(divergence.mean()) < 1e-3  # what rounding the sum to bf16 costs


def test_nothing_is_left_of_a_merge_that_fails(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="are needed"):
        merge(find(str(adapter)), tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        merge(find(str(adapter)), tmp_path / "full")


def test_a_merge_whose_proof_fails_or_dies_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a hybrid, whose layers keep states: base and merged model are asked as for every family."""
    base = save("falcon_h1", tmp_path / "base")
    _wrap(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    for name in ("reference", "certify"):
        monkeypatch.setattr(export, name, partial(getattr(export, name), prompts=PROMPTS[:2]))
    found = find(str(tmp_path / "adapter"), base=str(base))
    certificate = merge(found, tmp_path / "merged", prove=export.prove_merged)
    assert certificate is not None
    assert certificate.holds
    assert json.loads((tmp_path / "merged" / "parity.json").read_text())["holds"] is True

    def dies(*_: Any) -> Any:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        merge(found, tmp_path / "dead", prove=dies)
    plain = merging.MergedWeights
    monkeypatch.setattr(merging, "MergedWeights", lambda base, adapter, **_: plain(base, None))
    with pytest.raises(GuardStop, match="merged into its base does not say what"):
        merge(found, tmp_path / "other", prove=export.prove_merged)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


def test_a_copy_in_16_bits_is_held_to_what_rounding_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a threshold that nothing in 16 bits keeps."""
    base = _tiny(tmp_path / "base", tied=False, dtype=torch.bfloat16)
    tokenizer().save_pretrained(base)
    _wrap(base, tmp_path / "adapter", target_modules=ATTENTION)
    for name in ("reference", "certify"):
        monkeypatch.setattr(export, name, partial(getattr(export, name), prompts=PROMPTS[:2]))
    monkeypatch.setitem(export.KL_ALLOWED, "merged", 1e-12)
    found = find(str(tmp_path / "adapter"), base=str(base))
    certificate = merge(found, tmp_path / "merged", prove=export.prove_merged)
    assert certificate is not None
    assert certificate.kl_mean_of_rounding is not None
    assert 1e-12 < certificate.kl_mean <= certificate.kl_mean_allowed == 2 * certificate.kl_mean_of_rounding
    assert certificate.kl_mean_of_rounding < 1e-3
    plain = merging.MergedWeights
    monkeypatch.setattr(merging, "MergedWeights", lambda base, adapter, **_: plain(base, None))
    with pytest.raises(GuardStop, match="by rounding"):
        merge(found, tmp_path / "other", prove=export.prove_merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounding_moves_adapted_weights_by_up_to_half_a_place(dtype: torch.dtype) -> None:
    model = get_peft_model(made("llama"), LoraConfig(target_modules=["q_proj"]))
    adapted = {name: value.clone() for name, value in model.named_parameters()}
    round_once_(model, dtype, seed=0)
    for name, value in model.named_parameters():
        off = (value - adapted[name]).abs()
        if ".base_layer." not in name:
            assert not off.any()
            continue
        # A number's half place is between these two shares of it, and roundings are even up to that.
        place = torch.finfo(dtype).eps / 2
        assert off.max() <= place * adapted[name].abs().max()
        assert float((off / adapted[name].abs()).max()) == pytest.approx(place, rel=0.1)


MEASURED = """
import json, resource, sys
from pathlib import Path
from slimtune.adapter.files import attach_adapter
from slimtune.adapter.merged import MergedWeights
from slimtune.use.merge import write_weights
base, adapter, output = map(Path, sys.argv[1:])
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = MergedWeights(base, adapter)
write_weights(weights, output)
largest = max(spec.nbytes for spec in weights.specs.values())
print(json.dumps([1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle), largest, weights.nbytes]))
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """A model of 800 MB in 96 equal tensors."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=64, num_hidden_layers=24, num_attention_heads=16
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    model = empty.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=ATTENTION)).save_pretrained(
        tmp_path / "adapter"
    )
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ("base", "adapter", "out"))],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, largest, whole = json.loads(done.stdout.splitlines()[-1])
    assert whole > 800e6
    # The tensor, its merged copy, 64 MiB of rows in fp32 and their product, and the adapter itself.
    assert peak < 2 * largest + 250e6, (peak, largest, whole)
