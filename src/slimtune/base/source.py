"""Where a model comes from: a local folder or a hub id, and how a library is asked to read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slimtune.base.embedded import embedded_model_folder, is_embedded
from slimtune.base.trust import check_model_folder
from slimtune.errors import SlimtuneError, UserError, is_panic, shown

__all__ = ["check_folder", "from_pretrained", "local_revision", "model_source", "upstream_errors"]


def model_source(model: str) -> str:
    """What Transformers is to load for the name that a person gave: a local folder's path, or a hub id.

    Raises:
        UserError: A local path that is no model folder: missing, a file, a run, an adapter, or without config.json.
    """
    if is_embedded(model):
        return str(embedded_model_folder())
    path = Path(model).expanduser()
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not path.exists():
        if looks_local:
            raise UserError(f"model folder {model} does not exist", way_out="Give a local folder or a hub id.")
        if "/" not in model:
            raise UserError(
                f"unknown model {model!r}",
                rule="A model is a hub id (owner/name), a local folder, or smollm2-135m.",
                way_out="Check the name.",
            )
        return model
    if path.is_file():
        raise UserError(
            f"model {model} is a file",
            rule="A base is a folder with config.json and safetensors weights.",
            way_out="Give the folder that holds it.",
        )
    if (path / "config.json").is_file():
        return str(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model {model} is an adapter, not a base",
            rule="An adapter holds only the trained part; the base is loaded first.",
            way_out=f"Give its base{_base_of_adapter(path)}, or go on from it by `slimtune train --from RUN`.",
        )
    if (path / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"model {model} is a run of slimtune, not a base",
            rule="A run holds an adapter; the base is loaded first.",
            way_out=f"Give its base{_base_of_adapter(path / 'adapter')}, or start anew from the run: "
            "`slimtune train --from RUN`.",
        )
    raise UserError(
        f"model folder {model} has no config.json",
        rule="A base is a folder with config.json and safetensors weights.",
        way_out="Check the path.",
    )


def _base_of_adapter(folder: Path) -> str:
    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):
        return ""
    return f" ({name})" if name else ""


def check_folder(source: str, trust_remote_code: bool) -> None:
    """A local folder is looked at before any library reads it; a hub id's files are Transformers' to check."""
    if Path(source).is_dir():
        check_model_folder(Path(source), trust_remote_code=trust_remote_code)


def local_revision(source: str, revision: str | None) -> str | None:
    """The revision to load: none of a local folder, which has no others."""
    return None if Path(source).exists() else revision


def from_pretrained(loader: Any, source: str, **options: Any) -> Any:
    """Call an Auto class; what a person can mend becomes a UserError."""
    if options.get("revision") is None:
        options.pop("revision", None)
    with upstream_errors(source):
        return loader.from_pretrained(source, **options)


@contextmanager
def upstream_errors(source: str) -> Iterator[None]:
    """Within this, what a library says of the model from ``source`` that a person can mend becomes a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{source} does not fit this GPU's memory",
            way_out="Take a smaller model, or free memory that other programs hold (nvidia-smi shows them).",
        ) from None
    except SlimtuneError:
        raise
    except BaseException as error:  # the libraries take a folder at its word: it fails anywhere, with anything
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise _load_error(source, error) from error


def _load_error(source: str, error: BaseException) -> UserError:
    text = str(error).strip()
    first = shown(text.splitlines()[0] if text else type(error).__name__, 300)
    if "trust_remote_code" in text or "custom code" in text:
        return UserError(
            f"{source} needs Python code of its own to load",
            rule="slimtune runs no code that comes with a model unless told to.",
            way_out="Read that code, then pass --trust-remote-code.",
        )
    if not Path(source).exists():
        return UserError(
            f"model {source} can't be loaded: {first}",
            rule="A hub id needs the network once, or the hub's cache from an earlier download.",
            way_out="Check the name and the network, or give a local folder.",
        )
    if isinstance(error, ImportError):
        return UserError(
            f"{source} needs packages that aren't installed: {first}",
            rule="Transformers imports what a model's images or audio need when it makes the model.",
            way_out="Install what it names, or take the family's text-only checkpoint.",
        )
    if "does not recognize this architecture" in text:
        return UserError(
            f"model folder {source} can't be loaded: {first}",
            rule="Its family must be one that the installed Transformers knows.",
            way_out="Install a newer Transformers, or take another model.",
        )
    return UserError(
        f"model folder {source} can't be loaded: {first}",
        rule="It must hold a causal language model that Transformers knows: config.json, weights, tokenizer.",
        way_out="Check that the download is whole.",
    )
