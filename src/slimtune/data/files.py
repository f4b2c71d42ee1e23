"""From what a person names to the files that it means: a file, a folder, a pattern, a data set in a folder.

A folder is one of four things, told by what lies in it:

=====================  ==============================================================================================
what lies in it        what it is
=====================  ==============================================================================================
``dataset_dict.json``  what ``datasets`` saved, in splits
``state.json``         what ``datasets`` saved, one split
``dataset_info.json``  LLaMA-Factory's data sets, each described there (:mod:`slimtune.data.described`)
files of rows          these; those whose names say valid or test are left for evaluation
=====================  ==============================================================================================
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.data.described import Description, descriptions
from slimtune.data.readers import ENDINGS, format_of
from slimtune.errors import UserError, check_utf8

__all__ = ["DataFile", "Found", "find_files"]

_SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "valid", "evaluation": "valid",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
}  # fmt: skip
"""As the datasets library reads names of files and folders."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file and its name in messages and ledgers, which tells it from the source's other files."""

    path: Path
    label: str


@dataclass(frozen=True, slots=True)
class Found:
    """The files that a name means."""

    files: tuple[DataFile, ...]
    description: Description | None = None
    """How LLaMA-Factory describes their columns, if it does."""
    left_out: tuple[str, ...] = ()
    """Files of a folder that its name doesn't mean: held-out data, and what lies deeper than its own files."""
    hub: str = ""
    """In place of files: the hub data set that a description names."""


