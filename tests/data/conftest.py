"""Tokenizers with the control tokens and chat templates of the families that people fine-tune.

The vocabulary is the embedded model's; each family's control tokens are added to it, with the flags that its own
tokenizer has. Templates come from TRL, which carries the originals, or lie beside this file where it has none.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

HERE = Path(__file__).parent / "templates"
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    plain: tuple[str, ...] = ()
    """Added tokens that are no special tokens, as Qwen3's <think>."""
    eats_right: bool = False
    """Whether control tokens swallow the white space behind them, as Phi-3's do."""
    spm: bool = False
    """Whether text gets a prefix space, as with Llama-2's and Mistral's first tokenizers."""
    adds_bos: bool = False
    splits_lines: bool = False
    """Whether line breaks are tokens of their own whatever follows, as with Llama-3's and Qwen's pattern."""


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
DEEPSEEK = tuple(
    f"<｜{name}｜>"
    for name in (
        "begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end",
        "tool▁call▁begin", "tool▁call▁end", "tool▁sep", "tool▁outputs▁begin", "tool▁outputs▁end",
        "tool▁output▁begin", "tool▁output▁end",
    )
)  # fmt: skip
MISTRAL3 = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip

TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FAMILIES = {
    "smollm2": Family("", CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen1.5": Family("qwen1.5", CHATML, None, "<|im_end|>"),
    "qwen2.5": Family("qwen2_5", CHATML, None, "<|im_end|>", plain=("<tool_call>", "</tool_call>")),
    "qwen3": Family(
        "qwen3", CHATML, None, "<|im_end|>",
        plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
    "llama3": Family("llama3", LLAMA3, "<|begin_of_text|>", "<|eot_id|>", adds_bos=True, splits_lines=True),
    "llama3.1": Family("llama3_1", LLAMA3, "<|begin_of_text|>", "<|eot_id|>", adds_bos=True, splits_lines=True),
    "mistral": Family("mistral", ("<s>", "</s>"), "<s>", "</s>", spm=True, adds_bos=True),
    "mistral3": Family("mistral-tools", MISTRAL3, "<s>", "</s>", spm=True, adds_bos=True),
    "gemma": Family(
        "gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<end_of_turn>",
        plain=("\n\n", "<table>"), adds_bos=True,
    ),
    "phi3": Family("phi3", PHI, None, "<|endoftext|>", eats_right=True),
    "deepseek-v3": Family("deepseekv3", DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], adds_bos=True),
    "deepseek-r1": Family(
        "deepseek_r1_distill", DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], plain=("<think>", "</think>"), adds_bos=True
    ),
}  # fmt: skip


def _template(name: str) -> str:
    own = HERE / f"{name}.jinja"
    return (own if own.is_file() else TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _spm_backend() -> Tokenizer:
    """A small BPE tokenizer with Metaspace, trained here: text gets a prefix space at its beginning only."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    corpus = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", *bytes_], max_token_length=12)
    backend.train_from_iterator([" ".join(text.split()) for text in corpus], trainer)
    spec = backend.to_str()
    loaded = json.loads(spec)
    loaded["added_tokens"] = loaded["added_tokens"][:1]  # bytes are vocabulary, not added tokens
    return Tokenizer.from_str(json.dumps(loaded))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def make_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedTokenizerBase]:
    made: dict[str, PreTrainedTokenizerBase] = {}

    def make(name: str) -> PreTrainedTokenizerBase:
        if name not in made:
            made[name] = _make(FAMILIES[name], tokenizer)
        return made[name]

    return make


def _make(family: Family, embedded: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not family.template:
        return copy.deepcopy(embedded)
    backend = _spm_backend() if family.spm else Tokenizer.from_str(embedded.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(t, special=True, rstrip=family.eats_right) for t in family.special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    if family.splits_lines:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(TIKTOKEN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if family.adds_bos:
        bos: Any = family.bos
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    made.chat_template = _template(family.template)
    return made
