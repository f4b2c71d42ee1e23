"""``slimtune train --dry-run --probe``: what a run takes in time, from a few of its steps on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slimtune.config import Config
from slimtune.data.stdin import is_stdin
from slimtune.errors import UserError
from slimtune.recipes import finetune
from slimtune.run.screen import Screen
from slimtune.run.statement import counted

__all__ = ["probe"]

STEPS = 3
"""The first one makes kernels and graphs and isn't counted."""
FORWARD_SHARE = 1 / 3
"""Of a training step's work that an evaluation takes for as many tokens: no backward, which is two thirds."""


def probe(config: Config, planned: Mapping[str, Any], screen: Screen) -> dict[str, float]:
    """Train a few steps of the run in a folder that goes away, and say what all of them will take.

    Args:
        config: As it was given.
        planned: What :func:`slimtune.cli.dry_run.dry_run` found.
        screen: Where to say it.

    Returns:
        Seconds of a step, of an evaluation and of the whole run.

    Raises:
        UserError: The data is standard input, which was read already; or training would be refused.
    """
    if any(map(is_stdin, (*config.data, *config.eval))):
        raise UserError("--probe reads the data twice, and - (standard input) can be read once",
                        way_out="Write it into a file, and give that file.")  # fmt: skip
    chosen = {choice["key"]: choice["value"] for choice in planned["choices"]}
    steps, held_out = planned["steps"], (planned["data"].get("held_out") or {}).get("documents", 0)
    evaluations = 1 + math.ceil(steps / chosen.get("eval_steps", config.eval_steps)) if held_out else 0
    few = {
        "max_steps": min(STEPS, steps), "eval_share": 0.0, "eval": (), "early_stopping": None, "samples": 0,
        "rehearse": 0.0, "export": (), "report_to": (), "logging_steps": 1, "save_steps": STEPS + 1,
        "eval_steps": "auto",
    }  # fmt: skip
    with TemporaryDirectory() as folder, screen.working("measuring a few steps"):
        values = {**chosen, **few, "output": Path(folder) / "probe", "overwrite": False}
        run = finetune(config.model_copy(update=values))
        records = [record for record in run.metrics() if "step_seconds" in record]
    counting = records[1:] or records
    step = statistics.median(record["step_seconds"] for record in counting)
    speed = statistics.median(record["tokens_per_second"] for record in counting)
    evaluation = FORWARD_SHARE * held_out * planned["mean_length"] / speed
    seconds = steps * step + evaluations * evaluation
    about, of, looks = _in_words(seconds), f"{step:.3g}", counted(evaluations, "evaluation")
    screen.say(
        "time",
        f"about {about}: {counted(steps, 'step')} of {of} s, measured here, and {looks} of about {evaluation:.2g} s; "
        "loading and proofs beside"
        if evaluations
        else f"about {about}: {counted(steps, 'step')} of {of} s, measured here; loading and proofs beside",
    )
    return {"step": step, "evaluation": evaluation, "run": seconds}


def _in_words(seconds: float) -> str:
    for size, name in ((3600.0, "hour"), (60.0, "minute")):
        if seconds >= 1.5 * size:
            return counted(float(f"{seconds / size:.2g}"), name)
    return counted(max(1, round(seconds)), "second")
