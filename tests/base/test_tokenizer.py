"""The base's tokenizer, as it is loaded and as it is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import tokenization_auto

from slimtune.base.tokenizer import load_tokenizer, remarks, save_tokenizer, spm_difference
from slimtune.errors import UserError
from tests.data.tokenizers import BUILT, CODE


def test_padding_is_not_the_turns_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token != "<|im_end|>"


def test_a_tokenizer_may_have_no_template_or_be_given_one(tmp_path: Path, model_folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    assert load_tokenizer(str(tmp_path)).chat_template is None
    given = _write(tmp_path / "own.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load_tokenizer(str(tmp_path), template=given).chat_template == given.read_text()
    with pytest.raises(UserError, match=r"chat template .*absent\.jinja can't be read"):
        load_tokenizer(str(tmp_path), template=tmp_path / "absent.jinja")


def test_a_template_without_a_generation_prompt_is_completed_and_it_is_said(tmp_path: Path) -> None:
    bare = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    tokenizer = load_tokenizer("smollm2-135m", template=_write(tmp_path / "bare.jinja", bare))
    ask = [{"role": "user", "content": "Where?"}]
    asked = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert str(asked).endswith("Where?<|im_end|>\n<|im_start|>assistant\n")
    (line,) = remarks(tokenizer)
    assert repr("<|im_start|>assistant\n") in line
    save_tokenizer(tokenizer, tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == tokenizer.chat_template
    assert remarks(load_tokenizer("smollm2-135m")) == []


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize("kind", BUILT)
def test_a_saved_tokenizer_reads_back_to_the_same_ids(tmp_path: Path, kind: str) -> None:
    tokenizer = BUILT[kind].make()
    save_tokenizer(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.chat_template == tokenizer.chat_template
    for text in (CODE, "<s>[INST] it", "<|user|>it\n <|end|> \n it", "<|assistant|>\n    it", ""):
        for adds in (True, False):
            ids = tokenizer(text, add_special_tokens=adds).input_ids
            assert read(text, add_special_tokens=adds).input_ids == ids


def test_what_transformers_leaves_out_is_written(tmp_path: Path) -> None:
    tokenizer = BUILT["llama, legacy"].make()
    tokenizer.save_pretrained(tmp_path / "plain")
    assert "legacy" not in json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    save_tokenizer(tokenizer, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())
    assert config["legacy"] is True
    assert config["tokenizer_class"] == "LlamaTokenizer"


def test_a_class_that_builds_another_tokenizer_is_not_named(tmp_path: Path) -> None:
    tokenizer = BUILT["llama, not legacy"].make()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # its class knows of none
    save_tokenizer(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("A BOAT").input_ids == tokenizer("A BOAT").input_ids == tokenizer("a boat").input_ids


@pytest.mark.parametrize(
    ("content", "packages"),
    [(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece protobuf"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
)
def test_a_vocabulary_alone_names_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, packages: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("slimtune.base.tokenizer._installed", lambda module: False)
    with pytest.raises(UserError, match="alone, and") as caught:
        load_tokenizer(str(tmp_path))
    assert f"pip install {packages}" in caught.value.way_out


def test_a_tekken_file_beside_tokenizer_json_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BUILT["byte-level"].make()
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tekken.json").write_text("{}")
    # As where mistral-common is installed: Transformers then takes a class without chat template.
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr("transformers.integrations.mistral.tokenizer.is_mistral_common_available", lambda: True)
    read = load_tokenizer(str(tmp_path))
    assert read.chat_template == tokenizer.chat_template
    assert read(CODE).input_ids == tokenizer(CODE).input_ids


def test_an_ordinary_tokenizer_needs_no_remark(tokenizer: PreTrainedTokenizerBase) -> None:
    assert remarks(tokenizer) == []


def test_tokens_that_are_read_as_text_are_said() -> None:
    tokenizer = BUILT["prepend"].make()
    tokenizer.add_tokens([AddedToken("<odd>", normalized=True, special=True)], special_tokens=True)
    [line] = remarks(tokenizer)
    assert "<odd>" in line
    assert "trained as the text" in line


def test_a_vocabulary_that_transformers_cuts_otherwise_than_sentencepiece_is_said(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("def f(a):\n    return a\nit is what it is, a boat and a quay\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    tokenizer = load_tokenizer(str(tmp_path))
    judge = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "def f(a):\n    return a"
    same = tokenizer.encode(text, add_special_tokens=False) == judge.encode(text)
    assert (spm_difference(tokenizer) is None) == same
