"""A run written over another: the old one goes aside by one rename, and comes back whole unless the new one lasts.

``runs/mine`` goes to ``runs/.mine.replaced`` and stays there, locked, until the new run has a checkpoint. Whatever ends
the new run before that brings it back: an error at once, a kill with the next command that opens the run. What is
renamed and deleted is only ever a run: one that has a run's config, and holds nothing that a run doesn't write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from slimtune.config import read_yaml
from slimtune.errors import UserError
from slimtune.run.durable import SUMS, discard, listed
from slimtune.run.lock import LOCK, is_locked, is_run_lock

__all__ = [
    "aside_of",
    "bring_back",
    "check_adapter",
    "check_replaceable",
    "clear",
    "drop",
    "is_occupied",
    "is_stranded",
    "put_aside",
    "tell_stranded",
]

_SET_UP = frozenset(
    {LOCK, "log.txt", "ledger.jsonl", "stacks.txt", "checkpoints", ".config.yaml.tmp", "rehearsed.jsonl",
     ".rehearsed.jsonl.tmp"}
)  # fmt: skip
"""What stands in the folder of a run that was stopped while it was set up; ``config.yaml`` comes last."""
_FILES = re.compile(
    r"(config\.yaml|environment\.json|(metrics|samples|ledger|rehearsed)\.jsonl|facts\.json|log\.txt|stacks\.txt"
    r"|report\.(html|md)|compare\.(html|json)|\.lock|stop"
    r"|\.(config\.yaml|environment\.json|facts\.json|rehearsed\.jsonl|report\.(html|md))\.tmp)"
)
_SAVED = re.compile(r"adapter|checkpoint-\d+")
"""Folders that list what is in them."""
_UNSAVED = re.compile(r"damaged-checkpoint-\d+|\.(adapter|checkpoint-\d+)\.(partial|discarded)")
"""Folders of files whose list is damaged or not yet written."""
_EXPORTED = re.compile(r".+\.gguf|Modelfile|parity\.json")
_OWN_KEYS = frozenset({"model", "data", "output", "quantization", "lora_r", "seed"})
"""Keys that every run's ``config.yaml`` has, and no other program's file has all of."""


def is_occupied(path: Path) -> bool:
    """Whether ``path`` is anything but an empty folder, or that of a run that never began."""
    if not path.is_dir() or any((path / "checkpoints").glob("*")):
        return True
    never_began = _SET_UP if is_run_lock(path / LOCK) else frozenset[str]()
    return any(child.name not in never_began for child in path.iterdir())


def check_replaceable(path: Path) -> None:
    """See that ``path`` is a run with nothing in it that a run doesn't write.

    Raises:
        UserError: It isn't; the first thing that would be lost is named.
    """
    if not path.is_dir() or not _is_run(path):
        raise UserError(
            f"output {path} is no run of slimtune",
            rule="--overwrite replaces runs only, which are known by their config.yaml.",
            way_out="Choose another folder (-o).",
        )
    for stranger in _foreign(path):
        raise UserError(
            f"output {path} holds {stranger.relative_to(path)}, which no run writes",
            rule="--overwrite replaces a run, and nothing else that lies in its folder.",
            way_out="Move it out, or choose another folder (-o).",
        )
    real = path.resolve()
    for mount in (Path(partition.mountpoint) for partition in psutil.disk_partitions(all=True)):
        if mount.is_relative_to(real):
            raise UserError(
                f"output {path} can't be put aside: {mount} is mounted",
                rule="--overwrite moves the old run aside until the new one has a checkpoint.",
                way_out="Choose a folder that is no mount and has none in it (-o).",
            )
    if Path.cwd().is_relative_to(real):
        raise UserError(f"output {path} can't be put aside: this command was given inside it",
                        way_out="Give it from another folder.")  # fmt: skip


def check_adapter(folder: Path) -> None:
    """See that a run's ``adapter/``, which the end of a resumed run replaces whole, holds only what the run wrote.

    Raises:
        UserError: It holds something else; that is named.
    """
    for stranger in _foreign_saved(folder) if folder.is_dir() and listed(folder) else ():
        raise UserError(
            f"{stranger} is nothing that the run wrote",
            rule="The end of a resumed run writes its adapter anew, and nothing else in that folder would be left.",
            way_out="Move it out.",
        )


def aside_of(path: Path) -> Path:
    """Where the run that ``path`` held waits."""
    real = path.resolve()
    return real.with_name(f".{real.name}.replaced")


def put_aside(path: Path) -> None:
    """Rename a run out of the way. Raises OSError if that can't be done; then nothing has changed."""
    path.resolve().rename(aside_of(path))


