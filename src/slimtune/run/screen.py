"""What a person sees while a recipe runs: short lines, one bar, and nothing of upstream's noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from slimtune.errors import written_out
from slimtune.language import language
from slimtune.run.statement import Say
from slimtune.run.verdict import advice_text, general_text, verdict_text
from slimtune.width import breaks, cells
from slimtune.words import told

__all__ = ["Screen", "size_text", "time_left"]

_LINES_WITHOUT_TERMINAL = 20
_LOST = 0.05
"""Of the gradients' numbers that may become zero in FP8 without a word: they are the smallest of their rows."""
_LABEL = 9
"""Characters of a label with the room behind it."""
_HEAD = 2 + _LABEL
_BAR, _LEAST_BAR, _NUMBERS = 20, 8, 45
"""Cells of the bar, of one that still tells something, and of the numbers behind it that it gives way to."""


class Screen:
    """Lines and a progress bar on stderr; silent if ``quiet``, a line now and then where there is no terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._room = 0

    def say(self, label: str, text: str) -> None:
        """One line: a label and what is to be said under it."""
        self._print(label, text, "bold")

    def warn(self, text: str) -> None:
        """One line that should not be missed."""
        self._print("warning", text, "bold yellow")

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A spinner while something takes seconds."""
        if self.console.is_terminal:
            with self.console.status(f"  {told(text)}"):
                yield
        else:
            yield

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """The bar of the optimizer steps; :meth:`record` moves it."""
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        self._room = self.console.width - _HEAD - 2 * len(str(steps)) - 2
        bar = min(_BAR, self._room - _NUMBERS)
        if bar >= _LEAST_BAR:
            self._room -= bar + 1
        columns = (
            TextColumn(f"  [bold]{_padded(told('training'))}[/bold]"),
            *([BarColumn(bar_width=bar)] if bar >= _LEAST_BAR else []),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            self._progress, self._task = progress, progress.add_task("training", total=steps, numbers="")
            try:
                yield
            finally:
                self._progress = self._task = None

    def record(self, record: dict[str, Any]) -> None:
        """Show one record of the trainer (see :class:`slimtune.training.progress.MetricsCallback`)."""
        if "eval_loss" in record:
            self.say("held out", f"step {record['step']}: loss {record['eval_loss']:.4f}")
        if (lost := record.get("eval_fp8_lost", 0.0)) > _LOST:
            self.warn(f"{lost:.0%} of what flows back is too small for FP8 by now: precision: bf16 loses none of it")
        if "loss" not in record:
            return
        numbers = _numbers(record, self._room if self._progress is not None else None)
        step, steps = int(record["step"]), int(record["steps"])
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, total=steps, numbers=numbers)
        elif step == 1 or step == steps or step % max(1, steps // _LINES_WITHOUT_TERMINAL) == 0:
            self.say("training", f"{step}/{steps} · {numbers}")

    def conclude(self, facts: Mapping[str, Any]) -> None:
        """Say what became of the model, by a run's facts; in red if it is worse than it was."""
        verdict = facts["verdict"]
        style = {"better": "bold green", "worse": "bold red"}.get(verdict["outcome"], "bold")
        say = _say()
        text = verdict_text(verdict, facts["training"], say)
        if verdict["outcome"] == "unmeasured":
            text = say("not measured: ", "未测量：") + text
        self._print("result", text, style, style.removeprefix("bold").strip())
        for more in (advice_text(verdict, say), general_text(verdict, say)):
            if more:
                self._print("", more.replace("`", ""))

    def _print(self, label: str, text: str, style: str = "", text_style: str = "") -> None:
        """A label and its text: in a terminal broken between words, clear of the label; elsewhere one line."""
        # No markup: names of files may hold what Rich reads as such.
        head, body = Text("  " + _padded(told(label)), style), Text(written_out(told(text)), text_style)
        if not self.console.is_terminal:
            self.console.print(head + body)
            return
        for line in body.divide(breaks(body.plain, self.console.width - _HEAD)):
            line.rstrip()
            self.console.print(head + line)
            head = Text(" " * _HEAD)


def _numbers(record: Mapping[str, Any], room: int | None) -> str:
    """What is said of a step: as much as there is room for, the least needed left out first."""
    loss, speed = f"{record['loss']:.4f}", f"{record['tokens_per_second']:,.0f}"
    memory, left = size_text(record["memory_bytes"]), time_left(record["seconds_left"])
    texts = (
        told(f"loss {loss} · {speed} tokens/s · {memory} · {left} left"),
        told(f"loss {loss} · {speed} tokens/s · {left} left"),
        told(f"loss {loss} · {left} left"),
        told(f"loss {loss}"),
    )
    return next((text for text in texts if room is None or cells(text) <= room), "")


def _say() -> Say:
    return lambda english, chinese: chinese if language() == "zh" else english


def _padded(label: str) -> str:
    return label + " " * (_LABEL - cells(label))


def size_text(count: float) -> str:
    """Bytes as people read them: 1.8 MiB, 1.31 GiB (powers of two, as a memory budget is given)."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**17 else f"{count / 2**10:.1f} KiB"


def time_left(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
