"""``--notify URL|COMMAND``: tell somebody how a training ended. What can't be told costs a line and no more.

It is a flag and no key of the config: a stranger's YAML, or a run's own, may not send anything or run a command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click

from slimtune.cli.closing import WORSE
from slimtune.errors import GuardStop, SlimtuneError, StopRequested, UserError, shown
from slimtune.run.folder import RunFolder
from slimtune.run.verdict import is_worse
from slimtune.width import cells
from slimtune.words import told

__all__ = ["check_targets", "notifying", "option"]

SECONDS = 15.0
"""Most time that all of them together may take."""
_LEAST_TO_KILL = 1.0
_MOST = 1_000
"""Characters of a message."""

F = TypeVar("F", bound=Callable[..., Any])


def option(command: F) -> F:
    """The flag."""
    return click.option(
        "--notify",
        multiple=True,
        metavar="URL|COMMAND",
        help="Tell how it ended: JSON by POST, or to a shell command's input; may come twice.",
    )(command)


def check_targets(targets: Sequence[str]) -> None:
    """See that each is a web address or may be a command.

    Raises:
        UserError: One is neither.
    """
    for target in targets:
        scheme, mark, _ = target.partition("://")
        if not target.strip() or (mark and scheme.isalpha() and not _is_url(target)):
            raise UserError(
                f"--notify {target!r} is neither an address nor a command",
                rule="An address begins with http:// or https:// and a host's name; a command is what a shell runs.",
            )


def _is_url(target: str) -> bool:
    try:
        parts = urlsplit(target)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


@contextmanager
def notifying(targets: Sequence[str], run: Callable[[], Path | None]) -> Iterator[None]:
    """Tell ``targets`` how the body, a training into the folder that ``run`` gives, ended: well, by a guard, or with an
    error. A run that was asked to stop tells nothing: whoever asked knows."""
    try:
        yield
    except (StopRequested, KeyboardInterrupt):
        raise
    except Exception as error:
        code = error.exit_code if isinstance(error, SlimtuneError) else 1
        _tell(targets, run(), "guard" if isinstance(error, GuardStop) else "error", code, str(error) or repr(error))
        raise
    if is_worse(_facts(run())):
        _tell(targets, run(), "worse", WORSE, "done, and the model is worse than it was")
    else:
        _tell(targets, run(), "done", 0, "done")


def _facts(run: Path | None) -> dict[str, Any]:
    if run is None:
        return {}
    with suppress(UserError):
        return RunFolder(run).facts()
    return {}


def _tell(targets: Sequence[str], run: Path | None, outcome: str, code: int, message: str) -> None:
    if not targets:
        return
    facts = _facts(run)
    training, verdict = facts.get("training") or {}, facts.get("verdict") or {}
    ended = {
        "text": f"slimtune: {'a run' if run is None else run.name}: {shown(message, _MOST)}",  # what chat services show
        "outcome": outcome,
        "exit_code": code,
        "message": shown(message, _MOST),
        "run": "" if run is None else str(run.absolute()),
        "model": (facts.get("base") or {}).get("model"),
        "steps": training.get("steps"),
        "seconds": training.get("seconds"),
        "loss": training.get("last_loss"),
        "held_out_before": (verdict.get("start") or {}).get("value"),
        "held_out_after": (verdict.get("end") or {}).get("value"),
    }
    body = json.dumps(ended, ensure_ascii=False)
    problems: dict[int, str] = {}

    def tell(number: int, target: str) -> None:
        problem = _post(target, body) if _is_url(target) else _run(target, body, ended)
        problems[number] = problem

    threads = [
        threading.Thread(target=tell, args=(number, target), daemon=True) for number, target in enumerate(targets)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 2 * _LEAST_TO_KILL)  # a name that isn't found may take longer than any time-out
    for number, target in enumerate(targets):
        if problem := problems.get(number, f"no answer within {SECONDS:.0f} s"):
            label = told("warning")
            line = told(f"--notify {_called(target)} failed: {problem}")
            click.echo(f"  {label}{' ' * (9 - cells(label))}{line}", err=True)


def _called(target: str) -> str:
    """A target in a message: of an address the host alone, as the rest may be a secret."""
    return str(urlsplit(target).hostname) if _is_url(target) else shown(target, 60)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is sent somewhere goes nowhere else."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _post(url: str, body: str) -> str:
    """What went wrong; empty if nothing did."""
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "slimtune"}
    request = urllib.request.Request(url, body.encode(), headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answered {error.code}"
    except (OSError, ValueError, urllib.error.URLError) as error:  # ValueError: an address that can't be asked for
        reason = getattr(error, "reason", error)
        return shown(str(getattr(reason, "strerror", None) or reason), 200)


def _run(command: str, body: str, ended: dict[str, Any]) -> str:
    """What went wrong with a shell's command; empty if nothing did. Nothing of the run stands in the command itself."""
    names = {"SLIMTUNE_OUTCOME": "outcome", "SLIMTUNE_MESSAGE": "message", "SLIMTUNE_RUN": "run",
             "SLIMTUNE_EXIT_CODE": "exit_code"}  # fmt: skip
    facts = {name: str(ended[key]) for name, key in names.items()}
    with TemporaryFile() as reads, TemporaryFile() as says:
        reads.write(body.encode())
        reads.seek(0)
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=reads,
                stdout=subprocess.DEVNULL,
                stderr=says,
                env=os.environ | facts,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {SECONDS:.0f} s"
        if code == 0:
            return ""
        says.seek(0)
        lines = says.read(4096).decode(errors="replace").strip().splitlines()
        return shown(f"it ended with exit code {code}" + (f": {lines[0]}" if lines else ""), 200)