def find_files(name: str) -> Found | None:
    """The files of a local path, of a folder, ``FOLDER:PART`` or a pattern; None where there is nothing of that name.

    Raises:
        UserError: A folder holds nothing that can be read, or doesn't say which of its parts is meant.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return Found((DataFile(path, path.name),))
    if path.is_dir():
        return _in_folder(path, name, "")
    folder, colon, part = name.rpartition(":")
    if colon and not set(part) & {"#", "*", "/"} and Path(folder).expanduser().is_dir():
        return _in_folder(Path(folder).expanduser(), folder, part)
    return _matching(name) if glob.has_magic(name) else None


def _matching(name: str) -> Found | None:
    """The files that a pattern matches, hidden ones left out; None if it matches none."""
    until = min(name.find(mark) for mark in "*?[" if mark in name)
    start, slash, _ = name[:until].rpartition("/")
    root = Path(start + slash).expanduser()
    try:
        paths = sorted(path for path in root.glob(name[len(start + slash) :]) if path.is_file())
    except ValueError as error:
        raise UserError(f"data {name} is no pattern: {error}", rule="** stands for folders: rows/**/*.jsonl") from None
    files = [path for path in paths if not any(step.startswith(".") for step in path.relative_to(root).parts)]
    return Found(_labelled(files, root)) if files else None


def _labelled(paths: Iterable[Path], root: Path) -> tuple[DataFile, ...]:
    labels = [(path, str(path.relative_to(root)) if path.is_relative_to(root) else path.name) for path in paths]
    for _, label in labels:
        check_utf8("the data file", label)
    return tuple(DataFile(path, label) for path, label in labels)


def _in_folder(folder: Path, name: str, part: str) -> Found:
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        split = _chosen(name, part, {str(split): str(split) for split in splits})
        return Found(_saved(folder / split, f"{name}:{split}"), left_out=tuple(f"{s}/" for s in splits if s != split))
    if (folder / "state.json").is_file():
        _no_part(name, part)
        return Found(_saved(folder, name))
    if (folder / "dataset_info.json").is_file():
        described = descriptions(_read_json(folder / "dataset_info.json"), f"{name}/dataset_info.json")
        if described is not None:
            return _described(folder, name, part, described)
    return _loose(folder, name, part)


def _saved(folder: Path, name: str) -> tuple[DataFile, ...]:
    """The Arrow files of what ``datasets`` saved, in their order."""
    names = [entry.get("filename", "") for entry in _read_json(folder / "state.json").get("_data_files", [])]
    files = [folder / Path(entry).name for entry in names]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise UserError(f"data {name} is no whole data set: {missing or 'its state.json'} names no file that is there")
    return tuple(DataFile(file, f"{folder.name}/{file.name}") for file in files)


def _described(folder: Path, name: str, part: str, described: dict[str, Description]) -> Found:
    chosen = described[_chosen(name, part, {key: key for key in described})]
    if chosen.hub and chosen.subset:
        raise UserError(
            f"data {name} is {chosen.subset} of a hub's data set",
            rule="slimtune takes a hub's data set as it is by default, not a subset or a folder of it.",
            way_out="Load it once, write its rows as jsonl, and name that file.",
        )
    if chosen.hub:
        return Found((), chosen, hub=chosen.hub)
    if not chosen.file:
        raise UserError(
            f"data {name} is described in dataset_info.json by what is neither a file nor a hub id of Hugging Face",
            rule="slimtune runs no data set's script (script_url), and knows no other hub or cloud.",
            way_out="Load it once, write its rows as jsonl, and name that file.",
        )
    path = folder / chosen.file
    if not path.exists():
        raise UserError(
            f"data {name}: dataset_info.json names {chosen.file}, which isn't there", way_out="Put it there."
        )
    if path.is_file():
        return Found((DataFile(path, path.name),), chosen)
    return Found(_labelled(_files_under(path), folder), chosen)


def _loose(folder: Path, name: str, part: str) -> Found:
    """Files of rows that lie in a folder, or in the folders below it where it holds none itself."""
    files = _files_under(folder)
    if not files:
        inside = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        shown = f" It holds {', '.join(inside[:5])}." if inside else ""
        raise UserError(f"data {name} is a folder without a file of rows.{shown}", rule=f"It reads {ENDINGS}.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(str(file.relative_to(folder))), []).append(file)
    if part:
        wanted = _SPLIT_NAMES.get(part.lower(), part)
        if wanted not in splits:
            raise _no_such_part(name, part, sorted(filter(None, splits)))
        return Found(_labelled(splits[wanted], folder))
    held_out = [file for split in ("valid", "test") for file in splits.get(split, [])]
    kept = [file for file in files if file not in held_out]
    if not kept:
        raise _no_such_part(name, "train", sorted(filter(None, splits)))
    below = [file for file in _all_under(folder) if file not in files and format_of(file.name) != "txt"]
    return Found(_labelled(kept, folder), left_out=tuple(file.label for file in _labelled(held_out + below, folder)))


def _files_under(folder: Path) -> list[Path]:
    """A folder's files of rows, or those of the folders below it where it holds none itself; text files only where
    there is nothing else anywhere, as they tend to be notes on the rest."""
    found = _all_under(folder)
    rows = [path for path in found if format_of(path.name) != "txt"] or found
    return [path for path in rows if path.parent == folder] or rows


def _all_under(folder: Path) -> list[Path]:
    """Every file that may hold rows, in a folder and below it."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and format_of(path.name) is not None
        and not any(step.startswith(".") for step in path.relative_to(folder).parts)
        and path.name not in ("dataset_info.json", "dataset_infos.json", "config.json", "state.json")
    )


def _split_of(name: str) -> str:
    """train, valid or test, if a word of the file's or its folders' names says so; else nothing."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), "")


def _chosen(name: str, part: str, parts: dict[str, str]) -> str:
    """The part that is meant: the one that is named, the only one, or train."""
    if part:
        if part not in parts:
            raise _no_such_part(name, part, list(parts))
        return part
    if len(parts) == 1:
        return next(iter(parts))
    if "train" in parts:
        return "train"
    raise UserError(
        f"data {name} holds {len(parts)} data sets: {', '.join(list(parts)[:8])}{', …' if len(parts) > 8 else ''}",
        rule="FOLDER:NAME takes one of them.",
        way_out=f"For example {name}:{next(iter(parts), 'NAME')}",
    )


def _no_part(name: str, part: str) -> None:
    if part:
        raise _no_such_part(name, part, [])


def _no_such_part(name: str, part: str, parts: list[str]) -> UserError:
    has = f"It has {', '.join(parts[:8])}." if parts else "It has no parts."
    way_out = f"For example {name}:{parts[0]}" if parts else f"Give {name}"
    return UserError(f"data {name} has no part {part!r}", rule=has, way_out=way_out)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data {path} can't be read: {error}") from None
    return found if isinstance(found, dict) else {}
