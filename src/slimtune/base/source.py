"""How a library is asked to read a model, and what it says of one that it can't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slimtune.base.trust import check_model_folder
from slimtune.errors import SlimtuneError, UserError, is_panic, shown

__all__ = ["PassedThrough", "check_folder", "from_pretrained", "local_revision", "upstream_errors"]


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


class PassedThrough(BaseException):
    """Carries an error of slimtune's own through a loader that takes every ``Exception`` down and goes on."""

    def __init__(self, error: SlimtuneError) -> None:
        self.error = error


@contextmanager
def upstream_errors(source: str) -> Iterator[None]:
    """Within this, what a library says of the model from ``source`` that a person can mend becomes a UserError."""
    try:
        yield
    except PassedThrough as passed:
        raise passed.error from None
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
    lines = text.splitlines() or [type(error).__name__]
    first = shown(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300)
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
    if "Cannot allocate memory" in text:
        return UserError(
            f"model folder {source} can't be loaded: {first}",
            rule="A file of weights is mapped whole, and the system takes none that is larger than its RAM and swap.",
            way_out="Save it in smaller files (save_pretrained, max_shard_size), or add swap.",
        )
    return UserError(
        f"model folder {source} can't be loaded: {first}",
        rule="It must hold a causal language model that Transformers knows: config.json, weights, tokenizer.",
        way_out="Check that the download is whole.",
    )
