"""Small tokenizers, built here, each with one property of those that people fine-tune."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["BUILT", "CODE", "TURNS", "Built"]

TURNS = (
    "{{ bos_token if bos }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ GAP }}{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ GAP }}{% endif %}"
)
CODE = "    def float(boat):\n        return boat  # Grüße, 船\n\n\tdone"
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. What floats on the sea? A boat floats, an anchor sinks.",
    "def float(boat):\n    return boat if boat else None\n\n    for anchor in boats:\n        print(anchor, 12345)",
    "it is what it is: a boat, a quay, a harbour; [INST] not said [/INST] but done, Grüße aus Zürich",
)


@dataclass(frozen=True)
class Built:
    """How a tokenizer is made."""

    prefix: str = "never"
    """Metaspace's prepend scheme; ``prepend`` for the Prepend normaliser; ``none`` for byte-level BPE."""
    legacy: bool | None = None
    """Transformers' LlamaTokenizer with this ``legacy``; None for a plain tokenizer.json."""
    rstrip: bool = False
    lstrip: bool = False
    gap: str = "\n"
    """What the template writes between a role's token and its content."""
    normalizer: Any = None
    unigram: bool = False
    byte_fallback: bool = True
    normalized: bool = False
    """Whether the control tokens are looked for in the normalised text."""
    bos: str = "none"
    """Who writes the BOS: ``post``-processor, ``template`` or none."""

    @property
    def template(self) -> str:
        bos = "{% set bos = " + ("true" if self.bos == "template" else "false") + " %}"
        return bos + TURNS.replace("GAP", json.dumps(self.gap))

    def make(self) -> PreTrainedTokenizerBase:
        """A new tokenizer of this kind."""
        backend = Tokenizer.from_str(_backend(self).to_str())
        flags = {"rstrip": self.rstrip, "lstrip": self.lstrip, "normalized": self.normalized}
        names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
        backend.add_special_tokens([AddedToken(name, special=True, **flags) for name in names])
        made: PreTrainedTokenizerBase
        if self.legacy is not None:
            spec = json.loads(backend.to_str())
            merges = [tuple(pair) for pair in spec["model"]["merges"]]
            made = LlamaTokenizer(vocab=spec["model"]["vocab"], merges=merges, legacy=self.legacy)
            made.add_tokens([AddedToken(name, special=True, **flags) for name in names], special_tokens=True)
        else:
            if self.bos == "post":
                backend.post_processor = processors.TemplateProcessing(
                    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
                )
            made = PreTrainedTokenizerFast(
                tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
            )
        made.chat_template = self.template
        return made


@cache
def _backend(kind: Built) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    if kind.prefix == "none":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.normalizer = kind.normalizer
        backend.train_from_iterator(
            _CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
        )
        return backend
    letters = sorted({letter for text in _CORPUS for letter in text.replace(" ", "▁")})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind.unigram:
        backend = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special + bytes_, unk_token="<unk>", initial_alphabet=letters
        )
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=kind.byte_fallback))
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special + bytes_, initial_alphabet=letters, max_token_length=8
        )
    # Trained on words, and used on whole texts, as SentencePiece's vocabularies are.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.train_from_iterator(_CORPUS, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    if kind.unigram:
        spec["model"]["byte_fallback"] = kind.byte_fallback
    steps = [] if kind.normalizer is None else [json.loads(kind.normalizer.__getstate__())]
    spec["pre_tokenizer"] = None
    if kind.prefix == "prepend":
        steps += [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
    else:
        spec["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": kind.prefix, "split": False
        }  # fmt: skip
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    made = Tokenizer.from_str(json.dumps(spec))
    strip = [] if kind.prefix == "never" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


BUILT: dict[str, Built] = {
    "byte-level": Built(prefix="none"),
    "byte-level, NFC": Built(prefix="none", normalizer=normalizers.NFC()),
    "byte-level, BOS by the post-processor": Built(prefix="none", bos="post"),
    "byte-level, BOS by the template": Built(prefix="none", bos="template"),
    "first": Built(prefix="first"),
    "first, BOS by the post-processor": Built(prefix="first", bos="post"),
    "first, BOS by the template": Built(prefix="first", bos="template"),
    "always": Built(prefix="always"),
    "never": Built(),
    "prepend": Built(prefix="prepend", bos="post"),
    "first, no gap": Built(prefix="first", gap=""),
    "always, no gap": Built(prefix="always", gap=""),
    "first, rstrip": Built(prefix="first", rstrip=True),
    "prepend, rstrip": Built(prefix="prepend", rstrip=True, bos="post"),
    "always, rstrip, no gap": Built(prefix="always", rstrip=True, gap=""),
    "never, lstrip": Built(lstrip=True),
    "byte-level, both strips": Built(prefix="none", rstrip=True, lstrip=True),
    "llama, legacy": Built(prefix="always", legacy=True, bos="post"),
    "llama, not legacy": Built(prefix="first", legacy=False, bos="post"),
    "lower case": Built(prefix="first", normalizer=normalizers.Lowercase()),
    "unigram": Built(prefix="always", unigram=True),
    "unigram, NFKC": Built(prefix="first", unigram=True, normalizer=normalizers.NFKC()),
    "no byte fallback": Built(prefix="first", byte_fallback=False),
    "normalized, byte-level": Built(prefix="none", normalized=True, normalizer=normalizers.NFC()),
    "normalized, Metaspace": Built(prefix="first", normalized=True),
}
