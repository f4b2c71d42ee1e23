"""Tasks of lm-evaluation-harness, which asks the model by Transformers' own ``generate`` and forward passes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.families.rotation import turns_anew
from slimtune.use.evaluate import goes_alone
from slimtune.use.load import Opened

__all__ = ["begun_anew", "run_tasks"]

_ROWS = 8


def run_tasks(opened: Opened, tasks: list[str], limit: int | None = None) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on what is opened, asked by the training's chat template.

    Args:
        opened: The model.
        tasks: Names of tasks, and files (``.yaml``) of one's own.
        limit: Questions of each task; all unless given.

    Raises:
        UserError: The package isn't installed, or has no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness",
            rule="It is a package of its own.",
            way_out="pip install 'slimtune[eval]'",
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {task: Path(task) for task in tasks if task.endswith((".yaml", ".yml"))}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"task file {file} does not exist", way_out="Give a file in lm-evaluation-harness's form.")
    known = TaskManager(include_path=[str(file.parent) for file in files.values()] or None)
    tasks = [_task_name(files[task]) if task in files else task for task in tasks]
    missing = [task for task in tasks if not known.match_tasks([task])]
    if missing:
        raise UserError(f"lm-evaluation-harness has no task {missing[0]!r}", way_out="lm_eval ls tasks lists them.")
    turns = turns_anew(opened.model.config.get_text_config(decoder=True))
    kind = HFLM if turns is None else begun_anew(HFLM, turns, opened.stop_ids)
    model = kind(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=_rows(opened))
    done = lm_eval.simple_evaluate(model, tasks=tasks, apply_chat_template=True, limit=limit, task_manager=known)
    results: dict[str, Any] = done["results"]
    return results


def _task_name(file: Path) -> str:
    """What a task's file calls it."""
    found = re.search(r"^task:[ \t]*[\"']?([^\s\"'#]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise UserError(f"{file} names no task", rule="A task's file has a line `task: NAME`.")
    return found.group(1)


def _rows(opened: Opened) -> int | str:
    """Rows of a batch: one where a row's logits change with what is beside it."""
    if goes_alone(opened, opened.context):
        return 1
    # "auto" tries ever larger batches of the longest context: seconds on a GPU, many minutes on a CPU.
    return "auto" if opened.device.type == "cuda" else _ROWS


def begun_anew(harness: type[Any], turns: int, ends: Container[int]) -> type[Any]:
    """The harness's model (``HFLM``, 0.4.13) for one that turns all tokens otherwise once they are many: a
    reply that grows so long goes on from its text, and not from what is kept of a short one. Its rows are alone.

    Args:
        harness: The class.
        turns: Tokens up to which nothing changes (:func:`slimtune.families.rotation.turns_anew`).
        ends: Tokens that end a reply.
    """

    class Turning(harness):  # type: ignore[misc]
        def _model_generate(self, context: Tensor, max_length: int, **settings: Any) -> Tensor:
            if context.shape[1] <= turns < max_length - 1:
                # The last token of these follows from a text that is still short.
                context = super()._model_generate(context=context, max_length=turns + 1, **settings)
                if context.shape[1] <= turns or int(context[0, -1]) in ends:
                    return context
                settings["attention_mask"] = torch.ones_like(context)
            made: Tensor = super()._model_generate(context=context, max_length=max_length, **settings)
            return made

    return Turning
