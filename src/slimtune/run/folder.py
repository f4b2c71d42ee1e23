"""A run's folder: where each file stands, and how it is written and read.

======================  =============================================================================
``config.yaml``         the resolved config: what ran
``environment.json``    machine and library versions
``metrics.jsonl``       one JSON object a logged step
``rehearsed.jsonl``     general prompts with the base's answers, if the run rehearses them
``samples.jsonl``       what held-out prompts were answered, one JSON object an evaluation
``ledger.jsonl``        each row of the data that was dropped or repaired, with its place and the reason
``facts.json``          what ``slimtune explain`` says, measured
``adapter/``            what was trained: adapter, tokenizer, chat template
``checkpoints/``        what `slimtune resume` goes on from
``stop``                there while somebody asks the run to stop
``log.txt``             what upstream libraries said
``report.html, .md``    the report
======================  =============================================================================
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from slimtune.base.named import similar
from slimtune.config import FREE_KEYS, Config, load_config
from slimtune.errors import GuardStop, StopRequested, UserError, shown
from slimtune.run import replaced
from slimtune.run.durable import JsonLines, replace_file
from slimtune.run.lock import LOCK, lock_run

__all__ = ["RunFolder", "check_free", "records"]

_PARTS = ("base", "adapter", "training", "optimizer", "verified", "verdict", "data", "versions", "hardware")
"""Of the facts, those that are objects."""


def check_free(path: Path, *, overwrite: bool) -> None:
    """See that a new run may be written to ``path``.

    Raises:
        UserError: It holds something already, and ``overwrite`` is off.
    """
    if overwrite or not path.exists() or not replaced.is_occupied(path):
        return
    run = RunFolder(path)
    goes_on = ""
    if run.config_file.is_file() and not run.adapter.is_dir():
        goes_on = f" Or go on with the run that is there: slimtune resume {shlex.quote(str(path))}"
    raise UserError(
        f"output {path} exists and is not empty",
        rule="A run never writes over another.",
        way_out=f"Choose another folder (-o), or pass --overwrite.{goes_on}",
    )


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.jsonl"
        self.rehearsed_file = path / "rehearsed.jsonl"
        self.ledger_file = path / "ledger.jsonl"
        self.facts_file = path / "facts.json"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.log_file = path / "log.txt"
        self.report_html = path / "report.html"
        self.report_markdown = path / "report.md"
        self._metrics: JsonLines | None = None
        self._samples: JsonLines | None = None

    @classmethod
    @contextmanager
    def create(cls, path: Path, *, overwrite: bool = False) -> Iterator[RunFolder]:
        """A new run folder. A run that was there is back, whole, if the body ends in whatever way before the new one
        has a checkpoint. Nothing half-written is left of a new run that ends in a :class:`UserError` before that.

        Raises:
            UserError: The folder holds something already and ``overwrite`` is off, or it can't be made or put aside.
        """
        run = cls(path)
        with ExitStack() as held:
            taken = _Taken()
            try:
                with _told(path):
                    taken.place(path, overwrite, held)
                yield run
            except BaseException as error:
                if not run.has_checkpoint:
                    taken.give_back(path, error)
                raise
            finally:
                if taken.is_ours:
                    run.drop_replaced()

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            UserError: ``path`` holds no run.
        """
        replaced.tell_stranded(path)
        run = cls(path)
        if not run.config_file.is_file():
            near = similar(str(path), holding="config.yaml")
            raise UserError(
                f"{path} is no run of slimtune: it has no config.yaml",
                way_out=f"Did you mean {near}?" if near else "Give the folder that `slimtune train -o` wrote.",
            )
        return run

    def drop_replaced(self) -> None:
        """Delete the run that this one was written over, once this one has a checkpoint."""
        if self.has_checkpoint:
            replaced.drop(self.path)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return any(self.checkpoints.glob("checkpoint-*"))

    def config(self) -> Config:
        """The resolved config that ran."""
        return load_config(self.config_file)

    def write_config(self, config: Config) -> None:
        """Record what runs."""
        replace_file(self.config_file, config.to_yaml())

    def write_json(self, file: Path, value: Any) -> None:
        """Write ``value`` whole: readers see the old file or the new one."""
        replace_file(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, file: Path) -> dict[str, Any]:
        """Read one of the run's JSON files; empty if it wasn't written.

        Raises:
            UserError: The file is damaged.
        """
        if not file.is_file():
            return {}
        try:
            value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} can't be read: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{file} holds no JSON object", way_out="Copy the run's folder whole.")
        return value

    def facts(self) -> dict[str, Any]:
        """What the run measured (:class:`slimtune.run.facts.Facts` as plain data); empty before there is any.

        Raises:
            UserError: The file is damaged, or a part of it is no object.
        """
        facts = self.read_json(self.facts_file)
        for part in _PARTS:
            if not isinstance(facts.get(part), (dict, type(None))):
                raise UserError(
                    f"{self.facts_file} isn't as slimtune wrote it: {part} is {shown(repr(facts[part]), 80)}",
                    way_out="Copy the run's folder whole, or train again.",
                )
        return facts

    def is_finished(self, config: Config) -> bool:
        """Whether nothing is left to do with ``config``: the run came to its end with it, and what it made is there."""
        facts = self.facts()
        made = [self.adapter, self.report_html, *(self.path / "export" / kind for kind in config.export)]
        now, ran = (
            {key: value for key, value in each.model_dump(mode="json").items() if key not in FREE_KEYS}
            for each in (config, self.config())
        )
        return bool(facts.get("training") and facts.get("verified")) and now == ran and all(map(Path.exists, made))

    def held_out(self) -> dict[str, Any] | None:
        """What the run remembers of the documents that it held out (:func:`slimtune.data.held_out.held_out_facts`)."""
        remembered: dict[str, Any] | None = (self.facts().get("data") or {}).get("held_out")
        return remembered

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
        """All complete lines of the metrics."""
        return records(_text(self.metrics_file))

    def append_samples(self, record: Mapping[str, Any]) -> None:
        """Add what held-out prompts were answered at one evaluation (:class:`slimtune.run.samples.Samples`)."""
        if self._samples is None:
            self._samples = JsonLines(self.samples_file)
        self._samples.append(record)

    def samples(self) -> list[dict[str, Any]]:
        """All complete lines of the samples."""
        return records(_text(self.samples_file))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def records(text: str) -> list[dict[str, Any]]:
    """The JSON objects in the lines of ``text``; one cut off by a kill is left out, and what is no JSON, as NaN."""
    found = []
    for line in text.split("\n"):
        try:
            record = json.loads(line, parse_constant=_no_json)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _no_json(constant: str) -> NoReturn:
    raise ValueError(constant)


