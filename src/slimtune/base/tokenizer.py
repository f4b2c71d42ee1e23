"""The base's tokenizer: loaded with what it needs, saved so that it reads back to the same ids."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slimtune.base.named import model_source
from slimtune.base.source import check_folder, from_pretrained, local_revision, upstream_errors
from slimtune.data.header import added_header, completed
from slimtune.data.render import renderer_for
from slimtune.errors import UserError, shown

__all__ = ["load_tokenizer", "probe_ids", "read_tokenizer", "remarks", "save_tokenizer", "spm_difference"]

_CONFIG = "tokenizer_config.json"
_ALONE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Vocabularies that Transformers converts itself where there is no tokenizer.json."""
# Scripts, digits, runs of spaces, contractions, code, an emoji of several code points.
_PROBE = "It's 12345.678 -- don't\n\n\tdef f(x):  x**2 # Grüße, 你好世界，こんにちは, Привет, مرحبا 👩‍💻   end "
_TEXTS = (_PROBE, "def f(a):\n    if a:\n        return a\n\n\treturn 1", "  two  spaces ", "It's Grüße, 你好")


def load_tokenizer(
    model: str, *, revision: str | None = None, template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model``, with its own chat template or the one in ``template``.

    It may have none: raw text needs none, and conversations say so where they are rendered. One that ignores
    ``add_generation_prompt`` is completed (:mod:`slimtune.data.header`).

    Raises:
        UserError: It can't be loaded, or the template file can't be read.
    """
    folder = model_source(model)
    check_folder(folder, trust_remote_code)
    tokenizer = read_tokenizer(folder, revision=revision, trust_remote_code=trust_remote_code)
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat template {template} can't be read: {error}") from None
    variables, source = tokenizer.special_tokens_map, tokenizer.chat_template
    if isinstance(source, dict):
        tokenizer.chat_template = {name: completed(text, variables) for name, text in source.items()}
    elif source:
        tokenizer.chat_template = completed(source, variables)
    return tokenizer


def read_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or under a hub id, as Transformers reads it, with a token to pad with.

    Raises:
        UserError: It can't be loaded, or needs a package that isn't installed.
    """
    _check_packages(Path(source))
    tokenizer: PreTrainedTokenizerBase = from_pretrained(
        AutoTokenizer,
        source,
        revision=local_revision(source, revision),
        trust_remote_code=trust_remote_code,
        # Where mistral-common is installed, Transformers takes a folder's tekken.json before its tokenizer.json, by a
        # class without chat template. What is installed must not decide which tokenizer a model has.
        mistral_format=False,
    )
    with upstream_errors(source):
        probe_ids(tokenizer)  # some files read well, and fail at the first text
        if tokenizer.pad_token is None:
            # Padding is never supervised and never attended to, so any token that exists serves; the turn's end stays
            # supervised because labels come from the data's own mask, not from token ids.
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    _check_template(source, tokenizer.chat_template)
    return tokenizer


def _check_template(source: str, template: Any) -> None:
    named = template.values() if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in named):
        raise UserError(
            f"the chat template of {source} is no text: {shown(repr(template), 80)}",
            rule="It is a Jinja template, or several by their names.",
            way_out="Give one: --template FILE.jinja",
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer and its chat template, and see that they read back to the same ids.

    Transformers leaves out what a tokenizer's class takes and doesn't hand on, as ``legacy`` of Llama 2's: the copy
    would put no space behind ``<s>`` where the original does. That is written too. If the class still builds another
    tokenizer, the copy names the class that reads tokenizer.json as it stands.

    Raises:
        UserError: What was written reads back to other ids.
    """
    tokenizer.save_pretrained(folder)
    if _reads_back(tokenizer, folder):
        return
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    whole = _left_out(tokenizer) | config
    for better in (whole, {**config, "tokenizer_class": PreTrainedTokenizerFast.__name__}):
        text = json.dumps(better, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / _CONFIG).write_text(text, encoding="utf-8")
        if _reads_back(tokenizer, folder):
            return
    raise UserError(
        f"the tokenizer in {folder} reads back to other ids than it was saved with",
        rule=f"Its class, {type(tokenizer).__name__}, saves less than it was loaded with.",
        way_out="Save it once as a plain tokenizer.json beside the base, and train on that.",
    )


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts that no two tokenizers agree on: scripts and spaces (the first), code, nothing at all, and text
    around each added token."""
    added = sorted(tokenizer.get_added_vocab())
    texts = [text for token in added for text in (f"{token}it", f"it \n{token} \n it")]
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in _TEXTS]
    around = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    return [*plain, list(tokenizer("").input_ids), *(list(ids) for ids in around)]


