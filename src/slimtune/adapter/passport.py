"""The adapter's passport: which base, quantisation, tokenizer and template it belongs to.

An adapter loads onto any base of the same shape without a word, and answers nonsense there. The passport names the
one base it was trained on. It travels in the metadata of ``adapter_model.safetensors``, which other programs ignore,
and as ``passport.json`` beside it, for people.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from slimtune.adapter.files import TensorSpec, WeightFiles, write_safetensors
from slimtune.adapter.settings import ADAPTER_WEIGHTS
from slimtune.base.tokenizer import probe_ids
from slimtune.config import FREE_KEYS, Config
from slimtune.data.render import writes_date
from slimtune.errors import UserError

__all__ = [
    "PASSPORT_FILE",
    "Passport",
    "check_base",
    "check_tokenizer",
    "is_hashed_whole",
    "issue_passport",
    "local_base",
    "read_passport",
    "stamp",
    "template_hash",
    "tokenizer_hash",
]

PASSPORT_FILE = "passport.json"
_KEY = "slimtune"
_HASHED = "2:"
"""What a tokenizer's hash begins with. One without it is of a slimtune that looked at less (version 1)."""
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Passport:
    """What an adapter belongs to."""

    base: str
    """The base as the run named it: a hub id, a folder, or smollm2-135m."""
    revision: str | None
    """The hub commit that was loaded; None for a local folder."""
    fingerprint: str
    """SHA-256 over the base's 16-bit weights (:meth:`slimtune.adapter.files.WeightFiles.fingerprint`)."""
    quantization: dict[str, Any]
    """``method`` (nf4 or none), ``double_quant``, ``compute_dtype``; ``packed``: how experts lie, if any."""
    tokenizer: str
    """:func:`tokenizer_hash`."""
    template: str
    """:func:`template_hash`."""
    config: dict[str, Any]
    """What of the run's resolved config makes the adapter's values: the same values come with the same passport,
    wherever they were trained, and whenever, if the template writes no date. Of files only their names, for the
    passport is published with the adapter."""


def issue_passport(
    config: Config, source: str, tokenizer: PreTrainedTokenizerBase, packed: str | None = None
) -> Passport:
    """The passport of the adapter that this run trains.

    Args:
        config: The run's resolved config.
        source: The folder or hub id that the base was loaded from.
        tokenizer: The tokenizer that the data was rendered with, with the run's chat template.
        packed: The format of the experts, packed one by one (:func:`slimtune.base.quantize.packed_format`).

    Raises:
        UserError: The base has no weight files.
    """
    folder = local_base(source, config.revision)
    return Passport(
        base=config.model,
        revision=_commit(folder),
        fingerprint=_fingerprint(folder),
        quantization={
            "method": config.quantization,
            "double_quant": config.double_quant,
            "compute_dtype": config.compute_dtype,
        }
        | ({} if packed is None else {"packed": f"{packed}, each matrix by itself"}),
        tokenizer=tokenizer_hash(tokenizer),
        template=template_hash(tokenizer),
        config=_without_folders(config.model_dump(mode="json", exclude=set(FREE_KEYS)))
        | ({} if writes_date(tokenizer) else {"date": None}),
    )


