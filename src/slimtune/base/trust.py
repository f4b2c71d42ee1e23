"""Model and adapter folders are a stranger's: what they may and may not do.

Everything in them is read as data. Refused before anything is loaded: weights that are pickles, fields that make a
library import or fetch code, links and paths that lead out of the folder, files that are no files. With
``trust_remote_code`` a model's own Python may run, and only then; pickles and paths are refused even so.

Upstream's doors, by their fields: ``auto_map`` and ``custom_pipelines`` (Transformers imports Python from the folder),
``attn_implementation`` and ``experts_implementation`` with a hub id, ``kernel_config`` and ``use_kernels``
(Transformers' ``integrations/hub_kernels.py`` fetches compiled code), ``auto_mapping`` (PEFT's ``auto.py`` imports the
module it names, which may be one of Transformers'), ``megatron_core`` (PEFT's ``lora/tp_layer.py``). What an adapter's
other fields may say, and patterns that never end, are :mod:`slimtune.adapter.settings`' and
:mod:`slimtune.adapter.patterns`' to look at.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimtune.base.growth import check_growth
from slimtune.errors import UserError

__all__ = ["check_adapter_folder", "check_attention", "check_model_folder"]

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"})
_LOADS_CODE = frozenset({"auto_map", "custom_pipelines", "kernel_config", "use_kernels"})
_LOADS_CODE_PEFT = frozenset({"auto_mapping", "megatron_config"})
_TRANSFORMERS = re.compile(r"transformers(\.[A-Za-z_][A-Za-z0-9_]*)+")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
_BUILT_IN = frozenset({"eager", "sdpa", "flex_attention"})
"""Attention and expert implementations that are Transformers' and torch's own; the others may be fetched."""
_WORDS = frozenset({"tokenizer.json", "vocab.json"})
"""Megabytes of words, read by the tokenizers library, which loads nothing else."""
_MAX_JSON = 256 * 2**20


def check_model_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a local model or tokenizer folder that could do more than hold a model.

    Raises:
        UserError: Names the file, the field or the link, and the rule.
    """
    files = list(_files(folder))
    _refuse_unreadable(folder, files)
    _refuse_pickles(folder, files)
    for file in files:
        if file.name == "tokenizer.json":
            check_growth(file, _read_json(file))
        if file.suffix == ".json" and file.name not in _WORDS:
            content = _read_json(file)
            for key, value in _fields(content):
                if not trust_remote_code:
                    _refuse_code(file, key, value)
                _refuse_path(file, key, value)
            if file.name.endswith(".index.json"):
                _refuse_outside_shards(file, content)


def check_adapter_folder(folder: Path) -> None:
    """Refuse a local adapter folder that could do more than hold a LoRA adapter.

    Raises:
        UserError: Names the file, the field or the link, and the rule.
    """
    check_model_folder(folder)
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        return
    config = _read_json(config_file)
    if not isinstance(config, dict):
        raise UserError(f"{config_file} holds no adapter's config", rule="It is a JSON object.")
    for key in sorted(_LOADS_CODE_PEFT & config.keys()):
        if config[key] is not None and not (key == "auto_mapping" and _is_of_transformers(config[key])):
            raise _code_refused(config_file, key, config[key])
    if config.get("megatron_core") not in (None, "megatron.core"):
        raise _code_refused(config_file, "megatron_core", config["megatron_core"])


def _is_of_transformers(mapping: Any) -> bool:
    """Whether an ``auto_mapping`` names a class of the installed Transformers, as PEFT's own does."""
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    return isinstance(library, str) and _TRANSFORMERS.fullmatch(library) is not None


def check_attention(name: str, implementation: Any) -> None:
    """Refuse an attention implementation that Transformers would fetch from the hub.

    Args:
        name: The model, for the message.
        implementation: What its loaded config asks for.

    Raises:
        UserError: It is none that is built in.
    """
    asked = implementation.values() if isinstance(implementation, dict) else (implementation,)
    for value in asked:
        if value is not None and value not in _BUILT_IN:
            raise UserError(
                f"{name} asks for the attention kernel {value!r}",
                rule="slimtune runs no code that comes with a model unless told to.",
                way_out="Take the field out of config.json; slimtune chooses the attention by itself.",
            )