def remarks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a person should know about a tokenizer that works, but not as they may think; a line each."""
    lines = []
    text = spm_difference(tokenizer)
    if text is not None:
        lines.append(
            f"tokenizer: Transformers cuts {text!r} otherwise than the SentencePiece model it was converted from, "
            "which the base was most likely trained with; a folder with the model's tokenizer.json is read right"
        )
    source = tokenizer.chat_template
    header = added_header(source if isinstance(source, str) else (source or {}).get("default", ""))
    if header is not None:
        lines.append(
            f"template: its generation prompt doesn't say that it is the assistant's turn; {header!r}, which it writes "
            "in front of each reply, was added to it, in the copy beside the adapter too"
        )
    as_text = renderer_for(tokenizer).encoder.read_as_text
    if as_text:
        lines.append(
            f"tokenizer: {', '.join(as_text)} have normalized: true, and Transformers doesn't find them behind other "
            "text; they are trained as the text that they are read as"
        )
    return lines


def spm_difference(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first of some texts that a tokenizer converted from a SentencePiece model cuts otherwise than SentencePiece.

    None if it cuts all alike, wasn't converted, or SentencePiece isn't installed.
    """
    file = Path(str(tokenizer.init_kwargs.get("vocab_file") or ""))
    if file.name not in _ALONE or not file.is_file() or (file.parent / "tokenizer.json").is_file():
        return None
    if not _is_spm(file) or importlib.util.find_spec("sentencepiece") is None:
        return None
    from sentencepiece import SentencePieceProcessor

    judge = SentencePieceProcessor(model_file=str(file))
    return next((t for t in _TEXTS[1:] if tokenizer.encode(t, add_special_tokens=False) != judge.encode(t)), None)


def _left_out(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Plain values that the tokenizer's class takes by name and that Transformers doesn't save."""
    taken = inspect.signature(type(tokenizer).__init__).parameters
    values = {name: getattr(tokenizer, name) for name in taken if hasattr(tokenizer, name)}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


def _reads_back(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    own_code = type(tokenizer).__module__.startswith("transformers_modules")
    read = read_tokenizer(str(folder), trust_remote_code=own_code)
    return read.get_vocab() == tokenizer.get_vocab() and probe_ids(read) == probe_ids(tokenizer)


def _is_spm(file: Path) -> bool:
    """Whether a .model file is SentencePiece's: tiktoken's is lines of base64 and a number."""
    with file.open("rb") as stream:
        first = stream.readline(4096).split()
    return not (len(first) == 2 and first[1].isdigit())


def _check_packages(folder: Path) -> None:
    """Name the packages that a vocabulary without tokenizer.json is converted by, before Transformers guesses.

    Raises:
        UserError: One is missing.
    """
    file = next((folder / name for name in _ALONE if (folder / name).is_file()), None)
    if file is None or (folder / "tokenizer.json").is_file():
        return
    spm = _is_spm(file)
    needs = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"} if spm else {"tiktoken": "tiktoken"}
    missing = [package for module, package in needs.items() if not _installed(module)]
    if missing:
        raise UserError(
            f"the tokenizer in {folder} is {file.name} alone, and what reads it isn't installed: {', '.join(missing)}",
            rule=f"It is a {'SentencePiece' if spm else 'tiktoken'} vocabulary, which Transformers converts by "
            f"{' and '.join(needs.values())}.",
            way_out=f"pip install {' '.join(missing)}, or add the model's tokenizer.json to the folder.",
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it lies in
        return False
