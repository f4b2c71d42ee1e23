"""A run's folder: where each file stands, and how it is written and read.

======================  =============================================================================
``config.yaml``         the resolved config: what ran
``environment.json``    machine and library versions
``metrics.jsonl``       one JSON object a logged step
``ledger.jsonl``        each row of the data that was dropped or repaired, with its place and the reason
``facts.json``          what ``slimtune explain`` says, measured
``adapter/``            what was trained: adapter, tokenizer, chat template
``checkpoints/``        what `slimtune resume` goes on from
``log.txt``             what upstream libraries said
``report.html, .md``    the report
======================  =============================================================================
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimtune.config import Config, load_config
from slimtune.errors import UserError
from slimtune.run.durable import JsonLines, write_file
from slimtune.run.lock import LOCK, lock_run

__all__ = ["RunFolder"]


SET_UP = frozenset({LOCK, "log.txt", "ledger.jsonl", "stacks.txt", "checkpoints", ".config.yaml.tmp"})
"""What stands in the folder of a run that was stopped while it was set up; ``config.yaml`` comes last."""
REPLACED = ".replaced"
"""Where the run that is written over waits until the new one has a checkpoint."""


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.ledger_file = path / "ledger.jsonl"
        self.facts_file = path / "facts.json"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.log_file = path / "log.txt"
        self.report_html = path / "report.html"
        self.report_markdown = path / "report.md"
        self._metrics: JsonLines | None = None

    @classmethod
    @contextmanager
    def create(cls, path: Path, *, overwrite: bool = False) -> Iterator[RunFolder]:
        """A new run folder. If the body ends in a :class:`UserError`, nothing half-written is left behind, and the
        run that was to be written over is back; but a run that has a checkpoint is kept, whatever happens to it.

        Raises:
            UserError: The folder holds something already and ``overwrite`` is off, or it can't be made or emptied.
        """
        fresh = not path.exists()
        if not fresh and _occupied(path):
            if not overwrite:
                raise UserError(
                    f"output {path} exists and is not empty",
                    rule="A run never writes over another.",
                    way_out="Choose another folder (-o), or pass --overwrite.",
                )
            _refuse_foreign(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {path} can't be made: {error.strerror}") from None
        with lock_run(path):
            try:
                _set_aside(path)
            except OSError as error:
                raise UserError(f"output folder {path} can't be emptied: {error}") from None
            run = cls(path)
            try:
                yield run
            except UserError:
                if not run.has_checkpoint:
                    _put_back(path)
                    if fresh:
                        shutil.rmtree(path, ignore_errors=True)
                raise
            finally:
                run.drop_replaced()

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            UserError: ``path`` holds no run.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(
                f"{path} is no run of slimtune: it has no config.yaml",
                way_out="Give the folder that `slimtune train -o` wrote.",
            )
        return run

    def drop_replaced(self) -> None:
        """Delete the run that this one was written over, once this one has a checkpoint."""
        if self.has_checkpoint:
            shutil.rmtree(self.path / REPLACED, ignore_errors=True)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return any(self.checkpoints.glob("checkpoint-*"))

    def config(self) -> Config:
        """The resolved config that ran."""
        return load_config(self.config_file)

    def write_config(self, config: Config) -> None:
        """Record what runs."""
        self._write(self.config_file, config.to_yaml())

    def write_json(self, file: Path, value: Any) -> None:
        """Write ``value`` whole: readers see the old file or the new one."""
        self._write(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def _write(file: Path, text: str) -> None:
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.unlink(missing_ok=True)
        write_file(temporary, text.encode())
        temporary.replace(file)

    def read_json(self, file: Path) -> dict[str, Any]:
        """Read one of the run's JSON files; empty if it wasn't written.

        Raises:
            UserError: The file is damaged.
        """
        if not file.is_file():
            return {}
        try:
            value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} can't be read: {error}") from None
        return value

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to the metrics. A NaN becomes null with its true value beside it, so the file stays JSON."""
        if self._metrics is None:
            self._metrics = JsonLines(self.metrics_file)
        self._metrics.append(_json_safe(record))

    @property
    def metrics_error(self) -> OSError | None:
        """Why the metrics can't be written at the moment (they wait in memory); None if they can."""
        return None if self._metrics is None else self._metrics.error

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of the metrics; a last line cut off by a kill is left out."""
        if not self.metrics_file.is_file():
            return []
        records = []
        for line in self.metrics_file.read_text(encoding="utf-8").split("\n"):
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records


def _json_safe(record: Mapping[str, Any]) -> dict[str, Any]:
    safe: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
            safe[key], safe[f"{key}_text"] = None, str(value)
        else:
            safe[key] = value
    return safe


def _occupied(path: Path) -> bool:
    """Whether ``path`` is anything but an empty folder, or that of a run that never began."""
    if not path.is_dir() or any((path / "checkpoints").glob("*")):
        return True
    never_began = SET_UP if (path / LOCK).exists() else frozenset[str]()
    return any(child.name not in never_began for child in path.iterdir())


def _contents(path: Path) -> list[Path]:
    """What a run's folder holds, but for the lock that is held on it and the run that it was written over."""
    return [child for child in path.iterdir() if child.name not in (LOCK, REPLACED)]


def _set_aside(path: Path) -> None:
    """Empty a run's folder: what it holds waits in :data:`REPLACED`, or goes if another run waits there already."""
    aside, contents = path / REPLACED, _contents(path)
    if aside.exists():
        _delete(contents)
    elif contents:
        aside.mkdir()
        for child in contents:
            child.rename(aside / child.name)


def _put_back(path: Path) -> None:
    """Undo :func:`_set_aside`."""
    _delete(_contents(path))
    aside = path / REPLACED
    if aside.exists():
        for child in aside.iterdir():
            child.rename(path / child.name)
        aside.rmdir()
    else:
        (path / LOCK).unlink(missing_ok=True)


def _delete(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_foreign(path: Path) -> None:
    """--overwrite replaces a run, never somebody's other folder."""
    if not path.is_dir() or not any(
        (path / name).exists() for name in ("config.yaml", "log.txt", "environment.json", REPLACED)
    ):
        raise UserError(
            f"output {path} is no run of slimtune",
            rule="--overwrite replaces runs only.",
            way_out="Choose another folder (-o).",
        )