def _files(folder: Path) -> Iterator[Path]:
    """All regular files under ``folder``; refuses what leads out of it or isn't a file."""
    root = folder.resolve()
    # The hub's cache keeps each file once and links to it: models--x/snapshots/<commit>/file → models--x/blobs/<hash>.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for path in sorted(folder.rglob("*")):
        try:
            target = path.resolve(strict=True)
            mode = target.stat().st_mode
        except (OSError, RuntimeError):
            raise UserError(f"{path} is a link that leads nowhere", way_out="Copy the folder whole.") from None
        inside = target.is_relative_to(root) or (blobs is not None and target.is_relative_to(blobs))
        if not inside:
            raise UserError(
                f"{path} leads out of its folder, to {target}",
                rule="A model's files stand in its folder.",
                way_out="Copy the file in, if you trust it.",
            )
        if stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISDIR(mode):
            raise UserError(f"{path} is no regular file", rule="A model folder holds files and folders only.")


def _refuse_unreadable(folder: Path, files: list[Path]) -> None:
    """Of a file that it may not read, a library says that it isn't there."""
    for file in (folder, *(file for file in files if file.parent == folder)):
        try:
            os.close(os.open(file, os.O_RDONLY))
        except OSError as error:  # a checkpoint of a run under way may be gone by now
            way_out = "Change whose it is." if error.errno == errno.EACCES else ""
            raise UserError(f"{file} can't be read: {error.strerror}", way_out=way_out) from None


def _refuse_pickles(folder: Path, files: list[Path]) -> None:
    """Weights are safetensors. A pickle beside them is never read; pickles alone are refused."""
    if any(file.suffix in (".safetensors", ".gguf") for file in files):
        return
    for file in files:
        if file.suffix in _PICKLES and file.parent == folder:
            raise UserError(
                f"{file} is a pickle, which can run any code when it is read",
                rule="slimtune reads weights from safetensors only.",
                way_out="Convert it where you trust it: save_pretrained of Transformers or PEFT writes safetensors.",
            )


def _read_json(file: Path) -> Any:
    if file.stat().st_size > _MAX_JSON:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes", rule=f"At most {_MAX_JSON:,} are read as JSON.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no valid JSON: {error}", way_out="Check that the download is whole.") from None


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value at any depth, with what it holds."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _refuse_code(file: Path, key: str, value: Any) -> None:
    if not value:
        return
    if _IMPLEMENTATION.fullmatch(key):
        check_attention(str(file), value)
    elif key in _LOADS_CODE:
        raise _code_refused(file, key, value)


def _code_refused(file: Path, key: str, value: Any) -> UserError:
    text = json.dumps(value)
    return UserError(
        f"{file} asks for code: {key} = {text[:120]}",
        rule="slimtune runs no code that comes with a model unless told to.",
        way_out="Read that code; for a model you can then pass --trust-remote-code.",
    )


def _refuse_path(file: Path, key: str, value: Any) -> None:
    """Tokenizer configs name their files; those stand beside them."""
    if key.endswith("_file") and isinstance(value, str) and (value.startswith(("/", "~")) or ".." in Path(value).parts):
        raise UserError(
            f"{file} points out of its folder: {key} = {value!r}", rule="A model's files stand in its folder."
        )


def _refuse_outside_shards(file: Path, content: Any) -> None:
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise UserError(f"{file} has no weight_map", way_out="Check that the download is whole.")
    for shard in set(map(str, shards.values())):
        if shard != Path(shard).name or Path(shard).suffix in _PICKLES:
            raise UserError(
                f"{file} names the weight file {shard!r}",
                rule="Weight files are safetensors in the model's own folder.",
            )