def clear(path: Path) -> None:
    """Empty the folder of a run that never began, or of one that ended before there was anything to keep."""
    for child in path.iterdir():
        if child.name != LOCK:
            discard(child) if _is_folder(child) else child.unlink()


def bring_back(path: Path) -> None:
    """Undo :func:`put_aside`: what the new run wrote goes, the old one is there again.

    Raises:
        UserError: It can't be moved back; where it waits is said.
    """
    real = path.resolve()
    try:
        discard(real)
        aside_of(path).rename(real)
    except OSError as error:
        raise UserError(
            f"the run that {path} held can't be moved back: {error.strerror}",
            rule=f"It waits whole in {aside_of(path)}.",
            way_out=f"Move it: mv {aside_of(path)} {real}",
        ) from error


def drop(path: Path) -> None:
    """Delete the run that waits for ``path``'s, if one does. A kill half-way leaves none that looks whole."""
    aside = aside_of(path)
    if _is_run(aside) or not aside.exists():
        with suppress(OSError):  # what can't be deleted stays, hidden; the new run is none the worse for it
            discard(aside)


def is_stranded(path: Path) -> bool:
    """Whether the process that wrote over a run at ``path`` died before the new one had a checkpoint."""
    aside = aside_of(path)
    if not _is_run(aside) or any((path / "checkpoints").glob("checkpoint-*")) or (path / "adapter").exists():
        return False
    return not is_locked(aside)


def tell_stranded(path: Path) -> None:
    """Bring a run back that a killed process had put aside, and say so.

    Raises:
        UserError: That is what was done: what the person meant, the old run or the new one, they alone know.
    """
    if is_stranded(path):
        bring_back(path)
        raise UserError(
            f"run {path} was being written over by one that ended before its first checkpoint; the old one is back",
            way_out="Give this command again to use it, or train anew with --overwrite.",
        )


def _is_run(path: Path) -> bool:
    try:
        return read_yaml(path / "config.yaml").keys() >= _OWN_KEYS
    except UserError:
        return False


def _foreign(run: Path) -> Iterator[Path]:
    """What lies in a run's folder that no run writes."""
    for child in sorted(run.iterdir()):
        if _is_folder(child) and child.name == "checkpoints":
            yield from _foreign_checkpoints(child)
        elif _is_folder(child) and child.name == "export":
            for kind in sorted(child.iterdir()):
                yield from _other_files(kind, _EXPORTED) if _is_folder(kind) else [kind]
        elif _is_folder(child) and child.name == "stdin":
            yield from _other_files(child, re.compile(r"stdin\..+"))
        elif _is_folder(child) and (_SAVED.fullmatch(child.name) or _UNSAVED.fullmatch(child.name)):
            yield from _foreign_saved(child)
        elif _is_folder(child) or not _FILES.fullmatch(child.name):
            yield child


def _foreign_checkpoints(folder: Path) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if child.name == "runs" and _is_folder(child):  # what report_to: tensorboard writes
            for path in sorted(child.rglob("*")):
                if not _is_folder(path) and not path.name.startswith("events.out.tfevents"):
                    yield path
        elif _is_folder(child) and (_SAVED.fullmatch(child.name) or _UNSAVED.fullmatch(child.name)):
            yield from _foreign_saved(child)
        else:
            yield child


def _foreign_saved(folder: Path) -> Iterator[Path]:
    """Of a folder that lists its files: the others. Of one whose list is damaged or missing: folders."""
    names = None if _UNSAVED.fullmatch(folder.name) else listed(folder)
    for child in sorted(folder.iterdir()):
        if _is_folder(child) or (names is not None and child.name not in names and child.name != SUMS):
            yield child


def _other_files(folder: Path, known: re.Pattern[str]) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if _is_folder(path) or not known.fullmatch(path.name))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
