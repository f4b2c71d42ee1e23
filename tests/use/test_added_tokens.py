"""A run that adds tokens, from the training to every way of using it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.integrations import ggml

import slimtune
from slimtune.errors import UserError
from slimtune.run.folder import RunFolder
from slimtune.serve.models import find_all, open_all
from slimtune.serve.vllm import vllm_command
from slimtune.use.evaluate import documents_of, losses
from slimtune.use.export import export_gguf
from slimtune.use.load import find, open_model
from slimtune.use.merge import merge
from slimtune.use.push import model_card
from tests.data.tokenizers import BUILT

TOKENS = ("<harbour>", "<quay>")


KNOWN = len(BUILT["byte-level"].make())
AT = torch.tensor([[5, KNOWN, 7, KNOWN + 1]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=KNOWN + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    BUILT["byte-level"].make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In <harbour> at <quay>."}]
    file.write_text((json.dumps({"messages": turns}) + "\n") * 12, encoding="utf-8")
    return file


def _train(model: Path, rows: Path, output: Path, words: tuple[str, ...] = TOKENS, **more: Any) -> RunFolder:
    tokens = output.parent / "tokens.txt"
    tokens.write_text("\n".join(words) + "\n", encoding="utf-8")
    values: dict[str, Any] = {"max_steps": 4, "max_length": 128, "learning_rate": 1e-2, "lora_dropout": 0.0} | more
    return slimtune.finetune(
        slimtune.Config.make(model=str(model), data=str(rows), output=output, add_tokens=tokens, **values)
    )


@pytest.fixture(scope="module")
def run(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return _train(model, rows, tmp_path_factory.mktemp("runs") / "run")


def test_only_the_new_rows_are_trained_and_saved(run: RunFolder, model: Path) -> None:
    facts = json.loads(run.facts_file.read_text())
    assert "rows of added tokens" in facts["training"]["engine"]
    assert facts["base"]["fingerprint_before"] == facts["base"]["fingerprint_after"]
    saved = load_file(run.adapter / "adapter_model.safetensors")
    deltas = {name: tensor for name, tensor in saved.items() if "trainable_tokens_delta" in name}
    tied = json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    assert len(deltas) == (1 if tied else 2)
    assert all(tensor.shape == (2, 64) for tensor in deltas.values())
    assert max(tensor.shape[0] for tensor in saved.values()) < 100
    mean = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight.float().mean(0)
    assert all(float((row - mean).abs().max()) > 1e-3 for tensor in deltas.values() for row in tensor)


def test_every_verb_knows_the_tokens(run: RunFolder, model: Path, rows: Path) -> None:
    opened = open_model(str(run.path), dtype="fp32", quantization="none")
    ids = [KNOWN, KNOWN + 1]
    assert opened.tokenizer.convert_tokens_to_ids(list(TOKENS)) == ids
    said = opened.tokenizer("In <harbour>", add_special_tokens=False).input_ids
    assert said[-1] == KNOWN
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.resize_token_embeddings(KNOWN + 2)
    plain = PeftModel.from_pretrained(plain, run.adapter).eval()
    with torch.inference_mode():
        torch.testing.assert_close(opened.model(AT).logits, plain(AT).logits, atol=1e-5, rtol=1e-4)
    documents = documents_of(opened, (str(rows),))
    assert KNOWN in documents[0][0]
    measured = losses(opened, documents)
    with opened.as_base():
        bare = losses(opened, documents)
    assert measured.mean().value < bare.mean().value
    served = open_all(find_all([f"it={run.path}"]), quantization="none", dtype="fp32")
    with torch.inference_mode():
        torch.testing.assert_close(served["it"].model(AT).logits, plain(AT).logits, atol=1e-5, rtol=1e-4)
        with pytest.raises(UserError, match="trains rows of tokens"):
            vllm_command(find_all([str(run.path)]), "127.0.0.1", 8000, 8)
        [bare_name] = served.keys() - {"it"}
        known = torch.tensor([[5, 7]])
        bare_logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(known).logits
        torch.testing.assert_close(served[bare_name].model(known).logits, bare_logits, atol=1e-5, rtol=1e-4)


def test_merged_and_exported_it_is_a_base_with_the_tokens(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    merge(find(str(run.path)), folder)
    read = AutoTokenizer.from_pretrained(folder)
    assert read.convert_tokens_to_ids(list(TOKENS)) == [KNOWN, KNOWN + 1]
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == KNOWN + 2
    opened = open_model(str(run.path), dtype="fp32", quantization="none")
    with torch.inference_mode():
        expected, got = opened.model(AT).logits, merged(AT).logits
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)  # rounded to the base's bf16
    if hasattr(ggml, "GGUFQwen2Converter"):  # Transformers 5.17 reads it back with marks of its own
        with pytest.raises(UserError, match=r"doesn't read <\|end\|> in"):
            export_gguf(find(str(run.path)), tmp_path / "gguf", "f16")
        assert not (tmp_path / "gguf").exists()
    else:
        assert export_gguf(find(str(run.path)), tmp_path / "gguf", "f16") is not None


def test_a_run_that_starts_from_it_has_its_tokens(run: RunFolder, model: Path, rows: Path, tmp_path: Path) -> None:
    start = {"start_from": run.path, "learning_rate": 1e-9, "max_steps": 1}
    again = _train(model, rows, tmp_path / "again", **start)
    before, after = (load_file(made.adapter / "adapter_model.safetensors") for made in (run, again))
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items())
    with pytest.raises(UserError, match="rows of tokens that this run doesn't add"):
        _train(model, rows, tmp_path / "others", ("<a>", "<b>"), **start)


def test_the_card_loads_it(run: RunFolder) -> None:
    card = model_card(find(str(run.path)), str(run.adapter))
    code = card.split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(code, made)
    assert made["model"].get_input_embeddings().original_module.weight.shape[0] == KNOWN + 2
    assert "vllm serve" not in card


def test_it_repeats_to_the_byte_and_another_file_is_noticed(
    run: RunFolder, model: Path, rows: Path, tmp_path: Path
) -> None:
    again = _train(model, rows, tmp_path / "run")
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (run.adapter / name).read_bytes()
    (tmp_path / "tokens.txt").write_text("<harbour>\n<pier>\n", encoding="utf-8")
    shutil.rmtree(again.adapter)  # a finished run stays as it is
    with pytest.raises(UserError, match="tokenizer"):
        slimtune.resume(again.path)


def test_whole_modules_and_added_tokens_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contradicts itself"):
        slimtune.Config.make(model="x/y", add_tokens=tmp_path / "t", modules_to_save=("lm_head",))