def stamp(folder: Path, passport: Passport) -> None:
    """Write the passport into the adapter's safetensors metadata and beside it; the values stay as they are."""
    text = json.dumps(asdict(passport), ensure_ascii=False)
    file = folder / ADAPTER_WEIGHTS
    with safe_open(file, framework="pt") as handle:
        metadata = {**dict(sorted((handle.metadata() or {}).items())), _KEY: text}
        tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(file, specs, tensors.items(), metadata)
    (folder / PASSPORT_FILE).write_text(
        json.dumps(asdict(passport), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_passport(folder: Path) -> Passport | None:
    """The passport of the adapter in ``folder``; None if it has none (another program made it).

    Raises:
        UserError: The weights can't be read, or the file beside them says something else than they do.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as handle:
            text = (handle.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} can't be read: {error}") from None
    beside = folder / PASSPORT_FILE
    if text is None:
        return None
    try:
        values = json.loads(text)
        if beside.is_file() and json.loads(beside.read_text(encoding="utf-8")) != values:
            raise UserError(
                f"{beside} does not belong to the weights beside it",
                rule="The passport in the adapter's safetensors metadata must say the same.",
                way_out="Copy the adapter folder whole.",
            )
        return Passport(**values)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"the passport in {folder} can't be read: {error}") from None


def local_base(source: str, revision: str | None = None) -> Path:
    """The folder with the files of a base; a hub id's is in the hub's cache, and is fetched if it isn't yet.

    Raises:
        UserError: The hub id is unknown or can't be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_MODEL_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"model {source} can't be fetched: {str(error).strip().splitlines()[0]}",
            rule="A hub id needs the network once, or the hub's cache from an earlier download.",
            way_out="Check the name and the network, or give a local folder: --base PATH.",
        ) from None


def check_base(passport: Passport, folder: Path) -> None:
    """Accept the base the adapter was trained on, wherever it lies now; refuse any other.

    A hub commit names its content, so the same commit is accepted by name; all else by the weights' fingerprint.

    Raises:
        UserError: ``folder`` holds another base; the message says which it was.
    """
    commit = _commit(folder)
    if commit is not None and commit == passport.revision:
        return
    found = _fingerprint(folder)
    if found != passport.fingerprint:
        at = f" at commit {passport.revision[:12]}" if passport.revision else ""
        raise UserError(
            f"{folder} is not the base that this adapter was trained on: its weights' fingerprint is {found[:12]}",
            rule=f"It was trained on {passport.base}{at}, fingerprint {passport.fingerprint[:12]}.",
            way_out="Give that base: --base PATH.",
        )


def check_tokenizer(passport: Passport, tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Refuse a tokenizer or chat template other than the training's.

    Raises:
        UserError: A hash differs.
    """
    for what, found, expected in (
        ("tokenizer", tokenizer_hash(tokenizer, like=passport.tokenizer), passport.tokenizer),
        ("chat template", template_hash(tokenizer), passport.template),
    ):
        if found != expected:
            raise UserError(
                f"the {what} of {origin} is not the one this adapter was trained with",
                rule=f"Its hash is {found[:14]}, the training's was {expected[:14]}; prompts would be other tokens.",
                way_out="Copy the run's adapter folder whole, with its tokenizer and chat template.",
            )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase, like: str = _HASHED) -> str:
    """SHA-256 over what turns text into ids: the vocabulary, and the ids of texts that no two tokenizers agree on.

    Files aren't compared: another version of Transformers may write the same tokenizer in other words.

    Args:
        tokenizer: What is hashed.
        like: Another hash that this one is to be compared with; it is made as that one was.
    """
    probed = probe_ids(tokenizer)
    old = not like.startswith(_HASHED)
    what = [sorted(tokenizer.get_vocab().items()), probed[0] if old else probed]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return digest if old else _HASHED + digest


def is_hashed_whole(passport: Passport) -> bool:
    """Whether the tokenizer's hash sees all of it; that of an old passport doesn't see text behind control tokens."""
    return passport.tokenizer.startswith(_HASHED)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template's text."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    def name(text: str) -> str:
        return Path(text).name if Path(text).is_absolute() or text.startswith((".", "~")) else text

    named: dict[str, Any] = {key: [name(text) for text in config[key]] for key in ("data", "eval")}
    named |= {
        key: None if config[key] is None else name(config[key]) for key in ("start_from", "template", "add_tokens")
    }
    return {**config, **named}


def _fingerprint(folder: Path) -> str:
    """Of the base's safetensors; of an old model's pickle files, byte by byte, where there are none."""
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if any(folder.glob("*.safetensors")) or not pickles:
        return WeightFiles(folder).fingerprint()
    digest = hashlib.sha256()
    for file in pickles:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _commit(folder: Path) -> str | None:
    """The commit, if ``folder`` is a snapshot in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and len(folder.name) == 40 else None