def _json_safe(record: Mapping[str, Any]) -> dict[str, Any]:
    safe: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
            safe[key], safe[f"{key}_text"] = None, str(value)
        else:
            safe[key] = value
    return safe


class _Taken:
    """What was done to have a place for a new run, so that it can be undone."""

    def __init__(self) -> None:
        self.is_fresh = self.is_replaced = self.is_ours = False

    def place(self, path: Path, overwrite: bool, held: ExitStack) -> None:
        """Make an empty folder at ``path``, locked until ``held`` is closed, as is the run that goes aside for it."""
        if replaced.is_stranded(path):
            replaced.bring_back(path)
        self.is_fresh = not path.exists()
        check_free(path, overwrite=overwrite)
        if not self.is_fresh and replaced.is_occupied(path):
            replaced.check_replaceable(path)
            held.enter_context(lock_run(path))
            replaced.drop(path)
            self.is_replaced = True  # said before it is done: a signal may come between the two
            replaced.put_aside(path)
        path.resolve().mkdir(parents=True, exist_ok=True)
        held.enter_context(lock_run(path))
        self.is_ours = True
        replaced.clear(path)

    def give_back(self, path: Path, error: BaseException) -> None:
        """Undo :meth:`place`, as ``error`` ended the run before there was anything to keep."""
        if self.is_replaced and replaced.aside_of(path).is_dir():
            replaced.bring_back(path)
            if isinstance(error, StopRequested | GuardStop):  # theirs tells how to go on with what is no more
                way_out = f"The run that was in {path} is back. Give the same command again."
                raise type(error)(error.what, rule=error.rule, way_out=way_out) from error
        elif self.is_ours and isinstance(error, UserError):
            if self.is_fresh:
                shutil.rmtree(path, ignore_errors=True)
            else:
                replaced.clear(path)
                (path / LOCK).unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses of an output folder is the person's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output folder {path} can't be made or put aside: {error.strerror}", way_out="Choose another folder (-o)."
        ) from None
