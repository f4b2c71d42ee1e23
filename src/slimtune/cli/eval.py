"""``slimtune eval RUN [DATA]``: loss and perplexity on held-out rows; tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slimtune.cli.early import check_files, check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.cli.using import model_options
from slimtune.errors import UserError
from slimtune.run.folder import RunFolder
from slimtune.width import cells
from slimtune.words import told

__all__ = ["command"]


@click.command()
@click.argument("target", metavar="RUN", type=PATH_OR_NAME)
@click.argument("data", nargs=-1, type=PATH_OR_NAME)
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness by name or .yaml file, comma-separated.")
@click.option("--limit", type=int, metavar="N", help="Questions of each task.")
@click.option("--with-base", is_flag=True, help="Measure the base too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
@model_options
def command(
    target: str,
    data: tuple[str, ...],
    tasks: str | None,
    limit: int | None,
    with_base: bool,
    as_json: bool,
    base: str | None,
    quantization: str | None,
    compute_dtype: str | None,
    trust_remote_code: bool,
) -> None:
    """Measure RUN on DATA: loss of a supervised token in nats and perplexity, with 95 % intervals over the rows.

    Without DATA the rows are those that the run held out of its training.
    A run is asked with the template variables and the date that it was trained with, a bare model with its
    template's defaults.
    """
    check_target(target)
    check_files(*data)
    remembered = not data and not tasks
    if remembered and RunFolder(Path(target)).held_out() is None:
        raise UserError(
            "nothing to evaluate on", rule=f"{target} held no rows out.", way_out="Give DATA, or --tasks NAMES."
        )
    with fast_imports():
        from slimtune.cli.bar import busy
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.evaluate import documents_of, losses
        from slimtune.use.held_out import held_out_of
        from slimtune.use.load import open_model
        from slimtune.use.tasks import run_tasks

    made: dict[str, Any] = {}
    with upstream_to_log(None), busy("computing the loss"):
        opened = open_model(
            target, base=base, quantization=quantization, dtype=compute_dtype, trust_remote_code=trust_remote_code
        )
        if data or remembered:
            documents = documents_of(opened, data) if data else held_out_of(opened).documents
            made["documents"], made["supervised_tokens"] = len(documents), documents.supervised_tokens
            made["tuned" if opened.found.adapter else "model"] = losses(opened, documents).mean()
            if with_base and opened.found.adapter:
                with opened.as_base():
                    made["base"] = losses(opened, documents).mean()
        if tasks:
            made["tasks"] = run_tasks(opened, [task.strip() for task in tasks.split(",")], limit)
    if as_json:
        sides = {name: {"loss": vars(i), "perplexity": vars(i.exp())} for name, i in made.items() if hasattr(i, "exp")}
        click.echo(json.dumps({**made, **sides}, ensure_ascii=False, indent=2, default=str))
        return
    if data or remembered:
        say(f"{made['documents']:,} documents, {made['supervised_tokens']:,} supervised tokens")
        for name in ("base", "model", "tuned"):
            if name in made:
                label = told(name)
                measured = told(f"loss {made[name]}  perplexity {made[name].exp()}")
                click.echo(f"{' ' * (6 - cells(label))}{label}  {measured}")
    for task, numbers in made.get("tasks", {}).items():
        click.echo(f"{task}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, float)))
