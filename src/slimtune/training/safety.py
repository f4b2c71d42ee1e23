"""What keeps a run safe, put together: identity, checkpoints, signals, watchdog, alarms."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from slimtune.adapter.passport import template_hash, tokenizer_hash
from slimtune.config import Config
from slimtune.data.packing import MicroBatches
from slimtune.data.sources import content_hash, parse_source
from slimtune.errors import GuardStop, SlimtuneError, UserError, by_the_system
from slimtune.plan import ANSWER_WEIGHT, rounds_of_rows
from slimtune.run.environment import library_versions
from slimtune.run.folder import RunFolder
from slimtune.run.identity import Identity, require_same
from slimtune.run.lock import take_request
from slimtune.run.screen import Screen
from slimtune.run.statement import counted
from slimtune.training.checkpoint import IDENTITY, Checkpoints
from slimtune.training.resumable import Safety
from slimtune.training.stop import StopSignals, Watchdog

__all__ = ["disk_told", "identity_of", "make_safety", "results_written"]


def identity_of(config: Config, base: str, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> Identity:
    """What this run's numbers follow from.

    Args:
        config: Resolved.
        base: The loaded base's fingerprint.
        tokenizer: With the run's chat template.
        run: Its folder.
    """
    data = {text: content_hash(parse_source(text)) for text in (*config.data, *config.eval)}
    if config.rehearse:
        answers = run.rehearsed_file
        data[answers.name] = content_hash(parse_source(str(answers)))
        if (rounds := rounds_of_rows(config)) > 1:
            data["rows beside each answer"] = f"{rounds} times"
        data["a token of an answer"] = f"counts {ANSWER_WEIGHT:g}"
    return Identity(
        config=config.model_dump(mode="json"),
        base=base,
        data=data,
        tokenizer=tokenizer_hash(tokenizer),
        template=template_hash(tokenizer),
        python=platform.python_version(),
        versions=library_versions(),
    )


def make_safety(
    config: Config,
    run: RunFolder,
    identity: Identity,
    data: MicroBatches,
    signals: StopSignals,
    watchdog: Watchdog,
    screen: Screen,
    *,
    accept_changes: bool = False,
) -> Safety:
    """The safety of one run. If the run has a checkpoint, this is where it is checked that it can go on from it.

    Raises:
        UserError: Something changed since the checkpoint, and ``accept_changes`` is off.
    """
    checkpoints = Checkpoints(
        run.checkpoints, config.keep_checkpoints, tell=screen.warn, beat=watchdog.beat, rest=watchdog.rest
    )
    newest = checkpoints.newest_valid()
    if newest is not None:
        before = Identity.from_bytes((newest / IDENTITY).read_bytes())
        changes = require_same(before, identity, run.path, accept=accept_changes)
        event = {"event": "resumed", "step": checkpoints.last_saved, "checkpoint": newest.name}
        run.append_metrics({**event, "changes": [vars(change) for change in changes]})
        accepted = f", {counted(len(changes), 'change')} accepted" if changes else ""
        screen.say("resume", f"from step {checkpoints.last_saved}{accepted}")
    return Safety(
        config=config,
        checkpoints=checkpoints,
        identity=identity,
        signals=signals,
        watchdog=watchdog,
        record=run.append_metrics,
        warn=screen.warn,
        journal_error=lambda: run.metrics_error,
        stop_file=lambda: take_request(run.path),
        rows=lambda position: [str(place) for place in data.rows(position)],
    )


@contextmanager
def disk_told(run: RunFolder) -> Iterator[None]:
    """What the system refuses while the body runs is a message about the file, not a fault of slimtune's.

    Raises:
        UserError: A file can't be read or written.
    """
    try:
        yield
    except Exception as error:
        refused = _refused(error)
        if refused is None:
            raise
        if run.has_checkpoint:
            rule = f"The run is saved up to its newest checkpoint in {run.checkpoints}."
            way_out = f"{refused.way_out} Then: slimtune resume {shlex.quote(str(run.path))}"
            raise UserError(refused.what, rule=rule, way_out=way_out) from error
        raise refused from error


@contextmanager
def results_written(run: RunFolder, signals: StopSignals) -> Iterator[None]:
    """Writing the results must not lose the run: whatever fails here leaves the last checkpoint to go on from.

    Raises:
        GuardStop: The disk failed, or no memory is left on the GPU for a fresh base's proof of the adapter.
        UserError: Something else that the person can mend; how to go on is added.
        StopRequested: A signal came, whatever a library made of it.
    """
    done = "All steps are done and saved in the last checkpoint."
    then = f"Then: slimtune resume {shlex.quote(str(run.path))}"
    try:
        yield
    except UserError as error:
        signals.check()
        way_out = f"{error.way_out} {then}".strip()
        raise UserError(error.what, rule=f"{error.rule} {done}".strip(), way_out=way_out) from error
    except torch.OutOfMemoryError as error:
        signals.check()
        raise GuardStop(
            f"no memory is left on the GPU to read the adapter back into a fresh base: {str(error).splitlines()[0]}",
            rule=f"{done} The adapter is not yet proven.",
            way_out=f"Free the GPU of other programs. {then}",
        ) from error
    except Exception as error:
        signals.check()
        refused = _refused(error)
        if refused is None:
            raise
        what = f"the results can't be written: {refused.what}"
        raise GuardStop(what, rule=done, way_out=f"{refused.way_out} {then}") from error


def _refused(error: Exception) -> UserError | None:
    """What the system refused, with the file if it is known; None if ``error`` says nothing of that kind."""
    if isinstance(error, SlimtuneError):
        return None
    refused = by_the_system(error)
    if refused is None and isinstance(error, OSError):
        refused = UserError(str(error), way_out="Mend that.")
    return refused
