"""What the name of a model stands for: a local folder, or a hub id. No library is loaded to tell."""

from __future__ import annotations

import difflib
import json
from contextlib import suppress
from pathlib import Path

from slimtune.base.embedded import EMBEDDED, embedded_model_folder, is_embedded
from slimtune.errors import UserError

__all__ = ["base_of_adapter", "check_name", "model_source", "similar"]


def model_source(model: str) -> str:
    """What Transformers is to load for the name that a person gave: a local folder's path, or a hub id.

    Raises:
        UserError: A local path that is no model folder: missing, a file, a run, an adapter, or without config.json.
    """
    if is_embedded(model):
        return str(embedded_model_folder())
    check_name(model)
    path = Path(model).expanduser()
    return str(path) if path.exists() else model


def check_name(model: str) -> None:
    """See that a name can stand for a model.

    Raises:
        UserError: As :func:`model_source`.
    """
    path = Path(model).expanduser()
    if is_embedded(model):
        return
    if not path.exists():
        _check_missing(model)
        return
    if path.is_file():
        raise UserError(
            f"model {model} is a file",
            rule="A base is a folder with config.json and safetensors weights.",
            way_out="Give the folder that holds it.",
        )
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model {model} is an adapter, not a base",
            rule="An adapter holds only the trained part; the base is loaded first.",
            way_out=f"Give its base{_in_brackets(path)}, or go on from it by `slimtune train --from RUN`.",
        )
    if (path / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"model {model} is a run of slimtune, not a base",
            rule="A run holds an adapter; the base is loaded first.",
            way_out=f"Give its base{_in_brackets(path / 'adapter')}, or start anew from the run: "
            "`slimtune train --from RUN`.",
        )
    raise UserError(
        f"model folder {model} has no config.json",
        rule="A base is a folder with config.json and safetensors weights.",
        way_out="Check the path.",
    )


def similar(name: str, *, holding: str = "") -> str:
    """The folder beside the one named, or among ``runs``, whose name is nearest; empty if none is near.

    Args:
        name: What isn't there.
        holding: A file that the folder must hold; without it the embedded model counts as well.
    """
    path = Path(name).expanduser()
    known = {} if holding else {EMBEDDED: EMBEDDED}
    for folder in (Path("runs"), path.parent):
        with suppress(OSError):  # no such folder: nothing in it is near
            known |= {at.name: str(at) for at in folder.iterdir() if at.is_dir() and (at / holding).exists()}
    near = difflib.get_close_matches(path.name, known, n=1)
    return known[near[0]] if near else ""


def _check_missing(model: str) -> None:
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    near = similar(model)
    if looks_local:
        raise UserError(
            f"model folder {model} does not exist",
            way_out=f"Did you mean {near}?" if near else "Give a local folder or a hub id.",
        )
    if "/" not in model:
        raise UserError(
            f"unknown model {model!r}",
            rule="A model is a hub id (owner/name), a local folder, or smollm2-135m.",
            way_out=f"Did you mean {near}?" if near else "Check the name.",
        )


def base_of_adapter(folder: Path) -> str:
    """The base that the adapter in ``folder`` names; empty if it names none."""
    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(name or "")


def _in_brackets(folder: Path) -> str:
    name = base_of_adapter(folder)
    return f" ({name})" if name else ""
